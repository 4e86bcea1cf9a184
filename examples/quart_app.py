"""Quart: `hypercorn examples.quart_app:app`."""

from __future__ import annotations

import logging

from quart import Quart, request

from asgi_deferred import DeferredMiddleware, defer, tasks_from

logger = logging.getLogger(__name__)

app = Quart(__name__)
app.asgi_app = DeferredMiddleware(app.asgi_app)  # type: ignore[method-assign]


async def notify(order: str) -> None:
    logger.info("order %s is on its way", order)


@app.post("/orders/<order>")
async def create(order: str) -> tuple[dict[str, str], int]:
    defer(notify, order)
    tasks_from(request).add_task(logger.info, "bill for %s", order)  # the same list
    return {"order": order}, 201
