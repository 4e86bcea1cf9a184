"""Every server with every kind of application."""

from __future__ import annotations

from pathlib import Path

import pytest
from .harness import ALL, GRANIAN, H11, HYPERCORN, Kind, Server, read_until, raw_request, serve, tasks
from websockets.sync.client import connect

pytestmark = pytest.mark.servers

QUERY = ("one:quick", "two:thread", "failed:quick:failure")
RAN = ["one RUNNING", "one SUCCEEDED", "two RUNNING", "two SUCCEEDED", "failed SKIPPED"]
SKIPPED = ["one SKIPPED", "two SKIPPED", "failed RUNNING", "failed SUCCEEDED"]

CASES = {
    "/raw/plain": ["final", "returned", *RAN],
    "/raw/raise": SKIPPED,
    "/raw/raise-midway": SKIPPED,
    "/raw/raise-late": ["final", *SKIPPED],
    "/starlette/plain": RAN,
    "/starlette/streaming": ["streamed", *RAN],
    "/starlette/file": RAN,
    "/base/plain": RAN,
    "/base/streaming": ["streamed", *RAN],
    "/base/file": RAN,
    "/fastapi/plain": ["commit", *RAN, "after-yield RUNNING", "after-yield SUCCEEDED"],
    "/fastapi/thread": RAN,
}
DJANGO = {"/django/async": ["request_finished", *RAN], "/django/sync": ["request_finished", *RAN]}
WEBSOCKET = {"/starlette/echo": RAN}


def drive(server: Server, path: str) -> None:
    target = path + tasks(*QUERY, request=path)
    if path in WEBSOCKET:
        with connect(f"ws://127.0.0.1:{server.port}{target}") as websocket:
            websocket.send("hello")
            assert websocket.recv() == "hello"
    elif path == "/raw/raise-midway":
        with server.client() as client, client.stream("GET", target) as response:
            assert next(response.iter_text()) == "half"  # that is all, and daphne leaves the connection open
    else:
        response = server.get(target)
        assert response.status_code == (500 if path == "/raw/raise" else 200)
        if path not in ("/raw/raise", "/fastapi/plain", "/fastapi/thread"):
            assert response.text == "hello"


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_matrix(kind: Kind, tmp_path: Path) -> None:
    """G1, G2, G12: on every server, each kind of application gets the same tasks run after the same steps of its own."""
    cases = CASES | (DJANGO if kind.asyncio else {}) | (WEBSOCKET if kind.websocket else {})
    with serve(kind, tmp_path) as server:
        for path, expected in cases.items():
            drive(server, path)
            server.wait_for(f"{path} {expected[-1]}")
        server.stop()
        assert {path: server.lines(path) for path in cases} == cases
        assert server.ends_of_lifespan() == (
            ["startup.complete"] * kind.workers + ["shutdown.complete"] * kind.workers if kind.lifespan else []
        )


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_response_does_not_wait(kind: Kind, tmp_path: Path) -> None:
    """G6, G9: the client has its whole response, and on the same connection the next one, while its tasks still run."""
    with serve(kind, tmp_path) as server:
        with server.client() as client:
            for request in ("first", "second"):
                assert client.get("/raw/plain" + tasks("held:gated", "next:quick", request=request)).text == "hello"
                server.wait_for(f"{request} held RUNNING")
        assert server.lines("first") == server.lines("second") == ["final", "returned", "held RUNNING"]
        for request in ("first", "second"):
            server.open_gate(f"{request}.held")
            server.wait_for(f"{request} next SUCCEEDED")
        server.stop()
        assert server.lines("first") == server.lines("second")
        assert server.lines("first")[3:] == ["held SUCCEEDED", "next RUNNING", "next SUCCEEDED"]


@pytest.mark.parametrize("kind", [kind for kind in ALL if not kind.tls], ids=str)
def test_pipelined_request(kind: Kind, tmp_path: Path) -> None:
    """G6, G9: a request that was pipelined behind one with tasks is answered while those run."""
    with serve(kind, tmp_path) as server, server.connect() as connection:
        first = "/raw/plain" + tasks("held:gated", request="first")
        second = "/raw/plain" + tasks("quick:quick", request="second")
        connection.sendall(raw_request(first) + raw_request(second))
        assert read_until(connection, b"hello", 2).count(b"HTTP/1.1 200") == 2
        server.wait_for("first held RUNNING", "second quick SUCCEEDED")
        assert server.lines("first") == ["final", "returned", "held RUNNING"]
        server.open_gate("first.held")
        server.wait_for("first held SUCCEEDED")


@pytest.mark.parametrize("kind", [H11, HYPERCORN, GRANIAN], ids=str)
def test_application_without_lifespan(kind: Kind, tmp_path: Path) -> None:
    """G8, G10: for an application that raises on its lifespan the server still gets each message once, after the drain."""
    with serve(kind, tmp_path, app="django_only") as server:
        assert server.get("/async" + tasks("held:gated", request="one")).text == "hello"
        server.wait_for("one held RUNNING")
        server.send_signal()
        server.wait_for("- server: shutdown ")
        server.open_gate("one.held")
        server.wait()
        assert server.lines("one") == ["request_finished", "held RUNNING", "held SUCCEEDED"]
        messages = [line.split()[1] for line in server.lines("-")]
        assert messages == ["startup", "startup.complete", "shutdown", "shutdown.complete"]
