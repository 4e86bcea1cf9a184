"""The shop of the examples, written for plain FastAPI: its own tests as they are, and again with the one line."""

from __future__ import annotations

import asyncio
import inspect
import logging
import smtplib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi import __version__ as fastapi_version
from fastapi.testclient import TestClient

from asgi_deferred import Runner, TaskEvent, TaskState
from asgi_deferred.fastapi import DeferredMiddleware
from examples.shop import admin
from examples.shop import tests as shop_tests
from examples.shop.main import create_app
from examples.shop.resources import Settings
from examples.shop.tests.conftest import Mailbox, client, mailbox, settings, tea
from examples.shop.tests.test_admin import TOKEN

from .support import assert_conserved

__all__ = ["client", "mailbox", "settings", "tea"]  # fixtures

pytestmark = pytest.mark.skipif(
    tuple(int(each) for each in fastapi_version.split(".")[:2]) < (0, 118),
    reason="this FastAPI closes sessions and uploads ahead of its background tasks",
)

TESTS = {
    f"{module.name}_{name}": test
    for module in iter_modules(shop_tests.__path__)
    for name, test in vars(import_module(f"{shop_tests.__name__}.{module.name}")).items()
    if name.startswith("test_")
}
globals().update(TESTS)

# The tasks of each test, in the order in which they end.
ORDER = ["Mailer.send", "Hub.publish"]
TASKS = {
    "test_admin_test_newsletter": ["write_audit", "Mailer.send", "Mailer.send"],
    "test_admin_test_export": [*ORDER, *ORDER, "write_audit", "Mailer.send"],
    "test_admin_test_only_the_owner": [],
    "test_catalog_test_views_are_counted": ["count_view", "count_view"],
    "test_catalog_test_no_such_product": [],
    "test_catalog_test_picture": ["store", "show_picture", "count_view"],
    "test_catalog_test_import": ["import_products", "count_view", "count_view"],
    "test_orders_test_order": ORDER,
    "test_orders_test_not_enough_in_stock": ["Mailer.send", "count_view"],
    "test_orders_test_return": [*ORDER, *ORDER],
    "test_orders_test_invoice": [*ORDER, "Path.unlink"],
}


@pytest.fixture
def ended() -> list[str]:
    return []


@pytest.fixture(params=["plain", "moved"])
def app(request: pytest.FixtureRequest, settings: Settings, ended: list[str]) -> Iterator[FastAPI]:
    app = create_app(settings)
    if request.param == "plain":
        yield app
        return

    def note(event: TaskEvent) -> None:
        if event.state is not TaskState.RUNNING:
            ended.append(f"{event.task.name} {event.state.name}")

    runner = Runner(observers=[note])
    app.add_middleware(DeferredMiddleware, runner=runner)  # the one line
    yield app
    assert_conserved(runner)
    if request.node.originalname in TESTS:
        assert ended == [f"{name} SUCCEEDED" for name in TASKS[request.node.originalname]]


plain = pytest.mark.parametrize("app", ["plain"], indirect=True)
moved = pytest.mark.parametrize("app", ["moved"], indirect=True)

NEWSLETTER = {"recipients": ["ada@example.org", "nobody@example.org", "grace@example.org"], "text": "Tea is back."}


@plain
def test_a_refused_mail_drops_the_next_ones(client: TestClient, mailbox: Mailbox) -> None:
    """What FastAPI does: the first task that fails is the last to run, and its error goes to the server."""
    with pytest.raises(smtplib.SMTPRecipientsRefused):
        client.post("/admin/newsletter", json=NEWSLETTER, headers=TOKEN)
    assert [to for to, _, _ in mailbox.mails] == ["ada@example.org"]


@moved
def test_a_refused_mail_fails_alone(
    client: TestClient, mailbox: Mailbox, ended: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """G3: the next mails are sent, and one log record has the error, the request and the line that added the task."""
    answer = client.post("/admin/newsletter", json=NEWSLETTER, headers=TOKEN)
    assert answer.status_code == 202
    assert [to for to, _, _ in mailbox.mails] == ["ada@example.org", "grace@example.org"]
    assert ended == ["write_audit SUCCEEDED", "Mailer.send SUCCEEDED", "Mailer.send FAILED", "Mailer.send SUCCEEDED"]
    [record] = [each for each in caplog.records if each.name == "asgi_deferred"]
    assert record.levelname == "ERROR"
    assert record.getMessage() == (
        f"Failed: deferred task 'Mailer.send', added at {admin.__file__}:{line_that_adds('mailer.send, recipient')}, "
        "request 'POST /admin/newsletter'"
    )
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], smtplib.SMTPRecipientsRefused)


def line_that_adds(what: str) -> int:
    [line] = [line for line, text in enumerate(inspect.getsource(admin).splitlines(), 1) if what in text]
    return line


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def host(app: FastAPI) -> AsyncIterator[str]:
    """The shop under uvicorn."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await running


class Errors(logging.Handler):
    """Set an event at the first error in the log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first = anyio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.first.set()


@pytest.mark.anyio
@pytest.mark.parametrize(("app", "expected"), [("plain", "cut off"), ("moved", 201)], indirect=["app"])
async def test_the_next_request_on_a_connection(
    host: str, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch, expected: object
) -> None:
    """G3: plain, a task that fails closes the connection while the client's next request is on it; moved over, it does not."""
    refusing, refuse, errors = threading.Event(), mailbox.handle_RCPT, Errors()

    async def refuse_later(*args: Any) -> str:
        await asyncio.to_thread(refusing.wait)
        return await refuse(*args)

    async def body() -> AsyncIterator[bytes]:
        yield b'{"name": "tea", '
        refusing.set()
        with anyio.fail_after(30):
            await errors.first.wait()
        yield b'"stock": 3}'

    monkeypatch.setattr(mailbox, "handle_RCPT", refuse_later)
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers, errors])
    got: object
    async with httpx.AsyncClient(base_url=host, limits=httpx.Limits(max_connections=1), trust_env=False) as client:
        newsletter = {"recipients": ["nobody@example.org"], "text": "Tea is back."}
        assert (await client.post("/admin/newsletter", json=newsletter, headers=TOKEN)).status_code == 202
        try:
            answer = await client.post("/api/products", content=body(), headers={"content-type": "application/json"})
            got = answer.status_code
        except httpx.TransportError:
            got = "cut off"
    assert got == expected


@pytest.mark.parametrize(("app", "written"), [("plain", False), ("moved", True)], indirect=["app"])
def test_audit_of_an_export(client: TestClient, settings: Settings, written: bool) -> None:
    """G11: FastAPI drops the audit of a response with a `background=` of its own; moved over, it is written."""
    assert client.get("/admin/orders.csv", headers=TOKEN).status_code == 200
    assert settings.audit_log.exists() is written


@moved
def test_what_a_refusal_drops_is_named(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """G11: an `HTTPException` drops the tasks added before it, as in FastAPI, and a WARNING names each."""
    assert client.get("/admin/orders.csv").status_code == 403
    [record] = [each for each in caplog.records if each.name == "asgi_deferred"]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        f"Never ran: background task 'write_audit', added at {admin.__file__}:{line_that_adds('write_audit, opened')}, "
        "request 'GET /admin/orders.csv'. "
    )
