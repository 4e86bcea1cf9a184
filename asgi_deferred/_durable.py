"""The barrier: a response is held back until its durable tasks are stored.

1. It stands before the start of a response, and again before its final message, for tasks added in between.
2. It asks `when` about the outcome to be expected: this status, complete, no error. A task that is not let through
   waits for the request's real end, as any other does.
3. The first refusal ends it. Before the start, the client gets a 503 from here; after it, the final message is
   withheld. Either way `send` raises EnqueueFailed, now and for every message after it, and the request is neither
   complete nor a success, so that the tasks it leaves are skipped unless they ask for failures.
"""

from __future__ import annotations

from typing import Any

from ._completion import Outcome
from ._exceptions import EnqueueFailed
from ._tasks import DeferredTasks

_BODY = b"Service Unavailable: the work could not be queued. Try again."

UNAVAILABLE = {
    "type": "http.response.start",
    "status": 503,
    "headers": [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(_BODY)).encode()),
        (b"retry-after", b"5"),
    ],
}


class Barrier:
    """Stands for the server's `send` from the first durable task on."""

    __slots__ = ("_again", "_refused", "_send", "_tasks")

    @classmethod
    def on(cls, send: Any, tasks: DeferredTasks, again: Any) -> Barrier:
        return send if isinstance(send, cls) else cls(send, tasks, again)

    def __init__(self, send: Any, tasks: DeferredTasks, again: Any) -> None:
        self._send = send
        self._tasks = tasks
        self._again = again
        self._refused: EnqueueFailed | None = None

    async def __call__(self, message: Any) -> None:
        if self._refused is not None:
            raise self._refused
        await self._send(message)

    async def hold(self, message: Any) -> None:
        """Send a message, once the durable tasks added until now are stored."""
        if self._refused is not None:
            raise self._refused
        tasks = self._tasks
        starts = "status" in message
        tasks._durable = False
        try:
            start = message if starts else tasks._start
            await tasks._runner._enqueue_durable(tasks, Outcome("http", start["status"], complete=True))
        except EnqueueFailed as exc:
            self._refused = tasks._error = exc
            tasks._durable = True  # what follows comes here too, and is never taken for the end of a response
            if starts:
                tasks._start = UNAVAILABLE
                await self._send(UNAVAILABLE)
                await self._send({"type": "http.response.body", "body": _BODY})
            raise
        await self._again(message)
