"""The examples, each run as a user would, over a real socket where there is a server for it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import hypercorn.asyncio
import hypercorn.config
import pytest
import structlog
import uvicorn
import websockets

from examples import (
    audit,
    fastapi_app,
    fastapi_migrated,
    litestar_app,
    quart_app,
    raw_asgi,
    request_id,
    retries,
    starlette_app,
    websocket,
)

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[1]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """Run the app under uvicorn, and on leaving shut it down, which waits for its tasks."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning"))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await running


async def post(host: str, path: str, **kwargs: Any) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.post(f"http://{host}{path}", **kwargs)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "examples")
    return caplog


def told(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name.startswith("examples.")]


def test_signup() -> None:
    """G1, G4, G8: the signup is answered first, then its tasks run in order, all of them although the server stops."""
    own = ["ignore::DeprecationWarning", "error::DeprecationWarning:__main__"]  # what dependencies say is theirs
    command = [sys.executable, "-W", "error", *(f"-W{each}" for each in own), "-m", "examples.signup"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    lines = [re.sub(r"^ *[\d.]+ ms|:\d+|[0-9a-f]+\.\.\.", "", line).strip() for line in run.stdout.splitlines()]
    assert sorted(lines[:4]) == [  # the task may start before the client has read its answer
        "client  202 Accepted",
        "client  POST http://127.0.0.1/signup",
        "server  is told to stop, while the tasks run",
        "task    send_welcome running",
    ]
    assert lines[4:] == [
        "smtp      got a mail for ada@example.org",
        "task    send_welcome succeeded",
        "task    checksum running",
        "task      cat.png: sha256",
        "task    checksum succeeded",
        "task    log running",
        "log     new user: ada@example.org",
        "task    log succeeded",
        "app     shuts down: its pools are open until here, after the last task",
        "runner  3 tasks accepted, 3 succeeded",
    ]


async def test_raw_asgi(log: pytest.LogCaptureFixture) -> None:
    """G1, G4, G8: a raw ASGI app without a lifespan answers, and its async and sync tasks run in order."""
    async with serving(raw_asgi.app) as host:
        assert (await post(host, "/here")).text == "hello\n"
    assert told(log) == ["cache is warm for /here", "one more visit of /here"]


@pytest.mark.parametrize("path", ["/new/7", "/old/7"])
async def test_starlette(log: pytest.LogCaptureFixture, path: str) -> None:
    """G8: Starlette's request has the list, and a response's own background runs through it as well."""
    async with serving(starlette_app.app) as host:
        assert (await post(host, path)).json() == {"order": "7"}
    assert told(log) == ["order 7 is on its way"]


async def test_fastapi(here: Path) -> None:
    """G4: in FastAPI a dependency and its endpoint add to the same list."""
    async with serving(fastapi_app.app) as host:
        assert (await post(host, "/send-notification/ada@example.org?q=tea")).json() == {"message": "Message sent"}
    assert Path("log.txt").read_text().splitlines() == ["found query: tea", "message to ada@example.org"]


async def test_fastapi_migrated(log: pytest.LogCaptureFixture) -> None:
    """G11: FastAPI's own BackgroundTasks run through the list, none of them dropped."""
    async with serving(fastapi_migrated.app) as host:
        assert (await post(host, "/notify/ada")).json() == {"message": "sent"}
        assert (await post(host, "/both/ada")).text == "sent"
    assert told(log) == ["notification for ada", "injected", "the response's own"]


async def test_websocket(here: Path) -> None:
    """G1: a websocket's task runs when the connection is over, and sees all that was said."""
    async with serving(websocket.app) as host:
        async with websockets.connect(f"ws://{host}/rooms/tea", proxy=None) as client:
            await client.send("hello")
            assert await client.recv() == "1 lines"
            assert not Path("transcripts").exists()
            await client.send("bye")
            assert await client.recv() == "2 lines"
    assert json.loads(Path("transcripts/tea.json").read_text()) == ["hello", "bye"]


async def test_audit(here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """G2: `when` picks from the outcome, and the failed requests alone are audited, a crashed one included."""
    async with serving(audit.app) as host:
        answers = [(await post(host, f"/transfers/ada?amount={amount}")).status_code for amount in (5, 5000, 0)]
    assert answers == [200, 403, 500]
    assert [json.loads(line) for line in Path("audit.jsonl").read_text().splitlines()] == [
        {"account": "ada", "amount": 5000, "status": 403, "error": "None"},
        {
            "account": "ada",
            "amount": 0,
            "status": 500,
            "error": "ZeroDivisionError('integer division or modulo by zero')",
        },
    ]
    assert capsys.readouterr().out == "ada tried to take 5000\n"


async def test_retries() -> None:
    """G2: a task decorated with `stamina.retry` calls a failing server again until it answers."""
    got: list[str] = []

    async def flaky(scope: Any, receive: Any, send: Any) -> None:
        got.append((await receive())["body"].decode())
        status = 503 if len(got) < 3 else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async with serving(flaky) as hook, serving(retries.app) as host:
        answer = await post(host, "/orders", params={"webhook": f"http://{hook}/"})
        assert (answer.status_code, answer.json()) == (202, {"status": "accepted"})
    assert [json.loads(body) for body in got] == [{"event": "order.created"}] * 3


async def test_request_id() -> None:
    """G5: a task added in a sync endpoint's thread logs with the request's id, each request its own."""
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as entries:
        async with serving(request_id.app) as host, httpx.AsyncClient(trust_env=False) as client:
            for _ in range(2):
                assert (await client.get(f"http://{host}/")).text == "thanks\n"
    ids = {
        event: [entry["request_id"] for entry in entries if entry["event"] == event]
        for event in ("uploaded", "resized")
    }
    assert len(entries) == 4
    assert sorted(ids["uploaded"]) == sorted(ids["resized"])  # tasks of different requests run in no fixed order
    assert len(set(ids["uploaded"])) == 2


async def test_quart(log: pytest.LogCaptureFixture) -> None:
    """G8, G12: Quart's request has the list, `defer` adds to the same one, and hypercorn shuts down without a complaint."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = hypercorn.config.Config()
        config.bind = [f"fd://{os.dup(listener.fileno())}"]
        stop = asyncio.Event()
        serve = hypercorn.asyncio.serve(quart_app.app, config, shutdown_trigger=stop.wait)
        running = asyncio.create_task(serve)
        answer = await post(f"127.0.0.1:{listener.getsockname()[1]}", "/orders/7")
        assert (answer.status_code, answer.json()) == (201, {"order": "7"})
        stop.set()
        await running
    assert told(log) == ["order 7 is on its way", "bill for 7"]


async def test_litestar(log: pytest.LogCaptureFixture) -> None:
    """G12: Litestar's request has the list under uvicorn, and `defer` adds to the same one."""
    async with serving(litestar_app.app) as host:
        answer = await post(host, "/orders/7")
        assert (answer.status_code, answer.json()) == (201, {"order": "7"})
    assert told(log) == ["order 7 is on its way", "bill for 7"]
