"""Probes of liveness and readiness, as Kubernetes asks for: `uvicorn examples.probes:app`."""

from __future__ import annotations

from fastapi import FastAPI, Response

from asgi_deferred import DeferredMiddleware, Runner

runner = Runner(max_pending=1000)

app = FastAPI()
app.add_middleware(DeferredMiddleware, runner=runner)


@app.get("/alive")
async def alive() -> None:
    """Look at nothing: this answers while the event loop is not stuck. A restart would lose the backlog."""


@app.get("/ready")
async def ready() -> Response:
    """Take no more requests while the backlog is nearly full."""
    counts = runner.statistics()
    full = counts.pending + counts.running >= 0.9 * runner.max_pending
    return Response(status_code=503 if full else 200)
