"""FastAPI, traced by OpenTelemetry's own instrumentation; each span that ends is a line of the file `TRANSCRIPT`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse

from asgi_deferred import Runner
from asgi_deferred.fastapi import Deferred, DeferredMiddleware
from asgi_deferred.opentelemetry import instrument

runner = Runner()
app = FastAPI()


def welcome() -> None: ...


def audit() -> None: ...


@app.get("/signup")
async def signup(deferred: Deferred) -> PlainTextResponse:
    deferred.add_task(welcome)
    return PlainTextResponse("ok", background=BackgroundTask(audit))


def line(span: ReadableSpan) -> str:
    assert span.context
    assert span.parent
    parent, trace_id, span_id = span.parent.span_id, span.context.trace_id, span.context.span_id
    return f"- {trace_id:032x} {span_id:016x} {parent:016x} {span.name}\n"


def trace_all() -> None:
    provider = TracerProvider()
    out = Path(os.environ["TRANSCRIPT"]).open("a", encoding="utf-8")
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=out, formatter=line)))
    trace.set_tracer_provider(provider)
    instrument(runner)


def outside() -> Any:
    """FastAPIInstrumentor's middleware around ours, which is made after it: with the first message of the server."""
    trace_all()
    app.add_middleware(DeferredMiddleware, runner=runner)
    FastAPIInstrumentor.instrument_app(app, exclude_spans=["receive", "send"])
    return app


def inside() -> Any:
    """FastAPIInstrumentor's middleware inside ours, and made after it."""
    trace_all()
    wrapped = DeferredMiddleware(app, runner)
    FastAPIInstrumentor.instrument_app(app, exclude_spans=["receive", "send"])
    return wrapped
