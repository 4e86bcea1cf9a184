"""A backend for Django's own tasks, `django.tasks`, which Django has from 6.0 on.

1. An enqueued task ends exactly once, as SUCCESSFUL or FAILED, and then sends `task_finished`. This holds even if it
   never ran, or if its thread goes on after a timeout.
2. Django creates a backend for each context. So the results are kept in this module, by alias, and change under
   `_lock`.
3. Callers get a copy of a result, as from any backend. Only the task itself and signals see the live result.
4. A failure is one ERROR in the log: ours, which names the line that added the task. Django's own record is filtered
   out, but only if there is ours.
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from contextvars import ContextVar, copy_context
from copy import copy
from functools import partial
from importlib import import_module
from inspect import iscoroutinefunction
from logging import ERROR, LogRecord, getLogger
from socket import gethostname
from threading import RLock, Thread
from time import monotonic
from traceback import format_exception
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from asgiref.sync import SyncToAsync
from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.tasks import TaskContext, TaskResult, TaskResultStatus
from django.tasks.backends.immediate import ImmediateBackend
from django.tasks.base import TaskError
from django.tasks.exceptions import InvalidTask, InvalidTaskBackend, TaskResultDoesNotExist
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.utils import timezone
from django.utils.crypto import get_random_string
from django.utils.inspect import is_module_level_function
from django.utils.json import normalize_json

from ._django import DeferredMiddleware
from ._exceptions import DeferredError
from ._loops import running_loop
from ._outcome import check_when
from ._scheduler import Scheduler
from ._states import TaskState
from ._tasks import DeferredTask, DeferredTasks, Options, TaskEvent, check_positive, current

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    from django.tasks import Task

P = ParamSpec("P")
R = TypeVar("R")

INSTALL = "Wrap it in asgi.py: application = asgi_deferred.django.DeferredMiddleware(get_asgi_application())."

_reported: ContextVar[str] = ContextVar("asgi_deferred_reported", default="")  # the result whose failure we log

_lock = RLock()  # re-entrant, because a finaliser can run while it is held, and can enqueue


def _is_not_reported(record: LogRecord) -> bool:
    return record.levelno < ERROR or _reported.get() not in (record.args or ())


getLogger("django.tasks").addFilter(_is_not_reported)


class _Results:
    """The results of one alias. A finished one is kept for a while."""

    def __init__(self) -> None:
        self.live: dict[str, TaskResult[..., Any]] = {}
        self.finished: OrderedDict[str, tuple[float, TaskResult[..., Any]]] = OrderedDict()

    def finish(self, result: TaskResult[..., Any], until: float, limit: int) -> None:
        self.live.pop(result.id, None)
        self.finished[result.id] = (until, result)
        self.prune()
        while len(self.finished) > limit:
            self.finished.popitem(last=False)

    def prune(self) -> None:
        now = monotonic()
        while self.finished and next(iter(self.finished.values()))[0] <= now:
            self.finished.popitem(last=False)

    def get(self, result_id: str) -> TaskResult[..., Any] | None:
        self.prune()
        return self.live.get(result_id) or self.finished.get(result_id, (0.0, None))[1]


_results: dict[str, _Results] = {}


class DeferredBackend(ImmediateBackend):
    """Runs a task after the response of the request that enqueued it.

    Within a list, a task runs before those of lower priority. Outside a request there is no response to wait for, so
    a task runs at once, as with Django's `ImmediateBackend`: in a shell, a management command or a test, and under
    WSGI.

    `OPTIONS`:
        when: The option `when` of each task. The default is "always", because people expect an enqueued task to run.
        result_ttl: For how many seconds this process keeps the result of a finished task. The default is 600.
        max_results: How many results of finished tasks this process keeps. The default is 10000.

    Raises:
        InvalidTaskBackend: An option is unknown, or out of its range.
    """

    supports_defer = False
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        self.worker_id = f"{gethostname()}:{os.getpid()}"
        self.when = self.options.get("when", "always")
        self.result_ttl = self.options.get("result_ttl", 600.0)
        self.max_results = self.options.get("max_results", 10_000)
        try:
            check_when(self.when)
            check_positive("result_ttl", self.result_ttl)
            check_positive("max_results", self.max_results)
            if unknown := self.options.keys() - {"when", "result_ttl", "max_results"}:
                raise ValueError(f"{sorted(unknown)} unknown: there are 'when', 'result_ttl' and 'max_results'")
        except (TypeError, ValueError) as exc:
            raise InvalidTaskBackend(f"TASKS[{alias!r}]['OPTIONS'] is not valid: {exc}") from exc
        self._results = _results.setdefault(alias, _Results())

    def validate_task(self, task: Task[..., Any]) -> None:
        """Refuse a task that cannot run here.

        Raises:
            InvalidTask: It is not a module-level function, has `run_after`, or breaks one of Django's own rules.
        """
        if not is_module_level_function(task.func) or task.func.__name__ == "<lambda>":
            name = getattr(task.func, "__qualname__", type(task.func).__name__)
            raise InvalidTask(
                f"{name} is not a function at a module's top level, so a result could not name it. "
                "Move it to the top level of a module, such as tasks.py, and decorate it there with @task."
            )
        if task.run_after is not None:
            raise InvalidTask(
                f"{task.module_path} has run_after, which asks for a queue that outlives this process. "
                "Enqueue it without run_after, or with a backend that stores its tasks: .using(backend=...)."
            )
        super().validate_task(task)

    def enqueue(self, task: Task[P, R], args: list[Any], kwargs: dict[str, Any]) -> TaskResult[P, R]:
        """Run the task after the response. Outside a request, run it now.

        Raises:
            InvalidTask: See `validate_task`.
            TypeError, ValueError: An argument cannot be put into JSON.
            ImproperlyConfigured: This is a request, but the application is not wrapped in `DeferredMiddleware`.
            BacklogFull, RunnerClosed: See `DeferredTasks.add_task`.
        """
        tasks = _list()
        if tasks is None:
            _check_arguments(task, args, kwargs)
            result = super().enqueue(task, args, kwargs)
            with _lock:
                self._keep(result)
            return result
        result = self._add(tasks, task, args, kwargs)
        task_enqueued.send(type(self), task_result=result)
        return _snapshot(result)

    async def aenqueue(self, task: Task[P, R], args: list[Any], kwargs: dict[str, Any]) -> TaskResult[P, R]:
        """See `enqueue`."""
        tasks = _list()
        if tasks is None:
            return await super().aenqueue(task, args, kwargs)
        result = self._add(tasks, task, args, kwargs)
        await task_enqueued.asend(type(self), task_result=result)
        return _snapshot(result)

    def get_result(self, result_id: str) -> TaskResult[..., Any]:
        """Return the result as it is now.

        Raises:
            TaskResultDoesNotExist: This process never had it, or no longer has it.
        """
        with _lock:
            result = self._results.get(result_id)
            if result is not None:
                return _snapshot(result)
        raise TaskResultDoesNotExist(
            f"{result_id}: the process that ran the task keeps its result for {self.result_ttl} s, and keeps the last "
            f"{self.max_results} results. If you need more, use a backend that stores its tasks."
        )

    async def aget_result(self, result_id: str) -> TaskResult[..., Any]:
        """See `get_result`."""
        return self.get_result(result_id)

    def check(self, **kwargs: Any) -> list[checks.CheckMessage]:
        """Run Django's system check of this backend."""
        return [*super().check(**kwargs), *_check_application(), *_check_databases()]

    def _add(self, tasks: DeferredTasks, task: Task[P, R], args: list[Any], kwargs: dict[str, Any]) -> TaskResult[P, R]:
        self.validate_task(task)
        _check_arguments(task, args, kwargs)
        result: TaskResult[P, R] = TaskResult(
            task=task,
            id=get_random_string(32),
            status=TaskResultStatus.READY,
            enqueued_at=timezone.now(),
            started_at=None,
            finished_at=None,
            last_attempted_at=None,
            args=list(args),
            kwargs=dict(kwargs),
            backend=self.alias,
            errors=[],
            worker_ids=[],
        )
        host = cast("Scheduler", tasks._host)
        run = self._run_async if iscoroutinefunction(task.func) else self._run
        with _lock:
            if _end_unrun not in host.settings.observers:
                host.settings.observers = (*host.settings.observers, _end_unrun)
            self._results.live[result.id] = result
        try:
            deferred = tasks._add(run, (result,), {}, Options(self.when, name=task.module_path), _caller())
        except BaseException:
            with _lock:
                del self._results.live[result.id]
            raise
        if not tasks._ended:
            host.account.rearrange(tasks, partial(_move_ahead, deferred, task.priority))
        return result

    def _run(self, result: TaskResult[..., Any]) -> None:
        if not self._start(result):
            return
        try:
            task_started.send(type(self), task_result=result)
            value = result.task.func(*_arguments(result), **result.kwargs)
            _set(result, _return_value=normalize_json(value))
        except BaseException as exc:
            if self._finish(result, exc):
                task_finished.send(type(self), task_result=result)
            raise
        if self._finish(result):
            task_finished.send(type(self), task_result=result)

    async def _run_async(self, result: TaskResult[..., Any]) -> None:
        self._start(result)
        try:
            await task_started.asend(type(self), task_result=result)
            value = await result.task.func(*_arguments(result), **result.kwargs)
            _set(result, _return_value=normalize_json(value))
        except BaseException as exc:
            if self._finish(result, exc):
                await task_finished.asend(type(self), task_result=result)
            raise
        if self._finish(result):
            await task_finished.asend(type(self), task_result=result)

    def _start(self, result: TaskResult[..., Any]) -> bool:
        """Enter RUNNING, unless there is a final status; return whether it did."""
        _reported.set(result.id)
        now = timezone.now()
        with _lock:
            if result.is_finished:
                return False
            _set(result, status=TaskResultStatus.RUNNING, started_at=now, last_attempted_at=now)
            result.worker_ids.append(self.worker_id)
            return True

    def _finish(self, result: TaskResult[..., Any], error: BaseException | None = None) -> bool:
        """Enter the final status, unless there is one; return whether it did."""
        status, errors = TaskResultStatus.SUCCESSFUL, []
        if error is not None:
            kind = type(error)
            path = f"{kind.__module__}.{kind.__qualname__}"
            trace = "".join(format_exception(error))
            status, errors = TaskResultStatus.FAILED, [TaskError(exception_class_path=path, traceback=trace)]
        with _lock:
            if result.is_finished:
                return False
            result.errors.extend(errors)
            _set(result, status=status, finished_at=timezone.now())
            self._keep(result)
            return True

    def _keep(self, result: TaskResult[..., Any]) -> None:
        self._results.finish(result, monotonic() + self.result_ttl, self.max_results)


def _list() -> DeferredTasks | None:
    """Return the current request's list, `None` outside a request."""
    tasks = current.get()
    if tasks is None and SyncToAsync.thread_sensitive_context.get(None) is not None:
        raise ImproperlyConfigured(
            f"A task was enqueued in a request, but the application is not wrapped, so nothing runs after it. {INSTALL}"
        )
    return tasks


def _check_arguments(task: Task[..., Any], args: list[Any], kwargs: dict[str, Any]) -> None:
    try:
        normalize_json([args, kwargs])
    except (TypeError, ValueError) as exc:
        raise type(exc)(
            f"An argument of {task.module_path} cannot be put into JSON: {exc}. "
            "Pass a JSON value, such as the primary key of an object instead of the object."
        ) from exc


def _arguments(result: TaskResult[..., Any]) -> list[Any]:
    return [TaskContext(task_result=result), *result.args] if result.task.takes_context else result.args


def _set(result: TaskResult[..., Any], **attributes: Any) -> None:
    for name, value in attributes.items():
        object.__setattr__(result, name, value)


def _snapshot(result: TaskResult[P, R]) -> TaskResult[P, R]:
    snapshot = copy(result)
    _set(snapshot, errors=[*result.errors], worker_ids=[*result.worker_ids])
    return snapshot


def _caller() -> FrameType:
    """Return the frame of the line that enqueued."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("django.tasks.", __name__)):
        frame = frame.f_back
    return frame


def _result_of(task: DeferredTask) -> TaskResult[..., Any] | None:
    ours = isinstance(getattr(task.func, "__self__", None), DeferredBackend)
    return task.args[0] if ours and task.args else None  # an ended one has no arguments any more


def _move_ahead(deferred: DeferredTask, priority: int, queue: list[DeferredTask]) -> list[DeferredTask]:
    """Move a task that was just added ahead of those of lower priority."""
    others = [task for task in queue if task is not deferred]
    position = len(others)
    for index in range(len(others) - 1, -1, -1):
        result = _result_of(others[index])
        if result is None:
            continue
        if result.task.priority >= priority:
            break
        position = index
    return [*others[:position], deferred, *others[position:]] if position < len(others) else queue


def _end_unrun(event: TaskEvent) -> None:
    """Observe tasks whose end the function they call does not see."""
    result = _result_of(event.task)
    if result is None or event.state in (TaskState.RUNNING, TaskState.SUCCEEDED):
        return
    error = event.error or DeferredError(f"{event.state.value.capitalize()} before it started")
    backend = event.task.func.__self__  # type: ignore[attr-defined]
    if not backend._finish(result, error):
        return
    if event.error is not None or event.state is TaskState.ABANDONED:
        _reported.set(result.id)
    send = partial(copy_context().run, partial(task_finished.send_robust, type(backend), task_result=result))
    if running_loop() is None:
        _send_and_close(send)
    else:  # Django does not let receivers use the database on an event loop. Python waits for this thread at exit.
        Thread(target=_send_and_close, args=(send,), name="asgi-deferred").start()


def _send_and_close(send: Callable[[], object]) -> None:
    """Close only the connections that receivers open: this can be the thread of a request or of a test."""
    opened = [connection for connection in connections.all(initialized_only=True) if connection.connection is not None]
    send()
    for connection in connections.all(initialized_only=True):
        if connection not in opened:
            connection.close()


def _check_application() -> Iterable[checks.CheckMessage]:
    path = getattr(settings, "ASGI_APPLICATION", None)
    if path is None:
        path = settings.ROOT_URLCONF.rpartition(".")[0] + ".asgi.application"
    module, _, name = path.rpartition(".")
    try:
        application = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        yield checks.Warning(
            f"DeferredBackend runs tasks after the responses of an ASGI application, and finds none: {exc}.",
            hint=f'Set ASGI_APPLICATION = "project.asgi.application" if it is elsewhere. {INSTALL}',
            id="asgi_deferred.W001",
        )
    else:
        if not _is_wrapped(application):
            yield checks.Warning(
                f"DeferredBackend runs tasks after the response, but {path} is not wrapped.",
                hint=INSTALL,
                id="asgi_deferred.W002",
            )


def _is_wrapped(application: object) -> bool:
    """Whether the application is the middleware, or contains it."""
    seen: set[int] = set()
    todo = [application]
    while todo:
        app = todo.pop()
        if isinstance(app, DeferredMiddleware):
            return True
        if id(app) not in seen and (callable(app) or isinstance(app, dict)):
            seen.add(id(app))
            todo += (app if isinstance(app, dict) else getattr(app, "__dict__", {})).values()
    return False


def _check_databases() -> Iterable[checks.CheckMessage]:
    for alias, database in settings.DATABASES.items():
        if database.get("CONN_MAX_AGE", 0) != 0:
            yield checks.Warning(
                f"DATABASES[{alias!r}] has CONN_MAX_AGE. Under ASGI, the thread of a request ends with the request and "
                "leaves its connection open and unused. Tasks close their own connections.",
                hint="Set CONN_MAX_AGE = 0, and use a connection pool: OPTIONS = {'pool': True} for PostgreSQL.",
                id="asgi_deferred.W003",
            )
        if database.get("ENGINE") == "django.db.backends.sqlite3" and ":memory:" in str(database.get("NAME")):
            yield checks.Warning(
                f"DATABASES[{alias!r}] is in memory. There, each thread has a database of its own, and tasks run in "
                "threads of their own.",
                hint="Give it a file: 'NAME': BASE_DIR / 'db.sqlite3'.",
                id="asgi_deferred.W004",
            )
