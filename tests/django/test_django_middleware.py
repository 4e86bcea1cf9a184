"""Requests, connections and transactions of a Django project."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from threading import Event, Thread, current_thread, get_ident
from typing import Any

import pytest
from anyio import sleep_forever
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished
from django.db import connection, connections
from django.http import HttpResponse, StreamingHttpResponse
from django.test import override_settings
from starlette.responses import PlainTextResponse

from asgi_deferred import DeferredTask, EnqueueFailed, Runner, TaskEvent, TaskState, current_tasks, defer, tasks_from
from asgi_deferred._django import OneThread

from . import dj
from .djproject import views
from .djproject.journal import journal
from .djproject.models import Entry

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.mark.parametrize(
    "path",
    [
        "sync_view",
        "async_view",
        "from_request",
        "async_from_request",
        "sync_class",
        "async_class",
        "middleware",
        "signal",
        "saves",
        "asaves",
        "stream",
    ],
)
async def test_defer(path: str) -> None:
    """G1: what a view, a class, a middleware or a signal handler defers runs after the response."""
    assert await dj.request(dj.wrapped(), f"/{path}") == ["200", "sent", "task"]


@pytest.mark.parametrize("path", ["sync_view", "async_view", "async_class", "middleware"])
async def test_defer_below_sync_middleware(path: str) -> None:
    """G1: the same where a sync middleware makes Django run all else in a thread."""
    with override_settings(MIDDLEWARE=["tests.django.djproject.middleware.sync_only", *settings.MIDDLEWARE]):
        assert await dj.request(dj.wrapped(), f"/{path}") == ["200", "sent", "task"]


@pytest.mark.parametrize("path", ["async_orm", "bridged"])
@pytest.mark.parametrize("middleware", [[], ["tests.django.djproject.middleware.sync_only"]])
async def test_async_orm(path: str, middleware: list[str]) -> None:
    """An async task uses the async ORM, also where the line that added it ran in a thread that waits no longer."""
    with override_settings(MIDDLEWARE=middleware):
        assert await dj.request(dj.wrapped(), f"/{path}") == ["200", "sent", "0 entries"]


async def test_lifespan() -> None:
    """G8: Django, which refuses the lifespan, gets one, and what is left runs before it ends."""
    app = dj.wrapped()
    async with dj.lifespan(app) as sent:
        assert await dj.request(app, "/async_view") == ["200", "sent"]
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert journal == ["200", "sent", "task"]


async def websocket(app: Any, received: list[str]) -> list[str]:
    sent: list[str] = []

    async def receive() -> Any:
        received.append("websocket.connect")
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await app({"type": "websocket", "path": "/", "headers": []}, receive, send)
    return sent


async def test_websocket_refused() -> None:
    """A websocket that Django refuses is closed, after its connect was received."""
    received: list[str] = []
    assert await websocket(dj.wrapped(), received) == ["websocket.close"]
    assert received == ["websocket.connect"]


async def test_websocket_passed() -> None:
    """G10: an application around Django that has websockets gets them, with a task list."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        defer(journal.append, "task")
        await send({"type": "websocket.close"})

    journal.clear()
    assert await websocket(dj.wrapped(app=app), []) == ["websocket.accept", "websocket.close"]
    assert journal == ["task"]


async def test_websocket_error() -> None:
    """G10: an error of a websocket that was taken passes through."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await websocket(dj.wrapped(app=app), [])


opened: list[sqlite3.Connection] = []


def opens() -> None:
    Entry.objects.exists()
    opened.append(connection.connection)
    assert is_open(opened[-1])


async def aopens() -> None:
    await sync_to_async(opens)()


def opens_both() -> Any:
    opens()
    return aopens()


async def opens_and_fails() -> None:
    await aopens()
    raise ValueError


async def opens_and_hangs() -> None:
    await aopens()
    await sleep_forever()


def is_open(raw: sqlite3.Connection) -> bool:
    try:
        raw.execute("select 1")
    except sqlite3.ProgrammingError:
        return False
    return True


@pytest.mark.parametrize(
    ("func", "count", "timeout"),
    [
        (opens, 1, None),
        (aopens, 1, None),
        (opens_both, 2, None),
        (opens_and_fails, 1, None),
        (opens_and_hangs, 1, 0.3),
        (views.async_task, 0, None),
    ],
)
@pytest.mark.parametrize("age", [0, 60, None])
async def test_connections_closed(
    func: Any, count: int, timeout: float | None, age: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connections that a task opened are closed before it counts as ended, whatever their age may be."""
    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", age)
    opened.clear()
    states: list[list[bool]] = []
    runner = Runner(timeout=timeout, observers=[lambda event: states.append([is_open(raw) for raw in opened])])
    dj.wrapped(runner)
    async with runner:
        defer(func)
        await runner.wait_idle()
    assert states == [[], [False] * count]


async def test_queries_reset() -> None:
    """With DEBUG a task starts with an empty log of queries, as a request does."""
    counts: list[int] = []

    def count() -> None:
        Entry.objects.exists()
        counts.append(len(connection.queries))

    with override_settings(DEBUG=True):
        runner = Runner(max_threads=1)
        dj.wrapped(runner)
        async with runner:
            for _ in range(3):
                defer(count)
    assert counts == [1, 1, 1]


async def test_threads_of_their_own() -> None:
    """G4: the thread-sensitive parts of async tasks do not queue behind one another's."""
    arrived = [Event(), Event()]
    threads: set[int] = set()

    def meet(own: int) -> None:
        threads.add(get_ident())
        arrived[own].set()
        assert arrived[1 - own].wait(30)

    async def task(own: int) -> None:
        await sync_to_async(meet)(own)

    runner = Runner()
    dj.wrapped(runner)
    async with runner:
        tasks = [defer(task, 0), defer(task, 1)]
        await runner.wait_idle()
    assert [task.state for task in tasks] == [TaskState.SUCCEEDED] * 2
    assert len(threads) == 2


class Queue:
    def __defer_enqueue__(self) -> None:
        raise LookupError("no broker")


@pytest.mark.parametrize("unavailable", [None, PlainTextResponse("full", 507)])
@pytest.mark.parametrize("path", ["/hook", "/ahook"])
async def test_a_browser_can_read_a_refusal(path: str, unavailable: Any) -> None:
    """Where an engine refuses a durable task, the answer keeps the view's access headers, and Django ends its request."""

    def view(request: Any) -> HttpResponse:
        tasks_from(request).options(durable=True).add_task(Queue())
        response = HttpResponse("stored", headers={"Access-Control-Allow-Origin": "*", "Vary": "origin", "ETag": "1"})
        response.set_cookie("session", "1")
        return response

    async def async_view(request: Any) -> HttpResponse:
        return view(request)

    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def note_and_send(message: Any) -> None:
            sent.append(message)
            await send(message)

        await dj.wrapped(Runner(unavailable=unavailable))(scope, receive, note_and_send)

    def note(**_: object) -> None:
        finished.append("request_finished")

    finished: list[str] = []
    views.hooked.append(view if path == "/hook" else async_view)
    status = "503" if unavailable is None else "507"
    request_finished.connect(note)
    try:
        assert await dj.request(app, path) == [status, "sent"]
    finally:
        request_finished.disconnect(note)
    assert finished == ["request_finished"]
    names = [name for name, _ in sent[0]["headers"]]
    own = (
        [b"content-type", b"content-length", b"retry-after"]
        if unavailable is None
        else [b"content-length", b"content-type"]
    )
    assert names == [*own, b"Access-Control-Allow-Origin", b"Vary"]


async def test_a_refusal_in_mid_stream_breaks_off() -> None:
    """A response of Django's that has started when an engine refuses a durable task is not completed, and raises."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"o"
        current_tasks().options(durable=True).add_task(Queue())
        yield b"k"

    async def view(request: Any) -> StreamingHttpResponse:
        return StreamingHttpResponse(parts())

    views.hooked.append(view)
    with pytest.raises(EnqueueFailed):
        await dj.request(dj.wrapped(), "/ahook")
    assert journal == ["200"]


STUCK = """
import asyncio, threading, time
from asgiref.sync import sync_to_async
from asgi_deferred import Runner, defer
from asgi_deferred.django import DeferredMiddleware
from django.conf import settings

settings.configure()
runner = Runner(drain_timeout=0.1)

async def app(scope, receive, send): ...

DeferredMiddleware(app, runner=runner)
entered = threading.Event()

def stuck():
    entered.set()
    time.sleep(3600)

async def task():
    await sync_to_async(stuck)()

async def main():
    async with runner:
        defer(task)
        while not entered.is_set():
            await asyncio.sleep(0.001)

asyncio.run(main())
print(runner.statistics().abandoned)
"""


def test_a_stuck_thread_does_not_hold_the_process() -> None:
    """G8: an async task that hangs in `sync_to_async` holds neither the drain nor, at its end, the process."""
    result = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.returncode) == ("1\n", 0), result.stderr


async def test_threads_end_with_their_tasks() -> None:
    """G6: the thread that an async task had for its sync parts ends with it, and so does one that was stuck."""
    threads: list[Thread] = []
    runner = Runner()
    dj.wrapped(runner)
    async with runner:
        for _ in range(3):
            defer(sync_to_async(lambda: threads.append(current_thread())))
    for thread in threads:
        thread.join(30)
    assert len({*threads}) == 3
    assert not any(thread.is_alive() for thread in threads)


def test_what_was_cancelled_before_its_turn_in_a_thread() -> None:
    """G3: what is cancelled while it waits for a task's own thread is not run there, and the thread goes on."""
    executor, log, go = OneThread(), list[str](), Event()
    first = executor.submit(go.wait)
    second = executor.submit(log.append, "cancelled")
    third = executor.submit(log.append, "third")
    assert second.cancel()
    go.set()
    executor.shutdown()
    assert (first.result(30), third.result(30), log) == (True, None, ["third"])


async def test_what_a_thread_raises_comes_out() -> None:
    """What `sync_to_async` runs in a task's own thread may raise, and the task gets it; the next one does well."""
    log: list[str] = []

    def fail() -> None:
        raise LookupError("in the thread")

    async def task() -> None:
        with pytest.raises(LookupError, match="in the thread"):
            await sync_to_async(fail)()
        await sync_to_async(log.append)("the next")

    runner = Runner()
    dj.wrapped(runner)
    async with runner:
        defer(task)
    assert log == ["the next"]
    assert runner.statistics().succeeded == 1


async def test_around_of_the_user() -> None:
    """The runner's own `around` is kept, and entered while the task's connections can be used."""
    seen: list[str] = []

    @contextmanager
    def around(task: DeferredTask) -> Iterator[None]:
        yield
        seen.append(f"{task.name} {Entry.objects.count()}")

    @asynccontextmanager
    async def aaround(task: DeferredTask) -> AsyncIterator[None]:
        yield
        seen.append(f"{task.name} {await Entry.objects.acount()}")

    runner = Runner(around=[lambda task: aaround(task) if task._async else around(task)])
    app = dj.wrapped(runner)
    await dj.request(app, "/sync_view")
    await dj.request(app, "/async_view")
    assert seen == ["list.append 0", "async_task 0"]


def states(runner_options: dict[str, Any] | None = None) -> tuple[Any, list[str]]:
    ended: list[str] = []

    def observe(event: TaskEvent) -> None:
        if event.state is not TaskState.RUNNING:
            ended.append(f"{event.task.name} {event.state.name}")

    return dj.wrapped(Runner(observers=[observe], **(runner_options or {}))), ended


@pytest.mark.parametrize("path", ["write", "async_write"])
@pytest.mark.parametrize("atomic", [False, True])
async def test_sees_commit(path: str, atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """G1: a task sees what its request committed, with ATOMIC_REQUESTS and without; on_commit may defer."""
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", atomic)
    assert await dj.request(dj.wrapped(), f"/{path}") == ["200", "sent", "1 entries", "1 entries", "committed"]


@pytest.mark.parametrize(
    ("path", "query", "status"), [("write", "fail", "500"), ("write", "bad", "400"), ("async_write", "fail", "500")]
)
async def test_rolled_back(path: str, query: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rollback the default `when` skips what was deferred, and on_commit defers nothing."""
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)
    app, ended = states()
    assert await dj.request(app, f"/{path}", query) == [status, "sent"]
    assert ended == ["count_task SKIPPED", "async_orm_task SKIPPED"]


async def test_rolled_back_always() -> None:
    """A task with `when` "always" runs after a rollback, and sees that nothing is left."""
    app, ended = states({"when": "always"})
    assert await dj.request(app, "/async_write", "fail") == ["500", "sent", "0 entries", "0 entries"]
    assert ended == ["count_task SUCCEEDED", "async_orm_task SUCCEEDED"]


async def test_not_twice() -> None:
    """A runner shared by two applications one after the other has its tasks' connections closed all the same."""
    runner = Runner()
    for _ in range(2):
        assert await dj.request(dj.wrapped(runner, ASGIHandler()), "/async_orm") == ["200", "sent", "0 entries"]


async def test_current_tasks_in_block() -> None:
    """`async with runner:` gives a management command a list, with connections handled as in a request."""
    runner = Runner()
    dj.wrapped(runner)
    async with runner:
        task = current_tasks().add_task(views.async_orm_task)
    assert task.state is TaskState.SUCCEEDED
