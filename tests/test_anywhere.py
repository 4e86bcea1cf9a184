"""What is public may be called from anywhere, and nothing of the user's can harm the account."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from asgi_deferred import DeferredMiddleware, DeferredTasks, MiddlewareMissing, Runner, current_tasks, defer
from asgi_deferred.engines import register

from .conftest import BACKENDS
from .support import Log, assert_conserved, http_scope, no_more_messages, request, responder, states

pytestmark = pytest.mark.anyio

logger = logging.getLogger("asgi_deferred")


@contextlib.contextmanager
def handling(emit: Callable[[logging.LogRecord], object]) -> Iterator[None]:
    """Give the library's log a handler."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            emit(record)

    handler = Handler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


async def fail() -> None:
    raise ValueError


def fail_sync() -> None:
    raise ValueError


async def nothing() -> None: ...


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("failing", [fail, fail_sync])
async def test_a_log_handler_that_defers(failing: Any, live: bool) -> None:
    """G13, G11: a log handler adds a task to the list whose task has failed, and that one runs."""
    log, runner = Log(), Runner()
    app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(failing)), runner)
    with handling(lambda record: defer(log.note, record.levelname)):
        async with runner if live else contextlib.nullcontext():
            await app(http_scope(), no_more_messages, Log().send)
            await runner.wait_idle()
    assert log == ["ERROR"]
    assert_conserved(runner)


class Cyclic:
    """Garbage that only the collector finds, and that defers as it is finalised."""

    def __init__(self, finalise: Callable[[], object]) -> None:
        self.me = self
        self.finalise = finalise

    def __del__(self) -> None:
        self.finalise()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_finaliser_that_defers(backend: str) -> None:
    """G13: finalisers that log to a handler that defers run wherever Python collects, and never under the lock."""
    log, runner = Log(), Runner(max_concurrency=2, concurrent=True)
    lock: Any = runner._scheduler.account.lock
    locked: list[bool] = []

    def finalise() -> None:
        locked.append(lock._is_owned())
        logger.error("gone")

    app = DeferredMiddleware(
        responder(
            lambda tasks: [
                Cyclic(finalise) and tasks.options(key=number % 3).add_task(log.note, "task") for number in range(4)
            ]
        ),
        runner,
    )

    async def main() -> None:
        async with runner:
            for _ in range(25):
                await app(http_scope(), no_more_messages, Log().send)
                runner.statistics()
            await runner.wait_idle()

    def emit(record: logging.LogRecord) -> None:
        with contextlib.suppress(MiddlewareMissing):  # Python may collect where there is no current request
            defer(log.note, "from the log")

    threshold = gc.get_threshold()
    name, options = BACKENDS[backend]
    with handling(emit):
        gc.set_threshold(1, 1, 1)  # collect as often as Python can
        try:
            anyio.run(main, backend=name, backend_options=options)
        finally:
            gc.set_threshold(*threshold)
        gc.collect()
    assert set(locked) == {False}
    assert log.count("task") == 75
    assert log.count("from the log") > 0
    assert_conserved(runner)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no setitimer here")
def test_a_signal_handler_that_counts_and_defers() -> None:
    """G13, G2: in a signal handler, at whatever instruction it strikes, the statistics add up and tasks are accepted."""
    log, runner = Log(), Runner(max_threads=2)
    sums: list[bool] = []

    def strike(*_: object) -> None:
        counts = runner.statistics()
        sums.append(counts.accepted == sum(counts[1:]))
        defer(log.note, "from the signal")

    app = DeferredMiddleware(
        responder(lambda tasks: [tasks.add_task(log.note, "task"), tasks.add_task(log.note_sync, "task")]), runner
    )

    async def main() -> None:
        async with runner:
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            while len(sums) < 50:
                await app(http_scope(), no_more_messages, Log().send)
            signal.setitimer(signal.ITIMER_REAL, 0)
            await runner.wait_idle()

    before = signal.signal(signal.SIGALRM, strike)
    try:
        asyncio.run(main())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(sums)
    assert log.count("from the signal") == len(sums)
    assert_conserved(runner)


class Key:
    """A key whose hash is everybody's, and whose `==` does as told."""

    def __init__(self, equal: Callable[[], bool]) -> None:
        self.equal = equal

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return self.equal()


async def test_a_key_that_defers() -> None:
    """G13: a key's `==` adds tasks of the same hash to the same list, and each task is in it and runs once."""
    log, runner = Log(), Runner()
    added: list[str] = []

    def add(tasks: DeferredTasks) -> None:
        def equal() -> bool:
            if len(added) < 3:
                added.append("")
                tasks.options(key=Key(lambda: False)).add_task(log.note, f"from == {len(added)}")
            return False

        tasks.options(key=Key(equal)).add_task(log.note, "first")
        tasks.options(key=Key(equal)).add_task(log.note, "second")

    async with runner:
        await request(DeferredMiddleware(responder(add), runner), Log())
    assert sorted(log) == ["first", "from == 1", "from == 2", "from == 3", "second"]
    assert_conserved(runner)


@pytest.mark.parametrize("when", ["hashed by options", "hashed by add_task", "compared"])
async def test_a_key_that_raises(when: str) -> None:
    """G13: a key that raises refuses its task, which is neither counted nor run; the others of the list run."""
    log, runner = Log(), Runner()
    hashes = iter([1] if when == "hashed by add_task" else [])

    class Bad(Key):
        def __hash__(self) -> int:
            if when == "compared":
                return 1
            try:
                return next(hashes)
            except StopIteration:
                raise LookupError from None

        def __eq__(self, other: object) -> bool:
            raise LookupError

    def add(tasks: DeferredTasks) -> None:
        tasks.options(key=1).add_task(log.note, "good")
        with pytest.raises(LookupError):
            tasks.options(key=Bad(bool)).add_task(log.note, "bad")
        assert states(tasks) == ["Log.note PENDING"]

    async with runner:
        await request(DeferredMiddleware(responder(add), runner), Log())
    assert log == ["good"]
    assert runner.statistics().accepted == 1


async def test_engines_are_registered_while_others_add() -> None:
    """G13: `register()` in one thread, and adding what has to be recognised in another, do not disturb each other."""
    log, runner = Log(), Runner()

    def enqueue(task: Any) -> None: ...

    def register_many() -> None:
        for _ in range(100):
            register(type("Job", (), {}), enqueue)

    class Work:
        async def __call__(self) -> None:
            log.append("called")

    thread = threading.Thread(target=register_many)
    thread.start()
    try:
        async with runner:
            for _ in range(300):
                defer(Work())
    finally:
        thread.join()
    assert log == ["called"] * 300


class Broken:
    def write(self, _: str) -> None:
        raise OSError


def bad_observer(event: Any) -> None:
    raise SystemExit


def bad_emit(record: logging.LogRecord) -> None:
    raise SystemExit


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("kind", ["note", "note_sync"])
@pytest.mark.parametrize("stderr", [True, False])
async def test_logs_and_observers_that_raise(
    kind: str, stderr: bool, live: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """G3: handlers, filters and observers that raise end no list, thread or place, even where stderr is gone as well."""
    log = Log()
    runner = Runner(max_concurrency=1, max_threads=1, timeout=60, observers=[bad_observer, log])

    class BadFilter(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise KeyboardInterrupt

    def add(tasks: DeferredTasks) -> None:
        for number in range(3):
            tasks.options(name=str(number)).add_task(fail if kind == "note" else fail_sync)
            tasks.options(name="good").add_task(getattr(log, kind), f"note {number}")

    app = DeferredMiddleware(responder(add), runner)
    bad_filter = BadFilter()
    if not stderr:
        monkeypatch.setattr(sys, "stderr", Broken())
    with handling(bad_emit):
        async with runner if live else contextlib.nullcontext():
            await app(http_scope(), no_more_messages, Log().send)
            await runner.wait_idle()
            logger.addFilter(bad_filter)
            await app(http_scope(), no_more_messages, Log().send)
            await runner.wait_idle()
    logger.removeFilter(bad_filter)
    monkeypatch.undo()
    once = [
        line
        for number in range(3)
        for line in (f"{number} RUNNING", f"{number} FAILED", "good RUNNING", f"note {number}", "good SUCCEEDED")
    ]
    assert log == once * 2
    assert ("SystemExit" in capsys.readouterr().err) == stderr
    assert_conserved(runner)


async def test_a_log_that_raises_leaves_no_drain_half_done() -> None:
    """G3, G8: with a handler that raises, a drain past its deadline still ends all that is left."""
    runner = Runner(drain_timeout=0.01)
    with handling(bad_emit):
        async with runner:
            for _ in range(3):
                defer(anyio.sleep_forever)
            stuck = threading.Event()
            defer(stuck.wait)
            await anyio.lowlevel.checkpoint()
    stuck.set()
    assert runner.statistics().abandoned == 4
    assert_conserved(runner)


FORK = """
import asyncio, os, sys, warnings
from asgi_deferred import DeferredMiddleware, Runner, tasks_from

ran = []
runner = Runner()

async def app(scope, receive, send):
    tasks_from(scope).add_task(ran.append, "sync")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})

async def serve(lifespan):
    async def call():
        await DeferredMiddleware(app, runner)({"type": "http", "path": "/"}, None, send)
    async def send(message): ...
    if lifespan:
        async with runner:
            await call()
    else:
        await call()

lifespan = sys.argv[1] == "lifespan"
warnings.simplefilter("ignore", DeprecationWarning)
if sys.argv[1] == "open lifespan":
    asyncio.new_event_loop().run_until_complete(runner.__aenter__())
asyncio.run(serve(lifespan))
assert ran == ["sync"], ran
lock = runner._scheduler.account.lock
with lock:  # as if another thread were in the middle of a change
    child = os.fork()
if child == 0:
    asyncio.run(serve(lifespan))
    assert ran == ["sync", "sync"], ran
    assert runner.statistics()[:4] == (1, 0, 0, 1), runner.statistics()
    sys.exit(7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
assert runner.statistics()[:4] == (1, 0, 0, 1), runner.statistics()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="there is no fork here")
@pytest.mark.parametrize("lifespan", ["lifespan", "no lifespan", "open lifespan"])
def test_fork(lifespan: str) -> None:
    """G13: after a runner has run a sync task and the process forks, the child's tasks run, and its counts start at 0."""
    result = subprocess.run([sys.executable, "-c", FORK, lifespan], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


async def test_added_by_a_when_and_an_observer() -> None:
    """G13, G11: a `when` and an observer add tasks to the list that they are asked about, and those run."""
    log = Log()

    def observe(event: Any) -> None:
        if event.task.name == "first" and event.state.name == "RUNNING":
            defer(log.note, "from the observer")

    def when(outcome: object) -> bool:
        defer(log.note, "from when")
        return True

    runner = Runner(observers=[observe])
    app = DeferredMiddleware(
        responder(lambda tasks: tasks.options(when=when, name="first").add_task(log.note, "first")), runner
    )
    async with runner:
        await request(app, Log())
    assert log == ["first", "from when", "from the observer"]
    assert_conserved(runner)


async def test_wait_idle_inside_a_task() -> None:
    """A task that waits for the runner to be idle would wait for itself, and is told so; also from a child task."""
    log, runner = Log(), Runner()

    async def wait() -> None:
        with pytest.raises(RuntimeError, match=r"wait_idle\(\) was called inside the deferred task '.*wait'"):
            await runner.wait_idle()
        async with anyio.create_task_group() as group:

            async def child() -> None:
                with pytest.raises(RuntimeError, match="would wait for itself for ever"):
                    await runner.wait_idle()
                log.append("refused")

            group.start_soon(child)

    async with runner:
        defer(wait)
        await runner.wait_idle()
        current_tasks()
    assert log == ["refused"]
    assert runner.statistics().succeeded == 1
