"""How to wait, on the event loop, for what happens anywhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from anyio import CancelScope, Event, get_cancelled_exc_class
from anyio.lowlevel import checkpoint_if_cancelled

from ._loops import loop_of, running_loop
from ._states import Home, Waiters


async def until(waiters: Waiters, met: Callable[[], bool]) -> None:
    """Wait until something is true that `waiters` are woken for."""
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
    """Wait until nothing is left in a home, or its drain has given up."""
    await until(home.waiters, lambda: home.over or not home.unsettled)


async def outlast(wait: Callable[[], Awaitable[object]]) -> None:
    """Wait, though we may be cancelled meanwhile. If we were, that goes on at the end."""
    cancellation: BaseException | None = None
    with CancelScope(shield=True):
        while True:
            try:
                await wait()
            except get_cancelled_exc_class() as exc:  # by the native task's own `cancel`, which a shield does not see
                cancellation = exc
            else:
                break
    if cancellation is not None:
        raise cancellation
    await checkpoint_if_cancelled()
