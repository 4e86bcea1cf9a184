"""The ladder's rungs as real processes: what each keeps when everything is killed, and the second one's faults."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from subprocess import Popen

import httpx
import kombu.connection
import pytest

from tests.engines.services import RABBITMQ, ROOT, answers, free_port, need, process, wait_until, what_is_wrong

pytestmark = pytest.mark.servers

SQLITE = "examples.durable_sqlite"
WORKERS = {
    "examples.ladder.memory": [],
    SQLITE: [],
    "examples.ladder.broker": ["taskiq", "worker", "examples.ladder.broker:broker", "--workers=1"],
    "examples.ladder.machines": [
        "celery",
        "-A",
        "examples.ladder.machines:celery",
        "worker",
        "--pool=solo",
        "--without-mingle",
        "--without-gossip",
    ],
}


class Pipe:
    """A file of effects that is full: whoever writes to it is stopped, until the test reads."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pipe"
        os.mkfifo(self.path)
        self._end = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        self._fill = 0
        try:
            while True:
                self._fill += os.write(self._end, b"\n" * 4096)
        except BlockingIOError:
            pass

    def writers(self) -> set[int]:
        """Which other processes have the file open."""
        found: set[int] = set()
        for each in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                same = each.samefile(self.path)
            except OSError:  # it has ended, or is another user's
                continue
            if same:
                found.add(int(each.parts[2]))
        return found - {os.getpid()}

    def read(self) -> list[str]:
        """Let the writers go on, one after the other, and return what they write."""
        try:
            return os.read(self._end, 65536).decode().split()
        except BlockingIOError:
            return []


@contextmanager
def running(app: str, folder: Path, *options: str, prefix: tuple[str, ...] = (), **env: str) -> Iterator[Server]:
    """Run an application of the ladder and its worker, if it has one."""
    env = {"DATABASE_URL": f"sqlite:///{folder}/jobs.sqlite", "BROKER_URL": RABBITMQ, **env}
    port = free_port()
    uvicorn = ["uvicorn", f"{app}:app", f"--port={port}", "--log-level=warning", *options]
    with ExitStack() as stack:
        commands = [[*prefix, sys.executable, "-m", *each] for each in (uvicorn, WORKERS[app]) if each]
        processes = [stack.enter_context(process(*each, log=folder / "log", **env)) for each in commands]
        wait_until(lambda: processes[0].poll() is not None or answers("127.0.0.1", port), "uvicorn")
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30))
        server = Server(client, processes)
        stack.callback(server.kill)
        yield server


class Server:
    def __init__(self, client: httpx.Client, processes: list[Popen[bytes]]) -> None:
        self.client = client
        self.processes = processes

    def sign_up(self, email: str) -> int:
        return self.client.post("/signup", params={"email": email}).status_code

    def kill(self) -> None:
        for each in self.processes:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
            each.wait()


@pytest.fixture
def queue() -> Iterator[str]:
    name = f"asgi-deferred-{uuid.uuid4().hex[:8]}"
    yield name
    if what_is_wrong(RABBITMQ) is None:
        with kombu.connection.Connection(RABBITMQ) as connection:  # type: ignore[no-untyped-call]
            for each in (name, f"{name}.dead"):
                connection.default_channel.queue_delete(each)


@pytest.mark.parametrize("app", WORKERS)
def test_everything_is_killed(app: str, tmp_path: Path, queue: str) -> None:
    """G11: what was running when all processes were killed runs again on each rung but the first."""
    if WORKERS[app]:
        need(RABBITMQ)
    pipe, effects = Pipe(tmp_path), tmp_path / "effects"
    with running(app, tmp_path, QUEUE=queue, EFFECTS=str(pipe.path)) as server:
        assert server.sign_up("killed") == 202
        wait_until(pipe.writers, "the task to begin")
        server.kill()
    with running(app, tmp_path, QUEUE=queue, EFFECTS=str(effects)) as server:
        assert server.sign_up("next") == 202
        expected = {"next"} if app == "examples.ladder.memory" else {"killed", "next"}
        wait_until(lambda: effects.exists() and set(effects.read_text().split()) >= expected, f"{expected}")
    assert sorted(effects.read_text().split()) == sorted(expected)


def test_the_ladder_is_one_application() -> None:
    """Between the rungs the imports, one place and a decorator change, and nothing from the function on: no `add_task`."""
    texts = [(ROOT / f"{app.replace('.', '/')}.py").read_text() for app in WORKERS]
    below = {text.partition("\ndef welcome")[2] for text in texts}
    assert len(below) == 1
    assert "jobs.add_task(welcome, email)" in below.pop()


def test_two_workers(tmp_path: Path) -> None:
    """G11: of two worker processes one is killed while both run tasks: its tasks run again, and those of the other do not."""
    pipe = Pipe(tmp_path)

    def column(name: str) -> Counter[object]:
        """Count the values of a column of what DBOS knows of the tasks."""
        with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as connection:
            return Counter(value for (value,) in connection.execute(f"SELECT {name} FROM workflow_status"))

    with running(SQLITE, tmp_path, "--workers=2", EFFECTS=str(pipe.path)) as server:
        sent: list[str] = []

        def both_at_work() -> bool:
            sent.append(f"{len(sent)}")
            assert server.sign_up(sent[-1]) == 202
            return len(pipe.writers()) == 2

        wait_until(both_at_work, "both workers to run a task")
        os.kill(pipe.writers().pop(), signal.SIGKILL)
        by_process = column("executor_id")
        wait_until(lambda: column("recovery_attempts")[2], "a task to begin again")
        done: list[str] = []

        def all_done() -> bool:
            done.extend(pipe.read())
            return len(done) >= len(sent)

        wait_until(all_done, "all tasks")
        assert sorted(done) == sorted(sent)
        assert column("recovery_attempts")[2] in by_process.values()


def without_privileges() -> tuple[str, ...]:
    """The command that lets a root user's process be refused what a user's is."""
    return ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override") if os.geteuid() == 0 else ()


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of another process are Linux's")
def test_full_and_read_only(tmp_path: Path) -> None:
    """G11: on a full disk and a read-only one the client gets 503 and the log the reason; what got 202 is done."""
    folder, effects = tmp_path / "store", tmp_path / "effects"
    folder.mkdir()
    file = folder / "jobs.sqlite"
    accepted: list[str] = []
    env = {"DATABASE_URL": f"sqlite:///{file}", "EFFECTS": str(effects)}
    with running(SQLITE, tmp_path, prefix=without_privileges(), **env) as server:
        pid = server.processes[0].pid

        def sign_up(email: str) -> int:
            status = server.sign_up(email)
            if status == 202:
                accepted.append(email)
            return status

        def refused(begin: Callable[[], object], end: Callable[[], object]) -> None:
            assert sign_up(f"before-{len(accepted)}") == 202
            begin()
            wait_until(lambda: sign_up(f"{len(accepted)}" * 5000) == 503, "a refusal")
            end()
            wait_until(lambda: sign_up(f"after-{len(accepted)}") == 202, "the store to be used again")

        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        refused(
            lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, (file.stat().st_size, hard)),
            lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard)),
        )
        refused(lambda: folder.chmod(0o555), lambda: folder.chmod(0o755))
        wait_until(lambda: effects.exists() and {*effects.read_text().split()} >= {*accepted}, "all that was accepted")
    log = (tmp_path / "log").read_text()
    assert "disk I/O error" in log or "database or disk is full" in log
    assert "attempt to write a readonly database" in log
    assert "[parameters:" not in log  # what the task was given
