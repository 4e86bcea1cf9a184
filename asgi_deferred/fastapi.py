"""FastAPI: the task list as a dependency, and a middleware that runs your existing `BackgroundTasks`."""

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

It works in endpoints and in their dependencies, before and after a `yield`, for HTTP and websockets. It does not
appear in OpenAPI. Every dependency of a request gets the same list. Without `DeferredMiddleware`, a request raises
`MiddlewareMissing`. If you pass an upload to a task, the upload stays open until the tasks of the list have ended.

Example:
    ```python
    @app.post("/signup")
    async def signup(email: str, deferred: Deferred) -> dict[str, bool]:
        deferred.add_task(send_welcome, email)
        return {"ok": True}
    ```
"""
