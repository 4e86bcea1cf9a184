"""Prometheus with several workers: `gunicorn -c examples/prometheus_gunicorn.py examples.prometheus_workers:app`.

The environment's `PROMETHEUS_MULTIPROC_DIR` is a folder that the workers share, and that is empty at the start.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from threading import Event, Thread
from typing import Any

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from asgi_deferred import DeferredMiddleware, Runner, TaskEvent, TaskState
from asgi_deferred.fastapi import Deferred

logger = logging.getLogger(__name__)

EVERY = 5.0  # seconds between two settings of the gauges: less than between two scrapes
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TASK = ("asgi_deferred_task_name", "asgi_deferred_task_state")

DURATION = Histogram("asgi_deferred_task_duration_seconds", "How long tasks ran", TASK, buckets=SECONDS)
QUEUE = Histogram(
    "asgi_deferred_task_queue_duration_seconds", "How long tasks waited after their request", TASK, buckets=SECONDS
)
ENDED = Counter("asgi_deferred_tasks_ended", "Tasks that have ended", TASK)
UNFINISHED = Gauge("asgi_deferred_tasks_unfinished", "Tasks that have not ended", TASK[1:], multiprocess_mode="liveall")
OLDEST = Gauge(
    "asgi_deferred_tasks_oldest_seconds",
    "How long the longest-waiting task could have started",
    multiprocess_mode="liveall",
)
LIMIT = Gauge("asgi_deferred_tasks_limit", "Tasks that may be unfinished at a time", multiprocess_mode="liveall")


def count(event: TaskEvent) -> None:
    if event.state is TaskState.RUNNING:
        return
    task = (event.task.name, event.state.name)
    if event.duration:  # else it never started
        DURATION.labels(*task).observe(event.duration)
    QUEUE.labels(*task).observe(event.waited)
    ENDED.labels(*task).inc()


runner = Runner(observers=[count])


def keep_gauges(over: Event) -> None:
    """Set the gauges in a thread, from the runner's account: a worker whose event loop is stuck has no events."""
    while True:
        counts = runner.statistics()
        UNFINISHED.labels("PENDING").set(counts.pending)
        UNFINISHED.labels("RUNNING").set(counts.running)
        OLDEST.set(runner.oldest)
        LIMIT.set(runner.max_pending)
        if over.wait(EVERY):
            return


@asynccontextmanager
async def lifespan(_: Any) -> AsyncIterator[None]:
    over = Event()
    Thread(target=keep_gauges, args=(over,), daemon=True).start()
    yield  # the runner has drained before this goes on
    over.set()


app = FastAPI(lifespan=lifespan)
app.add_middleware(DeferredMiddleware, runner=runner)

registry = CollectorRegistry()
MultiProcessCollector(registry)


def send_welcome(user: str) -> None:
    logger.info("welcome, %s", user)


@app.post("/signup/{user}", status_code=202)
async def sign_up(user: str, deferred: Deferred) -> dict[str, str]:
    deferred.add_task(send_welcome, user)
    return {"user": user}


@app.get("/metrics")
def metrics() -> Response:
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
