"""Sets Django up, once in this process, and drives an ASGI application by hand.

Import it before anything that needs Django's settings.
"""

# ruff: noqa: E402 - Django is set up between imports

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from anyio import Event, create_task_group

import django
from asgi_deferred import Runner

_folder = tempfile.TemporaryDirectory()
atexit.register(_folder.cleanup)
os.environ["DJPROJECT_SQLITE"] = str(Path(_folder.name) / "db.sqlite3")
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.django.djproject.settings"
django.setup()

from django.core.handlers.asgi import ASGIHandler
from django.core.management import call_command

from asgi_deferred.django import DeferredMiddleware

from .djproject.journal import journal

call_command("migrate", run_syncdb=True, verbosity=0)


def wrapped(runner: Runner | None = None, app: Any = None) -> DeferredMiddleware:
    return DeferredMiddleware(ASGIHandler() if app is None else app, runner)


async def request(app: Any, path: str, query: str = "") -> list[str]:
    """Make a request as a server without lifespan does; return what happened, in order."""
    journal.clear()
    asked = False

    async def receive() -> Any:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        return await Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            journal.append(str(message["status"]))
        elif not message.get("more_body"):
            journal.append("sent")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "query_string": query.encode(),
        "headers": [(b"host", b"testserver")],
    }
    await app(scope, receive, send)
    return journal.copy()


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[list[str]]:
    """Run the lifespan as a server does; yields what it sends."""
    sent: list[str] = []
    started, stop = Event(), Event()
    phases = iter(("startup", "shutdown"))

    async def receive() -> Any:
        phase = next(phases)
        if phase == "shutdown":
            await stop.wait()
        return {"type": f"lifespan.{phase}"}

    async def send(message: Any) -> None:
        sent.append(message["type"])
        started.set()

    async with create_task_group() as group:
        group.start_soon(app, {"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
        await started.wait()
        yield sent
        stop.set()
