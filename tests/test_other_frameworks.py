"""Quart and Litestar need no adapter: `tasks_from` and `defer` are enough."""

from __future__ import annotations

from typing import Any

import anyio
import httpx
import litestar
import pytest
import quart
from litestar.exceptions import NotFoundException

from asgi_deferred import DeferredMiddleware, Runner, current_tasks, defer, tasks_from

from .clients import async_client
from .conftest import BACKENDS
from .support import Log, assert_conserved

pytestmark = pytest.mark.anyio


async def note_status(log: Log) -> None:
    outcome = current_tasks().outcome
    assert outcome is not None
    log.append(f"{outcome.type} {outcome.status}")


async def converse(app: Any, path: str) -> list[str]:
    """Connect a websocket, receive one text, and leave."""
    received: list[str] = []
    messages = [{"type": "websocket.connect"}]
    said = anyio.Event()

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await said.wait()
        return {"type": "websocket.disconnect", "code": 1000}

    async def send(message: Any) -> None:
        received.append(message["type"])
        if message["type"] == "websocket.send":
            said.set()

    scope = {
        "type": "websocket",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test")],
        "subprotocols": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
        "extensions": {},
    }
    await app(scope, receive, send)
    return received


on_asyncio = pytest.mark.parametrize(
    "anyio_backend", [BACKENDS["asyncio"], BACKENDS["uvloop"]]
)  # all that Quart runs on


def make_quart(log: Log, runner: Runner) -> Any:
    app = quart.Quart(__name__)
    app.asgi_app = DeferredMiddleware(app.asgi_app, runner)  # type: ignore[method-assign]

    @app.get("/async")
    async def async_endpoint() -> str:
        tasks_from(quart.request).add_task(log.note, "tasks_from")
        defer(note_status, log)
        return "hello"

    @app.get("/sync")
    def sync_endpoint() -> str:
        tasks_from(quart.request).add_task(log.note_sync, "tasks_from")
        defer(note_status, log)
        return "hello"

    @app.get("/error")
    async def error() -> str:
        defer(log.note, "skipped")
        current_tasks().options(when="failure").add_task(note_status, log)
        quart.abort(404)

    @app.websocket("/ws")
    async def websocket() -> None:
        tasks_from(quart.websocket).add_task(log.note, "tasks_from")
        defer(note_status, log)
        await quart.websocket.send("hello")
        await quart.websocket.receive()

    return app


@on_asyncio
async def test_quart_http() -> None:
    """G1, G5: sync and async views defer through the request and through its context; `when` sees the status."""
    log, runner = Log(), Runner()
    async with async_client(make_quart(log, runner)) as client:
        for path in "/async", "/sync", "/error":
            response = await client.get(path)
            await runner.wait_idle()
            log.append(f"{path} {response.status_code}")
    assert log == [
        "tasks_from",
        "http 200",
        "/async 200",
        "tasks_from",
        "http 200",
        "/sync 200",
        "http 404",
        "/error 404",
    ]
    assert_conserved(runner)


@on_asyncio
async def test_quart_without_lifespan() -> None:
    """G9: without a lifespan the call itself runs the tasks."""
    log = Log()
    transport = httpx.ASGITransport(make_quart(log, Runner()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/async")
    assert log == ["tasks_from", "http 200"]


@on_asyncio
async def test_quart_websocket() -> None:
    """G1: tasks of a websocket run after it has ended."""
    log, runner = Log(), Runner()
    app = make_quart(log, runner)
    assert await converse(app, "/ws") == ["websocket.accept", "websocket.send"]
    assert log == ["tasks_from", "websocket None"]
    assert_conserved(runner)


def make_litestar(log: Log, runner: Runner) -> Any:
    @litestar.get("/async")
    async def async_endpoint(request: litestar.Request[Any, Any, Any]) -> str:
        tasks_from(request).add_task(log.note, "tasks_from")
        defer(note_status, log)
        return "hello"

    @litestar.get("/sync", sync_to_thread=True)
    def sync_endpoint(request: litestar.Request[Any, Any, Any]) -> str:
        tasks_from(request).add_task(log.note_sync, "tasks_from")
        defer(note_status, log)
        return "hello"

    @litestar.get("/error")
    async def error() -> str:
        defer(log.note, "skipped")
        current_tasks().options(when="failure").add_task(note_status, log)
        raise NotFoundException

    @litestar.websocket("/ws")
    async def websocket(socket: litestar.WebSocket[Any, Any, Any]) -> None:
        tasks_from(socket).add_task(log.note, "tasks_from")
        defer(note_status, log)
        await socket.accept()
        await socket.send_text("hello")
        await socket.close()

    app = litestar.Litestar([async_endpoint, sync_endpoint, error, websocket], openapi_config=None, logging_config=None)
    return DeferredMiddleware(app, runner)


async def test_litestar_http() -> None:
    """G1, G5: Litestar's sync and async handlers defer through the request and its context; `when` sees the status."""
    log, runner = Log(), Runner()
    async with async_client(make_litestar(log, runner)) as client:
        for path in "/async", "/sync", "/error":
            response = await client.get(path)
            await runner.wait_idle()
            log.append(f"{path} {response.status_code}")
    assert log == [
        "tasks_from",
        "http 200",
        "/async 200",
        "tasks_from",
        "http 200",
        "/sync 200",
        "http 404",
        "/error 404",
    ]
    assert_conserved(runner)


async def test_litestar_websocket() -> None:
    """G1: tasks of a Litestar websocket run after it has ended."""
    log, runner = Log(), Runner()
    assert await converse(make_litestar(log, runner), "/ws") == [
        "websocket.accept",
        "websocket.send",
        "websocket.close",
    ]
    assert log == ["tasks_from", "websocket None"]
    assert_conserved(runner)
