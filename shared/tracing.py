"""OpenTelemetry traces, sent by OTLP/HTTP to `DARKROOM_OTLP_URL`; nothing, at no cost, without it.

The chain is in the messages: `traceparent` of an envelope names the span that sent it, and so does
the envelope's row in an outbox. Whoever handles a message goes on from there, so one trace leads
from the HTTP request through every service to a worker and back, whatever died in between.

OpenTelemetry is imported only where it is wanted. Its own `OTEL_…` variables (samplers, headers)
work.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

Kind = Literal["internal", "server", "client", "producer", "consumer"]

EXPORT_SECONDS = 3.0
"""A collector that does not answer within this time does not hold up a process that ends."""

_provider: Any = None
_tracer: Any = None
_nothing: AbstractContextManager[None] = nullcontext()


def configure(process: str, otlp_url: str, **resource: str) -> None:
    """Once, at start. `resource`: what is true of all spans of this process."""
    global _provider, _tracer
    if not otlp_url:
        return
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    attributes = {"service.namespace": "darkroom", "service.name": process, **resource}
    _provider = TracerProvider(resource=Resource.create(attributes))
    exporter = OTLPSpanExporter(f"{otlp_url.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
    _provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    trace.set_tracer_provider(_provider)
    _tracer = _provider.get_tracer("darkroom")


def enabled() -> bool:
    return _tracer is not None


def close() -> None:
    """Sends what has not been sent. Blocks for a moment."""
    if _provider is not None:
        _provider.shutdown()


def span(
    name: str,
    *,
    kind: Kind = "internal",
    parent: str | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> AbstractContextManager[Any]:
    """Around a piece of work: a child of the current span, or of the one that the traceparent
    `parent` names. An exception is recorded and goes on."""
    if _tracer is None:
        return _nothing
    started: AbstractContextManager[Any] = _tracer.start_as_current_span(
        name, context=_context(parent), kind=_kind(kind), attributes=_said(attributes)
    )
    return started


def name_span(name: str) -> None:
    """Gives the current span another name."""
    if _tracer is not None:
        from opentelemetry import trace

        trace.get_current_span().update_name(name)


def record(
    name: str,
    *,
    began: float,
    ended: float,
    kind: Kind = "internal",
    parent: str | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """A span of the past. `began`, `ended`: seconds since the epoch."""
    if _tracer is None:
        return
    past = _tracer.start_span(
        name,
        context=_context(parent),
        kind=_kind(kind),
        start_time=int(began * 1e9),
        attributes=_said(attributes),
    )
    past.end(end_time=int(ended * 1e9))


def record_stages(seconds: Mapping[str, float]) -> None:
    """One span for each stage, one after the other, the last of which has just ended: a stopwatch
    tells how long each took in all, not when."""
    if _tracer is None:
        return
    began = time.time() - sum(seconds.values())
    for name, spent in seconds.items():
        record(name, began=began, ended=began + spent)
        began += spent


def traceparent() -> str | None:
    """Of the current span, for the envelope of a message; None without one."""
    if _tracer is None:
        return None
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _context(traceparent: str | None) -> Any:
    """None stands for the current one."""
    if traceparent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _kind(kind: Kind) -> Any:
    from opentelemetry.trace import SpanKind

    return SpanKind[kind.upper()]


def _said(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (attributes or {}).items() if value is not None}
