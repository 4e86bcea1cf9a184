"""Every way a request ends, with every `when`, and every way a task ends: whole transcripts and events."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner, TaskEvent, tasks_from
from asgi_deferred._outcome import WHEN, When

from .support import OK, Log, ends, http_scope, no_more_messages, response

pytestmark = pytest.mark.anyio

START, BODY = "http.response.start", "http.response.body"


class HTTPError(Exception):
    """What a framework's exception middleware turns into a response."""


async def ok(send: Any) -> None:
    for message in OK:
        await send(message)


async def not_found(send: Any) -> None:
    for message in response(404):
        await send(message)


async def raised_http_exception(send: Any) -> None:
    try:
        raise HTTPError
    except HTTPError:
        await not_found(send)


async def error_before_start(send: Any) -> None:
    raise ValueError("app")


async def error_mid_body(send: Any) -> None:
    await send(OK[0])
    await send({**OK[1], "more_body": True})
    raise ValueError("app")


async def error_after_final(send: Any) -> None:
    await ok(send)
    raise ValueError("app")


async def disconnect(send: Any) -> None:
    """As Django and Starlette's streams do: stop without a final message."""
    await send(OK[0])
    await send({**OK[1], "more_body": True})


async def cancelled(send: Any) -> None:
    await send(OK[0])
    await anyio.sleep_forever()


# What is sent, whether an exception comes out, and which `when` let a task through.
REQUESTS: dict[Any, tuple[list[str], bool, set[str]]] = {
    ok: ([START, BODY], False, {"success", "complete", "always"}),
    not_found: ([START, BODY], False, {"complete", "failure", "always"}),
    raised_http_exception: ([START, BODY], False, {"complete", "failure", "always"}),
    error_before_start: ([], True, {"failure", "always"}),
    error_mid_body: ([START, BODY], True, {"failure", "always"}),
    error_after_final: ([START, BODY], True, {"complete", "failure", "always"}),
    disconnect: ([START, BODY], False, {"failure", "always"}),
    cancelled: ([START], False, {"failure", "always"}),
}

# The events of a task that is let through, and of one that is not.
TASKS = {
    "ok": (["RUNNING", "SUCCEEDED"], ["SKIPPED"]),
    "raises": (["RUNNING", "FAILED"], ["SKIPPED"]),
    "times out": (["RUNNING", "TIMED_OUT"], ["SKIPPED"]),
    "cancelled": (["CANCELLED"], ["CANCELLED"]),
    "abandoned": (["RUNNING", "ABANDONED"], ["SKIPPED"]),
}


async def task_that(kind: str, log: Log) -> None:
    log.append("called")
    if kind == "raises":
        raise ValueError("task")
    if kind in ("times out", "abandoned"):
        await anyio.sleep_forever()


@pytest.mark.parametrize("live", [True, False], ids=["lifespan", "no lifespan"])
@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("endpoint", REQUESTS, ids=lambda endpoint: endpoint.__name__)
async def test_matrix(endpoint: Any, when: When, kind: str, live: bool) -> None:
    """G1, G2, G3: however a request and its task end, the transcript and the events are those of the contract."""
    log, events = Log(), list[TaskEvent]()
    lists: list[DeferredTasks] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        lists.append(tasks_from(scope))
        timeout = 0.001 if kind == "times out" else None
        task = lists[0].options(when=when, timeout=timeout, name="task").add_task(task_that, kind, log)
        if kind == "cancelled":
            task.cancel()
        await endpoint(send)

    # A call cancelled before its tasks start gives them this long to start and to end.
    grace = 0.001 if live or endpoint is not cancelled else 0.3
    runner = Runner(observers=[log, events.append], drain_timeout=grace if kind == "abandoned" else 20)
    wrapped = DeferredMiddleware(app, runner)
    request = anyio.CancelScope()

    async def call() -> None:
        with request:
            try:
                await wrapped(http_scope(), no_more_messages, log.send)
            except ValueError as exc:
                log.append(f"raised {exc}")

    async def serve() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            if endpoint is cancelled or (kind == "abandoned" and not live):
                await anyio.wait_all_tasks_blocked()
                request.cancel()  # without a lifespan, only this ends a call whose task does not

    if live:
        async with runner:
            await serve()
            await anyio.wait_all_tasks_blocked()
    else:
        await serve()

    sent, raises, let_through = REQUESTS[endpoint]
    run = TASKS[kind][when not in let_through]
    expected = [f"task {state}" for state in run]
    if "RUNNING" in run:
        expected.insert(1, "called")
    end = ["raised app"] if raises else []
    if kind == "cancelled":
        assert log == [*expected, *sent, *end]
    elif live:
        assert log == [*sent, *end, *expected]
    else:
        assert log == [*sent, *expected, *(end if kind != "abandoned" or run == ["SKIPPED"] else [])]

    (task,) = lists[0]
    assert [(event.task, event.state.name) for event in events] == [(task, state) for state in run]
    assert events[-1].state is task.state
    assert ends(events[-1].outcome) == (ends(lists[0].outcome) if kind != "cancelled" else None)
    assert events[-1].error is task.error
    counts = runner.statistics()._asdict()
    assert counts.pop("accepted") == 1
    assert {name for name, count in counts.items() if count} == {run[-1].lower()}
