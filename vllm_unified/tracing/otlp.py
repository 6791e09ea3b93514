"""Spans to a collector, by OpenTelemetry's SDK. Its own variables (OTEL_TRACES_SAMPLER, OTEL_BSP_… ) hold for them."""

import logging
import os
import threading
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanKind, Status, StatusCode, TraceFlags, set_span_in_context
from opentelemetry.trace import SpanContext as SdkContext

from vllm_unified import __version__
from vllm_unified.errors import UserError
from vllm_unified.tracing import SpanContext

# For what is still to be sent when the service ends.
CLOSE_SECONDS = 3.0
LONGEST_REASON = 300
SAMPLED, NOT_SAMPLED = TraceFlags(TraceFlags.SAMPLED), TraceFlags(TraceFlags.DEFAULT)
OK, FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)

Attributes = Mapping[str, str | int | float]
log = logging.getLogger(__name__)


class Tracer:
    """A span's ids are given out when its work begins, since they travel with it; the span is made when it is over.

    Nothing here waits for the collector. What it does not take in time is lost.
    """

    def __init__(self, url: str, service: str, variables: Mapping[str, str]) -> None:
        """`variables`: those of .env, of which the SDK reads its own. Raises UserError."""
        for name, value in variables.items():
            if name.startswith("OTEL_"):
                os.environ.setdefault(name, value)
        try:
            self._resource = Resource.create({"service.name": service, "service.version": __version__})
            provider = TracerProvider(shutdown_on_exit=False)
            self._processor = BatchSpanProcessor(_Exporter(url))
        except ValueError as error:
            raise UserError(f".env: a variable of OpenTelemetry, OTEL_…: {error}") from None
        self._sampler = provider.sampler
        self._ids = provider.id_generator
        self._scope = InstrumentationScope("vllm_unified", __version__)

    def begin(self, parent: SpanContext | None) -> SpanContext:
        """Of a request from outside: the sampler decides whether it is traced."""
        if parent is None:
            trace_id, parent_id, around = self._ids.generate_trace_id(), 0, None
        else:
            trace_id, parent_id = parent.trace_id, parent.span_id
            around = set_span_in_context(NonRecordingSpan(_sdk(parent)), Context())
        decision = self._sampler.should_sample(around, trace_id, "request", SpanKind.SERVER).decision
        return SpanContext(trace_id, self._ids.generate_span_id(), parent_id, decision is Decision.RECORD_AND_SAMPLE)

    def below(self, parent: SpanContext) -> SpanContext:
        """Of a part of the work of `parent`."""
        return SpanContext(parent.trace_id, self._ids.generate_span_id(), parent.span_id, parent.sampled)

    def end(
        self,
        context: SpanContext,
        name: str,
        began: int,
        ended: int,
        attributes: Attributes,
        *,
        is_request: bool = False,
        failed: bool = False,
        events: Sequence[tuple[str, int, Attributes]] = (),
    ) -> None:
        """`began`, `ended`, and an event's name, time and attributes: in unix nanoseconds."""
        if not context.sampled:
            return
        # Not made by the SDK's tracer, which gives out the ids itself.
        span = ReadableSpan(
            name,
            _sdk(context),
            SdkContext(context.trace_id, context.parent_id, is_request, SAMPLED) if context.parent_id else None,
            self._resource,
            attributes,
            [Event(each, of_it, time) for each, time, of_it in events],
            kind=SpanKind.SERVER if is_request else SpanKind.INTERNAL,
            status=FAILED if failed else OK,
            start_time=began,
            end_time=ended,
            instrumentation_scope=self._scope,
        )
        self._processor.on_end(span)

    def close(self) -> None:
        """Send what is left, for CLOSE_SECONDS at most."""
        closing = threading.Thread(target=self._processor.shutdown, name="tracing ends", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


class _Exporter(OTLPSpanExporter):
    """Says it once when the collector takes nothing, and once when it does again."""

    def __init__(self, url: str) -> None:
        super().__init__(endpoint=url)
        self._url = url
        self._takes = True
        self._reason = _FirstWords()
        words = logging.getLogger("opentelemetry")
        words.addHandler(self._reason)
        words.propagate = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._reason.words = ""
        result = super().export(spans)
        takes = result is SpanExportResult.SUCCESS
        if takes and not self._takes:
            log.info("traces: %s takes them again", self._url)
        if self._takes and not takes:
            log.warning("traces: %s takes none, and they are lost: %s", self._url, self._reason.words)
        self._takes = takes
        return result


class _FirstWords(logging.Handler):
    """Of the exporter, which says the same again and again; in the first there is the reason."""

    words = ""

    def emit(self, record: logging.LogRecord) -> None:
        if not self.words and record.name.startswith("opentelemetry.exporter"):
            self.words = record.getMessage()[:LONGEST_REASON]


def _sdk(context: SpanContext) -> SdkContext:
    return SdkContext(context.trace_id, context.span_id, True, SAMPLED if context.sampled else NOT_SAMPLED)
