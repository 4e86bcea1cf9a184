from __future__ import annotations

from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from .common import BROKER, PREFIX, done, nothing_to_open, save

broker = RedisBroker(url=BROKER, namespace=PREFIX)
dramatiq.set_broker(broker)


job = dramatiq.actor(broker=broker)(save)


def identified(token: str) -> Any:
    return job


async def look(token: str) -> Any:
    return done(token)


opened = nothing_to_open
