"""Starlette: a middleware that runs the background tasks that your application already has.

For new tasks you do not need this module: `asgi_deferred.tasks_from(request)` works in Starlette. Use it if your
application has `BackgroundTask` or `BackgroundTasks`, or if your tasks get uploads.
"""

from __future__ import annotations

from ._middleware import DeferredMiddleware as _DeferredMiddleware
from ._runner import Runner
from ._settings import ASGIApp
from ._starlette import Moving, install
from ._uploads import keep_uploads

__all__ = ["DeferredMiddleware"]


class DeferredMiddleware(_DeferredMiddleware):
    """`asgi_deferred.DeferredMiddleware` for an application with Starlette's or FastAPI's background tasks.

    The runner runs them, in the whole application and in everything that is mounted in it. You edit no other line.
    The framework still decides what runs, when it runs, and what it can use: the application's call is held until the
    tasks have ended. But a task that fails does not stop the others, and is logged with the line that added it. Sync
    tasks run in the runner's own threads. The runner's limits, timeout, observers and drain apply.

    If you pass an upload to a task of the list, the upload stays open until the tasks of the list have ended.

    Args:
        app: The application.
        runner: Limits, defaults and observers. The default is a new `Runner()`.
        detached: If true, the call is not held. Background tasks are added to the request's list with `when="always"`,
            and run after the call has ended.

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
