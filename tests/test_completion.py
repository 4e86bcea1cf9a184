"""Which message is final, how a request ended, and what that means for its tasks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_deferred import Outcome
from asgi_deferred._outcome import WHEN, is_final, lets_through

START = {"type": "http.response.start", "status": 200}
TRAILING = {**START, "trailers": True}


@pytest.mark.parametrize(
    ("start", "message", "final"),
    [
        (START, {"type": "http.response.body"}, True),
        (START, {"type": "http.response.body", "more_body": False}, True),
        (START, {"type": "http.response.body", "more_body": True}, False),
        (TRAILING, {"type": "http.response.body"}, False),
        (TRAILING, {"type": "http.response.body", "more_body": True}, False),
        (TRAILING, {"type": "http.response.trailers", "more_trailers": True}, False),
        (TRAILING, {"type": "http.response.trailers"}, True),
        (TRAILING, {"type": "http.response.pathsend", "path": "/x"}, False),
        (START, {"type": "http.response.pathsend", "path": "/x"}, True),
        (START, {"type": "http.response.zerocopysend", "more_body": True}, False),
        (START, {"type": "http.response.zerocopysend"}, True),
        (START, {"type": "http.response.early_hint"}, False),
        (None, {"type": "http.response.debug"}, False),
        (None, {"type": "http.response.push"}, False),
        (None, {"type": "http.response.body"}, True),
        (None, {"type": "websocket.accept"}, False),
        (None, {"type": "websocket.send"}, False),
        (None, {"type": "websocket.receive"}, False),
        (None, {"type": "websocket.close"}, True),
        (None, {"type": "websocket.disconnect"}, True),
        (START, {"type": "websocket.http.response.body", "more_body": True}, False),
        (START, {"type": "websocket.http.response.body"}, True),
    ],
)
def test_final_message(start: Any, message: Any, final: bool) -> None:
    """G1: exactly the messages that the ASGI specification and its extensions name end a response."""
    assert is_final(start, message) is final


ERROR = ValueError("x")


@pytest.mark.parametrize(
    ("outcome", "success", "runs"),
    [
        (Outcome("http", 200, complete=True), True, ["success", "complete", "always"]),
        (Outcome("http", 399, complete=True), True, ["success", "complete", "always"]),
        (Outcome("http", 400, complete=True), False, ["complete", "failure", "always"]),
        (Outcome("http", 500, complete=True, error=ERROR), False, ["complete", "failure", "always"]),
        (Outcome("http", 200, complete=True, error=ERROR), False, ["complete", "failure", "always"]),
        (Outcome("http", 200), False, ["failure", "always"]),
        (Outcome("http"), False, ["failure", "always"]),
        (Outcome("http", error=ERROR), False, ["failure", "always"]),
        (Outcome("websocket", complete=True), True, ["success", "complete", "always"]),
        (Outcome("websocket", 403, complete=True), False, ["complete", "failure", "always"]),
        (Outcome("websocket", error=ERROR), False, ["failure", "always"]),
        (Outcome("lifespan", complete=True), True, ["success", "complete", "always"]),
    ],
)
def test_when(outcome: Outcome, success: bool, runs: list[str]) -> None:
    """Each row of the table of `when` holds."""
    assert outcome.success is success
    assert [when for when in WHEN if lets_through(when, outcome)] == runs


def test_callable_when() -> None:
    """A callable `when` decides by the truth of what it returns, and what it raises comes out."""
    outcome = Outcome("http", 418, complete=True)
    assert lets_through(lambda outcome: outcome.status == 418, outcome)
    assert not lets_through(lambda _: False, outcome)
    with pytest.raises(ZeroDivisionError):
        lets_through(lambda _: 1 / 0 > 0, outcome)


@given(
    st.builds(Outcome, st.just("http"), st.none() | st.integers(100, 599), st.booleans(), st.none() | st.just(ERROR))
)
def test_when_is_a_partition(outcome: Outcome) -> None:
    """Of "success" and "failure" each request lets through one, and success implies completeness."""
    let_through = {when for when in WHEN if lets_through(when, outcome)}
    assert "always" in let_through
    assert len(let_through & {"success", "failure"}) == 1
    assert not ("success" in let_through and "complete" not in let_through)
