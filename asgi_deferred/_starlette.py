"""Starlette's and FastAPI's own background tasks, run by the runner.

1. A background task is moved when a response calls it, in a request that passed through a `Moving` and has not ended.
   Any other caller runs it as before: an endpoint, the `super().__call__()` of a subclass, a deferred task.
2. Held (the default): the response waits for its tasks, one after the other. Each batch has a list of its own, which
   is due at once. So the tasks run before dependencies are torn down, while uploads and sessions are open.
3. Detached: the tasks are added to the request's list.
4. When the call ends, a WARNING names the background tasks of the request that were neither run nor moved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from functools import cache, partial, wraps
from inspect import isclass, unwrap
from itertools import takewhile
from logging import WARNING
from types import CodeType, FrameType, FunctionType, NoneType
from typing import Any, NamedTuple, cast
from weakref import WeakSet

from anyio import get_cancelled_exc_class, move_on_after
from starlette.background import BackgroundTask, BackgroundTasks

from ._engines import recognise
from ._functions import line_of, name_of, unwrap_partial
from ._loops import running_loop
from ._reports import write
from ._runner import Runner
from ._scheduler import inside
from ._settings import ASGIApp
from ._states import TaskState, Waiters
from ._tasks import KEY, DeferredTasks, Options, name_request
from ._waiting import outlast, until

_ORIGIN = "_asgi_deferred"
_MAKERS = ("__init__", "make_and_note", "add_task", "add_and_move")
_PLAIN = ("starlette.background", "fastapi.background")

moving: ContextVar[Request | None] = ContextVar("asgi_deferred_moving", default=None)


class Place(NamedTuple):
    """A line of code, with the attributes of a frame that a task reads."""

    f_code: CodeType
    f_lasti: int


class Origin(NamedTuple):
    """The line that created a background task and, if that was in a worker thread, its context."""

    place: Place
    context: Context | None

    def __reduce__(self) -> tuple[Any, ...]:
        """Become None in a pickled copy, such as a cached response, because a context cannot be pickled."""
        return NoneType, ()


class Moving:
    """The application that the middleware wraps. It moves the background tasks of each request."""

    def __init__(self, app: ASGIApp, *, detached: bool) -> None:
        self.app = app
        self.detached = detached

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        tasks, outer = scope.get(KEY), moving.get()
        if scope["type"] == "lifespan" or not isinstance(tasks, DeferredTasks) or (outer and outer.tasks is tasks):
            await self.app(scope, receive, send)
            return
        if not _is_replaced(BackgroundTask.__call__):  # a tracing tool has put back what it had found before us
            _replace_calls(BackgroundTask)
        request = Request(tasks, scope, detached=self.detached)
        token = moving.set(request)
        try:
            await self.app(scope, receive, send)
        finally:
            request.end()
            moving.reset(token)


class Held(DeferredTasks):
    """Tasks that a response waits for."""

    @property
    def outcome(self) -> None:
        """None, because the request has not ended."""


class Request:
    """A request whose background tasks are moved."""

    __slots__ = ("made", "moved", "over", "scope", "tasks")

    def __init__(self, tasks: DeferredTasks, scope: Any, *, detached: bool) -> None:
        self.tasks = tasks
        self.scope = scope
        self.over = False
        self.made: list[BackgroundTasks] = []
        # If detached: a task that is added to one of these later goes to the list as well.
        self.moved: WeakSet[BackgroundTasks] | None = WeakSet() if detached else None

    def end(self) -> None:
        """Name the tasks that never ran, and release the request, as their contexts keep this object alive."""
        self.over = True
        for background in self.made:
            for each in background.tasks:
                if origin := origin_of(each):
                    write(
                        WARNING,
                        "Never ran: background task %a, added at %s:%s, request %a. As without asgi-deferred, it is "
                        "dropped if the endpoint raises, or if it was added after the response. "
                        "A task of `Deferred` or `tasks_from(request)` has when=... for that.",
                        name_of(each.func),
                        origin.place.f_code.co_filename,
                        line_of(*origin.place),
                        name_request(self.tasks._scope),
                    )
        self.made.clear()
        self.scope = {}

    async def run(self, background: BackgroundTask, caller: Place) -> None:
        """Run the background task of a response. Before and after it, run injected tasks that no response has."""
        if self.moved is not None:
            self.moved.update(self._injected())
        await self._run_dropped(background, caller)
        await self._run_all(background, caller)
        await self._run_dropped(background, caller)

    async def _run_dropped(self, background: BackgroundTask, caller: Place) -> None:
        """Run the tasks that FastAPI drops because the endpoint's response has a background task of its own."""
        if sys.exc_info()[0] is None:  # an exception handler's response drops the endpoint's tasks
            for each in self._injected():
                if each is not background:
                    await self._move([*filter(origin_of, each.tasks)], caller)

    def _injected(self) -> list[BackgroundTasks]:
        return [each for each in self.made if type(each).__module__ == "fastapi.background"]

    async def _run_all(self, background: Any, caller: Place) -> None:
        if not _is_container(background):
            await self._move([background], caller)
            return
        if self.moved is not None:
            self.moved.add(background)
        position = 0
        while position < len(background.tasks):
            batch = [*takewhile(lambda each: not _is_container(each), background.tasks[position:])]
            if batch:
                position += len(batch)
                await self._move(batch, caller)
            else:
                position += 1
                await self._run_all(background.tasks[position - 1], caller)

    async def _move(self, batch: list[Any], caller: Place) -> None:
        if self.moved is not None:
            self.tasks._unbounded = True
            for each in batch:
                self.add(self.tasks, each, caller)
        elif batch:
            await self._hold(batch, caller)

    async def _hold(self, batch: list[Any], caller: Place) -> None:
        tasks, waiters = self.tasks, Waiters()
        held = Held(tasks._host, {"type": self.scope["type"]})  # not the whole scope: a cancelled call may leave it
        held._request, held._then, held._unbounded = name_request(tasks._scope), waiters.wake, True
        for each in batch:
            self.add(held, each, caller)
        batch.clear()
        runner = cast("Runner", tasks._host.settings)
        wait = partial(until, waiters, lambda: held._settled)
        cancelled = get_cancelled_exc_class()
        try:
            if (waiting := runner._end(held)) is not None:
                await waiting
            await wait()
        except cancelled:

            async def wait_no_longer() -> None:
                with move_on_after(runner.drain_timeout):
                    await wait()

            await outlast(wait_no_longer)
            raise

    def add(self, tasks: DeferredTasks, each: Any, caller: Place | None = None) -> None:
        """Add a background task to a list, on behalf of the line that created it, or of the endpoint."""
        func, args, kwargs = call_of(each)
        name = None
        if not _runs_as_it_is(func):
            func, name = partial(_call, func), name_of(func)
        place, context = origin_of(each, forget=True) or (self._endpoint() or caller, None)
        add = partial(tasks._add, func, args, kwargs, Options(when="always", name=name), cast("FrameType", place))
        if context is None:
            add()
        else:
            context.run(add)

    def _endpoint(self) -> Place | None:
        endpoint = unwrap(unwrap_partial(self.scope.get("endpoint")))
        if isclass(endpoint):
            endpoint = getattr(endpoint, self.scope.get("method", "").lower(), None)
        code: CodeType | None = getattr(endpoint, "__code__", None)
        return code and Place(code, -1)  # its first line


def _is_plain(background: Any) -> bool:
    """Whether its class leaves the call to Starlette's, which a tracing tool may have replaced by its own."""
    if not isinstance(background, BackgroundTask):
        return False
    return next(cls for cls in type(background).__mro__ if "__call__" in vars(cls)).__module__ in _PLAIN


def _is_container(background: Any) -> bool:
    return isinstance(background, BackgroundTasks) and _is_plain(background)


def call_of(each: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the call that a background task makes. A subclass with its own `__call__` is called as a whole."""
    return (each.func, each.args, each.kwargs) if _is_plain(each) else (each, (), {})


def _runs_as_it_is(func: Any) -> bool:
    """Whether a list would call this function. It would enqueue an engine's task, which Starlette calls."""
    try:
        return type(func) is FunctionType or (recognise(func) is None and callable(func))
    except TypeError:
        return False


def _call(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def origin_of(each: Any, *, forget: bool = False) -> Origin | None:
    """Return where a background task was created; None if it has run, or was created outside of any request."""
    if not isinstance(each, BackgroundTask):
        return None
    origin: Origin | None = vars(each).pop(_ORIGIN, None) if forget else vars(each).get(_ORIGIN)
    return origin


def _line_that_made() -> Place:
    """Return the line that created a background task, outside of the methods that do it."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_name in _MAKERS and isinstance(frame.f_locals.get("self"), BackgroundTask):
        frame = frame.f_back
    return Place(frame.f_code, frame.f_lasti)


def _calling_response(background: BackgroundTask) -> Place | None:
    """Return the line that calls a background task, if a response does: an object that has it as `background`."""
    frame: Any = sys._getframe(2)
    while frame.f_locals.get("self") is background:  # the wrapper of a tracing tool, which calls ours
        frame = frame.f_back
    if getattr(frame.f_locals.get("self"), "background", None) is background:
        return Place(frame.f_code, frame.f_lasti)
    return None


@cache
def install() -> None:
    """Replace the methods that create and call background tasks, once per process. Only a `Moving` uses them."""
    make, make_many, add_task = BackgroundTask.__init__, BackgroundTasks.__init__, BackgroundTasks.add_task

    @wraps(make)
    def make_and_note(self: BackgroundTask, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if moving.get() is not None:
            context = copy_context() if running_loop() is None else None
            vars(self)[_ORIGIN] = Origin(_line_that_made(), context)

    @wraps(make_many)
    def make_many_and_note(self: BackgroundTasks, *args: Any, **kwargs: Any) -> None:
        make_many(self, *args, **kwargs)
        request = moving.get()
        if request is not None and not request.over:
            request.made.append(self)

    @wraps(add_task)
    def add_and_move(self: BackgroundTasks, *args: Any, **kwargs: Any) -> None:
        add_task(self, *args, **kwargs)
        request = moving.get()
        if request is not None and request.moved is not None and self in request.moved:
            request.add(request.tasks, self.tasks[-1])

    def init_subclass(cls: Any, **kwargs: Any) -> None:
        super(BackgroundTask, cls).__init_subclass__(**kwargs)
        _replace_calls(cls)

    replaced: list[tuple[type, str, Any]] = [
        (BackgroundTask, "__init__", make_and_note),
        (BackgroundTask, "__init_subclass__", classmethod(cast("Any", init_subclass))),
        (BackgroundTasks, "__init__", make_many_and_note),
        (BackgroundTasks, "add_task", add_and_move),
    ]
    for cls, name, value in replaced:
        setattr(cls, name, value)
    _replace_calls(BackgroundTask)


def _is_replaced(call: Any) -> bool:
    """Whether it is ours, or not Starlette's own: a tracing tool's wrapper, which calls ours."""
    return hasattr(call, _ORIGIN) or call.__module__ not in _PLAIN


def _replace_calls(cls: type[BackgroundTask]) -> None:
    call = vars(cls).get("__call__")
    if isinstance(call, FunctionType) and not hasattr(call, _ORIGIN):
        setattr(cls, "__call__", _moving(call))  # noqa: B010 - type checkers do not let a method be replaced
    for each in cls.__subclasses__():
        _replace_calls(each)


def _moving(call: Callable[..., Any]) -> Any:
    @wraps(call)
    async def __call__(self: BackgroundTask, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        request, task = moving.get(), inside.get()
        if request is not None and not request.over and (task is None or task.state is not TaskState.RUNNING):
            caller = _calling_response(self)
            if caller is not None:
                return await request.run(self, caller)
        origin_of(self, forget=True)
        return await call(self, *args, **kwargs)

    setattr(__call__, _ORIGIN, True)
    return __call__
