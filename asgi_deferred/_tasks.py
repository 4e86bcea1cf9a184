"""The task list of a request, its tasks, and the functions that find the list."""

from __future__ import annotations

import sys
from asyncio import _get_running_loop
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutine
from math import inf
from time import perf_counter
from types import CodeType, FrameType, FunctionType
from typing import Any, ParamSpec, Protocol

from ._engines import Engine, EngineTask, recognise
from ._exceptions import MiddlewareMissing
from ._functions import is_async, line_of, name_of
from ._loops import running_loop
from ._outcome import Outcome, When, check_when, without_error
from ._states import PENDING, Entry, Line, TaskState

P = ParamSpec("P")

KEY = "asgi_deferred"

_NOT_STARTED: dict[str, Any] = {}


class Defaults(Protocol):
    """The part of a runner's configuration that tasks need."""

    when: When
    timeout: float | None
    enqueue_timeout: float
    concurrent: bool


class Host(Protocol):
    """Runs the tasks of a list.

    Attributes:
        told: The messages that the log gives once, and has given, such as one for each line of code that adds tasks.
    """

    told: dict[str, object]

    @property
    def settings(self) -> Defaults:
        """The defaults for options that a task leaves out."""
        ...

    def add(self, task: DeferredTask) -> None:
        """Accept a task. Raises what `add_task` raises."""
        ...

    def cancel(self, task: DeferredTask) -> bool:
        """Cancel a PENDING task."""
        ...


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """A task at one moment. An observer gets one when a task starts and when it ends; `Runner.tasks()` returns them.

    Attributes:
        task: The task.
        state: RUNNING, or the task's final state. From `Runner.tasks()`: PENDING or RUNNING.
        outcome: How the task's request ended; `None` if the task ended before its request. If the task was SKIPPED,
            this is the reason, together with the rule in `task.when`; `repr(task)` explains it in a few words.
        queued: Seconds from `add_task` to the start of the task, or to this moment if it has not started.
        waited: Seconds from the end of its request to the start of the task, or to this moment if it has not started.
            For a task that was added after the end of its request, they count from `add_task`. 0.0 before the end.
        duration: Seconds from the start of the task to this moment; 0.0 if it has not started.
        error: Why the task FAILED or TIMED_OUT, or was CANCELLED or ABANDONED while it ran.
    """

    task: DeferredTask
    state: TaskState
    outcome: Outcome | None
    queued: float
    waited: float
    duration: float
    error: BaseException | None

    @classmethod
    def _now(cls, task: DeferredTask, tasks: DeferredTasks, state: TaskState) -> TaskEvent:
        now = perf_counter()
        started = task._started or now
        waited = max(0.0, started - max(task._added, tasks._ended_at))
        error = None if state is TaskState.RUNNING else task.error
        return cls(task, state, tasks.outcome, started - task._added, waited, now - started, error)


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of `options()`; `None` stands for the runner's default."""

    when: When | None = None
    timeout: float | None = None
    key: Hashable = None
    name: str | None = None
    durable: bool = False


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is not a number")
    if not value > 0:
        raise ValueError(f"{name}={value!r} must be more than 0; leave it out for the default")


def check_count(name: str, value: int) -> None:
    check_positive(name, value)
    if value != inf and value != int(value):
        raise ValueError(f"{name}={value!r} must be a whole number")


class DeferredTask(Entry):
    """One deferred call. `add_task` creates and returns it.

    Attributes:
        func, args, kwargs: The call.
        name: For logs and statistics; the function's qualified name unless `options(name=...)` says otherwise.
        when, timeout, key, durable: The options in force; `timeout` in seconds, `None` without one.
        state: A `TaskState`.
        error: Why the task FAILED or TIMED_OUT, or was CANCELLED or ABANDONED while it ran; `None` otherwise.
        added_at: "file:line" of the call that added the task.
        request: The task's request, such as "GET /signup"; "" until the request has ended, and without a request.

    Once the task has ended, and its observers have been called, `args` and `kwargs` are empty, so that it keeps nothing
    alive.
    """

    __slots__ = (
        "__weakref__",
        "_added",
        "_async",
        "_call",
        "_code",
        "_context",
        "_lasti",
        "_name",
        "_request",
        "_started",
        "_why",
        "args",
        "func",
        "key",
        "kwargs",
        "timeout",
        "when",
    )

    durable: bool
    error: BaseException | None
    state: TaskState
    _why: str  # the reason; only set once the task is SKIPPED
    _context: Context | None
    _call: Any  # the function to call; None once the task has ended

    def __init__(
        self,
        tasks: DeferredTasks,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
        frame: FrameType,
    ) -> None:
        defaults = tasks._host.settings
        key, timeout = options.key, options.timeout or defaults.timeout
        self._list = tasks
        self._next = self._run = None
        self._hash = None if key is None else hash(key)
        self.func: Callable[..., Any] = func
        self.args: tuple[Any, ...] = args
        self.kwargs: dict[str, Any] = kwargs
        self.when: When = options.when or defaults.when
        self.timeout: float | None = None if timeout is None or timeout == inf else timeout
        self.key: Hashable = key
        self.durable = options.durable
        self.state = PENDING
        self._name = options.name
        self.error = None
        self._call = func
        self._async = is_async(func)
        self._code: CodeType = frame.f_code
        self._lasti: int = frame.f_lasti  # the line takes time to find, and most tasks are never asked for it
        self._context = copy_context()
        self._request: str | None = None
        self._added: float = perf_counter()
        self._started: float = 0.0

    def _to_engine(self, engine: Engine, options: Options) -> None:
        """Make the task enqueue its job with an engine instead of calling a function."""
        self._call = partial(engine.enqueue, self.func)
        self._async = is_async(engine.enqueue)
        timeout = options.timeout or self._list._host.settings.enqueue_timeout
        self.timeout = None if timeout == inf else timeout
        if engine.name is not None:
            self._name = self._name or engine.name(self.func)

    @property
    def name(self) -> str:
        return self._name or name_of(self.func)

    @property
    def added_at(self) -> str:
        return f"{self._code.co_filename}:{line_of(self._code, self._lasti)}"

    @property
    def _enqueues(self) -> bool:
        """Whether this task enqueues a job with an engine."""
        return self._call is not self.func

    @property
    def request(self) -> str:
        tasks = self._list
        return self._request or (tasks._request if tasks is not None else "")

    def cancel(self) -> bool:
        """Cancel the task if it is still PENDING, and return whether it was. Safe from any thread."""
        tasks = self._list
        return tasks is not None and tasks._host.cancel(self)

    def _let_go(self) -> None:
        """Release everything that the task needed to run."""
        tasks = self._list
        if tasks is not None:
            self._request = tasks._request
        self.args = ()
        if self.kwargs:
            self.kwargs = {}
        self._context = self._call = None

    def __repr__(self) -> str:
        why = f" ({self._why})" if self.state is TaskState.SKIPPED else ""
        return f"<DeferredTask {self.name!r} {self.state.name}{why} added at {self.added_at}>"


class DeferredTasks(Line):
    """The task list of one request or websocket connection: sized, and iterable in the order added.

    You get it from `tasks_from(scope)`, from `current_tasks()`, or from your framework's adapter. All of its methods
    are safe from any thread. If it has had many tasks, it shows only the last few dozen of those that have ended.
    """

    _barrier: Any = None  # the lock that lets one message of a response with durable tasks pass at a time
    _unbounded = False  # True if no limit refuses its tasks, because the response that promised them has gone out
    _then: Callable[[], object] | None = None  # called once, when the request and all of its tasks have ended
    _below_a_router = False  # True if the middleware is mounted, so that the server's lifespan does not reach it

    def __init__(self, host: Host, scope: Mapping[str, Any]) -> None:
        self._host = host
        self._scope = scope  # until the request ends
        self._start: Mapping[str, Any] = _NOT_STARTED
        self._request = ""
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._loop = _get_running_loop() or running_loop()
        self._all = None
        self._ended = self._complete = self._durable = self._apart = False

    def add_task(self, func: Callable[P, Any] | EngineTask[P], /, *args: P.args, **kwargs: P.kwargs) -> DeferredTask:
        """Call `func(*args, **kwargs)` after the response has gone out; `func` may be `def` or `async def`.

        If `func` is a task of an engine, it is enqueued with these arguments instead of called. The engines are
        taskiq, Celery, dramatiq, huey, procrastinate, streaq, Django's task framework, and those that you have passed
        to `asgi_deferred.engines.register`.

        The task sees the context variables of the line that added it. If the arguments do not fit the function, the
        task fails when it runs, and the log names the line that added it.

        Raises:
            TypeError: `func` is not callable. Most often it was called by mistake: `add_task(f(x))`. Or it is a task
                that its engine would not run, or a `functools.partial` of an engine's task.
            BacklogFull: `max_pending` tasks are unfinished, and the runner has `overflow="reject"`.
            RunnerClosed: The request has ended, and nothing is left that could run the task.
            DeferredError: The task is durable, and there is no response to hold back.
        """
        return self._add(func, args, kwargs, _NO_OPTIONS, sys._getframe(1))

    def options(
        self,
        *,
        when: When | None = None,
        timeout: float | None = None,
        key: Hashable = None,
        name: str | None = None,
        durable: bool = False,
    ) -> TaskAdder:
        """Return an object whose `add_task` adds with these options.

        Args:
            when: After which requests the task runs: "success", "complete", "failure", "always", or a callable
                `(Outcome) -> bool`. The default is the runner's.
            timeout: Seconds from the start of the task. The default is the runner's; `math.inf` means no timeout.
                An async task is cancelled. A thread cannot be cancelled, so the list goes on without it. For an
                engine's task this limits the time to enqueue it, and the default is `Runner(enqueue_timeout=...)`.
            key: A later task of this list with an equal key replaces this one while it is PENDING.
            name: The task's name in logs and events. The default is the function's qualified name.
            durable: Enqueue an engine's task before the response starts, if `when` lets the response's status through.
                If the engine does not take it, the client gets a 503, or the answer of `Runner(unavailable=...)`.
                `add_task` raises TypeError if the task is a function, and DeferredError if there is no response to
                hold back.

        Raises:
            ValueError: `when` is unknown, or `timeout` is not above 0.
            TypeError: `timeout` is not a number, `name` not a string, or `key` not hashable.
        """
        if when is not None:
            check_when(when)
        if timeout is not None:
            check_positive("timeout", timeout)
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name={name!r} is not a string")
        try:
            hash(key)
        except TypeError:
            raise TypeError(f"key={key!r} is not hashable: use a string or a tuple") from None
        return TaskAdder(self, Options(when, timeout, key, name, durable))

    @property
    def outcome(self) -> Outcome | None:
        """How the request ended; `None` until it has, or until an engine has refused a durable task."""
        scope, start = self._scope, self._start  # read first, because `_end` forgets them once the outcome is there
        if self._outcome is None and (self._ended or self._error is not None):
            return self._make_outcome(scope, start)
        return self._outcome

    def _make_outcome(self, scope: Mapping[str, Any], start: Mapping[str, Any]) -> Outcome:
        kind, status, error = scope["type"], start.get("status"), self._error
        complete = self._complete or (kind == "websocket" and error is None)
        if error is None and isinstance(status, int):
            return without_error(kind, status, complete)
        return Outcome(kind, status, complete, error)

    def _end(self) -> None:
        """Keep the request's name and its outcome, and forget its scope and messages."""
        scope = self._scope
        if "router" in scope and "state" in scope:  # set by Starlette's router, and by a server that runs lifespans
            self._below_a_router = True
        self._request = name_request(scope)
        self._outcome = self._make_outcome(scope, self._start)
        self._start = self._scope = _NOT_STARTED

    def _wind_up(self) -> None:
        """Finish, once the request and its tasks have ended. The outcome drops the error and so its frames."""
        if self._then is not None:
            then, self._then = self._then, None
            then()
        if self._error is not None:
            outcome = self.outcome
            self._error = None
            self._outcome = outcome and outcome.without_error()

    def _add(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
        frame: FrameType,
    ) -> DeferredTask:
        engine = None
        if type(func) is not FunctionType:
            engine = recognise(func)
            if engine is None and not callable(func):
                raise _not_callable(func)
        task = DeferredTask(self, func, args, kwargs, options, frame)
        if engine is not None:
            task._to_engine(engine, options)
        self._host.add(task)
        return task

    def __len__(self) -> int:
        return 0 if self._all is None else self._count

    def __iter__(self) -> Iterator[DeferredTask]:
        return iter(() if self._all is None else self._all.copy())

    def __repr__(self) -> str:
        states = ", ".join(f"{task.name} {task.state.name}" for task in self)
        return f"<DeferredTasks [{states}]>"


def _lay_out() -> None:
    """Create a list that has every field: CPython reserves room in instances for the fields of the first few."""
    first: Any = DeferredTasks.__new__(DeferredTasks)
    for name in Line.__annotations__:
        setattr(first, name, None)


_lay_out()


def name_request(scope: Mapping[str, Any]) -> str:
    return f"{scope.get('method', scope['type'])} {scope.get('path', '')}"


class TaskAdder:
    """A task list with options. `DeferredTasks.options` returns it."""

    __slots__ = ("_options", "_tasks")

    def __init__(self, tasks: DeferredTasks, options: Options) -> None:
        self._tasks = tasks
        self._options = options

    def add_task(self, func: Callable[P, Any] | EngineTask[P], /, *args: P.args, **kwargs: P.kwargs) -> DeferredTask:
        """Add a task with these options. See `DeferredTasks.add_task`."""
        return self._tasks._add(func, args, kwargs, self._options, sys._getframe(1))


_NO_OPTIONS = Options()

current: ContextVar[DeferredTasks | None] = ContextVar("asgi_deferred", default=None)


def current_tasks() -> DeferredTasks:
    """Return the task list of the current request. It works anywhere in the request's context, also in threads.

    Deep code can defer with options this way: `current_tasks().options(when="always").add_task(audit, user)`.

    Raises:
        MiddlewareMissing: There is no current request.
    """
    tasks = current.get()
    if tasks is None:
        raise _missing(
            "There is no current request to defer work for: either this runs outside of one, or it has not come "
            "through the middleware. Wrap it: app = DeferredMiddleware(app), or enter `async with runner:`."
        )
    return tasks


def defer(func: Callable[P, Any] | EngineTask[P], /, *args: P.args, **kwargs: P.kwargs) -> DeferredTask:
    """Add a task to the current request's list: `current_tasks().add_task(func, *args, **kwargs)`.

    All arguments belong to the function. For options, use `current_tasks().options(...).add_task(...)`.

    Raises:
        MiddlewareMissing: There is no current request.
        TypeError, BacklogFull, RunnerClosed: See `DeferredTasks.add_task`.
    """
    return current_tasks()._add(func, args, kwargs, _NO_OPTIONS, sys._getframe(1))


def tasks_from(source: Any) -> DeferredTasks:
    """Return the task list of an ASGI scope, or of any object with a `scope` attribute.

    Requests and websockets of Starlette, FastAPI, Django, Litestar and Quart have one.

    Raises:
        MiddlewareMissing: There is no list, because the request did not pass through the middleware.
        TypeError: `source` is not a scope, and has none.
    """
    scope = getattr(source, "scope", source)
    if not isinstance(scope, (dict, Mapping)):
        if hasattr(source, "environ"):
            name = type(source).__name__
            raise _missing(f"This {name} has no task list: it came by WSGI, and not through the middleware.")
        raise TypeError(f"tasks_from() takes an ASGI scope or an object with a .scope, not {type(source).__name__!r}")
    tasks = scope.get(KEY)
    if not isinstance(tasks, DeferredTasks):
        raise _missing(
            f"This {scope.get('type')} scope has no task list, as it has not come through the middleware. Wrap the "
            "application: app = DeferredMiddleware(app), or app.add_middleware(DeferredMiddleware)."
        )
    return tasks


def _missing(message: str) -> MiddlewareMissing:
    if "django.core.handlers.wsgi" in sys.modules:  # which Django's test clients load as well
        message += (
            " In Django, WSGI does not go through asgi.py: run an ASGI server, such as uvicorn, or put "
            '"daphne" first in INSTALLED_APPS, which makes runserver one. Nor do test clients: there, use '
            "asgi_deferred.django.capture_deferred()."
        )
    return MiddlewareMissing(message)


def _not_callable(func: object) -> TypeError:
    if iscoroutine(func):
        func.close()  # or Python warns about it again, far from here
        return TypeError(
            f"Got the coroutine {func.__qualname__}(...), which is a call that was made already. "
            "Pass the function and its arguments, not the call: add_task(func, *args, **kwargs)."
        )
    return TypeError(
        f"Got {type(func).__name__!r}, which cannot be called. "
        "Pass the function and its arguments, not the call: add_task(func, *args, **kwargs)."
    )
