"""Structured logs that keep the request's id inside its tasks: `uvicorn examples.request_id:app`."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_deferred import DeferredMiddleware, defer

log = structlog.get_logger()


class RequestId:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=uuid4().hex[:8])
        await self.app(scope, receive, send)


def resize(image: str) -> None:
    log.info("resized", image=image)  # in a worker thread, after the response, with the request_id


def upload(request: Request) -> PlainTextResponse:  # sync: Starlette runs it in a thread of its own
    log.info("uploaded")
    defer(resize, "cat.png")
    return PlainTextResponse("thanks\n")


app = Starlette(routes=[Route("/", upload)], middleware=[Middleware(DeferredMiddleware), Middleware(RequestId)])
