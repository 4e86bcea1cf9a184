"""arq: its worker knows functions by name, so a decorator is enough; the pool belongs to the event loop.

`tasks.add_task(OnArq(send_report), user_id)`
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import arq


class OnArq:
    pool: arq.ArqRedis  # set where the application starts: OnArq.pool = await arq.create_pool(...)

    def __init__(self, function: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self.function = function

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self.function({}, *args, **kwargs)

    async def __defer_enqueue__(self, *args: Any, **kwargs: Any) -> None:
        await self.pool.enqueue_job(self.function.__name__, *args, **kwargs)
