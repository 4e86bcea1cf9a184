"""The lifespan: each message exactly once, for applications that have one and for those that do not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from asgiref.wsgi import WsgiToAsgi
from django.core.handlers.asgi import ASGIHandler
from starlette.applications import Starlette
from starlette.staticfiles import StaticFiles

from asgi_deferred import DeferredMiddleware, Runner, defer, tasks_from

from .support import OK, Log, assert_conserved, lifespan, request, responder

pytestmark = pytest.mark.anyio


async def drive(app: Any) -> list[str]:
    """Be a server that asks for startup and, once that is complete, for shutdown; return all that happened."""
    log = Log()
    started = anyio.Event()
    left = ["lifespan.startup", "lifespan.shutdown"]

    async def receive() -> Any:
        if len(left) == 1:
            await started.wait()
        log.append(f"-> {left[0]}")
        return {"type": left.pop(0)}

    async def send(message: Any) -> None:
        log.append(f"<- {message['type']}" + (f": {message['message']}" if "message" in message else ""))
        if message["type"] == "lifespan.startup.complete":
            started.set()

    try:
        await app({"type": "lifespan", "state": {}}, receive, send)
    except Exception as exc:
        log.append(f"raised {exc!r}")
    return log


def app_that(*steps: str) -> Callable[..., Any]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for step in steps:
            if step == "receive":
                await receive()
            elif step == "cancel":
                raise asyncio.CancelledError
            elif step.startswith("raise"):
                raise ValueError(step)
            else:
                await send({"type": f"lifespan.{step}"})

    return app


STARTUP, SHUTDOWN = "-> lifespan.startup", "-> lifespan.shutdown"
STARTED, STOPPED = "<- lifespan.startup.complete", "<- lifespan.shutdown.complete"


@pytest.mark.parametrize(
    ("steps", "transcript"),
    [
        (
            ["receive", "startup.complete", "receive", "shutdown.complete"],
            [STARTUP, STARTED, SHUTDOWN, STOPPED],
        ),
        (["raise at once"], [STARTUP, STARTED, SHUTDOWN, STOPPED]),
        ([], [STARTUP, STARTED, SHUTDOWN, STOPPED]),
        (["receive"], [STARTUP, STARTED, SHUTDOWN, STOPPED]),
        (["receive", "startup.complete"], [STARTUP, STARTED, SHUTDOWN, STOPPED]),
        (["receive", "startup.complete", "receive"], [STARTUP, STARTED, SHUTDOWN, STOPPED]),
        (["receive", "startup.failed"], [STARTUP, "<- lifespan.startup.failed"]),
        (
            ["receive", "startup.failed", "raise in startup"],
            [STARTUP, "<- lifespan.startup.failed", "raised ValueError('raise in startup')"],
        ),
        (["receive", "raise in startup"], [STARTUP, "raised ValueError('raise in startup')"]),
        (
            ["receive", "startup.complete", "raise while serving"],
            [STARTUP, STARTED, SHUTDOWN, "raised ValueError('raise while serving')"],
        ),
        (
            ["receive", "startup.complete", "receive", "raise in shutdown"],
            [STARTUP, STARTED, SHUTDOWN, "raised ValueError('raise in shutdown')"],
        ),
        (
            ["receive", "startup.complete", "receive", "shutdown.failed", "raise in shutdown"],
            [STARTUP, STARTED, SHUTDOWN, "<- lifespan.shutdown.failed", "raised ValueError('raise in shutdown')"],
        ),
        (
            ["receive", "startup.complete", "receive", "shutdown.failed"],
            [STARTUP, STARTED, SHUTDOWN, "<- lifespan.shutdown.failed"],
        ),
        (
            ["receive", "startup.complete", "receive", "shutdown.complete", "cancel"],
            [STARTUP, STARTED, SHUTDOWN, STOPPED],
        ),
    ],
    ids=lambda value: "-".join(value) or "return" if value and "->" not in value[0] else "",
)
async def test_each_message_once(steps: list[str], transcript: list[str]) -> None:
    """G10: each lifespan message is sent exactly once, whatever the application does; several lifespans in a row too."""
    wrapped = DeferredMiddleware(app_that(*steps))
    for _ in range(2):
        assert await drive(wrapped) == transcript


async def asserting(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"


async def dispatching(scope: Any, receive: Any, send: Any) -> None:
    await {"http": asserting}[scope["type"]](scope, receive, send)


async def reading_the_path(scope: Any, receive: Any, send: Any) -> None:
    scope["path"]


async def not_implemented(scope: Any, receive: Any, send: Any) -> None:
    raise NotImplementedError(scope["type"])


async def like_channels(scope: Any, receive: Any, send: Any) -> None:
    """As the `ProtocolTypeRouter` of channels does."""
    raise ValueError(f"No application configured for scope type {scope['type']!r}")


async def answering(scope: Any, receive: Any, send: Any) -> None:
    await send(OK[0])


async def copying(scope: Any, receive: Any, send: Any) -> None:
    """A middleware that hands on a scope of its own, and catches what it does not change."""
    try:
        await asserting(dict(scope), receive, send)
    except AssertionError as exc:
        raise exc from None


wsgi: Any = WsgiToAsgi(answering)  # type: ignore[no-untyped-call]
WITHOUT_LIFESPAN = [
    *[asserting, dispatching, reading_the_path, not_implemented, like_channels, answering, copying],
    *[StaticFiles(directory="."), wsgi, object.__new__(ASGIHandler)],
]


@pytest.mark.parametrize("app", WITHOUT_LIFESPAN, ids=lambda app: getattr(app, "__name__", type(app).__name__))
async def test_an_application_without_lifespan(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    """G10: for an application that says it has no lifespan, each in its way, the server gets each message once."""
    caplog.set_level(logging.DEBUG, "asgi_deferred")

    async def strict(scope: Any, receive: Any, send: Any) -> None:
        async def refuse(message: Any) -> None:
            assert message["type"].startswith("lifespan.")  # as servers do
            await send(message)

        await DeferredMiddleware(app)(scope, receive, refuse)

    assert await drive(strict) == [STARTUP, STARTED, SHUTDOWN, STOPPED]
    (record,) = (record for record in caplog.records if record.name == "asgi_deferred")
    assert record.getMessage().startswith("The application has no lifespan: ")


class Broken:
    """A middleware that cannot be made."""

    def __init__(self, app: Any, error: Exception) -> None:
        raise error


def broken_starlette(error: Exception) -> Any:
    app = Starlette()
    app.add_middleware(Broken, error=error)  # type: ignore[arg-type]
    return app


def inline(error: Exception) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    return app


async def wrongly_called(scope: Any) -> None: ...


async def configured(scope: Any, receive: Any, send: Any) -> None:
    config: dict[str, str] = {}
    config["DATABASE_URL"]


@pytest.mark.parametrize(
    ("app", "raised"),
    [
        *[
            (broken_starlette(error), f"raised {error!r}")
            for error in (ValueError("no url"), KeyError("lifespan"), AssertionError(), NotImplementedError())
        ],
        *[
            (inline(error), f"raised {error!r}")
            for error in (RuntimeError("no url"), TypeError(), OSError(), KeyError())
        ],
        (configured, "raised KeyError('DATABASE_URL')"),
        (wrongly_called, "raised TypeError('wrongly_called() takes 1 positional argument but 3 were given')"),
    ],
)
async def test_a_startup_that_fails(app: Any, raised: str) -> None:
    """G10: an error before the application received anything reaches the server as it does without the middleware."""
    assert await drive(app) == [raised]
    assert await drive(DeferredMiddleware(app)) == [raised]


async def test_served_after_a_startup_that_failed() -> None:
    """G9: a server that goes on without a lifespan gets each request's tasks run in the request's call."""
    log = Log()
    serving = responder(lambda tasks: tasks.add_task(log.note, "task"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (inline(OSError()) if scope["type"] == "lifespan" else serving)(scope, receive, send)

    wrapped = DeferredMiddleware(app)
    assert await drive(wrapped) == ["raised OSError()"]
    await request(wrapped, log)
    assert log == ["http.response.start", "http.response.body", "task", "returned"]


async def test_a_log_that_raises_ends_no_lifespan(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """G3, G10: a filter of the log that raises as a lifespan ends early, or is none, changes nothing for the server."""

    def broken(_: logging.LogRecord) -> bool:
        raise ZeroDivisionError

    caplog.set_level(logging.DEBUG, "asgi_deferred")
    apps = [app_that("receive", "startup.complete", "raise while serving"), app_that("raise")]
    for app in apps:
        wrapped = DeferredMiddleware(app)
        expected = await drive(wrapped)
        with monkeypatch.context() as patch:
            logger = logging.getLogger("asgi_deferred")
            patch.setattr(logger, "filters", [broken])
            assert await drive(wrapped) == expected


async def test_an_early_end_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """An exception out of a lifespan that was serving is logged when it happens, not only raised at shutdown."""
    await drive(DeferredMiddleware(app_that("receive", "startup.complete", "raise while serving")))
    assert [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "asgi_deferred"] == [
        ("ERROR", "The application's lifespan ended early; tasks still run")
    ]


async def test_drains_before_the_app_sees_the_shutdown() -> None:
    """G8: what the application opened at startup is still open while the last tasks run."""
    log, go = Log(), anyio.Event()

    async def task() -> None:
        await go.wait()
        log.append("task")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await responder(lambda tasks: tasks.add_task(task))(scope, receive, send)
            return
        await receive()
        log.append("pool opened")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        log.append("pool closed")
        await send({"type": "lifespan.shutdown.complete"})

    wrapped = DeferredMiddleware(app)

    async def let_go() -> None:
        await anyio.wait_all_tasks_blocked()
        log.append("go")
        go.set()

    async with anyio.create_task_group() as group:
        async with lifespan(wrapped, log):
            await request(wrapped, log)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(let_go)
    assert log == [
        "pool opened",
        "lifespan.startup.complete",
        "http.response.start",
        "http.response.body",
        "returned",
        "go",
        "task",
        "pool closed",
        "lifespan.shutdown.complete",
    ]


async def test_the_lifespan_itself_can_defer() -> None:
    """The lifespan's scope has a list too: what is added at startup runs at once, until the drain."""
    log = Log()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        tasks_from(scope).add_task(log.note, "from the scope")
        defer(log.note, "from the context")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        with pytest.raises(Exception, match="its runner is closed"):
            defer(log.note, "too late")
        await send({"type": "lifespan.shutdown.complete"})

    async with lifespan(DeferredMiddleware(app)):
        await anyio.wait_all_tasks_blocked()
        assert sorted(log) == ["from the context", "from the scope"]


async def test_a_runner_is_entered_more_than_once_at_a_time() -> None:
    """G8: lifespans of one runner may overlap; the end of each drains, and what runs goes on after the first's end."""
    log, runner = Log(), Runner(observers=[])
    first = DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "first")), runner)
    second = DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "second")), runner)
    async with lifespan(first):
        assert await drive(second) == [STARTUP, STARTED, SHUTDOWN, STOPPED]
        await request(first, log)
        async with lifespan(second), runner:
            await request(second, log)
            defer(log.note, "block")
        assert sorted(log) == sorted(
            [*["http.response.start", "http.response.body", "returned"] * 2, "first", "second", "block"]
        )
        await request(first, log)
        assert log[-1] == "returned"
    assert log[-1] == "first"
    assert_conserved(runner)


async def test_a_nested_middleware_leaves_the_lifespan_alone() -> None:
    """Two middlewares with the same runner, one in the other, start it once."""
    runner = Runner()
    log = await drive(DeferredMiddleware(DeferredMiddleware(app_that(), runner), runner))
    assert log == [STARTUP, STARTED, SHUTDOWN, STOPPED]


async def test_a_cancelled_lifespan_abandons_its_tasks(caplog: pytest.LogCaptureFixture) -> None:
    """G2: a server that cancels the lifespan gets its cancellation through, and each task left ends ABANDONED."""
    log = Log()
    wrapped = DeferredMiddleware(
        responder(lambda tasks: [tasks.options(name=name).add_task(anyio.sleep_forever) for name in ("a", "b")]),
        runner=Runner(observers=[log]),
    )
    with anyio.CancelScope() as scope:
        async with lifespan(wrapped):
            await request(wrapped, log)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert log[:4] == ["http.response.start", "http.response.body", "returned", "a RUNNING"]
    assert sorted(log[4:]) == ["a ABANDONED", "b ABANDONED"]
    assert wrapped.runner.statistics() == (2, 0, 0, 0, 0, 0, 0, 0, 2)
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


async def test_outside_asgi() -> None:
    """`async with runner:` lets `defer` work without a request: tasks run at once, and the end of the block drains."""
    log, go, runner = Log(), anyio.Event(), Runner()

    async def task(name: str) -> None:
        log.append(name)
        await go.wait()
        log.append(f"{name} done")

    with pytest.raises(ZeroDivisionError):
        async with runner as entered:
            assert entered is runner
            defer(task, "a")
            defer(task, "b")
            await anyio.wait_all_tasks_blocked()
            log.append("block")
            go.set()
            _ = 1 / 0
    assert sorted(log[:2]) == ["a", "b"]
    assert log[2] == "block"
    assert sorted(log[3:]) == ["a done", "b done"]
