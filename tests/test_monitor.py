"""The live page, without a browser: who may see it, what it shows, and what it never shows."""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import logging
import math
import os
import re
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.websockets import WebSocketDisconnect

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner, draining
from asgi_deferred.monitor import Monitor

from .support import Log, call_soon, http_scope, lifespan, no_more_messages, request, responder

pytestmark = pytest.mark.anyio

JSON = [(b"accept", b"application/json")]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def everybody(scope: Any) -> bool:
    return True


async def ask(app: Any, **scope: Any) -> tuple[int, dict[str, str], str]:
    """Make a request; return its status, headers and body."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app(http_scope(**scope), no_more_messages, send)
    start, body = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert len(headers) == len(start["headers"])
    return start["status"], headers, body["body"].decode()


async def look(monitor: Monitor) -> dict[str, Any]:
    """Return what the page shows."""
    status, headers, body = await ask(monitor, headers=JSON)
    assert (status, headers["content-type"]) == (200, "application/json; charset=utf-8")
    return dict(json.loads(body))


async def defer(runner: Runner, *add: Callable[[DeferredTasks], object], path: str = "/signup") -> None:
    await request(DeferredMiddleware(responder(*add), runner), Log(), http_scope(path))


def line(function: Callable[..., object], offset: int = 0) -> str:
    return f"{__file__}:{function.__code__.co_firstlineno + offset}"


async def test_what_is_shown() -> None:
    """The page shows what runs, what is pending by name, the counts and the limits of its process."""
    runner = Runner(max_concurrency=2, max_pending=math.inf, drain_timeout=1.5)  # type: ignore[arg-type]
    monitor = Monitor(runner, allow=everybody)
    started, go = anyio.Event(), anyio.Event()

    async def first(_password: str) -> None:
        started.set()
        await go.wait()

    async def second() -> None: ...

    def add(tasks: DeferredTasks) -> None:
        tasks.add_task(first, "hunter2")
        tasks.add_task(second)
        tasks.options(name="third").add_task(second)
        tasks.add_task(second)

    async with runner:
        assert [(await look(monitor))[part] for part in ("running", "pending", "failures")] == [[], [], []]
        await defer(runner, add)
        await started.wait()
        shown = await look(monitor)
        go.set()
    assert shown.pop("id").split()[1] == str(os.getpid())
    assert re.fullmatch(r"on \S+, up \d+\.\d s", shown.pop("about"))
    ((name, age, *place),) = shown.pop("running")
    assert (name, *place) == (
        "test_what_is_shown.<locals>.first",
        "GET /signup",
        f"tests/{line(add, 1).split('/')[-1]}",
    )
    assert re.fullmatch(r"\d+\.\d s", age)
    pending = shown.pop("pending")
    assert [each[:2] for each in pending] == [["test_what_is_shown.<locals>.second", "2"], ["third", "1"]]
    assert all(re.fullmatch(r"for up to \d+\.\d s", each[2]) for each in pending)
    assert shown == {
        "title": f"Process {os.getpid()}",
        "note": "",
        "counts": [
            ["3", "pending"],
            ["1", "running"],
            ["0", "succeeded"],
            ["0", "failed"],
            ["0", "timed out"],
            ["0", "skipped"],
            ["0", "cancelled"],
            ["0", "abandoned"],
        ],
        "limits": "Limits: 2 run at once, 40 of them in threads; inf unfinished; 1.5 s to drain",
        "failures": [],
    }


async def test_failures() -> None:
    """The page shows what failed, the latest last, with its request, line and traceback, and not what was skipped."""
    runner = Runner(drain_timeout=0.05)
    monitor = Monitor(runner, allow=everybody)
    started, go, soon = anyio.Event(), threading.Event(), call_soon()

    async def fails(**_: str) -> None:
        local = "hunter2"
        try:
            raise TimeoutError("no answer")
        except TimeoutError as error:
            error.add_note(f"a note of {len(local)}")
            raise ConnectionError("card declined") from error

    async def hangs() -> None:
        await anyio.sleep_forever()

    def stuck(_password: str) -> None:
        soon(started.set)
        go.wait(30)

    def add(tasks: DeferredTasks) -> None:
        tasks.add_task(fails, password="hunter2")
        tasks.options(timeout=0.01).add_task(hangs)
        tasks.options(when="failure").add_task(hangs)
        tasks.add_task(hangs).cancel()
        tasks.add_task(stuck, "hunter2")

    async with runner:
        await defer(runner, add)
        await started.wait()
    go.set()
    status, _, body = await ask(monitor, headers=JSON)
    assert status == 200
    assert "hunter2" not in body.replace('local = \\"hunter2\\"', "")  # but for the line of code
    failed, timed_out, abandoned = json.loads(body)["failures"]
    here = "test_failures.<locals>"
    assert [(each["number"], each["name"], each["error"]) for each in (failed, timed_out, abandoned)] == [
        (0, f"{here}.fails", "ConnectionError: card declined"),
        (1, f"{here}.hangs", f"TaskTimedOut: '{here}.hangs': timeout=0.01 s is over"),
        (2, f"{here}.stuck", ""),
    ]
    assert [re.sub(r"\d+\.\d", "1.0", each["when"]) for each in (failed, timed_out, abandoned)] == [
        "failed 1.0 s ago",
        "timed out 1.0 s ago",
        "abandoned 1.0 s ago",
    ]
    when, added_at, *trace = failed["text"].splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}  GET /signup", when)
    assert added_at == f"Added at {line(add, 1)}"
    assert [each for each in trace if each and not each.startswith(" ")] == [
        "Traceback (most recent call last):",
        "TimeoutError: no answer",
        "a note of 7",
        "The above exception was the direct cause of the following exception:",
        "Traceback (most recent call last):",
        "ConnectionError: card declined",
    ]
    assert f'  File "{__file__}", line ' in failed["text"]
    assert abandoned["text"].splitlines()[1:] == [f"Added at {line(add, 5)}", ""]


class Mute(Exception):
    def __str__(self) -> str:
        raise LookupError


@pytest.mark.parametrize(
    ("error", "brief"),
    [
        (SyntaxError("no end", ("page.html", 1, 1, "{% if", 1, 2)), "SyntaxError: no end"),
        (Mute(), "Mute: <exception str() failed>"),
        (OSError("\ud800"), "OSError: \ud800"),
        (ValueError("\n"), "ValueError: "),
    ],
    ids=["no file", "no text", "no characters", "no line"],
)
async def test_what_an_error_says(error: Exception, brief: str) -> None:
    """Of each failure the page says what was raised, whatever that shows of itself."""
    runner = Runner()
    monitor = Monitor(runner, allow=everybody)

    async def fails() -> None:
        raise error

    async with runner:
        await defer(runner, lambda tasks: tasks.add_task(fails))
    assert [each["error"] for each in (await look(monitor))["failures"]] == [brief]


async def test_nothing_of_a_failure_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """G6: a task that failed, its argument and its exception are free at once, though the page shows it."""
    monkeypatch.setattr(logging.getLogger("asgi_deferred"), "disabled", True)  # pytest keeps what is logged

    class Kept(Exception): ...

    async def fails(error: Exception) -> None:
        raise error

    runner = Runner()
    monitor = Monitor(runner, allow=everybody)
    kept: list[weakref.ref[Any]] = []

    def add(tasks: DeferredTasks) -> None:
        error = Kept("of a failure")
        kept[:] = weakref.ref(error), weakref.ref(tasks.add_task(fails, error))

    async with runner:
        await defer(runner, add)
        await runner.wait_idle()
        gc.collect()
        assert [each() for each in kept] == [None, None]
        ((told),) = (await look(monitor))["failures"]
    assert told["error"] == "test_nothing_of_a_failure_is_kept.<locals>.Kept: of a failure"


async def test_a_drain_is_shown() -> None:
    """G8: the page says that the process drains."""
    runner = Runner()
    monitor = Monitor(runner, allow=everybody)
    notes: list[str] = []

    async def work() -> None:
        notes.append((await look(monitor))["note"])
        while not draining():
            await anyio.sleep(0.001)
        notes.append((await look(monitor))["note"])

    async with runner:
        await defer(runner, lambda tasks: tasks.add_task(work))
        while not notes:
            await anyio.sleep(0.001)
    assert notes == ["", "draining"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_it_is_bounded() -> None:
    """G7: an answer stays small whatever waits and fails, and a big backlog is not gone through for each one."""
    runner = Runner(max_concurrency=100, max_pending=20_000)
    monitor = Monitor(runner, allow=everybody)
    go = anyio.Event()

    async def waits() -> None:
        await go.wait()

    async def fails() -> None:
        raise ValueError("long" * 2000)

    def add_failing(tasks: DeferredTasks) -> None:
        for _ in range(30):
            tasks.options(name="failing" * 1000).add_task(fails)

    def add_waiting(tasks: DeferredTasks) -> None:
        for number in range(200):
            tasks.options(name=f"{number} " + "waiting" * 1000).add_task(waits)
        for _ in range(9800):
            tasks.add_task(waits)

    async with runner:
        await defer(runner, add_failing, path="/path" * 1000)
        await runner.wait_idle()
        for _ in range(99):
            await defer(runner, lambda tasks: tasks.add_task(waits))
        await defer(runner, add_waiting)
        while len(runner.running) < 100:
            await anyio.lowlevel.checkpoint()
        _, _, body = await ask(monitor, headers=JSON)
        assert (await ask(monitor, headers=JSON))[2] == body
        go.set()
    shown = json.loads(body)
    assert [len(shown[part]) for part in ("running", "pending", "failures")] == [50, 50, 20]
    assert [each["number"] for each in shown["failures"]] == [*range(10, 30)]
    assert shown["pending"][0][1] == "9,800"
    assert len(body) < 130_000


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0.0 s"), (59.9, "59.9 s"), (65, "1 min 5 s"), (4000, "1 h 6 min"), (1e7, "2,777 h 46 min")],
)
async def test_times(seconds: float, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time is legible, be it short or long."""
    monkeypatch.setattr("asgi_deferred.monitor.perf_counter", lambda: 1.0)
    monitor = Monitor(Runner(), allow=everybody)
    monkeypatch.setattr("asgi_deferred.monitor.perf_counter", lambda: 1.0 + seconds)
    assert (await look(monitor))["about"].partition("up ")[2] == shown


async def at_once(scope: Any) -> bool:
    return bool(scope["path"] == "/signup")


@pytest.mark.parametrize("allow", [at_once, partial(at_once), lambda scope: scope["path"] == "/signup"])
async def test_allow(allow: Any) -> None:
    """`allow` is asked about each request, and may be async; without it there is 403, and nothing of the page."""
    monitor = Monitor(Runner(), allow=allow)
    for headers in ([], JSON):
        assert (await ask(monitor, path="/signup", headers=headers))[0] == 200
        status, told, body = await ask(monitor, headers=headers)
        assert (status, told["content-type"], body) == (403, "text/plain; charset=utf-8", "Forbidden")
    assert (await ask(monitor, method="POST"))[0] == 403


@pytest.mark.parametrize("answer", [None, 0, 1, "no", object(), (True,)])
async def test_only_true_allows(answer: Any) -> None:
    """What is not `True` itself refuses, such as a response or a text that says no."""
    assert (await ask(Monitor(Runner(), allow=lambda _: answer)))[0] == 403


async def test_allow_that_raises() -> None:
    """What `allow` raises goes on, and nothing is sent."""

    def allow(scope: Any) -> bool:
        raise LookupError("the session is gone")

    with pytest.raises(LookupError, match="the session is gone"):
        await ask(Monitor(Runner(), allow=allow))


def test_allow_that_asks_for_a_password() -> None:
    """An HTTPException out of `allow` is FastAPI's to answer, so that a browser asks for a password."""

    def allow(scope: Any) -> bool:
        raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})

    app = FastAPI()
    app.mount("/deferred", Monitor(Runner(), allow=allow))
    response = TestClient(app).get("/deferred/")
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Basic")


async def test_methods() -> None:
    """It is read-only: GET and HEAD are answered alike, and nothing else."""
    monitor = Monitor(Runner(), allow=everybody)
    status, headers, page = await ask(monitor)
    assert (status, headers["content-type"], len(page.encode())) == (
        200,
        "text/html; charset=utf-8",
        int(headers["content-length"]),
    )
    assert await ask(monitor, method="HEAD") == (200, headers, "")
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        status, headers, _ = await ask(monitor, method=method)
        assert (status, headers["allow"]) == (405, "GET, HEAD")


async def test_headers() -> None:
    """The page may run its own script and ask its own server, and nothing else; no connection stays open."""
    monitor = Monitor(Runner(), allow=everybody)
    _, headers, page = await ask(monitor)
    own = {
        tag: base64.b64encode(hashlib.sha256(re.findall(f"<{tag}>(.*)</{tag}>", page, re.DOTALL)[0].encode()).digest())
        for tag in ("style", "script")
    }
    assert headers["content-security-policy"].split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{own['style'].decode()}'",
        f"script-src 'sha256-{own['script'].decode()}'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
    for extra in ({}, {"headers": JSON}, {"method": "POST"}):
        _, headers, _ = await ask(monitor, http_version="1.1", **extra)
        assert headers["connection"] == "close"
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    _, headers, _ = await ask(monitor, http_version="2")
    assert "connection" not in headers


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
@pytest.mark.parametrize("path", ["/deferred", "/deferred/", "/deferred?of=mine"])
def test_mounted(framework: Any, path: str) -> None:
    """Mounted in a framework, with a trailing slash or without, the page and what it asks for have one address."""
    runner = Runner()
    app = framework()
    app.mount("/deferred", Monitor(runner, allow=everybody))
    app.add_middleware(DeferredMiddleware, runner=runner)
    with TestClient(app) as client:
        page = client.get(path)
        assert (page.status_code, page.text[:15]) == (200, "<!doctype html>")
        shown = client.get(str(page.url), headers={"accept": "application/json"}).json()
    assert [number for number, _ in shown["counts"]] == ["0"] * 8


def test_websocket() -> None:
    """A websocket is closed."""
    app = Starlette(routes=[Mount("/deferred", Monitor(Runner(), allow=everybody))])
    with pytest.raises(WebSocketDisconnect), TestClient(app).websocket_connect("/deferred/"):
        ...


async def test_served_alone() -> None:
    """It may be the whole application, behind the middleware, as on a port of its own; it has no lifespan."""
    runner = Runner()
    monitor = Monitor(runner, allow=everybody)
    app = DeferredMiddleware(monitor, runner)
    async with lifespan(app):
        assert (await ask(app))[0] == 200
    with pytest.raises(ValueError, match="The monitor answers HTTP requests, and knows no 'lifespan'"):
        await monitor({"type": "lifespan"}, None, None)


async def test_two_pages() -> None:
    """Two monitors of one runner show the same failures, and an observer of the runner's own is told as before."""
    log = Log()
    runner = Runner(observers=[log])
    one, other = Monitor(runner, allow=everybody), Monitor(runner, allow=everybody)

    async def fails() -> None:
        raise ValueError("twice")

    async with runner:
        await defer(runner, lambda tasks: tasks.options(name="fails").add_task(fails))
    assert [each["error"] for each in (await look(one))["failures"]] == ["ValueError: twice"]
    assert [each["error"] for each in (await look(other))["failures"]] == ["ValueError: twice"]
    assert log == ["fails RUNNING", "fails FAILED"]


def test_bad_input() -> None:
    """A mistake is told where it is made."""
    runner = Runner()
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'allow'"):
        Monitor(runner)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"^allow=True cannot be called: use a function \(scope\) -> bool$"):
        Monitor(runner, allow=True)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^runner=<class '.*Runner'> is not a Runner: Monitor\(runner, allow=...\)$"):
        Monitor(Runner, allow=everybody)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert runner.observers == ()
