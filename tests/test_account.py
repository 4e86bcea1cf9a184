"""Moments that only another thread, or a finaliser, could hit: here they are hit each time."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_deferred import (
    DeferredMiddleware,
    DeferredTask,
    DeferredTasks,
    Runner,
    RunnerClosed,
    TaskEvent,
    TaskState,
    defer,
    tasks_from,
)
from asgi_deferred import _drains as drains

from .support import (
    Log,
    assert_conserved,
    call_soon,
    http_scope,
    no_more_messages,
    request,
    responder,
    states,
    task_list,
)

pytestmark = pytest.mark.anyio


class Interfering:
    """The account's lock, and something that happens just before a function takes it, for the so many-th time."""

    def __init__(self, runner: Runner, function: str, time: int, hook: Callable[[], object]) -> None:
        self.lock: Any = runner._scheduler.account.lock
        self.function = function
        self.left = time
        self.hook = hook
        runner._scheduler.account.lock = self  # type: ignore[assignment]

    def __enter__(self) -> None:
        if sys._getframe(1).f_code.co_name == self.function:
            self.left -= 1
            if self.left == 0:
                self.hook()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class SameHash:
    def __hash__(self) -> int:
        return 1


def test_two_threads_add_the_first_task_at_a_time() -> None:
    """G2, G4: of two threads that add a list's first task at a time, neither loses its own."""
    runner = Runner()
    tasks = task_list(runner)
    Interfering(runner, "accept", 1, lambda: tasks.add_task(print))
    tasks.add_task(int)
    assert [task.func for task in tasks] == [print, int]
    assert runner.statistics().pending == 2


async def test_lists_take_turns() -> None:
    """G4, G7: lists that wait for the only place take turns, each with its tasks in order."""
    log, runner = Log(), Runner(max_concurrency=1)

    def adding(name: str) -> Any:
        return lambda tasks: [tasks.add_task(log.note, f"{name}{number}") for number in (1, 2, 3)]

    async with runner:
        for name in "abc":
            await DeferredMiddleware(responder(adding(name)), runner)(http_scope(), no_more_messages, Log().send)
    assert log == ["a1", "b1", "c1", "a2", "b2", "c2", "a3", "b3", "c3"]
    assert_conserved(runner)


async def test_a_second_entry_drains_in_the_grace_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: an entry that ends while another's cancelled tasks are in their grace has ended with that."""
    monkeypatch.setattr(drains, "GRACE", 0.05)
    runner, given_up = Runner(drain_timeout=60), anyio.Event()
    started, cancelled = anyio.Event(), anyio.Event()

    async def stubborn() -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()
            with anyio.CancelScope(shield=True):
                await given_up.wait()

    async def first(scope: anyio.CancelScope) -> None:
        with scope:
            async with runner:
                await anyio.sleep_forever()

    scope = anyio.CancelScope()
    async with anyio.create_task_group() as group:
        async with runner:
            group.start_soon(first, scope)
            await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(stubborn)), runner), Log())
            await started.wait()
            scope.cancel()
            await cancelled.wait()
        assert runner.statistics().abandoned == 1
        given_up.set()
    assert_conserved(runner)


def test_a_key_is_taken_as_another_of_its_hash_ends() -> None:
    """G2: a task that takes a key while another is about to forget it keeps it."""
    runner = Runner()
    tasks = task_list(runner)
    keys = [SameHash() for _ in range(3)]
    first = tasks.options(key=keys[0]).add_task(print)
    tasks.options(key=keys[1], name="second").add_task(print)
    Interfering(runner, "_forget_key", 1, lambda: tasks.options(key=keys[2], name="old").add_task(print))
    assert first.cancel()
    tasks.options(key=keys[2], name="new").add_task(print)
    assert states(tasks) == ["print CANCELLED", "second PENDING", "old CANCELLED", "new PENDING"]


def test_a_key_is_given_up_while_its_old_task_is_reported() -> None:
    """G2: an observer of a replaced task cancels the one that replaced it, and the key is free."""

    def observe(event: TaskEvent) -> None:
        if event.task.name == "old":
            assert list(tasks)[1].cancel()

    runner = Runner(observers=[observe])
    tasks = task_list(runner)
    for name in ("old", "new", "newest"):
        tasks.options(key="key", name=name).add_task(print)
    assert states(tasks) == ["old CANCELLED", "new CANCELLED", "newest PENDING"]
    assert runner.statistics()[:2] == (3, 1)


def test_a_task_is_added_as_the_list_is_arranged() -> None:
    """G2: a task that is added while a list is put in another order is in the list."""
    runner = Runner()
    tasks = task_list(runner)
    for name in "ab":
        tasks.options(name=name).add_task(print)
    Interfering(runner, "rearrange", 2, lambda: tasks.options(name="c").add_task(print))
    runner._scheduler.account.rearrange(tasks, lambda queue: queue[::-1])
    assert states(tasks) == ["c PENDING", "b PENDING", "a PENDING"]


def test_a_task_is_added_as_ended_ones_are_forgotten() -> None:
    """G2: a task that is added while a list forgets ended ones is in the list, and those are forgotten the next time."""
    runner = Runner()
    tasks = task_list(runner)
    for _ in range(65):
        tasks.add_task(print).cancel()
    Interfering(runner, "prune", 2, lambda: tasks.options(name="b").add_task(print))
    tasks.options(name="a").add_task(print)
    assert states(tasks)[-2:] == ["b PENDING", "a PENDING"]
    tasks.options(name="c").add_task(print)
    assert states(tasks)[-3:] == ["b PENDING", "a PENDING", "c PENDING"]
    assert len(tasks) < 65


async def test_a_list_forgets_the_task_that_has_just_run() -> None:
    """G4: a list goes on with the right task though, as one ended, it forgot that one and many after it."""
    log = Log()

    def observe(event: TaskEvent) -> None:
        if event.task.name == "first" and event.state is TaskState.SUCCEEDED:
            for task in list(lists[0])[1:81]:
                assert task.cancel()
            lists[0].add_task(log.note_sync, "last")

    runner = Runner(observers=[observe])
    lists: list[DeferredTasks] = []

    def add(tasks: DeferredTasks) -> None:
        lists.append(tasks)
        tasks.options(name="first").add_task(log.note_sync, "first")
        for number in range(82):
            tasks.add_task(log.note_sync, str(number))

    async with runner:
        await request(DeferredMiddleware(responder(add), runner), Log())
    assert log == ["first", "80", "81", "last"]
    assert_conserved(runner)


@pytest.mark.parametrize("time", [1, 2])
async def test_a_thread_ends_its_task_as_the_drain_gives_up_on_it(time: int) -> None:
    """G2, G8: a sync task that ends in the moment in which it would be abandoned has ended by itself."""
    entered, go = anyio.Event(), threading.Event()
    soon = call_soon()
    runner = Runner(drain_timeout=0.01)
    lists: list[DeferredTasks] = []

    def task() -> None:
        soon(entered.set)
        go.wait(30)

    def let_it_end() -> None:
        go.set()
        while not runner.statistics().succeeded:
            threading.Event().wait(0.001)

    app = DeferredMiddleware(responder(lists.append, lambda tasks: tasks.add_task(task)), runner)
    async with runner:
        await request(app, Log())
        await entered.wait()
        # At the deadline `close` is called for it twice: is it PENDING, and then: it is not.
        Interfering(runner, "close", time, let_it_end)
    assert [task.state for task in lists[0]] == [TaskState.SUCCEEDED]
    assert_conserved(runner)


@pytest.mark.parametrize("timeout", [0.3])
async def test_a_timer_that_comes_as_its_task_has_ended(timeout: float) -> None:
    """G2: a sync task whose time is over while its end is being reported has SUCCEEDED, once."""
    log, passed = Log(), threading.Event()

    def observe(event: TaskEvent) -> None:
        log(event)
        if event.state is TaskState.SUCCEEDED:
            passed.wait(30)

    runner = Runner(observers=[observe])
    async with runner:
        await request(
            DeferredMiddleware(
                responder(lambda tasks: tasks.options(timeout=timeout, name="task").add_task(log.note_sync, "ran")),
                runner,
            ),
            Log(),
        )
        with anyio.fail_after(30):
            while "task SUCCEEDED" not in log:
                await anyio.sleep(0.001)
        await anyio.sleep(2 * timeout)
        passed.set()
    assert log == ["task RUNNING", "ran", "task SUCCEEDED"]
    assert_conserved(runner)


async def test_cancelled_between_its_turn_and_its_start() -> None:
    """G2, G7: a task that a thread has given its place, and that is cancelled before the event loop gets to it."""
    log, go, runner = Log(), threading.Event(), Runner(max_concurrency=1)
    lists: list[DeferredTasks] = []
    app = DeferredMiddleware(
        responder(
            lists.append,
            lambda tasks: (
                tasks.add_task(go.wait) if len(lists) == 1 else tasks.add_task(log.note, f"task {len(lists)}")
            ),
        ),
        runner,
    )
    async with runner:
        for _ in range(3):
            await request(app, Log())
        (second,) = lists[1]
        go.set()
        while second._run is None:  # and meanwhile the event loop does nothing
            threading.Event().wait(0.001)
        assert second.cancel()
    assert log == ["task 3"]
    assert runner.statistics().cancelled == 1
    assert_conserved(runner)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("returns", [True, False])
def test_an_event_loop_is_gone_as_a_thread_ends(returns: bool) -> None:
    """G2, G7: what a thread wants awaited, and what gets its place, are ABANDONED if their event loop is gone."""
    go, ended, runner = threading.Event(), threading.Event(), Runner(max_concurrency=1)
    lists: list[DeferredTasks] = []

    async def nothing() -> None: ...

    def first() -> Any:
        go.wait(30)
        return nothing() if returns else None

    def add(tasks: DeferredTasks) -> None:
        lists.append(tasks)
        tasks.add_task(first if len(lists) == 1 else nothing)

    async def main() -> None:
        await runner.__aenter__()
        for _ in range(2):
            await request(DeferredMiddleware(responder(add), runner), Log())

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    go.set()
    while runner._scheduler.account.lines:
        ended.wait(0.001)
    assert [task.state.name for tasks in lists for task in tasks] == [
        "ABANDONED" if returns else "SUCCEEDED",
        "ABANDONED",
    ]
    assert_conserved(runner)


async def test_a_request_ends_while_a_closed_home_is_left() -> None:
    """G9, G11: a request that ends as a cancelled lifespan waits for its last task runs its tasks in its own call."""
    log, cancelled, go = Log(), anyio.Event(), anyio.Event()
    runner = Runner()

    async def stubborn() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()
            with anyio.CancelScope(shield=True):
                await go.wait()

    app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "late")), runner)
    first = DeferredMiddleware(responder(lambda tasks: tasks.add_task(stubborn)), runner)
    started = anyio.Event()

    async def live() -> None:
        async with runner:
            await request(first, Log())
            await anyio.wait_all_tasks_blocked()
            started.set()
            await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:

            async def late() -> None:
                await started.wait()
                scope.cancel()
                await cancelled.wait()
                await request(app, log)
                go.set()

            group.start_soon(late)
            await live()
    assert log == ["http.response.start", "http.response.body", "late", "returned"]
    assert runner.statistics()[-1] == 1
    assert_conserved(runner)


async def test_the_inner_of_two_entries_reaches_its_deadline() -> None:
    """G8: the deadline of the inner of two entries ends what is unfinished, and the outer one goes on taking tasks."""
    log, runner = Log(), Runner(drain_timeout=0.01)
    app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "after")), runner)
    async with runner:
        async with runner:
            await request(
                DeferredMiddleware(responder(lambda tasks: tasks.add_task(anyio.sleep_forever)), runner), Log()
            )
        assert runner.statistics().abandoned == 1
        await request(app, Log())
    assert log == ["after"]
    assert_conserved(runner)


@pytest.mark.parametrize("by_key", [True, False])
async def test_the_task_that_waits_for_a_thread_is_cancelled(by_key: bool) -> None:
    """G4, G7: when a task that waits for a thread is cancelled or replaced, its list goes on without that thread."""
    log, go, runner = Log(), threading.Event(), Runner(max_threads=1)
    lists: list[DeferredTasks] = []
    ran = anyio.Event()

    async def asynchronous() -> None:
        log.append("async")
        ran.set()

    def add(tasks: DeferredTasks) -> None:
        lists.append(tasks)
        if len(lists) == 1:
            tasks.add_task(go.wait, 30)
        else:
            tasks.options(key="key").add_task(log.note_sync, "sync")
            tasks.add_task(asynchronous)
            tasks.add_task(log.note_sync, "last")

    try:
        async with runner:
            for _ in range(2):
                await request(DeferredMiddleware(responder(add), runner), Log())
            with anyio.fail_after(10):
                if by_key:
                    lists[1].options(key="key").add_task(log.note_sync, "replaced")
                else:
                    list(lists[1])[0].cancel()
                await ran.wait()
            go.set()
    finally:
        go.set()
    assert log == ["async", "last", *["replaced"] * by_key]
    assert_conserved(runner)


async def test_entered_while_the_last_entry_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """G8, G11: a runner that is entered while its cancelled entry waits for a last task takes tasks in the new entry."""
    monkeypatch.setattr(drains, "GRACE", 0.05)
    log, runner, cancelled = Log(), Runner(), anyio.Event()

    async def stubborn() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.2)

    async def first(scope: anyio.CancelScope) -> None:
        with scope:
            async with runner:
                await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(stubborn)), runner), Log())
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
                await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(first, anyio.CancelScope())
        await cancelled.wait()
        async with runner:
            defer(log.note, "deferred")
    assert log == ["deferred"]
    assert_conserved(runner)


async def test_two_entries_drain_at_a_time() -> None:
    """G8: of two entries that drain at a time, neither waits for longer than the deadline, whatever its tasks defer."""
    refused, runner = Log(), Runner(drain_timeout=0.01)
    lists: list[DeferredTasks] = []

    async def defer_at_the_deadline() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with pytest.raises(RunnerClosed):
                lists[0].add_task(anyio.sleep_forever)
            refused.append("late")

    app = DeferredMiddleware(responder(lists.append, lambda tasks: tasks.add_task(defer_at_the_deadline)), runner)

    async def live(entered: anyio.Event, leave: anyio.Event) -> None:
        async with runner:
            entered.set()
            await leave.wait()

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            entered, leave = [anyio.Event(), anyio.Event()], anyio.Event()
            for each in entered:
                group.start_soon(live, each, leave)
                await each.wait()
            await request(app, Log())
            leave.set()
    assert refused == ["late"]
    assert runner.statistics().abandoned == 1
    assert_conserved(runner)


async def test_the_outer_of_two_entries_ends_in_the_grace_of_the_inner(monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: what is added after the deadline of an inner entry has a final state when the outer one has left."""
    monkeypatch.setattr(drains, "GRACE", 0.05)
    cancelled, go, runner = anyio.Event(), anyio.Event(), Runner(drain_timeout=0.01)

    async def stubborn() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()
            with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                await go.wait()

    async def inner() -> None:
        async with runner:
            await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(stubborn)), runner), Log())

    async with anyio.create_task_group() as group:
        async with runner:
            group.start_soon(inner)
            await cancelled.wait()
            app = responder(lambda tasks: tasks.add_task(anyio.sleep_forever))
            await request(DeferredMiddleware(app, runner), Log())
        go.set()
    assert runner.statistics().abandoned == 2
    assert_conserved(runner)


async def test_only_the_cancelled_calls_tasks_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """G8, G9: a call whose task has to be given up leaves the tasks of other calls alone."""
    monkeypatch.setattr(drains, "GRACE", 0.05)
    started, given_up, runner = anyio.Event(), anyio.Event(), Runner(drain_timeout=0.05)

    async def stuck() -> None:
        started.set()
        with anyio.CancelScope(shield=True):
            while not given_up.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await given_up.wait()

    async def goes_on() -> None:
        await given_up.wait()

    stubborn = DeferredMiddleware(responder(lambda tasks: tasks.add_task(stuck)), runner)
    fine = DeferredMiddleware(responder(lambda tasks: tasks.add_task(goes_on)), runner)
    async with anyio.create_task_group() as group:
        group.start_soon(request, fine, Log())
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                await started.wait()
                scope.cancel()

            group.start_soon(cancel)
            await request(stubborn, Log())
        assert runner.statistics().abandoned == 1
        given_up.set()
    assert runner.statistics()[3:] == (1, 0, 0, 0, 0, 1)
    assert_conserved(runner)


async def test_a_lifespan_starts_in_the_middle_of_a_request() -> None:
    """G8, G9: a task that was added before the lifespan started runs in it, with one that was added afterwards."""
    log, runner = Log(), Runner()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks_from(scope).add_task(log.note, "before")
        await runner.__aenter__()
        tasks_from(scope).add_task(log.note, "after")
        await responder()(scope, receive, send)

    await request(DeferredMiddleware(app, runner), Log())
    await runner.__aexit__(None, None, None)
    assert log == ["before", "after"]
    assert_conserved(runner)


async def test_a_late_task_moves_its_list_to_another_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """G8, G9: a list that a late task moves from a cancelled call to a lifespan is waited for, and given up, there alone."""
    monkeypatch.setattr(drains, "GRACE", 0.05)
    log, cancelled, go, returned = Log(), anyio.Event(), anyio.Event(), anyio.Event()
    runner = Runner(drain_timeout=0.01)
    lists: list[DeferredTasks] = []

    async def stubborn() -> None:
        scope.cancel()
        while not go.is_set():
            try:
                with anyio.CancelScope(shield=cancelled.is_set()):
                    await go.wait()
            except anyio.get_cancelled_exc_class():
                cancelled.set()

    async def call() -> None:
        with scope:
            await request(
                DeferredMiddleware(responder(lists.append, lambda tasks: tasks.add_task(stubborn)), runner), Log()
            )
        returned.set()

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            scope = anyio.CancelScope()
            group.start_soon(call)
            await cancelled.wait()
            async with runner:
                lists[0].add_task(log.note, "late")
                await returned.wait()
                assert runner.statistics().abandoned == 0
            assert runner.statistics().abandoned == 2
            go.set()
    assert log == []
    assert_conserved(runner)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_call_that_is_cancelled_twice() -> None:
    """G9: a call that is cancelled again while it drains goes on to drain, until the deadline."""
    started, runner = anyio.Event(), Runner(drain_timeout=0.5)

    async def task() -> None:
        started.set()
        await anyio.sleep_forever()

    call = asyncio.ensure_future(
        request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(task)), runner), Log())
    )
    await started.wait()
    for _ in range(3):
        call.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
    assert not call.done()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert runner.statistics().abandoned == 1
    assert_conserved(runner)


def test_cancelled_calls_on_two_event_loops() -> None:
    """G9: a cancelled call waits for the other cancelled calls of its own event loop alone."""
    runner = Runner(drain_timeout=60)
    go = {name: threading.Event() for name in ("first", "second")}
    ended: list[str] = []
    started: set[str] = set()

    async def task(name: str) -> None:
        started.add(name)
        while not go[name].is_set():
            await asyncio.sleep(0.001)

    async def serve(name: str) -> None:
        app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(task, name)), runner)
        call = asyncio.ensure_future(app(http_scope(), no_more_messages, Log().send))
        while name not in started:
            await asyncio.sleep(0.001)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        ended.append(name)

    threads = [threading.Thread(target=asyncio.run, args=(serve(name),)) for name in go]
    for thread in threads:
        thread.start()
    while len(runner._scheduler.cancelled) < 2:
        threading.Event().wait(0.001)
    for name, thread in zip(go, threads, strict=True):
        go[name].set()
        thread.join(30)
        assert ended[-1] == name
    assert ended == ["first", "second"]
    assert_conserved(runner)


def test_added_after_trios_system_tasks_have_ended() -> None:
    """G2, G12: what is added at the very end of a trio run, when nothing can be spawned any more, is ABANDONED."""
    runner = Runner()
    late: list[DeferredTask] = []

    async def nothing() -> None: ...

    async def finalised() -> Any:
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await request(
                    DeferredMiddleware(responder(lambda tasks: late.append(tasks.add_task(nothing))), runner), Log()
                )

    kept: list[Any] = []

    async def main() -> None:
        kept.append(finalised())
        await anext(kept[0])

    anyio.run(main, backend="trio")
    assert [task.state for task in late] == [TaskState.ABANDONED]
    assert_conserved(runner)


async def test_added_as_tasks_that_run_apart_are_queued() -> None:
    """G2, G7: with concurrent=True, a task added in the moment in which its request ends is queued once, and loses none."""
    log, go, runner = Log(), anyio.Event(), Runner(concurrent=True, max_concurrency=1)
    account = runner._scheduler.account
    end = account.end

    def end_and_add(tasks: Any, home: Any) -> Any:
        ended = end(tasks, home)
        if list(tasks)[0].name == "first":
            tasks.add_task(log.note, "second")
        return ended

    account.end = end_and_add  # type: ignore[assignment, method-assign]
    async with runner:
        for name in ("blocker", "first", "third"):
            call = go.wait if name == "blocker" else partial(log.note, name)
            app = responder(lambda tasks, name=name, call=call: tasks.options(name=name).add_task(call))  # type: ignore[misc]
            await request(DeferredMiddleware(app, runner), Log())
        go.set()
        with anyio.fail_after(30):
            await runner.wait_idle()
    assert sorted(log) == ["first", "second", "third"]
    assert_conserved(runner)
