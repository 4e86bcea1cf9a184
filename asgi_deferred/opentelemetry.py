"""OpenTelemetry: a span for each task that runs, and metrics of all. It needs `opentelemetry-api` alone.

1. A span begins in the task's context when the task starts, so that it is the child of the request's span, and what the
   task calls is below it. It ends with the task, in whichever thread that is noticed.
2. A task that never started, as it was skipped, cancelled or abandoned while it waited, has no span. It is counted.
3. Nothing is recorded of arguments. An exception is recorded with its message, as OpenTelemetry's own parts do.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from opentelemetry import context, metrics, trace
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, TracerProvider

from ._functions import name_of
from ._runner import Runner
from ._states import TaskState
from ._tasks import DeferredTask, TaskEvent

__all__ = ["instrument"]


def instrument(
    runner: Runner,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    links: bool = False,
) -> None:
    """Trace and count a runner's tasks. Call it once for each runner, before the application serves.

    A span has the task's name and, as attributes, `asgi_deferred.task.name`, `.state`, `.queued` (seconds) and
    `.added_at`, `code.function.name` and, after an error, `error.type`. Metrics are the histograms
    `asgi_deferred.task.duration` and `asgi_deferred.task.queue.duration` (in seconds, the latter from the end of the
    request), the counter `asgi_deferred.tasks.ended`, and `asgi_deferred.tasks.unfinished` and
    `asgi_deferred.tasks.oldest`, which are observed.

    Args:
        runner: The runner.
        tracer_provider: Where spans go; the global one if left out.
        meter_provider: Where metrics go; the global one if left out.
        links: Give each task a trace of its own that links to the request's (a CONSUMER span), instead of a child of
            the request's span (INTERNAL).

    Example:
        ```python
        runner = Runner()
        instrument(runner)
        app = DeferredMiddleware(app, runner)
        ```
    """
    release = version("asgi-deferred")
    tracer = trace.get_tracer("asgi_deferred", release, tracer_provider)
    meter = metrics.get_meter("asgi_deferred", release, meter_provider)
    durations = meter.create_histogram("asgi_deferred.task.duration", "s", "How long tasks ran")
    waits = meter.create_histogram(
        "asgi_deferred.task.queue.duration", "s", "How long tasks waited for their start, from the end of the request"
    )
    ended = meter.create_counter("asgi_deferred.tasks.ended", "{task}", "Tasks that have ended")
    spans: dict[DeferredTask, Span] = {}

    def start(event: TaskEvent) -> None:
        attributes: dict[str, Any] = {
            "asgi_deferred.task.name": event.task.name,
            "asgi_deferred.task.queued": event.queued,
            "asgi_deferred.task.added_at": event.task.added_at,
            "code.function.name": name_of(event.task.func),
        }
        if links:
            request = trace.get_current_span().get_span_context()
            link = [Link(request)] if request.is_valid else []
            span = tracer.start_span(
                event.task.name, context.Context(), SpanKind.CONSUMER, attributes=attributes, links=link
            )
        else:
            span = tracer.start_span(event.task.name, attributes=attributes)
        spans[event.task] = span
        context.attach(trace.set_span_in_context(span))  # never detached: the task's context ends with it

    def end(event: TaskEvent, span: Span) -> None:
        span.set_attribute("asgi_deferred.task.state", event.state.name)
        if event.error is not None:
            span.record_exception(event.error)
            span.set_attribute("error.type", type(event.error).__qualname__)
        if event.state is not TaskState.SUCCEEDED:
            span.set_status(StatusCode.ERROR, event.state.value)
        span.end()

    def observe(event: TaskEvent) -> None:
        if event.state is TaskState.RUNNING:
            start(event)
            return
        attributes = {"asgi_deferred.task.name": event.task.name, "asgi_deferred.task.state": event.state.name}
        ended.add(1, attributes)
        waits.record(event.waited, attributes)
        if (span := spans.pop(event.task, None)) is not None:
            durations.record(event.duration, attributes)
            end(event, span)

    def unfinished(_: CallbackOptions) -> Iterable[Observation]:
        counts = runner.statistics()
        yield Observation(counts.pending, {"asgi_deferred.task.state": "PENDING"})
        yield Observation(counts.running, {"asgi_deferred.task.state": "RUNNING"})

    def oldest(_: CallbackOptions) -> Iterable[Observation]:
        yield Observation(runner.oldest)

    meter.create_observable_gauge("asgi_deferred.tasks.unfinished", [unfinished], "{task}", "Tasks that have not ended")
    meter.create_observable_gauge(
        "asgi_deferred.tasks.oldest", [oldest], "s", "How long the longest-waiting task could have started"
    )
    runner.observers = (*runner.observers, observe)
