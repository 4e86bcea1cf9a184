"""How one task is called.

A sync task is called in a thread, and the context managers of `around` are entered there. An async task, and what a
sync one returned, is awaited on the event loop. Its timeout is inside the context managers, so they see it and can
still await.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, ExitStack
from inspect import isasyncgen, isasyncgenfunction, isawaitable, isgenerator, isgeneratorfunction
from typing import Any

from ._exceptions import TaskTimedOut
from ._functions import unwrap_partial
from ._loops import Loop, TimeUp
from ._settings import Around
from ._tasks import DeferredTask


def call_sync(task: DeferredTask, around: Sequence[Around]) -> Awaitable[Any] | None:
    """Call a sync task; return what is to be awaited before it has ended."""
    func = task.func
    try:
        if not around:
            result = task._call(*task.args, **task.kwargs)
        else:
            with ExitStack() as stack:
                for each in around:
                    _enter(stack, each(task), here=True)
                call = task._call
                if call is None:  # a timeout or a shutdown has given up on the task meanwhile
                    return None
                result = call(*task.args, **task.kwargs)
    finally:
        del task  # its error is about to have this frame in its traceback
    if result is None:
        return None
    if isawaitable(result):
        return result
    inner = unwrap_partial(func)
    if (isgenerator(result) and isgeneratorfunction(inner)) or (isasyncgen(result) and isasyncgenfunction(inner)):
        raise TypeError(
            "This is a generator function: calling it runs none of its code. "
            "Pass a function that consumes it, or one without `yield`."
        )
    return None


async def call_async(
    task: DeferredTask, around: Sequence[Around], loop: Loop, seconds: float | None, returned: Awaitable[Any] | None
) -> None:
    """Call and await an async task, or await what a sync one `returned`, for so many seconds.

    Raises:
        TaskTimedOut: The time is over.
    """
    try:
        async with AsyncExitStack() as stack:
            for each in around:
                manager = each(task)
                if isinstance(manager, AbstractAsyncContextManager):
                    await stack.enter_async_context(manager)
                else:
                    _enter(stack, manager, here=returned is None)
                del manager
            awaitable = task._call(*task.args, **task.kwargs) if returned is None else returned
            if seconds is None:
                await awaitable
                return
            try:
                await loop.within(seconds, awaitable)
            except TimeUp as exc:
                raise timed_out(task) from exc.__cause__
    finally:
        del task, returned  # as above
        awaitable = None


def _enter(stack: ExitStack | AsyncExitStack, manager: object, *, here: bool) -> None:
    if here and isinstance(manager, AbstractContextManager):
        stack.enter_context(manager)


def timed_out(task: DeferredTask) -> TaskTimedOut:
    return TaskTimedOut(f"{task.name!a}: timeout={task.timeout} s is over")


def close_unawaited(awaitable: Awaitable[Any] | None) -> None:
    """Close what nobody will await, or Python warns about it."""
    if close := getattr(awaitable, "close", None):
        close()
