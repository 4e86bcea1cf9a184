"""Bad neighbours: middleware around ours that misbehaves, applications that do, and lists that are kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner, RunnerClosed, TaskEvent, tasks_from

pytestmark = pytest.mark.anyio

START = {"type": "http.response.start", "status": 200, "headers": []}
FINAL = {"type": "http.response.body", "body": b"hello"}


async def no_more() -> Any:
    await anyio.sleep_forever()


class Transcript(list[str]):
    """What happened, in order; with a runner that notes its events, an application, and a server's `send`."""

    def __init__(self) -> None:
        self.runner = Runner(observers=[self.observe], drain_timeout=5)
        self.lists: list[DeferredTasks] = []

    def observe(self, event: TaskEvent) -> None:
        self.append(f"{event.task.name} {event.state.name}")

    async def send(self, message: Any) -> None:
        self.append(message["type"])

    async def task(self) -> None:
        pass

    async def app(self, scope: Any, receive: Any, send: Any) -> Any:
        self.lists.append(tasks_from(scope))
        self.lists[-1].options(name="one").add_task(self.task)
        self.lists[-1].options(name="failed", when="failure").add_task(self.task)
        await send(START)
        await send(FINAL)
        self.append("app ends")
        return "not None"


def scope(**extra: Any) -> dict[str, Any]:
    return {"type": "http", "asgi": {"version": "3.0"}, "method": "GET", "path": "/", "headers": [], **extra}


def neighbour(does: str, app: Any) -> Any:
    """Make a middleware that misbehaves."""

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        kept: list[Any] = []

        async def send_or_not(message: Any) -> None:
            final = message["type"] == "http.response.body"
            if does == "buffers":
                kept.append(message)
                return
            if not (final and does == "swallows the final message"):
                await send(message)
            if final and does == "sends it twice":
                await send(message)
            if final and does == "cancels after it":
                cancelled.cancel()
                await anyio.lowlevel.checkpoint()
            if not final and does == "cancels before it":
                cancelled.cancel()
                await anyio.lowlevel.checkpoint()

        with anyio.CancelScope() as cancelled:
            if does == "calls in a child task":
                async with anyio.create_task_group() as group:
                    group.start_soon(app, scope, receive, send_or_not)
            else:
                await app(scope, receive, send_or_not)
        if does == "replays the scope":
            await app(scope, receive, send_or_not)
        for message in kept:
            await send(message)

    return middleware


SENT = ["http.response.start", "http.response.body"]
RAN = ["one RUNNING", "one SUCCEEDED", "failed SKIPPED"]
FAILED = ["one SKIPPED", "failed RUNNING", "failed SUCCEEDED"]


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        ("passes on", [*SENT, "app ends", *RAN]),
        ("buffers", ["app ends", *SENT, *RAN]),
        ("swallows the final message", [SENT[0], "app ends", *FAILED]),
        ("sends it twice", [*SENT, SENT[1], "app ends", *RAN]),
        ("cancels before it", [SENT[0], *FAILED]),
        ("cancels after it", [*SENT, *RAN]),
        ("calls in a child task", [*SENT, "app ends", *RAN]),
        ("replays the scope", [*SENT, "app ends", *SENT, "app ends", *RAN, *RAN]),
    ],
)
async def test_neighbour_inside(does: str, expected: list[str]) -> None:
    """G1, G2, G10: inside ours, a misbehaving middleware decides how the request ended, by what it sends; no task runs before."""
    transcript = Transcript()
    async with transcript.runner:
        app = DeferredMiddleware(neighbour(does, transcript.app), transcript.runner)
        assert await app(scope(), no_more, transcript.send) is None  # type: ignore[func-returns-value]
    assert transcript == expected


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        ("passes on", [*SENT, "app ends", *RAN]),
        ("swallows the final message", [SENT[0], "app ends", *RAN]),
        ("sends it twice", [*SENT, SENT[1], "app ends", *RAN]),
        ("cancels before it", [SENT[0], *FAILED]),
        ("cancels after it", [*SENT, *FAILED]),
        ("calls in a child task", [*SENT, "app ends", *RAN]),
    ],
)
async def test_neighbour_outside(does: str, expected: list[str]) -> None:
    """G1, G2: outside ours, what a middleware does with a message it took is not seen; its cancellation is."""
    transcript = Transcript()
    async with transcript.runner:
        app = neighbour(does, DeferredMiddleware(transcript.app, transcript.runner))
        await app(scope(), no_more, transcript.send)
    assert transcript == expected


async def test_neighbour_outside_replays_the_scope() -> None:
    """G2, G10: a scope that is used twice makes two requests, each with its own list."""
    transcript = Transcript()
    async with transcript.runner:
        app = neighbour("replays the scope", DeferredMiddleware(transcript.app, transcript.runner))
        await app(scope(), no_more, transcript.send)
    assert sorted(transcript) == sorted([*SENT, "app ends", *RAN] * 2)
    assert transcript.lists[0] is not transcript.lists[1]


async def test_neighbour_outside_buffers() -> None:
    """G1: behind a middleware that holds messages back "handed over" means to it: ours is to be outermost."""
    transcript = Transcript()
    app = neighbour("buffers", DeferredMiddleware(transcript.app, transcript.runner))
    await app(scope(), no_more, transcript.send)
    assert transcript == ["app ends", *RAN, *SENT]


@pytest.mark.parametrize("moment", ["before any message", "between its messages"])
async def test_server_send_fails(moment: str) -> None:
    """G2: a server that raises from `send` before the end, as for a client that has gone, fails the request."""
    transcript = Transcript()

    async def send(message: Any) -> None:
        if moment == "before any message" or message["type"] == "http.response.body":
            raise OSError("gone")
        transcript.append(message["type"])

    async with transcript.runner:
        with pytest.raises(OSError, match="gone"):
            await DeferredMiddleware(transcript.app, transcript.runner)(scope(), no_more, send)
    assert transcript == ([] if moment == "before any message" else [SENT[0]]) + FAILED


def in_thread(call: Callable[[], Any]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def in_another_loop(call: Callable[[], Any]) -> None:
    async def main() -> None:
        call()

    in_thread(lambda: asyncio.run(main()))


@pytest.mark.parametrize("use", [lambda call: call(), in_thread, in_another_loop], ids=["here", "thread", "loop"])
async def test_list_kept_after_its_request(use: Callable[[Callable[[], Any]], None]) -> None:
    """G11: a list that is used after its request, from anywhere, runs the task at once; after the drain it raises."""
    transcript = Transcript()
    refused: list[str] = []

    def add() -> None:
        try:
            transcript.lists[0].options(name="late").add_task(transcript.task)
        except RunnerClosed as exc:
            refused.append(str(exc))

    async with transcript.runner:
        await DeferredMiddleware(transcript.app, transcript.runner)(scope(), no_more, transcript.send)
        await transcript.runner.wait_idle()
        use(add)
        await transcript.runner.wait_idle()
        assert transcript == [*SENT, "app ends", *RAN, "late RUNNING", "late SUCCEEDED"]
    use(add)
    assert len(refused) == 1
    assert refused[0].startswith("'late' was not accepted: ")
    assert transcript.runner.statistics()._asdict() == {
        **dict.fromkeys(transcript.runner.statistics()._fields, 0),
        "accepted": 3,
        "succeeded": 2,
        "skipped": 1,
    }


async def test_list_kept_without_lifespan() -> None:
    """G11: without a lifespan nothing could run a task after its request: `add_task` raises."""
    transcript = Transcript()
    await DeferredMiddleware(transcript.app, transcript.runner)(scope(), no_more, transcript.send)
    with pytest.raises(RunnerClosed):
        transcript.lists[0].add_task(transcript.task)
    assert transcript == [*SENT, "app ends", *RAN]


async def test_drain_waits_for_a_call_in_the_middle() -> None:
    """G2, G8: a shutdown that comes in the middle of a call with tasks waits for that, and the tasks reach their end."""
    transcript, middle, go_on = Transcript(), anyio.Event(), anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks_from(scope).options(name="one").add_task(transcript.task)
        middle.set()
        await go_on.wait()
        await transcript.app(scope, receive, send)

    async def go_on_later() -> None:
        await anyio.wait_all_tasks_blocked()
        transcript.append("the drain waits")
        go_on.set()

    async with anyio.create_task_group() as group:
        async with transcript.runner:
            group.start_soon(DeferredMiddleware(app, transcript.runner), scope(), no_more, transcript.send)
            await middle.wait()
            group.start_soon(go_on_later)
    assert transcript == ["the drain waits", *SENT, "app ends", "one RUNNING", "one SUCCEEDED", *RAN]


async def test_cancelled_calls_end_together() -> None:
    """G9: without a lifespan, calls that a server cancels return when the tasks of all of them have ended."""
    transcript, release = Transcript(), {"slow": anyio.Event(), "quick": anyio.Event()}

    async def task(name: str) -> None:
        transcript.append(f"{name} task starts")
        await release[name].wait()
        transcript.append(f"{name} task ends")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks_from(scope).add_task(task, scope["path"])
        await send(START)
        await send(FINAL)

    async def call(name: str) -> None:
        with cancelled[name]:
            await DeferredMiddleware(app, runner)(scope(path=name), no_more, transcript.send)
        transcript.append(f"{name} call ends")

    runner = Runner()
    cancelled = {name: anyio.CancelScope() for name in release}
    async with anyio.create_task_group() as group:
        for name in release:
            group.start_soon(call, name)
        while transcript.count("slow task starts") + transcript.count("quick task starts") < 2:
            await anyio.lowlevel.checkpoint()
        transcript.clear()
        for name in release:
            cancelled[name].cancel()
        await anyio.wait_all_tasks_blocked()
        release["quick"].set()
        await anyio.wait_all_tasks_blocked()
        assert transcript == ["quick task ends"]
        release["slow"].set()
    assert transcript[1] == "slow task ends"
    assert sorted(transcript[2:]) == ["quick call ends", "slow call ends"]
