"""The applications that the servers run. They write down what happens, one line each, in the file `TRANSCRIPT`.

A request says in its query what it defers, `task=NAME:KIND:WHEN`, and who it is, `id=ID`. Whatever waits, waits for
the file `GATES/ID.NAME`, so that a test decides the order in a process that is not its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

import anyio
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.signals import request_finished
from django.http import HttpRequest, HttpResponse
from django.urls import re_path
from fastapi import Depends, FastAPI, Request
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import HTTPConnection
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner, TaskEvent, tasks_from
from django import setup

Message = MutableMapping[str, Any]

_transcript = os.open(os.environ["TRANSCRIPT"], os.O_WRONLY | os.O_APPEND)
_gates = Path(os.environ["GATES"])
request_id: ContextVar[str] = ContextVar("request_id", default="-")


def note(line: str) -> None:
    os.write(_transcript, f"{request_id.get()} {line}\n".encode())


class Pool:
    """Stands where an application keeps its database connections: open from its startup to its shutdown."""

    is_open: bool | None = None  # nobody opens it on a server without lifespan

    def use(self) -> None:
        if self.is_open is False:
            note("found the pool closed")


def observe(event: TaskEvent) -> None:
    note(f"{event.task.name} {event.state.name}")


pool = Pool()
runner = Runner(
    drain_timeout=float(os.environ["DRAIN_TIMEOUT"]), max_pending=int(os.environ["MAX_PENDING"]), observers=[observe]
)


async def pass_gate(name: str) -> None:
    gate = _gates / f"{request_id.get()}.{name}"
    while not gate.exists():
        await anyio.sleep(0.01)


# What is deferred, by KIND


async def quick(_name: str) -> None:
    await anyio.sleep(0)
    pool.use()


def quick_in_thread(_name: str) -> None:
    pool.use()


async def gated(name: str) -> None:
    await pass_gate(name)
    pool.use()


def gated_in_thread(name: str) -> None:
    gate = _gates / f"{request_id.get()}.{name}"
    while not gate.exists():
        time.sleep(0.01)
    pool.use()


async def never(_name: str) -> None:
    await anyio.sleep_forever()


def never_in_thread(_name: str) -> None:
    threading.Event().wait()


async def fail(_name: str) -> None:
    raise SystemExit("the task's own")


KINDS: dict[str, Callable[[str], Any]] = {
    "quick": quick,
    "thread": quick_in_thread,
    "gated": gated,
    "gated-thread": gated_in_thread,
    "never": never,
    "never-thread": never_in_thread,
    "fail": fail,
}


def add(source: Any) -> DeferredTasks:
    """Add what the request's query says, and return its list."""
    tasks = tasks_from(source)
    scope = source if isinstance(source, dict) else source.scope
    query = parse_qs(scope["query_string"].decode())
    request_id.set(query["id"][0])
    for task in query.get("task", ()):
        name, kind, when = (*task.split(":"), "success")[:3]
        tasks.options(name=name, when=when).add_task(KINDS[kind], name)
    return tasks


# Raw ASGI


async def raw(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    add(scope)
    behaviour = scope["path"].rpartition("/")[2]
    if behaviour == "raise":
        raise ValueError("before the response")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    if behaviour == "stream":
        await _stream_until_disconnect(receive, send)
        return
    if behaviour == "raise-midway":
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError("in the middle of the response")
    note("final")
    try:
        await send({"type": "http.response.body", "body": b"hello"})
    except BaseException as exc:
        note(f"send raised {type(exc).__name__}")
        raise
    if behaviour == "teardown":
        note("teardown")
        await pass_gate("teardown")
    if behaviour == "raise-late":
        raise ValueError("after the response")
    note("returned")


async def _stream_until_disconnect(
    receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        note("disconnected")
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        while True:
            await send({"type": "http.response.body", "body": b"more", "more_body": True})
            await anyio.sleep(0.01)


# Starlette


async def plain(request: Any) -> PlainTextResponse:
    add(request)
    return PlainTextResponse("hello")


async def streaming(request: Any) -> StreamingResponse:
    add(request)

    async def body() -> AsyncIterator[bytes]:
        yield b"hel"
        yield b"lo"
        note("streamed")

    return StreamingResponse(body(), media_type="text/plain")


async def endless(request: Any) -> StreamingResponse:
    add(request)

    async def body() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"more"
                await anyio.sleep(0.01)
        finally:
            note("stream over")

    return StreamingResponse(body(), media_type="text/plain")


async def file(request: Any) -> FileResponse:
    add(request)
    return FileResponse(_gates / "hello.txt", media_type="text/plain")


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    add(websocket)
    await websocket.send_text(await websocket.receive_text())
    await websocket.close()


async def in_between(request: Any, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


_routes = [Route(f"/{route.__name__}", route) for route in (plain, streaming, endless, file)]
starlette = Starlette(routes=[*_routes, WebSocketRoute("/echo", echo)])
starlette_base = Starlette(routes=_routes)
starlette_base.add_middleware(BaseHTTPMiddleware, dispatch=in_between)


# FastAPI

fastapi = FastAPI()


async def transaction(connection: HTTPConnection) -> AsyncIterator[DeferredTasks]:
    tasks = add(connection)
    yield tasks
    note("commit")
    tasks.options(name="after-yield").add_task(quick, "after-yield")


@fastapi.get("/plain")
async def read(tasks: Annotated[DeferredTasks, Depends(transaction)]) -> int:
    return len(tasks)


@fastapi.get("/big")
async def read_big(_: Annotated[DeferredTasks, Depends(transaction)]) -> Response:
    note("sending")
    return Response(b"x" * 50_000_000)  # more than any socket buffers


@fastapi.get("/thread")
def read_in_thread(request: Request) -> int:
    return len(add(request))


# Django


def _committed(**_: Any) -> None:
    note("request_finished")


async def django_async(request: HttpRequest) -> HttpResponse:
    add(request)
    return HttpResponse("hello", content_type="text/plain")


def django_sync(request: HttpRequest) -> HttpResponse:
    add(request)
    return HttpResponse("hello", content_type="text/plain")


urlpatterns = [re_path("async$", django_async), re_path("sync$", django_sync)]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="tests", LOGGING_CONFIG=None)
setup()
request_finished.connect(_committed)
_django = get_asgi_application()


async def django_app(scope: Any, receive: Any, send: Any) -> None:
    """Set the request's id around Django: before 6.0 it sends `request_finished` outside of the view's context."""
    if scope["type"] == "http":
        request_id.set(parse_qs(scope["query_string"].decode())["id"][0])
    await _django(scope, receive, send)


# All of them behind one lifespan


@asynccontextmanager
async def _lifespan() -> AsyncIterator[None]:
    pool.is_open = True
    note("startup")
    yield
    pool.is_open = False
    note(f"shutdown {runner.statistics()!r}")


async def _dispatch(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await receive()
        async with _lifespan():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    prefix, path = scope["path"].removeprefix("/").split("/", 1)
    scope = {**scope, "path": f"/{path}", "raw_path": f"/{path}".encode()}
    await APPS[prefix](scope, receive, send)


APPS: dict[str, Any] = {
    "raw": raw,
    "starlette": starlette,
    "base": starlette_base,
    "fastapi": fastapi,
    "django": django_app,
}


class BrokenMiddleware:
    """One that Starlette cannot make. It tries on the first scope that it gets, which is the lifespan's."""

    def __init__(self, app: Any) -> None:
        raise ValueError("the middleware is broken")


class NotedLifespan:
    """Outside the middleware: notes which messages the server sends and gets."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def noting_receive() -> Any:
            message = await receive()
            note(f"server: {message['type'].removeprefix('lifespan.')} {os.getpid()}")
            return message

        async def noting_send(message: Any) -> None:
            note(f"server: {message['type'].removeprefix('lifespan.')} {os.getpid()}")
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, noting_receive, noting_send)
        else:
            await self.app(scope, receive, send)


app = NotedLifespan(DeferredMiddleware(_dispatch, runner))
django_only = NotedLifespan(DeferredMiddleware(django_app, runner))

mounted = Starlette(routes=[Mount("/sub", DeferredMiddleware(raw, runner))])


@asynccontextmanager
async def _run(_: Starlette) -> AsyncIterator[None]:
    async with runner:
        yield
        note("shutdown")


mounted_entered = Starlette(routes=mounted.routes, lifespan=_run)

broken = Starlette()
broken.add_middleware(BrokenMiddleware)  # type: ignore[arg-type]
broken_wrapped = DeferredMiddleware(broken)
