"""How one task is called.

A sync task is called in a thread, and that thread enters the context managers of `around`. An async task is awaited on
the event loop, and so is the awaitable that a sync task returned. The timeout is inside the context managers, so that
they see it and can still await.
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
    """Call a sync task; return the awaitable it returned, if any."""
    func = task.func
    try:
        if not around:
            result = task._call(*task.args, **task.kwargs)
        else:
            with ExitStack() as stack:
                for each in around:
                    _enter(stack, each(task), here=True)
                call = task._call
                if call is None:  # a timeout or a shutdown gave up on the task in the meantime
                    return None
                result = call(*task.args, **task.kwargs)
    finally:
        del task  # or a cycle: the task keeps its error, whose traceback keeps this frame
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
    """Call and await an async task, or await what a sync task `returned`, for at most `seconds`.

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
        del task, returned  # see `call_sync`
        awaitable = None


def _enter(stack: ExitStack | AsyncExitStack, manager: object, *, here: bool) -> None:
    if here and isinstance(manager, AbstractContextManager):
        stack.enter_context(manager)


def timed_out(task: DeferredTask) -> TaskTimedOut:
    return TaskTimedOut(f"{task.name!a}: timeout={task.timeout} s is over")


def close_unawaited(awaitable: Awaitable[Any] | None) -> None:
    """Close an awaitable that nobody will await, as Python would warn about it."""
    if close := getattr(awaitable, "close", None):
        close()
