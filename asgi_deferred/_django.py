"""Django's requests, connections and test clients.

1. When a task ends, its connections are closed, in the thread that opened them, before another task gets its place. So
   no task finds a stale connection, no connection stays behind in an unused thread, and there are never more
   connections than running tasks.
2. An async task makes its thread-sensitive calls, such as those of the async ORM, in a thread of its own. The thread
   that its context names has ended with the request, or is shared by the whole process.
3. Django closes a response, and with it connections and files, only if `send` has not raised. So the refusal of a
   durable task is raised after Django has ended.
"""

from __future__ import annotations

import sys
from asyncio import shield, wrap_future
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from contextvars import Context
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, cast

from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core import checks
from django.core.handlers.base import BaseHandler
from django.core.management import get_commands
from django.db import connections, reset_queries

from ._exceptions import EnqueueFailed
from ._loops import AsyncioLoop
from ._middleware import DeferredMiddleware as _DeferredMiddleware
from ._outcome import Outcome
from ._runner import Runner
from ._scheduler import Run, Scheduler
from ._settings import ASGIApp
from ._states import TaskState
from ._tasks import KEY, DeferredTask, DeferredTasks, current

if TYPE_CHECKING:
    from contextvars import Token


class OneThread(Executor):
    """An executor with one daemon thread. A task that is stuck in it does not keep the process alive."""

    def __init__(self) -> None:
        self.used = False
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self.used:
            self.used = True
            Context().run(Thread(target=self._serve, name="asgi-deferred", daemon=True).start)
        future: Future[Any] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as exc:
                    future.set_exception(exc)

        self._jobs.put(job)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002
        """End the thread once it has done everything that was submitted."""
        self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job


class TaskConnections:
    """Gives a task its own database connections, and closes them."""

    def __init__(self, _: DeferredTask) -> None: ...

    def __enter__(self) -> None:
        reset_queries()

    def __exit__(self, *_: object) -> None:
        connections.close_all()

    async def __aenter__(self) -> None:
        self._thread = OneThread()
        self._sensitive = cast("Any", ThreadSensitiveContext(executor=self._thread))
        await self._sensitive.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._thread.used:
                await shield(wrap_future(self._thread.submit(connections.close_all)))
        finally:
            self._thread.shutdown()
            await self._sensitive.__aexit__(None, None, None)


class DeferredMiddleware(_DeferredMiddleware):
    """`asgi_deferred.DeferredMiddleware` for an application that is Django, or contains Django.

    It closes the database connections of a task when the task ends. Django raises an error for a websocket; this
    closes it instead, so that the client gets a 403.

    Args:
        app: The application from `get_asgi_application()`, or one that wraps it.
        runner: Limits, defaults and observers. The default is a new `Runner()`. The middleware adds to its `around`.
            Sync tasks hold at most `max_threads` database connections, all tasks at most `max_concurrency`.
    """

    def __init__(self, app: ASGIApp, runner: Runner | None = None) -> None:
        super().__init__(app, runner)
        self.app: ASGIApp = _raising_later(app)
        self.runner.around = (TaskConnections, *self.runner.around)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            await super().__call__(scope, receive, send)
            return
        received = False

        async def receive_and_note() -> Any:
            nonlocal received
            received = True
            return await receive()

        try:
            await super().__call__(scope, receive_and_note, send)
        except ValueError:
            if received:
                raise
            await receive()
            await send({"type": "websocket.close"})


def _raising_later(app: ASGIApp) -> ASGIApp:
    async def wrapper(scope: Any, receive: Any, send: Any) -> None:
        refusal: EnqueueFailed | None = None

        async def send_or_note(message: Any) -> None:
            nonlocal refusal
            try:
                await send(message)
            except EnqueueFailed as exc:
                refusal = exc

        try:
            await app(scope, receive, send_or_note)
            if refusal is not None:
                raise refusal
        finally:
            refusal = None  # or a cycle: its traceback keeps this frame

    return wrapper


@checks.register
def check_runserver(**_: Any) -> list[checks.CheckMessage]:
    """Django's system check. Django only finds it if this module is in INSTALLED_APPS."""
    if sys.argv[1:2] != ["runserver"] or not get_commands()["runserver"].startswith("django."):
        return []
    return [
        checks.Warning(
            "Django's runserver uses WSGI: in a request, defer() fails, and an enqueued task runs at once.",
            hint='Put "daphne" first in INSTALLED_APPS and set ASGI_APPLICATION, or run an ASGI server like uvicorn.',
            id="asgi_deferred.W005",
        )
    ]


def capture_deferred(*, execute: bool = False) -> CaptureDeferred:
    """Collect the tasks that a test defers, with or without Django's test clients. The block gets a list of them.

    Use it with `with`, and in an async test with `async with`. By default, no task runs. With `execute=True`, the tasks
    run at the end of the block, in the test's own thread, so they see the transaction of a `TestCase`. The response
    that the test client got decides about `when`. The block then raises the error of the first task that failed.

    Enter it before `captureOnCommitCallbacks(execute=True)`, which runs its callbacks at its own end.

    Args:
        execute: Run the tasks at the end of the block, one after the other, and also the tasks that they add.
    """
    return CaptureDeferred(execute)


class CaptureDeferred:
    """The context manager that `capture_deferred` returns."""

    def __init__(self, execute: bool) -> None:  # noqa: FBT001
        self._execute = execute
        self._deferred: list[DeferredTask] = []
        self._host = _Recorder(self._deferred)

    def __enter__(self) -> list[DeferredTask]:
        self._before = (BaseHandler.get_response, BaseHandler.get_response_async)
        get_response, get_response_async = self._before

        def captured(handler: Any, request: Any) -> Any:
            with self._request(request) as answered:
                return answered(get_response(handler, request))

        async def captured_async(handler: Any, request: Any) -> Any:
            with self._request(request) as answered:
                return answered(await get_response_async(handler, request))

        _patch(captured, captured_async)
        outside = DeferredTasks(self._host, {"type": "http"})
        outside._outcome = Outcome("http", complete=True)
        self._token: Token[DeferredTasks | None] = current.set(outside)
        return self._deferred

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        current.reset(self._token)
        _patch(*self._before)
        if self._execute and exc_type is None:
            self._run()

    async def __aenter__(self) -> list[DeferredTask]:
        return self.__enter__()

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        execute, self._execute = self._execute, False
        self.__exit__(exc_type)
        if execute and exc_type is None:
            await sync_to_async(self._run)()

    @contextmanager
    def _request(self, request: Any) -> Iterator[Callable[[Any], Any]]:
        """Give a request a list, unless it has one; yield a function that takes its response."""
        scope = getattr(request, "scope", {"type": "http"})
        if KEY in scope:
            yield lambda response: response
            return
        tasks = DeferredTasks(self._host, {"type": "http"})
        request.scope = {**scope, KEY: tasks}

        def answered(response: Any) -> Any:
            tasks._outcome = Outcome("http", response.status_code, complete=True)
            return response

        token = current.set(tasks)
        try:
            yield answered
        finally:
            current.reset(token)

    def _run(self) -> None:
        for task in self._deferred:  # the list grows when a task adds another
            if task.state is not TaskState.PENDING:
                continue
            context = cast("Context", task._context)
            run = Run(self._host)
            run.task, run.loop, run.placed = task, AsyncioLoop(cast("Any", None)), False
            if not task._async:
                run.returned = context.run(self._host.call, run)
            if task._async or run.returned is not None:
                context.run(async_to_sync(run.main))
        for task in self._deferred:
            if task.error is not None:
                raise task.error


def _patch(get_response: Any, get_response_async: Any) -> None:
    handler: Any = BaseHandler
    handler.get_response, handler.get_response_async = get_response, get_response_async


class _Recorder(Scheduler):
    def __init__(self, deferred: list[DeferredTask]) -> None:
        super().__init__(Runner())
        self.deferred = deferred

    def add(self, task: DeferredTask) -> None:
        super().add(task)
        self.deferred.append(task)
