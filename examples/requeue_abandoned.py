"""What a shutdown cut off runs at the next start: plain functions of modules, with arguments that JSON can hold.

A task may have been half done when it was abandoned, so it must bear to run twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

from asgi_deferred import TaskEvent, TaskState, defer

LEFT = Path(os.environ.get("LEFT", "abandoned.jsonl"))


def find(module: str, name: str) -> Any:
    return attrgetter(name)(import_module(module))


def keep_abandoned(event: TaskEvent) -> None:
    """An observer, `Runner(observers=[keep_abandoned])`; the log says what it could not keep, a lambda for one."""
    if event.state is TaskState.ABANDONED:
        task = event.task
        where = (task.func.__module__, task.func.__qualname__)
        if find(*where) is not task.func:
            raise LookupError(f"{where} is not the function of that name")
        with LEFT.open("a") as left:
            left.write(json.dumps([*where, task.args, task.kwargs]) + "\n")


@asynccontextmanager
async def lifespan(_: Any) -> AsyncIterator[None]:
    """The application's lifespan: what was left is deferred again, and starts at once."""
    if LEFT.exists():
        for line in LEFT.read_text().splitlines():
            module, name, args, kwargs = json.loads(line)
            defer(find(module, name), *args, **kwargs)
        LEFT.unlink()
    yield
