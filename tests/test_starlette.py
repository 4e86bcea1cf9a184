"""Starlette: a response's own `background=` through the list, unchanged."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from functools import partial, wraps
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.endpoints import HTTPEndpoint
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
from starlette.routing import Mount, Route

from asgi_deferred import DeferredMiddleware, MiddlewareMissing, Runner, tasks_from
from asgi_deferred.starlette import DeferredRoute
from asgi_deferred.testing import record

from .clients import OpenClient, async_client, open_client
from .support import Log, assert_conserved, http_scope

__all__ = ["open_client"]

request_id: ContextVar[str] = ContextVar("request_id")


def make_app(endpoint: Any, runner: Runner | None = None, **options: Any) -> Starlette:
    app = Starlette(routes=[DeferredRoute("/", endpoint, **options)])
    app.add_middleware(DeferredMiddleware, runner=runner)
    return app


def fail() -> None:
    raise ValueError("task")


def line_of(function: Callable[..., Any]) -> str:
    return f"{__file__}:{inspect.getsourcelines(function)[1]}"


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
    with open_client(DeferredMiddleware(outer)) as client:
        assert client.get("/").text == "hello"
    assert log == ["application returned", "task"]


def test_moves_background_in_order(open_client: OpenClient) -> None:
    """G4: single, listed and nested background tasks, sync and async, run once each, in order, after those of the list."""
    log = Log()

    class Retried(BackgroundTask):
        async def __call__(self) -> None:
            log.append("its own __call__")
            await super().__call__()

    async def endpoint(request: Request) -> Response:
        tasks_from(request).add_task(log.note, "of the list")
        nested = BackgroundTasks([BackgroundTask(log.note, "nested")])
        background = BackgroundTasks([BackgroundTask(log.note, "async"), nested, Retried(log.note_sync, "subclass")])
        background.add_task(log.note_sync, entry="sync")
        return JSONResponse("hello", background=background)

    runner = Runner()
    with open_client(make_app(endpoint, runner)) as client:
        assert client.get("/").json() == "hello"
    assert log == ["of the list", "async", "nested", "its own __call__", "subclass", "sync"]
    assert runner.statistics().succeeded == 5
    assert_conserved(runner)


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
async def test_runs_whenever_the_response_was_completed(make_response: Callable[..., Response]) -> None:
    """G1: as in Starlette the background of any kind of response runs, whatever its status, after it was sent."""
    log = Log()

    async def endpoint(request: Request) -> Response:
        return make_response("hello", background=BackgroundTask(log.note, "task"))

    app = make_app(endpoint)

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        async def note_and_send(message: Any) -> None:
            await send(message)
            if message["type"].endswith("body") and not message.get("more_body"):
                log.append("final message")

        await app(scope, receive, note_and_send)

    async with async_client(outer) as client:
        await client.get("/")
    assert log == ["final message", "task"]


@pytest.mark.anyio
async def test_incomplete_response_skips_its_background() -> None:
    """G2, G11: a response that breaks off skips its background, as in Starlette, but says so with an event."""
    log = Log()
    runner = Runner(observers=[log])

    async def body() -> AsyncIterator[str]:
        yield "a"
        raise RuntimeError("mid-body")

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(body(), background=BackgroundTask(log.note, "task"))

    async with async_client(make_app(endpoint, runner)) as client:
        with pytest.raises((RuntimeError, ExceptionGroup)):  # a group before Starlette 1.0
            await client.get("/")
    assert log == ["Log.note SKIPPED"]
    assert_conserved(runner)


def test_one_failure_leaves_the_rest(open_client: OpenClient, caplog: pytest.LogCaptureFixture) -> None:
    """G3: a failing background task is logged with its endpoint, and those after it run, where Starlette stops."""
    transcripts = []
    for route in Route, DeferredRoute:
        log = Log()

        async def endpoint(request: Request, log: Log = log) -> Response:
            background = BackgroundTasks([BackgroundTask(fail), BackgroundTask(log.note, "after")])
            return PlainTextResponse("hello", background=background)

        app = Starlette(routes=[route("/", endpoint)])
        app.add_middleware(DeferredMiddleware)
        caplog.clear()
        with caplog.at_level(logging.ERROR, "asgi_deferred"), open_client(app, raise_errors=False) as client:
            assert client.get("/").text == "hello"
        transcripts.append((log, [line_of(endpoint) in entry.getMessage() for entry in caplog.records]))
    assert transcripts == [([], []), (["after"], [True])]


def test_context_of_sync_and_async_endpoints(open_client: OpenClient) -> None:
    """G5: a background task sees the context variables that its endpoint set, also in a worker thread."""
    log = Log()

    async def task() -> None:
        log.append(request_id.get("lost"))

    def sync_endpoint(request: Request) -> Response:
        request_id.set("sync")
        return PlainTextResponse("hello", background=BackgroundTask(task))

    async def async_endpoint(request: Request) -> Response:
        request_id.set("async")
        return PlainTextResponse("hello", background=BackgroundTask(task))

    for endpoint in sync_endpoint, async_endpoint:
        with open_client(make_app(endpoint)) as client:
            client.get("/")
    assert log == ["sync", "async"]


class Endpoints(HTTPEndpoint):
    async def get(self, request: Request) -> Response:
        return PlainTextResponse("get", background=BackgroundTask(fail))

    def post(self, request: Request) -> Response:
        return PlainTextResponse("post", background=BackgroundTask(fail))


class Controller:
    async def method(self, request: Request) -> Response:
        return PlainTextResponse("get", background=BackgroundTask(fail))


async def with_argument(answer: str, request: Request) -> Response:
    return PlainTextResponse(answer, background=BackgroundTask(fail))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("endpoint", "method", "definition"),
    [
        (Endpoints, "GET", Endpoints.get),
        (Endpoints, "POST", Endpoints.post),
        (Controller().method, "GET", Controller.method),
        (partial(with_argument, "get"), "GET", with_argument),
    ],
)
async def test_kinds_of_endpoints(endpoint: Any, method: str, definition: Callable[..., Any]) -> None:
    """G3: classes, methods and partials are endpoints too, and each task names the one it came from."""
    with record() as tasks:
        async with async_client(make_app(endpoint)) as client:
            response = await client.request(method, "/")
    assert response.text == method.lower()
    assert [(task.func, task.when, task.added_at) for task in tasks] == [(fail, "complete", line_of(definition))]


@pytest.mark.anyio
async def test_asgi_endpoint_passes_through() -> None:
    """G10: an endpoint that is an ASGI application runs its own background, and answers with what is no response."""
    log = Log()

    class Application:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await PlainTextResponse("hello", background=BackgroundTask(log.note, "its own"))(scope, receive, send)

    async def returns_an_application(request: Request) -> Any:
        return Application()

    for endpoint in Application(), returns_an_application:
        with record() as tasks:
            async with async_client(make_app(endpoint)) as client:
                assert (await client.get("/")).text == "hello"
        assert tasks == []
    assert log == ["its own", "its own"]


@pytest.mark.anyio
async def test_endpoint_without_a_line() -> None:
    """G11: a task of an endpoint whose line is not known is kept as any other, and names the adapter."""
    log = Log()

    class Callable:
        def __call__(self, request: Request) -> Response:
            return PlainTextResponse("hello", background=BackgroundTask(log.note, "task"))

    @wraps(wrapped := Callable())
    def endpoint(request: Request) -> Response:
        return wrapped(request)

    with record() as tasks:
        async with async_client(make_app(endpoint)) as client:
            assert (await client.get("/")).text == "hello"
    assert [Path(task.added_at.rpartition(":")[0]).name for task in tasks] == ["starlette.py"]


def test_is_a_route() -> None:
    """`DeferredRoute` is as its base to all that looks at routes: names, paths, methods, endpoints, equality."""
    for endpoint in with_argument, Endpoints, Controller().method, partial(with_argument, "x"):
        ours, theirs = DeferredRoute("/{id}", endpoint), Route("/{id}", endpoint)
        assert (ours.name, ours.path, ours.methods, ours.endpoint) == (
            theirs.name,
            theirs.path,
            theirs.methods,
            theirs.endpoint,
        )
        assert ours == theirs
    named = DeferredRoute("/{id}", with_argument, name="item", methods=["POST"], include_in_schema=False)
    assert named.url_path_for("item", id="1") == "/1"
    assert (named.methods, named.include_in_schema) == ({"POST"}, False)


@pytest.mark.anyio
async def test_middleware_of_the_route_and_mount() -> None:
    """A route's own middleware and a Mount around it change nothing."""
    log = Log()

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("hello" * 200, background=BackgroundTask(log.note, "task"))

    route = DeferredRoute("/page", endpoint, middleware=[Middleware(GZipMiddleware)])
    app = DeferredMiddleware(Starlette(routes=[Mount("/site", routes=[route])]))
    async with async_client(app) as client:
        response = await client.get("/site/page")
    assert response.headers["content-encoding"] == "gzip"
    assert log == ["task"]


@pytest.mark.anyio
async def test_shared_response_runs_its_background_each_time() -> None:
    """G11: a response object that is sent many times loses no background task."""
    log = Log()
    shared = PlainTextResponse("hello", background=BackgroundTask(log.note, "task"))

    def endpoint(request: Request) -> Response:
        return shared

    async with async_client(make_app(endpoint)) as client:
        await client.get("/")
        await client.get("/")
    assert log == ["task", "task"]


@pytest.mark.anyio
async def test_middleware_missing() -> None:
    """G11: without the middleware each request says so, instead of dropping its background."""
    app = Starlette(routes=[DeferredRoute("/", partial(with_argument, "x"))])
    async with async_client(app) as client:
        with pytest.raises(MiddlewareMissing, match=r"app\.add_middleware\(DeferredMiddleware\)"):
            await client.get("/")


@pytest.mark.anyio
@pytest.mark.filterwarnings(  # trio notes that older Starlettes leave a generator of theirs open
    "ignore:[^<]*<async_generator object Request.stream:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("outside", [False, True])
async def test_base_http_middleware_neither_blocks_nor_cancels(outside: bool) -> None:
    """G6: with a BaseHTTPMiddleware on either side, and a client that leaves, the response does not wait and all ends."""
    log, go = Log(), anyio.Event()

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    async def task() -> None:
        await go.wait()
        log.append("done")

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(iter(["hello"]), background=BackgroundTask(task))

    middlewares: list[Middleware] = [
        Middleware(DeferredMiddleware),
        Middleware(BaseHTTPMiddleware, dispatch=dispatch),
    ]
    app = Starlette(routes=[DeferredRoute("/", endpoint)], middleware=middlewares if outside else middlewares[::-1])
    messages = [{"type": "http.request", "body": b""}]
    sent = anyio.Event()

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await sent.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            sent.set()

    async with async_client(app):
        await app(http_scope(query_string=b""), receive, send)
        log.append("returned")
        await anyio.wait_all_tasks_blocked()
        go.set()
    assert log == ["returned", "done"]


@pytest.mark.anyio
async def test_sync_background_leaves_the_endpoints_threads_alone() -> None:
    """G7: a sync endpoint answers while its background tasks hold as many threads as endpoints have."""
    log, held = Log(), threading.Event()

    def hold() -> None:
        held.wait()
        log.append("task")

    def endpoint(request: Request) -> Response:
        return PlainTextResponse("hello", background=BackgroundTask(hold))

    limiter = anyio.to_thread.current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, 1
    try:
        async with async_client(make_app(endpoint)) as client:
            for _ in range(2):
                log.append((await client.get("/")).text)
            held.set()
    finally:
        limiter.total_tokens = before
    assert log == ["hello", "hello", "task", "task"]
