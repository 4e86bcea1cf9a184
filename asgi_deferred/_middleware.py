"""The middleware: a guard, a closure and a forward.

1. The list is in the scope, a copy, and is the current one before the application is called.
2. Nothing of the user's runs inside `send`, but the enqueueing of durable tasks and the answer to its refusal. Whether
   a message was the final one is noted before it is forwarded.
3. A request is registered from its first task on, as a server may shut down before its call has ended.
4. Tasks are handed over after the application's call has ended, however it ended.
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
    """Wrap an ASGI application, so that it can defer work until its responses have gone out.

    Each HTTP request and websocket gets a task list, at `scope["asgi_deferred"]`. Its tasks run after the final
    message of the response was handed to the server and the application's call has ended: in the background,
    until the server's lifespan ends; without a lifespan, before the middleware's own call returns.

    Install it outermost, as the tasks wait for what it wraps. A second one further in finds the list, and
    passes through.

    Args:
        app: The application.
        runner: Limits, defaults and observers; a `Runner()` of its own if left out.

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
            if tasks._all or FREE_THREADED:  # looked at last: another thread may have added one just now
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
