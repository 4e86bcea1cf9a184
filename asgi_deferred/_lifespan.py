"""The lifespan, owned here even when the application has none.

1. The runner runs before the application sees `lifespan.startup`, and has drained before it sees
   `lifespan.shutdown`, so that what the application opens and closes is open while tasks run.
2. The server gets each of `startup.complete` (or `.failed`) and `shutdown.complete` (or `.failed`) once, from the
   application, or from here if that ends without: as Django does, which raises, or an app that returns.
3. An exception passes through: at once before startup completed, and after the drain if it comes later. The exception
   to this is an application that has no lifespan, and says so.

How an application says that it has no lifespan
===============================================

4. It returns before it has received anything.
5. It answers as if it had a request: it sends a message that is not a lifespan's, which servers refuse.
6. It raises before it has received anything, in the function that looks at the scope. The frame that raised has the
   scope among its variables. A middleware whose `__init__` fails, which Starlette calls on the first scope it gets,
   has not: that is a startup that fails, and the server is to see it. The errors are

   - ValueError: Django's `ASGIHandler`, the `ProtocolTypeRouter` of channels, asgiref's `WsgiToAsgi`;
   - AssertionError: `assert scope["type"] == "http"`, as in Starlette's `Request`, `HTTPEndpoint` and `StaticFiles`;
   - KeyError: `{"http": handle}[scope["type"]]`, or `scope["path"]`, which only a request has;
   - NotImplementedError: handwritten.

   A TypeError is not among them: it is what a wrong call raises.

ASGI: Lifespan Protocol, sections "Scope" to "Shutdown Complete".
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Mapping
from logging import DEBUG, ERROR
from traceback import walk_tb
from typing import Any

from ._reports import write
from ._runner import Runner
from ._tasks import KEY

# What an application that knows requests only looks up in vain.
OF_REQUESTS = (
    *("method", "scheme", "http_version", "path", "raw_path", "root_path", "query_string", "headers"),
    *("client", "server", "subprotocols"),
)


async def run_lifespan(app: Any, runner: Runner, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
    received: list[str] = []
    sent: list[str] = []
    shutdown: list[Any] = []  # the message, if the application gave up waiting for it while we drained

    async def receive_and_drain() -> Any:
        message = shutdown.pop() if shutdown else await receive()
        if message["type"] == "lifespan.shutdown":
            shutdown.append(message)
            await runner._drain(block.home)
            shutdown.clear()
        received.append(message["type"])
        return message

    async def send_and_note(message: Any) -> None:
        sent.append(message["type"])
        await send(message)

    async def complete(phase: str) -> None:
        """Do what the application left undone of a phase."""
        if f"lifespan.{phase}" not in received:
            await receive_and_drain()
        if f"lifespan.{phase}.complete" not in sent and f"lifespan.{phase}.failed" not in sent:
            await send_and_note({"type": f"lifespan.{phase}.complete"})

    block = runner._enter()
    error: BaseException | None = None
    try:
        try:
            await app({**scope, KEY: block.tasks}, receive_and_drain, send_and_note)
        except Exception as exc:
            if not received and (_refuses_the_scope(exc) or not all(kind.startswith("lifespan.") for kind in sent)):
                write(DEBUG, "The application has no lifespan: %r", exc)
            elif "lifespan.startup.complete" in sent and "lifespan.shutdown" not in received:
                write(ERROR, "The application's lifespan ended early; tasks still run", error=exc)
                await receive_and_drain()
                raise
            else:
                raise
        if "lifespan.startup.failed" not in sent:
            await complete("startup")
            await complete("shutdown")
    except BaseException as exc:
        error = exc
        # Hypercorn cancels a lifespan that has said its last word and takes another step, and dies of the cancellation.
        if not (isinstance(exc, CancelledError) and "lifespan.shutdown.complete" in sent):
            raise
    finally:
        await runner._leave(block, error)


def _refuses_the_scope(error: Exception) -> bool:
    """Whether an application has raised because the scope is a lifespan's (rule 6)."""
    by_key = isinstance(error, KeyError) and any(key in ("lifespan", *OF_REQUESTS) for key in error.args)
    if not by_key and not isinstance(error, (ValueError, AssertionError, NotImplementedError)):
        return False
    *_, (frame, _) = walk_tb(error.__traceback__)
    return any(isinstance(value, dict) and value.get("type") == "lifespan" for value in frame.f_locals.values())
