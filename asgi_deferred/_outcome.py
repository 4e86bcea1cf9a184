"""How a request ended: messages in, outcome out. Pure functions, without I/O or async.

Which message is final
======================

1. `http.response.body` with `more_body` false or absent is final, unless the start message said
   `trailers: True`.
2. After `trailers: True`, the `http.response.trailers` with `more_trailers` false or absent is final.
3. `http.response.pathsend` is final by itself, `http.response.zerocopysend` with `more_body` false or absent,
   both under rule 1's condition.
4. `websocket.close` is final, and so is the last `websocket.http.response.body` of a denial response.
   The client's `websocket.disconnect`, which arrives the other way, is final too.
5. Nothing after the final message changes anything, and no other message is final.

How a request ended
===================

6. A response is complete once its final message was handed to the server. It stays complete if the server then raises
   from `send` because the client has left.
7. A websocket is also complete when the application returns, because the server closes it then.
8. Any exception out of the application is the outcome's error, cancellation included. This holds even if it came out
   of `send` with the final message: the application then skipped the code after that line, such as a commit.

ASGI: HTTP & WebSocket spec, sections "Response Body", "Close"; extensions "http.response.trailers",
"http.response.pathsend", "http.response.zerocopysend", "websocket.http.response".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from ._functions import is_async, name_of

_LIKE_BODY = ("http.response.pathsend", "http.response.zerocopysend", "websocket.http.response.body")


def is_final(start: Any, message: Any) -> bool:
    """Whether `message` ends a response that began with the message `start` (`None` before one was sent)."""
    kind = message["type"]
    if kind == "http.response.body" or kind in _LIKE_BODY:
        if message.get("more_body"):
            return False
        return not (start and "trailers" in start and start["trailers"])
    if kind == "http.response.trailers":
        return not message.get("more_trailers")
    return kind in ("websocket.close", "websocket.disconnect")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended.

    Attributes:
        type: "http", "websocket", or "lifespan" for tasks added outside any request.
        status: The response's status; `None` for an accepted websocket, or if no response was started.
        complete: Whether the final message was handed to the server.
        error: The exception that the application raised. Once all tasks of the request have ended, the outcome of
            their list drops it, because it would keep the frames of the failed request alive.
        success: True if the request is complete, has no error, and has no status of 400 or above. A websocket need
            not be complete.
    """

    type: Literal["http", "websocket", "lifespan"]
    status: int | None = None
    complete: bool = False
    error: BaseException | None = None
    success: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        complete = self.complete or self.type == "websocket"
        # Some servers let a status pass that is not a number.
        below_400 = self.status is None or (isinstance(self.status, int) and self.status < 400)
        object.__setattr__(self, "success", complete and self.error is None and below_400)

    def without_error(self) -> Outcome:
        """Return a copy without the exception and its frames; `success` stays as it is."""
        outcome = Outcome(self.type, self.status, self.complete)
        object.__setattr__(outcome, "success", self.success)
        return outcome


# Requests that end in the same way share one outcome.
without_error = lru_cache(typed=True)(Outcome)


_Rule: TypeAlias = Literal["success", "complete", "failure", "always"]
When: TypeAlias = _Rule | Callable[[Outcome], bool]
"""After which requests a task runs: "success", "complete", "failure", "always", or a function `(Outcome) -> bool`."""

WHEN: tuple[_Rule, ...] = ("success", "complete", "failure", "always")
SUCCESS = WHEN[0]  # the default, and so the very string that most tasks have


def check_when(when: object) -> None:
    """Raise ValueError or TypeError if `when` is not valid."""
    if when not in WHEN if isinstance(when, str) else not callable(when):
        raise ValueError(f"when={when!r} is unknown: use one of {WHEN} or a callable (Outcome) -> bool")
    if is_async(when):
        raise TypeError(f"when={when!r} is async, and would not be awaited: use a plain function (Outcome) -> bool")


def lets_through(when: When, outcome: Outcome) -> bool:
    """Decide from a request's outcome whether its task runs. Raises what a callable `when` raises."""
    if when == "success":
        return outcome.success
    if when == "always":
        return True
    if when == "failure":
        return not outcome.success
    if when == "complete":
        return outcome.complete
    return bool(when(outcome))


_RULES = {
    "success": "when='success' runs a task only after a complete response below 400 and no error",
    "complete": "when='complete' runs a task only after a complete response",
    "failure": "when='failure' runs a task only after an error, a status of 400 or above, or no complete response",
}


def why_skipped(when: When, outcome: Outcome) -> str:
    """Describe in a few words how the request of a skipped task ended, and name the rule that skipped the task."""
    said = []
    status, error = outcome.status, outcome.error
    if status is not None:
        said.append(f"status {status:d}" if isinstance(status, int) else "a status that is no number")
    if not outcome.complete and outcome.type == "http":
        said.append("no complete response" if error is not None else "no complete response, as when the client leaves")
    if error is not None:
        said.append(ascii(type(error).__name__)[1:-1])
    return f"{', '.join(said) or 'success'}, when={when if isinstance(when, str) else name_of(when)!a}"


def explain_rule(when: When, outcome: Outcome) -> str:
    """Explain the rule that skipped a task, and list the rules that would have let it run."""
    rule = _RULES[when] if isinstance(when, str) else "the function returned false"
    others = ", ".join(f'options(when="{other}")' for other in WHEN if lets_through(other, outcome))
    return f"{rule}; these would have run it: {others}"
