"""Litestar: `uvicorn examples.litestar_app:app`."""

from __future__ import annotations

import logging
from typing import Any

from litestar import Litestar, Request, post

from asgi_deferred import DeferredMiddleware, defer, tasks_from

logger = logging.getLogger(__name__)


async def notify(order: str) -> None:
    logger.info("order %s is on its way", order)


@post("/orders/{order:str}")
async def create(request: Request[Any, Any, Any]) -> dict[str, str]:
    order = request.path_params["order"]
    defer(notify, order)
    tasks_from(request).add_task(logger.info, "bill for %s", order)  # the same list
    return {"order": order}


app = DeferredMiddleware(Litestar([create], logging_config=None))
