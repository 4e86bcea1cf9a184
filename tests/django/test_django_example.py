"""The example project, as its manage.py says to run it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from email import message_from_bytes, policy
from pathlib import Path

import httpx
import pytest
from aiosmtpd.smtp import SMTP, Envelope, Session
from anyio import Event, fail_after, sleep

import django

from .serve import COMMANDS, ROOT, serve

if django.VERSION < (6, 0):
    pytest.skip("the example uses django.tasks, which came with Django 6.0", allow_module_level=True)

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

PROJECT = ROOT / "examples" / "django_project"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Mailbox:
    def __init__(self) -> None:
        self.mails: list[tuple[list[str], str]] = []
        self.arrived = Event()

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        mail = message_from_bytes(envelope.content, policy=policy.default)
        self.mails.append((envelope.rcpt_tos, mail.get_content().strip()))
        self.arrived.set()
        return "250 OK"


@pytest.fixture(params=["sqlite", "postgres"])
def environ(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    environ = {"DJANGO_SETTINGS_MODULE": "project.settings", "DATA_DIR": str(tmp_path)}
    if request.param == "postgres":
        environ["DATABASE_URL"] = request.getfixturevalue("database")
    return environ


@pytest.mark.parametrize("name", COMMANDS)
async def test_example(name: str, environ: dict[str, str]) -> None:
    """An upload is answered, then fingerprinted by a task and acknowledged by a mail; a refused one by neither."""
    mailbox = Mailbox()
    smtp = await asyncio.get_running_loop().create_server(lambda: SMTP(mailbox), "127.0.0.1", 0)
    environ |= {"EMAIL_HOST": "127.0.0.1", "EMAIL_PORT": str(smtp.sockets[0].getsockname()[1])}
    content = b"a document" * 100_000
    async with smtp:
        with serve(name, "project.asgi:application", environ, PROJECT, migrate=True) as server:
            async with httpx.AsyncClient(base_url=f"http://{server.address}") as client:
                refused = await client.post("/documents/", data={"email": "eve@example.org"})
                assert refused.status_code == 400
                response = await client.post(
                    "/documents/", data={"email": "ada@example.org"}, files={"file": ("a.txt", content)}
                )
                assert (response.status_code, response.json()) == (202, {"id": 1})
                with fail_after(30):
                    while not (await client.get("/documents/1/")).json()["sha256"]:
                        await sleep(0.01)
                    await mailbox.arrived.wait()
                found = (await client.get("/documents/1/")).json()
            await asyncio.to_thread(server.terminate)
    assert found == {"id": 1, "sha256": hashlib.sha256(content).hexdigest()}
    assert mailbox.mails == [(["ada@example.org"], "It is number 1.")]
    assert [line for line in server.lines if "Traceback" in line] == []


def test_checks(tmp_path: Path) -> None:
    """The example passes Django's own checks and has no migration to make."""
    environ = {**os.environ, "DATA_DIR": str(tmp_path)}  # of the database that Django makes to look
    for command in (["check"], ["makemigrations", "--check", "--dry-run"]):
        subprocess.run([sys.executable, "manage.py", *command], cwd=PROJECT, env=environ, check=True)
