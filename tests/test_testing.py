"""The testing kit: tasks recorded or run inline, with every client, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_deferred import (
    DeferredMiddleware,
    DeferredTask,
    DeferredTasks,
    Runner,
    Statistics,
    TaskState,
    current_tasks,
    defer,
    tasks_from,
)
from asgi_deferred.testing import inline, record

from .clients import OpenClient, async_client, open_client
from .conftest import BACKENDS
from .support import OK, Log, http_scope, no_more_messages, request, responder, states

__all__ = ["open_client"]

NOTHING = Statistics(*[0] * 9)


def fail(message: str) -> None:
    raise ValueError(message)


async def fail_async(message: str) -> None:
    raise LookupError(message)


@pytest.fixture
def deferred() -> Iterator[list[DeferredTask]]:
    with record() as tasks:
        yield tasks


@pytest.fixture
def finish_deferred() -> Iterator[None]:
    with inline(raise_errors=True):
        yield


def make_app(*add: Any, runner: Runner | None = None) -> Starlette:
    async def index(request: Request) -> Response:
        for each in add:
            each(tasks_from(request))
        return PlainTextResponse("hello")

    app = Starlette(routes=[Route("/", index)])
    app.add_middleware(DeferredMiddleware, runner=runner)
    return app


def test_record_collects_with_test_client(open_client: OpenClient, deferred: list[DeferredTask]) -> None:
    """Recorded tasks are plain data, never run, and are in no statistics, in TestClient with a lifespan and without."""
    log, runner = Log(), Runner(observers=[log := Log()])
    app = make_app(
        lambda tasks: tasks.add_task(log.note, "one"),
        lambda tasks: tasks.options(when="always", timeout=5, name="two").add_task(log.note_sync, entry="two"),
        runner=runner,
    )
    with open_client(app) as client:
        assert client.get("/").text == "hello"
    assert [(task.func, task.args, task.kwargs) for task in deferred] == [
        (log.note, ("one",), {}),
        (log.note_sync, (), {"entry": "two"}),
    ]
    assert [(task.name, task.when, task.timeout) for task in deferred] == [
        ("Log.note", "success", None),
        ("two", "always", 5),
    ]
    assert states(deferred) == ["Log.note PENDING", "two PENDING"]
    assert log == []
    assert runner.statistics() == NOTHING


@pytest.mark.anyio
async def test_record_collects_with_async_client(deferred: list[DeferredTask]) -> None:
    """Recording holds for an async client on the test's own event loop, and for `defer` in threads."""
    log, runner = Log(), Runner()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        defer(log.note, "here")
        await anyio.to_thread.run_sync(lambda: defer(log.note, "there"))
        await PlainTextResponse("hello")(scope, receive, send)

    async with (
        runner,
        httpx.AsyncClient(
            transport=httpx.ASGITransport(DeferredMiddleware(app, runner)), base_url="http://test"
        ) as client,
    ):
        await client.get("/")
        defer(log.note, "no request")
    assert [task.args for task in deferred] == [("here",), ("there",), ("no request",)]
    assert log == []
    assert runner.statistics() == NOTHING


@pytest.mark.anyio
async def test_record_still_validates(deferred: list[DeferredTask]) -> None:
    """Bad input raises at the line that made it, while recording as ever."""
    with pytest.raises(TypeError, match="Pass the function and its arguments, not the call"):
        await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(fail_async("x")))), Log())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="when='never' is unknown"):
        await request(DeferredMiddleware(responder(lambda tasks: tasks.options(when="never"))), Log())  # type: ignore[arg-type]
    assert deferred == []


@pytest.mark.anyio
async def test_record_keeps_the_account_apart(deferred: list[DeferredTask]) -> None:
    """G2: a recorded task that is cancelled, or replaced by its key, changes no count of the runner."""
    log = Log()
    runner = Runner(observers=[log])

    def add(tasks: DeferredTasks) -> None:
        tasks.options(key="cache", name="first").add_task(log.note, "first")
        tasks.options(key="cache", name="second").add_task(log.note, "second")

    app = DeferredMiddleware(responder(add), runner)
    await request(app, log)
    await request(app, log)
    assert states(deferred) == ["first CANCELLED", "second PENDING"] * 2
    assert deferred[1].cancel() is True
    assert deferred[1].cancel() is False
    assert log == ["http.response.start", "http.response.body", "returned"] * 2
    assert runner.statistics() == NOTHING


@pytest.mark.anyio
async def test_record_nests_and_restores() -> None:
    """Of nested blocks the innermost collects, and after an error in the block tasks run again."""
    log = Log()
    app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "ran")))
    with record() as outer:
        await request(app, log)
        with pytest.raises(KeyError), record() as inner:
            await request(app, log)
            raise KeyError
        await request(app, log)
    assert (len(outer), len(inner)) == (2, 1)
    assert "ran" not in log
    await request(app, log)
    assert log[-2:] == ["ran", "returned"]


@pytest.mark.anyio
async def test_record_wins_inside_inline() -> None:
    """What is recorded does not run, in whichever order `record` and `inline` are entered."""
    log = Log()
    app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "ran")))
    with inline(raise_errors=True), record() as tasks:
        await request(app, log)
    with record() as more, inline(raise_errors=True):
        await request(app, log)
    assert states(tasks + more) == ["Log.note PENDING", "Log.note PENDING"]
    assert log == ["http.response.start", "http.response.body", "returned"] * 2


def test_inline_with_test_client(open_client: OpenClient) -> None:
    """The client sees the call return after the tasks, nested ones included, with a lifespan and without."""
    log, runner = Log(), Runner()

    async def slow() -> None:
        await anyio.wait_all_tasks_blocked()
        log.append(f"slow {current_tasks().outcome.status}")  # type: ignore[union-attr]
        defer(log.note_sync, "nested")

    app = make_app(
        lambda tasks: tasks.add_task(slow), lambda tasks: tasks.add_task(log.note_sync, "sync"), runner=runner
    )
    with inline(), open_client(app) as client:
        for _ in range(2):
            client.get("/")
            log.append("client")
    assert log == ["slow 200", "sync", "nested", "client"] * 2
    assert runner.statistics().succeeded == 6


@pytest.mark.anyio
async def test_inline_on_a_running_lifespan(caplog: pytest.LogCaptureFixture) -> None:
    """Only while the block is entered does the call wait; before and after, tasks are off the request's clock."""
    log, go = Log(), anyio.Event()

    async def task() -> None:
        await go.wait()
        log.append("task")

    app = make_app(lambda tasks: tasks.add_task(task))
    async with async_client(app) as client:
        await client.get("/")
        log.append("before")
        with inline():
            async with anyio.create_task_group() as group:
                group.start_soon(client.get, "/")
                await anyio.wait_all_tasks_blocked()
                log.append("go")
                go.set()
        log.append("inline")
        go = anyio.Event()
        await client.get("/")
        log.append("after")
        go.set()
    assert log == ["before", "go", "task", "task", "inline", "after", "task"]
    assert caplog.messages == []  # the drain found nothing to abandon


def test_inline_raises_in_test_client(open_client: OpenClient, finish_deferred: None) -> None:
    """With `raise_errors` the first failed task's own error reaches the test, after all tasks have ended."""
    log = Log()
    app = make_app(
        lambda tasks: tasks.add_task(log.note, "first"),
        lambda tasks: tasks.add_task(fail, "one"),
        lambda tasks: tasks.add_task(fail_async, "two"),
        lambda tasks: tasks.add_task(log.note, "last"),
    )
    with open_client(app) as client, pytest.raises(ValueError, match="one") as caught:
        client.get("/")
    assert log == ["first", "last"]
    assert caught.traceback[-1].name == "fail"


@pytest.mark.anyio
async def test_inline_raises_in_async_client(finish_deferred: None) -> None:
    """With `raise_errors` httpx raises the error of the first task that fails, concurrent lists and nested tasks too."""
    runner = Runner(concurrent=True)
    app = make_app(lambda tasks: tasks.add_task(defer, fail, "nested"), runner=runner)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        with pytest.raises(ValueError, match="nested"):
            await client.get("/")
    async with async_client(app) as client:
        with pytest.raises(ValueError, match="nested"):
            await client.get("/")
    assert runner.statistics().failed == 2


@pytest.mark.anyio
async def test_inline_raises_a_timeout(finish_deferred: None) -> None:
    """With `raise_errors` a task that timed out raises TimeoutError; one that was skipped or cancelled raises nothing."""
    log = Log()

    def add(tasks: DeferredTasks) -> None:
        tasks.options(when="failure").add_task(fail, "skipped")
        tasks.add_task(fail, "cancelled").cancel()

    await request(DeferredMiddleware(responder(add)), log)
    with pytest.raises(TimeoutError, match=r"timeout=0\.01 s is over"):
        await request(
            DeferredMiddleware(responder(lambda tasks: tasks.options(timeout=0.01).add_task(anyio.sleep_forever))), log
        )
    assert log == ["http.response.start", "http.response.body", "returned", "http.response.start", "http.response.body"]


@pytest.mark.anyio
async def test_inline_lets_the_applications_error_win(finish_deferred: None) -> None:
    """G10: what the application raised passes through unchanged, though a task failed as well."""
    failed: list[DeferredTask] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        failed.append(tasks_from(scope).options(when="always").add_task(fail, "task"))
        raise RuntimeError("application")

    with pytest.raises(RuntimeError, match="application"):
        await request(DeferredMiddleware(app), Log())
    assert [task.state for task in failed] == [TaskState.FAILED]


@pytest.mark.anyio
async def test_inline_lets_a_cancellation_win(finish_deferred: None) -> None:
    """G10: a cancellation that comes out of the server's `send` is not replaced by a task's error."""
    failed: list[DeferredTask] = []

    async def send(message: Any) -> None:
        if message == OK[-1]:
            scope.cancel()
        await anyio.lowlevel.checkpoint()

    app = DeferredMiddleware(
        responder(lambda tasks: failed.append(tasks.options(when="always").add_task(fail, "task")))
    )
    with anyio.CancelScope() as scope:
        await app(http_scope(), no_more_messages, send)
    assert scope.cancelled_caught
    assert [task.state for task in failed] == [TaskState.FAILED]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [BACKENDS["asyncio"], BACKENDS["uvloop"]])
async def test_inline_lets_a_native_cancellation_win(finish_deferred: None) -> None:
    """G10: the same where asyncio delivers a cancellation but once, so that the tasks' end can be waited for."""
    failed: list[DeferredTask] = []

    async def send(message: Any) -> None:
        if message == OK[-1]:
            host.cancel()
        await asyncio.sleep(0)

    app = DeferredMiddleware(
        responder(lambda tasks: failed.append(tasks.options(when="always").add_task(fail, "task")))
    )
    host = asyncio.ensure_future(app(http_scope(), no_more_messages, send))
    await asyncio.wait([host])
    assert host.cancelled()
    assert [task.state for task in failed] == [TaskState.FAILED]


@pytest.mark.anyio
async def test_inline_nests_and_restores() -> None:
    """Of nested blocks the innermost decides whether errors raise, and an error in a block leaves nothing behind."""
    log = Log()
    before = dict(vars(Runner))
    app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(fail, "task")), runner := Runner())
    with inline(raise_errors=True):
        with pytest.raises(KeyError), inline():
            await request(app, log)
            raise KeyError
        with pytest.raises(ValueError, match="task"), inline(raise_errors=True):
            await request(app, log)
        with pytest.raises(ValueError, match="task"):
            await request(app, log)
    assert runner.statistics().failed == 3
    assert dict(vars(Runner)) == before


def test_test_client_runs_the_application_in_another_thread(deferred: list[DeferredTask]) -> None:
    """Both hold across threads, where a context variable of the test would not be seen."""
    app = make_app(lambda tasks: tasks.add_task(fail, threading.current_thread().name))
    TestClient(app).get("/")
    (task,) = deferred
    assert task.args != (threading.current_thread().name,)
