"""A server's side of ASGI that writes down what happens, and small applications to run on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import copy_context
from types import coroutine
from typing import Any

import anyio
from anyio.lowlevel import current_token

from asgi_deferred import (
    DeferredMiddleware,
    DeferredTask,
    DeferredTasks,
    Outcome,
    Runner,
    TaskEvent,
    TaskState,
    tasks_from,
)

OK: list[dict[str, Any]] = [
    {"type": "http.response.start", "status": 200, "headers": []},
    {"type": "http.response.body", "body": b"hello"},
]


def response(status: int) -> list[dict[str, Any]]:
    return [{**OK[0], "status": status}, OK[1]]


def http_scope(path: str = "/", **extra: Any) -> dict[str, Any]:
    return {"type": "http", "asgi": {"version": "3.0"}, "method": "GET", "path": path, "headers": [], **extra}


async def no_more_messages() -> Any: ...


class Log(list[str]):
    """What happened, in order; also an observer, and an application's `send`."""

    def __call__(self, event: TaskEvent) -> None:
        self.append(f"{event.task.name} {event.state.name}")

    async def send(self, message: Any) -> None:
        self.append(message["type"])

    async def note(self, entry: str) -> None:
        self.append(entry)

    def note_sync(self, entry: str) -> None:
        self.append(entry)


def responder(
    *add: Callable[[DeferredTasks], object], messages: list[dict[str, Any]] = OK
) -> Callable[[Any, Any, Any], Awaitable[None]]:
    """Make an application that gives its task list to each of `add`, and then sends `messages`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] in ("http", "websocket")  # it has no lifespan
        for each in add:
            each(tasks_from(scope))
        for message in messages:
            await send(message)

    return app


@asynccontextmanager
async def lifespan(app: Any, log: list[str] | None = None) -> AsyncIterator[dict[str, Any]]:
    """Run an application's lifespan as a server does; yield its scope."""
    to_app, from_server = anyio.create_memory_object_stream[dict[str, Any]](10)
    to_server, from_app = anyio.create_memory_object_stream[dict[str, Any]](10)
    scope: dict[str, Any] = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}

    async def run(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        task_status.started()
        await app(scope, from_server.receive, to_server.send)

    async def expect(kind: str) -> None:
        message = await from_app.receive()
        if log is not None:
            log.append(message["type"])
        assert message["type"] == kind, message

    with to_app, from_server, to_server, from_app:
        async with anyio.create_task_group() as group:
            await group.start(run)
            await to_app.send({"type": "lifespan.startup"})
            await expect("lifespan.startup.complete")
            yield scope
            await to_app.send({"type": "lifespan.shutdown"})
            await expect("lifespan.shutdown.complete")


async def request(app: Any, log: Log, scope: dict[str, Any] | None = None) -> None:
    """Make one request, and note when the call has returned."""
    await app(scope or http_scope(), no_more_messages, log.send)
    log.append("returned")


def ends(outcome: Outcome | None) -> object:
    """What of an outcome stays when its error is let go of."""
    return outcome and (outcome.type, outcome.status, outcome.complete, outcome.success)


def call_soon() -> Callable[..., None]:
    """Return a function that calls another on this event loop, from any thread."""
    native: Any = current_token().native_token
    return native.run_sync_soon if hasattr(native, "run_sync_soon") else native.call_soon_threadsafe  # type: ignore[no-any-return]


def task_list(runner: Runner | None = None) -> DeferredTasks:
    """Return the list of a request that is under way."""
    lists: list[DeferredTasks] = []
    call: Any = DeferredMiddleware(responder(lists.append), runner)(http_scope(), no_more_messages, _never)
    copy_context().run(call.send, None)
    _calls.append(call)
    return lists[0]


@coroutine
def _never(message: Any) -> Any:
    yield


_calls: list[Any] = []  # which stay under way


def states(tasks: DeferredTasks | list[DeferredTask]) -> list[str]:
    return [f"{task.name} {task.state.name}" for task in tasks]


def assert_conserved(runner: Runner) -> None:
    """G2: every accepted task is in exactly one state, and none is left over."""
    counts = runner.statistics()
    assert counts.accepted == sum(counts[1:])
    assert counts.pending == counts.running == 0


FINAL_STATES = [state for state in TaskState if state not in (TaskState.PENDING, TaskState.RUNNING)]
