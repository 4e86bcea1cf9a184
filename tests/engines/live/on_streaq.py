from __future__ import annotations

from typing import Any

import streaq

from .common import BROKER, PREFIX, done, save_async

worker: streaq.Worker[None] = streaq.Worker(redis_url=BROKER, queue_name=PREFIX)


job = worker.task()(save_async)


def identified(token: str) -> Any:
    return job


async def look(token: str) -> Any:
    return done(token)


def opened() -> Any:
    return worker
