"""The runner: isolation, order, limits, threads, timeouts, hooks and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest

from asgi_deferred import (
    BacklogFull,
    DeferredMiddleware,
    DeferredTask,
    DeferredTasks,
    Outcome,
    Runner,
    TaskEvent,
    TaskState,
    TaskTimedOut,
    _threads,
    defer,
    tasks_from,
)

from .support import Log, assert_conserved, call_soon, http_scope, no_more_messages, request, responder, states

pytestmark = pytest.mark.anyio


async def run(runner: Runner, *add: Callable[[DeferredTasks], object], path: str = "/") -> DeferredTasks:
    """Make a request that adds tasks, wait for them, and return its list."""
    lists: list[DeferredTasks] = []
    await DeferredMiddleware(responder(lists.append, *add), runner)(http_scope(path), no_more_messages, Log().send)
    await runner.wait_idle()
    assert_conserved(runner)
    return lists[0]


class Custom(BaseException):
    pass


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "asgi_deferred"]


# Isolation


async def fail_async(error: BaseException) -> None:
    raise error


def fail_sync(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("live", [True, False], ids=["lifespan", "no lifespan"])
@pytest.mark.parametrize("func", [fail_async, fail_sync])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        Custom(),
        StopAsyncIteration(),
        TimeoutError(),
    ],
    ids=repr,
)
async def test_a_failing_task_fails_alone(
    func: Callable[..., Any], error: BaseException, live: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """G3: whatever a task raises, the others run, the runner goes on, and the log has what is needed to find it."""
    runner, log = Runner(), Log()
    async with runner if live else contextlib.nullcontext():
        tasks = await run(
            runner,
            lambda tasks: tasks.add_task(func, error),
            lambda tasks: tasks.add_task(log.note, "next"),
            path="/a\nb",
        )
        await run(runner, lambda tasks: tasks.add_task(log.note, "next request"))
    assert states(tasks) == [f"{func.__name__} FAILED", "Log.note SUCCEEDED"]
    assert next(iter(tasks)).error is error
    assert log == ["next", "next request"]
    (record,) = (record for record in caplog.records if record.name == "asgi_deferred")
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    added_at = next(iter(tasks)).added_at
    assert record.getMessage() == (
        f"Failed: deferred task '{func.__name__}', added at {added_at}, request 'GET /a\\nb'"
    )


async def test_arguments_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    """G3: arguments hold secrets, so neither the log nor a repr shows them; wrong ones are found at the call."""
    caplog.set_level(logging.DEBUG, "asgi_deferred")
    tasks = await run(Runner(), lambda tasks: tasks.add_task(fail_async, ValueError(), password="hunter2"))  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue]
    (task,) = tasks
    assert isinstance(task.error, TypeError)
    assert "unexpected keyword argument 'password'" in str(task.error)
    assert "hunter2" not in caplog.text + repr(task) + repr(tasks)


async def test_a_task_that_cancels_itself(caplog: pytest.LogCaptureFixture, anyio_backend_name: str) -> None:
    """G3: a task that cancels its own asyncio task ends CANCELLED, and the next one does not pay for it."""
    if anyio_backend_name == "trio":
        pytest.skip("only asyncio lets a task cancel itself")
    log = Log()

    def cancel() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    async def cancel_and_wait() -> None:
        cancel()
        await anyio.lowlevel.checkpoint()

    async def cancel_and_return() -> None:
        cancel()

    async def note(entry: str) -> None:
        await anyio.lowlevel.checkpoint()
        log.append(entry)

    runner = Runner()
    async with runner:
        for func in (cancel_and_wait, cancel_and_return):
            tasks = await run(
                runner, lambda tasks: [tasks.options(name="self").add_task(func), tasks.add_task(note, "a")]
            )
            assert [task.state.name for task in tasks] == [
                "CANCELLED" if func is cancel_and_wait else "SUCCEEDED",
                "SUCCEEDED",
            ]
    assert log == ["a", "a"]
    (message,) = messages(caplog)
    assert message.startswith("Cancelled, and not by the runner: deferred task 'self'")


async def test_a_task_that_cancels_its_worker_later(anyio_backend_name: str) -> None:
    """G3: an asyncio task handle that a deferred task leaked can be cancelled later without hurting anybody."""
    if anyio_backend_name == "trio":
        pytest.skip("trio has no such handle")
    handles: list[Any] = []

    async def leak() -> None:
        handles.append(asyncio.current_task())

    log, runner = Log(), Runner()
    async with runner:
        await run(runner, lambda tasks: tasks.add_task(leak))
        await anyio.wait_all_tasks_blocked()
        handles[0].cancel()
        await run(runner, lambda tasks: tasks.add_task(log.note, "next"))
    assert log == ["next"]


async def test_the_native_task_and_scopes_are_there() -> None:
    """G5: inside a task, anyio's scopes and timeouts and asyncio's current task and timeout work as anywhere."""
    log = Log()

    async def scopes() -> None:
        with anyio.move_on_after(0.01) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        async with anyio.create_task_group() as group:
            group.start_soon(log.note, "child")
        log.append("scopes")

    async def native() -> None:
        if anyio.get_current_task().name is not None and _on_asyncio():
            assert asyncio.current_task() is not None
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await asyncio.sleep(3600)
        log.append("native")

    tasks = await run(Runner(), lambda tasks: [tasks.add_task(scopes), tasks.add_task(native)])
    assert [task.error for task in tasks] == [None, None]
    assert log == ["child", "scopes", "native"]


def _on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# Kinds of tasks


async def test_a_sync_function_that_returns_an_awaitable() -> None:
    """A lambda around a coroutine function is awaited; the tasks after it wait for it."""
    log = Log()
    tasks = await run(
        Runner(),
        lambda tasks: tasks.add_task(log.note_sync, "before"),
        lambda tasks: tasks.add_task(lambda: log.note("awaited")),
        lambda tasks: tasks.add_task(log.note_sync, "after"),
        lambda tasks: tasks.add_task(lambda: fail_async(ValueError("x"))),
        lambda tasks: tasks.options(timeout=30).add_task(lambda: log.note("in time")),
        lambda tasks: tasks.options(timeout=0.01).add_task(lambda: anyio.sleep_forever()),
    )
    assert log == ["before", "awaited", "after", "in time"]
    assert [task.state.name for task in tasks] == [*["SUCCEEDED"] * 3, "FAILED", "SUCCEEDED", "TIMED_OUT"]


async def test_generator_functions_are_refused() -> None:
    """G11: calling a generator function runs nothing, so such a task FAILED; one that returns a generator is fine."""

    def generator() -> Iterator[int]:
        yield 1

    async def async_generator() -> AsyncIterator[int]:
        yield 1

    tasks = await run(
        Runner(),
        lambda tasks: [
            tasks.add_task(func) for func in (generator, async_generator, lambda: iter([]), lambda: generator())
        ],
    )
    assert [type(task.error) for task in tasks] == [TypeError, TypeError, type(None), type(None)]
    assert list(generator()) == [each async for each in async_generator()] == [1]
    assert "This is a generator function: calling it runs none of its code" in str(next(iter(tasks)).error)


async def test_sync_tasks_share_a_hop() -> None:
    """Consecutive sync tasks of a list run in one trip to a thread; an async one or a timeout in between ends it."""
    hops: list[object] = []
    runner = Runner()
    start = runner._scheduler.threads.start

    def counting(job: Any, done: Any) -> None:
        hops.append(job)
        start(job, done)

    runner._scheduler.threads.start = counting  # type: ignore[method-assign]
    log = Log()
    await run(
        runner,
        lambda tasks: [tasks.add_task(log.note_sync, "a"), tasks.add_task(log.note_sync, "b")],
        lambda tasks: tasks.add_task(log.note, "c"),
        lambda tasks: tasks.add_task(log.note_sync, "d"),
        lambda tasks: tasks.options(timeout=30).add_task(log.note_sync, "e"),
        lambda tasks: tasks.add_task(log.note_sync, "f"),
    )
    assert log == list("abcdef")
    assert len(hops) == 4


async def test_sync_tasks_use_the_runners_own_threads() -> None:
    """G7: sync tasks never take a thread of anyio's default limiter, which the framework's sync endpoints use."""
    entered, go = anyio.Event(), threading.Event()
    soon = functools.partial(call_soon(), entered.set)

    def block() -> None:
        soon()
        go.wait()

    runner = Runner(max_threads=1)
    limiter = anyio.to_thread.current_default_thread_limiter()
    async with runner:
        await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(block)), runner), Log())
        await entered.wait()
        assert limiter.borrowed_tokens == 0
        assert await anyio.to_thread.run_sync(threading.get_ident) != threading.get_ident()
        go.set()


async def test_a_sync_task_can_run_its_own_event_loop() -> None:
    """A sync task may call `anyio.run` or `asyncio.run`, as its thread has no event loop."""
    log = Log()

    def sync() -> None:
        anyio.run(log.note, "anyio")
        asyncio.run(log.note("asyncio"))

    tasks = await run(Runner(), lambda tasks: tasks.add_task(sync))
    assert [task.error for task in tasks] == [None]
    assert log == ["anyio", "asyncio"]


async def test_a_system_without_threads_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """G3, G7: where the system starts no more threads, a sync task fails with its error, and it alone."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    log, runner = Log(), Runner(max_threads=1)
    async with runner:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for timeout in (None, 60):
                tasks = await run(
                    runner,
                    lambda tasks: tasks.options(timeout=timeout).add_task(log.note_sync, "lost"),
                    lambda tasks: tasks.add_task(log.note, "async"),
                )
                assert states(tasks) == ["Log.note_sync FAILED", "Log.note SUCCEEDED"]
        assert states(await run(runner, lambda tasks: tasks.add_task(log.note_sync, "sync")))[0].endswith("SUCCEEDED")
    assert log == ["async", "async", "sync"]
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [str(record.exc_info and record.exc_info[1]) for record in failures] == ["can't start new thread"] * 2


def test_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """G7: a worker thread is reused, and ends when it has been idle for a while."""
    monkeypatch.setattr(_threads, "IDLE_SECONDS", 0.02)
    threads, seen, done = _threads.Threads(), [], threading.Event()
    for _ in range(2):
        done.clear()
        threads.start(lambda: seen.append(threading.current_thread()), done.set)
        done.wait()
    seen[-1].join()
    assert not threads._idle
    assert all(thread.daemon for thread in seen)


def test_a_thread_that_gets_a_job_as_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """G7: a thread about to end takes the job that was given to it at that moment."""
    monkeypatch.setattr(_threads, "IDLE_SECONDS", 0.001)
    threads, ran, done = _threads.Threads(), list[int](), threading.Event()

    class Idle(list[Any]):
        def remove(self, inbox: Any) -> None:
            if ran == [1]:
                threads.start(functools.partial(ran.append, 2), done.set)
            super().remove(inbox)

    threads._idle = Idle()
    threads.start(functools.partial(ran.append, 1), lambda: None)
    assert done.wait(30)
    assert ran == [1, 2]


# Order and limits


async def test_order_and_concurrency() -> None:
    """G4: tasks of one list run one at a time in the order added; lists run concurrently."""
    log, go = Log(), anyio.Event()

    async def task(name: str) -> None:
        log.append(name)
        await go.wait()
        log.append(f"{name} done")

    runner = Runner()
    async with runner:
        for name in "ab":
            app = DeferredMiddleware(
                responder(lambda tasks: [tasks.add_task(task, f"{name}{n}") for n in (1, 2)]), runner
            )
            await request(app, Log())
        await anyio.wait_all_tasks_blocked()
        assert sorted(log) == ["a1", "b1"]
        assert runner.running == ["test_order_and_concurrency.<locals>.task"] * 2
        assert runner.statistics()[:3] == (4, 2, 2)
        go.set()
    for name in "ab":
        assert [entry for entry in log if entry[0] == name] == [
            f"{name}1",
            f"{name}1 done",
            f"{name}2",
            f"{name}2 done",
        ]


async def test_concurrent_lists() -> None:
    """G4: `concurrent=True` lifts the order of a list, for tasks that it had and for those added later."""
    log, go = Log(), anyio.Event()

    async def task(name: str) -> None:
        log.append(name)
        if name == "first":
            defer(task, "nested")
        await go.wait()

    runner = Runner(concurrent=True)
    async with runner:
        app = DeferredMiddleware(
            responder(lambda tasks: [tasks.add_task(task, name) for name in ("first", "second")]), runner
        )
        await request(app, Log())
        with anyio.fail_after(10):
            while len(log) < 3:
                await anyio.lowlevel.checkpoint()
        assert sorted(log) == ["first", "nested", "second"]
        go.set()
    assert_conserved(runner)


@pytest.mark.parametrize("limit", ["max_concurrency", "max_threads"])
async def test_limits(limit: str) -> None:
    """G7: no more tasks run at once than the limit says, and the rest waits its turn, first come first served."""
    log, running, runner = Log(), [], Runner(**{limit: 2})  # type: ignore[arg-type]
    started, go = anyio.Event(), threading.Semaphore(0)
    soon = call_soon()

    def sync(number: int) -> None:
        running.append(number)
        soon(lambda: started.set())
        go.acquire()

    async with runner:
        for number in range(6):
            await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(sync, number)), runner), Log())
        if limit == "max_threads":  # an async task does not wait behind sync ones
            await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "async")), runner), log)
            while "async" not in log:
                await anyio.lowlevel.checkpoint()
        for number in range(6):
            while len(running) < min(number + 2, 6):
                await started.wait()
                started = anyio.Event()
            assert set(running) == set(range(min(number + 2, 6)))
            assert runner.statistics().running == min(2, 6 - number)
            go.release()
            while runner.statistics().succeeded - len(log[3:]) <= number:
                await anyio.lowlevel.checkpoint()
    assert_conserved(runner)


async def test_a_cancelled_sync_task_gives_its_place_up() -> None:
    """G7: a list that waits for a thread goes on with its next task when the one that needs it is cancelled."""
    log, go, entered = Log(), threading.Event(), anyio.Event()
    soon = call_soon()

    def block() -> None:
        soon(entered.set)
        go.wait()

    runner = Runner(max_threads=1)
    lists: list[DeferredTasks] = []
    async with runner:
        await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(block)), runner), log)
        await entered.wait()
        app = DeferredMiddleware(
            responder(
                lists.append, lambda tasks: [tasks.add_task(log.note_sync, "sync"), tasks.add_task(log.note, "async")]
            ),
            runner,
        )
        await request(app, log)
        assert next(iter(lists[0])).cancel()
        go.set()
    assert log[-1] == "async"
    assert states(lists[0]) == ["Log.note_sync CANCELLED", "Log.note SUCCEEDED"]


async def test_overflow_waits() -> None:
    """G7: at the limit the request's call is held until there is room; its client has the response, and nothing is lost."""
    log, go = Log(), anyio.Event()
    runner = Runner(max_pending=1)
    app = DeferredMiddleware(
        responder(lambda tasks: [tasks.add_task(go.wait), tasks.add_task(log.note, "task")]), runner
    )
    async with anyio.create_task_group() as group, runner:
        group.start_soon(request, app, log)
        await anyio.wait_all_tasks_blocked()
        assert log == ["http.response.start", "http.response.body"]
        go.set()
        await runner.wait_idle()
    assert sorted(log[2:]) == ["returned", "task"]
    assert_conserved(runner)


async def test_overflow_rejects() -> None:
    """G7: with "reject" an application can answer 503, and serves again once there is room."""
    log, go = Log(), anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            tasks_from(scope).add_task(go.wait)
        except BacklogFull:
            log.append("503")
        for message in [{"type": "http.response.start", "status": 200}, {"type": "http.response.body"}]:
            await send(message)

    runner = Runner(max_pending=1, overflow="reject")
    async with runner:
        for _ in range(2):
            await request(DeferredMiddleware(app, runner), log)
        go.set()
        await runner.wait_idle()
        await request(DeferredMiddleware(app, runner), log)
    sent = ["http.response.start", "http.response.body", "returned"]
    assert log == [*sent, "503", *sent, *sent]
    assert runner.statistics().succeeded == 2


async def test_ten_thousand_tasks() -> None:
    """G7: one list with ten thousand tasks, sync and async in turn, runs to its end in order."""
    seen: list[int] = []

    def sync(number: int) -> None:
        seen.append(number)

    async def asynchronous(number: int) -> None:
        seen.append(number)

    runner = Runner()
    async with runner:
        await run(
            runner,
            lambda tasks: [tasks.add_task((sync, asynchronous)[n // 100 % 2], n) for n in range(10_000)],
        )
    assert seen == list(range(10_000))


# Late and nested


async def test_nested_and_late_tasks() -> None:
    """G11: a task added by a running task runs after the others; a late one runs at once on its own."""
    log, runner = Log(), Runner()
    lists: list[DeferredTasks] = []

    async def nest(*names: str) -> None:
        log.append(names[0])
        if names[1:]:
            defer(nest, *names[1:])

    def nest_sync() -> None:
        defer(log.note_sync, "from a thread")

    app = DeferredMiddleware(
        responder(
            lists.append,
            lambda tasks: [
                tasks.add_task(nest, "one", "three", "four"),
                tasks.add_task(nest_sync),
                tasks.add_task(nest, "two"),
            ],
        ),
        runner,
    )
    async with runner:
        await request(app, log)
        await runner.wait_idle()
        lists[0].add_task(log.note, "late")
        lists[0].options(when="failure").add_task(log.note, "skipped")
        await runner.wait_idle()
    assert log[3:] == ["one", "two", "three", "from a thread", "four", "late"]
    assert runner.statistics()[:5] == (8, 0, 0, 7, 0)
    assert runner.statistics().skipped == 1


# Timeouts


async def test_a_runtime_error_of_a_task_with_a_timeout() -> None:
    """G3: a RuntimeError that a task with a timeout raises is its own, and no complaint of the event loop."""
    error = RuntimeError("its own")

    async def fail() -> None:
        raise error

    runner = Runner(timeout=60)
    async with runner:
        task = defer(fail)
    assert (task.state, task.error) == (TaskState.FAILED, error)


async def test_timeouts(caplog: pytest.LogCaptureFixture) -> None:
    """An async task is cancelled when its time is over; a sync one's list goes on, and the log says the thread runs."""
    log, go = Log(), threading.Event()

    async def slow() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            log.append("cleaned up")

    def slow_sync() -> None:
        go.wait()
        log.append("thread done")

    runner = Runner()
    async with runner:
        tasks = await run(
            runner,
            lambda tasks: [
                tasks.options(timeout=0.01, name=func.__name__).add_task(func) for func in (slow, slow_sync)
            ],
            lambda tasks: tasks.options(timeout=30).add_task(log.note, "next"),
            lambda tasks: tasks.options(timeout=30).add_task(log.note_sync, "next sync"),
            lambda tasks: tasks.options(timeout=30).add_task(fail_async, TimeoutError("its own")),
        )
        assert runner._scheduler.threads._idle
        go.set()
    assert log[:3] == ["cleaned up", "next", "next sync"]
    assert [task.state.name for task in tasks] == ["TIMED_OUT", "TIMED_OUT", "SUCCEEDED", "SUCCEEDED", "FAILED"]
    assert [(type(task.error), str(task.error)) for task in tasks][:2] == [
        (TaskTimedOut, "'slow': timeout=0.01 s is over"),
        (TaskTimedOut, "'slow_sync': timeout=0.01 s is over"),
    ]
    first, second, _ = messages(caplog)
    assert first.startswith("Timed out after 0.01 s: deferred task 'slow', added at ")
    assert second.endswith("; it is a sync function, so its thread still runs")


async def test_a_thread_that_was_given_up_counts_until_it_ends() -> None:
    """G7: a timed-out sync task keeps its thread of `max_threads`, so that stuck threads cannot pile up."""
    go, log = threading.Event(), Log()
    lists: list[DeferredTasks] = []
    runner = Runner(max_threads=1)

    async def slow_after_all() -> None: ...

    def stuck() -> Any:
        go.wait()
        return slow_after_all()

    async with runner:
        app = DeferredMiddleware(
            responder(
                lists.append,
                lambda tasks: [tasks.options(timeout=0.3).add_task(stuck), tasks.add_task(log.note_sync, "next")],
            ),
            runner,
        )
        await request(app, Log())
        while runner.statistics().timed_out == 0:
            await anyio.sleep(0.01)
        await anyio.wait_all_tasks_blocked()
        assert (log, runner.statistics().pending) == ([], 1)
        go.set()
    assert log == ["next"]
    assert [task.state.name for task in lists[0]] == ["TIMED_OUT", "SUCCEEDED"]


# Hooks


async def test_observers(caplog: pytest.LogCaptureFixture) -> None:
    """G2: observers see one event when a task starts and one when it ends, and one that raises changes nothing."""
    events: list[TaskEvent] = []

    def broken(event: TaskEvent) -> None:
        raise SystemExit

    runner = Runner(observers=[broken, events.append])
    tasks = await run(
        runner,
        lambda tasks: tasks.add_task(fail_sync, ValueError("x")),
        lambda tasks: tasks.options(when="failure").add_task(fail_async, ValueError()),
    )
    failed, skipped = tasks
    outcome = Outcome("http", 200, complete=True)
    assert [(event.task, event.state, event.outcome, event.error) for event in events] == [
        (failed, TaskState.RUNNING, outcome, None),
        (failed, TaskState.FAILED, outcome, failed.error),
        (skipped, TaskState.SKIPPED, outcome, None),
    ]
    assert [event.queued > 0 for event in events] == [True] * 3
    assert [event.duration > 0 for event in events] == [True, True, False]
    assert len([message for message in messages(caplog) if message.startswith("Observer ")]) == 3


async def test_observers_and_logs_are_in_the_tasks_context() -> None:
    """G5: an observer is called in the context of the task, also for one that never ran."""
    from contextvars import ContextVar

    var: ContextVar[str] = ContextVar("var")
    seen: list[tuple[str, str]] = []
    runner = Runner(observers=[lambda event: seen.append((var.get(), event.state.name))])

    def add(tasks: DeferredTasks) -> None:
        for name in ("async", "sync", "skipped", "cancelled"):
            var.set(name)
            if name == "cancelled":
                tasks.add_task(print).cancel()
            else:
                when = "failure" if name == "skipped" else "always"
                tasks.options(when=when).add_task(Log().note_sync if name == "sync" else Log().note, "")  # type: ignore[arg-type]
        var.set("later")

    await run(runner, add)
    assert seen == [
        ("cancelled", "CANCELLED"),
        ("async", "RUNNING"),
        ("async", "SUCCEEDED"),
        ("sync", "RUNNING"),
        ("sync", "SUCCEEDED"),
        ("skipped", "SKIPPED"),
    ]


async def test_around() -> None:
    """`around` is entered around the call in the thread that makes it, in order, and sees its error."""
    log, home = Log(), threading.get_ident()

    def hook(label: str) -> Callable[[DeferredTask], Any]:
        @contextlib.contextmanager
        def around(task: DeferredTask) -> Iterator[None]:
            where = "loop" if threading.get_ident() == home else "thread"
            log.append(f"{label} enters {task.name} on {where}")
            try:
                yield
            except Exception as exc:
                log.append(f"{label} sees {exc!r}")
                raise

        return around

    runner = Runner(around=[hook("outer"), hook("inner")])
    await run(
        runner,
        lambda tasks: tasks.options(name="async").add_task(log.note, "call"),
        lambda tasks: tasks.options(name="sync").add_task(fail_sync, ValueError("x")),
        lambda tasks: tasks.options(name="slow", timeout=0.01).add_task(anyio.sleep_forever),
    )
    error = TaskTimedOut("'slow': timeout=0.01 s is over")
    assert log == [
        "outer enters async on loop",
        "inner enters async on loop",
        "call",
        "outer enters sync on thread",
        "inner enters sync on thread",
        "inner sees ValueError('x')",
        "outer sees ValueError('x')",
        "outer enters slow on loop",
        "inner enters slow on loop",
        f"inner sees {error!r}",
        f"outer sees {error!r}",
    ]


async def test_around_that_fails() -> None:
    """G2: an `around` that raises fails the task, whose function is not called; the next task is not affected."""
    log = Log()

    def broken(task: DeferredTask) -> Any:
        if task.name == "guarded":
            raise RuntimeError("no session")
        return contextlib.nullcontext()

    tasks = await run(
        Runner(around=[broken]),
        lambda tasks: tasks.options(name="guarded").add_task(log.note, "async"),
        lambda tasks: tasks.options(name="guarded").add_task(log.note_sync, "sync"),
        lambda tasks: tasks.add_task(log.note, "next"),
    )
    assert log == ["next"]
    assert [task.state.name for task in tasks] == ["FAILED", "FAILED", "SUCCEEDED"]


async def test_a_callable_when_that_raises_fails_the_task() -> None:
    """A callable `when` decides with the outcome, and one that raises counts as a failed task."""
    log = Log()
    tasks = await run(
        Runner(),
        lambda tasks: tasks.options(when=lambda outcome: outcome.status == 200).add_task(log.note, "ran"),
        lambda tasks: tasks.options(when=lambda outcome: outcome.status == 500).add_task(log.note, "skipped"),
        lambda tasks: tasks.options(when=lambda _: bool(1 / 0)).add_task(log.note, "failed"),
        lambda tasks: tasks.options(when=lambda _: bool(1 / 0)).add_task(log.note_sync, "failed"),
    )
    assert log == ["ran"]
    assert [task.state.name for task in tasks] == ["SUCCEEDED", "SKIPPED", "FAILED", "FAILED"]
    assert isinstance(list(tasks)[2].error, ZeroDivisionError)


# Drain


async def test_drain_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """G8: after `drain_timeout` what is left is cancelled, awaited, and logged and counted by name as ABANDONED."""
    log, stuck_entered, go = Log(), anyio.Event(), threading.Event()
    soon = call_soon()

    async def hangs() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            log.append("awaited")

    def stuck() -> None:
        soon(stuck_entered.set)
        go.wait()

    runner = Runner(drain_timeout=0.05, observers=[log])
    lists: list[DeferredTasks] = []
    async with runner:
        app = DeferredMiddleware(
            responder(
                lists.append,
                lambda tasks: [tasks.options(name=func.__name__).add_task(func) for func in (hangs, hangs)],
            ),
            runner,
        )
        await request(app, Log())
        app = DeferredMiddleware(
            responder(lists.append, lambda tasks: [tasks.options(name=n).add_task(stuck) for n in ("stuck", "after")]),
            runner,
        )
        await request(app, Log())
        await stuck_entered.wait()
    log.append("drained")
    go.set()
    assert [states(tasks) for tasks in lists] == [
        ["hangs ABANDONED", "hangs ABANDONED"],
        ["stuck ABANDONED", "after ABANDONED"],
    ]
    assert sorted(log[:2]) == ["hangs RUNNING", "stuck RUNNING"]
    assert log[-1] == "drained"
    assert sorted(log[2:-1]) == ["after ABANDONED", "awaited", "hangs ABANDONED", "hangs ABANDONED", "stuck ABANDONED"]
    assert runner.statistics() == (4, 0, 0, 0, 0, 0, 0, 0, 4)
    header, *rest = messages(caplog)
    assert header.startswith("drain_timeout=0.05 s is over; abandoning deferred tasks: ")
    assert set(header.split(": ")[1].split(", ")) == {"'hangs' (2)", "'stuck' (1)", "'after' (1)"}
    assert len(rest) == 4
    assert all(message.startswith("Abandoned at shutdown: deferred task ") for message in rest)


async def test_drain_gives_a_request_up_that_does_not_return() -> None:
    """G8: a request that is past its response and never returns holds a drain up for `drain_timeout` only."""
    log = Log()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        defer(log.note, "task")
        for message in [{"type": "http.response.start", "status": 200}, {"type": "http.response.body"}]:
            await send(message)
        await anyio.sleep_forever()

    runner = Runner(drain_timeout=0.05)
    async with anyio.create_task_group() as group:
        async with runner:
            group.start_soon(request, DeferredMiddleware(app, runner), log)
            await anyio.wait_all_tasks_blocked()
        assert runner.statistics().abandoned == 1
        group.cancel_scope.cancel()
    assert log == ["http.response.start", "http.response.body"]
    assert_conserved(runner)


async def test_a_task_that_fails_while_it_is_abandoned() -> None:
    """G2: a task whose clean-up raises when it is cancelled at shutdown is ABANDONED, with that error."""

    async def unclean() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("in clean-up")

    runner = Runner(drain_timeout=0.01)
    lists: list[DeferredTasks] = []
    async with runner:
        await request(DeferredMiddleware(responder(lists.append, lambda tasks: tasks.add_task(unclean)), runner), Log())
        await anyio.wait_all_tasks_blocked()
    (task,) = lists[0]
    assert (task.state, str(task.error)) == (TaskState.ABANDONED, "in clean-up")


def test_an_event_loop_that_just_stops() -> None:
    """G2: tasks on an event loop that is closed without a shutdown end ABANDONED when it is collected."""
    runner = Runner()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        await runner.__aenter__()
        await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(anyio.sleep_forever)), runner), Log())
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    loop.run_until_complete(main())
    pending = asyncio.all_tasks(loop)
    for task in pending:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
    loop.close()
    assert_conserved(runner)
    assert runner.statistics().accepted == 1


async def test_a_task_can_be_cancelled_up_to_its_start() -> None:
    """G2: a task that is cancelled when its turn has come, but has not begun, never runs."""
    log = Log()
    runner = Runner(observers=[log])
    lists: list[DeferredTasks] = []
    async with runner:
        app = responder(lists.append, lambda tasks: tasks.add_task(log.note, "cancelled"))
        await DeferredMiddleware(app, runner)(http_scope(), no_more_messages, Log().send)
        assert next(iter(lists[0])).cancel()
        await anyio.wait_all_tasks_blocked()
    assert log == ["Log.note CANCELLED"]
    assert_conserved(runner)


async def test_a_worker_takes_what_another_was_called_for() -> None:
    """G4: a list that arrives as another's task ends runs once, whichever worker is there first."""
    log, gate, runner = Log(), anyio.Event(), Runner()

    async def wait() -> None:
        await gate.wait()
        log.append("first")

    async with runner:
        await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(wait)), runner), Log())
        await anyio.wait_all_tasks_blocked()
        gate.set()
        await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "second")), runner), Log())
        await runner.wait_idle()
    assert log == ["first", "second"]
    assert_conserved(runner)


async def test_short_tasks_leave_others_their_turn() -> None:
    """G6: of many tasks that never wait, only `max_concurrency` run before the event loop does what else it has to."""
    log = Log()
    runner = Runner(max_concurrency=16)
    async with runner:
        for _ in range(40):
            await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "task")), runner), Log())
        while runner.statistics().succeeded < 40:
            log.append("turn")
            await anyio.lowlevel.checkpoint()
    assert log.count("task") == 40
    assert "turn" in log[log.index("task") : len(log) - log[::-1].index("task")]


@pytest.mark.parametrize("timeout", [None, 60])
async def test_a_cancelled_session_gives_back_what_its_tasks_held(timeout: float | None) -> None:
    """G2, G7: what ran or was about to when a session is cancelled is abandoned; a slot is free then, a thread once done."""
    log = Log()
    runner = Runner(observers=[log], timeout=timeout)
    entered, gate = anyio.Event(), threading.Event()
    soon = functools.partial(call_soon(), entered.set)

    def block() -> None:
        soon()
        gate.wait()

    with anyio.CancelScope() as scope:
        async with runner:
            await request(
                DeferredMiddleware(responder(lambda tasks: tasks.options(name="block").add_task(block)), runner), Log()
            )
            await entered.wait()
            app = responder(
                lambda tasks: tasks.add_task(anyio.sleep_forever), lambda tasks: tasks.add_task(log.note_sync, "sync")
            )
            await request(DeferredMiddleware(app, runner), Log())
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    ends = [entry for entry in log if not entry.endswith("RUNNING")]
    assert sorted(ends) == ["Log.note_sync ABANDONED", "block ABANDONED", "sleep_forever ABANDONED"]
    assert_conserved(runner)
    account = runner._scheduler.account
    assert (account.places, account.threads) == (runner.max_concurrency, runner.max_threads - 1)
    gate.set()
    with anyio.fail_after(10):
        while account.threads < runner.max_threads:
            await anyio.lowlevel.checkpoint()
    assert account.places == runner.max_concurrency


@pytest.mark.parametrize("timeout", [None, 60])
async def test_a_drain_that_comes_as_a_thread_finishes(timeout: float | None) -> None:
    """G2: what a sync task returned is awaited within the drain, though its thread is not free yet."""
    log, lists = Log(), list[DeferredTasks]()
    finished, gate, soon = anyio.Event(), threading.Event(), call_soon()
    runner = Runner(drain_timeout=0.01, timeout=timeout)
    start = runner._scheduler.threads.start

    def held(job: Any, done: Any) -> None:
        def run_and_wait() -> None:
            job()
            soon(finished.set)
            gate.wait()

        start(run_and_wait, done)

    runner._scheduler.threads.start = held  # type: ignore[method-assign]
    app = DeferredMiddleware(responder(lists.append, lambda tasks: tasks.add_task(lambda: log.note("awaited"))), runner)
    async with runner:
        await request(app, Log())
        await finished.wait()
    gate.set()
    assert log == ["awaited"]
    assert [task.state for task in lists[0]] == [TaskState.SUCCEEDED]
    assert_conserved(runner)


async def test_sync_tasks_without_sniffio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync tasks run where anyio's optional sniffio is not installed."""
    monkeypatch.delitem(sys.modules, "sniffio", raising=False)
    log = Log()
    await run(Runner(), lambda tasks: tasks.add_task(log.note_sync, "task"))
    assert log == ["task"]
