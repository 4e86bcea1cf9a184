"""The applications that the benchmarks serve: the same endpoints, deferred the way each library's docs say to.

`BENCHMARKS_APP` in the environment names the one to make: a server imports `benchmarks.served:app`.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import anyio
from asgi_background import BackgroundTaskMiddleware
from asgi_background import BackgroundTasks as DetachedTasks
from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import PlainTextResponse
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.routing import Route

from asgi_deferred import DeferredMiddleware, Runner, tasks_from

_final = 0.0
_waits: list[float] = []
_gate = threading.Event()


async def quick() -> None:
    """Do nothing, but note how long after the final message this was called."""
    _waits.append(time.perf_counter() - _final)


def blocking() -> None:
    time.sleep(0.05)


def gated() -> None:
    _gate.wait()


async def slow() -> None:
    """Take long enough to be under way at a shutdown, and write down that it got to its end."""
    await anyio.sleep(float(os.environ["BENCHMARKS_SLOW"]))
    with Path(os.environ["BENCHMARKS_DONE"]).open("a") as done:
        done.write("done\n")


async def waits(request: Request) -> PlainTextResponse:
    """Return the waits noted since the last call, in microseconds."""
    text = " ".join(f"{wait * 1e6:.1f}" for wait in _waits)
    _waits.clear()
    return PlainTextResponse(text)


async def memory(request: Request) -> PlainTextResponse:
    """Return the process's resident memory, in bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return PlainTextResponse(str(pages * os.sysconf("SC_PAGE_SIZE")))


async def plain(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


def plain_sync(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


COMMON = {"/waits": waits, "/memory": memory, "/async": plain, "/sync": plain_sync}
TASKS: dict[str, tuple[Any, int]] = {
    "/quick": (quick, 1),
    "/blocking": (blocking, 10),
    "/gated": (gated, 1),
    "/slow": (slow, 1),
}


def in_starlette() -> Any:
    from starlette.background import BackgroundTasks

    def endpoint(task: Any, count: int) -> Any:
        async def respond(request: Request) -> PlainTextResponse:
            if count == 1:
                return PlainTextResponse("ok", background=BackgroundTask(task))
            tasks = BackgroundTasks()
            for _ in range(count):
                tasks.add_task(task)
            return PlainTextResponse("ok", background=tasks)

        return respond

    return _starlette(endpoint)


def ours_in_starlette() -> Any:
    def endpoint(task: Any, count: int) -> Any:
        async def respond(request: Request) -> PlainTextResponse:
            tasks = tasks_from(request)
            for _ in range(count):
                tasks.add_task(task)
            return PlainTextResponse("ok")

        return respond

    return DeferredMiddleware(_starlette(endpoint), _runner())


def asgi_background() -> Any:
    def endpoint(task: Any, count: int) -> Any:
        async def respond(request: Request) -> PlainTextResponse:
            tasks = DetachedTasks(request.scope)
            for _ in range(count):
                await tasks.add_task(task)
            return PlainTextResponse("ok")

        return respond

    return BackgroundTaskMiddleware(_starlette(endpoint))


def _starlette(endpoint: Any) -> Starlette:
    routes = [Route(path, function) for path, function in COMMON.items()]
    routes += [Route(path, endpoint(task, count)) for path, (task, count) in TASKS.items()]
    return Starlette(routes=routes)


def in_fastapi() -> Any:
    def endpoint(task: Any, count: int) -> Any:
        async def respond(background_tasks: BackgroundTasks) -> PlainTextResponse:
            for _ in range(count):
                background_tasks.add_task(task)
            return PlainTextResponse("ok")

        return respond

    return _fastapi(endpoint)


def ours_in_fastapi() -> Any:
    def endpoint(task: Any, count: int) -> Any:
        async def respond(request: Request) -> PlainTextResponse:
            tasks = tasks_from(request)
            for _ in range(count):
                tasks.add_task(task)
            return PlainTextResponse("ok")

        return respond

    return DeferredMiddleware(_fastapi(endpoint), _runner())


def _fastapi(endpoint: Any) -> FastAPI:
    app = FastAPI(openapi_url=None)
    for path, function in COMMON.items():
        app.get(path, response_class=PlainTextResponse)(function)
    for path, (task, count) in TASKS.items():
        app.get(path, response_class=PlainTextResponse)(endpoint(task, count))
    return app


def _runner() -> Runner:
    return Runner(max_pending=100_000)


class NoteFinal:
    """Around everything, library included: note when the final message goes to the server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def noting(message: Any) -> None:
            global _final
            if message["type"] == "http.response.body" and not message.get("more_body"):
                _final = time.perf_counter()
            await send(message)

        await self.app(scope, receive, noting)


APPS = {
    "Starlette": in_starlette,
    "FastAPI": in_fastapi,
    "asgi-background": asgi_background,
    "ours in Starlette": ours_in_starlette,
    "ours in FastAPI": ours_in_fastapi,
}

if chosen := os.environ.get("BENCHMARKS_APP"):
    app = APPS[chosen]()
    if os.environ.get("BENCHMARKS_NOTE"):
        app = NoteFinal(app)
