"""What a task leaves behind ends with it, and holds on to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_deferred import (
    DeferredMiddleware,
    DeferredTask,
    DeferredTasks,
    Runner,
    TaskState,
    current_tasks,
    defer,
    tasks_from,
)

from .conftest import BACKENDS
from .support import Log, assert_conserved, http_scope, no_more_messages, responder, states

pytestmark = pytest.mark.anyio


async def inside_a_task_group() -> AsyncIterator[int]:
    async with anyio.create_task_group():
        yield 1


async def inside_a_scope() -> AsyncIterator[int]:
    with anyio.move_on_after(0.05):
        yield 1


async def inside_a_shield() -> AsyncIterator[int]:
    with anyio.CancelScope(shield=True):
        yield 1


async def inside_a_timeout() -> AsyncIterator[int]:
    async with asyncio.timeout(0.05):
        yield 1


@pytest.fixture(scope="module", autouse=True)
def _collect_little() -> Iterator[None]:
    """Leave what was there before out of the collections: each takes a small fraction of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


def run_on(backend: str, main: Callable[[], Awaitable[None]]) -> None:
    """Run on an event loop that may complain of what is left to it: the runner may not."""
    name, options = BACKENDS[backend]
    anyio.run(main, backend=name, backend_options=options)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("subscribe", [inside_a_task_group, inside_a_scope, inside_a_shield, inside_a_timeout])
@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_task_leaves_open_ends_with_it(
    subscribe: Callable[[], AsyncIterator[int]], timeout: float | None, live: bool, backend: str
) -> None:
    """G3: a scope, task group or timeout left open changes nothing for the next task, the other lists and the runner."""
    if subscribe is inside_a_timeout and backend == "trio":
        pytest.skip("asyncio's own")
    log, runner = Log(), Runner(timeout=timeout)

    async def leave() -> None:
        async for _ in subscribe():  # pragma: no branch
            return

    lists: list[DeferredTasks] = []
    app = DeferredMiddleware(
        responder(lists.append, lambda tasks: [tasks.add_task(leave), tasks.add_task(log.note, "next")]), runner
    )

    async def main() -> None:
        async with runner if live else contextlib.nullcontext():
            for _ in range(3):
                await app(http_scope(), no_more_messages, Log().send)
            await runner.wait_idle()
            for _ in range(5):  # what was left to the event loop, it ends by and by
                gc.collect()
                await anyio.sleep(0.02)
            await app(http_scope(), no_more_messages, Log().send)

    run_on(backend, main)
    assert log == ["next"] * 4
    assert [list(tasks)[1].state for tasks in lists] == [TaskState.SUCCEEDED] * 4
    assert not runner.statistics().abandoned
    assert_conserved(runner)


async def test_a_kept_handle_cancels_nobody_else(anyio_backend: Any) -> None:
    """G3: cancelling the event loop's task of a deferred one, long after that has ended, cancels nothing."""
    if anyio_backend[0] == "trio":
        pytest.skip("trio gives no such handle")
    log, runner = Log(), Runner()
    handles: list[Any] = []

    async def keep() -> None:
        handles.append(asyncio.current_task())

    async def wait() -> None:
        await anyio.sleep(0.02)
        log.append("waited")

    async with runner:
        defer(keep)
        await runner.wait_idle()
        for _ in range(3):
            defer(wait)
        await anyio.sleep(0)
        for handle in handles:
            handle.cancel()
        await runner.wait_idle()
    assert log == ["waited"] * 3
    assert [handle.get_name() for handle in handles] == ["test_a_kept_handle_cancels_nobody_else.<locals>.keep"]


@pytest.mark.parametrize("error", [GeneratorExit, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize("sync", [True, False])
async def test_what_a_task_raises_stays_in_it(error: type[BaseException], sync: bool) -> None:
    """G2, G3: whatever is raised ends that one task, once, and the runner goes on."""
    log, runner = Log(), Runner(observers=[])
    runner.observers = (log,)

    async def fail() -> None:
        raise error

    def fail_sync() -> None:
        raise error

    async with runner:
        defer(fail_sync if sync else fail)
        await runner.wait_idle()
        defer(log.note, "after")
    counts = runner.statistics()
    assert (counts.failed + counts.cancelled, counts.succeeded) == (1, 1)
    assert len([entry for entry in log if entry.endswith(("FAILED", "CANCELLED"))]) == 1


class Big:
    """Something that is large, or at least can be seen to be gone."""


async def work(big: Big) -> None: ...


def work_sync(big: Big) -> None: ...


def work_in_two_steps(big: Big) -> Any:
    return work(big)


async def fail(big: Big) -> None:
    raise ValueError


def fail_in_two_steps(big: Big) -> Any:
    return fail(big)


def fail_sync(big: Big) -> None:
    raise ValueError


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a log: pytest keeps every record, and with it the error."""
    monkeypatch.setattr(logging.getLogger("asgi_deferred"), "disabled", True)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def around(task: DeferredTask) -> Iterator[None]:
    yield


@contextlib.asynccontextmanager
async def around_async(task: DeferredTask) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("function", [work, work_sync, work_in_two_steps, fail, fail_sync, fail_in_two_steps])
@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.usefixtures("no_capture")
async def test_an_ended_task_holds_nothing(function: Any, timeout: float | None, live: bool) -> None:
    """G6: reference counts alone free a task's arguments, and the task once its request and its list are gone."""
    runner = Runner(around=[around, around_async] if live else [])
    refs: list[weakref.ref[Any]] = []

    def add(tasks: DeferredTasks) -> None:
        big = Big()
        task = tasks.options(timeout=timeout).add_task(function, big)
        refs.extend([weakref.ref(big), weakref.ref(task)])

    app = DeferredMiddleware(responder(add), runner)
    async with runner if live else contextlib.nullcontext():
        await app(http_scope(), no_more_messages, Log().send)
        await runner.wait_idle()
        with collector_off():
            refs.clear()
            await app(http_scope(), no_more_messages, Log().send)
            await runner.wait_idle()
            with anyio.fail_after(10):
                while any(ref() is not None for ref in refs):  # a thread or the loop is about to let go of it
                    await anyio.sleep(0.001)


@pytest.mark.usefixtures("no_capture")
async def test_a_timed_out_task_holds_nothing(anyio_backend: Any) -> None:
    """G6: reference counts alone free a task that timed out, where its own frames hold no handle of the event loop."""
    if anyio_backend[0] == "trio":
        pytest.skip("the traceback of trio's cancellation leads to trio's task, and so to the context")
    runner, refs = Runner(), list[weakref.ref[Any]]()

    async def wait(big: Big) -> None:
        await anyio.Event().wait()

    def add(tasks: DeferredTasks) -> None:
        big = Big()
        task = tasks.options(timeout=0.01).add_task(wait, big)
        refs.extend([weakref.ref(big), weakref.ref(task)])

    async with runner:
        with collector_off():
            await DeferredMiddleware(responder(add), runner)(http_scope(), no_more_messages, Log().send)
            await runner.wait_idle()
            for _ in range(10):
                await anyio.sleep(0)
            assert [ref() for ref in refs] == [None, None]
    assert runner.statistics().timed_out == 1


@pytest.mark.parametrize("defers", [True, False])
async def test_a_failed_request_holds_nothing(defers: bool) -> None:
    """G6: the frames of a failed request are free once its tasks have ended, and at once if it had none."""
    log, runner = Log(), Runner()
    refs: list[weakref.ref[Any]] = []
    lists: list[DeferredTasks] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        big = Big()
        refs.append(weakref.ref(big))
        lists.append(tasks_from(scope))
        if defers:
            tasks_from(scope).options(when="failure").add_task(log.note, "task")
        raise ValueError

    async with runner:
        with collector_off():
            try:
                await DeferredMiddleware(app, runner)(http_scope(), no_more_messages, log.send)
            except ValueError:
                pass
            await runner.wait_idle()
            await anyio.sleep(0)
            assert refs[0]() is None
    assert log == ["task"] * defers
    outcome = lists[0].outcome
    assert outcome is not None
    assert (outcome.success, outcome.error) == (False, None)


def test_a_request_leaves_nothing_to_the_collector() -> None:
    """G6: a request with a task makes no reference cycle, counted."""

    async def quick() -> None: ...

    async def main() -> int:
        runner = Runner()
        app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(quick)), runner)
        log = Log()
        async with runner:
            for _ in range(10):
                await app(http_scope(), no_more_messages, log.send)
                await asyncio.sleep(0)
            with collector_off():
                for _ in range(100):
                    await app(http_scope(), no_more_messages, log.send)
                    await asyncio.sleep(0)
                await runner.wait_idle()
                await asyncio.sleep(0)
                return gc.collect()

    assert asyncio.run(main()) == 0


# Nothing grows


async def enter(runner: Runner) -> None:
    async with Runner():
        pass


async def distinct_keys(runner: Runner, *, count: list[int]) -> None:
    count[0] += 1
    current_tasks().options(key=f"key {count[0]}").add_task(nothing)
    await runner.wait_idle()


async def same_key(runner: Runner) -> None:
    current_tasks().options(key="key").add_task(nothing)
    current_tasks().options(key="key").add_task(nothing)
    await anyio.lowlevel.checkpoint()


async def give_up_waiting(runner: Runner) -> None:
    forever = anyio.Event()
    defer(forever.wait)
    with anyio.move_on_after(0):
        await runner.wait_idle()
    forever.set()
    await runner.wait_idle()


async def cancel_a_held_call(runner: Runner) -> None:
    held = Runner(max_pending=1)
    gate = anyio.Event()
    app = DeferredMiddleware(responder(lambda tasks: [tasks.add_task(gate.wait) for _ in range(3)]), held)
    async with held:
        with anyio.move_on_after(0):
            await app(http_scope(), no_more_messages, Log().send)
        gate.set()


async def add_to_itself(runner: Runner, *, tasks: list[DeferredTasks]) -> None:
    if not tasks:
        await DeferredMiddleware(responder(tasks.append, lambda each: each.add_task(nothing)), runner)(
            http_scope(), no_more_messages, Log().send
        )
    tasks[0].add_task(nothing)
    await runner.wait_idle()


async def nothing() -> None: ...


@pytest.mark.parametrize(
    "once",
    [
        enter,
        functools.partial(distinct_keys, count=[0]),
        same_key,
        give_up_waiting,
        cancel_a_held_call,
        functools.partial(add_to_itself, tasks=[]),
    ],
    ids=["enter", "distinct keys", "the same key", "wait_idle() given up", "held calls", "a late task"],
)
def test_nothing_grows(once: Callable[[Runner], Awaitable[None]]) -> None:
    """G6: what is done again and again leaves less than 100 bytes a round, however long the runner lives."""
    rounds = 200

    async def main() -> float:
        async with Runner() as runner:
            for _ in range(200):
                await once(runner)
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(rounds):
                await once(runner)
            gc.collect()
            return (tracemalloc.get_traced_memory()[0] - before) / rounds

    tracemalloc.start()
    try:
        assert asyncio.run(main()) < 100
    finally:
        tracemalloc.stop()


async def test_a_websocket_that_lives_long() -> None:
    """G6: a task with the same key on each message of an open connection leaves one task, and not one for each."""
    lists: list[DeferredTasks] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        lists.append(tasks_from(scope))
        for number in range(1000):
            lists[0].options(key="save", name=str(number)).add_task(nothing)

    runner = Runner()
    await DeferredMiddleware(app, runner)({"type": "websocket", "path": "/"}, no_more_messages, Log().send)
    assert len(lists[0]) < 100
    assert states(lists[0])[-1] == "999 SUCCEEDED"
    assert runner.statistics()[:4] == (1000, 0, 0, 1)
