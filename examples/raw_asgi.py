"""Raw ASGI, no framework: `uvicorn examples.raw_asgi:app`."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from asgi_deferred import DeferredMiddleware, tasks_from

logger = logging.getLogger(__name__)


async def warm_cache(path: str) -> None:
    await asyncio.sleep(0.1)
    logger.info("cache is warm for %s", path)


def count_visit(path: str) -> None:  # a plain function runs in a worker thread
    logger.info("one more visit of %s", path)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(f"no {scope['type']} here")  # the middleware answers the lifespan instead
    tasks = tasks_from(scope)
    tasks.add_task(warm_cache, scope["path"])
    tasks.add_task(count_visit, scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello\n"})


app = DeferredMiddleware(hello)
