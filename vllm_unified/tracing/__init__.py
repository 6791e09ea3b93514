"""OpenTelemetry's traces: one for a request, from the router through the document service into vLLM.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT is set, and then we load nothing of OpenTelemetry. What travels with a
request, W3C's traceparent, is ours: https://www.w3.org/TR/trace-context/#traceparent-header
"""

import re
from contextvars import ContextVar
from typing import TYPE_CHECKING

import msgspec

from vllm_unified.settings import Settings

if TYPE_CHECKING:
    from vllm_unified.tracing.otlp import Tracer

HEADER = b"traceparent"
TRACEPARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class SpanContext(msgspec.Struct, frozen=True, gc=False):
    """Which span it is. `parent_id`: 0 where it begins its trace. `sampled`: whether the trace is sent at all."""

    trace_id: int
    span_id: int
    parent_id: int
    sampled: bool

    @property
    def traceparent(self) -> bytes:
        return b"00-%032x-%016x-%02x" % (self.trace_id, self.span_id, self.sampled)


# Of which the work of this task is a part; its requests to the router say so.
CURRENT: ContextVar[SpanContext | None] = ContextVar("span", default=None)


def current() -> str:
    """The traceparent of that; "" where nothing is traced."""
    context = CURRENT.get()
    return "" if context is None else context.traceparent.decode("ascii")


def parsed(traceparent: bytes) -> SpanContext | None:
    """None for what is not valid."""
    found = TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if more and version == b"00":
        return None
    context = SpanContext(int(trace_id, 16), int(span_id, 16), 0, bool(int(flags, 16) & 1))
    return context if context.trace_id and context.span_id else None


def tracer_of(settings: Settings, service: str) -> "Tracer | None":
    """None when tracing is off. Raises UserError for a variable of OpenTelemetry that can't be meant."""
    url = settings.environment.otlp_traces_url
    if url is None:
        return None
    from vllm_unified.tracing.otlp import Tracer

    return Tracer(url, f"vllm-unified-{service}", settings.engine_env)
