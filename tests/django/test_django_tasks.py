"""The backend for `django.tasks`."""

from __future__ import annotations

import re
import threading
from asyncio import CancelledError, all_tasks
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from anyio import fail_after, get_cancelled_exc_class, sleep, sleep_forever

import django

from . import dj

if django.VERSION < (6, 0):
    pytest.skip("django.tasks came with Django 6.0", allow_module_level=True)

from asgiref.sync import sync_to_async
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.db import connections
from django.http import HttpResponse
from django.tasks import TaskResult, TaskResultStatus, default_task_backend, task, task_backends
from django.tasks.exceptions import InvalidTask, InvalidTaskBackend, TaskResultDoesNotExist, TaskResultMismatch
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.test import override_settings
from django.utils import timezone

from asgi_deferred import BacklogFull, Runner, TaskEvent, TaskState, TaskTimedOut, current_tasks, defer
from asgi_deferred import DeferredMiddleware as CoreMiddleware
from asgi_deferred import _django_tasks as module
from asgi_deferred import _drains as drains

from .djproject import jobs, views
from .djproject.journal import journal
from .djproject.models import Entry

pytestmark = pytest.mark.anyio

READY, FAILED, SUCCESSFUL = TaskResultStatus.READY, TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture
def signals() -> Iterator[list[str]]:
    """What signals were sent, with the status at that moment; by a receiver that needs a thread."""
    seen: list[str] = []
    names = {task_enqueued: "enqueued", task_started: "started", task_finished: "finished"}

    def receive(signal: Any, sender: type, task_result: TaskResult[..., Any], **_: Any) -> None:
        Entry.objects.exists()
        seen.append(f"{sender.__name__} {names[signal]} {task_result.status}")

    for signal in names:
        signal.connect(receive)
    yield seen
    for signal in names:
        signal.disconnect(receive)


async def in_view(function: Any, runner: Runner | None = None) -> list[str]:
    """Call a function in a sync view; return what happened, in order."""
    views.hooked.append(function)
    return await dj.request(dj.wrapped(runner), "/hook")


async def in_async_view(function: Any, runner: Runner | None = None) -> list[str]:
    views.hooked.append(function)
    return await dj.request(dj.wrapped(runner), "/ahook")


async def test_enqueue(signals: list[str]) -> None:
    """G1: `enqueue` returns at once, and the task runs after the response, with Django's statuses and signals."""
    results: list[TaskResult[..., Any]] = []
    transcript = await in_view(lambda _: results.append(jobs.add.enqueue(1, b=2)))
    (result,) = results
    assert transcript == ["200", "sent", "add 1 2"]
    assert signals == [
        f"DeferredBackend {state}" for state in ("enqueued READY", "started RUNNING", "finished SUCCESSFUL")
    ]
    assert (result.status, result.args, result.kwargs, result.backend) == (READY, [1], {"b": 2}, "default")
    assert result.started_at is result.finished_at is None
    with pytest.raises(ValueError, match="not finished"):
        _ = result.return_value
    result.refresh()
    assert (result.status, result.return_value, result.attempts) == (SUCCESSFUL, 3, 1)
    assert result.enqueued_at <= result.started_at <= result.finished_at  # type: ignore[operator]


async def test_aenqueue(signals: list[str]) -> None:
    """G1: the same with `aenqueue`, an async task and an async view."""

    async def view(_: object) -> None:
        results.append(await jobs.aadd.aenqueue(1, 2))

    results: list[TaskResult[..., Any]] = []
    assert await in_async_view(view) == ["200", "sent", "aadd 1 2 of 0"]
    assert signals == [
        f"DeferredBackend {state}" for state in ("enqueued READY", "started RUNNING", "finished SUCCESSFUL")
    ]
    assert results[0].status == READY
    await results[0].arefresh()
    assert (results[0].status, results[0].return_value) == (SUCCESSFUL, 3)


async def test_added_at() -> None:
    """A log names the line that enqueued, not one of Django's, and the task as Django does."""

    async def view(_: object) -> None:
        jobs.add.enqueue(1, 2)
        await jobs.aadd.aenqueue(1, 2)
        tasks.extend(current_tasks())

    tasks: list[Any] = []
    await in_async_view(view)
    line = view.__code__.co_firstlineno
    assert [task.added_at for task in tasks] == [f"{__file__}:{line + 1}", f"{__file__}:{line + 2}"]
    assert [task.name for task in tasks] == [f"{jobs.__name__}.add", f"{jobs.__name__}.aadd"]


@pytest.mark.parametrize("job", [jobs.attempt, jobs.aattempt])
async def test_takes_context(job: Any) -> None:
    """A task with `takes_context` gets its context first."""
    results: list[TaskResult[..., Any]] = []
    await in_view(lambda _: results.append(job.enqueue("text")))
    result = job.get_result(results[0].id)
    assert result.return_value == ["text", 1, result.id]
    with pytest.raises(TaskResultMismatch):
        jobs.add.get_result(results[0].id)


@pytest.mark.parametrize("job", [jobs.fail, jobs.afail])
async def test_failed(job: Any, signals: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """G3: the error of a task is in its result with its traceback, and the next task runs."""
    results: list[TaskResult[..., Any]] = []
    statistics: list[Any] = []
    runner = Runner(observers=[lambda _: statistics.append(runner.statistics())])
    transcript = await in_view(lambda _: results.extend([job.enqueue(), jobs.add.enqueue(1, 2)]), runner)
    assert transcript == ["200", "sent", "add 1 2"]
    result = job.get_result(results[0].id)
    assert (result.status, result.errors[0].exception_class) == (FAILED, LookupError)
    assert "as told" in result.errors[0].traceback
    assert [line.removeprefix("DeferredBackend ") for line in signals] == [
        *["enqueued READY"] * 2,
        *["started RUNNING", "finished FAILED"],
        *["started RUNNING", "finished SUCCESSFUL"],
    ]
    assert (runner.statistics().failed, runner.statistics().succeeded) == (1, 1)
    assert logged_errors(caplog) == [("asgi_deferred", f"Failed {job.module_path}", LookupError)]


def logged_errors(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, type | None]]:
    """All ERROR records, of whatever logger: its name, what happened to which task, the exception."""
    found: list[tuple[str, str, type | None]] = []
    ours = re.compile(rf"(.+?)(?: after .+)?: deferred task '(.+)', added at {re.escape(__file__)}:\d+")
    for record in [record for record in caplog.records if record.levelname == "ERROR"]:
        message = record.getMessage()
        if match := ours.match(message):
            message = " ".join(match.groups())
        elif match := re.match(r"Task id=\w+ (path=\S+ state=FAILED)$", message):
            message = match[1]
        found.append((record.name, message, record.exc_info[0] if record.exc_info else None))
    return found


async def test_return_value_not_json(caplog: pytest.LogCaptureFixture) -> None:
    """A return value that JSON does not have fails the task, as with Django's own backends, with one ERROR."""
    results: list[TaskResult[..., Any]] = []
    await in_view(lambda _: results.append(jobs.odd_result.enqueue()))
    results[0].refresh()
    assert (results[0].status, results[0].errors[0].exception_class) == (FAILED, TypeError)
    assert logged_errors(caplog) == [("asgi_deferred", f"Failed {jobs.odd_result.module_path}", TypeError)]


async def test_one_error_where_around_fails(signals: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """G3: a task that an `around` kept from running has one ERROR, and its receivers hear of it."""

    def broken(_: object) -> Any:
        raise KeyError

    runner = Runner(around=[broken])
    await in_view(lambda _: jobs.add.enqueue(1, 2), runner)
    await until(lambda: len(signals) == 2)  # a thread may be sending it
    assert signals == ["DeferredBackend enqueued READY", "DeferredBackend finished FAILED"]
    assert logged_errors(caplog) == [("asgi_deferred", f"Failed {jobs.add.module_path}", KeyError)]


@task
def nested() -> None:
    jobs.fail.using(backend="immediate").enqueue()
    raise ZeroDivisionError


@override_settings(
    TASKS={
        "default": {"BACKEND": "asgi_deferred.django.DeferredBackend"},
        "immediate": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
    }
)
async def test_what_a_failing_task_runs_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """The one ERROR for a task hides no other's: one of another backend, run inside of it, has Django's own."""

    def fail(_: object) -> None:
        nested.enqueue()

    await in_view(fail)
    assert logged_errors(caplog) == [
        ("django.tasks", f"path={jobs.fail.module_path} state=FAILED", LookupError),
        ("asgi_deferred", f"Failed {nested.module_path}", ZeroDivisionError),
    ]


def test_one_error_outside_a_request(caplog: pytest.LogCaptureFixture) -> None:
    """Outside a request a task is none of the runner's, so the one ERROR for its failure is Django's own."""
    jobs.fail.enqueue()
    assert logged_errors(caplog) == [("django.tasks", f"path={jobs.fail.module_path} state=FAILED", LookupError)]


async def test_error_in_receiver() -> None:
    """G2: an error of a receiver of `task_started` fails the task, and its result with it."""

    def receive(**_: object) -> None:
        raise LookupError

    results: list[TaskResult[..., Any]] = []
    task_started.connect(receive)
    try:
        assert await in_view(lambda _: results.append(jobs.add.enqueue(1, 2))) == ["200", "sent"]
    finally:
        task_started.disconnect(receive)
    results[0].refresh()
    assert results[0].status == FAILED


async def test_priorities() -> None:
    """Of one list a task of higher priority runs first, equal ones in their order; other deferred work keeps its place."""

    def view(_: object) -> None:
        defer(journal.append, "first")
        jobs.add.enqueue(0, 1)
        jobs.add.using(priority=-5).enqueue(-5, 1)
        defer(journal.append, "middle")
        jobs.add.using(priority=10).enqueue(10, 1)
        jobs.aadd.using(priority=10).enqueue(10, 2)
        jobs.add.enqueue(0, 2)

    ordered = ["first", "add 10 1", "aadd 10 2 of 0", "add 0 1", "add 0 2", "add -5 1", "middle"]
    assert await in_view(view) == ["200", "sent", *ordered]


async def test_nested() -> None:
    """G11: a task enqueued by a running one runs after it, whatever its priority."""
    assert await in_view(lambda _: jobs.nested.enqueue()) == ["200", "sent", "nested", "add 1 1"]


@pytest.mark.parametrize("status", [200, 404, 500])
async def test_when(status: int) -> None:
    """An enqueued task runs whatever the response, unless the backend's `when` says otherwise: then it is FAILED."""

    def view(_: object) -> HttpResponse:
        results.extend([jobs.add.enqueue(1, 2), jobs.careful.enqueue(3)])
        return HttpResponse(status=status)

    results: list[TaskResult[..., Any]] = []
    ran = ["add 1 2", "careful 3"] if status == 200 else ["add 1 2"]
    assert await in_view(view) == [str(status), "sent", *ran]
    for result in results:
        result.refresh()
    assert [result.status for result in results] == [SUCCESSFUL, SUCCESSFUL if status == 200 else FAILED]
    assert [error.traceback for error in results[1].errors] == (
        [] if status == 200 else ["asgi_deferred._exceptions.DeferredError: Skipped before it started\n"]
    )


async def test_cancelled(signals: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """G2: a task that was cancelled before it ran is FAILED, and says so by its signal; the one ERROR is Django's own."""

    def view(_: object) -> None:
        results.append(jobs.add.enqueue(1, 2))
        assert next(iter(current_tasks())).cancel()

    results: list[TaskResult[..., Any]] = []
    assert await in_view(view) == ["200", "sent"]
    results[0].refresh()
    assert results[0].status == FAILED
    assert signals == ["DeferredBackend enqueued READY", "DeferredBackend finished FAILED"]
    assert logged_errors(caplog) == [("django.tasks", f"path={jobs.add.module_path} state=FAILED", None)]


async def test_abandoned(signals: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """G8: a task that hangs at shutdown, and one that waits for it, are FAILED, each with one ERROR beside the drain's."""
    runner = Runner(drain_timeout=0.2)
    app = dj.wrapped(runner)
    results: list[TaskResult[..., Any]] = []
    views.hooked.append(lambda _: results.extend([jobs.hang.enqueue(), jobs.add.enqueue(1, 2)]))
    with fail_after(30):
        async with dj.lifespan(app):
            assert (await dj.request(app, "/hook"))[:2] == ["200", "sent"]
    for result in results:
        result.refresh()
    assert [result.status for result in results] == [FAILED, FAILED]
    assert journal == ["200", "sent", "hangs"]
    assert runner.statistics().abandoned == 2
    await until(lambda: signals.count("DeferredBackend finished FAILED") == 2)  # a thread may be sending it
    hang, add = jobs.hang.module_path, jobs.add.module_path
    line = f"drain_timeout=0.2 s is over; abandoning deferred tasks: {hang!r} (1), {add!r} (1)"
    assert sorted(logged_errors(caplog), key=lambda error: error[1]) == [
        ("asgi_deferred", f"Abandoned at shutdown {add}", None),
        ("asgi_deferred", f"Abandoned at shutdown {hang}", CancelledError),
        ("asgi_deferred", line, None),
    ]


def after_enqueued(signals: list[str]) -> list[str]:
    """Leave out what an `aenqueue()` outside of a request sends while its task may run already."""
    return [signal for signal in signals if "enqueued" not in signal]


async def until(met: Callable[[], bool]) -> None:
    with fail_after(30):
        while not met():
            await sleep(0.001)


released = threading.Event()


@task
def outlives(error: bool) -> int:
    released.wait(30)
    return 1 // (not error)


@pytest.mark.parametrize("error", [False, True])
async def test_timed_out(error: bool) -> None:
    """G2: a task whose thread goes on after its timeout ends once, FAILED."""
    seen: list[TaskState] = []

    def observe(event: TaskEvent) -> None:
        seen.append(event.state)

    released.clear()
    runner = Runner(timeout=0.05, observers=[observe])
    dj.wrapped(runner)
    finished: list[TaskResult[..., Any]] = []

    def receive(task_result: TaskResult[..., Any], **_: object) -> None:
        finished.append(task_result)

    task_finished.connect(receive)
    try:
        async with runner:
            result = outlives.enqueue(error)
            await until(lambda: bool(finished))
            released.set()
            await until(lambda: runner._scheduler.account.threads == runner.max_threads)
    finally:
        task_finished.disconnect(receive)
    result.refresh()
    assert (result.status, result.errors[0].exception_class.__name__) == (FAILED, "TaskTimedOut")
    assert [one.id for one in finished] == [result.id]
    assert seen == [TaskState.RUNNING, TaskState.TIMED_OUT]


@task
async def hangs_async() -> None:
    await sleep_forever()


@task
def never_starts() -> None:
    raise AssertionError  # pragma: no cover


@pytest.mark.parametrize("kind", ["sync", "async", "around"])
async def test_timed_out_finishes_once(kind: str, signals: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """G2: a task that times out, also while a slow `around` is entered, has one `task_finished`, to all receivers, and one ERROR."""

    @contextmanager
    def slow(_: object) -> Iterator[None]:
        released.wait(30)
        yield

    released.clear()
    runner = Runner(timeout=0.3, around=[slow] if kind == "around" else [])
    dj.wrapped(runner)
    async with runner:
        job: Any = {"sync": outlives, "async": hangs_async, "around": never_starts}[kind]
        result = await job.aenqueue(*([False] if kind == "sync" else []))
        await runner.wait_idle()
        released.set()
        await until(lambda: runner._scheduler.account.threads == runner.max_threads)
    result.refresh()
    assert result.status == FAILED
    started = [] if kind == "around" else ["DeferredBackend started RUNNING"]
    await until(lambda: len(signals) == 2 + len(started))  # a thread may be sending it
    assert after_enqueued(signals) == [*started, "DeferredBackend finished FAILED"]
    assert runner.statistics().timed_out == 1
    assert logged_errors(caplog) == [("asgi_deferred", f"Timed out {job.module_path}", TaskTimedOut)]


async def test_timed_out_just_before_it_starts(signals: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """G2: a task whose time is over between its `around` and its function does not start, and finishes once."""
    runner = Runner(timeout=0.05)
    dj.wrapped(runner)
    now = timezone.now

    def late() -> Any:
        if threading.current_thread().name == "asgi-deferred":
            while "DeferredBackend finished FAILED" not in signals:
                threading.Event().wait(0.001)
        return now()

    monkeypatch.setattr(timezone, "now", late)
    async with runner:
        await never_starts.aenqueue()
        await runner.wait_idle()
        await until(lambda: len(signals) == 2)
        await until(lambda: runner._scheduler.account.threads == runner.max_threads)
    assert after_enqueued(signals) == ["DeferredBackend finished FAILED"]


@task
async def swallows(error: bool) -> int:
    with suppress(get_cancelled_exc_class()):
        await sleep_forever()
    while not released.is_set():
        await sleep(0.001)
    return 1 // (not error)


@pytest.mark.parametrize("error", [False, True])
async def test_ends_after_it_was_given_up(error: bool, signals: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """G2: an async task that swallows its cancellation at shutdown is FAILED then, and not once more when it ends."""
    monkeypatch.setattr(drains, "GRACE", 0.05)
    released.clear()
    runner = Runner(drain_timeout=0.05)
    dj.wrapped(runner)
    async with runner:
        await swallows.aenqueue(error)
    await until(lambda: len(signals) == 3)
    released.set()
    await until(lambda: not any(task.get_name() == swallows.module_path for task in all_tasks()))
    assert after_enqueued(signals) == ["DeferredBackend started RUNNING", "DeferredBackend finished FAILED"]


@pytest.mark.parametrize("name", ["default", "careful"])
async def test_outside_a_request(name: str, signals: list[str]) -> None:
    """Outside a request a task runs at once, as with Django's immediate backend, and its result can be read."""
    journal.clear()
    result = await sync_to_async(jobs.add.using(backend=name).enqueue)(1, 2)
    assert (result.status, result.return_value, journal) == (SUCCESSFUL, 3, ["add 1 2"])
    assert signals == [
        f"DeferredBackend {state}" for state in ("enqueued READY", "started RUNNING", "finished SUCCESSFUL")
    ]
    assert (await jobs.add.using(backend=name).aget_result(result.id)).return_value == 3
    aresult: TaskResult[..., Any] = await jobs.aadd.using(backend=name).aenqueue(1, 2)
    assert (aresult.status, aresult.return_value, journal) == (SUCCESSFUL, 3, ["add 1 2", "aadd 1 2 of 0"])


async def test_middleware_missing() -> None:
    """Enqueueing in a request of an application that is not wrapped is refused, and says what to do."""

    def view(_: object) -> None:
        with pytest.raises(
            ImproperlyConfigured, match=r"not wrapped.*DeferredMiddleware\(get_asgi_application"
        ) as caught:
            jobs.add.enqueue(1, 2)
        errors.append(caught.value)

    errors: list[Exception] = []
    views.hooked.append(view)
    assert await dj.request(ASGIHandler(), "/hook") == ["200", "sent"]
    assert len(errors) == 1


async def test_backlog_full() -> None:
    """G7: a task that the runner rejects was not enqueued, and leaves nothing behind."""

    def view(_: object) -> None:
        jobs.add.enqueue(1, 2)
        with pytest.raises(BacklogFull):
            jobs.add.enqueue(3, 4)
        live.append(len(module._results["default"].live))

    live: list[int] = []
    before = len(module._results["default"].live)
    assert await in_view(view, Runner(max_pending=1, overflow="reject")) == ["200", "sent", "add 1 2"]
    assert live == [before + 1]


class Thing:
    def method(self) -> None: ...


def make_local() -> Any:
    def local() -> None: ...

    return local


@pytest.mark.parametrize(
    ("func", "name"),
    [(lambda: None, "<lambda>"), (make_local(), "local"), (Thing().method, "Thing.method"), (Thing(), "Thing")],
)
def test_no_module_level_function(func: Any, name: str) -> None:
    """A task that is no function of a module is refused where it is decorated, and the error says what to do."""
    with pytest.raises(InvalidTask, match=rf"{name} is not a function at a module's top level.*Move it"):
        task(func)


def test_run_after() -> None:
    """`run_after` is refused: nothing here outlives the process."""
    with pytest.raises(InvalidTask, match=r"jobs\.add has run_after.*stores its tasks"):
        jobs.add.using(run_after=timezone.now())


def test_djangos_own_rules() -> None:
    """Django's own rules for tasks hold: queue names, priorities, the argument named context."""
    with pytest.raises(InvalidTask, match="Queue 'other' is not valid"):
        jobs.add.using(queue_name="other")
    with pytest.raises(InvalidTask, match="priority must be a whole number"):
        jobs.add.using(priority=101)
    with pytest.raises(InvalidTask, match="first argument of 'context'"):
        task(takes_context=True)(make_local)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", [object(), {1, 2}, b"\xff"])
async def test_argument_not_json(argument: object) -> None:
    """An argument that JSON does not have is refused with Django's own error, in a request and outside."""

    def enqueue(_: object) -> None:
        with pytest.raises((TypeError, ValueError), match=r"jobs\.add cannot be put into JSON: Unsupp.*primary key"):
            jobs.add.enqueue(1, b=argument)  # type: ignore[arg-type]
        refused.append(True)

    refused: list[bool] = []
    enqueue(None)
    await in_view(enqueue)
    assert refused == [True, True]


async def test_results_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of finished tasks go by number and by time; asking for one that is gone says how long they stay."""
    now = [1000.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    results = [await jobs.careful.aenqueue(number) for number in range(3)]
    with pytest.raises(TaskResultDoesNotExist, match=r"keeps its result for 60 s, and keeps the last 2 results"):
        jobs.careful.get_result(results[0].id)
    assert [jobs.careful.get_result(result.id).return_value for result in results[1:]] == [1, 2]
    now[0] += 60
    with pytest.raises(TaskResultDoesNotExist):
        await jobs.careful.aget_result(results[2].id)
    assert len(module._results["careful"].finished) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": "never"}, "when='never' is unknown"),
        ({"result_ttl": 0}, "result_ttl=0 must be more than 0"),
        ({"max_results": "many"}, "max_results='many' is not a number"),
        ({"ttl": 5}, r"\['ttl'\] unknown: there are 'when', 'result_ttl' and 'max_results'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    """An option that is unknown or out of its range is an invalid backend, by Django's own exception."""
    with (
        override_settings(TASKS={"default": {"BACKEND": "asgi_deferred.django.DeferredBackend", "OPTIONS": options}}),
        pytest.raises(InvalidTaskBackend, match=rf"TASKS\['default'\]\['OPTIONS'\] is not valid: {message}"),
    ):
        _ = task_backends["default"]


def test_what_it_supports() -> None:
    """The backend says of itself what holds."""
    backend = default_task_backend
    assert backend.supports_async_task
    assert backend.supports_get_result
    assert backend.supports_priority
    assert not backend.supports_defer


def decorated(app: Any) -> Any:
    async def wrapper(scope: Any, receive: Any, send: Any) -> None: ...

    wrapper.__wrapped__ = app  # type: ignore[attr-defined]
    return wrapper


class Router:
    def __init__(self, app: Any) -> None:
        self.application_mapping = {"http": app}

    def __call__(self) -> None: ...


handler = ASGIHandler()
applications = {
    "ours": dj.wrapped(app=handler),
    "routed": Router(decorated(dj.wrapped(app=handler))),
    "bare": handler,
    "core": CoreMiddleware(handler),
}
ours, routed, bare, core = applications.values()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tests.django.test_django_tasks.ours", []),
        ("tests.django.test_django_tasks.routed", []),
        ("tests.django.test_django_tasks.bare", ["asgi_deferred.W002"]),
        ("tests.django.test_django_tasks.core", ["asgi_deferred.W002"]),
        ("tests.django.test_django_tasks.absent", ["asgi_deferred.W001"]),
        ("absent", ["asgi_deferred.W001"]),
        ("no.such.module", ["asgi_deferred.W001"]),
        (None, []),
    ],
)
@override_settings(TASKS={"default": {"BACKEND": "asgi_deferred.django.DeferredBackend"}})
def test_check_application(path: str | None, expected: list[str]) -> None:
    """Django's system check warns where the application is missing or not wrapped; it looks beside the URLs first."""
    with override_settings(**({} if path is None else {"ASGI_APPLICATION": path})):
        messages = run_checks()
    assert [message.id for message in messages] == expected
    assert all("DeferredMiddleware(get_asgi_application())" in str(message.hint) for message in messages)


@pytest.mark.parametrize(
    ("database", "expected"),
    [
        ({"CONN_MAX_AGE": 60}, ["asgi_deferred.W003"]),
        ({"CONN_MAX_AGE": None}, ["asgi_deferred.W003"]),
        ({"NAME": ":memory:"}, ["asgi_deferred.W004"]),
        ({"NAME": Path("file")}, []),
    ],
)
@override_settings(TASKS={"default": {"BACKEND": "asgi_deferred.django.DeferredBackend"}})
def test_check_databases(database: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Django's system check warns of connections that outlive their thread and of a database that threads do not share."""
    for key, value in database.items():
        monkeypatch.setitem(connections.settings["default"], key, value)
    assert [message.id for message in run_checks()] == expected
