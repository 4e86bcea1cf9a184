"""Log records as those read them who collect logs: python-json-logger, structlog and Sentry."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
import sentry_sdk
import structlog
from pythonjsonlogger.json import JsonFormatter
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.transport import Transport

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner

from .support import Log, http_scope, no_more_messages, responder
from .test_docs import shown

pytestmark = pytest.mark.anyio

FIELDS = {"task_name", "task_state", "task_added_at", "task_request", "task_queued", "task_duration"}


async def fails(secret: str) -> None:
    raise ValueError("it failed")


async def hangs(secret: str) -> None:
    await anyio.sleep_forever()


async def hangs_too(secret: str) -> None:
    await anyio.sleep_forever()


async def serve(*functions: Any, path: str = "/", runner: Runner | None = None) -> None:
    def add(tasks: DeferredTasks) -> None:
        for function in functions:
            tasks.add_task(function, "hunter2")

    wrapped = DeferredMiddleware(responder(add), runner)
    await wrapped(http_scope(path), no_more_messages, Log().send)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What a handler of the library's logger writes."""
    written, logger = io.StringIO(), logging.getLogger("asgi_deferred")
    handler = logging.StreamHandler(written)
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)


def format_by(formatter: logging.Formatter) -> None:
    logging.getLogger("asgi_deferred").handlers[-1].setFormatter(formatter)


def check(line: dict[str, Any]) -> None:
    assert FIELDS <= line.keys()
    assert (line["task_name"], line["task_state"], line["task_request"]) == ("fails", "FAILED", "GET /signup")
    assert isinstance(line["task_duration"], float)
    assert "hunter2" not in repr(line)


async def test_python_json_logger(stream: io.StringIO) -> None:
    """G3: python-json-logger writes the fields of a failed task, and no argument."""
    format_by(JsonFormatter())
    await serve(fails, path="/signup")
    check(json.loads(stream.getvalue()))


async def test_structlog(stream: io.StringIO) -> None:
    """G3: structlog's formatter writes the fields of a failed task, and no argument."""
    processors: list[Any] = [structlog.stdlib.ExtraAdder(), structlog.processors.format_exc_info]
    render = structlog.processors.JSONRenderer()
    format_by(structlog.stdlib.ProcessorFormatter(render, foreign_pre_chain=processors))
    await serve(fails, path="/signup")
    check(json.loads(stream.getvalue().splitlines()[0]))


class Recorder(Transport):
    """Keeps events, and sends none."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        event = envelope.get_event()
        assert event is not None
        self.events.append(dict(event))


@pytest.fixture
def sentry() -> Iterator[Recorder]:
    """Sentry as the documentation sets it up, with a transport that records."""
    namespace: dict[str, Any] = {}
    exec(shown("def before_send"), namespace)
    recorder = Recorder()
    with sentry_sdk.isolation_scope():
        client = sentry_sdk.Client(
            "http://key@127.0.0.1:9/1",
            transport=recorder,
            before_send=namespace["before_send"],
            include_local_variables=False,
            integrations=[LoggingIntegration()],
            default_integrations=False,
        )
        before = sentry_sdk.get_global_scope().client
        sentry_sdk.get_global_scope().set_client(client)
        yield recorder
        sentry_sdk.get_global_scope().set_client(before)
        client.close()


async def test_sentry(sentry: Recorder) -> None:
    """G3: each failure is one event, with its task's tags, a fingerprint of its own, and no argument."""
    await serve(fails, hangs, hangs_too, path="/signup", runner=Runner(timeout=0.01))
    told = [(event["tags"]["task"], event["tags"]["request"], event["fingerprint"]) for event in sentry.events]
    assert told == [(name, "GET /signup", ["{{ default }}", name]) for name in ("fails", "hangs", "hangs_too")]
    types = [event["exception"]["values"][-1]["type"] for event in sentry.events]
    assert types == ["ValueError", "TaskTimedOut", "TaskTimedOut"]
    assert "hunter2" not in repr(sentry.events)


async def test_sentry_and_two_requests(sentry: Recorder) -> None:
    """G5: what one request tells Sentry of itself is not in the event of another's task."""

    def add(name: str) -> Any:
        def tagged(tasks: DeferredTasks) -> None:
            sentry_sdk.get_isolation_scope().set_tag("user", name)
            tasks.add_task(fails, "hunter2")

        return tagged

    async def one(name: str) -> None:
        with sentry_sdk.isolation_scope():  # as Sentry's own middleware does around each request
            await DeferredMiddleware(responder(add(name)))(http_scope(f"/{name}"), no_more_messages, Log().send)

    async with anyio.create_task_group() as group:
        for name in ("ada", "bob"):
            group.start_soon(one, name)
    told = sorted((event["tags"]["user"], event["tags"]["request"]) for event in sentry.events)
    assert told == [("ada", "GET /ada"), ("bob", "GET /bob")]
