"""FastAPI, the example of its background tasks tutorial: `uvicorn examples.fastapi_app:app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI

from asgi_deferred import DeferredMiddleware
from asgi_deferred.fastapi import Deferred

app = FastAPI()
app.add_middleware(DeferredMiddleware)

LOG = Path("log.txt")


def write_log(message: str) -> None:
    with LOG.open("a") as file:
        file.write(message + "\n")


def get_query(deferred: Deferred, q: str | None = None) -> str | None:
    if q:
        deferred.add_task(write_log, f"found query: {q}")
    return q


@app.post("/send-notification/{email}")
async def send_notification(
    email: str, deferred: Deferred, q: Annotated[str | None, Depends(get_query)]
) -> dict[str, str]:
    deferred.add_task(write_log, f"message to {email}")
    return {"message": "Message sent"}
