"""How to wait on the event loop for something that any thread can bring about."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from anyio import CancelScope, Event, get_cancelled_exc_class
from anyio.lowlevel import checkpoint_if_cancelled

from ._loops import loop_of, running_loop
from ._states import Home, Waiters


async def until(waiters: Waiters, met: Callable[[], bool]) -> None:
    """Wait until `met()` is true. Whoever makes it true wakes the `waiters`."""
    loop = loop_of(running_loop())
    while not met():
        event = Event()
        wake = partial(loop.call_soon, event.set)
        waiters.add(wake)
        try:
            if not met():
                await event.wait()
        finally:
            waiters.discard(wake)


async def until_empty(home: Home) -> None:
    """Wait until a home is empty, or its drain has given up."""
    await until(home.waiters, lambda: home.over or not home.unsettled)


async def outlast(wait: Callable[[], Awaitable[object]]) -> None:
    """Wait to the end even if this call is cancelled; raise the cancellation afterwards."""
    cancellation: BaseException | None = None
    with CancelScope(shield=True):
        while True:
            try:
                await wait()
            except get_cancelled_exc_class() as exc:  # a native task's own `cancel` gets through the shield
                cancellation = exc
            else:
                break
    if cancellation is not None:
        raise cancellation
    await checkpoint_if_cancelled()
