"""Engines: when one machine is not enough.

If you pass `add_task` a task of taskiq, Celery, dramatiq, huey, procrastinate, streaq or Django's task framework, it is
enqueued after the response instead of run in this process. With `options(durable=True)`, it is enqueued before the
response starts. For another engine, give your own class a method `__defer_enqueue__(self, *args, **kwargs)`, which can
be `def` or `async def`, or call `register()` for a class that is not yours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._engines import Engine, registered

__all__ = ["register"]


def register(
    cls: type, enqueue: Callable[..., Any], *, local: Callable[[Any], Callable[..., Any]] | None = None
) -> None:
    """Treat the instances of a class as tasks of an engine, in this whole process.

    Args:
        cls: The class of the engine's task objects. A later registration wins over an earlier one. Registered classes
            win over `__defer_enqueue__` and over the engines that are known here.
        enqueue: Called as `enqueue(task, *args, **kwargs)`. It has to return once the engine has the job, and to raise
            if the engine does not take it. An `async def` runs on the event loop, any other in a worker thread.
        local: Called with the task. It returns the function that `asgi_deferred.testing.inline()` calls instead of the
            task. By default that is the task itself.

    Raises:
        TypeError: `cls` is not a class, or `enqueue` cannot be called.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register() takes the class of an engine's tasks, not {cls!r}: pass type(task)")
    if not callable(enqueue):
        raise TypeError(f"enqueue={enqueue!r} cannot be called: pass a function (task, *args, **kwargs)")
    registered.pop(cls, None)
    registered[cls] = Engine(enqueue) if local is None else Engine(enqueue, local)
