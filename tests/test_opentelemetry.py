"""Spans and metrics, read back by OpenTelemetry's own SDK."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

import anyio
import celery
import pytest
import taskiq
from celery.worker.request import Request
from fastapi import BackgroundTasks, FastAPI
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse
from taskiq.middlewares.opentelemetry_middleware import OpenTelemetryMiddleware

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner, defer
from asgi_deferred import fastapi as deferred_fastapi
from asgi_deferred.opentelemetry import instrument

from .clients import async_client
from .support import Log, request, responder

pytestmark = pytest.mark.anyio


class Telemetry:
    """A runner that is instrumented, and what it told."""

    def __init__(self, *, links: bool = False, **options: Any) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")
        self.runner = Runner(**options)
        meters = MeterProvider([self.reader])
        instrument(self.runner, tracer_provider=self.provider, meter_provider=meters, links=links)
        self.request_span: Any = None

    async def serve(self, add: Callable[[DeferredTasks], object]) -> None:
        """Add tasks below a request's span."""

        def traced(tasks: DeferredTasks) -> None:
            with self.tracer.start_as_current_span("request") as self.request_span:
                add(tasks)

        await request(DeferredMiddleware(responder(traced), self.runner), Log())

    def spans(self) -> list[ReadableSpan]:
        """The spans of tasks that have ended."""
        return [span for span in self.exporter.get_finished_spans() if span.name != "request"]

    def tree(self) -> list[str]:
        """Each span as its line of ancestors, sorted."""
        spans = self.exporter.get_finished_spans()
        names = {span.context.span_id: (span.name, span.parent) for span in spans if span.context}

        def line(name: str, parent: trace.SpanContext | None) -> str:
            return f"{line(*names[parent.span_id])} > {name}" if parent else name

        return sorted(line(span.name, span.parent) for span in spans)

    def metrics(self) -> dict[str, list[tuple[dict[str, Any], Any]]]:
        """The points of each metric: their attributes, and a count or a value."""
        data = self.reader.get_metrics_data()
        assert data is not None
        (resource,) = data.resource_metrics
        (scope,) = resource.scope_metrics
        return {
            metric.name: [
                (dict(point.attributes or {}), getattr(point, "count", None) or getattr(point, "value", 0))
                for point in metric.data.data_points
            ]
            for metric in scope.metrics
        }


def as_async(work: Callable[[], Awaitable[None]], block: Callable[[], None]) -> Any:
    async def task() -> None:
        await work()

    return task


def as_sync(work: Callable[[], Awaitable[None]], block: Callable[[], None]) -> Any:
    def task() -> None:
        block()

    return task


def as_sync_awaited(work: Callable[[], Awaitable[None]], block: Callable[[], None]) -> Any:
    def task() -> Awaitable[None]:
        return work()

    return task


def as_engine(work: Callable[[], Awaitable[None]], block: Callable[[], None]) -> Any:
    class Task:
        async def __defer_enqueue__(self) -> None:
            await work()

    return Task()


KINDS = [as_async, as_sync, as_sync_awaited, as_engine]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("state", "options", "error"),
    [
        ("SUCCEEDED", {}, None),
        ("FAILED", {}, "ZeroDivisionError"),
        ("TIMED_OUT", {"timeout": 0.05}, "TaskTimedOut"),
        ("ABANDONED", {}, None),
        ("SKIPPED", {"when": "failure"}, None),
        ("CANCELLED", {}, None),
    ],
)
async def test_every_end(kind: Any, state: str, options: dict[str, Any], error: str | None) -> None:
    """G2: each final state of each kind of task is one count, and one span below the request's if it has started."""
    telemetry = Telemetry(drain_timeout=0.05 if state == "ABANDONED" else 30)
    go, seen = threading.Event(), set[int]()

    async def work() -> None:
        seen.add(trace.get_current_span().get_span_context().span_id)
        if state == "FAILED":
            raise ZeroDivisionError
        if state in ("TIMED_OUT", "ABANDONED"):
            await anyio.sleep_forever()

    def block() -> None:
        seen.add(trace.get_current_span().get_span_context().span_id)
        if state == "FAILED":
            raise ZeroDivisionError
        if state in ("TIMED_OUT", "ABANDONED"):
            go.wait(30)

    def add(tasks: DeferredTasks) -> None:
        task = tasks.options(name="work", **options).add_task(kind(work, block))
        if state == "CANCELLED":
            task.cancel()

    async with telemetry.runner:
        await telemetry.serve(add)
    go.set()
    metrics = telemetry.metrics()
    attributes = {"asgi_deferred.task.name": "work", "asgi_deferred.task.state": state}
    assert metrics["asgi_deferred.tasks.ended"] == [(attributes, 1)]
    assert metrics["asgi_deferred.task.queue.duration"] == [(attributes, 1)]
    if state in ("SKIPPED", "CANCELLED"):
        assert (telemetry.spans(), seen) == ([], set())
        assert "asgi_deferred.task.duration" not in metrics
        return
    assert metrics["asgi_deferred.task.duration"] == [(attributes, 1)]
    (span,) = telemetry.spans()
    assert span.context is not None
    assert span.parent is not None
    assert span.parent.span_id == telemetry.request_span.get_span_context().span_id
    assert (span.name, span.kind) == ("work", SpanKind.INTERNAL)
    assert seen == {span.context.span_id}
    assert span.status.status_code is (StatusCode.UNSET if state == "SUCCEEDED" else StatusCode.ERROR)
    told = dict(span.attributes or {})
    assert 0 <= told.pop("asgi_deferred.task.queued")  # type: ignore[operator]
    assert told.pop("asgi_deferred.task.added_at") == f"{__file__}:{add.__code__.co_firstlineno + 1}"
    called = "Task" if kind is as_engine else "task"
    assert told.pop("code.function.name") == f"{__name__}.{kind.__name__}.<locals>.{called}"
    said = told.pop("error.type", None)
    assert error is None or said == error
    assert told == attributes
    assert [event.name for event in span.events] == ["exception"] * (said is not None)


async def test_links() -> None:
    """G5: with `links` a task has a trace of its own that links to its request's, if that has one."""
    telemetry = Telemetry(links=True)

    async def work() -> None: ...

    async with telemetry.runner:
        await telemetry.serve(lambda tasks: tasks.add_task(work))
        await telemetry.runner.wait_idle()
        await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(work)), telemetry.runner), Log())
    linked, alone = telemetry.spans()
    (link,) = linked.links
    assert link.context == telemetry.request_span.get_span_context()
    assert alone.links == ()
    for span in linked, alone:
        assert (span.parent, span.kind) == (None, SpanKind.CONSUMER)


async def test_an_error_without_a_message() -> None:
    """G2: the span of a task ends also if the task's error cannot say what it is."""
    telemetry = Telemetry()

    class Mute(Exception):
        def __str__(self) -> str:
            raise LookupError

    async def fails() -> None:
        raise Mute

    async with telemetry.runner:
        await telemetry.serve(lambda tasks: tasks.add_task(fails))
    (span,) = telemetry.spans()
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == Mute.__qualname__


async def test_unfinished() -> None:
    """G7: what waits and what runs is observed, and for how long the oldest has waited."""
    telemetry, started, go = Telemetry(), anyio.Event(), anyio.Event()

    async def first() -> None:
        started.set()
        await go.wait()

    async def second() -> None: ...

    def add(tasks: DeferredTasks) -> None:
        tasks.add_task(first)
        tasks.add_task(second)

    async with telemetry.runner:
        await telemetry.serve(add)
        await started.wait()
        metrics = telemetry.metrics()
        assert metrics["asgi_deferred.tasks.unfinished"] == [
            ({"asgi_deferred.task.state": "PENDING"}, 1),
            ({"asgi_deferred.task.state": "RUNNING"}, 1),
        ]
        ((_, oldest),) = metrics["asgi_deferred.tasks.oldest"]
        assert oldest > 0
        go.set()


async def test_histograms_are_of_seconds() -> None:
    """G7: what took milliseconds and what took minutes are in different buckets of a histogram."""
    telemetry = Telemetry()
    async with telemetry.runner:
        await telemetry.serve(lambda tasks: tasks.add_task(print, end=""))
    data: Any = telemetry.reader.get_metrics_data()
    metrics = data.resource_metrics[0].scope_metrics[0].metrics
    histograms = {metric.name: metric.data.data_points for metric in metrics if metric.name.endswith(".duration")}
    assert histograms.keys() == {"asgi_deferred.task.duration", "asgi_deferred.task.queue.duration"}
    for (point,) in histograms.values():
        assert {0.005, 1, 300} <= set(point.explicit_bounds)


async def test_the_log_is_within_the_span() -> None:
    """G3: the line that says a task failed is written in its span, so that a log handler finds the trace."""
    telemetry, seen = Telemetry(), list[trace.SpanContext]()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(trace.get_current_span().get_span_context())

    async def fails() -> None:
        raise ZeroDivisionError

    logger, handler = logging.getLogger("asgi_deferred"), Handler(logging.ERROR)
    logger.addHandler(handler)
    async with telemetry.runner:
        await telemetry.serve(lambda tasks: tasks.add_task(fails))
    logger.removeHandler(handler)
    assert seen == [span.context for span in telemetry.spans()]


@pytest.fixture
def instrumented(monkeypatch: pytest.MonkeyPatch) -> Callable[[FastAPI, Telemetry], None]:
    """OpenTelemetry's own instrumentation of FastAPI, without what it leaves behind in Starlette's classes."""
    deferred_fastapi.DeferredMiddleware(FastAPI())  # replaces in those classes too, once for each process
    monkeypatch.setattr(BackgroundTask, "__call__", BackgroundTask.__call__)
    monkeypatch.setattr(BackgroundTask, "_otel_original_call", None, raising=False)
    monkeypatch.delattr(BackgroundTask, "_otel_original_call")

    def instrument(app: FastAPI, telemetry: Telemetry) -> None:
        FastAPIInstrumentor.instrument_app(app, tracer_provider=telemetry.provider, exclude_spans=["receive", "send"])

    return instrument


def work() -> None: ...


async def async_work() -> None: ...


def signup(app: FastAPI) -> None:
    @app.get("/signup")
    async def endpoint() -> None:
        defer(async_work)
        defer(work)

    @app.get("/sync")
    def sync_endpoint() -> None:
        defer(work)


@pytest.mark.parametrize("links", [False, True])
@pytest.mark.parametrize("place", ["inside", "outside"])
async def test_fastapi_instrumentor(instrumented: Any, place: str, links: bool) -> None:
    """G5: a task's span belongs to the server span of its request, with FastAPIInstrumentor's middleware inside or outside of ours."""
    telemetry, app = Telemetry(links=links), FastAPI()
    signup(app)
    outermost: Any = app
    if place == "inside":
        outermost = DeferredMiddleware(app, telemetry.runner)
    else:
        app.add_middleware(DeferredMiddleware, runner=telemetry.runner)
    instrumented(app, telemetry)
    async with async_client(outermost) as client:
        for path in ("/signup", "/sync"):
            await client.get(path)
            await telemetry.runner.wait_idle()
    spans = telemetry.exporter.get_finished_spans()
    servers = {span.name: span.context for span in spans if span.kind is SpanKind.SERVER}
    tasks = [span for span in spans if span.kind is not SpanKind.SERVER]
    assert len(spans) == 5
    told = [(span.name, span.kind, span.parent, [link.context for link in span.links]) for span in tasks]
    expected = [("async_work", "GET /signup"), ("work", "GET /signup"), ("work", "GET /sync")]
    if links:
        assert told == [(name, SpanKind.CONSUMER, None, [servers[request]]) for name, request in expected]
    else:
        assert told == [(name, SpanKind.INTERNAL, servers[request], []) for name, request in expected]


async def test_background_tasks_of_an_instrumented_fastapi(instrumented: Any) -> None:
    """G3: FastAPI's own background tasks are the runner's also if FastAPIInstrumentor has replaced their call after us."""
    telemetry, app, threads = Telemetry(), FastAPI(), list[str]()

    def remember() -> None:
        threads.append(threading.current_thread().name)

    @app.get("/injected")
    async def endpoint(background_tasks: BackgroundTasks) -> None:
        background_tasks.add_task(remember)
        background_tasks.add_task(async_work)

    @app.get("/returned")
    async def another() -> PlainTextResponse:
        return PlainTextResponse("", background=BackgroundTask(remember))

    wrapped = deferred_fastapi.DeferredMiddleware(app, telemetry.runner)
    instrumented(app, telemetry)
    async with async_client(wrapped) as client:
        await client.get("/injected")
        await client.get("/returned")
    assert telemetry.runner.statistics().succeeded == 3
    assert threads == ["asgi-deferred"] * 2
    assert telemetry.tree() == [
        "GET /injected",
        "GET /injected > async_work",
        f"GET /injected > {remember.__qualname__}",
        "GET /returned",
        "GET /returned > BackgroundTask remember",
        f"GET /returned > BackgroundTask remember > {remember.__qualname__}",
    ]


async def test_background_tasks_of_an_uninstrumented_fastapi(
    instrumented: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G3: FastAPI's own background tasks stay the runner's if FastAPIInstrumentor puts back the call it found before us."""
    telemetry, app = Telemetry(), FastAPI()

    @app.get("/returned")
    async def endpoint() -> PlainTextResponse:
        return PlainTextResponse("", background=BackgroundTask(work))

    wrapped = deferred_fastapi.DeferredMiddleware(app, telemetry.runner)
    ours = BackgroundTask.__call__
    monkeypatch.setattr(BackgroundTask, "__call__", inspect.unwrap(ours))  # as it was before us
    instrumented(app, telemetry)
    FastAPIInstrumentor.uninstrument_app(app)
    assert BackgroundTask.__call__ is not ours
    async with async_client(wrapped) as client:
        await client.get("/returned")
    assert telemetry.runner.statistics().succeeded == 1


celery_app = celery.Celery("jobs", broker="memory://")
celery_app.conf.task_default_queue = "traced"  # the broker is the process's, and other tests have left messages there
celery_job: Any = celery_app.task(name="jobs.work")(work)


def run_next_job() -> None:
    """Do what a worker of Celery does with a message."""
    with celery_app.connection_for_read() as connection:
        message = celery_app.amqp.queues["traced"](connection.default_channel).get(no_ack=True)
        Request(message, app=celery_app).execute()


async def test_celery() -> None:
    """G5: a job that is sent to Celery goes on with the trace of the request, by Celery's own instrumentation alone."""
    telemetry = Telemetry()
    instrumentor = CeleryInstrumentor()  # type: ignore[no-untyped-call]
    instrumentor.instrument(tracer_provider=telemetry.provider)
    try:
        async with telemetry.runner:
            await telemetry.serve(lambda tasks: tasks.add_task(celery_job))
        Context().run(run_next_job)
    finally:
        instrumentor.uninstrument()
    assert telemetry.tree() == [
        "request",
        "request > jobs.work",
        "request > jobs.work > apply_async/jobs.work",
        "request > jobs.work > apply_async/jobs.work > run/jobs.work",
    ]


class Elsewhere(taskiq.InMemoryBroker):
    """Runs a job outside of the context that sends it, as another process does."""

    async def kick(self, message: taskiq.BrokerMessage) -> None:
        await asyncio.get_running_loop().create_task(super().kick(message), context=Context())


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_taskiq() -> None:
    """G5: a job that is sent to taskiq goes on with the trace of the request, by taskiq's own middleware alone."""
    telemetry = Telemetry()
    middleware = OpenTelemetryMiddleware(tracer_provider=telemetry.provider)
    broker = Elsewhere(await_inplace=True).with_middlewares(middleware)
    job = broker.task(task_name="jobs.work")(async_work)
    async with telemetry.runner:
        await telemetry.serve(lambda tasks: tasks.add_task(job))
    await broker.shutdown()
    assert telemetry.tree() == [
        "request",
        "request > jobs.work",
        "request > jobs.work > send/jobs.work",
        "request > jobs.work > send/jobs.work > execute/jobs.work",
    ]
