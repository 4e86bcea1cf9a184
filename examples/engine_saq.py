"""SAQ: jobs are names with keyword arguments, so a job is a small object and `register()` says what to do with it.

`tasks.add_task(SaqJob("send_report"), user_id=user_id)`
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import saq

from asgi_deferred.engines import register

queue = saq.Queue.from_url(os.environ["REDIS_URL"], name=os.environ.get("SAQ_QUEUE", "default"))


@dataclass(frozen=True)
class SaqJob:
    name: str

    def __call__(self, **kwargs: Any) -> None:
        raise NotImplementedError("only SAQ's workers run it")


async def enqueue(job: SaqJob, **kwargs: Any) -> None:
    await queue.enqueue(job.name, **kwargs)


register(SaqJob, enqueue)
