"""Retries are the function's own business: `uvicorn examples.retries:app`."""

from __future__ import annotations

import httpx
import stamina
from fastapi import FastAPI

from asgi_deferred import DeferredMiddleware
from asgi_deferred.fastapi import Deferred

app = FastAPI()
app.add_middleware(DeferredMiddleware)


@stamina.retry(on=httpx.HTTPError, attempts=5, wait_initial=0.05)
async def call_webhook(url: str, event: str) -> None:
    async with httpx.AsyncClient() as client:
        response = await client.post(url, json={"event": event})
        response.raise_for_status()


@app.post("/orders", status_code=202)
async def order(webhook: str, deferred: Deferred) -> dict[str, str]:
    # The timeout is for all attempts together. If the last one fails, the task FAILED and its traceback is logged.
    deferred.options(timeout=30).add_task(call_webhook, webhook, "order.created")
    return {"status": "accepted"}
