"""Starlette: run a response's own `background=` through the task list.

`tasks_from(request)` of the package works in Starlette as it is. This module is for code that has
`BackgroundTask` and `BackgroundTasks` already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from inspect import isclass, isfunction, ismethod, unwrap
from typing import TYPE_CHECKING, Any

from starlette.background import BackgroundTask, BackgroundTasks
from starlette.endpoints import HTTPEndpoint
from starlette.routing import Route, get_name

from ._functions import is_async, unwrap_partial
from ._tasks import DeferredTasks, tasks_from

if TYPE_CHECKING:
    from types import CodeType

__all__ = ["DeferredRoute"]

_METHODS = ("get", "head", "post", "put", "patch", "delete", "options")
_PLAIN = ("starlette.background", "fastapi.background")


class DeferredRoute(Route):
    """A route whose responses' `background=` runs as deferred tasks, with not one endpoint changed.

    It takes what `starlette.routing.Route` takes. A `BackgroundTask`, and each one in a `BackgroundTasks`, becomes a
    task of the request's list with `when="complete"`: it runs once the response was sent in full, whatever
    its status, and a failing one leaves the others alone. A subclass with a `__call__` of its own stays one task.

    Endpoints may be functions, methods, partials and `HTTPEndpoint` classes. Any other class or object is an ASGI
    application of its own, whose responses no route sees: it runs its background tasks itself.

    Raises:
        MiddlewareMissing: On each request, as the application is not wrapped in `DeferredMiddleware`.

    Example:
        ```python
        async def signup(request: Request) -> Response:
            return JSONResponse({"ok": True}, background=BackgroundTask(send_welcome, "ada@example.org"))

        app = Starlette(routes=[DeferredRoute("/signup", signup, methods=["POST"])])
        app.add_middleware(DeferredMiddleware)
        ```
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], *, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(path, _moving_endpoint(endpoint), name=get_name(endpoint) if name is None else name, **kwargs)
        self.endpoint = endpoint


def _move_background(tasks: DeferredTasks, response: Any, endpoint: Any) -> Any:
    """Add the response's background tasks to the list; return the response without them."""
    background = getattr(response, "background", None)
    if background is None:
        return response
    if _adopt_background(tasks, background, endpoint):
        response = copy(response)  # an application may send one response many times
    response.background = None
    return response


def _adopt_background(tasks: DeferredTasks, background: Any, endpoint: Any) -> bool:
    """Add background tasks to the list as if the endpoint had; return whether there were any."""
    calls = list(_calls(background))
    if not calls:
        return False
    adder = tasks.options(when="complete")
    code: CodeType | None = getattr(unwrap(unwrap_partial(endpoint)), "__code__", None)
    for func, args, kwargs in calls:
        task = adder.add_task(func, *args, **kwargs)
        if code is not None:
            task._code, task._line = code, code.co_firstlineno
    return True


def _calls(background: Any) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    plain = type(background).__call__.__module__ in _PLAIN
    if plain and isinstance(background, BackgroundTasks):
        for each in background.tasks:
            yield from _calls(each)
    elif plain and isinstance(background, BackgroundTask):
        yield background.func, background.args, background.kwargs
    else:
        yield background, (), {}


def _moving_endpoint(endpoint: Any) -> Any:
    if isclass(endpoint) and issubclass(endpoint, HTTPEndpoint):
        handlers = {name: _moving(getattr(endpoint, name)) for name in _METHODS if hasattr(endpoint, name)}
        return type(endpoint.__name__, (endpoint,), handlers)
    inner = unwrap_partial(endpoint)
    return _moving(endpoint) if isfunction(inner) or ismethod(inner) else endpoint


def _moving(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a handler, so that its tasks get the context that it leaves behind, also in a worker thread."""

    async def handle_async(*args: Any) -> Any:
        return _move_background(tasks_from(args[-1]), await handler(*args), handler)

    def handle(*args: Any) -> Any:
        return _move_background(tasks_from(args[-1]), handler(*args), handler)

    return handle_async if is_async(handler) else handle
