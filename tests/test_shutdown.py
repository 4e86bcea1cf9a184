"""Lifespans and drains: entered and left in any way, cut and resumed, met early and held to their deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import unittest
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_deferred import (
    DeferredMiddleware,
    DeferredTasks,
    Runner,
    RunnerClosed,
    TaskEvent,
    TaskState,
    defer,
    draining,
    tasks_from,
)
from asgi_deferred import _drains as drains

from .conftest import BACKENDS
from .support import OK, Log, assert_conserved, http_scope, lifespan, no_more_messages, request, responder

pytestmark = pytest.mark.anyio


async def nothing() -> None: ...


# Once there is a lifespan, and once there is none


@pytest.mark.parametrize("live", [True, False])
async def test_nobody_waits_for_ever_behind_a_stuck_thread(live: bool) -> None:
    """G7, G9: with one place, whose sync task is stuck as its call is cancelled, the next call's task gets the place."""
    log, entered, stuck = Log(), anyio.Event(), threading.Event()
    native: Any = anyio.lowlevel.current_token().native_token
    soon = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon
    runner = Runner(max_concurrency=1, drain_timeout=0.05)

    def block() -> None:
        soon(entered.set)
        stuck.wait()

    first = DeferredMiddleware(responder(lambda tasks: tasks.add_task(block)), runner)
    second = DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "second")), runner)
    try:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                with anyio.CancelScope() as scope:
                    group.start_soon(cancel_when, entered, scope)
                    async with runner if live else contextlib.nullcontext():
                        group.start_soon(request, second, Log())
                        await request(first, Log())
                        await anyio.sleep_forever()
            if live:
                async with runner:
                    await request(second, Log())
    finally:
        stuck.set()
    assert log == ["second"]
    assert runner.statistics().abandoned == 1 + live
    assert_conserved(runner)


async def cancel_when(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


@pytest.mark.parametrize("ticks", range(8))
async def test_a_request_that_ends_as_a_lifespan_starts(ticks: int) -> None:
    """G9: at whatever moment around the start of a lifespan a request ends, its task runs, and the runner stays whole."""
    log, go = Log(), anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        tasks_from(scope).add_task(log.note, "task")
        await go.wait()
        for message in OK:
            await send(message)

    wrapped = DeferredMiddleware(app)

    async def live() -> None:
        async with lifespan(wrapped):
            await request(wrapped, Log())

    async with anyio.create_task_group() as group:
        group.start_soon(request, wrapped, Log())
        await anyio.wait_all_tasks_blocked()
        group.start_soon(live)
        for _ in range(ticks):
            await anyio.lowlevel.checkpoint()
        go.set()
    assert log == ["task"] * 2
    assert_conserved(wrapped.runner)


async def test_a_polling_lifespan_loses_no_message() -> None:
    """G8, G10: an application that gives up waiting for the shutdown cuts the drain, which goes on at its next look."""
    log, gate, entered = Log(), anyio.Event(), anyio.Event()

    async def task() -> None:
        entered.set()
        await gate.wait()
        log.append("task ended")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            defer(task)
            return
        assert (await receive())["type"] == "lifespan.startup"
        await send({"type": "lifespan.startup.complete"})
        looks = 0
        while True:
            with anyio.CancelScope() as look:
                async with anyio.create_task_group() as group:
                    group.start_soon(give_up, look, looks)
                    message = await receive()
                    group.cancel_scope.cancel()
                break
            looks += 1
        log.append(message["type"])
        await send({"type": "lifespan.shutdown.complete"})

    async def give_up(scope: anyio.CancelScope, looks: int) -> None:
        await entered.wait()
        await anyio.wait_all_tasks_blocked()
        if looks < 3:
            log.append("gave up")
            scope.cancel()
        else:
            gate.set()

    wrapped = DeferredMiddleware(app)
    async with lifespan(wrapped):
        await wrapped({"type": "websocket", "path": "/"}, no_more_messages, Log().send)
        await entered.wait()
    assert log == ["gave up"] * 3 + ["task ended", "lifespan.shutdown"]
    assert_conserved(wrapped.runner)


# Entered and left in any way


async def test_entered_in_one_task_and_left_in_another() -> None:
    """G8: no cancel scope is held in the task that enters: a fixture may leave the runner in another one."""
    log, runner = Log(), Runner()
    entered, leave = anyio.Event(), anyio.Event()

    async def enter() -> None:
        await runner.__aenter__()
        entered.set()

    async def exit_() -> None:
        await entered.wait()
        await leave.wait()
        await runner.__aexit__(None, None, None)
        log.append("left")

    async with anyio.create_task_group() as group:
        group.start_soon(enter)
        group.start_soon(exit_)
        await entered.wait()
        await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "task")), runner), Log())
        leave.set()
    assert log == ["task", "left"]
    assert_conserved(runner)


def test_isolated_asyncio_test_case() -> None:
    """G8: `async with runner` in `asyncSetUp` and `asyncTearDown`, and in an AsyncExitStack of a test case."""
    log, runner = Log(), Runner()

    class Case(unittest.IsolatedAsyncioTestCase):
        async def asyncSetUp(self) -> None:
            await runner.__aenter__()
            await self.enterAsyncContext(runner)

        async def asyncTearDown(self) -> None:
            await runner.__aexit__(None, None, None)

        async def test(self) -> None:
            app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "task")), runner)
            await request(app, Log())

    result = unittest.TestResult()
    Case("test").run(result)
    assert (result.errors, result.failures, result.testsRun) == ([], [], 1)
    assert log == ["task"]
    assert_conserved(runner)


def test_two_event_loops_at_a_time() -> None:
    """G8, G13: one runner lives on two event loops in two threads; a task runs on its request's, and each end drains its own."""
    log, runner = Log(), Runner()
    both, first_left = threading.Barrier(2), threading.Event()

    async def task(name: str, loop: Any) -> None:
        assert asyncio.get_running_loop() is loop
        log.append(name)

    async def serve(name: str) -> None:
        loop = asyncio.get_running_loop()
        app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(task, name, loop)), runner)
        async with runner:
            both.wait(30)
            for _ in range(20):
                await request(app, Log())
            if name == "second":
                first_left.wait(30)
            await request(app, Log())
        log.append(f"{name} left")
        first_left.set()

    threads = [threading.Thread(target=asyncio.run, args=(serve(name),)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("first", "second"):
        assert log.count(name) == 21
        assert [entry for entry in log if entry.startswith(name)][-1] == f"{name} left"
    assert_conserved(runner)


def test_two_event_loops_in_one_thread() -> None:
    """G9: with a lifespan on one loop and a request on another of the same thread, the request runs its own tasks."""
    log, runner = Log(), Runner()
    loop = asyncio.new_event_loop()

    async def task() -> None:
        log.append(str(asyncio.get_running_loop() is not loop))

    loop.run_until_complete(runner.__aenter__())
    asyncio.run(request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(task)), runner), Log()))
    assert log == ["True"]
    loop.run_until_complete(runner.__aexit__(None, None, None))
    loop.close()
    assert_conserved(runner)


def test_added_late_to_an_event_loop_that_is_gone() -> None:
    """G11, G2: what is added to a request whose loop has gone without a word is refused, or ends ABANDONED at once."""
    runner = Runner()
    lists: list[DeferredTasks] = []

    async def main() -> None:
        await runner.__aenter__()
        await request(DeferredMiddleware(responder(lists.append), runner), Log())
        lists[0].add_task(nothing)
        await runner.wait_idle()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    assert lists[0].add_task(nothing).state is TaskState.ABANDONED
    assert lists[0].add_task(lambda: None).state is TaskState.ABANDONED
    assert_conserved(runner)


def test_cancelled_as_it_waits_for_a_thread_and_its_event_loop_is_gone() -> None:
    """G2, G7: a task that waits for a thread is cancelled after its event loop has gone, and the next one has its turn."""
    started, go, ended = threading.Event(), threading.Event(), threading.Event()
    lists: list[DeferredTasks] = []

    def observe(event: TaskEvent) -> None:
        if event.state is TaskState.SUCCEEDED:
            ended.set()

    runner = Runner(max_threads=1, observers=[observe])

    def stuck() -> None:
        started.set()
        go.wait(30)

    def add(tasks: DeferredTasks) -> None:
        lists.append(tasks)
        tasks.add_task(print)
        tasks.add_task(nothing)

    async def main() -> None:
        await runner.__aenter__()
        await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(stuck)), runner), Log())
        await request(DeferredMiddleware(responder(add), runner), Log())
        while not started.is_set():
            await anyio.lowlevel.checkpoint()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    parked, following = lists[0]
    assert parked.cancel()
    assert (parked.state, following.state) == (TaskState.CANCELLED, TaskState.ABANDONED)
    go.set()
    assert ended.wait(30)
    assert runner.statistics()[1:4] == (0, 0, 1)
    assert_conserved(runner)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "trio"])
def test_a_run_that_ends_at_any_iteration(live: bool, backend: str) -> None:
    """G2: `asyncio.run` may end after any number of iterations, and no task stays PENDING or RUNNING."""
    for iterations in range(25):
        runner = Runner(drain_timeout=30)

        async def two_steps() -> None:
            await anyio.lowlevel.checkpoint()

        def add(tasks: DeferredTasks) -> None:
            tasks.add_task(two_steps)
            tasks.add_task(lambda: two_steps())
            tasks.options(timeout=60).add_task(two_steps)

        app = DeferredMiddleware(responder(add), runner)

        async def serve() -> None:
            async with runner if live else contextlib.nullcontext():
                await app(http_scope(), no_more_messages, Log().send)
                await app(http_scope(), no_more_messages, Log().send)

        async def main() -> None:
            server = asyncio.ensure_future(serve())
            for _ in range(iterations):
                await asyncio.sleep(0)
            server.cancel() if iterations % 2 else None

        name, options = BACKENDS[backend]
        anyio.run(main, backend=name, backend_options=options)
        assert_conserved(runner)


# Met early, and held


async def test_draining_is_of_the_runner_that_was_entered() -> None:
    """G8: inside a runner's block `draining()` is false while another runner drains, before the first task as well."""
    started, began, finish = anyio.Event(), anyio.Event(), anyio.Event()

    async def task() -> None:
        started.set()
        while not draining():
            await anyio.sleep(0.001)
        began.set()
        await finish.wait()

    async def other() -> None:
        async with Runner():
            defer(task)
            await started.wait()

    async with Runner(), anyio.create_task_group() as group:
        group.start_soon(other)
        await began.wait()
        assert not draining()
        finish.set()


@pytest.mark.parametrize("live", [True, False])
async def test_draining_ends_a_loop_early(live: bool) -> None:
    """G8: `draining()` tells an async task and a thread that the shutdown, or the call's cancellation, has begun."""
    log, runner = Log(), Runner(drain_timeout=60)
    started = [anyio.Event(), anyio.Event()]
    native: Any = anyio.lowlevel.current_token().native_token
    soon = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon

    async def loop() -> None:
        assert not draining()
        started[0].set()
        while not draining():
            await anyio.sleep(0.001)
        log.append("async")

    def loop_sync() -> None:
        assert not draining()
        soon(started[1].set)
        while not draining():
            threading.Event().wait(0.001)
        log.append("sync")

    first = DeferredMiddleware(responder(lambda tasks: tasks.add_task(loop)), runner)
    second = DeferredMiddleware(responder(lambda tasks: tasks.add_task(loop_sync)), runner)
    with anyio.CancelScope() as scope:
        async with runner if live else contextlib.nullcontext(), anyio.create_task_group() as group:
            group.start_soon(request, first, Log())
            group.start_soon(request, second, Log())
            for event in started:
                await event.wait()
            assert not draining()
            if not live:
                scope.cancel()
    assert sorted(log) == ["async", "sync"]
    assert not draining()
    assert_conserved(runner)


async def test_draining_outside_of_any_request() -> None:
    """Where there is no current request, `draining()` speaks of all runners in the process."""
    seen: list[bool] = []
    entered, go = anyio.Event(), anyio.Event()
    runner = Runner()

    async def task() -> None:
        entered.set()
        await go.wait()

    async def watch() -> None:
        await entered.wait()
        seen.append(draining())
        left.set()
        await anyio.wait_all_tasks_blocked()
        seen.append(draining())
        go.set()

    left = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        async with runner:
            defer(task)
            await left.wait()
    assert (*seen, draining()) == (False, True, False)


def swallowing(shield: bool, log: Log, entered: anyio.Event, let_go: anyio.Event) -> Any:
    async def shields() -> None:
        with anyio.CancelScope(shield=True):
            entered.set()
            await let_go.wait()

    async def swallows() -> None:
        entered.set()
        while not let_go.is_set():
            with contextlib.suppress(anyio.get_cancelled_exc_class()):
                await let_go.wait()

    return shields if shield else swallows


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("shield", [True, False])
async def test_a_task_that_does_not_let_itself_be_cancelled(
    shield: bool,
    live: bool,
    anyio_backend: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """G8: a task that swallows its cancellation, or shields itself, is given up by name after the stated grace."""
    if anyio_backend[0] == "trio" and not shield:
        pytest.skip("trio cancels until it is heard, in a busy loop")
    monkeypatch.setattr(drains, "GRACE", 0.05)
    log, entered, let_go, runner = Log(), anyio.Event(), anyio.Event(), Runner(drain_timeout=0.05)
    runner.observers = (log,)
    task = swallowing(shield, log, entered, let_go)
    app = DeferredMiddleware(
        responder(lambda tasks: [tasks.options(name=name).add_task(task) for name in ("stubborn", "next")]), runner
    )
    with anyio.CancelScope() as scope, anyio.fail_after(30):
        async with runner if live else contextlib.nullcontext(), anyio.create_task_group() as group:
            group.start_soon(request, app, Log())
            await entered.wait()
            if not live:
                scope.cancel()
    assert log == ["stubborn RUNNING", "next ABANDONED", "stubborn ABANDONED"]
    assert_conserved(runner)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert lines[0] == "drain_timeout=0.05 s is over; abandoning deferred tasks: 'stubborn' (1), 'next' (1)"
    assert lines[2].startswith("Abandoned at shutdown: deferred task 'stubborn'")
    heard = shield and anyio_backend[0] == "asyncio"  # there, a native cancellation goes through anyio's shields
    assert lines[2].endswith("; it still runs") != heard
    let_go.set()
    await anyio.wait_all_tasks_blocked()
    assert log[3:] == []  # its end, when that comes, is nobody's business any more
    assert_conserved(runner)


async def test_a_call_that_is_closed() -> None:
    """G2: an ASGI call whose coroutine is closed, as by a loop that is gone, leaves no task unfinished."""
    runner = Runner()
    app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(anyio.sleep_forever)), runner)
    call: Any = app(http_scope(), no_more_messages, Log().send)
    call.send(None)
    call.close()
    assert_conserved(runner)
    assert runner.statistics().abandoned == 1


async def test_a_block_that_is_closed() -> None:
    """G2: an `async with runner` whose coroutine is closed leaves no task unfinished, and the runner can be used again."""
    runner = Runner()

    async def block() -> AsyncGenerator[None, None]:
        async with runner:
            defer(anyio.sleep_forever)
            yield

    steps = block()
    await anext(steps)
    closing: Any = steps.athrow(GeneratorExit)
    with pytest.raises(GeneratorExit):
        await closing
    assert_conserved(runner)
    async with runner:
        defer(nothing)
    assert runner.statistics().succeeded == 1


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
async def test_exits_come_out_of_the_block_as_themselves(error: BaseException) -> None:
    """`sys.exit()` and KeyboardInterrupt inside `async with runner` abandon at once, and come out in no group."""
    runner = Runner(drain_timeout=60)
    caught: BaseException | None = None
    try:
        async with runner:
            defer(anyio.sleep_forever)
            raise error
    except BaseException as exc:
        caught = exc
    assert caught is error
    assert runner.statistics().abandoned == 1
    assert_conserved(runner)


async def test_closed_after_the_last_end() -> None:
    """G11: what is added to a list after the last lifespan has ended is refused."""
    runner = Runner()
    lists: list[DeferredTasks] = []
    async with runner:
        await request(DeferredMiddleware(responder(lists.append), runner), Log())
        late = lists[0].add_task(nothing)
    assert late.state is TaskState.SUCCEEDED
    with pytest.raises(RunnerClosed):
        lists[0].add_task(nothing)


async def test_never_running_after_the_final_event() -> None:
    """G2: a task that an observer's report of its start lets others end has its RUNNING event first, and one final one."""
    log = Log()
    stuck = threading.Event()

    def observe(event: Any) -> None:
        if event.task.name == "slow" and event.state is TaskState.RUNNING:
            stuck.wait(30)
        log(event)

    runner = Runner(observers=[observe])
    runner.observers = (observe,)

    async with runner:
        await request(
            DeferredMiddleware(
                responder(lambda tasks: tasks.options(name="slow", timeout=0.3).add_task(log.note_sync, "ran")), runner
            ),
            Log(),
        )
        with anyio.fail_after(30):
            while not runner.statistics().timed_out:
                await anyio.sleep(0.001)
        stuck.set()
    assert log == ["slow RUNNING", "slow TIMED_OUT"]
    assert_conserved(runner)


@pytest.mark.parametrize("first_step", [True, False])
def test_the_event_loop_ends_in_a_drain(first_step: bool) -> None:
    """G8: a task that the end of its event loop cancels during a drain, before the drain itself, is ABANDONED."""
    started, runner, seen = anyio.Event(), Runner(), Log()

    async def hangs() -> None:
        started.set()
        await anyio.sleep_forever()

    async def main() -> None:
        async with runner:
            task = defer(hangs)
            if first_step:
                await started.wait()

            def end() -> None:
                seen.append(f"draining: {draining()}")
                (native,) = (each for each in asyncio.all_tasks() if each.get_name() == task.name)
                native.cancel()

            asyncio.get_running_loop().call_soon(end)
        seen.append(task.state.name)

    asyncio.run(main())
    assert seen == ["draining: True", "ABANDONED"]
    assert_conserved(runner)
