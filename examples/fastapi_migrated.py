"""A FastAPI app that uses BackgroundTasks, moved over: `uvicorn examples.fastapi_migrated:app`.

Installing the middleware is all there is to it, also for an application of many routers and mounts.
"""

from __future__ import annotations

import logging

from fastapi import BackgroundTasks, FastAPI, Response
from starlette.background import BackgroundTask

from asgi_deferred.fastapi import DeferredMiddleware

logger = logging.getLogger(__name__)

app = FastAPI()
app.add_middleware(DeferredMiddleware)


def write_log(message: str) -> None:
    logger.info(message)


@app.post("/notify/{email}")
async def notify(email: str, background_tasks: BackgroundTasks) -> dict[str, str]:
    background_tasks.add_task(write_log, f"notification for {email}")
    return {"message": "sent"}


@app.post("/both/{email}")
async def both(email: str, background_tasks: BackgroundTasks) -> Response:
    background_tasks.add_task(write_log, "injected")  # FastAPI itself drops this one
    return Response("sent", background=BackgroundTask(write_log, "the response's own"))
