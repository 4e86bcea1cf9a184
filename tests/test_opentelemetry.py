"""Spans and metrics, read back by OpenTelemetry's own SDK."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner
from asgi_deferred.opentelemetry import instrument

from .support import Log, request, responder

pytestmark = pytest.mark.anyio


class Telemetry:
    """A runner that is instrumented, and what it told."""

    def __init__(self, *, links: bool = False, **options: Any) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")
        self.runner = Runner(**options)
        meters = MeterProvider([self.reader])
        instrument(self.runner, tracer_provider=provider, meter_provider=meters, links=links)
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
    name = f"{kind.__name__}.<locals>." + ("Task" if kind is as_engine else "task")
    assert told.pop("asgi_deferred.task.added_at") == f"{__file__}:{add.__code__.co_firstlineno + 1}"
    said = told.pop("error.type", None)
    assert error is None or said == error
    assert told == {**attributes, "code.function.name": name}
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
