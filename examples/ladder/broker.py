"""The third rung: a broker and a worker, each a process of its own that may be stopped while the application runs.

    uvicorn examples.ladder.broker:app
    taskiq worker examples.ladder.broker:broker

An answer of 202 means that RabbitMQ has the mail on its disk. It gives a mail to another worker when one dies.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from taskiq_aio_pika import AioPikaBroker, Queue

from asgi_deferred import TaskAdder
from asgi_deferred.fastapi import Deferred, DeferredMiddleware

queue = os.environ.get("QUEUE", "signup")
broker = AioPikaBroker(
    os.environ.get("BROKER_URL", "amqp://guest:guest@localhost:5672"),
    task_queues=[Queue(name=queue)],
    dead_letter_queue=Queue(name=f"{queue}.dead"),
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    await broker.startup()
    yield
    await broker.shutdown()


async def durable(deferred: Deferred) -> TaskAdder:
    return deferred.options(durable=True)


Jobs = Annotated[TaskAdder, Depends(durable)]
app = FastAPI(lifespan=lifespan)


@broker.task
def welcome(email: str) -> None:
    time.sleep(0.01)  # as long as a mail server takes
    effects = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(effects, f"{email}\n".encode())
    os.close(effects)


app.add_middleware(DeferredMiddleware)


@app.post("/signup", status_code=202)
async def signup(email: str, jobs: Jobs) -> None:
    jobs.add_task(welcome, email)
