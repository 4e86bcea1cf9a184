"""Ten times the load that can be sustained: what is bounded, what is refused, and that it ends."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any, Literal

import anyio
import pytest

from asgi_deferred import BacklogFull, DeferredMiddleware, DeferredTasks, Runner, tasks_from

pytestmark = pytest.mark.anyio

LIMIT, LOAD = 20, 200


class Site:
    """An application whose tasks wait until they are let go, and a server that counts its answers."""

    def __init__(self, overflow: Literal["wait", "reject"]) -> None:
        self.runner = Runner(max_pending=LIMIT, max_concurrency=5, overflow=overflow)
        self.middleware = DeferredMiddleware(self.app, self.runner)
        self.answers: list[int] = []
        self.returned = 0
        self.lists: weakref.WeakSet[DeferredTasks] = weakref.WeakSet()
        self.gate = anyio.Event()

    async def task(self) -> None:
        await self.gate.wait()

    def task_in_thread(self) -> None:
        time.sleep(0.001)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        tasks = tasks_from(scope)
        self.lists.add(tasks)
        status = 200
        if scope["path"] != "/without":
            try:
                tasks.add_task(self.task if scope["path"] == "/" else self.task_in_thread)
            except BacklogFull:
                status = 503
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        self.answers.append(status)

    async def request(self, path: str = "/") -> None:
        scope = {"type": "http", "asgi": {"version": "3.0"}, "method": "GET", "path": path, "headers": []}
        await self.middleware(scope, anyio.sleep_forever, _send)
        self.returned += 1


async def _send(message: Any) -> None:
    await anyio.lowlevel.checkpoint()


async def test_wait_holds_calls_not_answers() -> None:
    """G7: with overflow="wait" every client has its answer at once; what waits is calls, beyond max_pending tasks."""
    site = Site("wait")
    async with site.runner, anyio.create_task_group() as group:
        for _ in range(LIMIT):
            await site.request()
        for _ in range(LOAD - LIMIT):
            group.start_soon(site.request)
        await anyio.wait_all_tasks_blocked()
        assert site.answers == [200] * LOAD
        assert site.returned == LIMIT
        assert site.runner.statistics()[:3] == (LOAD, LOAD - 5, 5)
        await site.request("/without")
        assert (site.answers[-1], site.returned) == (200, LIMIT + 1)
        site.gate.set()
        await site.runner.wait_idle()
    assert site.returned == LOAD + 1
    assert site.runner.statistics().succeeded == LOAD


async def test_reject_answers_503() -> None:
    """G7: with overflow="reject" the application answers 503 at max_pending, keeps nothing of it, and recovers in full."""
    site = Site("reject")
    async with site.runner:
        for _ in range(LOAD):
            await site.request()
        assert site.answers == [200] * LIMIT + [503] * (LOAD - LIMIT)
        assert site.returned == LOAD
        gc.collect()
        assert len(site.lists) == LIMIT
        await site.request("/without")
        site.gate.set()
        await site.runner.wait_idle()
        site.answers.clear()
        for _ in range(LIMIT):
            await site.request()
            await site.runner.wait_idle()
        assert site.answers == [200] * LIMIT
    gc.collect()
    assert len(site.lists) == 0
    assert site.runner.statistics()[:4] == (LIMIT * 2, 0, 0, LIMIT * 2)


@pytest.mark.parametrize("path", ["/", "/thread"])
async def test_overload_without_a_deadlock(path: str) -> None:
    """G7: clients that come ten times as fast as tasks end are all served, with async tasks and sync ones, and nothing is lost."""
    site = Site("wait")
    site.gate.set()
    async with site.runner, anyio.create_task_group() as group:
        for _ in range(LOAD * 5):
            group.start_soon(site.request, path)
    assert site.answers == [200] * LOAD * 5
    assert site.returned == LOAD * 5
    assert site.runner.statistics()[:4] == (LOAD * 5, 0, 0, LOAD * 5)
    with anyio.fail_after(10):
        while gc.collect() or site.lists:  # a thread lets go of its last task a little after it has said so
            await anyio.sleep(0.01)
