"""A span for each document and for each of its pages, below the request that brought it."""

import hashlib
import time
from collections.abc import Awaitable, Callable

from vllm_unified.documents.page import Page
from vllm_unified.documents.store import Document
from vllm_unified.tracing import CURRENT, SpanContext, parsed
from vllm_unified.tracing.otlp import Attributes, Tracer


class Spans:
    """Those of the document service. A document whose request was not traced has none."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.close = tracer.close

    def of(self, document: Document) -> SpanContext | None:
        """Found anew after a restart, since it follows from what is stored."""
        parent = parsed(document.traceparent.encode())
        if parent is None:
            return None
        digest = hashlib.blake2b(f"{document.traceparent} {document.id}".encode(), digest_size=8).digest()
        return SpanContext(parent.trace_id, int.from_bytes(digest) or 1, parent.span_id, parent.sampled)

    async def page(self, document: Document, number: int, read: Callable[[Document, int], Awaitable[Page]]) -> Page:
        """`read` it, in a task of its own: its requests to the router are part of it."""
        parent = self.of(document)
        if parent is None:
            return await read(document, number)
        span = self._tracer.below(parent)
        CURRENT.set(span)
        began = time.time_ns()
        page = None
        try:
            page = await read(document, number)
            return page
        finally:
            failed = page is None or bool(page.reason)
            self._tracer.end(span, "page", began, time.time_ns(), _of_page(number, page), failed=failed)

    def ended(self, document: Document) -> None:
        span = self.of(document)
        if span is None:
            return
        attributes: dict[str, str | int | float] = {
            "vllm_unified.document.id": document.id,
            "vllm_unified.document.state": document.state,
            "vllm_unified.document.pages": document.pages or 0,
            "vllm_unified.document.pages_failed": document.failed,
        }
        began, ended = (int(each * 1e9) for each in (document.queued_at, document.updated_at))
        self._tracer.end(span, "document", began, ended, attributes, failed=document.state == "failed")


def _of_page(number: int, page: Page | None) -> Attributes:
    """`page`: None where it was given back, or given up with the service's end."""
    found: dict[str, str | int | float] = {"vllm_unified.page.number": number}
    if page is not None:
        found["vllm_unified.page.attempts"] = page.attempts
        found["vllm_unified.page.source"] = page.source
        found["gen_ai.usage.input_tokens"] = page.prompt_tokens
        found["gen_ai.usage.output_tokens"] = page.completion_tokens
    return found
