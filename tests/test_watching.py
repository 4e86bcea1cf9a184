"""What a runner tells of the tasks that are unfinished now."""

from __future__ import annotations

import threading

import anyio
import pytest

from asgi_deferred import DeferredMiddleware, DeferredTasks, Outcome, Runner, TaskEvent, TaskState

from .support import Log, call_soon, request, responder

pytestmark = pytest.mark.anyio


async def test_unfinished_tasks() -> None:
    """G2: `tasks()` has what waits and what runs, in the order accepted, with the outcome of its request."""
    started, go, runner = anyio.Event(), anyio.Event(), Runner()

    async def first() -> None:
        started.set()
        await go.wait()

    async def second() -> None: ...

    def add(tasks: DeferredTasks) -> None:
        tasks.add_task(first)
        tasks.add_task(second)
        assert [(event.state, event.outcome, event.waited) for event in runner.tasks()] == [
            (TaskState.PENDING, None, 0.0)
        ] * 2

    async with runner:
        await request(DeferredMiddleware(responder(add), runner), Log())
        await started.wait()
        running, waiting = runner.tasks()
        assert (running.task.func, running.state, running.error) == (first, TaskState.RUNNING, None)
        assert (waiting.task.func, waiting.state, waiting.error) == (second, TaskState.PENDING, None)
        assert running.outcome == waiting.outcome == Outcome("http", 200, complete=True)
        assert running.task.request == "GET /"
        assert running.duration > 0 == waiting.duration
        go.set()
        await runner.wait_idle()
        assert runner.tasks() == []


async def test_oldest() -> None:
    """G7: `oldest` is how long a task could have started: nothing while its request is open, or once it runs."""
    started, runner, go = anyio.Event(), Runner(max_threads=1), threading.Event()
    soon = call_soon()

    def stuck() -> None:
        soon(started.set)
        go.wait(30)

    def waits() -> None: ...

    def add(tasks: DeferredTasks) -> None:
        tasks.add_task(waits)
        assert runner.oldest == 0.0

    try:
        async with runner:
            await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(stuck)), runner), Log())
            await started.wait()
            assert runner.oldest == 0.0
            await request(DeferredMiddleware(responder(add), runner), Log())
            (waiting,) = (event for event in runner.tasks() if event.state is TaskState.PENDING)
            assert 0 < waiting.waited < waiting.queued
            assert runner.oldest >= waiting.waited
            go.set()
            await runner.wait_idle()
            assert runner.oldest == 0.0
    finally:
        go.set()


async def test_waited_of_events() -> None:
    """G2: an event says how long its task was added, and of that how long it could have started."""
    seen: list[TaskEvent] = []
    runner = Runner(observers=[seen.append])

    async def late() -> None: ...

    async def first(tasks: DeferredTasks) -> None:
        tasks.add_task(late)

    def add(tasks: DeferredTasks) -> None:
        tasks.add_task(first, tasks)
        tasks.add_task(late).cancel()

    async with runner:
        await request(DeferredMiddleware(responder(add), runner), Log())
    cancelled, began, ended, late_began, late_ended = seen
    assert (cancelled.state, cancelled.waited) == (TaskState.CANCELLED, 0.0)
    assert 0 < began.waited < began.queued
    assert (ended.waited, ended.queued) == (began.waited, began.queued)
    assert late_began.waited == late_began.queued == late_ended.waited > 0
