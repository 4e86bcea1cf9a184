"""DBOS: a workflow is a plain function, which would run here; on a queue it is stored first, and survives a crash.

`tasks.add_task(OnDBOS(send_report), user_id)`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dbos


class OnDBOS:
    queue: dbos.Queue  # set where the application starts, after launch(): OnDBOS.queue = DBOS.register_queue(...)

    def __init__(self, workflow: Callable[..., Any]) -> None:
        self.workflow = workflow

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.workflow(*args, **kwargs)

    def __defer_enqueue__(self, *args: Any, **kwargs: Any) -> None:
        self.queue.enqueue(self.workflow, *args, **kwargs)
