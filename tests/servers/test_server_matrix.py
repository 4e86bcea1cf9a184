"""Every server with every kind of application."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.sync.client import connect

from .harness import (
    ALL,
    GRANIAN,
    H11,
    HYPERCORN,
    HYPERCORN_H2,
    HYPERCORN_TRIO,
    Kind,
    Server,
    raw_request,
    read_until,
    serve,
    tasks,
)

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


@pytest.fixture(scope="module", params=ALL, ids=str)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve each kind of server once; the requests of the tests differ in their ids."""
    with serve(request.param, tmp_path_factory.mktemp("server")) as server:
        yield server


def test_matrix(server: Server) -> None:
    """G1, G2, G12: on every server, each kind of application gets the same tasks run after the same steps of its own."""
    cases = CASES | (DJANGO if server.kind.asyncio else {}) | (WEBSOCKET if server.kind.websocket else {})
    for path, expected in cases.items():
        drive(server, path)
        server.wait_for(f"{path} {expected[-1]}")
    assert {path: server.lines(path) for path in cases} == cases


def test_response_does_not_wait(server: Server) -> None:
    """G6, G9: the client has its whole response, and on the same connection the next one, while its tasks still run."""
    with server.client() as client:
        for request in ("first", "second"):
            assert client.get("/raw/plain" + tasks("held:gated", "next:quick", request=request)).text == "hello"
            server.wait_for(f"{request} held RUNNING")
    assert server.lines("first") == server.lines("second") == ["final", "returned", "held RUNNING"]
    for request in ("first", "second"):
        server.open_gate(f"{request}.held")
        server.wait_for(f"{request} next SUCCEEDED")
        assert server.lines(request)[3:] == ["held SUCCEEDED", "next RUNNING", "next SUCCEEDED"]


def test_pipelined_request(server: Server) -> None:
    """G6, G9: a request that was pipelined behind one with tasks is answered while those run."""
    if server.kind.tls:
        pytest.skip("HTTP/2 has streams instead")
    with server.connect() as connection:
        first = "/raw/plain" + tasks("held:gated", request="ahead")
        second = "/raw/plain" + tasks("quick:quick", request="behind")
        connection.sendall(raw_request(first) + raw_request(second))
        assert read_until(connection, b"hello", 2).count(b"HTTP/1.1 200") == 2
    server.wait_for("ahead held RUNNING", "behind quick SUCCEEDED")
    assert server.lines("ahead") == ["final", "returned", "held RUNNING"]
    server.open_gate("ahead.held")
    server.wait_for("ahead held SUCCEEDED")


LEFT = ["one SKIPPED", "failed RUNNING", "failed SUCCEEDED", "always RUNNING", "always SUCCEEDED"]
COMPLETE = ["one RUNNING", "one SUCCEEDED", "failed SKIPPED", "always RUNNING", "always SUCCEEDED"]


def test_client_leaves(server: Server) -> None:
    """G2, G12: a client that leaves in the middle of a stream fails its request, on every server alike.

    Starlette's BaseHTTPMiddleware hides that: it sends a final message although the client has gone. Hypercorn's
    asyncio worker, on HTTP/2, may not take that message before it shuts down.
    """
    query = ("one:quick", "failed:quick:failure", "always:quick:always")
    expected = {
        "/raw/stream": ["disconnected", *LEFT],
        "/starlette/endless": ["stream over", *LEFT],
    }
    if server.kind is not HYPERCORN_H2:
        expected["/base/endless"] = ["stream over", *COMPLETE]
    for path, lines in expected.items():
        with server.client() as client, client.stream("GET", path + tasks(*query, request=path)) as answer:
            assert next(answer.iter_text()).startswith("more")
        server.wait_for(f"{path} {lines[-1]}")
    assert {path: server.lines(path) for path in expected} == expected


def test_client_leaves_without_reading(server: Server) -> None:
    """G2, G12: a client that sends its request and leaves at once gets its tasks run, as its response was made."""
    if server.kind.tls:
        pytest.skip("a client of HTTP/2 has to read to send")
    with server.connect() as connection:
        connection.sendall(raw_request("/fastapi/plain" + tasks("one:gated", "two:thread", request="gone")))
    server.wait_for("gone one RUNNING")
    server.open_gate("gone.one")
    server.wait_for("gone after-yield SUCCEEDED")
    assert server.lines("gone") == [
        "commit",
        *["one RUNNING", "one SUCCEEDED", "two RUNNING", "two SUCCEEDED"],
        *["after-yield RUNNING", "after-yield SUCCEEDED"],
    ]


@pytest.mark.parametrize("kind", [H11, HYPERCORN, GRANIAN], ids=str)
def test_application_without_lifespan(kind: Kind, tmp_path: Path) -> None:
    """G8, G10: for an application that raises on its lifespan the server still gets each message once, after the drain."""
    with serve(kind, tmp_path, app="apps:django_only") as server:
        assert server.get("/async" + tasks("held:gated", request="one")).text == "hello"
        server.wait_for("one held RUNNING")
        server.send_signal()
        server.wait_for("- server: shutdown ")
        server.open_gate("one.held")
        server.wait()
        assert server.lines("one") == ["request_finished", "held RUNNING", "held SUCCEEDED"]
        messages = [line.split()[1] for line in server.lines("-")]
        assert messages == ["startup", "startup.complete", "shutdown", "shutdown.complete"]


@pytest.mark.parametrize("app", ["apps:broken", "apps:broken_wrapped"])
def test_startup_fails(app: str, tmp_path: Path) -> None:
    """G10: under uvicorn's `--lifespan on` an application that fails before it receives its startup is not served."""
    with (
        pytest.raises(AssertionError, match=r"(?s)the middleware is broken.*Application startup failed\. Exiting\."),
        serve(H11.with_options("--lifespan", "on"), tmp_path, app=app),
    ):
        pass


@pytest.mark.parametrize("app", ["apps:broken", "apps:broken_wrapped"])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (H11.with_options("--lifespan", "auto"), "ASGI 'lifespan' protocol appears unsupported."),
        (HYPERCORN, "ASGI Framework Lifespan error"),
        (HYPERCORN_TRIO, "ASGI Framework Lifespan error"),
        (GRANIAN, "ASGI Lifespan errored"),
    ],
    ids=str,
)
def test_startup_fails_and_the_server_goes_on(app: str, kind: Kind, says: str, tmp_path: Path) -> None:
    """G10: a server that goes on without a lifespan says so of a failed startup, and still ends when it is told."""
    with serve(kind, tmp_path, app=app) as server:
        server.wait_for_log(says)
        server.stop()
