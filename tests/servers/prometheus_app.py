"""The example with several workers, its gauges set more often, and a task that blocks its worker's event loop."""

from __future__ import annotations

import os
import time
from pathlib import Path

import anyio

from asgi_deferred.fastapi import Deferred
from examples import prometheus_workers

prometheus_workers.EVERY = 0.05
prometheus_workers.runner.drain_timeout = float(os.environ["DRAIN_TIMEOUT"])
app = prometheus_workers.app


async def block(gate: Path) -> None:
    while not gate.exists():
        time.sleep(0.01)


async def after() -> None: ...


@app.post("/block/{gate}")
async def add_block(gate: str, deferred: Deferred) -> int:
    deferred.add_task(block, Path(os.environ["GATES"]) / gate)
    deferred.add_task(after)
    return os.getpid()


@app.post("/hang")
async def add_hanging(deferred: Deferred) -> None:
    deferred.options(name="hang").add_task(anyio.sleep_forever)
