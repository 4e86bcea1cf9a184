"""FastAPI: `Deferred` wherever a dependency may stand, and `BackgroundTasks` through the list, unchanged."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from anyio.lowlevel import EventLoopToken, current_token
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.background import BackgroundTask
from starlette.background import BackgroundTasks as StarletteBackgroundTasks
from starlette.middleware.base import BaseHTTPMiddleware

from asgi_deferred import DeferredMiddleware, DeferredTasks, MiddlewareMissing, Runner, defer
from asgi_deferred.fastapi import Deferred, DeferredRoute
from asgi_deferred.testing import record

from .clients import OpenClient, async_client, open_client
from .support import Log, assert_conserved, states

__all__ = ["open_client"]

request_id: ContextVar[str] = ContextVar("request_id")


def make_app(runner: Runner | None = None, route_class: type[APIRoute] = DeferredRoute, **options: Any) -> FastAPI:
    app = FastAPI(**options)
    app.add_middleware(DeferredMiddleware, runner=runner)
    app.router.route_class = route_class
    return app


def fail() -> None:
    raise ValueError("task")


def line_of(function: Callable[..., Any], offset: int) -> str:
    return f"{__file__}:{inspect.getsourcelines(function)[1] + offset}"


# Deferred


@pytest.mark.parametrize("route_class", [APIRoute, DeferredRoute])
def test_deferred_everywhere_in_a_request(open_client: OpenClient, route_class: type[APIRoute]) -> None:
    """G4: endpoints, nested dependencies and `yield` dependencies on both sides share one list, sync and async."""
    log = Log()
    lists: list[DeferredTasks] = []

    async def inner(deferred: Deferred) -> AsyncIterator[str]:
        lists.append(deferred)
        deferred.add_task(log.note, "inner")
        yield "inner"
        deferred.add_task(log.note, "inner, after yield")

    def outer(deferred: Deferred, inner: str = Depends(inner)) -> Iterator[str]:
        lists.append(deferred)
        deferred.add_task(log.note_sync, "outer")
        yield inner
        deferred.add_task(log.note_sync, "outer, after yield")

    app = make_app(route_class=route_class)

    @app.get("/async")
    async def async_endpoint(deferred: Deferred, outer: str = Depends(outer)) -> str:
        lists.append(deferred)
        deferred.add_task(log.note, "endpoint")
        return outer

    @app.get("/sync")
    def sync_endpoint(deferred: Deferred, outer: str = Depends(outer)) -> str:
        lists.append(deferred)
        deferred.add_task(log.note_sync, "endpoint")
        return outer

    expected = ["inner", "outer", "endpoint", "outer, after yield", "inner, after yield"]
    for path in "/async", "/sync":
        log.clear()
        lists.clear()
        with open_client(app) as client:
            assert client.get(path).json() == "inner"
        assert log == expected
        assert len(lists) == 3
        assert len(set(lists)) == 1


def test_deferred_in_a_websocket(open_client: OpenClient) -> None:
    """G1: in a websocket endpoint and its dependencies `Deferred` runs tasks after the connection has ended."""
    log = Log()
    app = make_app()

    async def dependency(deferred: Deferred) -> AsyncIterator[None]:
        deferred.add_task(log.note_sync, "dependency")
        yield
        log.append("teardown")
        deferred.add_task(log.note, "after yield")

    @app.websocket("/", dependencies=[Depends(dependency)])
    async def endpoint(websocket: WebSocket, deferred: Deferred) -> None:
        await websocket.accept()
        deferred.add_task(log.note, "endpoint")
        await websocket.send_text("hello")
        await websocket.close()
        log.append("closed")

    with open_client(app) as client, client.websocket_connect("/") as websocket:
        assert websocket.receive_text() == "hello"
        assert websocket.receive()["type"] == "websocket.close"
    assert log == ["closed", "teardown", "dependency", "endpoint", "after yield"]


def test_invisible_in_openapi() -> None:
    """Neither `Deferred` nor `DeferredRoute` changes a word of an application's OpenAPI."""

    def describe(route_class: type[APIRoute], *annotations: Any) -> Any:
        def dependency(q: str = "") -> None: ...

        def create(item: int, body: dict[str, int]) -> None: ...

        functions: list[Any] = [dependency, create]
        more = [inspect.Parameter("tasks", inspect.Parameter.KEYWORD_ONLY, annotation=each) for each in annotations]
        for function in functions:
            signature = inspect.signature(function, eval_str=True)
            function.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])
        app = make_app(route_class=route_class)
        app.post("/items/{item}", dependencies=[Depends(dependency)])(create)
        return app.openapi()

    plain = describe(APIRoute)
    assert [each["name"] for each in plain["paths"]["/items/{item}"]["post"]["parameters"]] == ["item", "q"]
    assert describe(APIRoute, Deferred) == plain
    assert describe(DeferredRoute) == plain
    assert describe(DeferredRoute, Deferred) == plain
    assert describe(DeferredRoute, BackgroundTasks) == plain


def test_task_sees_the_commit_of_a_dependency(open_client: OpenClient) -> None:
    """G1: a task starts after the `yield` dependency has committed and closed its session."""
    log = Log()
    committed: list[str] = []

    def session() -> Iterator[list[str]]:
        pending: list[str] = []
        yield pending
        committed.extend(pending)
        log.append("commit")

    def task() -> None:
        log.append(f"task sees {committed}")

    app = make_app()

    @app.post("/")
    def create(deferred: Deferred, background: BackgroundTasks, session: list[str] = Depends(session)) -> None:
        session.append("user")
        deferred.add_task(task)
        background.add_task(task)

    with open_client(app) as client:
        assert client.post("/").status_code == 200
    assert log == ["commit", "task sees ['user']", "task sees ['user']"]


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/deferred", "/background", "/neither"])
async def test_middleware_missing(path: str) -> None:
    """G11: without the middleware each request says so, instead of dropping what it deferred."""
    app = FastAPI()

    @app.get("/deferred")
    async def deferred(deferred: Deferred) -> None: ...

    app.router.route_class = DeferredRoute

    @app.get("/background")
    async def background(background: BackgroundTasks) -> None: ...

    @app.get("/neither")
    async def neither() -> None: ...

    async with async_client(app) as client:
        with pytest.raises(MiddlewareMissing, match=r"app\.add_middleware\(DeferredMiddleware\)"):
            await client.get(path)


# DeferredRoute


def test_background_tasks_run_through_the_list(open_client: OpenClient) -> None:
    """G4: `BackgroundTasks` and `Deferred` in one request, its dependencies and its response run in the order added."""
    log, runner = Log(), Runner()

    async def included(background: BackgroundTasks) -> None:
        background.add_task(log.note, "included router's dependency")

    async def replaced() -> None: ...

    async def override(background: BackgroundTasks) -> None:
        background.add_task(log.note, "override")

    def dependency(tasks: StarletteBackgroundTasks, deferred: Deferred) -> None:
        tasks.add_task(log.note_sync, "dependency")
        deferred.add_task(log.note, "dependency, deferred")

    app = make_app(runner)
    app.dependency_overrides[replaced] = override
    router = APIRouter(route_class=DeferredRoute)

    @router.get("/", dependencies=[Depends(replaced), Depends(dependency)])
    def endpoint(background: BackgroundTasks, deferred: Deferred) -> Response:
        background.add_task(log.note, "endpoint")
        deferred.add_task(log.note_sync, "endpoint, deferred")
        background.add_task(log.note_sync, entry="endpoint again")
        own = StarletteBackgroundTasks([BackgroundTask(log.note, "own"), BackgroundTask(log.note_sync, "own, sync")])
        return JSONResponse("hello", background=own)

    app.include_router(router, prefix="/items", dependencies=[Depends(included)])
    with open_client(app) as client:
        assert client.get("/items/").json() == "hello"
    assert log == [
        "included router's dependency",
        "override",
        "dependency",
        "dependency, deferred",
        "endpoint",
        "endpoint, deferred",
        "endpoint again",
        "own",
        "own, sync",
    ]
    assert runner.statistics().succeeded == 9
    assert_conserved(runner)


def _overwritten(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> Response:
        background.add_task(log.note, "injected")
        return JSONResponse(None, background=BackgroundTask(log.note, "own"))

    return endpoint


def _raised(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> Response:
        background.add_task(log.note, "task")
        raise HTTPException(404)

    return endpoint


def _one_fails(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> None:
        background.add_task(fail)
        background.add_task(log.note, "after a failure")

    return endpoint


def _context(log: Log) -> Callable[..., Any]:
    def task() -> None:
        log.append(request_id.get("lost"))

    def endpoint(background: BackgroundTasks) -> None:
        request_id.set("kept")
        background.add_task(task)

    return endpoint


def _passed_on(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> Response:
        background.add_task(log.note, "once")
        return JSONResponse(None, background=background)

    return endpoint


def _appended(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> None:
        background.tasks.append(BackgroundTask(log.note, "once"))

    return endpoint


def _returned_error(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> Response:
        background.add_task(log.note, "task")
        return PlainTextResponse("no", status_code=500)

    return endpoint


@pytest.mark.parametrize(
    ("make_endpoint", "status", "fastapi", "ours"),
    [
        (_overwritten, 200, ["own"], ["injected", "own"]),
        (_raised, 404, [], ["task"]),
        (_one_fails, 200, [], ["after a failure"]),
        (_context, 200, ["lost"], ["kept"]),
        (_passed_on, 200, ["once"], ["once"]),
        (_appended, 200, ["once"], ["once"]),
        (_returned_error, 500, ["task"], ["task"]),
    ],
)
def test_differences_from_fastapi(
    open_client: OpenClient,
    make_endpoint: Callable[[Log], Callable[..., Any]],
    status: int,
    fastapi: list[str],
    ours: list[str],
) -> None:
    """G11: what FastAPI drops is kept, and what it runs runs once, side by side with its own route."""
    transcripts = []
    for route_class in APIRoute, DeferredRoute:
        log = Log()
        app = make_app(route_class=route_class)
        app.get("/", response_model=None)(make_endpoint(log))
        with open_client(app, raise_errors=False) as client:
            assert client.get("/").status_code == status
        transcripts.append(log)
    assert transcripts == [fastapi, ours]


def test_background_task_added_after_yield_runs(open_client: OpenClient) -> None:
    """G11: tasks that a dependency adds after its `yield` run, also where it handles the endpoint's error."""
    log = Log()

    def dependency(background: BackgroundTasks) -> Iterator[None]:
        try:
            yield
        except HTTPException as exc:
            background.add_task(log.note, f"after {exc.status_code}")
            raise
        background.add_task(log.note_sync, "after yield")

    app = make_app(dependencies=[Depends(dependency)])

    @app.get("/ok")
    async def ok(background: BackgroundTasks) -> None:
        background.add_task(log.note, "endpoint")

    @app.get("/missing")
    async def missing(background: BackgroundTasks) -> None:
        background.add_task(log.note, "endpoint")
        raise HTTPException(404)

    with open_client(app) as client:
        assert [client.get(path).status_code for path in ("/ok", "/missing")] == [200, 404]
    assert sorted(log) == ["after 404", "after yield", "endpoint", "endpoint"]


@pytest.mark.parametrize("outside", [False, True])
def test_unhandled_error(open_client: OpenClient, outside: bool) -> None:
    """G2: after an unhandled error tasks run if the middleware, outside of Starlette's own, saw the 500 go out."""
    log = Log()
    runner = Runner(observers=[log])
    app = FastAPI()
    app.router.route_class = DeferredRoute

    @app.get("/")
    async def endpoint(background: BackgroundTasks, deferred: Deferred) -> None:
        background.add_task(log.note, "background")
        deferred.options(when="failure").add_task(log.note, "failure")
        raise RuntimeError

    if not outside:
        app.add_middleware(DeferredMiddleware, runner=runner)
    with open_client(DeferredMiddleware(app, runner) if outside else app, raise_errors=False) as client:
        assert client.get("/").status_code == 500
    ran = ["Log.note RUNNING", "background", "Log.note SUCCEEDED"] if outside else ["Log.note SKIPPED"]
    assert log == [*ran, "Log.note RUNNING", "failure", "Log.note SUCCEEDED"]
    assert_conserved(runner)


def test_failure_is_logged_and_hides_nothing(open_client: OpenClient, caplog: pytest.LogCaptureFixture) -> None:
    """G3: a task's own error is logged with the line that added it, and becomes no "response already started"."""

    async def not_found() -> None:
        raise HTTPException(404)

    app = make_app()

    @app.get("/")
    async def endpoint(background: BackgroundTasks) -> str:
        background.add_task(not_found)
        return "hello"

    with caplog.at_level(logging.ERROR, "asgi_deferred"), open_client(app) as client:
        assert client.get("/").json() == "hello"
    (entry,) = caplog.records
    assert line_of(endpoint, 2) in entry.getMessage()
    assert "request 'GET /'" in entry.getMessage()
    assert entry.exc_info is not None
    assert isinstance(entry.exc_info[1], HTTPException)


@pytest.mark.anyio
async def test_added_at_names_the_users_line() -> None:
    """G3: a task says the line that added it, or, where that is not known, the endpoint it came from."""

    async def included(background: BackgroundTasks) -> None:
        background.add_task(fail)

    app = make_app()
    router = APIRouter(route_class=DeferredRoute, dependencies=[Depends(included)])

    @router.get("/")
    async def endpoint(background: BackgroundTasks) -> Response:
        background.add_task(fail)
        return JSONResponse(None, background=BackgroundTask(fail))

    app.include_router(router)
    with record() as tasks:
        async with async_client(app) as client:
            await client.get("/")
    assert [task.added_at for task in tasks] == [line_of(included, 1), line_of(endpoint, 2), line_of(endpoint, 0)]
    assert [task.when for task in tasks] == ["complete"] * 3


@pytest.mark.anyio
async def test_included_dependency_is_adopted() -> None:
    """G11: tasks of an including router's dependency, added before ours could run, are kept and name the endpoint."""

    def included(background: BackgroundTasks) -> None:
        background.add_task(fail)

    app = make_app()
    router = APIRouter(route_class=DeferredRoute)

    @router.get("/")
    def endpoint() -> None: ...

    app.include_router(router, dependencies=[Depends(included)])
    with record() as tasks:
        async with async_client(app) as client:
            await client.get("/")
    assert [task.func for task in tasks] == [fail]
    assert tasks[0].added_at in (line_of(endpoint, 0), line_of(included, 1))


@pytest.mark.anyio
async def test_streaming_endpoint() -> None:
    """G1: a task added while the body streams runs after the last of it."""
    log = Log()
    app = make_app(runner := Runner(observers=[log]))

    @app.get("/")
    async def endpoint(background: BackgroundTasks) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            background.add_task(log.note, "task")
            yield "a"
            log.append("streaming")
            yield "b"

        return StreamingResponse(body())

    async with async_client(app) as client:
        assert (await client.get("/")).text == "ab"
    assert log == ["streaming", "Log.note RUNNING", "task", "Log.note SUCCEEDED"]
    assert_conserved(runner)


@pytest.mark.anyio
async def test_shared_response_keeps_nothing() -> None:
    """G6: a response object that is sent many times collects no request's tasks, and runs its own each time."""
    log = Log()
    plain = JSONResponse(None)
    own = JSONResponse(None, background=BackgroundTask(log.note, "own"))
    app = make_app()

    @app.get("/plain")
    async def shared_plain(background: BackgroundTasks) -> Response:
        background.add_task(log.note, "injected")
        return plain

    @app.get("/own")
    async def shared_own() -> Response:
        return own

    async with async_client(app) as client:
        for path in ("/plain", "/plain", "/own", "/own"):
            await client.get(path)
    assert sorted(log) == ["injected", "injected", "own", "own"]
    assert plain.background is None


@pytest.mark.anyio
async def test_sync_tasks_leave_the_endpoints_threads_alone() -> None:
    """G7: a sync endpoint answers while sync tasks hold as many threads as endpoints have."""
    log, held = Log(), threading.Event()
    app = make_app()

    def hold() -> None:
        held.wait()
        log.append("task")

    @app.get("/")
    def endpoint(background: BackgroundTasks) -> str:
        background.add_task(hold)
        return "hello"

    limiter = anyio.to_thread.current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, 1
    try:
        async with async_client(app) as client:
            for _ in range(2):
                log.append((await client.get("/")).json())
            held.set()
    finally:
        limiter.total_tokens = before
    assert log == ["hello", "hello", "task", "task"]


@pytest.mark.anyio
@pytest.mark.parametrize("outside", [False, True])
async def test_base_http_middleware_neither_blocks_nor_cancels(outside: bool) -> None:
    """G6: with a BaseHTTPMiddleware on either side the client has its response before the tasks, and they all end."""
    log, go = Log(), anyio.Event()

    async def dispatch(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        log.append("dispatched")
        return response

    async def task() -> None:
        await go.wait()
        log.append("task")

    app = FastAPI()
    app.router.route_class = DeferredRoute
    middlewares: list[tuple[Any, dict[str, Any]]] = [
        (BaseHTTPMiddleware, {"dispatch": dispatch}),
        (DeferredMiddleware, {}),
    ]
    for middleware, options in reversed(middlewares) if outside else middlewares:
        app.add_middleware(middleware, **options)

    @app.get("/")
    async def endpoint(background: BackgroundTasks) -> str:
        background.add_task(task)
        return "hello"

    async with async_client(app) as client:
        for _ in range(2):
            log.append((await client.get("/")).json())
        go.set()
    assert log == ["dispatched", "hello", "dispatched", "hello", "task", "task"]


@pytest.mark.anyio
async def test_thread_calls_back_into_the_event_loop() -> None:
    """A sync task calls `anyio.from_thread.run` with a token from the endpoint, as its thread is the runner's own."""
    log = Log()
    app = make_app()

    def task(token: EventLoopToken) -> None:
        with pytest.raises(anyio.NoEventLoopError):
            anyio.from_thread.run(log.note, "without a token")
        anyio.from_thread.run(log.note, "from the thread", token=token)
        log.append(f"main thread: {threading.current_thread() is threading.main_thread()}")

    @app.get("/")
    async def endpoint(background: BackgroundTasks) -> None:
        background.add_task(task, current_token())

    async with async_client(app) as client:
        await client.get("/")
    assert log == ["from the thread", "main thread: False"]


@pytest.mark.anyio
async def test_route_is_a_fastapi_route() -> None:
    """`DeferredRoute` is as its base to all that looks at routes: paths, names, endpoints and dependencies."""
    app = make_app()

    @app.get("/items/{item}", name="item", dependencies=[Depends(lambda: defer(fail))])
    async def endpoint(item: int) -> int:
        return item

    assert app.url_path_for("item", item="1") == "/items/1"
    route = next(route for route in app.routes if isinstance(route, DeferredRoute))
    assert route.endpoint is endpoint
    with record() as tasks:
        async with async_client(app) as client:
            assert (await client.get("/items/2")).json() == 2
            assert (await client.get("/items/x")).status_code == 422
    assert states(tasks) == ["fail PENDING"] * 2
