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

from ._completion import Outcome, is_final
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


async def hold(tasks: DeferredTasks, send: Any, message: Any) -> None:
    """Send a message of a response that has durable tasks: its start and its end once those tasks are stored."""
    starts = "status" in message
    ends = not starts and is_final(tasks._start, message)
    if starts or ends:
        while tasks._durable and tasks._error is None:
            tasks._durable = False
            try:
                status = (message if starts else tasks._start).get("status")
                await tasks._runner._enqueue_durable(tasks, Outcome("http", status, complete=True))
            except EnqueueFailed as exc:
                tasks._durable = True  # what follows comes here too, and is never taken for the end of a response
                tasks._error = exc
                if starts:
                    tasks._start = UNAVAILABLE
                    await send(UNAVAILABLE)
                    await send({"type": "http.response.body", "body": _BODY})
    if tasks._error is not None:
        raise tasks._error
    if starts:
        tasks._start = message
    elif ends:
        tasks._complete = True
    await send(message)
