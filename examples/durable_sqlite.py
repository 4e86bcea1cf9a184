"""The second rung: one machine, an SQLite file, no server beside the application.

    uvicorn examples.durable_sqlite:app
    uvicorn examples.durable_sqlite:app --workers 2
    DATABASE_URL=postgresql://localhost/jobs uvicorn examples.durable_sqlite:app

An answer of 202 means that the mail is in the file. The application sends what is in the file, and sends again what it
was sending when it was killed. So no mail is lost, and one may go out twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI

from asgi_deferred import TaskAdder
from asgi_deferred.dbos import Store
from asgi_deferred.fastapi import Deferred, DeferredMiddleware

store = Store(os.environ.get("DATABASE_URL", "sqlite:///jobs.sqlite"))


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with store:
        yield


async def durable(deferred: Deferred) -> TaskAdder:
    return deferred.options(durable=True)


Jobs = Annotated[TaskAdder, Depends(durable)]
app = FastAPI(lifespan=lifespan)


@store.task
def welcome(email: str) -> None:
    time.sleep(0.01)  # as long as a mail server takes
    effects = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(effects, f"{email}\n".encode())
    os.close(effects)


app.add_middleware(DeferredMiddleware)


@app.post("/signup", status_code=202)
async def signup(email: str, jobs: Jobs) -> None:
    jobs.add_task(welcome, email)
