"""Starlette: the background tasks of a whole application, run by the runner, when and as Starlette runs them."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import inspect
import logging
import os
import pickle
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette import background as starlette_background
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route, Router, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_deferred import DeferredMiddleware as CoreMiddleware
from asgi_deferred import Runner, TaskEvent, current_tasks, tasks_from
from asgi_deferred.starlette import DeferredMiddleware
from asgi_deferred.testing import inline, record

from .clients import OpenClient, async_client, open_client
from .support import Log, assert_conserved, http_scope, lifespan, no_more_messages

__all__ = ["open_client"]

request_id: ContextVar[str] = ContextVar("request_id")
both = pytest.mark.parametrize("detached", [False, True])


def make_app(endpoint: Any, runner: Runner | None = None, *, detached: bool = False) -> Starlette:
    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(DeferredMiddleware, runner=runner, detached=detached)
    return app


def answer(background: Any) -> Callable[[Request], Awaitable[Response]]:
    """Make an endpoint that answers with a background, made anew by a function."""

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("hello", background=background())

    return endpoint


def fail() -> None:
    raise ValueError("task")


def line_of(function: Callable[..., Any], offset: int = 0) -> str:
    return f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1] + offset}"


class Noted(Log):
    """An observer that also keeps the events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[TaskEvent] = []

    def __call__(self, event: TaskEvent) -> None:
        super().__call__(event)
        self.events.append(event)


def test_tasks_from_request(open_client: OpenClient) -> None:
    """G1: `tasks_from(request)` works in plain Starlette, and its tasks run after the application has returned."""
    log = Log()

    def endpoint(request: Request) -> Response:
        tasks_from(request).add_task(log.note, "task")
        return PlainTextResponse("hello")

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)
        if scope["type"] == "http":
            log.append("application returned")

    inner = Starlette(routes=[Route("/", endpoint)])
    with open_client(CoreMiddleware(outer)) as client:
        assert client.get("/").text == "hello"
    assert log == ["application returned", "task"]


def test_a_test_that_asserts_right_after_the_call(open_client: OpenClient) -> None:
    """G4: nested, single and listed tasks, sync and async, run in order before the call ends, counted and observed."""
    log = Noted()
    runner = Runner(observers=[log])

    async def endpoint(request: Request) -> Response:
        tasks_from(request).add_task(log.note, "of the list")
        nested = BackgroundTasks([BackgroundTask(log.note, "nested")])
        background = BackgroundTasks([BackgroundTask(log.note, "async"), nested])
        background.add_task(log.note_sync, entry="sync")
        return JSONResponse("hello", background=background)

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        if scope["type"] == "http":
            log.append("call ended")

    app = Starlette(routes=[Route("/", endpoint)])
    with open_client(DeferredMiddleware(outer, runner)) as client:
        assert client.get("/").json() == "hello"
        assert log[:10] == [
            "Log.note RUNNING",
            "async",
            "Log.note SUCCEEDED",
            "Log.note RUNNING",
            "nested",
            "Log.note SUCCEEDED",
            "Log.note_sync RUNNING",
            "sync",
            "Log.note_sync SUCCEEDED",
            "call ended",
        ]
    assert log[10:] == ["Log.note RUNNING", "of the list", "Log.note SUCCEEDED"]
    assert [(event.task.request, event.outcome) for event in log.events[:6]] == [("GET /", None)] * 6
    assert_conserved(runner)


def test_detached_tasks_run_after_the_call(open_client: OpenClient) -> None:
    """G1, G4: detached, background tasks join the request's list, whatever the outcome, and no call is held."""
    log = Log()

    async def endpoint(request: Request) -> Response:
        tasks_from(request).add_task(log.note, "success only")
        background = BackgroundTasks([BackgroundTask(log.note, "async"), BackgroundTask(log.note_sync, "sync")])
        return PlainTextResponse("no", status_code=500, background=background)

    app = make_app(endpoint, detached=True)
    wrapped = app.build_middleware_stack

    def build() -> Any:
        inner: Any = app.router

        async def router(scope: Any, receive: Any, send: Any) -> None:
            await inner(scope, receive, send)
            if scope["type"] == "http":
                log.append("call ended")

        app.router = router  # type: ignore[assignment]
        return wrapped()

    app.build_middleware_stack = build  # type: ignore[method-assign]
    with open_client(app) as client:
        assert client.get("/").status_code == 500
    assert log == ["call ended", "async", "sync"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "make_response",
    [
        JSONResponse,
        partial(RedirectResponse, status_code=303),
        partial(PlainTextResponse, status_code=404),
        partial(PlainTextResponse, status_code=500),
        lambda content, background: StreamingResponse(iter([content]), background=background),
        lambda content, background: FileResponse(Path(__file__), background=background),
    ],
)
async def test_runs_after_the_final_message(make_response: Callable[..., Response]) -> None:
    """G1: the background of any kind of response runs, whatever its status, once that was sent."""
    log = Log()

    async def endpoint(request: Request) -> Response:
        return make_response("hello", background=BackgroundTask(log.note, "task"))

    app = make_app(endpoint, runner := Runner())

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        async def note_and_send(message: Any) -> None:
            await send(message)
            if message["type"].endswith("body") and not message.get("more_body"):
                log.append("final message")

        await app(scope, receive, note_and_send)

    async with async_client(outer) as client:
        await client.get("/")
        assert log == ["final message", "task"]
    assert runner.statistics().succeeded == 1


@both
def test_one_failure_leaves_the_rest(open_client: OpenClient, caplog: pytest.LogCaptureFixture, detached: bool) -> None:
    """G3: a failing background task is logged with the line that added it, and those after it run."""
    log = Log()

    async def endpoint(request: Request) -> Response:
        background = BackgroundTasks([BackgroundTask(fail)])
        background.add_task(log.note, "after")
        return PlainTextResponse("hello", background=background)

    with caplog.at_level(logging.ERROR, "asgi_deferred"), open_client(make_app(endpoint, detached=detached)) as client:
        assert client.get("/").text == "hello"
    assert log == ["after"]
    assert [line_of(endpoint, 1) in entry.getMessage() for entry in caplog.records] == [True]


@both
def test_what_cannot_be_called_fails_alone(
    open_client: OpenClient, caplog: pytest.LogCaptureFixture, detached: bool
) -> None:
    """G3: `BackgroundTask(f())`, a call that was made already, is a failed task, and leaves the others alone."""
    log = Log()
    mistake: Any = None
    app = make_app(answer(lambda: BackgroundTasks([BackgroundTask(mistake), BackgroundTask(log.note, "after")])))
    with caplog.at_level(logging.ERROR, "asgi_deferred"), open_client(app) as client:
        assert client.get("/").text == "hello"
    assert log == ["after"]
    assert ["Failed: deferred task 'NoneType'" in entry.getMessage() for entry in caplog.records] == [True]


class Retried(BackgroundTask):
    """A subclass with a call of its own, such as projects have."""

    async def __call__(self) -> None:
        for _ in range(2):
            try:
                await super().__call__()
            except ValueError:
                continue


@both
@pytest.mark.parametrize("make", [lambda task: task, lambda task: BackgroundTasks([task])])
def test_subclass_with_its_own_call_is_one_task(open_client: OpenClient, detached: bool, make: Any) -> None:
    """G2: a subclass's own `__call__` runs as one task, alone or in a list, and sees the errors it handles."""
    calls: list[str] = []

    def flaky() -> None:
        calls.append("called")
        fail()

    log = Log()
    app = make_app(answer(lambda: make(Retried(flaky))), Runner(observers=[log]), detached=detached)
    with open_client(app) as client:
        client.get("/")
    assert calls == ["called", "called"]
    assert log == ["Retried RUNNING", "Retried SUCCEEDED"]


@both
def test_subclass_made_later(open_client: OpenClient, detached: bool) -> None:
    """G2: a subclass that is defined after the middleware was made is a task as well, of a list too."""
    log = Log()
    runner = Runner(observers=[log])
    DeferredMiddleware(foreign, runner)

    class Later(BackgroundTasks):
        async def __call__(self) -> None:
            log.append("its own")
            await super().__call__()

    class Plain(BackgroundTask):
        def __init__(self, entry: str) -> None:
            super().__init__(log.note_sync, entry)

    app = make_app(answer(lambda: Later([Plain("task")])), runner, detached=detached)
    with open_client(app) as client:
        client.get("/")
    assert [entry.rpartition(".")[2] for entry in log] == ["Later RUNNING", "its own", "task", "Later SUCCEEDED"]


def test_added_by_a_running_task(open_client: OpenClient) -> None:
    """G11: a task that a running one adds to its `BackgroundTasks`, or to a nested one, runs before the call ends."""
    log = Log()

    async def endpoint(request: Request) -> Response:
        inner, outer = BackgroundTasks(), BackgroundTasks()

        async def add() -> None:
            outer.tasks.append(BackgroundTask(log.note, "appended"))
            inner.add_task(log.note, "to the inner")
            outer.add_task(log.note_sync, "to the outer")

        outer.add_task(add)
        outer.tasks.append(inner)
        return PlainTextResponse("hello", background=outer)

    with open_client(make_app(endpoint)) as client:
        client.get("/")
        assert log == ["to the inner", "appended", "to the outer"]


def test_added_by_a_running_detached_task(open_client: OpenClient) -> None:
    """G11: a task that a detached one adds to its `BackgroundTasks`, also an empty one, runs after it."""
    log = Log()

    async def endpoint(request: Request) -> Response:
        empty = BackgroundTasks()

        async def add() -> None:
            empty.add_task(log.note, "added")

        tasks_from(request).add_task(add)
        return PlainTextResponse("hello", background=empty)

    with open_client(make_app(endpoint, detached=True)) as client:
        client.get("/")
    assert log == ["added"]


@both
def test_added_in_a_stream(open_client: OpenClient, detached: bool) -> None:
    """G1: tasks that are added while the body streams run after the last of it."""
    log = Log()

    async def endpoint(request: Request) -> Response:
        background = BackgroundTasks()

        async def body() -> AsyncIterator[str]:
            background.add_task(log.note, "task")
            yield "a"
            log.append("streaming")
            yield "b"

        return StreamingResponse(body(), background=background)

    with open_client(make_app(endpoint, detached=detached)) as client:
        assert client.get("/").text == "ab"
    assert log == ["streaming", "task"]


class Endpoints(HTTPEndpoint):
    async def get(self, request: Request) -> Response:
        return PlainTextResponse("get", background=SHARED)

    def post(self, request: Request) -> Response:
        return PlainTextResponse("post", background=SHARED)


class Controller:
    async def method(self, request: Request) -> Response:
        return PlainTextResponse("get", background=SHARED)


async def with_argument(answer: str, request: Request) -> Response:
    return PlainTextResponse(answer, background=SHARED)


SHARED = BackgroundTask(fail)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("endpoint", "method", "definition"),
    [
        (Endpoints, "GET", Endpoints.get),
        (Endpoints, "POST", Endpoints.post),
        (Controller().method, "GET", Controller.method),
        (partial(with_argument, "get"), "GET", with_argument),
        (partial(PlainTextResponse("get", background=SHARED)), "GET", None),
    ],
)
async def test_where_the_line_is_not_known(endpoint: Any, method: str, definition: Callable[..., Any] | None) -> None:
    """G3: a task that was made outside of any request names its endpoint, or else the line that called it."""
    with record() as tasks:
        async with async_client(make_app(endpoint)) as client:
            response = await client.request(method, "/")
    assert response.text == method.lower()
    (task,) = tasks
    assert (task.func, task.when) == (fail, "always")
    if definition is not None:
        assert task.added_at == line_of(definition)
    else:
        assert Path(task.added_at.rpartition(":")[0]).name == "responses.py"


@both
def test_context_variables(open_client: OpenClient, detached: bool) -> None:
    """G5: a task sees what its endpoint has set, as in Starlette, and what a sync endpoint had set, where that lost it."""
    log = Log()

    async def task() -> None:
        log.append(request_id.get("lost"))

    def sync_endpoint(request: Request) -> Response:
        request_id.set("sync")
        return PlainTextResponse("hello", background=BackgroundTask(task))

    async def async_endpoint(request: Request) -> Response:
        response = PlainTextResponse("hello", background=BackgroundTask(task))
        request_id.set("set after the task was made")
        return response

    for endpoint in sync_endpoint, async_endpoint:
        with open_client(make_app(endpoint, detached=detached)) as client:
            client.get("/")
    assert log == ["sync", "set after the task was made"]


async def foreign(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application of no framework, with a response of Starlette's inside."""
    await PlainTextResponse("foreign", background=BackgroundTask(current_log.get().note, "foreign"))(
        scope, receive, send
    )


current_log: ContextVar[Log] = ContextVar("current_log")


class Sent:
    """A response of no framework, as some libraries have."""

    def __init__(self, background: BackgroundTask) -> None:
        self.background = background

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("sent")(scope, receive, send)
        await self.background()


@both
def test_everywhere_in_an_application(open_client: OpenClient, detached: bool) -> None:
    """G11: nested routers, mounts of Starlette and foreign applications, middlewares and own responses are all moved."""
    log, runner = Log(), Runner()

    def note(entry: str) -> Any:
        return Route("/" + entry, answer(lambda: BackgroundTask(log.note, entry)))

    async def other(request: Request) -> Any:
        return Sent(BackgroundTask(log.note, "other"))

    def with_log(app: Any) -> Any:
        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            current_log.set(log)
            await app(scope, receive, send)

        return wrapped

    inner = Starlette(routes=[note("inner")], middleware=[Middleware(DeferredMiddleware)])
    app = Starlette(
        routes=[
            note("top"),
            Route(
                "/zipped", answer(lambda: BackgroundTask(log.note, "zipped")), middleware=[Middleware(GZipMiddleware)]
            ),
            Route("/other", other),
            Mount("/mount", routes=[note("mounted"), Mount("/again", app=Router([note("nested")]))]),
            Mount("/app", app=inner),
            Mount("/foreign", app=with_log(foreign)),
        ]
    )
    app.add_middleware(DeferredMiddleware, runner=runner, detached=detached)
    paths = ["/top", "/zipped", "/other", "/mount/mounted", "/mount/again/nested", "/app/inner", "/foreign"]
    with open_client(app) as client:
        assert [client.get(path).status_code for path in paths] == [200] * 7
    assert sorted(log) == sorted(path.rpartition("/")[2] for path in paths)
    assert runner.statistics().succeeded == 7
    assert_conserved(runner)


@both
def test_raised_exception_drops_as_before(
    open_client: OpenClient, caplog: pytest.LogCaptureFixture, detached: bool
) -> None:
    """G11: the background of a response that is never sent does not run, and a WARNING names what was added."""
    log = Log()

    async def endpoint(request: Request) -> Response:
        background = BackgroundTasks()
        background.add_task(log.note, "task")
        raise HTTPException(404)

    with open_client(make_app(endpoint, detached=detached)) as client:
        assert client.get("/").status_code == 404
    assert log == []
    (entry,) = caplog.records
    assert entry.getMessage().startswith(
        f"Never ran: background task 'Log.note', added at {line_of(endpoint, 2)}, request 'GET /'. "
    )


@pytest.mark.anyio
async def test_denial_by_an_endpoint_class() -> None:
    """G3: a task that was made outside of any request and refuses a websocket names the line that called it."""

    class Endpoint(WebSocketEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.send_denial_response(PlainTextResponse("no", 403, background=SHARED))

    app = Starlette(routes=[WebSocketRoute("/", Endpoint)])
    app.add_middleware(DeferredMiddleware)
    messages = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}])
    scope = {"type": "websocket", "path": "/", "headers": [], "extensions": {"websocket.http.response": {}}}

    async def receive() -> Any:
        return next(messages)

    with record() as tasks:
        await app(scope, receive, Log().send)
    assert [Path(task.added_at.rpartition(":")[0]).name for task in tasks] == ["responses.py"]


def test_denial_of_a_websocket(open_client: OpenClient) -> None:
    """G2: the background of a response that refuses a websocket is moved too."""
    log = Log()
    runner = Runner()

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.send_denial_response(PlainTextResponse("no", 403, background=BackgroundTask(log.note, "task")))

    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    app.add_middleware(DeferredMiddleware, runner=runner)
    with open_client(app) as client, contextlib.suppress(Exception), client.websocket_connect("/"):
        pass  # pragma: no cover
    assert log == ["task"]
    assert runner.statistics().succeeded == 1


def test_awaited_by_the_users_code(open_client: OpenClient) -> None:
    """G10: `await background()` anywhere but in a response runs it there and raises its error, as without us."""
    log = Log()
    runner = Runner()

    async def endpoint(request: Request) -> Response:
        background = BackgroundTasks([BackgroundTask(log.note, "in the endpoint"), BackgroundTask(fail)])
        with pytest.raises(ValueError, match="task"):
            await background()
        log.append("endpoint goes on")
        return PlainTextResponse("hello", background=BackgroundTask(task))

    async def task() -> None:
        await BackgroundTask(log.note, "in a task")()
        with pytest.raises(ValueError, match="task"):
            await BackgroundTasks([BackgroundTask(fail)])()
        await PlainTextResponse("", background=BackgroundTask(log.note, "a response in a task"))(
            http_scope(), no_more_messages, log.send
        )

    with open_client(make_app(endpoint, runner)) as client:
        assert client.get("/").text == "hello"
    assert log == [
        "in the endpoint",
        "endpoint goes on",
        "in a task",
        "http.response.start",
        "http.response.body",
        "a response in a task",
    ]
    assert runner.statistics().accepted == 1


@both
def test_other_callables_as_background(open_client: OpenClient, detached: bool) -> None:
    """G10: a callable that is no `BackgroundTask` is called by its response as before; in a list it is a task."""
    log, runner = Log(), Runner()
    alone: Any = partial(log.note, "alone")

    async def listed() -> None:
        log.append("listed")

    items: list[Any] = [listed]
    backgrounds = iter([alone, BackgroundTasks(items)])
    with open_client(make_app(answer(lambda: next(backgrounds)), runner, detached=detached)) as client:
        client.get("/")
        client.get("/")
    assert log == ["alone", "listed"]
    assert runner.statistics().accepted == 1


@pytest.mark.anyio
async def test_elsewhere_nothing_changes() -> None:
    """G10: without the middleware, or outside of its requests, background tasks are Starlette's own."""
    log, runner = Log(), Runner()
    DeferredMiddleware(foreign)
    DeferredMiddleware(foreign)  # once is as good as twice
    await BackgroundTasks([BackgroundTask(log.note, "alone"), BackgroundTask(log.note_sync, "sync")])()
    background = BackgroundTask(fail)
    with pytest.raises(ValueError, match="task"):
        await background()
    assert vars(background) == {"func": fail, "args": (), "kwargs": {}, "is_async": False}
    app = CoreMiddleware(Starlette(routes=[Route("/", answer(lambda: BackgroundTask(log.note, "core")))]), runner)
    async with async_client(app) as client:
        await client.get("/")
    assert log == ["alone", "sync", "core"]
    assert runner.statistics().accepted == 0
    assert inspect.iscoroutinefunction(BackgroundTask.__call__)
    assert list(inspect.signature(BackgroundTask).parameters) == ["func", "args", "kwargs"]


@pytest.mark.anyio
async def test_a_response_is_copied_and_pickled() -> None:
    """G10: a response whose background was made in a request can be copied and pickled, as a cache does."""
    log: list[str] = []

    def endpoint(request: Request) -> Response:
        response = PlainTextResponse("hello", background=BackgroundTask(os.getpid))
        copies: list[Any] = [copy.copy(response), copy.deepcopy(response), pickle.loads(pickle.dumps(response))]
        for each in copies:
            log.append(each.background.func.__name__)
        return copy.deepcopy(response)

    async with async_client(make_app(endpoint, runner := Runner())) as client:
        assert (await client.get("/")).text == "hello"
    assert log == ["getpid"] * 3
    assert runner.statistics().succeeded == 1


@both
@pytest.mark.anyio
async def test_shared_response_runs_its_background_each_time(detached: bool) -> None:
    """G11: a response object that is sent many times loses no background task."""
    log = Log()
    shared = PlainTextResponse("hello", background=BackgroundTasks([BackgroundTask(log.note, "task")]))

    def endpoint(request: Request) -> Response:
        return shared

    async with async_client(make_app(endpoint, detached=detached)) as client:
        await client.get("/")
        await client.get("/")
    assert log == ["task", "task"]


@pytest.mark.anyio
async def test_kept_beyond_its_request() -> None:
    """G10: what a request's native task calls after the request has ended runs as in Starlette."""
    log, runner, go = Log(), Runner(), anyio.Event()

    async def endpoint(request: Request) -> Response:
        async def later() -> None:
            await go.wait()
            made = BackgroundTasks([BackgroundTask(log.note, "later")])
            await PlainTextResponse("", background=made)(http_scope(), no_more_messages, log.send)

        group.start_soon(later)
        return PlainTextResponse("hello")

    async with async_client(make_app(endpoint, runner)) as client, anyio.create_task_group() as group:
        await client.get("/")
        go.set()
    assert log == ["http.response.start", "http.response.body", "later"]
    assert runner.statistics().accepted == 0


@pytest.mark.anyio
@pytest.mark.parametrize("spec_version", ["2.0", "2.4"])
async def test_client_gone(tmp_path: Path, spec_version: str) -> None:
    """G3: a temporary file is removed when the client has left midway, wherever Starlette runs the background then."""
    file = tmp_path / "large"
    file.write_bytes(b"x" * 1_000_000)
    runner = Runner()

    async def endpoint(request: Request) -> Response:
        return FileResponse(file, background=BackgroundTask(os.unlink, file))

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    app = make_app(endpoint, runner)
    scope = http_scope(asgi={"version": "3.0", "spec_version": spec_version}, query_string=b"")
    async with lifespan(app):
        await app(scope, receive, Log().send)
        assert not file.exists()
    assert runner.statistics().succeeded == 1


def _stream(background: BackgroundTask) -> Response:
    async def body() -> AsyncIterator[str]:
        yield "a"
        raise RuntimeError("mid-body")

    return StreamingResponse(body(), background=background)


@pytest.mark.anyio
async def test_incomplete_response_drops_its_background() -> None:
    """G10: a response that breaks off by an error does not run its background, as in Starlette."""
    log = Log()

    async def endpoint(request: Request) -> Response:
        return _stream(BackgroundTask(log.note, "task"))

    async with async_client(make_app(endpoint)) as client:
        with pytest.raises((RuntimeError, ExceptionGroup)):  # a group before Starlette 1.0
            await client.get("/")
    assert log == []


@pytest.mark.anyio
@both
@pytest.mark.parametrize("outside", [False, True])
async def test_base_http_middleware(outside: bool, detached: bool) -> None:
    """G6: with a BaseHTTPMiddleware on either side that reads the whole body, every task is moved and ends."""
    log, runner = Log(), Runner()

    async def dispatch(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        body = b"".join([chunk async for chunk in response.body_iterator])
        return PlainTextResponse(body.upper(), background=BackgroundTask(log.note, "the middleware's"))

    middlewares: list[tuple[Any, dict[str, Any]]] = [
        (BaseHTTPMiddleware, {"dispatch": dispatch}),
        (DeferredMiddleware, {"runner": runner, "detached": detached}),
    ]
    app = Starlette(routes=[Route("/", answer(lambda: BackgroundTask(log.note, "the endpoint's")))])
    for middleware, options in reversed(middlewares) if outside else middlewares:
        app.add_middleware(middleware, **options)
    async with async_client(app) as client:
        assert (await client.get("/")).text == "HELLO"
        await runner.wait_idle()
    assert sorted(log) == ["the endpoint's", "the middleware's"]
    assert runner.statistics().succeeded == (1 if outside else 2)


@pytest.mark.anyio
async def test_sync_tasks_leave_the_endpoints_threads_alone() -> None:
    """G7: a sync endpoint answers while sync background tasks hold as many threads as endpoints have."""
    log, held, holding = Log(), threading.Event(), anyio.Event()
    token = anyio.lowlevel.current_token()

    def hold() -> None:
        anyio.from_thread.run_sync(holding.set, token=token)
        held.wait()
        log.append("task")

    def endpoint(request: Request) -> Response:
        return PlainTextResponse("hello", background=BackgroundTask(hold) if "hold" in request.query_params else None)

    limiter = anyio.to_thread.current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, 1
    try:
        async with async_client(make_app(endpoint)) as client, anyio.create_task_group() as group:
            group.start_soon(client.get, "/?hold")
            await holding.wait()
            log.append((await client.get("/")).text)
            held.set()
    finally:
        limiter.total_tokens = before
    assert log == ["hello", "task"]


@pytest.mark.anyio
async def test_cancelled_call(caplog: pytest.LogCaptureFixture) -> None:
    """G3, G9: when the held call is cancelled its task ends first, with a lifespan and without; then it is cancelled."""
    for with_lifespan in True, False:
        log = Log()
        started, go = anyio.Event(), anyio.Event()

        async def task(log: Log = log, started: anyio.Event = started, go: anyio.Event = go) -> None:
            started.set()
            await go.wait()
            log.append("task")

        app = make_app(answer(partial(BackgroundTask, task)))
        async with contextlib.AsyncExitStack() as stack:
            if with_lifespan:
                await stack.enter_async_context(lifespan(app))
            async with anyio.create_task_group() as group:

                async def call(log: Log = log, app: Any = app) -> None:
                    with anyio.CancelScope() as scope:
                        scopes.append(scope)
                        await app(http_scope(query_string=b""), no_more_messages, Log().send)
                    log.append(f"cancelled: {scope.cancelled_caught}")

                scopes: list[anyio.CancelScope] = []
                group.start_soon(call)
                await started.wait()
                scopes[0].cancel()
                await anyio.wait_all_tasks_blocked()
                go.set()
        assert log == ["task", "cancelled: True"]


@pytest.mark.anyio
@pytest.mark.parametrize("times", [1, 2])
async def test_cancelled_natively(anyio_backend: Any, times: int) -> None:
    """G3, G10: a call whose native task is cancelled waits for its tasks as well, and is then cancelled."""
    if anyio_backend[0] == "trio":
        pytest.skip("trio has no such thing")
    log = Log()
    started, go = anyio.Event(), anyio.Event()

    async def task() -> None:
        started.set()
        await go.wait()
        log.append("task")

    app = make_app(answer(partial(BackgroundTask, task)))
    async with lifespan(app):
        call = asyncio.create_task(app(http_scope(query_string=b""), no_more_messages, Log().send))
        await started.wait()
        for _ in range(times):
            call.cancel()
            await anyio.wait_all_tasks_blocked()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert log == ["task"]


@pytest.mark.anyio
async def test_cancelled_call_waits_no_longer_than_a_drain() -> None:
    """G9: a cancelled call waits `drain_timeout` seconds for its tasks; then it ends, and they stay the runner's."""
    log = Log()
    started, go = anyio.Event(), anyio.Event()

    async def task() -> None:
        started.set()
        await go.wait()
        log.append("task")

    app = make_app(answer(partial(BackgroundTask, task)), Runner(drain_timeout=0.05))
    async with lifespan(app):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(app, http_scope(query_string=b""), no_more_messages, Log().send)
                await started.wait()
                scope.cancel()
        log.append("call ended")
        go.set()
    assert log == ["call ended", "task"]


@pytest.mark.anyio
async def test_shutdown_names_what_it_abandons(caplog: pytest.LogCaptureFixture) -> None:
    """G8: a shutdown waits for held tasks until the deadline, names those it abandons, and lets the calls go."""
    log = Log()
    started = anyio.Event()

    async def hang() -> None:
        started.set()
        await anyio.sleep_forever()

    def background() -> BackgroundTasks:
        return BackgroundTasks([BackgroundTask(hang), BackgroundTask(log.note, "never")])

    app = make_app(answer(background), runner := Runner(drain_timeout=0.05))
    async with anyio.create_task_group() as group:
        async with lifespan(app):
            group.start_soon(app, http_scope(query_string=b""), no_more_messages, Log().send)
            await started.wait()
    assert log == []
    assert runner.statistics().abandoned == 2
    assert "hang' (1), 'Log.note' (1)" in caplog.text


@both
@pytest.mark.anyio
async def test_limits(detached: bool) -> None:
    """G7: a backlog that rejects refuses no background task, as its response has gone out: the call waits instead."""
    log = Log()
    runner = Runner(max_pending=1, overflow="reject", max_concurrency=1, timeout=5)

    def background() -> BackgroundTasks:
        return BackgroundTasks([BackgroundTask(log.note, entry) for entry in "abc"])

    async with async_client(make_app(answer(background), runner, detached=detached)) as client:
        await client.get("/")
        await runner.wait_idle()
    assert log == ["a", "b", "c"]
    assert_conserved(runner)


@both
@pytest.mark.anyio
async def test_timeout(detached: bool, caplog: pytest.LogCaptureFixture) -> None:
    """G3: the runner's timeout holds for background tasks."""
    log = Log()
    runner = Runner(timeout=0.01)

    def background() -> BackgroundTasks:
        return BackgroundTasks([BackgroundTask(anyio.sleep_forever), BackgroundTask(log.note, "after")])

    async with async_client(make_app(answer(background), runner, detached=detached)) as client:
        await client.get("/")
        await runner.wait_idle()
    assert log == ["after"]
    assert (runner.statistics().timed_out, runner.statistics().succeeded) == (1, 1)


@pytest.mark.anyio
async def test_concurrent_runner() -> None:
    """G4: with `concurrent=True` the call still waits for all of its tasks."""
    log = Log()

    def background() -> BackgroundTasks:
        return BackgroundTasks([BackgroundTask(log.note, entry) for entry in "abc"])

    async with async_client(make_app(answer(background), Runner(concurrent=True))) as client:
        await client.get("/")
        assert sorted(log) == ["a", "b", "c"]


@pytest.mark.anyio
async def test_in_tests_of_applications() -> None:
    """`record()` collects background tasks, `inline(raise_errors=True)` raises their error out of the call."""
    log = Log()
    app = make_app(answer(lambda: BackgroundTasks([BackgroundTask(fail), BackgroundTask(log.note, "after")])))
    async with async_client(app) as client:
        with record() as tasks:
            await client.get("/")
        assert [task.name for task in tasks] == ["fail", "Log.note"]
        with inline(raise_errors=True), pytest.raises(ValueError, match="task"):
            await client.get("/")
    assert log == ["after"]


@pytest.mark.anyio
async def test_defer_in_a_background_task() -> None:
    """G11: `defer` and `current_tasks` in a held task speak of its request, whose list runs after the call."""
    log = Log()

    async def task() -> None:
        current_tasks().add_task(log.note, "deferred")
        log.append("held")

    async with async_client(make_app(answer(partial(BackgroundTask, task)))) as client:
        await client.get("/")
        assert log[0] == "held"
    assert log == ["held", "deferred"]


class Argument:
    """Something that can be waited for to be freed."""


@both
@pytest.mark.anyio
@pytest.mark.parametrize("add_in_thread", [False, True])
async def test_holds_nothing(detached: bool, add_in_thread: bool) -> None:
    """G6: when its tasks have ended a request is freed, with what they were given, by reference counts alone."""
    freed: list[Any] = []
    runner = Runner()

    async def task(argument: Argument) -> None: ...

    def make(request: Request) -> Response:
        argument = Argument()
        freed.extend(weakref.ref(each) for each in (argument, tasks_from(request)))
        background = BackgroundTasks([BackgroundTask(task, argument)])
        background.add_task(task, argument)
        return PlainTextResponse("hello", background=background)

    async def make_async(request: Request) -> Response:
        return make(request)

    app = make_app(make if add_in_thread else make_async, runner, detached=detached)
    async with runner:
        gc.collect()
        gc.disable()
        try:
            await app(http_scope(query_string=b""), no_more_messages, Log().send)
            await runner.wait_idle()
            await anyio.to_thread.run_sync(int)  # the endpoint's thread lets go of it
            await anyio.wait_all_tasks_blocked()
            assert [each() for each in freed] == [None, None]
        finally:
            gc.enable()
    assert runner.statistics().succeeded == 2


class EngineTask:
    """What an engine would be asked to enqueue."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __call__(self, entry: str) -> None:
        self.log.append(entry)

    def __defer_enqueue__(self, *args: Any) -> None:
        raise AssertionError  # pragma: no cover


@both
@pytest.mark.parametrize("wrap", [lambda task: task, partial])
def test_engines_task_is_called_as_before(open_client: OpenClient, detached: bool, wrap: Callable[[Any], Any]) -> None:
    """G10: an engine's task in a `BackgroundTask` is called, as Starlette does, and not enqueued."""
    log = Log()
    app = make_app(answer(lambda: BackgroundTask(wrap(EngineTask(log)), "called")), detached=detached)
    with record() as tasks, open_client(app) as client:
        client.get("/")
    assert [task.name for task in tasks] == ["EngineTask"]
    with open_client(app) as client:
        client.get("/")
    assert log == ["called"]


def test_replaces_nothing_but_background_tasks() -> None:
    """G10: what is replaced keeps its name, module and docstring."""
    DeferredMiddleware(foreign)
    for cls in BackgroundTask, BackgroundTasks:
        assert cls.__call__.__module__ == starlette_background.__name__
        assert cls.__call__.__qualname__ == f"{cls.__name__}.__call__"
    assert sys.modules["starlette.background"].BackgroundTask is BackgroundTask
