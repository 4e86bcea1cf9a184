"""Stepping a task's coroutine in its own context, when the event loop goes away under it."""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from types import coroutine
from typing import TYPE_CHECKING

from asgi_deferred._scheduler import in_context

if TYPE_CHECKING:
    from collections.abc import Generator

value: ContextVar[str] = ContextVar("value", default="outside")


@coroutine
def wait() -> Generator[str, None, None]:
    yield "trap"


def test_closing_runs_the_cleanup_of_a_waiting_task_in_its_context() -> None:
    """G5: a task that waits when its event loop goes away cleans up in its own context, once, and silently."""
    log: list[str] = []

    async def task() -> None:
        value.set("inside")
        try:
            await wait()
        finally:
            log.append(value.get())
            raise RuntimeError("in the cleanup")

    async def host() -> None:
        await in_context(copy_context(), task(), lambda: None)

    hosted = host()
    assert hosted.send(None) == "trap"
    hosted.close()
    assert log == ["inside"]
    assert value.get() == "outside"
