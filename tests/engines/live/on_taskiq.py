from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from taskiq import AsyncBroker
from taskiq_aio_pika import AioPikaBroker, Exchange, Queue
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from .common import BROKER, PREFIX, REDIS, save_async

results: RedisAsyncResultBackend[Any] = RedisAsyncResultBackend(REDIS, prefix_str=PREFIX, result_ex_time=60)
broker: AsyncBroker
if BROKER.startswith("amqp"):
    broker = AioPikaBroker(
        BROKER,
        exchange=Exchange(name=PREFIX, auto_delete=True),
        task_queues=[Queue(name=PREFIX, arguments={"x-expires": 60_000})],
        dead_letter_queue=Queue(name=f"{PREFIX}.dead", arguments={"x-expires": 60_000}),
    )
else:
    broker = RedisStreamBroker(BROKER, queue_name=PREFIX, xread_block=100)
broker = broker.with_result_backend(results)


job = broker.task(task_name="save")(save_async)


def identified(token: str) -> Any:
    return job.kicker().with_task_id(token)


async def look(token: str) -> Any:
    return await results.is_result_ready(token) and (await results.get_result(token)).return_value


@asynccontextmanager
async def opened() -> AsyncIterator[None]:
    await broker.startup()
    yield
    await broker.shutdown()
