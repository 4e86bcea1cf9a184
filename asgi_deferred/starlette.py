"""Starlette: a whole application's own background tasks, run by the runner.

`tasks_from(request)` of the package works in Starlette as it is. This module is for an application that has
`BackgroundTask` and `BackgroundTasks` already, and for uploads in tasks.
"""

from __future__ import annotations

from ._middleware import DeferredMiddleware as _DeferredMiddleware
from ._runner import Runner
from ._settings import ASGIApp
from ._starlette import Moving, install
from ._uploads import keep_uploads

__all__ = ["DeferredMiddleware"]


class DeferredMiddleware(_DeferredMiddleware):
    """`asgi_deferred.DeferredMiddleware` for an application with background tasks of Starlette's or FastAPI's own.

    The runner runs them, in the whole application and in all that is mounted in it, with not one line of it edited.
    What runs, when, and what it may use is what the framework would do: the application's call is held until they
    have ended. A failing one leaves the others alone and is logged with the line that added it. Sync ones have
    threads of the runner's own. They count, and have its limits, timeout, events and drain.

    An upload among the arguments of a task of the list stays open until the list's tasks have ended.

    Args:
        app: The application.
        runner: Limits, defaults and observers; a `Runner()` of its own if left out.
        detached: Hold no call. Background tasks are added to the request's list with `when="always"`, and run after
            the call has ended.

    Example:
        ```python
        app = Starlette(routes=[...])
        app.add_middleware(DeferredMiddleware)
        ```
    """

    def __init__(self, app: ASGIApp, runner: Runner | None = None, *, detached: bool = False) -> None:
        super().__init__(app, runner)
        install()
        keep_uploads()
        self.app: ASGIApp = Moving(app, detached=detached)
