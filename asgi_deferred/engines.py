"""Engines: when one machine is not enough.

`add_task` with a task object of taskiq, Celery, dramatiq, huey, procrastinate, streaq or Django's task framework
enqueues it after the response instead of running it in this process, and `options(durable=True)` enqueues it before
the response starts. For other engines there are two ways: a class of one's own with a method
`__defer_enqueue__(self, *args, **kwargs)`, `def` or `async def`, or `register()` for somebody else's class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._engines import Engine, registered

__all__ = ["register"]


def register(
    cls: type, enqueue: Callable[..., Any], *, local: Callable[[Any], Callable[..., Any]] | None = None
) -> None:
    """Tell `add_task` that the instances of a class are tasks of an engine, in this whole process.

    Args:
        cls: The class of the engine's task objects. A later registration goes before an earlier one, and all of them
            go before `__defer_enqueue__` and the engines known here.
        enqueue: Called as `enqueue(task, *args, **kwargs)`. An `async def` runs on the event loop, any other in a
            worker thread. It returns once the engine has the job, and raises if it did not take it.
        local: Called with the task, returns what `asgi_deferred.testing.inline()` calls in its place; the task
            itself if left out.

    Raises:
        TypeError: `cls` is not a class, or `enqueue` cannot be called.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register() takes the class of an engine's tasks, not {cls!r}: pass type(task)")
    if not callable(enqueue):
        raise TypeError(f"enqueue={enqueue!r} cannot be called: pass a function (task, *args, **kwargs)")
    registered.pop(cls, None)
    registered[cls] = Engine(enqueue) if local is None else Engine(enqueue, local)
