"""Traces that come in with a request, on a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import HTTPTOOLS, serve

pytestmark = pytest.mark.servers

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("outside", ["GET /signup", "GET /signup > audit", "GET /signup > welcome"]),
        (
            "inside",
            [
                "GET /signup",
                "GET /signup > BackgroundTask audit",
                "GET /signup > BackgroundTask audit > audit",
                "GET /signup > welcome",
            ],
        ),
    ],
)
def test_an_incoming_trace_goes_on(tmp_path: Path, place: str, expected: list[str]) -> None:
    """G5: tasks belong to the trace that the request's `traceparent` names, with FastAPIInstrumentor outside and inside of ours."""
    with (
        serve(HTTPTOOLS.with_options("--factory"), tmp_path, app=f"traced:{place}") as server,
        server.client() as client,
    ):
        assert client.get("/signup", headers={"traceparent": f"00-{TRACE}-{CALLER}-01"}).text == "ok"
        server.stop()
        spans = [entry.split(" ", 3) for entry in server.lines("-")]
    parents = {span: (name, parent) for _, span, parent, name in spans}

    def ancestors(span: str) -> str:
        name, parent = parents[span]
        return name if parent == CALLER else f"{ancestors(parent)} > {name}"

    assert {trace for trace, *_ in spans} == {TRACE}
    assert sorted(map(ancestors, parents)) == expected
