"""The task list: adding, options, replacing, cancelling, and what is refused at the line that made the mistake."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from asgi_deferred import BacklogFull, DeferredError, DeferredMiddleware, DeferredTasks, Runner, TaskState, defer
from asgi_deferred._functions import is_async

from .support import Log, http_scope, no_more_messages, responder, states, task_list


@pytest.fixture
def tasks() -> DeferredTasks:
    return task_list()


def sync(*args: Any, **kwargs: Any) -> None: ...


async def coroutine_function(*args: Any) -> None: ...


class SyncCallable:
    def __call__(self) -> None: ...

    async def method(self) -> None: ...


class AsyncCallable:
    async def __call__(self) -> None: ...

    def method(self) -> None: ...


def test_add_task_returns_the_task(tasks: DeferredTasks) -> None:
    """A task knows its call, its options, its state and the line that added it."""
    task = tasks.options(when="always", timeout=5, key=("k", 1), name="mail").add_task(sync, 1, when="kwarg")
    line = sys._getframe().f_lineno - 1
    assert (task.func, task.args, task.kwargs) == (sync, (1,), {"when": "kwarg"})
    assert (task.when, task.timeout, task.key, task.name) == ("always", 5, ("k", 1), "mail")
    assert (task.state, task.error) == (TaskState.PENDING, None)
    assert task.added_at == f"{__file__}:{line}"
    assert repr(task) == f"<DeferredTask 'mail' PENDING added at {__file__}:{line}>"


def test_defaults_come_from_the_runner() -> None:
    """What `options` leaves out, the runner decides; `math.inf` is no timeout."""
    tasks = task_list(Runner(when="complete", timeout=7))
    task = tasks.add_task(sync)
    assert (task.when, task.timeout, task.key, task.name) == ("complete", 7, None, "sync")
    assert tasks.options(timeout=math.inf).add_task(sync).timeout is None


def test_sized_iterable_with_a_repr(tasks: DeferredTasks) -> None:
    """A list has a length, iterates over its tasks in the order added, and shows their states."""
    added = [tasks.add_task(sync), tasks.add_task(coroutine_function)]
    assert len(tasks) == 2
    assert list(tasks) == added
    assert added[0].cancel()
    assert repr(tasks) == "<DeferredTasks [sync CANCELLED, coroutine_function PENDING]>"


@pytest.mark.parametrize(
    ("func", "name", "asynchronous"),
    [
        (sync, "sync", False),
        (coroutine_function, "coroutine_function", True),
        (functools.partial(functools.partial(sync, 1), 2), "sync", False),
        (functools.partial(coroutine_function, 1), "coroutine_function", True),
        (SyncCallable(), "SyncCallable", False),
        (AsyncCallable(), "AsyncCallable", True),
        (functools.partial(AsyncCallable()), "AsyncCallable", True),
        (SyncCallable().method, "SyncCallable.method", True),
        (AsyncCallable().method, "AsyncCallable.method", False),
        (SyncCallable, "SyncCallable", False),
        (AsyncCallable, "AsyncCallable", False),
        (lambda: None, "<lambda>", False),
        (print, "print", False),
    ],
)
def test_kinds_of_callables(tasks: DeferredTasks, func: Any, name: str, asynchronous: bool) -> None:
    """Functions, methods, partials, callable objects, classes and lambdas are named and classified rightly."""
    assert tasks.add_task(func).name == name
    assert is_async(func) is asynchronous


def test_a_call_instead_of_a_function(tasks: DeferredTasks) -> None:
    """A coroutine object is refused with the remedy, and Python's own "never awaited" does not follow."""
    with pytest.raises(TypeError, match=r"Got the coroutine coroutine_function\(\.\.\.\).* Pass the function and its"):
        tasks.add_task(coroutine_function(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Got 'NoneType', which cannot be called. Pass the function"):
        tasks.add_task(sync(1))  # type: ignore[func-returns-value, arg-type]
    assert len(tasks) == 0


async def async_when(_: object) -> bool: ...  # type: ignore[empty-body]


def undecorated(_: object) -> Iterator[None]:
    yield  # pragma: no cover - nobody calls it


async def async_undecorated(_: object) -> AsyncIterator[None]:
    yield  # pragma: no cover - as above


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"when": "succes"}, ValueError, "when='succes' is unknown: use one of"),
        ({"when": 1}, ValueError, "when=1 is unknown"),
        ({"timeout": 0}, ValueError, "timeout=0 must be more than 0"),
        ({"timeout": -1.5}, ValueError, "timeout=-1.5 must be more than 0"),
        ({"timeout": math.nan}, ValueError, "timeout=nan must be more than 0"),
        ({"timeout": "5"}, TypeError, "timeout='5' is not a number"),
        ({"timeout": True}, TypeError, "timeout=True is not a number"),
        ({"key": ["a"]}, TypeError, r"key=\['a'\] is not hashable"),
        ({"name": 1}, TypeError, "name=1 is not a string"),
        ({"when": async_when}, TypeError, "is async, and would not be awaited"),
    ],
)
def test_bad_options(tasks: DeferredTasks, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """A bad option is refused by the call that gives it."""
    with pytest.raises(error, match=message):
        tasks.options(**options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_concurrency": 0}, ValueError, "max_concurrency=0 must be more than 0"),
        ({"max_threads": -1}, ValueError, "max_threads=-1 must be more than 0"),
        ({"max_threads": 1.5}, ValueError, "max_threads=1.5 must be a whole number"),
        ({"max_pending": None}, TypeError, "max_pending=None is not a number"),
        ({"drain_timeout": 0}, ValueError, "drain_timeout=0 must be more than 0"),
        ({"timeout": 0}, ValueError, "timeout=0 must be more than 0"),
        ({"overflow": "drop"}, ValueError, "overflow='drop' is unknown: use 'wait' or 'reject'"),
        ({"when": "never"}, ValueError, "when='never' is unknown"),
        ({"when": async_when}, TypeError, "is async, and would not be awaited"),
        ({"observers": [1]}, TypeError, "observers has 1, which cannot be called"),
        ({"observers": [async_when]}, TypeError, "which is async and would not be awaited"),
        ({"around": [1]}, TypeError, "around has 1, which cannot be called"),
        (
            {"unavailable": "busy"},
            TypeError,
            "unavailable='busy' is not an ASGI application: use one, such as a Starlette response",
        ),
        ({"around": [undecorated]}, TypeError, "decorate a generator function with @contextlib.contextmanager"),
        ({"around": [async_undecorated]}, TypeError, "an async one with @contextlib.asynccontextmanager"),
        ({"around": [async_when]}, TypeError, "returns no context manager"),
    ],
)
def test_bad_runner(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """A runner refuses limits and defaults that make no sense when it is made."""
    with pytest.raises(error, match=message):
        Runner(**arguments)


def test_key_replaces() -> None:
    """G2: a later task with an equal key replaces the earlier pending one, which is CANCELLED once."""
    log = Log()
    runner = Runner(observers=[log])
    tasks = task_list(runner)
    for name in ("one", "two", "three"):
        tasks.options(key="k", name=name).add_task(sync)
    tasks.options(key="other", name="four").add_task(sync)
    assert states(tasks) == ["one CANCELLED", "two CANCELLED", "three PENDING", "four PENDING"]
    assert log == ["one CANCELLED", "two CANCELLED"]
    assert runner.statistics()[:3] == (4, 2, 0)


def test_cancel_once() -> None:
    """G2: `cancel` says whether it was this call that ended the task."""
    runner = Runner()
    task = task_list(runner).add_task(sync)
    assert [task.cancel(), task.cancel()] == [True, False]
    assert task.state is TaskState.CANCELLED
    assert runner.statistics() == (1, 0, 0, 0, 0, 0, 0, 1, 0)


def test_reject_at_the_limit() -> None:
    """G7: with overflow="reject" the task too many is refused before it is accepted, and room lets the next one in."""
    runner = Runner(max_pending=2, overflow="reject")
    tasks = task_list(runner)
    first, _ = tasks.add_task(sync), tasks.add_task(sync)
    with pytest.raises(BacklogFull, match="max_pending=2 tasks are unfinished") as caught:
        tasks.add_task(sync)
    assert isinstance(caught.value, DeferredError)
    assert runner.statistics().accepted == 2
    first.cancel()
    assert tasks.add_task(sync).state is TaskState.PENDING


def test_an_early_cancellation_has_no_outcome() -> None:
    """An event of a task that ended before its request did has no outcome, and counts its time as queued."""
    events: list[Any] = []
    tasks = task_list(Runner(observers=[events.append]))
    task = tasks.add_task(sync)
    task.cancel()
    (event,) = events
    assert (event.task, event.state, event.outcome, event.error) == (task, TaskState.CANCELLED, None, None)
    assert event.queued > 0
    assert event.duration == 0


def test_reject_lets_a_replacement_through() -> None:
    """G7: at the limit with `overflow="reject"` a task that replaces a pending one is accepted, as it takes its place."""
    tasks = task_list(Runner(max_pending=2, overflow="reject"))
    tasks.add_task(print)
    tasks.options(key="k", name="old").add_task(print)
    tasks.options(key="k", name="new").add_task(print)
    with pytest.raises(BacklogFull):
        tasks.options(key="other").add_task(print)
    assert states(tasks) == ["print PENDING", "old CANCELLED", "new PENDING"]


def takes_nothing(**_: object) -> None: ...


async def refuses(number: int) -> None: ...


@pytest.mark.anyio
async def test_an_option_among_the_arguments_gets_a_hint(caplog: pytest.LogCaptureFixture) -> None:
    """A call that fails on an option's name says where options are given."""
    add: Any = refuses
    async with Runner():
        defer(add, 1, timeout=5)
        defer(add, 1, other=5)
        defer(takes_nothing, timeout=5)
    texts = [record.getMessage() for record in caplog.records]
    hints = [text.endswith(" (an option is given as options(timeout=...).add_task(...))") for text in texts]
    assert sorted(hints) == [False, True]


@pytest.mark.anyio
async def test_long_names_make_short_lines(caplog: pytest.LogCaptureFixture) -> None:
    """A path of 60 000 characters, and a name as long, make a log line that can be read."""

    def fail() -> None:
        raise ValueError

    runner = Runner()
    app = DeferredMiddleware(responder(lambda tasks: tasks.options(name="n" * 60_000).add_task(fail)), runner)
    async with runner:
        await app(http_scope("/" + "p" * 60_000), no_more_messages, Log().send)
    (record,) = caplog.records
    line = record.getMessage()
    assert len(line) < 1000
    assert "nnn...'" in line
    assert "ppp...'" in line
