from __future__ import annotations

from typing import Any

import celery
import kombu.entity
from anyio import to_thread

from .common import BROKER, PREFIX, REDIS, nothing_to_open, save

app = celery.Celery("live", broker=BROKER, backend=REDIS)
app.conf.update(
    task_default_queue=PREFIX,
    task_queues=[kombu.entity.Queue(PREFIX, queue_arguments={"x-expires": 60_000})],
    result_expires=60,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"confirm_publish": True} if BROKER.startswith("amqp") else {},
    worker_proc_alive_timeout=30,
)


@app.task(name="save")
def job(token: str) -> str:
    return save(token)


def identified(token: str) -> Any:
    return app.tasks["save"].s().set(task_id=token)


async def look(token: str) -> Any:
    return await to_thread.run_sync(lambda: app.AsyncResult(token).result)


opened = nothing_to_open
