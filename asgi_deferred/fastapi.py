"""FastAPI: the task list as a dependency, and existing `BackgroundTasks` parameters run through it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeAlias

from fastapi import BackgroundTasks, Depends, Request, Response
from fastapi.requests import HTTPConnection
from fastapi.routing import APIRoute

from ._tasks import DeferredTasks, tasks_from
from .starlette import _adopt_background, _move_background

__all__ = ["Deferred", "DeferredRoute"]


async def _tasks(connection: HTTPConnection) -> DeferredTasks:
    return tasks_from(connection)


Deferred: TypeAlias = Annotated[DeferredTasks, Depends(_tasks)]
"""The request's task list, as the annotation of a parameter.

It works in endpoints and in their dependencies, before and after a `yield`, on HTTP and websockets, and does not show
in OpenAPI. All of a request get the same list. Without `DeferredMiddleware` a request raises `MiddlewareMissing`.

Example:
    ```python
    @app.post("/signup")
    async def signup(email: str, deferred: Deferred) -> dict[str, bool]:
        deferred.add_task(send_welcome, email)
        return {"ok": True}
    ```
"""


async def _adopt(background_tasks: BackgroundTasks, connection: HTTPConnection) -> None:
    """Let the request's one `BackgroundTasks` object, made just now, add to the task list."""
    tasks = tasks_from(connection)
    _adopt_background(tasks, background_tasks, connection.scope.get("endpoint"))
    background_tasks.tasks.clear()
    background_tasks.__dict__["add_task"] = tasks.options(when="complete").add_task


class DeferredRoute(APIRoute):
    """A route that runs FastAPI's background tasks as deferred tasks, with not one endpoint changed.

    That is, those of its `background_tasks: BackgroundTasks` parameters, and of its responses' own `background=`.
    They run with `when="complete"`: once the response was sent in full, whatever its status. What FastAPI drops is
    kept: tasks added after a dependency's `yield`, those added before an `HTTPException` was raised, and injected ones
    where the response has a background of its own. A failing task leaves the others alone.

    Set it before the routes are added, and on each `APIRouter(route_class=DeferredRoute)` as well.

    Raises:
        MiddlewareMissing: On each request, as the application is not wrapped in `DeferredMiddleware`.

    Example:
        ```python
        app = FastAPI()
        app.add_middleware(DeferredMiddleware)
        app.router.route_class = DeferredRoute

        @app.post("/signup")
        async def signup(email: str, background_tasks: BackgroundTasks) -> dict[str, bool]:
            background_tasks.add_task(send_welcome, email)
            return {"ok": True}
        ```
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        # First of all dependencies, so that what the others and the endpoint are given has been adopted.
        dependencies = [Depends(_adopt), *(kwargs.pop("dependencies", None) or ())]
        super().__init__(path, endpoint, dependencies=dependencies, **kwargs)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler, which makes the response, to move that response's background."""
        handle = super().get_route_handler()

        async def handle_and_move(request: Request) -> Any:
            return _move_background(tasks_from(request), await handle(request), self.endpoint)

        return handle_and_move
