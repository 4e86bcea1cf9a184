"""Requests in one process: no server, no socket, a `send` that does nothing.

What is left is what the library costs. Each contender is called the way a server calls it, and is run the way its
documentation says to.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing import get_context
from queue import SimpleQueue
from threading import Thread
from time import perf_counter, process_time
from typing import Any

import anyio
import trio
from asgi_background import BackgroundTaskMiddleware, BackgroundTasks
from asgi_lifespan import LifespanManager
from fastapi import BackgroundTasks as InjectedTasks
from fastapi import FastAPI
from fastapi.responses import Response as FastAPIResponse
from litestar import Litestar, get
from litestar import Response as LitestarResponse
from litestar.background_tasks import BackgroundTask as LitestarTask
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.background import BackgroundTasks as StarletteTasks
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asgi_deferred import DeferredMiddleware, Runner, tasks_from

from ._asgi import Needed, PassThrough, bare, receive, scope, send
from ._report import Comparison, Result, progress

Call = Callable[[list[dict[str, Any]]], Awaitable[None]]

PROCESSES = 10
IN_PROCESS = "µs of processor time for each request"
WAITING = "µs for each request"
LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}
if sys.version_info >= (3, 12):

    def _eager() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    LOOPS["eager"] = {"backend": "asyncio", "backend_options": {"loop_factory": _eager}}


class Ended:
    """Counts the tasks that ended, so that a request is timed to the end of its task."""

    def __init__(self) -> None:
        self.count = 0

    async def task(self) -> None:
        self.count += 1


def _sync_task() -> None:
    pass


async def interleave(
    contenders: dict[str, Call], rounds: int, calls: int, what: str, clock: Callable[[], float] = process_time
) -> dict[str, list[float]]:
    """Time each contender's `calls` requests in each round; microseconds for each request, of the processor's time."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for name in names:
        await contenders[name]([scope() for _ in range(500)])
    for index in range(rounds):
        if index % 10 == 0:
            progress(f"{what}: round {index} of {rounds}")
        shift = index % len(names)
        gc.collect()
        gc.disable()
        for name in names[shift:] + names[:shift]:
            scopes = [scope() for _ in range(calls)]
            start = clock()
            await contenders[name](scopes)
            samples[name].append((clock() - start) / calls * 1e6)
        gc.enable()
    return samples


def method(rounds: int, calls: int) -> str:
    return (
        f"in process, {rounds} interleaved rounds of {calls} requests after a warm-up, medians; "
        "garbage collector run before each round and off during it"
    )


def returning(app: Any) -> Call:
    """Requests one after the other, each until the application's call returns."""

    async def run(scopes: list[dict[str, Any]]) -> None:
        for one in scopes:
            await app(one, receive, send)

    return run


def to_its_end(app: Any, ended: Ended) -> Call:
    """Requests one after the other, each until its task has ended too."""
    turn = asyncio.sleep if _on_asyncio() else trio.sleep

    async def run(scopes: list[dict[str, Any]]) -> None:
        for one in scopes:
            wanted = ended.count + 1
            await app(one, receive, send)
            while ended.count < wanted:
                await turn(0)

    return run


def _on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@asynccontextmanager
async def started(apps: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Run the applications' lifespans, as a server does."""
    async with AsyncExitStack() as stack:
        for app in apps.values():
            await stack.enter_async_context(LifespanManager(app))
        yield apps


async def _no_tasks(rounds: int, what: str) -> dict[str, list[float]]:
    apps = {
        "bare app": bare,
        "wraps send": PassThrough(bare),
        "the least needed": Needed(bare),
        "asgi-background": BackgroundTaskMiddleware(bare),
        "ours": DeferredMiddleware(bare),
    }
    async with started(apps):
        return await interleave({name: returning(app) for name, app in apps.items()}, rounds, 500, what)


def _no_tasks_in_a_process(rounds: int, what: str) -> dict[str, list[float]]:
    return anyio.run(_no_tasks, rounds, what)


def no_tasks(factor: float) -> Result:
    rounds = round(40 * factor)
    samples: dict[str, list[float]] = {}
    # Where a process has its objects, and in which order its dictionaries, moves these figures by a tenth.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for index in range(PROCESSES):
            measured = pool.submit(_no_tasks_in_a_process, rounds, f"no-tasks, process {index} of {PROCESSES}").result()
            for name, figures in measured.items():
                samples.setdefault(name, []).extend(figures)
    return Result(
        "no-tasks",
        "A request without tasks",
        IN_PROCESS,
        f"{PROCESSES} processes, {method(rounds, 500)}; the ratios are of what each adds to the bare app",
        samples,
        [
            Comparison("ours", "wraps send", 2.5, "bare app"),
            Comparison("ours", "asgi-background", 1.6, "bare app"),
            Comparison("the least needed", "wraps send", None, "bare app"),
        ],
    )


def no_tasks_loops(factor: float) -> Result:
    rounds = round(60 * factor)
    samples = {}
    comparisons = []
    for loop, options in LOOPS.items():
        measured = anyio.run(_no_tasks, rounds, loop, **options)
        samples |= {f"{loop}: {name}": figures for name, figures in measured.items()}
        for peer in ("wraps send", "asgi-background"):
            comparisons.append(Comparison(f"{loop}: ours", f"{loop}: {peer}", None, f"{loop}: bare app"))
    title = "A request without tasks, on each event loop"
    return Result("no-tasks-loops", title, IN_PROCESS, method(rounds, 500), samples, comparisons)


def deferring(ended: Ended) -> Any:
    """Make the application that defers the task."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            tasks_from(scope).add_task(ended.task)
        await bare(scope, receive, send)

    return app


def raw_apps(ended: Ended) -> dict[str, Any]:
    """The two libraries that take any ASGI application."""

    async def asgi_background(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await BackgroundTasks(scope).add_task(ended.task)
        await bare(scope, receive, send)

    return {"asgi-background": BackgroundTaskMiddleware(asgi_background), "ours": DeferredMiddleware(deferring(ended))}


@asynccontextmanager
async def woken(ended: Ended) -> AsyncIterator[Any]:
    """Make the least that can be: a request wakes a task that is there already, and forgets it. On asyncio only."""
    loop = asyncio.get_running_loop()
    summons: asyncio.Future[None] = loop.create_future()

    async def work() -> None:
        nonlocal summons
        while True:
            await summons
            summons = loop.create_future()
            await ended.task()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await bare(scope, receive, send)
        summons.set_result(None)

    worker = loop.create_task(work())
    try:
        yield app
    finally:
        worker.cancel()


def framework_apps(ended: Ended) -> dict[str, Any]:
    async def in_starlette(request: Request) -> Response:
        return Response(background=BackgroundTask(ended.task))

    async def ours_in_starlette(request: Request) -> Response:
        tasks_from(request).add_task(ended.task)
        return Response()

    in_fastapi = FastAPI(openapi_url=None)

    @in_fastapi.get("/", response_class=FastAPIResponse)
    async def _(background_tasks: InjectedTasks) -> FastAPIResponse:
        background_tasks.add_task(ended.task)
        return FastAPIResponse()

    ours_in_fastapi = FastAPI(openapi_url=None)

    @ours_in_fastapi.get("/", response_class=FastAPIResponse)
    async def _(request: Request) -> FastAPIResponse:
        tasks_from(request).add_task(ended.task)
        return FastAPIResponse()

    @get("/", media_type="text/plain")
    async def in_litestar() -> LitestarResponse[str]:
        return LitestarResponse("", background=LitestarTask(ended.task))

    return {
        "Starlette": Starlette(routes=[Route("/", in_starlette)]),
        "ours in Starlette": DeferredMiddleware(Starlette(routes=[Route("/", ours_in_starlette)])),
        "FastAPI": in_fastapi,
        "ours in FastAPI": DeferredMiddleware(ours_in_fastapi),
        "Litestar": Litestar([in_litestar], openapi_config=None),
    }


async def _one_task(rounds: int, what: str, frameworks: bool) -> dict[str, list[float]]:
    ended = Ended()
    apps = raw_apps(ended) | (framework_apps(ended) if frameworks else {})
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(started(apps))
        if frameworks:
            apps["a woken task"] = await stack.enter_async_context(woken(ended))
        contenders = {name: to_its_end(app, ended) for name, app in apps.items()}
        return await interleave(contenders, rounds, 50, what)


def one_task(factor: float) -> Result:
    rounds = round(300 * factor)
    return Result(
        "one-task",
        "A request with one async no-op task, to the task's end",
        IN_PROCESS,
        method(rounds, 50),
        anyio.run(_one_task, rounds, "one-task", True),
        [
            Comparison("ours", "asgi-background", 0.8),
            Comparison("a woken task", "asgi-background"),
            Comparison("ours in Starlette", "Starlette"),
            Comparison("ours in FastAPI", "FastAPI"),
            Comparison("ours in Starlette", "Litestar"),
        ],
    )


def one_task_loops(factor: float) -> Result:
    rounds = round(150 * factor)
    samples = {}
    comparisons = []
    for loop, options in LOOPS.items():
        measured = anyio.run(_one_task, rounds, loop, False, **options)
        samples |= {f"{loop}: {name}": figures for name, figures in measured.items()}
        comparisons.append(Comparison(f"{loop}: ours", f"{loop}: asgi-background"))
    title = "One async no-op task to its end, on each event loop"
    return Result("one-task-loops", title, IN_PROCESS, method(rounds, 50), samples, comparisons)


async def _sync_tasks(rounds: int) -> dict[str, list[float]]:
    async def in_starlette(request: Request) -> Response:
        tasks = StarletteTasks()
        for _ in range(8):
            tasks.add_task(_sync_task)
        return Response(background=tasks)

    async def ours_in_starlette(request: Request) -> Response:
        tasks = tasks_from(request)
        for _ in range(8):
            tasks.add_task(_sync_task)
        return Response()

    async def no_task(request: Request) -> Response:
        return Response()

    runner = Runner()
    plain = Starlette(routes=[Route("/", no_task)])
    theirs = Starlette(routes=[Route("/", in_starlette)])
    ours = DeferredMiddleware(Starlette(routes=[Route("/", ours_in_starlette)]), runner)

    async def run_ours(scopes: list[dict[str, Any]]) -> None:
        for one in scopes:
            await ours(one, receive, send)
            await runner.wait_idle()

    jobs: SimpleQueue[asyncio.Future[None] | None] = SimpleQueue()
    loop = asyncio.get_running_loop()

    def work() -> None:
        while (ended := jobs.get()) is not None:
            for _ in range(8):
                _sync_task()
            loop.call_soon_threadsafe(ended.set_result, None)

    async def run_woken(scopes: list[dict[str, Any]]) -> None:
        for one in scopes:
            await plain(one, receive, send)
            ended = loop.create_future()
            jobs.put(ended)
            await ended

    Thread(target=work).start()
    try:
        async with started({"theirs": theirs, "ours": ours}):
            contenders: dict[str, Call] = {
                "Starlette": returning(theirs),
                "ours in Starlette": run_ours,
                "a woken thread": run_woken,
            }
            return await interleave(contenders, rounds, 10, "sync-tasks", perf_counter)
    finally:
        jobs.put(None)


def sync_tasks(factor: float) -> Result:
    rounds = round(100 * factor)
    return Result(
        "sync-tasks",
        "A request with 8 sync no-op tasks, to the end of the last",
        WAITING,
        method(rounds, 10),
        anyio.run(_sync_tasks, rounds),
        [Comparison("ours in Starlette", "Starlette", 0.2), Comparison("a woken thread", "Starlette")],
    )
