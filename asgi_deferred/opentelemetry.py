"""OpenTelemetry: a span for each task that runs, and metrics of all tasks. It needs `opentelemetry-api` alone.

1. A span begins in the task's context when the task starts, so it is a child of the request's span, and spans of what
   the task calls are below it. It ends with the task, in whichever thread notices that.
2. A task that never started has no span: it was skipped, cancelled or abandoned while it waited. The metrics count it.
3. Arguments are never recorded. An exception is recorded with its message, as OpenTelemetry's own instrumentations do.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib.metadata import version

from opentelemetry import context, metrics, trace
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, TracerProvider

from ._functions import name_of, unwrap_partial
from ._runner import Runner
from ._states import TaskState
from ._tasks import DeferredTask, TaskEvent

__all__ = ["instrument"]

NAME, STATE = "asgi_deferred.task.name", "asgi_deferred.task.state"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # the SDK's own are for milliseconds


def instrument(
    runner: Runner,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    links: bool = False,
) -> None:
    """Trace and count a runner's tasks. Call it once for each runner, before the application serves.

    A span has the task's name. Its attributes are `asgi_deferred.task.name`, `.state`, `.queued` (seconds) and
    `.added_at`, `code.function.name`, and `error.type` after an error. The metrics are the histograms
    `asgi_deferred.task.duration` and `asgi_deferred.task.queue.duration` (seconds), the counter
    `asgi_deferred.tasks.ended`, and two observed metrics: `asgi_deferred.tasks.unfinished` and
    `asgi_deferred.tasks.oldest` (seconds).

    Args:
        runner: The runner.
        tracer_provider: Where spans go. The default is the global provider.
        meter_provider: Where metrics go. The default is the global provider. Of two runners with one provider, only
            the first is observed, so give each its own.
        links: If true, each task has a trace of its own that links to the request's trace (a CONSUMER span). By
            default its span is a child of the request's span (INTERNAL).

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
    histogram = partial(meter.create_histogram, unit="s", explicit_bucket_boundaries_advisory=SECONDS)
    durations = histogram("asgi_deferred.task.duration", description="How long tasks ran")
    waits = histogram("asgi_deferred.task.queue.duration", description="How long tasks waited after their request")
    ended = meter.create_counter("asgi_deferred.tasks.ended", "{task}", "Tasks that have ended")
    spans: dict[DeferredTask, Span] = {}

    def start(task: DeferredTask, queued: float) -> Span:
        request = trace.get_current_span().get_span_context()
        attributes: dict[str, str | float] = {
            NAME: task.name,
            "asgi_deferred.task.queued": queued,
            "asgi_deferred.task.added_at": task.added_at,
            "code.function.name": f"{getattr(unwrap_partial(task.func), '__module__', None)}.{name_of(task.func)}",
        }
        return tracer.start_span(
            task.name,
            context.Context() if links else None,
            SpanKind.CONSUMER if links else SpanKind.INTERNAL,
            attributes,
            [Link(request)] if links and request.is_valid else None,
        )

    def end(span: Span, state: TaskState, error: BaseException | None) -> None:
        span.set_attribute(STATE, state.name)
        if state is not TaskState.SUCCEEDED:
            span.set_status(StatusCode.ERROR, state.value)
        try:
            if error is not None:
                span.set_attribute("error.type", type(error).__qualname__)
                span.record_exception(error)  # which asks the error for its message, and that may raise
        finally:
            span.end()

    def observe(event: TaskEvent) -> None:
        task, state = event.task, event.state
        if state is TaskState.RUNNING:
            spans[task] = span = start(task, event.queued)
            context.attach(trace.set_span_in_context(span))  # never detached: the task's context ends with it
            return
        attributes = {NAME: task.name, STATE: state.name}
        ended.add(1, attributes)
        waits.record(event.waited, attributes)
        if task in spans:
            durations.record(event.duration, attributes)
            end(spans.pop(task), state, event.error)

    def unfinished(_: CallbackOptions) -> Iterable[Observation]:
        counts = runner.statistics()
        return [Observation(counts.pending, {STATE: "PENDING"}), Observation(counts.running, {STATE: "RUNNING"})]

    def oldest(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(runner.oldest)]

    meter.create_observable_up_down_counter("asgi_deferred.tasks.unfinished", [unfinished], "{task}", "Tasks not ended")
    meter.create_observable_gauge("asgi_deferred.tasks.oldest", [oldest], "s", "How long the oldest task has waited")
    runner.observers = (*runner.observers, observe)
