"""RQ: any function on a queue; called directly it runs here, given to `add_task` it is enqueued.

`tasks.add_task(OnRQ(send_report), user_id)`
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import redis
import rq

queue = rq.Queue(os.environ.get("RQ_QUEUE", "default"), connection=redis.Redis.from_url(os.environ["REDIS_URL"]))


class OnRQ:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __defer_enqueue__(self, *args: Any, **kwargs: Any) -> None:
        queue.enqueue(self.function, args=args, kwargs=kwargs)
