"""Defers the job of the engine that the environment names, and tells what became of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_deferred import DeferredMiddleware, Runner, TaskEvent, TaskState, tasks_from
from examples.requeue_abandoned import keep_abandoned
from examples.requeue_abandoned import lifespan as rerun_abandoned

engine = import_module(os.environ["ENGINE"])
transcript: list[str] = []


def note(event: TaskEvent) -> None:
    if event.state is not TaskState.RUNNING:
        transcript.append(f"{event.task.name} {event.state.name}")


def plain() -> None: ...


class Kill:
    """An engine of its own, whose one job is to end the broker."""

    def __defer_enqueue__(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)


async def submit(request: Request) -> JSONResponse:
    tasks = tasks_from(request)
    tasks.add_task(plain)
    adder = tasks.options(durable="durable" in request.query_params, name="job")
    for token in request.query_params.getlist("token"):
        if token.startswith("kill-"):
            tasks.options(durable=True, name="kill").add_task(Kill(), int(token.removeprefix("kill-")))
        elif "identified" in request.query_params:
            adder.add_task(engine.identified(token), token)
        else:
            adder.add_task(engine.job, token=token)
    return JSONResponse({"web": os.getpid()}, 202)


def plain_job(token: str) -> None:
    (Path(os.environ["PLACE"]) / f"{token}.plain").touch()


async def stuck(request: Request) -> JSONResponse:
    """Defer, behind a task that never ends, a job and a plain task for each token."""
    tasks = tasks_from(request)
    tasks.add_task(threading.Event().wait)
    for token in request.query_params.getlist("token"):
        tasks.add_task(engine.job, token=token)
        tasks.add_task(plain_job, token)
    return JSONResponse({}, 202)


async def look(request: Request) -> JSONResponse:
    return JSONResponse(await engine.look(request.query_params["token"]))


async def tell(request: Request) -> JSONResponse:
    told = [*transcript]
    transcript.clear()
    return JSONResponse(told)


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    async with engine.opened(), rerun_abandoned(app):
        yield


routes = [
    Route("/submit", submit, methods=["POST"]),
    Route("/stuck", stuck, methods=["POST"]),
    Route("/look", look),
    Route("/tell", tell),
]
runner = Runner(
    observers=[note, keep_abandoned],
    enqueue_timeout=float(os.environ.get("ENQUEUE_TIMEOUT", "5")),
    drain_timeout=float(os.environ.get("DRAIN_TIMEOUT", "20")),
)
app = DeferredMiddleware(Starlette(routes=routes, lifespan=lifespan), runner)
