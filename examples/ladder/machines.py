"""The fourth rung: workers on as many machines as it takes, and RabbitMQ on one of its own.

    BROKER_URL=amqp://user:password@broker.internal uvicorn examples.ladder.machines:app
    BROKER_URL=amqp://user:password@broker.internal celery -A examples.ladder.machines:celery worker

An answer of 202 means that RabbitMQ has the mail on its disk. It gives a mail to another worker when one dies.
"""

from __future__ import annotations

import os
import time
from typing import Annotated

from celery import Celery
from fastapi import Depends, FastAPI

from asgi_deferred import TaskAdder
from asgi_deferred.fastapi import Deferred, DeferredMiddleware

celery = Celery("signup", broker=os.environ.get("BROKER_URL", "amqp://guest:guest@localhost:5672"))
celery.conf.task_default_queue = os.environ.get("QUEUE", "signup")
celery.conf.task_ignore_result = True
celery.conf.broker_transport_options = {"confirm_publish": True}  # or a message can be lost on its way in
celery.conf.task_acks_late = celery.conf.task_reject_on_worker_lost = True  # or a worker's death loses what it runs


async def durable(deferred: Deferred) -> TaskAdder:
    return deferred.options(durable=True)


Jobs = Annotated[TaskAdder, Depends(durable)]
app = FastAPI()


@celery.task  # type: ignore[untyped-decorator]
def welcome(email: str) -> None:
    time.sleep(0.01)  # as long as a mail server takes
    effects = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(effects, f"{email}\n".encode())
    os.close(effects)


app.add_middleware(DeferredMiddleware)


@app.post("/signup", status_code=202)
async def signup(email: str, jobs: Jobs) -> None:
    jobs.add_task(welcome, email)
