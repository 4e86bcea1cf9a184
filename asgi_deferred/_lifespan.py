"""The lifespan. The middleware answers it even if the application has none.

1. The runner starts before the application sees `lifespan.startup`. It has drained before the application sees
   `lifespan.shutdown`. So the application's resources are open while tasks run.
2. The server gets `startup.complete` (or `.failed`) once, and `shutdown.complete` (or `.failed`) once. If the
   application ends without sending one, the middleware sends it. Django, for example, raises instead.
3. An exception passes through: at once if startup is not complete, or else after the drain. An application that has
   no lifespan is the only exception to this rule.

How to tell that an application has no lifespan
===============================================

4. It returns before it has received anything.
5. It answers as if this were a request: it sends a message that does not belong to a lifespan, which servers refuse.
6. It raises before it has received anything, in the function that looks at the scope. So the frame that raised has the
   scope among its variables. This is not so when the `__init__` of a middleware fails, which Starlette calls for the
   first scope. That is a failed startup, and the server has to see it. The errors are

   - ValueError: Django's `ASGIHandler`, the `ProtocolTypeRouter` of channels, asgiref's `WsgiToAsgi`;
   - AssertionError: `assert scope["type"] == "http"`, as in Starlette's `Request`, `HTTPEndpoint` and `StaticFiles`;
   - KeyError: `{"http": handle}[scope["type"]]`, or `scope["path"]`, which only a request has;
   - NotImplementedError: written by hand.

   TypeError is not one of them, because a wrong call raises it.

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

# An application that only knows requests looks up these keys in vain.
OF_REQUESTS = (
    *("method", "scheme", "http_version", "path", "raw_path", "root_path", "query_string", "headers"),
    *("client", "server", "subprotocols"),
)


async def run_lifespan(app: Any, runner: Runner, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
    received: list[str] = []
    sent: list[str] = []
    shutdown: list[Any] = []  # the message, if the application stops waiting for it during the drain

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
        """Do the rest of a phase that the application did not finish."""
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
        # Hypercorn cancels a lifespan that takes another step after its last message, and dies of the cancellation.
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
