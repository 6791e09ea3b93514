"""One trace, from the client into the real vLLM."""

import io
import secrets
import time

import httpx
import pytest

from tests.collector import SERVER, Collector, Span
from tests.engine.conftest import HEADERS, SMALL, SYSTEM, Demo
from tests.engine.test_documents import PAGES

# Of a request of one model: the demonstration's reranker compares the vectors of two texts.
ENGINE_SPANS = {"chat": 1, "embedding": 1, "rerank": 2, "ocr": 1}


def of_trace(collector: Collector, trace: str, service: str, name: str, count: int = 1) -> Span:
    """The first of so many, which have the same parent."""
    wanted = (trace, f"vllm-unified-{service}", name)
    found = collector.found(lambda span: (span.trace, span.service, span.name) == wanted, count)
    assert len({span.parent for span in found}) == 1
    return found[0]


@pytest.mark.parametrize("key", SMALL)
def test_a_request(demo: Demo, collector: Collector, key: str) -> None:
    path, body = SMALL[key]
    trace, client = secrets.token_hex(16), secrets.token_hex(8)
    began = time.time()
    headers = {**HEADERS, "traceparent": f"00-{trace}-{client}-01"}
    httpx.post(f"{demo.url('router')}{path}", json=body, headers=headers, timeout=60).raise_for_status()
    router = of_trace(collector, trace, "router", f"POST /v1{path}")
    engine = of_trace(collector, trace, key, "llm_request", ENGINE_SPANS[key])
    assert (router.parent, engine.parent) == (client, router.id)
    assert (router.kind, engine.kind) == (SERVER, SERVER)
    assert began - 0.1 < router.began <= engine.began <= engine.ended <= router.ended + 0.1
    assert engine.attributes["gen_ai.usage.prompt_tokens"] > 0
    if key in ("chat", "ocr"):
        assert engine.attributes["gen_ai.usage.prompt_tokens"] == router.attributes["gen_ai.usage.input_tokens"]
        assert 0 < engine.attributes["gen_ai.latency.time_to_first_token"] < router.ended - router.began


def test_a_document(demo: Demo, collector: Collector) -> None:
    written = io.BytesIO()
    PAGES[0].draw().save(written, "PNG")
    trace, client = secrets.token_hex(16), secrets.token_hex(8)
    headers = {**HEADERS, "traceparent": f"00-{trace}-{client}-01"}
    url = f"http://127.0.0.1:{demo.ports['router']}/api/ocr/image"
    httpx.post(url, files={"image": ("order.png", written.getvalue())}, headers=headers, timeout=120).raise_for_status()
    parent = client
    for service, name in (
        ("router", "POST /api/ocr/image"),
        ("documents", "document"),
        ("documents", "page"),
        ("router", "POST /v1/chat/completions"),
        ("ocr", "llm_request"),
    ):
        span = of_trace(collector, trace, service, name)
        assert span.parent == parent
        parent = span.id


@pytest.mark.usefixtures("demo")
def test_only_requests_are_traced(collector: Collector) -> None:
    """The keepers' looks at their engines begin no traces."""

    def begun() -> list[str]:
        return [span.trace for span in collector.spans if span.name == "llm_request" and not span.parent]

    before = begun()  # by those who asked an engine itself
    time.sleep(3 * SYSTEM["progress_interval"])
    assert begun() == before
