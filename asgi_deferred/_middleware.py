"""The middleware: a guard, a closure and a forward.

1. The application gets a copy of the scope with the list in it. The list is the current one from then on.
2. `send` runs no code of the user's, except to enqueue durable tasks and to answer when an engine refuses one. The
   middleware notes that a message is final before it forwards the message.
3. A list enters the account with its first task, because a server may shut down before the call has ended.
4. The list is handed over after the application's call has ended, however it ended.
"""

from __future__ import annotations

from sysconfig import get_config_var
from types import NoneType
from typing import Any

from ._durable import hold
from ._exceptions import EnqueueFailed
from ._lifespan import run_lifespan
from ._outcome import is_final
from ._runner import Runner
from ._settings import ASGIApp
from ._tasks import KEY, DeferredTasks, current

set_current, reset_current = current.set, current.reset

FREE_THREADED = bool(get_config_var("Py_GIL_DISABLED"))


class DeferredMiddleware:
    """Wraps an ASGI application, so that it can defer work until its responses have gone out.

    Each HTTP request and websocket gets a task list, at `scope["asgi_deferred"]`. Its tasks run once the server has
    taken the final message of the response and the application's call has ended. They run in the background until
    the server's lifespan ends. On a server without a lifespan they run before the middleware's own call returns.

    Install it outermost, because tasks wait only for what it wraps. If there is a second one inside the first, it
    finds the list in the scope and does nothing.

    Args:
        app: The application.
        runner: Limits, defaults and observers. The default is a new `Runner()`.

    Raises:
        TypeError: `app` is not callable, or `runner` is not a `Runner`.
    """

    def __init__(self, app: ASGIApp, runner: Runner | None = None) -> None:
        if not callable(app):
            raise TypeError(f"DeferredMiddleware() wraps an ASGI application, not {type(app).__name__!r}")
        if not isinstance(runner, (Runner, NoneType)):
            raise TypeError(f"runner={runner!r} is not a Runner: DeferredMiddleware(app, runner=Runner(...))")
        self.app = app
        self.runner: Runner = runner or Runner()
        self._host = self.runner._scheduler

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if KEY in scope or kind != "http":
            if kind == "lifespan" and KEY not in scope:
                await run_lifespan(self.app, self.runner, scope, receive, send)
                return
            if kind not in ("http", "websocket") or (KEY in scope and not scope[KEY]._ended):
                await self.app(scope, receive, send)
                return
        tasks = DeferredTasks(self._host, scope)

        def note_and_send(message: Any) -> Any:
            if tasks._durable:
                return hold(tasks, receive, send, message)
            if "status" in message:
                if not tasks._complete:
                    tasks._start = message
            elif (
                message["type"] == "http.response.body"
                and "more_body" not in message
                and "trailers" not in tasks._start
            ) or is_final(tasks._start, message):
                tasks._complete = True
            return send(message)

        scope = scope.copy()
        scope[KEY] = tasks
        token = set_current(tasks)
        try:
            if kind == "websocket":
                receive = _noting(tasks, receive)
            await self.app(scope, receive, note_and_send)
        except BaseException as exc:
            tasks._error = exc
            if not (isinstance(exc, EnqueueFailed) and exc.answered):
                raise
        finally:
            reset_current(token)
            tasks._ended = not tasks._all
            if tasks._all or FREE_THREADED:  # read again, because another thread may just have added a task
                tasks._end()
                waiting = self.runner._end(tasks)
                if waiting is not None:
                    await waiting
            elif tasks._error is not None:
                tasks._wind_up()


def _noting(tasks: DeferredTasks, receive: Any) -> Any:
    async def receive_and_note() -> Any:
        message = await receive()
        if is_final(None, message):
            tasks._complete = True
        return message

    return receive_and_note
