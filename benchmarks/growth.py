"""Whether a task costs more when many wait: from 100 to 100 000 of them."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import anyio

from asgi_deferred import DeferredMiddleware, Runner, tasks_from

from ._asgi import bare, receive, scope, send
from ._report import Comparison, Result, progress
from .requests import started

SIZES = [100, 1_000, 10_000, 100_000]


async def _ours(size: int) -> float:
    """Let `size` requests each defer a task while none can run, then run them all."""
    gate = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            tasks_from(scope).add_task(gate.wait)
        await bare(scope, receive, send)

    runner = Runner(max_pending=size, max_concurrency=50)
    async with started({"ours": DeferredMiddleware(app, runner)}) as apps:
        start = perf_counter()
        for _ in range(size):
            await apps["ours"](scope(), receive, send)
        gate.set()
        await runner.wait_idle()
        return (perf_counter() - start) / size * 1e6


async def _starlette(size: int) -> float:
    """The same, where a waiting task is a call that has not returned, in a task as a server makes it."""
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    gate = anyio.Event()

    async def endpoint(request: Request) -> Response:
        return Response(background=BackgroundTask(gate.wait))

    app = Starlette(routes=[Route("/", endpoint)])
    start = perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(size):
            group.start_soon(app, scope(), receive, send)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    return (perf_counter() - start) / size * 1e6


def growth(factor: float) -> Result:
    rounds = max(3, round(5 * factor))
    samples: dict[str, list[float]] = {}
    for size in SIZES:
        for name, run in {"ours": _ours, "Starlette": _starlette}.items():
            samples[f"{name} @ {size}"] = []
            anyio.run(run, min(size, 1000))
    for index in range(rounds):
        progress(f"growth: round {index} of {rounds}")
        for size in SIZES:
            for name, run in {"ours": _ours, "Starlette": _starlette}.items():
                # As many tasks in all for each size, so that the small ones are not measured on a few milliseconds.
                repeats = max(1, 10_000 // size)
                total = sum(anyio.run(run, size) for _ in range(repeats))
                samples[f"{name} @ {size}"].append(total / repeats)
    first, last = SIZES[0], SIZES[-1]
    return Result(
        "growth",
        "A waiting task, added and run, as their number grows",
        "µs for each task",
        f"in process, {rounds} interleaved rounds after a warm-up, medians; one task for each request, all waiting at "
        "once, 50 run at a time; garbage collector on, as in a server",
        samples,
        [
            Comparison(f"ours @ {last}", f"ours @ {first}", 1.5),
            Comparison(f"Starlette @ {last}", f"Starlette @ {first}"),
            Comparison(f"ours @ {last}", f"Starlette @ {last}"),
        ],
        x="waiting tasks",
    )
