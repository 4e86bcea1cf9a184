"""What type checkers accept and refuse. It is checked, and never run.

Each refused line carries an ignore comment, and mypy and pyright both report one that has become needless.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, assert_type

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response

from asgi_deferred import (
    Around,
    ASGIApp,
    DeferredMiddleware,
    DeferredTask,
    DeferredTasks,
    EngineTask,
    Observer,
    Outcome,
    Runner,
    Statistics,
    TaskAdder,
    TaskEvent,
    TaskState,
    When,
    current_tasks,
    defer,
    tasks_from,
)
from asgi_deferred.dbos import Store

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from asgiref.typing import ASGI3Application, HTTPScope
    from starlette.requests import HTTPConnection
    from starlette.types import ASGIApp as StarletteASGIApp
    from starlette.types import Scope

P = ParamSpec("P")


def an_asgiref_application_is_wrapped(app: ASGI3Application) -> DeferredMiddleware:
    return DeferredMiddleware(app)


def the_middleware_is_an_asgiref_application(app: DeferredMiddleware) -> ASGI3Application:
    return app


def a_starlette_application_is_wrapped(app: StarletteASGIApp) -> DeferredMiddleware:
    return DeferredMiddleware(app, Runner())


def the_middleware_is_a_starlette_application(app: DeferredMiddleware) -> StarletteASGIApp:
    return app


def frameworks_applications_are_wrapped() -> None:
    DeferredMiddleware(Starlette())
    DeferredMiddleware(FastAPI(), runner=Runner())
    DeferredMiddleware(DeferredMiddleware(FastAPI()))
    GZipMiddleware(DeferredMiddleware(Starlette()))
    DeferredMiddleware(runner=Runner())  # type: ignore[call-arg]
    DeferredMiddleware("app")  # type: ignore[arg-type]
    DeferredMiddleware(FastAPI(), Runner)  # type: ignore[arg-type]


def starlette_adds_the_middleware() -> None:
    app = Starlette(middleware=[Middleware(DeferredMiddleware, runner=Runner())])
    app.add_middleware(DeferredMiddleware)
    app.add_middleware(DeferredMiddleware, runner=Runner())
    app.add_middleware(DeferredMiddleware, Runner())
    app.add_middleware(DeferredMiddleware, runner=1)  # type: ignore[arg-type]
    app.add_middleware(DeferredMiddleware, speed=1)  # type: ignore[call-arg]


def fastapi_adds_the_middleware() -> None:
    app = FastAPI()
    app.add_middleware(DeferredMiddleware)
    app.add_middleware(DeferredMiddleware, runner=Runner())
    app.add_middleware(DeferredMiddleware, runner=1)  # type: ignore[arg-type]


def send(to: str, *, subject: str = "hi") -> None: ...


async def charge(user: int, cents: int) -> bool:
    return user < cents


class Mailer:
    def __call__(self, to: str) -> None: ...

    async def send(self, to: str) -> None: ...


def a_functions_own_parameters_are_checked(tasks: DeferredTasks) -> None:
    assert_type(tasks.add_task(send, "a@b.c"), DeferredTask)
    assert_type(tasks.add_task(send, "a@b.c", subject="x"), DeferredTask)
    assert_type(tasks.add_task(charge, 1, cents=2), DeferredTask)
    assert_type(defer(charge, 1, 2), DeferredTask)
    defer(Mailer(), "a@b.c")
    defer(Mailer().send, to="a@b.c")
    defer(lambda: None)

    tasks.add_task(send)  # type: ignore[arg-type]
    tasks.add_task(send, 1)  # type: ignore[arg-type]
    tasks.add_task(send, "a@b.c", when="always")  # type: ignore[arg-type]
    tasks.add_task(charge(1, 2))  # type: ignore[arg-type]
    tasks.add_task(None)  # type: ignore[arg-type]
    defer(charge, "1", 2)  # type: ignore[arg-type]
    defer(charge, 1, 2, 3)  # type: ignore[arg-type]
    defer(Mailer().send, 1)  # type: ignore[arg-type]


def options_are_checked(tasks: DeferredTasks) -> None:
    adder = tasks.options(when="always", timeout=5, key=("user", 1), name="mail")
    assert_type(adder.add_task(charge, 1, 2), DeferredTask)
    tasks.options(when=lambda outcome: outcome.status == 404).add_task(send, "a@b.c")

    adder.add_task(charge, "1", 2)  # type: ignore[arg-type]
    tasks.options(when="sometimes")  # type: ignore[arg-type]
    tasks.options(timeout="5")  # type: ignore[arg-type]
    tasks.options(retries=3)  # type: ignore[call-arg]
    tasks.options("always")  # type: ignore[call-arg]


def audited(when: When, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> DeferredTask:
    """A helper of a service layer has names for all that it passes on."""
    adder: TaskAdder = current_tasks().options(when=when)
    return adder.add_task(func, *args, **kwargs)


def enqueued(job: EngineTask[[int]]) -> DeferredTask:
    return current_tasks().add_task(job, 1)


def stored(store: Store) -> None:
    job = store.task(charge)
    current_tasks().options(durable=True).add_task(job, 1, cents=2)
    current_tasks().add_task(job, "1", 2)  # type: ignore[arg-type]
    current_tasks().add_task(job, 1)  # type: ignore[arg-type]


def application(app: ASGIApp, observers: list[Observer], around: list[Around]) -> ASGIApp:
    return DeferredMiddleware(app, Runner(observers=observers, around=around))


def helpers_are_checked() -> None:
    assert_type(audited("failure", charge, 1, cents=2), DeferredTask)
    audited(lambda outcome: outcome.complete, charge, 1, 2)
    application(Starlette(), [observe], [span])

    audited("sometimes", charge, 1, 2)  # type: ignore[arg-type]
    audited("failure", charge, "1", 2)  # type: ignore[arg-type]
    enqueued(charge)  # type: ignore[arg-type]
    application(Starlette(), [span, send], [])  # type: ignore[list-item]


def lists_are_found(scope: HTTPScope, starlettes: Scope, connection: HTTPConnection) -> None:
    assert_type(tasks_from(scope), DeferredTasks)
    assert_type(tasks_from(starlettes), DeferredTasks)
    assert_type(tasks_from(connection), DeferredTasks)
    assert_type(current_tasks(), DeferredTasks)


def a_list_is_a_sized_iterable(tasks: DeferredTasks) -> None:
    assert_type(len(tasks), int)
    assert_type(iter(tasks), Iterator[DeferredTask])
    assert_type(tasks.outcome, Outcome | None)


def a_task_has_plain_data(task: DeferredTask) -> None:
    assert_type(task.name, str)
    assert_type(task.args, tuple[Any, ...])
    assert_type(task.kwargs, dict[str, Any])
    assert_type(task.timeout, float | None)
    assert_type(task.state, TaskState)
    assert_type(task.error, BaseException | None)
    assert_type(task.added_at, str)
    assert_type(task.cancel(), bool)


def an_outcome_is_frozen(outcome: Outcome) -> None:
    assert_type(outcome.type, Literal["http", "websocket", "lifespan"])
    assert_type(outcome.status, int | None)
    assert_type(outcome.complete, bool)
    assert_type(outcome.error, BaseException | None)
    assert_type(outcome.success, bool)
    outcome.status = 200  # type: ignore[misc]


def an_event_is_frozen(event: TaskEvent) -> None:
    assert_type(event.task, DeferredTask)
    assert_type(event.state, TaskState)
    assert_type(event.outcome, Outcome | None)
    assert_type(event.queued, float)
    assert_type(event.duration, float)
    assert_type(event.error, BaseException | None)
    event.queued = 0.0  # type: ignore[misc]


def observe(event: TaskEvent) -> None: ...


def span(task: DeferredTask) -> AbstractContextManager[int]:
    raise NotImplementedError(task)


def a_runners_options_are_checked() -> None:
    Runner(
        max_concurrency=1,
        max_threads=1,
        max_pending=1,
        overflow="reject",
        concurrent=True,
        when=lambda outcome: outcome.complete,
        timeout=1,
        drain_timeout=0.5,
        observers=[observe],
        around=[span],
        unavailable=Response(status_code=503),
    )
    Runner(8)  # type: ignore[call-arg]
    Runner(max_threads="8")  # type: ignore[arg-type]
    Runner(overflow="drop")  # type: ignore[arg-type]
    Runner(when="never")  # type: ignore[arg-type]
    Runner(observers=[span, send])  # type: ignore[list-item]
    Runner(around=[observe])  # type: ignore[list-item]
    Runner(unavailable="busy")  # type: ignore[arg-type]


async def a_runner_is_a_context_manager_and_tells_its_counts(runner: Runner) -> None:
    async with runner as entered:
        assert_type(entered, Runner)
    statistics = runner.statistics()
    assert_type(statistics, Statistics)
    assert_type(statistics.accepted, int)
    assert_type(statistics.timed_out, int)
    assert_type(statistics._asdict(), dict[str, Any])
    assert_type(runner.running, list[str])
    assert_type(await runner.wait_idle(), None)
