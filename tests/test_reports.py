"""What is said of tasks that were skipped: in the log, in `repr(task)`, and to observers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest

from asgi_deferred import DeferredMiddleware, DeferredTask, DeferredTasks, Outcome, Runner, TaskEvent, TaskState

from .support import Log, http_scope, lifespan, no_more_messages, request, responder, response

pytestmark = pytest.mark.anyio


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return the log's lines, without the task's name and place."""
    caplog.set_level(logging.DEBUG, "asgi_deferred")

    def said() -> list[str]:
        lines = [f"{each.levelname} {each.getMessage()}" for each in caplog.records if each.name == "asgi_deferred"]
        return [re.sub(r"deferred task '.*?', added at \S+:\d+, request 'GET /': ", "", line) for line in lines]

    return said


def never(outcome: Outcome) -> bool:
    return False


ONCE = "(said once for this line; DEBUG has every task)"
SUCCESS = "when='success' runs a task only after a complete response below 400 and no error"
COMPLETE = "when='complete' runs a task only after a complete response"
FAILURE = "when='failure' runs a task only after an error, a status of 400 or above, or no complete response"
HALF: list[dict[str, Any]] = [
    {"type": "http.response.start", "status": 200, "headers": []},
    {"type": "http.response.body", "body": b"h", "more_body": True},
]


def fail(_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("when", "app", "why", "rule", "others"),
    [
        ("success", responder(messages=response(404)), "status 404", SUCCESS, ["complete", "failure", "always"]),
        ("success", responder(fail), "no complete response, ZeroDivisionError", SUCCESS, ["failure", "always"]),
        (
            "success",
            responder(messages=HALF),
            "status 200, no complete response, as when the client leaves",
            SUCCESS,
            ["failure", "always"],
        ),
        (
            "complete",
            responder(messages=[]),
            "no complete response, as when the client leaves",
            COMPLETE,
            ["failure", "always"],
        ),
        ("failure", responder(), "status 200", FAILURE, ["success", "complete", "always"]),
        (never, responder(), "status 200", "the function returned false", ["success", "complete", "always"]),
        (
            "success",
            responder(messages=[{**HALF[0], "status": "200 OK"}, *response(200)[1:]]),
            "a status that is no number",
            SUCCESS,
            ["complete", "failure", "always"],
        ),
    ],
)
async def test_why_a_task_was_skipped(
    when: Any, app: Any, why: str, rule: str, others: list[str], said: Callable[[], list[str]]
) -> None:
    """G11: one INFO line tells the outcome, the rule and what to write instead; `repr(task)` and the event say why."""
    events: list[tuple[TaskState, bool, bool]] = []
    named = "when='never'" if when is never else f"when={when!r}"

    def observer(event: TaskEvent) -> None:
        events.append((event.state, f"SKIPPED ({why}, {named}) added" in repr(event), event.outcome is not None))

    added: list[DeferredTask] = []

    def add(tasks: DeferredTasks) -> None:
        added.append(tasks.options(when=when).add_task(print))

    async def both(scope: Any, receive: Any, send: Any) -> None:
        await responder(add, messages=[])(scope, receive, send)
        await app(scope, receive, send)

    wrapped = DeferredMiddleware(both, Runner(observers=[observer]))
    try:
        await request(wrapped, Log())
    except ZeroDivisionError:
        pass
    (task,) = added
    assert repr(task) == f"<DeferredTask 'print' SKIPPED ({why}, {named}) added at {task.added_at}>"
    assert events == [(TaskState.SKIPPED, True, True)]
    instead = ", ".join(f'options(when="{other}")' for other in others)
    assert said() == [f"INFO Skipped: {why}, {named}; {rule}; these would have run it: {instead} {ONCE}"]


async def test_a_websocket_that_succeeded(said: Callable[[], list[str]]) -> None:
    """G11: of a websocket, too, the log says why its task was skipped."""
    add: Any = responder(lambda tasks: tasks.options(when="failure").add_task(print), messages=[])
    await DeferredMiddleware(add)({"type": "websocket", "path": "/"}, no_more_messages, Log().send)
    (line,) = said()
    assert f"request 'websocket /': success, when='failure'; {FAILURE}" in line


async def test_once_for_each_line(said: Callable[[], list[str]]) -> None:
    """G11: each line that adds tasks has one INFO line, however many it adds in whatever requests; DEBUG has the rest."""

    def add(tasks: DeferredTasks) -> None:
        for secret in ("hunter1", "hunter2"):
            tasks.add_task(print, secret)
        tasks.add_task(print, "another line")

    wrapped = DeferredMiddleware(responder(add, messages=response(500)))
    async with lifespan(wrapped):
        for _ in range(3):
            await request(wrapped, Log())
            await wrapped.runner.wait_idle()
    lines = said()[1:]  # the application has no lifespan
    first, again, other, *rest = (line.partition(";")[0] for line in lines)
    assert [first, again, other] == [
        f"{level} Skipped: status 500, when='success'" for level in ("INFO", "DEBUG", "INFO")
    ]
    assert rest == [again] * 6
    assert len([line for line in lines if ONCE in line]) == 2
    assert "hunter" not in "".join(lines)


async def test_said_when_somebody_listens(caplog: pytest.LogCaptureFixture) -> None:
    """G11: what nobody was told, as the log's level was higher, is said once the level is INFO."""
    wrapped = DeferredMiddleware(responder(lambda tasks: tasks.add_task(print), messages=response(500)))
    for level in (logging.WARNING, logging.INFO, logging.INFO):
        caplog.set_level(level, "asgi_deferred")
        await request(wrapped, Log())
    assert [(record.name, record.levelname) for record in caplog.records] == [("asgi_deferred", "INFO")]


async def test_fields(caplog: pytest.LogCaptureFixture) -> None:
    """G3: what a line says of a task is in flat fields of its record as well, cut and escaped, with no argument."""
    caplog.set_level(logging.DEBUG, "asgi_deferred")

    async def fails(secret: str) -> None:
        raise ValueError

    def add(tasks: DeferredTasks) -> None:
        tasks.options(name="first\n" + "x" * 1000, when="always").add_task(fails, "hunter2")
        tasks.add_task(fails, "hunter2").cancel()

    wrapped = DeferredMiddleware(responder(add))
    await wrapped(http_scope(path="/\n" + "y" * 60_000), no_more_messages, Log().send)
    said = [
        {name: value for name, value in vars(record).items() if name.startswith("task_")} for record in caplog.records
    ]
    for fields in said:
        assert 0 <= fields.pop("task_queued")
        assert 0 <= fields.pop("task_duration")
    line = add.__code__.co_firstlineno + 1
    name = fails.__qualname__
    assert said == [
        {"task_name": name, "task_state": "CANCELLED", "task_added_at": f"{__file__}:{line + 1}", "task_request": ""},
        {
            "task_name": r"first\n" + "x" * 192 + "...",
            "task_state": "FAILED",
            "task_added_at": f"{__file__}:{line}",
            "task_request": r"GET /\n" + "y" * 192 + "...",
        },
    ]
    assert "hunter" not in repr([vars(record) for record in caplog.records])


class Proxy:
    """A function of another machine: whatever attribute is asked for is found, or cannot be asked for now."""

    def __init__(self, name: object) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> object:
        if attribute == "__qualname__" and self.name is None:
            raise RuntimeError("not connected")
        return self.name

    def __call__(self) -> None:
        raise ValueError


@pytest.mark.parametrize("name", [None, 7, ""])
async def test_a_callable_without_a_name(name: object, caplog: pytest.LogCaptureFixture) -> None:
    """G2, G3: a callable whose name is no text, or cannot be asked for, goes by its type's, and its list goes on."""
    log, runner = Log(), Runner()
    app = responder(lambda tasks: [tasks.add_task(Proxy(name)), tasks.add_task(log.note, "next")])
    async with runner:
        await request(DeferredMiddleware(app, runner), Log())
        await runner.wait_idle()
    assert log == ["next"]
    (line,) = caplog.messages
    assert line.startswith("Failed: deferred task 'Proxy', added at ")
