"""Which objects are an engine's tasks, and how to enqueue a job with each engine.

1. A task is recognised by `isinstance` against classes that are already in `sys.modules`. A task object cannot exist
   before its engine's module was imported, so nothing needs to be imported here. No attribute is guessed, because a
   `Mock` has every attribute.
2. The order is: classes that the user registered, the latest first; then a `__defer_enqueue__` method, looked up on
   the type as Python does for special methods; then the engines known here.
3. An `async def` enqueue function runs on the event loop. Any other runs in a worker thread, because it blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from inspect import Parameter, iscoroutinefunction, signature, unwrap
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeAlias

P = ParamSpec("P")


class _Enqueued(Protocol[P]):
    def __defer_enqueue__(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...


class _Django(Protocol[P]):
    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...


class _TaskiqKicker(Protocol[P]):
    def kiq(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...


class _ProcrastinateDeferrer(Protocol[P]):
    def defer_async(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...


EngineTask: TypeAlias = _Enqueued[P] | _Django[P] | _TaskiqKicker[P] | _ProcrastinateDeferrer[P]
"""The type of an engine's task that is not callable. `P` are the parameters of its function.

`add_task` takes a `Callable[P, Any] | EngineTask[P]`. This type is for type checkers only.
"""


def _itself(task: Any) -> Any:
    return task


class Engine(NamedTuple):
    """How to treat the task objects of one class."""

    enqueue: Callable[..., Any]
    local: Callable[[Any], Callable[..., Any]] = _itself
    name: Callable[[Any], str] | None = None
    refuse: Callable[[Any], None] | None = None
    keeps: Callable[[Any], bool] | None = None  # whether its jobs stay in this process


_PLAIN = frozenset({FunctionType, MethodType, BuiltinFunctionType, type})

registered: dict[type, Engine] = {}


def recognise(func: Any) -> Engine | None:
    """Return the engine that `func` is a task of; `None` if it runs in this process.

    Raises:
        TypeError: It is a task that its engine would not run, or a `partial` of a task, which would run here.
    """
    kind = type(func)
    if kind in _PLAIN:
        return None
    if isinstance(func, partial):
        if recognise(func.func) is not None:
            raise TypeError(
                "add_task() got a functools.partial of an engine's task, and calling that would run the task here "
                "instead of enqueueing it. Pass the task itself, and its arguments to add_task."
            )
        return None
    engine = _engine_of(func, kind)
    if engine is not None and engine.refuse is not None:
        engine.refuse(func)
    return engine


def _engine_of(func: Any, kind: type) -> Engine | None:
    for cls in reversed(tuple(registered)):  # a copy, as another thread may register
        if isinstance(func, cls):
            return registered[cls]
    if hasattr(kind, "__defer_enqueue__"):
        return Engine(kind.__defer_enqueue__)
    for (module, name), engine in _KNOWN.items():
        loaded = getattr(sys.modules.get(module), name, None)
        if loaded is not None and isinstance(func, loaded):
            return engine
    return None


# One function for each engine, in the terms of the engine's API.


async def _taskiq(task: Any, /, *args: Any, **kwargs: Any) -> None:
    await task.kiq(*args, **kwargs)


def _taskiq_original(kicker: Any) -> Any:
    return kicker.broker.find_task(kicker.task_name).original_func


def _celery(task: Any, /, *args: Any, **kwargs: Any) -> None:
    task.apply_async(args, kwargs)


def _celery_eagerly(signature: Any) -> Any:
    return lambda *args, **kwargs: signature.apply(args, kwargs).get()


def _refuse_async(task: Any) -> None:
    if iscoroutinefunction(task.run):
        raise TypeError(
            f"{task.name!r} is an `async def` Celery task: its worker would make the coroutine and never run it. "
            "Make it a `def`, with asyncio.run() inside where it needs an event loop."
        )


def _refuse_async_signature(signature: Any) -> None:
    task = signature.app.tasks.get(signature.task)
    if task is not None:
        _refuse_async(task)


def _dramatiq(actor: Any, /, *args: Any, **kwargs: Any) -> None:
    actor.send(*args, **kwargs)


def _dramatiq_function(actor: Any) -> Any:
    inner = unwrap(actor.fn)
    return inner if iscoroutinefunction(inner) else actor.fn


def _huey(task: Any, /, *args: Any, **kwargs: Any) -> None:
    task(*args, **kwargs)


async def _procrastinate(task: Any, /, *args: Any, **kwargs: Any) -> None:
    parameters = [*signature(task.func).parameters.values()][bool(task.pass_context) :]
    names = [each.name for each in parameters if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(
            f"{task.name} was given {len(args)} positional arguments and has {len(names)} names for them; "
            "procrastinate stores arguments by name. Pass them by name."
        )
    await task.defer_async(**dict(zip(names, args, strict=False)), **kwargs)


async def _procrastinate_configured(deferrer: Any, /, *args: Any, **kwargs: Any) -> None:
    if args:
        raise TypeError(
            f"{deferrer.job.task_name} was configured, and its parameters' names are not known any more; "
            "procrastinate stores arguments by name. Pass them by name."
        )
    await deferrer.defer_async(**kwargs)


def _procrastinate_unknown(deferrer: Any) -> Any:
    raise LookupError(
        f"{deferrer.job.task_name} was configured, and its function is not known any more, so it cannot run here. "
        "Give the test's app procrastinate's InMemoryConnector instead of using inline()."
    )


async def _streaq(task: Any, /, *args: Any, **kwargs: Any) -> None:
    await task.enqueue(*args, **kwargs)


def _django(task: Any, /, *args: Any, **kwargs: Any) -> None:
    try:
        task.enqueue(*args, **kwargs)
    finally:
        sys.modules["django.db"].connections.close_all()  # Django does not know when this thread ends


def _django_keeps(task: Any) -> bool:
    ours = sys.modules.get("asgi_deferred._django_tasks")
    return ours is not None and isinstance(task.get_backend(), ours.DeferredBackend)


def _of(module: str, name: str, read: Callable[[Any], Any]) -> Callable[[Any], bool]:
    """Return a function that tells whether an attribute of a task, read by `read`, is an instance of a class."""

    def keeps(task: Any) -> bool:
        kind = getattr(sys.modules.get(module), name, None)
        return kind is not None and isinstance(read(task), kind)

    return keeps


def _celery_keeps(task: Any) -> bool:
    return str(task.app.conf.broker_url).startswith("memory:")


_taskiq_keeps = _of("taskiq.brokers.inmemory_broker", "InMemoryBroker", attrgetter("broker"))
_dramatiq_keeps = _of("dramatiq.brokers.stub", "StubBroker", attrgetter("broker"))
_huey_keeps = _of("huey.storage", "MemoryStorage", attrgetter("huey.storage"))

_DJANGO = Engine(_django, attrgetter("func"), attrgetter("module_path"), keeps=_django_keeps)

_KNOWN: dict[tuple[str, str], Engine] = {
    ("taskiq.decor", "AsyncTaskiqDecoratedTask"): Engine(
        _taskiq, attrgetter("original_func"), attrgetter("task_name"), keeps=_taskiq_keeps
    ),
    ("taskiq.kicker", "AsyncKicker"): Engine(_taskiq, _taskiq_original, attrgetter("task_name"), keeps=_taskiq_keeps),
    ("celery.app.task", "Task"): Engine(_celery, _itself, attrgetter("name"), _refuse_async, _celery_keeps),
    ("celery.canvas", "Signature"): Engine(
        _celery, _celery_eagerly, attrgetter("task"), _refuse_async_signature, _celery_keeps
    ),
    ("dramatiq.actor", "Actor"): Engine(_dramatiq, _dramatiq_function, attrgetter("actor_name"), keeps=_dramatiq_keeps),
    ("huey.api", "TaskWrapper"): Engine(
        _huey, attrgetter("call_local"), attrgetter("task_class.__name__"), keeps=_huey_keeps
    ),
    ("procrastinate.tasks", "Task"): Engine(_procrastinate, attrgetter("func"), attrgetter("name")),
    ("procrastinate.jobs", "JobDeferrer"): Engine(
        _procrastinate_configured, _procrastinate_unknown, attrgetter("job.task_name")
    ),
    ("streaq.task", "RegisteredTask"): Engine(_streaq, attrgetter("fn"), attrgetter("fn_name")),
    ("django.tasks.base", "Task"): _DJANGO,
    ("django_tasks.base", "Task"): _DJANGO,
}
