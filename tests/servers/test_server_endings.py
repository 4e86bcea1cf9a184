"""Every server, every ending: which tasks end in which state, what is said about them, and that the process ends."""

from __future__ import annotations

import signal
import subprocess
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
    NO_LIFESPAN,
    WORKERS,
    Kind,
    Server,
    raw_request,
    read_until,
    serve,
    tasks,
    until,
)

pytestmark = pytest.mark.servers


@contextmanager
def response(server: Server, path: str, *specifications: str, request: str, marker: bytes = b"hello") -> Iterator[None]:
    """Send a request over a connection of its own, and hold that open until the end of the block."""
    with server.connect() as connection:
        connection.sendall(raw_request(path + tasks(*specifications, request=request)))
        read_until(connection, marker)
        yield


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        *[(kind, signal.SIGTERM) for kind in ALL if kind.lifespan],
        *[(kind, signal.SIGINT) for kind in (H11, WORKERS, HYPERCORN, HYPERCORN_TRIO, GRANIAN)],
    ],
    ids=str,
)
def test_shutdown(kind: Kind, number: signal.Signals, tmp_path: Path) -> None:
    """G8: a server told to stop waits for the tasks that run, in the loop and in threads, and those behind them.

    So it does when it is told a second time, but for gunicorn, whose second SIGINT kills.
    """
    with serve(kind, tmp_path) as server:
        server.get("/raw/plain" + tasks("one:gated", "two:quick", request="loop"))
        server.get("/raw/plain" + tasks("one:gated-thread", "two:thread", request="thread"))
        server.wait_for("loop one RUNNING", "thread one RUNNING")
        server.send_signal(number)
        server.wait_for("- server: shutdown ")
        server.send_signal(signal.SIGTERM)
        if kind is not GUNICORN:
            server.send_signal(signal.SIGINT)
        server.open_gate("loop.one")
        server.open_gate("thread.one")
        server.wait()
        ran = ["final", "returned", "one RUNNING", "one SUCCEEDED", "two RUNNING", "two SUCCEEDED"]
        assert server.lines("loop") == server.lines("thread") == ran
        assert server.ends_of_lifespan().count("shutdown.complete") == kind.workers
        assert "Traceback" not in server.log()


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
        assert server.lines("loop") == ["final", "returned", "stuck RUNNING", "behind ABANDONED", "stuck ABANDONED"]
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


HELD = ["final", "returned", "one RUNNING"]
ENDED = [*HELD, "one SUCCEEDED"]


@contextmanager
def task_held(kind: Kind, folder: Path, *more: str, drain_timeout: float = 15) -> Iterator[Server]:
    """Serve, with the first task of a request running until its gate is opened."""
    with serve(kind, folder, drain_timeout=drain_timeout) as server:
        assert server.get("/raw/plain" + tasks("one:gated", *more, request="held")).text == "hello"
        server.wait_for("held one RUNNING")
        yield server


# A worker is replaced


def test_uvicorn_limit_max_requests(tmp_path: Path) -> None:
    """G8: uvicorn's --limit-max-requests ends the process, after its tasks."""
    with task_held(H11.with_options("--limit-max-requests", "1"), tmp_path) as server:
        server.wait_for("- server: shutdown ")
        server.open_gate("held.one")
        server.wait()
        assert server.lines("held") == ENDED


@pytest.mark.parametrize(
    ("kind", "requests"),
    [
        (GUNICORN.with_options("--max-requests", "1"), 0),
        (HYPERCORN.with_options("--max-requests", "1"), 1),
        (HYPERCORN_TRIO.with_options("--max-requests", "1"), 1),
    ],
    ids=str,
)
def test_max_requests(kind: Kind, requests: int, tmp_path: Path) -> None:
    """G8: a worker that has served its number of requests ends its tasks, and another takes its place."""
    with task_held(kind, tmp_path) as server:
        for _ in range(requests):
            server.get("/raw/plain" + tasks(request="other"))
        server.wait_for("- server: shutdown ")
        server.open_gate("held.one")
        until(lambda: server.ends_of_lifespan().count("startup.complete") == 2, f"a new worker in {server.show()}")
        assert server.lines("held") == ENDED
        assert server.get("/raw/plain" + tasks(request="next")).text == "hello"


@pytest.mark.parametrize("kind", [GUNICORN, GRANIAN], ids=str)
def test_hang_up(kind: Kind, tmp_path: Path) -> None:
    """G8: on SIGHUP a new worker takes over while the old one ends its tasks."""
    with task_held(kind, tmp_path) as server:
        server.send_signal(signal.SIGHUP)
        server.wait_for("- server: shutdown ")
        until(lambda: server.ends_of_lifespan().count("startup.complete") == 2, f"a new worker in {server.show()}")
        assert server.lines("held") == HELD
        server.open_gate("held.one")
        server.wait_for("held one SUCCEEDED", "- server: shutdown.complete ")
        assert server.get("/raw/plain" + tasks(request="next")).text == "hello"


def test_uvicorn_reload(tmp_path: Path) -> None:
    """G8: uvicorn's --reload waits for the tasks of the old code before it starts the new."""
    with task_held(H11.with_options("--reload"), tmp_path) as server:
        (tmp_path / "changed.py").write_text("changed = True\n")
        server.wait_for("- server: shutdown ")
        server.open_gate("held.one")
        until(lambda: server.ends_of_lifespan().count("startup.complete") == 2, f"a new process in {server.show()}")
        assert server.lines("held") == ENDED


# What a server makes impossible


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (H11, signal.SIGKILL),
        (GUNICORN.with_options("--graceful-timeout", "1"), signal.SIGTERM),
        (GRANIAN.with_options("--workers-kill-timeout", "1"), signal.SIGTERM),
        (HYPERCORN.with_options("-w", "2"), signal.SIGTERM),
        (HYPERCORN_TRIO.with_options("-w", "2"), signal.SIGTERM),
        (NO_LIFESPAN.with_options("--timeout-graceful-shutdown", "1"), signal.SIGTERM),
    ],
    ids=str,
)
def test_killed(kind: Kind, number: signal.Signals, tmp_path: Path) -> None:
    """G8: a worker that is killed, by SIGKILL or by its own server before the tasks have ended, loses them unsaid."""
    with task_held(kind, tmp_path, "two:quick", drain_timeout=5) as server:
        server.stop(number)
        assert server.lines("held") == HELD


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_gunicorn_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    """G8: a SIGINT or SIGQUIT to gunicorn does not reach its uvicorn worker as a shutdown: it serves on until it is killed."""
    with task_held(GUNICORN.with_options("--graceful-timeout", "1"), tmp_path) as server:
        server.stop(number)
        assert server.lines("held") == HELD
        assert server.ends_of_lifespan() == ["startup.complete"]
        assert not any(line.startswith("server: shutdown") for line in server.lines("-"))


def test_gunicorn_interrupted_while_it_ends(tmp_path: Path) -> None:
    """G8: a SIGINT to gunicorn while it waits for its worker shortens that to two seconds."""
    with task_held(GUNICORN, tmp_path) as server:
        server.send_signal()
        server.wait_for("- server: shutdown ")
        server.stop(signal.SIGINT)
        assert server.lines("held") == HELD


@pytest.mark.parametrize("kind", [HYPERCORN, HYPERCORN_TRIO], ids=str)
def test_hypercorn_shutdown_timeout(kind: Kind, tmp_path: Path) -> None:
    """G2, G8: hypercorn's shutdown_timeout cuts a longer drain_timeout short; what is left is ABANDONED and named."""
    with task_held(kind.with_options(settings="shutdown_timeout = 1\n"), tmp_path, "two:quick") as server:
        server.stop()
        lines = server.lines("held")
        assert lines[:-2] == HELD
        assert sorted(lines[-2:]) == ["one ABANDONED", "two ABANDONED"]  # asyncio cancels what is left in any order
        assert "Abandoned at shutdown: deferred task 'two', added at" in server.log()


def test_client_stalls_through_the_shutdown(tmp_path: Path) -> None:
    """G1: where the server's cancellation keeps a transaction from its commit, the default tasks are skipped.

    Hypercorn's trio worker waits without limit for a client that does not read, and then cancels the call.
    """
    with serve(HYPERCORN_TRIO.with_options("--graceful-timeout", "1"), tmp_path) as server:
        query = ("one:quick", "failed:quick:failure", "complete:quick:complete")
        with response(server, "/fastapi/big", *query, request="stalled", marker=b"200"):
            server.wait_for("stalled sending")
            server.send_signal()
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(2)
        server.wait()
        assert server.lines("stalled") == [
            "sending",
            "one SKIPPED",
            *["failed RUNNING", "failed SUCCEEDED"],
            *["complete RUNNING", "complete SUCCEEDED"],
        ]


def test_hypercorn_h2_idle_connection(tmp_path: Path) -> None:
    """G8: hypercorn's asyncio worker begins its shutdown only when its HTTP/2 clients have gone; its trio worker does not wait."""
    kind = HYPERCORN_H2.with_options("--graceful-timeout", "1")
    with serve(kind, tmp_path) as server:
        with server.client() as client:
            client.get("/raw/plain" + tasks("one:gated", request="held"))
            server.wait_for("held one RUNNING")
            server.send_signal()
            server.open_gate("held.one")
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(2.5)
            assert server.ends_of_lifespan() == ["startup.complete"]
        server.wait()
        assert server.lines("held") == ENDED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_uvicorn_interrupted_twice(number: signal.Signals, tmp_path: Path) -> None:
    """G2: uvicorn's second SIGINT while a call still runs ends it without a lifespan.shutdown; tasks end and say so only if the first was a SIGINT too."""
    with (
        task_held(H11, tmp_path, "two:quick") as server,
        response(server, "/raw/teardown", "one:quick", request="teardown"),
    ):
        server.wait_for("teardown teardown")
        server.send_signal(number)
        server.wait_until_closed()
        server.send_signal(signal.SIGINT)
        server.wait()
        assert server.ends_of_lifespan() == ["startup.complete"]
        if number is signal.SIGTERM:
            assert (server.lines("held"), server.lines("teardown")) == (HELD, ["final", "teardown"])
        else:  # asyncio cancels all its tasks, in any order: ours may see theirs cancelled before the lifespan's
            assert sorted(server.lines("held")[3:]) in (
                [f"one {state}", "two ABANDONED"] for state in ("ABANDONED", "CANCELLED")
            )
            assert server.lines("teardown") == ["final", "teardown", "one ABANDONED"]


# Without a lifespan


def test_lifespan_off_waits_without_limit(tmp_path: Path) -> None:
    """G9: `--lifespan off`, uvicorn waits for the calls, and so for their tasks, beyond any drain_timeout."""
    with task_held(NO_LIFESPAN, tmp_path, "two:quick", drain_timeout=0.1) as server:
        server.send_signal()
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        server.open_gate("held.one")
        server.wait()
        assert server.lines("held") == [*ENDED, "two RUNNING", "two SUCCEEDED"]


def test_daphne_shutdown(tmp_path: Path) -> None:
    """G9: on daphne the tasks of all requests are finished after SIGTERM, within drain_timeout."""
    with serve(DAPHNE, tmp_path) as server:
        for request in ("first", "second"):
            server.get("/raw/plain" + tasks("one:gated", "two:thread", request=request))
            server.wait_for(f"{request} one RUNNING")
        server.send_signal()
        server.wait_for_log("Killed 2 pending application instances")
        server.open_gate("first.one")
        server.wait_for("first two SUCCEEDED")
        server.open_gate("second.one")
        server.wait()
        assert server.lines("first") == server.lines("second") == [*ENDED, "two RUNNING", "two SUCCEEDED"]


def test_daphne_shutdown_with_another_request(tmp_path: Path) -> None:
    """G9: daphne exits as soon as any call that it cancelled has ended: one without tasks takes the others' with it."""
    with (
        task_held(DAPHNE, tmp_path, "two:quick") as server,
        response(server, "/raw/stream", request="stream", marker=b"more"),
    ):
        server.stop()
        assert server.lines("held") == HELD


def test_daphne_application_close_timeout(tmp_path: Path) -> None:
    """G2, G9: daphne cancels a call some time after its client has left; from then on tasks have drain_timeout."""
    kind = DAPHNE.with_options("--application-close-timeout", "1")
    with task_held(kind, tmp_path, "two:never", drain_timeout=2) as server:
        server.wait_for_log("took too long to shut down and was killed")
        server.open_gate("held.one")
        server.wait_for("held two RUNNING")
        server.stop()
        assert server.lines("held") == [*ENDED, "two RUNNING", "two ABANDONED"]


# Mounted


WARNING = "this DeferredMiddleware wraps a mounted application or a route, which no lifespan reaches"


@pytest.mark.parametrize("kind", [H11, GRANIAN], ids=str)
def test_mounted(kind: Kind, tmp_path: Path) -> None:
    """G11: a middleware on a mounted application only is warned of before granian drops its tasks; uvicorn waits."""
    with serve(kind, tmp_path, app="apps:mounted") as server:
        server.get("/sub/plain" + tasks("one:gated", request="held"))
        server.wait_for("held one RUNNING")
        server.wait_for_log(WARNING)
        server.send_signal()
        if kind is not GRANIAN:
            server.wait_until_closed()
            server.open_gate("held.one")
        server.wait()
        assert server.lines("held") == (HELD if kind is GRANIAN else ENDED)


@pytest.mark.parametrize("kind", [H11, HYPERCORN, HYPERCORN_TRIO, GRANIAN], ids=str)
def test_mounted_and_entered(kind: Kind, tmp_path: Path) -> None:
    """G8: with `async with runner:` in the outermost lifespan, the tasks of a mounted application are waited for."""
    with serve(kind, tmp_path, app="apps:mounted_entered") as server:
        server.get("/sub/plain" + tasks("one:gated", request="held"))
        server.wait_for("held one RUNNING")
        server.send_signal()
        server.wait_for("- shutdown")
        server.open_gate("held.one")
        server.wait()
        assert server.lines("held") == ENDED
        assert WARNING not in server.log()


# Overload


def test_uvicorn_limit_concurrency(tmp_path: Path) -> None:
    """G7: calls that overflow="wait" holds count for uvicorn's --limit-concurrency, which answers 503 then, and recovers."""
    with serve(H11.with_options("--limit-concurrency", "10"), tmp_path, max_pending=5) as server:

        def status(number: int) -> int:
            return server.get("/raw/plain" + tasks("one:gated", request=f"{number}")).status_code

        statuses = [status(number) for number in range(25)]
        accepted = [number for number in range(25) if statuses[number] == 200]
        assert set(statuses) == {200, 503}
        assert 5 < len(accepted) <= 5 + 10
        for number in accepted:
            server.open_gate(f"{number}.one")
            server.wait_for(f"{number} one SUCCEEDED")
        until(lambda: server.get("/raw/plain" + tasks(request="next")).status_code == 200, "uvicorn to recover")
