"""What `asgi_deferred.opentelemetry` costs: a task without it, with the API package alone, and with the SDK."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from asgi_deferred import DeferredMiddleware, Runner
from asgi_deferred.opentelemetry import instrument

from ._report import Comparison, Result
from .requests import IN_PROCESS, Ended, deferring, interleave, method, started, to_its_end


class Nowhere(SpanExporter):
    """Takes what an exporter is given, and sends none of it."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


async def _telemetry(rounds: int) -> dict[str, list[float]]:
    ended = Ended()
    app = deferring(ended)
    spans, metrics = TracerProvider(), MeterProvider([InMemoryMetricReader()])
    spans.add_span_processor(BatchSpanProcessor(Nowhere()))
    runners = {"without": Runner(), "API alone": Runner(), "spans and metrics": Runner()}
    instrument(runners["API alone"])
    instrument(runners["spans and metrics"], tracer_provider=spans, meter_provider=metrics)
    try:
        async with started({name: DeferredMiddleware(app, runner) for name, runner in runners.items()}) as apps:
            contenders = {name: to_its_end(app, ended) for name, app in apps.items()}
            return await interleave(contenders, rounds, 50, "telemetry")
    finally:
        spans.shutdown()
        metrics.shutdown()


def telemetry(factor: float) -> Result:
    rounds = round(300 * factor)
    return Result(
        "telemetry",
        "A request with one async no-op task, with OpenTelemetry and without",
        IN_PROCESS,
        f"{method(rounds, 50)}; spans are batched and go nowhere, metrics are kept in memory",
        anyio.run(_telemetry, rounds),
        [Comparison("API alone", "without"), Comparison("spans and metrics", "without")],
    )
