"""What engines cost: recognition for a plain function, and a durable task in a response; `python -m benchmarks.engines`.

Each engine runs in a process of its own, on the application's ASGI interface without a server. A round measures every
contender once, one after the other; figures are medians over the rounds, ratios are taken within each round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from timeit import timeit
from types import FunctionType
from typing import Any

import anyio

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner
from asgi_deferred._engines import recognise
from tests.engines.services import POSTGRES, RABBITMQ, REDIS, database
from tests.engines.test_live import LIVE, SCHEMA
from tests.support import http_scope, no_more_messages, responder

ENGINES = [
    ("taskiq", REDIS),
    ("taskiq", RABBITMQ),
    ("celery", REDIS),
    ("celery", RABBITMQ),
    ("dramatiq", REDIS),
    ("huey", REDIS),
    ("streaq", REDIS),
    ("procrastinate", POSTGRES),
    ("django", POSTGRES),
    ("dbos", "sqlite:"),  # this one and the next do the jobs too, in the process that is measured
    ("dbos", POSTGRES),
]
ROUNDS, REQUESTS = 40, 10


async def nothing() -> None: ...


def plain() -> None: ...


class CallableObject:
    def __call__(self) -> None: ...


async def send(_: Any) -> None: ...


async def measure(engine: Any) -> dict[str, list[float]]:
    """Seconds for each request of each contender, by round."""
    runner = Runner()
    contenders = {
        "bare": DeferredMiddleware(responder(), runner),
        "in-process": DeferredMiddleware(responder(lambda tasks: tasks.add_task(nothing)), runner),
        "after": DeferredMiddleware(responder(lambda tasks: tasks.add_task(engine.job, token="t")), runner),
        "durable": DeferredMiddleware(
            responder(lambda tasks: tasks.options(durable=True).add_task(engine.job, token="t")), runner
        ),
    }
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    async with engine.opened(), runner:
        for number in range(ROUNDS + 2):
            for name, app in contenders.items():
                started = perf_counter()
                for _ in range(REQUESTS):
                    await app(http_scope(), no_more_messages, send)
                    if name == "in-process":
                        await runner.wait_idle()
                if number >= 2:
                    figures[name].append((perf_counter() - started) / REQUESTS)
                await runner.wait_idle()
    assert runner.statistics().failed == 0
    return figures


def durable() -> None:
    print(f"{'response with':28}{'bare':>10}{'one task':>10}{'durable':>10}   durable/bare  durable/one task")
    for engine, broker in ENGINES:
        with ExitStack() as stack:
            prefix = f"asgi-deferred-{uuid.uuid4().hex[:8]}"
            place = stack.enter_context(tempfile.TemporaryDirectory())
            url = stack.enter_context(database(prefix)) if broker == POSTGRES else broker
            url = f"sqlite:///{place}/jobs.sqlite" if broker == "sqlite:" else url
            module = f"{LIVE}.on_django_jobs" if engine == "django" else f"{LIVE}.on_{engine}"
            env = {**os.environ, "BROKER_URL": url, "REDIS_URL": REDIS, "PREFIX": prefix, "PLACE": place}
            if engine == "django":
                env["DJANGO_SETTINGS_MODULE"] = f"{LIVE}.on_django"
            env["PYTHONPATH"] = str(Path.cwd())
            if engine in SCHEMA:
                subprocess.run(SCHEMA[engine], check=True, env=env)
            command = [sys.executable, "-m", "benchmarks.engines", module]
            run = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
        figures = json.loads(run.stdout)
        to_bare, to_task = (
            median(ours / theirs for ours, theirs in zip(figures["durable"], figures[other], strict=True))
            for other in ("bare", "in-process")
        )
        micro = "".join(f"{median(figures[name]) * 1e6:7.0f} µs" for name in ("bare", "in-process", "durable"))
        print(f"{engine + ' on ' + broker.partition(':')[0]:28}{micro}   {to_bare:12.0f}  {to_task:16.1f}", flush=True)


def recognition() -> None:
    number = 10_000

    def fresh() -> DeferredTasks:
        """Make a list of a runner that has no task yet."""
        return DeferredTasks(Runner(max_pending=10**9)._scheduler, {"type": "http"})

    rounds = [
        (
            timeit(partial(fresh().add_task, plain), number=number),
            timeit(lambda: type(plain) is not FunctionType, number=number),
            timeit(lambda: None, number=number),
        )
        for _ in range(9)
    ]
    whole = median(row[0] for row in rounds) / number * 1e9
    check = median(max(0.0, row[1] - row[2]) for row in rounds) / number * 1e9
    print(f"add_task(function): {whole:.0f} ns, of which recognition {check:.1f} ns ({check / whole:.1%})")
    for name, func in {
        "bound method": fresh().add_task,
        "partial": partial(plain),
        "callable object": CallableObject(),
    }.items():
        cost = median(timeit(partial(recognise, func), number=number) for _ in range(5)) / number * 1e9
        print(f"recognise({name}): {cost:.0f} ns")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(anyio.run(measure, import_module(sys.argv[1]))))
    else:
        print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {ROUNDS} rounds of {REQUESTS} requests")
        recognition()
        durable()
