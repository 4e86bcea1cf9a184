"""FastAPI: the task list as a dependency, and a whole application's existing `BackgroundTasks` run by the runner."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from fastapi import Depends
from fastapi.requests import HTTPConnection

from ._tasks import DeferredTasks, tasks_from
from ._uploads import keep_uploads
from .starlette import DeferredMiddleware

__all__ = ["Deferred", "DeferredMiddleware"]


keep_uploads()


async def _tasks(connection: HTTPConnection) -> DeferredTasks:
    return tasks_from(connection)


Deferred: TypeAlias = Annotated[DeferredTasks, Depends(_tasks)]
"""The request's task list, as the annotation of a parameter.

It works in endpoints and in their dependencies, before and after a `yield`, on HTTP and websockets, and does not show
in OpenAPI. All of a request get the same list. Without `DeferredMiddleware` a request raises `MiddlewareMissing`.
A task may be given an upload: that stays open until the list's tasks have ended.

Example:
    ```python
    @app.post("/signup")
    async def signup(email: str, deferred: Deferred) -> dict[str, bool]:
        deferred.add_task(send_welcome, email)
        return {"ok": True}
    ```
"""
