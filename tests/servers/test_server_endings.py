"""Every server, every ending: which tasks end in which state, what is said about them, and that the process ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .harness import (
    ALL,
    DAPHNE,
    GRANIAN,
    GUNICORN,
    H11,
    HTTPTOOLS,
    HYPERCORN,
    HYPERCORN_H2,
    HYPERCORN_TRIO,
    HYPERCORN_TRIO_H2,
    NO_LIFESPAN,
    WORKERS,
    Kind,
    Server,
    raw_request,
    read_until,
    serve,
    tasks,
)

pytestmark = pytest.mark.servers

WITH_LIFESPAN = [kind for kind in ALL if kind.lifespan]


@contextmanager
def response(server: Server, path: str, *specifications: str, request: str, until: bytes = b"hello") -> Iterator[None]:
    """Send a request over a connection of its own, and hold that open until the end of the block."""
    with server.connect() as connection:
        connection.sendall(raw_request(path + tasks(*specifications, request=request)))
        read_until(connection, until)
        yield


LEFT = ["one SKIPPED", "failed RUNNING", "failed SUCCEEDED", "always RUNNING", "always SUCCEEDED"]


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_client_leaves(kind: Kind, tmp_path: Path) -> None:
    """G2, G12: a client that leaves in the middle of a stream fails its request, on every server alike."""
    query = ("one:quick", "failed:quick:failure", "always:quick:always")
    expected = {
        "raw": ["disconnected", *LEFT],
        "starlette": ["stream over", *LEFT],
        # It sends a final message although the client has gone; on HTTP/2 with asyncio, hypercorn takes that only at its end.
        "base": [
            "stream over",
            *["one RUNNING", "one SUCCEEDED", "failed SKIPPED", "always RUNNING", "always SUCCEEDED"],
        ],
    }
    with serve(kind, tmp_path) as server:
        for app in expected:
            path = "/raw/stream" if app == "raw" else f"/{app}/endless"
            with server.client() as client, client.stream("GET", path + tasks(*query, request=app)) as answer:
                assert next(answer.iter_text()).startswith("more")
            server.wait_for(f"{app} {'stream over' if app == 'base' else 'always SUCCEEDED'}")
        server.stop()
        assert {app: server.lines(app) for app in expected} == expected


@pytest.mark.parametrize("kind", [kind for kind in ALL if not kind.tls], ids=str)
def test_client_leaves_without_reading(kind: Kind, tmp_path: Path) -> None:
    """G2, G12: a client that sends its request and leaves at once gets its tasks run, as its response was made."""
    with serve(kind, tmp_path) as server:
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", WITH_LIFESPAN, ids=str)
def test_shutdown(kind: Kind, number: signal.Signals, tmp_path: Path) -> None:
    """G8: a server told to stop waits for the tasks that run, in the loop and in threads, and those behind them."""
    if kind is GUNICORN and number is signal.SIGINT:
        pytest.skip("gunicorn's SIGINT is its quick shutdown, with a test of its own")
    with serve(kind, tmp_path) as server:
        server.get("/raw/plain" + tasks("one:gated", "two:quick", request="loop"))
        server.get("/raw/plain" + tasks("one:gated-thread", "two:thread", request="thread"))
        server.wait_for("loop one RUNNING", "thread one RUNNING")
        server.send_signal(number)
        for _ in range(kind.workers):
            server.wait_for("- server: shutdown ")
        server.open_gate("loop.one")
        server.open_gate("thread.one")
        server.wait()
        ran = ["final", "returned", "one RUNNING", "one SUCCEEDED", "two RUNNING", "two SUCCEEDED"]
        assert server.lines("loop") == server.lines("thread") == ran
        assert server.ends_of_lifespan().count("shutdown.complete") == kind.workers


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not NO_LIFESPAN], ids=str)
def test_tasks_that_never_end(kind: Kind, tmp_path: Path) -> None:
    """G2, G8: at drain_timeout what is left is cancelled, named in the log and ABANDONED, and the process ends.

    A thread that is stuck does not hold it up.
    """
    with serve(kind, tmp_path, drain_timeout=1) as server:
        server.get("/raw/plain" + tasks("stuck:never", "behind:quick", request="loop"))
        server.get("/raw/plain" + tasks("stuck-in-thread:never-thread", "behind:thread", request="thread"))
        server.wait_for("loop stuck RUNNING", "thread stuck-in-thread RUNNING")
        server.stop()
        assert server.lines("loop") == ["final", "returned", "stuck RUNNING", "stuck ABANDONED", "behind ABANDONED"]
        assert server.lines("thread")[2:] == [
            "stuck-in-thread RUNNING",
            "stuck-in-thread ABANDONED",
            "behind ABANDONED",
        ]
        for name in ("stuck", "stuck-in-thread"):
            assert f"Abandoned at shutdown: deferred task '{name}', added at" in server.log()
        assert server.log().count("Abandoned at shutdown: deferred task 'behind', added at") == 2
        if kind.lifespan and kind is not WORKERS:
            assert "drain_timeout=1.0 s is over; abandoning deferred tasks: " in server.log()
            assert "'behind' (2)" in server.log()
            assert "abandoned=4)" in server.lines("-")[-2]


TEARDOWN_WAITS = ["final", "teardown", "returned", "one RUNNING", "one SUCCEEDED", "failed SKIPPED"]
TEARDOWN_CUT = ["final", "teardown", "one SKIPPED", "failed RUNNING", "failed SUCCEEDED"]


@pytest.mark.parametrize("kind", [H11, HTTPTOOLS, GUNICORN, GRANIAN, NO_LIFESPAN], ids=str)
def test_shutdown_during_teardown(kind: Kind, tmp_path: Path) -> None:
    """G8: a request that is past its response but not yet returned is waited for, and then its tasks are."""
    with serve(kind, tmp_path) as server:
        query = ("one:quick", "failed:quick:failure")
        with response(server, "/raw/teardown", *query, request="teardown"):
            server.wait_for("teardown teardown")
            server.send_signal()
            if kind is GRANIAN:
                server.wait_for("- server: shutdown ")
            else:
                server.wait_until_closed()
            server.open_gate("teardown.teardown")
            server.wait_for("teardown failed SKIPPED")
        server.wait()
        assert server.lines("teardown") == TEARDOWN_WAITS


@pytest.mark.parametrize(
    "kind",
    [
        H11.with_options("--timeout-graceful-shutdown", "1"),
        HYPERCORN.with_options("--graceful-timeout", "1"),
        HYPERCORN_TRIO.with_options("--graceful-timeout", "1"),
        DAPHNE,
    ],
    ids=str,
)
def test_server_cancels_the_teardown(kind: Kind, tmp_path: Path) -> None:
    """G1, G2: where the server cancels a call in its teardown, the default tasks are skipped, those for failures run."""
    with serve(kind, tmp_path) as server:
        query = ("one:quick", "failed:quick:failure")
        with response(server, "/raw/teardown", *query, request="teardown"):
            server.wait_for("teardown teardown")
            server.send_signal()
            server.wait_for("teardown failed SUCCEEDED")
        server.wait()
        assert server.lines("teardown") == TEARDOWN_CUT


@pytest.mark.parametrize("kind", [H11, HYPERCORN, HYPERCORN_TRIO, GRANIAN], ids=str)
def test_second_signal(kind: Kind, tmp_path: Path) -> None:
    """G8: a second SIGTERM and a SIGINT while tasks are waited for change nothing."""
    with serve(kind, tmp_path) as server:
        server.get("/raw/plain" + tasks("one:gated", request="held"))
        server.wait_for("held one RUNNING")
        server.send_signal()
        server.wait_for("- server: shutdown ")
        server.send_signal()
        server.send_signal(signal.SIGINT)
        server.open_gate("held.one")
        server.wait()
        assert server.lines("held") == ["final", "returned", "one RUNNING", "one SUCCEEDED"]
        assert server.ends_of_lifespan() == ["startup.complete", "shutdown.complete"]
