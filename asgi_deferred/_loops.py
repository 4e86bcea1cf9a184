"""Native tasks of the event loop, and calls from other threads, on asyncio and trio.

1. A deferred task runs in a native task of its own. If it leaves a cancel scope, a task group or a timeout open, that
   ends with the native task.
2. On asyncio this is one task, created with the deferred task's context and name. On trio it is a system task with a
   nursery, and a child in that nursery makes the call. When a task corrupts its stack of cancel scopes, trio raises an
   error out of that task. The nursery catches it.
3. `call_soon` may be called from any thread, finaliser or signal handler. It never blocks.
4. `spawn` runs no code of the user's before it returns, whatever the event loop's task factory is.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import _get_running_loop
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from typing import Any, Protocol


class TimeUp(Exception):
    """Raised by `within` when the time is over. `__cause__` is the cancellation; its traceback says where."""


class Job(Protocol):
    """The work of a native task."""

    native: Any  # has `cancel()`; None until the native task exists

    async def main(self) -> None:
        """Run it. Never raises."""

    def lost(self, native: Any = None) -> None:
        """Learn that the native task has ended. It may have been cancelled before the first step of `main`."""


class Loop(Protocol):
    """An event loop. Everything except `call_soon` and `is_running_here` belongs to the thread it runs in."""

    Cancelled: type[BaseException]
    only_by_us: bool  # whether nobody else can cancel our native tasks

    def is_running_here(self) -> bool:
        """Whether the calling code runs on this loop."""
        ...

    def call_soon(self, func: Callable[..., object], *args: object) -> bool:
        """Call a function on this loop; return False if the loop has ended."""
        ...

    def call_later(self, seconds: float, func: Callable[..., object], *args: object) -> Callable[[], object]:
        """Call a function after `seconds`; return a function that cancels this."""
        ...

    def spawn(self, job: Job, context: Context, name: str) -> bool:
        """Run a job in a native task; return False if the loop is about to end."""
        ...

    async def within(self, seconds: float, awaitable: Awaitable[Any]) -> None:
        """Await something in the calling native task. Raises TimeUp once `seconds` are over."""
        ...


def running_loop() -> Any:
    """Return the running event loop, or on trio its token; None if there is none."""
    loop = _get_running_loop()
    if loop is None and "trio" in sys.modules:
        try:
            return sys.modules["trio"].lowlevel.current_trio_token()
        except (RuntimeError, AttributeError):  # AttributeError: another thread is importing trio right now
            return None
    return loop


def loop_of(native: Any) -> Loop:
    return AsyncioLoop(native) if hasattr(native, "call_soon_threadsafe") else TrioLoop(native)


class AsyncioLoop:
    __slots__ = ("native",)

    Cancelled: type[BaseException] = asyncio.CancelledError
    only_by_us = False

    def __init__(self, native: asyncio.AbstractEventLoop) -> None:
        self.native = native

    def is_running_here(self) -> bool:
        return _get_running_loop() is self.native

    def call_soon(self, func: Callable[..., object], *args: object) -> bool:
        try:
            self.native.call_soon_threadsafe(func, *args, context=Context())
        except RuntimeError:  # the loop is closed
            return False
        return True

    def call_later(self, seconds: float, func: Callable[..., object], *args: object) -> Callable[[], object]:
        return self.native.call_later(seconds, func, *args, context=Context()).cancel

    def spawn(self, job: Job, context: Context, name: str) -> bool:
        # The loop's own `create_task` may have an eager task factory.
        native = asyncio.Task(job.main(), loop=self.native, context=context, name=name)
        job.native = native
        native.add_done_callback(job.lost, context=context)  # `main` removes it, to save a turn of the loop
        return True

    async def within(self, seconds: float, awaitable: Awaitable[Any]) -> None:
        scope = asyncio.timeout(seconds)
        try:
            async with scope:
                await awaitable
        except TimeoutError as exc:
            if scope.expired() and isinstance(exc.__cause__, asyncio.CancelledError):
                exc.__traceback__ = None  # or a cycle: it leads to the native task, whose context has our task
                raise TimeUp from exc.__cause__
            raise
        finally:
            del scope, awaitable  # or a cycle: they may lead to the error, whose traceback keeps this frame


class TrioLoop:
    __slots__ = ("Cancelled", "token", "trio")

    only_by_us = True

    def __init__(self, token: Any) -> None:
        self.trio: Any = sys.modules["trio"]
        self.token = token
        self.Cancelled: type[BaseException] = self.trio.Cancelled

    def is_running_here(self) -> bool:
        return running_loop() is self.token

    def call_soon(self, func: Callable[..., object], *args: object) -> bool:
        try:
            self.token.run_sync_soon(func, *args)
        except RuntimeError:  # the run has finished
            return False
        return True

    def call_later(self, seconds: float, func: Callable[..., object], *args: object) -> Callable[[], object]:
        scope = self.trio.CancelScope()

        async def call() -> None:
            with scope:
                await self.trio.sleep(seconds)
                func(*args)

        self.trio.lowlevel.spawn_system_task(call, context=Context())
        return scope.cancel  # type: ignore[no-any-return]

    def spawn(self, job: Job, context: Context, name: str) -> bool:
        try:
            self.trio.lowlevel.spawn_system_task(self._host, job, name, name=name, context=context)
        except RuntimeError:  # the run is about to finish
            return False
        return True

    async def _host(self, job: Job, name: str) -> None:
        with suppress(BaseException):  # such as the cancellation by the end of the run
            async with self.trio.open_nursery() as nursery:
                job.native = nursery.cancel_scope
                nursery.start_soon(job.main, name=name)
        job.lost()

    async def within(self, seconds: float, awaitable: Awaitable[Any]) -> None:
        returned = False
        where: BaseException | None = None
        try:
            with self.trio.move_on_after(seconds) as scope:
                try:
                    await awaitable
                    returned = True
                except BaseException as exc:
                    where = exc
                    raise
            if scope.cancelled_caught:
                raise TimeUp from where
        except RuntimeError:  # trio cannot leave our scope, because the awaited code left one open inside it
            if not returned:
                raise
        finally:
            del where, awaitable
