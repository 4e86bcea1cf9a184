"""FastAPI: `Deferred` wherever a dependency may stand, and `BackgroundTasks` through the list, unchanged."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from anyio.lowlevel import EventLoopToken, current_token
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi import __version__ as fastapi_version
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.background import BackgroundTask
from starlette.background import BackgroundTasks as StarletteBackgroundTasks

from asgi_deferred import DeferredTasks, MiddlewareMissing, Runner
from asgi_deferred.fastapi import Deferred, DeferredMiddleware
from asgi_deferred.testing import record

from .clients import OpenClient, async_client, open_client
from .support import Log, assert_conserved

__all__ = ["open_client"]

request_id: ContextVar[str] = ContextVar("request_id")


both = pytest.mark.parametrize("detached", [False, True])


def make_app(runner: Runner | None = None, *, detached: bool = False, **options: Any) -> FastAPI:
    app = FastAPI(**options)
    app.add_middleware(DeferredMiddleware, runner=runner, detached=detached)
    return app


def fail() -> None:
    raise ValueError("task")


def _stack_outlives_response() -> bool:
    """Whether this FastAPI tears dependencies down after the response, and so after its background tasks."""
    version = tuple(int(each) for each in fastapi_version.split(".")[:2])
    return version >= (0, 118)


STACK_OUTLIVES_RESPONSE = _stack_outlives_response()


def line_of(function: Callable[..., Any], offset: int) -> str:
    return f"{__file__}:{inspect.getsourcelines(function)[1] + offset}"


# Deferred


def test_deferred_everywhere_in_a_request(open_client: OpenClient) -> None:
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

    app = make_app()

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
    """`Deferred` does not change a word of an application's OpenAPI."""

    def describe(*annotations: Any) -> Any:
        def dependency(q: str = "") -> None: ...

        def create(item: int, body: dict[str, int]) -> None: ...

        functions: list[Any] = [dependency, create]
        more = [inspect.Parameter("tasks", inspect.Parameter.KEYWORD_ONLY, annotation=each) for each in annotations]
        for function in functions:
            signature = inspect.signature(function, eval_str=True)
            function.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])
        app = make_app()
        app.post("/items/{item}", dependencies=[Depends(dependency)])(create)
        return app.openapi()

    plain = describe()
    assert [each["name"] for each in plain["paths"]["/items/{item}"]["post"]["parameters"]] == ["item", "q"]
    assert describe(Deferred) == plain


def test_task_sees_the_commit_of_a_dependency(open_client: OpenClient) -> None:
    """G1: a task of `Deferred` starts after the `yield` dependency has committed, a background task before, as ever."""
    log = Log()

    def session() -> Iterator[list[str]]:
        yield []
        log.append("commit")

    app = make_app()

    @app.post("/")
    def create(deferred: Deferred, background: BackgroundTasks, session: list[str] = Depends(session)) -> None:
        deferred.add_task(log.note_sync, "deferred")
        background.add_task(log.note_sync, "background")

    with open_client(app) as client:
        assert client.post("/").status_code == 200
    if STACK_OUTLIVES_RESPONSE:
        assert log == ["background", "commit", "deferred"]
    else:
        assert log == ["commit", "background", "deferred"]  # pragma: no cover


@pytest.mark.anyio
async def test_middleware_missing() -> None:
    """G11: without the middleware a request says so, instead of dropping what it deferred."""
    app = FastAPI()

    @app.get("/deferred")
    async def deferred(deferred: Deferred) -> None: ...

    async with async_client(app) as client:
        with pytest.raises(MiddlewareMissing, match=r"app\.add_middleware\(DeferredMiddleware\)"):
            await client.get("/deferred")


# BackgroundTasks


def test_injected_everywhere(open_client: OpenClient) -> None:
    """G4: tasks of dependencies on every level, an override and the endpoint run in the order added."""
    log, runner = Log(), Runner()

    async def included(background: BackgroundTasks) -> None:
        background.add_task(log.note, "included router's dependency")

    async def replaced() -> None: ...

    async def override(background: BackgroundTasks) -> None:
        background.add_task(log.note, "override")

    def dependency(tasks: StarletteBackgroundTasks) -> None:
        tasks.add_task(log.note_sync, "dependency")

    app = make_app(runner, dependencies=[Depends(included)])
    app.dependency_overrides[replaced] = override
    router, inner = APIRouter(dependencies=[Depends(replaced)]), APIRouter()

    @inner.get("/", dependencies=[Depends(dependency)])
    def endpoint(background: BackgroundTasks) -> None:
        background.add_task(log.note, "endpoint")
        background.add_task(log.note_sync, entry="endpoint again")

    router.include_router(inner, prefix="/items")
    app.include_router(router, prefix="/api")
    with open_client(app) as client:
        assert client.get("/api/items/").json() is None
        assert log == ["included router's dependency", "override", "dependency", "endpoint", "endpoint again"]
    assert runner.statistics().succeeded == 5
    assert_conserved(runner)


def _plain(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> None:
        background.add_task(log.note, "task")

    return endpoint


def _overwritten(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> Response:
        background.add_task(log.note, "injected")
        return JSONResponse(None, background=BackgroundTask(log.note, "own"))

    return endpoint


def _overwritten_while_empty(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> Response:
        async def add() -> None:
            log.append("own")
            background.add_task(log.note, "injected")

        return JSONResponse(None, background=BackgroundTask(add))

    return endpoint


def _raised(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> Response:
        background.add_task(log.note, "task")
        raise HTTPException(404)

    return endpoint


def _handled(log: Log) -> Callable[..., Any]:
    async def endpoint(background: BackgroundTasks) -> Response:
        background.add_task(log.note, "task")
        raise KeyError

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


@both
@pytest.mark.parametrize(
    ("make_endpoint", "status", "fastapi", "ours"),
    [
        (_plain, 200, ["task"], ["task"]),
        (_overwritten, 200, ["own"], ["injected", "own"]),
        (_overwritten_while_empty, 200, ["own"], ["own", "injected"]),
        (_raised, 404, [], []),
        (_handled, 418, ["handler"], ["handler"]),
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
    detached: bool,
) -> None:
    """G11: what FastAPI runs runs once, and what it drops for another background is kept, side by side with FastAPI."""
    transcripts = []
    for app in FastAPI(), make_app(detached=detached):
        log = Log()

        async def handle(request: Request, exc: Exception, log: Log = log) -> Response:
            return PlainTextResponse("handled", status_code=418, background=BackgroundTask(log.note, "handler"))

        app.add_exception_handler(KeyError, handle)
        app.get("/", response_model=None)(make_endpoint(log))
        with open_client(app, raise_errors=False) as client:
            assert client.get("/").status_code == status
        transcripts.append(log)
    assert transcripts == [fastapi, ours]


@both
@pytest.mark.skipif(not STACK_OUTLIVES_RESPONSE, reason="what FastAPI runs a dependency's teardown before")
def test_added_after_yield(open_client: OpenClient, caplog: pytest.LogCaptureFixture, detached: bool) -> None:
    """G11: a task that a dependency adds after its `yield` never runs, as in FastAPI, and a WARNING names it."""
    log = Log()

    def dependency(background: BackgroundTasks) -> Iterator[None]:
        yield
        background.tasks.append(BackgroundTask(log.note_sync, "after yield"))

    app = make_app(dependencies=[Depends(dependency)], detached=detached)

    @app.get("/")
    async def endpoint(background: BackgroundTasks) -> None:
        background.add_task(log.note, "endpoint")

    with open_client(app) as client:
        client.get("/")
    assert log == ["endpoint"]
    (entry,) = caplog.records
    assert f"'Log.note_sync', added at {line_of(dependency, 2)}, request 'GET /'" in entry.getMessage()


def test_added_after_yield_detached(open_client: OpenClient) -> None:
    """G11: detached, a task that a dependency adds after its `yield` is added to the list as any other."""
    log = Log()

    def dependency(background: BackgroundTasks) -> Iterator[None]:
        yield
        background.add_task(log.note_sync, "after yield")

    app = make_app(dependencies=[Depends(dependency)], detached=True)

    @app.get("/")
    async def endpoint(background: BackgroundTasks) -> None:
        background.add_task(log.note, "endpoint")

    with open_client(app) as client:
        client.get("/")
    assert sorted(log) == ["after yield", "endpoint"]


def test_added_in_a_websocket(open_client: OpenClient, caplog: pytest.LogCaptureFixture) -> None:
    """G11: what is added in a websocket never runs, as in FastAPI, and a WARNING names it."""
    app = make_app()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, background: BackgroundTasks) -> None:
        await websocket.accept()
        background.add_task(fail)
        await websocket.close()

    with open_client(app) as client, client.websocket_connect("/") as websocket:
        assert websocket.receive()["type"] == "websocket.close"
    assert [f"'fail', added at {line_of(endpoint, 3)}" in each.getMessage() for each in caplog.records] == [True]


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


class Tasks(BackgroundTasks):
    """A project's own, with helpers."""

    def __init__(self) -> None:
        super().__init__()

    def add_task(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().add_task(func, *args, **kwargs)


@pytest.mark.anyio
async def test_added_at_names_the_users_line() -> None:
    """G3: a task says the line that added it, also through a subclass's own `add_task`."""

    async def included(background: BackgroundTasks) -> None:
        background.add_task(fail)

    app = make_app()
    router = APIRouter(dependencies=[Depends(included)])

    @router.get("/")
    async def endpoint(background: BackgroundTasks) -> Response:
        background.add_task(fail)
        own = Tasks()
        own.add_task(fail)
        own.tasks.append(BackgroundTask(fail))
        return JSONResponse(None, background=own)

    app.include_router(router)
    with record() as tasks:
        async with async_client(app) as client:
            await client.get("/")
    lines = [line_of(included, 1), *(line_of(endpoint, offset) for offset in (2, 4, 5))]
    assert [task.added_at for task in tasks] == lines
    assert [task.when for task in tasks] == ["always"] * 4


class Timed(APIRoute):
    """A route class of the project's own."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def timed(request: Request) -> Response:
            response = await handle(request)
            response.headers["x-timed"] = "yes"
            return response

        return timed


class Framed(JSONResponse):
    """A response class of the project's own, with a call of its own."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def finish() -> None:
            assert self.background is not None
            await self.background()

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})
        await finish()


@both
def test_custom_routes_and_responses(open_client: OpenClient, detached: bool) -> None:
    """G11: custom route classes and response classes, also as the default, need no edit."""
    log, runner = Log(), Runner()
    app = make_app(runner, detached=detached)
    router = APIRouter(route_class=Timed, default_response_class=Framed)

    @router.get("/")
    def endpoint(background: BackgroundTasks) -> str:
        background.add_task(log.note_sync, "task")
        return "hello"

    app.include_router(router)
    with open_client(app) as client:
        response = client.get("/")
        assert (response.json(), response.headers["x-timed"]) == ("hello", "yes")
    assert log == ["task"]
    assert runner.statistics().succeeded == 1


@both
def test_streaming_endpoint(open_client: OpenClient, detached: bool) -> None:
    """G1: a task added while the body streams runs after the last of it."""
    log = Log()
    app = make_app(detached=detached)

    @app.get("/")
    async def endpoint(background: BackgroundTasks) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            background.add_task(log.note, "task")
            yield "a"
            log.append("streaming")
            yield "b"

        return StreamingResponse(body())

    with open_client(app) as client:
        assert client.get("/").text == "ab"
    assert log == ["streaming", "task"]


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
