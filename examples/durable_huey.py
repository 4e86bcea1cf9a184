"""A signup whose welcome mail waits in an SQLite file: huey, and no server beside the application.

The application and huey's consumer are two processes, on one machine and with one environment:

    uvicorn examples.durable_huey:app
    python -m huey.bin.huey_consumer examples.durable_huey.queue

What waits survives anything that the file survives. What runs does not: huey deletes a job when a worker takes it, so
a consumer that is killed loses the jobs that it was running, one for each of its workers.
"""

from __future__ import annotations

import os
import time
from typing import Any

import huey
from fastapi import FastAPI

from asgi_deferred.fastapi import Deferred, DeferredMiddleware

queue: Any = huey.SqliteHuey(
    filename=os.environ.get("DATABASE_URL", "sqlite:///jobs.sqlite").removeprefix("sqlite:///"),
    results=False,
    fsync=True,  # what was answered with 202 survives a power cut too
)


@queue.task()  # type: ignore[untyped-decorator]
def welcome(email: str) -> None:
    time.sleep(0.01)  # as long as a mail server takes
    effects = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(effects, f"{email}\n".encode())
    os.close(effects)


app = FastAPI()
app.add_middleware(DeferredMiddleware)


@app.post("/signup", status_code=202)
async def signup(email: str, deferred: Deferred) -> None:
    deferred.options(durable=True).add_task(welcome, email)
