"""The application on a database of its own, with a mail server on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from email import message_from_bytes, policy
from pathlib import Path

import pytest
from aiosmtpd.smtp import SMTP, Envelope, Session
from anyio.from_thread import start_blocking_portal
from fastapi import FastAPI
from fastapi.testclient import TestClient

from examples.shop.main import create_app
from examples.shop.resources import Settings


class Mailbox:
    """The mails that came in, each as its recipient, subject and text. Nobody's address is refused."""

    def __init__(self) -> None:
        self.mails: list[tuple[str, str, str]] = []

    async def start(self) -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(lambda: SMTP(self), "127.0.0.1", 0)

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: object
    ) -> str:
        if address.startswith("nobody@"):
            return "550 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        mail = message_from_bytes(envelope.content, policy=policy.default)
        self.mails += [(to, mail["Subject"], mail.get_content().strip()) for to in envelope.rcpt_tos]
        return "250 OK"


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture
def settings(tmp_path: Path, mailbox: Mailbox) -> Iterator[Settings]:
    with start_blocking_portal() as portal:
        server = portal.call(mailbox.start)
        yield Settings(
            database=f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}",
            media=tmp_path / "media",
            audit_log=tmp_path / "audit.log",
            admin_token="secret",
            smtp_host="127.0.0.1",
            smtp_port=server.sockets[0].getsockname()[1],
        )
        portal.call(server.close)


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture
def tea(client: TestClient) -> int:
    """A product of which three are in stock."""
    product: int = client.post("/api/products", json={"name": "tea", "stock": 3}).json()["id"]
    return product
