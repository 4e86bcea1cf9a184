"""Prometheus in one process, through OpenTelemetry: `uvicorn examples.prometheus_one_process:app`."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Response
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest

from asgi_deferred import DeferredMiddleware, Runner
from asgi_deferred.fastapi import Deferred
from asgi_deferred.opentelemetry import instrument

logger = logging.getLogger(__name__)

runner = Runner()
instrument(runner, meter_provider=MeterProvider([PrometheusMetricReader()]))
Gauge("asgi_deferred_tasks_limit", "Tasks that may be unfinished at a time").set(runner.max_pending)

app = FastAPI()
app.add_middleware(DeferredMiddleware, runner=runner)


def send_welcome(user: str) -> None:
    logger.info("welcome, %s", user)


@app.post("/signup/{user}", status_code=202)
async def sign_up(user: str, deferred: Deferred) -> dict[str, str]:
    deferred.add_task(send_welcome, user)
    return {"user": user}


@app.get("/metrics")
def metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
