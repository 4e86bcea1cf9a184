"""`asgi_deferred.dbos` in one process: stored first, run then, refused in time."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest
from anyio import to_thread
from psycopg.sql import SQL, Identifier

from asgi_deferred import DeferredMiddleware, Runner
from asgi_deferred.dbos import Store
from asgi_deferred.testing import inline
from tests.support import Log, request, responder

from .services import POSTGRES, database, need, wait_until
from .test_examples import STORED_FIRST

done: list[Any] = []
ended = threading.Semaphore(0)
gate = threading.Event()


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    done.clear()
    gate.clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the tables once, which takes longer than most tests here."""
    path = tmp_path_factory.mktemp("made") / "jobs.sqlite"

    async def main() -> None:
        async with open_store(path):
            pass

    anyio.run(main)
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path))


def sqlite_module() -> str:
    return "sqlite3" if sqlite3.sqlite_version_info >= (3, 42) else "pysqlite3.dbapi2"


def open_store(url: object) -> Store:
    return Store(f"{url}" if "://" in f"{url}" else f"sqlite:///{url}", drain_timeout=0)


def report(user: int, *, final: bool = False) -> None:
    done.append((user, final))
    ended.release()


async def report_async(user: int) -> None:
    await anyio.sleep(0)
    done.append((user, threading.current_thread()))
    ended.release()


def report_at_last(user: int) -> None:
    ended.release()
    assert gate.wait(20)
    done.append(user)


def end_the_process(user: int) -> None:
    done.append(user)
    ended.release()
    if not gate.is_set():
        raise SystemExit  # of which DBOS writes down as much as of a process that was killed


def new_code() -> None: ...


def give_back(user: int) -> object:
    done.append(user)
    ended.release()
    return threading.Lock()


async def give_back_async(user: int) -> object:
    return give_back(user)


def yield_later(user: int) -> Iterator[int]:
    return (each for each in [user])


def fail(user: int) -> None:
    raise LookupError(user)


async def end() -> None:
    """Wait for the end, or the beginning, of one task that says so."""
    assert await to_thread.run_sync(lambda: ended.acquire(timeout=20))


async def serve(task: Any, *args: Any, **kwargs: Any) -> Log:
    """Answer one request that defers `task` durably."""
    log = Log()

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info and record.exc_info[1]
            log.append(f"log: {type(error).__name__}: {error}".splitlines()[0])

    logger, note = logging.getLogger("asgi_deferred"), Note()
    logger.addHandler(note)
    app = responder(lambda tasks: tasks.options(durable=True, name="job").add_task(task, *args, **kwargs))
    try:
        async with Runner(observers=[log]) as runner:
            await request(DeferredMiddleware(app, runner), log)
    finally:
        logger.removeHandler(note)
    return log


SQLITE_ERROR = f"OperationalError: ({sqlite_module()}.OperationalError)"
NOT_ENTERED = "RuntimeError: The Store is not entered: write `async with store` in the application's lifespan"


def refused(error: str) -> list[str]:
    return ["job RUNNING", f"log: {error}", "job FAILED", "http.response.start", "http.response.body", "returned"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on an SQLite file, in another process, as an application would and a backup might."""
    program = (
        f"import sqlite3; c = sqlite3.connect({str(path)!r}); c.execute('BEGIN EXCLUSIVE'); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        yield
        holder.communicate(b"\n")


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_stored_and_run(loop: str, path: Path) -> None:
    """G1: a call is in the file before the response, and run then, in this process's only store; `async def` on asyncio's loop."""

    async def main() -> None:
        store = open_store(path)
        job, job_async = store.task(report), store.task(report_async)
        async with store:
            assert await serve(job, 1, final=True) == STORED_FIRST
            await end()
            assert await serve(job_async, 2) == STORED_FIRST
            await end()
            assert done[0] == (1, True)
            with pytest.raises(RuntimeError, match="Another Store is entered"):
                await open_store(path.with_name("other")).__aenter__()
            assert (done[1] == (2, threading.current_thread())) == (loop == "asyncio")

    anyio.run(main, backend=loop)


def test_refused_in_time(path: Path) -> None:
    """G11: 503, with the reason in the log, for wrong arguments, a locked file and a file that is gone; 202 once it is back."""

    async def main() -> None:
        store = open_store(path)
        job = store.task(report)
        assert await serve(job, 1) == refused(NOT_ENTERED)
        async with store:
            assert await serve(job) == refused("TypeError: missing a required argument: 'user'")
            assert await serve(job, 0) == STORED_FIRST
            await end()
            with locked(path):
                assert await serve(job, 1) == refused(f"{SQLITE_ERROR} database is locked")
            path.rename(path.with_suffix(".gone"))
            assert await serve(job, 2) == refused(f"{SQLITE_ERROR} attempt to write a readonly database")
            path.with_suffix(".gone").rename(path)
            assert await serve(job, 3) == STORED_FIRST
            await end()
            assert done == [(0, False), (3, False)]

    anyio.run(main)


def test_what_cannot_be_pickled(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """G3: an argument that cannot be pickled is a 503, and no log shows it; a result that cannot be is dropped, unless it is work that has not run."""

    async def main() -> None:
        store = Store(f"sqlite:///{path}")
        job = store.task(report)
        async with store:
            logging.getLogger("dbos").addHandler(caplog.handler)
            assert await serve(job, ["hunter2", threading.Lock()]) == refused(
                "TypeError: cannot pickle '_thread.lock' object"
            )
            assert "hunter2" not in caplog.text.replace('["hunter2", threading.Lock()]', "")  # but for the line of code
            caplog.clear()
            for each in (store.task(give_back), store.task(give_back_async)):
                assert await serve(each, 1) == STORED_FIRST
                await end()
            assert await serve(store.task(yield_later), 1) == STORED_FIRST
            with anyio.fail_after(20):
                while not caplog.records:
                    await anyio.sleep(0.01)

    try:
        anyio.run(main)
    finally:
        logging.getLogger("dbos").removeHandler(caplog.handler)
    assert done == [1, 1]
    (failed,) = [each.exc_info[1] for each in caplog.records if each.exc_info]
    assert repr(failed) == "TypeError('It returned a generator, which nobody runs: make it an `async def`')"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM workflow_status WHERE status = 'ERROR'").fetchone() == (1,)


def test_slots(path: Path) -> None:
    """G11: a task of a process that was killed runs again, also with other code and under another name, unless its own is alive; one that has ended is removed."""

    async def main() -> None:
        store = open_store(path)
        job, other = store.task(end_the_process), store.task(report)
        with locked(path.with_suffix(".sqlite.slot0")):
            async with store:
                await serve(job, 1)
                await end()
        with locked(path.with_suffix(".sqlite.slot1")):
            async with store:
                await serve(other, 2)
                await end()
        assert done == [1, (2, False)]
        gate.set()
        store.task(new_code)
        async with store:
            await end()
        assert done == [1, (2, False), 1]
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT count(*) FROM workflow_status").fetchone() == (1,)

    anyio.run(main)


def test_a_shutdown_waits(path: Path) -> None:
    """G8: a shutdown waits for the task that runs, and its end is written down; so is that of one that failed, which the log names."""
    failures: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            failures.append(f"{record.levelname} {record.exc_info and record.exc_info[1]!r}")
            ended.release()

    async def main() -> None:
        store = Store(f"sqlite:///{path}")
        job, failing = store.task(report_at_last), store.task(fail)

        async def close(closed: anyio.Event) -> None:
            await store.__aexit__()
            closed.set()

        async with anyio.create_task_group() as group:
            await store.__aenter__()
            logging.getLogger("dbos").addHandler(note)
            assert await serve(failing, 1) == STORED_FIRST
            await end()
            assert await serve(job, 2) == STORED_FIRST
            await end()
            closed = anyio.Event()
            group.start_soon(close, closed)
            await anyio.lowlevel.checkpoint()
            assert await serve(job, 3) == refused(NOT_ENTERED)
            with anyio.move_on_after(0.7):  # which a shutdown that does not wait would take
                await closed.wait()
            gate.set()

    note = Note()
    anyio.run(main)
    logging.getLogger("dbos").removeHandler(note)
    assert failures == ["ERROR LookupError(1)"]
    assert done == [2]
    with closing(sqlite3.connect(path)) as connection:
        assert sorted(connection.execute("SELECT status FROM workflow_status")) == [("ERROR",), ("SUCCESS",)]


def unfinished(url: str) -> int:
    """How many tasks DBOS has not seen the end of. A thread of its own waits for the database to write it down."""
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT FROM dbos.workflow_status WHERE status IN ('ENQUEUED', 'PENDING')")
        return found.rowcount


def test_postgres(path: Path) -> None:
    """G11: another URL, and tasks are stored in PostgreSQL: 503 while it is away, 202 once it is back; a slot is a lock there."""
    name = f"asgi-deferred-{uuid.uuid4().hex[:8]}"

    async def main(url: str, admin: psycopg.Connection) -> None:
        store = open_store(url)
        job, killed = store.task(report), store.task(end_the_process)
        with psycopg.connect(url) as holder:
            assert holder.execute("SELECT pg_try_advisory_lock(hashtext('asgi-deferred'), 0)").fetchone() == (True,)
            async with store:
                assert await serve(killed, 1) == STORED_FIRST
                await end()
        gate.set()
        async with store:
            await end()
            admin.execute(SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(Identifier(name)))
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            log = await serve(job, 2)
            assert log == refused(log[1].removeprefix("log: "))
            assert "not currently accepting connections" in log[1]
            admin.execute(SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(Identifier(name)))
            assert await serve(job, 3) == STORED_FIRST
            await end()
            await to_thread.run_sync(wait_until, lambda: unfinished(url) == 0, "DBOS to write down the ends")
        assert done == [1, 1, (3, False)]

    with database(name) as url, psycopg.connect(need(POSTGRES), dbname="postgres", autocommit=True) as admin:
        anyio.run(main, url, admin)


def test_what_no_store_can_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would lose tasks is refused where it is written: memory, a function without a name, an SQLite older than 3.42."""
    store = open_store(path)
    with pytest.raises(TypeError, match="has no name by which another process finds it"):
        store.task(lambda: None)
    for func in (path.exists, print, store.task(report), 5):
        with pytest.raises(TypeError, match="has no name by which another process finds it"):
            store.task(func)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^url is not like sqlite:///jobs\.sqlite$"):
        Store("jobs.sqlite")
    with pytest.raises(ValueError, match=r"^url=redis://me:\*\*\*@host/0 is not a database of SQLite or PostgreSQL$"):
        open_store("redis://me:secret@host/0")
    with pytest.raises(ValueError, match=r"^concurrency=0 must be more than 0"):
        Store("sqlite:///jobs.sqlite", concurrency=0)
    for url in ("sqlite://", "sqlite:///:memory:", "postgresql://localhost"):
        with pytest.raises(ValueError, match="names no file and no database"):
            open_store(url)
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 42, 0))
    open_store(path)
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 41, 2))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.41.2")
    monkeypatch.setitem(sys.modules, "pysqlite3.dbapi2", None)
    with pytest.raises(
        RuntimeError, match=r"needs SQLite 3\.42 or newer, and this Python was built with 3\.41\.2\. Install"
    ):
        open_store(path)


def test_a_start_that_fails(path: Path) -> None:
    """A store that cannot start says why, and leaves nothing behind: another one can."""

    async def main() -> None:
        path.with_name("other.slot0").write_bytes(b"no database" * 100)
        with pytest.raises(Exception, match="file is not a database"):
            await open_store(path.with_name("other")).__aenter__()
        async with open_store(path):
            pass

    anyio.run(main)


def test_inline(path: Path) -> None:
    """`inline()` and a plain call run the function itself, so that tests need no store."""
    job = open_store(path).task(report)

    async def main() -> None:
        with inline():
            assert await serve(job, 1) == [*STORED_FIRST[2:4], *STORED_FIRST[:2], "returned"]

    job(2, final=True)
    anyio.run(main)
    assert done == [(2, True), (1, False)]
