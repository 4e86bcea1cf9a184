from __future__ import annotations

from typing import Any

import streaq

from .common import BROKER, PREFIX, done, save

worker: streaq.Worker[None] = streaq.Worker(redis_url=BROKER, queue_name=PREFIX)


@worker.task()
async def job(token: str) -> str:
    return save(token)


def identified(token: str) -> Any:
    return job


async def look(token: str) -> Any:
    return done(token)


def opened() -> Any:
    return worker
