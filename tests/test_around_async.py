"""`around` with context managers that are async, or sync and async in one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from threading import get_ident

import pytest
from anyio import Event, fail_after
from anyio.lowlevel import checkpoint

from asgi_deferred import DeferredTask, Runner, TaskState, current_tasks

pytestmark = pytest.mark.anyio


class Transcript(list[str]):
    """Lines that say on which side they were written."""

    def __init__(self) -> None:
        self.loop = get_ident()

    def write(self, line: str) -> None:
        self.append(f"{line}, {'loop' if get_ident() == self.loop else 'thread'}")

    def both(self, _: DeferredTask) -> Both:
        return Both(self)

    @contextmanager
    def only_sync(self, _: DeferredTask) -> Iterator[None]:
        self.write("enter")
        yield
        self.write("exit")

    @asynccontextmanager
    async def only_async(self, _: DeferredTask) -> AsyncIterator[None]:
        self.write("aenter")
        try:
            yield
        finally:
            self.write("aexit")

    async def async_task(self) -> None:
        await checkpoint()
        self.write("task")

    def sync_task(self) -> None:
        self.write("task")

    def sync_then_async(self) -> Awaitable[None]:
        self.write("call")
        return self.async_task()

    async def failing(self) -> None:
        self.write("task")
        raise ValueError

    async def hanging(self) -> None:
        self.write("task")
        await Event().wait()


class Both:
    def __init__(self, transcript: Transcript) -> None:
        self.transcript = transcript

    def __enter__(self) -> None:
        self.transcript.write("enter")

    def __exit__(self, *_: object) -> None:
        self.transcript.write("exit")

    async def __aenter__(self) -> None:
        await checkpoint()
        self.transcript.write("aenter")

    async def __aexit__(self, *_: object) -> None:
        await checkpoint()
        self.transcript.write("aexit")


async def run(runner: Runner, func: Callable[..., object]) -> DeferredTask:
    with fail_after(20):
        async with runner:
            task = current_tasks().add_task(func)
            await runner.wait_idle()
    return task


async def test_both_around_async() -> None:
    """A context manager that is both is entered as an async one around an async task."""
    t = Transcript()
    await run(Runner(around=[t.both]), t.async_task)
    assert t == ["aenter, loop", "task, loop", "aexit, loop"]


async def test_both_around_sync() -> None:
    """A context manager that is both is entered as a sync one around a sync task, in its thread."""
    t = Transcript()
    await run(Runner(around=[t.both]), t.sync_task)
    assert t == ["enter, thread", "task, thread", "exit, thread"]


async def test_both_around_call_and_await() -> None:
    """A context manager that is both is entered around the call in the thread, and again around what is awaited."""
    t = Transcript()
    await run(Runner(around=[t.both]), t.sync_then_async)
    assert t == ["enter, thread", "call, thread", "exit, thread", "aenter, loop", "task, loop", "aexit, loop"]


async def test_one_of_each_around_async() -> None:
    """Sync and async ones nest around an async task in the order given."""
    t = Transcript()
    await run(Runner(around=[t.only_sync, t.only_async]), t.async_task)
    assert t == ["enter, loop", "aenter, loop", "task, loop", "aexit, loop", "exit, loop"]


async def test_one_of_each_around_call_and_await() -> None:
    """Of a sync function that returns an awaitable the sync one sees the call, the async one the await."""
    t = Transcript()
    await run(Runner(around=[t.only_sync, t.only_async]), t.sync_then_async)
    assert t == ["enter, thread", "call, thread", "exit, thread", "aenter, loop", "task, loop", "aexit, loop"]


async def test_only_async_around_sync() -> None:
    """An async one has nothing to do around a sync task that returns no awaitable."""
    t = Transcript()
    await run(Runner(around=[t.only_async]), t.sync_task)
    assert t == ["task, thread"]


async def test_exit_after_failure() -> None:
    """G3: an async one is left when its task fails, and the task is FAILED."""
    t = Transcript()
    task = await run(Runner(around=[t.only_async]), t.failing)
    assert t == ["aenter, loop", "task, loop", "aexit, loop"]
    assert task.state is TaskState.FAILED


async def test_exit_after_timeout() -> None:
    """A task's timeout ends before the async one is left, which may await."""
    t = Transcript()
    task = await run(Runner(around=[t.both], timeout=0.01), t.hanging)
    assert t == ["aenter, loop", "task, loop", "aexit, loop"]
    assert task.state is TaskState.TIMED_OUT
