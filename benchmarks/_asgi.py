"""The least of an application, of a middleware and of a server's side."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any


def scope() -> dict[str, Any]:
    """Make a scope as uvicorn makes it, a new one for each request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8000"), (b"accept", b"*/*")],
        "state": {},
    }


async def receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b""}


async def send(message: Any) -> None:
    pass


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """The smallest application: no framework, no task."""
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def lifespan(receive: Any, send: Any) -> None:
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


class PassThrough:
    """The smallest middleware that looks at what is sent: it wraps `send`, and forwards."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def wrapped(message: Any) -> None:
            await send(message)

        await self.app(scope, receive, wrapped)


class Needed:
    """The least that the guarantees ask for: a list in a copied scope and in a context variable, and the final message."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        tasks = List(scope)

        def noting(message: Any) -> Any:
            if message["type"] == "http.response.start":
                tasks.start = message
            elif "more_body" not in message:
                tasks.complete = True
            return send(message)

        scope = scope.copy()
        scope["list"] = tasks
        token = current.set(tasks)
        try:
            await self.app(scope, receive, noting)
        finally:
            current.reset(token)


class List:
    def __init__(self, scope: Any) -> None:
        self.scope = scope
        self.tasks = self.start = None
        self.complete = False


current: ContextVar[Any] = ContextVar("current")
