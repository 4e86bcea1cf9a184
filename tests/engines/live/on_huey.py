from __future__ import annotations

from typing import Any

import huey

from .common import BROKER, PREFIX, done, nothing_to_open, save

queue = huey.RedisHuey(PREFIX, url=BROKER, results=False)


@queue.task()
def job(token: str) -> None:
    save(token)


def identified(token: str) -> Any:
    return job


async def look(token: str) -> Any:
    return done(token)


opened = nothing_to_open
