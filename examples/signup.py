"""A signup that answers at once, then sends a mail, checksums the upload, and writes a log line.

Run it with `python -m examples.signup`. All of it is real and on loopback: uvicorn, an SMTP server, an HTTP client.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import EmailMessage
from time import perf_counter
from typing import Annotated

import aiosmtplib
import httpx
import uvicorn
from aiosmtpd.smtp import SMTP, Envelope, Session
from fastapi import FastAPI, Form, UploadFile

from asgi_deferred import DeferredMiddleware, Runner, TaskEvent
from asgi_deferred.fastapi import Deferred

logger = logging.getLogger("signup")


class Clock:
    zero = perf_counter()

    def say(self, who: str, what: str) -> None:
        print(f"{(perf_counter() - self.zero) * 1000:7.1f} ms  {who:<6}  {what}", flush=True)


clock = Clock()


async def send_welcome(smtp_port: int, to: str) -> None:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "hello@example.org", to, "Welcome"
    mail.set_content("Good to have you here.")
    await aiosmtplib.send(mail, hostname="127.0.0.1", port=smtp_port)


def checksum(name: str | None, data: bytes) -> None:  # sync, so it runs in a worker thread
    clock.say("task", f"  {name}: sha256 {hashlib.sha256(data).hexdigest()[:12]}...")


def report(event: TaskEvent) -> None:
    clock.say("task", f"{event.task.name} {event.state.value}")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    clock.say("app", "shuts down: its pools are open until here, after the last task")


def make_app(smtp_port: int) -> tuple[FastAPI, Runner]:
    app = FastAPI(lifespan=lifespan)
    runner = Runner(observers=[report])
    app.add_middleware(DeferredMiddleware, runner=runner)

    @app.post("/signup", status_code=202)
    async def signup(email: Annotated[str, Form()], avatar: UploadFile, deferred: Deferred) -> dict[str, str]:
        data = await avatar.read()  # here, as the file is closed when the request ends
        deferred.options(timeout=10).add_task(send_welcome, smtp_port, email)
        deferred.add_task(checksum, avatar.filename, data)
        deferred.options(name="log").add_task(logger.info, "new user: %s", email)
        return {"status": "accepted"}

    return app, runner


class Mailbox:
    """What the SMTP server does with a mail: keep it, and take its time over it as mail servers do."""

    def __init__(self) -> None:
        self.mails: list[Envelope] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        await asyncio.sleep(0.5)
        self.mails.append(envelope)
        clock.say("smtp", f"  got a mail for {', '.join(envelope.rcpt_tos)}")
        return "250 OK"


async def main() -> int:
    logging.basicConfig(format="                    log     %(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    mailbox = Mailbox()
    smtp = await asyncio.get_running_loop().create_server(lambda: SMTP(mailbox), "127.0.0.1", 0)
    app, runner = make_app(smtp.sockets[0].getsockname()[1])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/signup"
        async with httpx.AsyncClient(trust_env=False) as client:
            files = {"avatar": ("cat.png", os.urandom(1_000_000))}
            clock.zero = perf_counter()
            clock.say("client", f"POST {url}")
            response = await client.post(url, data={"email": "ada@example.org"}, files=files)
            clock.say("client", f"{response.status_code} {response.reason_phrase}")
        clock.say("server", "is told to stop, while the tasks run")
        server.should_exit = True
        await serving
    smtp.close()
    counts = runner.statistics()
    clock.say("runner", f"{counts.accepted} tasks accepted, {counts.succeeded} succeeded")
    return 0 if (response.status_code, counts.succeeded, len(mailbox.mails)) == (202, 3, 1) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
