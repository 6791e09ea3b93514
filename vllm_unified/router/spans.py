"""A span for each request to a model or to the document service, made of its record when it is over."""

import time

from vllm_unified.router.record import Record
from vllm_unified.router.server import Request
from vllm_unified.tracing import HEADER, SpanContext, parsed
from vllm_unified.tracing.otlp import Attributes, Tracer

# Whoever continues a trace may send a state with it, which means nothing without.
CONTINUED = frozenset({HEADER})
BEGUN = frozenset({HEADER, b"tracestate"})
# GenAI's words for it, where it has one: https://github.com/open-telemetry/semantic-conventions-genai
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v2/embed": "embeddings",
}


class Spans:
    """Those of the router."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, request: Request) -> "RequestSpan":
        given = request.fields.get(HEADER)
        parent = parsed(given) if given else None
        context = self._tracer.begin(parent)
        return RequestSpan(self._tracer, context, request.method, CONTINUED if parent else BEGUN)


class RequestSpan:
    """Of a request that is not over. `replaced`: headers of the client that `line` takes the place of."""

    __slots__ = ("_context", "_failures", "_method", "_tracer", "replaced")

    def __init__(self, tracer: Tracer, context: SpanContext, method: str, replaced: frozenset[bytes]) -> None:
        self.replaced = replaced
        self._tracer = tracer
        self._context = context
        self._method = method
        self._failures: list[tuple[int, Attributes]] = []

    @property
    def line(self) -> bytes:
        return b"%b: %b\r\n" % (HEADER, self._context.traceparent)

    def failed_try(self, microseconds: int, replica: str, error: str) -> None:
        """`microseconds`: since the request came. `error`: its code."""
        self._failures.append((microseconds, {"vllm_unified.replica": replica, "error.type": error}))

    def end(self, record: Record) -> None:
        if not self._context.sampled:
            return
        ended = time.time_ns()
        began = ended - record.duration_us * 1000
        # A client's fault is none of the server's; an answer that broke off has the status 200.
        failed = record.error not in ("", "client") and not 400 <= record.status < 500
        self._tracer.end(
            self._context,
            f"{self._method} {record.path}",
            began,
            ended,
            _attributes(self._method, record, failed=failed),
            is_request=True,
            failed=failed,
            events=[("failed try", began + microseconds * 1000, about) for microseconds, about in self._failures],
        )


def _attributes(method: str, record: Record, *, failed: bool) -> Attributes:
    """Numbers and names; no text that a client or a model wrote, and no secret."""
    found: dict[str, str | int | float] = {
        "http.request.method": method,
        "http.route": record.path,
        "vllm_unified.request_id": record.id,
    }
    if record.status:
        found["http.response.status_code"] = record.status
    if record.error:
        found["vllm_unified.error"] = record.error
    if failed:
        found["error.type"] = str(record.status) if record.status >= 500 else "broken_off"
    if record.path in OPERATIONS:
        found["gen_ai.operation.name"] = OPERATIONS[record.path]
    if record.model:
        found["gen_ai.request.model"] = record.asked
        found["vllm_unified.model"] = record.model
        found["vllm_unified.tries"] = record.tries
        found["vllm_unified.queue_seconds"] = record.queued_us * 1e-6
    if record.upstream:
        found["vllm_unified.replica"] = record.upstream
    if record.stream:
        found["gen_ai.request.stream"] = True
        if record.first_byte_us is not None:
            found["gen_ai.response.time_to_first_chunk"] = record.first_byte_us * 1e-6
    if record.prompt_tokens:
        found["gen_ai.usage.input_tokens"] = record.prompt_tokens
    if record.completion_tokens:
        found["gen_ai.usage.output_tokens"] = record.completion_tokens
    return found
