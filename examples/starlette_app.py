"""Starlette: `uvicorn examples.starlette_app:app`."""

from __future__ import annotations

import logging

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_deferred import tasks_from
from asgi_deferred.starlette import DeferredMiddleware

logger = logging.getLogger(__name__)


async def notify(order: str) -> None:
    logger.info("order %s is on its way", order)


async def create(request: Request) -> JSONResponse:
    order = request.path_params["order"]
    tasks_from(request).add_task(notify, order)
    return JSONResponse({"order": order})


async def create_as_before(request: Request) -> JSONResponse:
    order = request.path_params["order"]  # code that knows nothing of us: the middleware moves `background` over
    return JSONResponse({"order": order}, background=BackgroundTask(notify, order))


new = Route("/new/{order}", create, methods=["POST"])
old = Route("/old/{order}", create_as_before, methods=["POST"])
app = Starlette(routes=[new, old], middleware=[Middleware(DeferredMiddleware)])
