"""A document's trace: client, router, document service, and the router again on its way to the OCR model."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.collector import INTERNAL, Collector, Span
from tests.conftest import API_KEY, CHECKOUT, Project, eventually, free_port
from tests.documents.fake_ocr import FakeOcr
from tests.documents.own_pdf import document as pdf
from tests.router.conftest import Deployment
from tests.router.test_spans import NAME, SPAN, TRACE, trace

THEIRS = {"traceparent": f"00-{TRACE}-{SPAN}-01"}


class Site(Deployment):
    """The router and the document service, in front of an OCR model."""

    def start_documents(self) -> None:
        environ = {**os.environ, "VLLM_UNIFIED_HOME": str(self.project.home), "VLLM_API_KEY": API_KEY}
        with self.log.open("ab") as log:
            self.processes["documents"] = subprocess.Popen(
                [sys.executable, "-m", "vllm_unified", "documents"], env=environ, cwd=CHECKOUT, stdout=log, stderr=log
            )
        with self.client() as client:
            eventually(lambda: client.get("/api/tasks").status_code == 200, 60)
            eventually(lambda: client.get("/metrics/documents").status_code == 200, 60)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture
def site(project: Project, ocr: FakeOcr, collector: Collector) -> Iterator[Site]:
    ocr.behave(model="deepseek-ocr", concurrency=4)
    site = Site(project)
    trace(site, collector.url)
    try:
        reader = {"name": "deepseek-ocr", "type": "ocr", "endpoints": [{"url": ocr.url, "timeout": 120}]}
        site.start({"ocr": reader}, documents={"port": free_port()})
        site.start_documents()
        collector.spans.clear()
        yield site
    finally:
        site.stop()


def submitted(client: httpx.Client, **data: str) -> str:
    answer = client.post(
        "/api/ocr/pdf", files={"pdf": ("my report.pdf", pdf())}, data={"retries": "0", **data}, headers=THEIRS
    )
    return str(answer.raise_for_status().json()["task_id"])


def finished(client: httpx.Client, task: str) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = client.get(f"/api/tasks/{task}", params={"wait": 20}).json()
        return None if found["status"] in ("pending", "running") else found

    return dict(eventually(ended, 120))


def of_the_trace(collector: Collector, name: str) -> list[Span]:
    collector.found(lambda span: (span.trace, span.name) == (TRACE, "document"))
    return [span for span in collector.spans if (span.trace, span.name) == (TRACE, name)]


def test_a_document_is_one_trace(site: Site, collector: Collector, ocr: FakeOcr) -> None:
    ocr.behave(model="deepseek-ocr", concurrency=4, pages={"2": ["500"]})
    with site.client() as client:
        task = submitted(client, pages="1-3", retries="2")
        assert finished(client, task)["status"] == "succeeded"
    (document,) = of_the_trace(collector, "document")
    (request,) = of_the_trace(collector, "POST /api/ocr/pdf")
    pages = sorted(of_the_trace(collector, "page"), key=lambda span: span.attributes["vllm_unified.page.number"])
    asked = of_the_trace(collector, NAME)
    assert (request.service, request.parent) == ("vllm-unified-router", SPAN)
    assert (document.service, document.parent, document.kind) == ("vllm-unified-documents", request.id, INTERNAL)
    assert document.attributes == {
        "vllm_unified.document.id": task,
        "vllm_unified.document.state": "succeeded",
        "vllm_unified.document.pages": 3,
        "vllm_unified.document.pages_failed": 0,
    }
    assert [page.parent for page in pages] == [document.id] * 3
    assert [page.attributes["vllm_unified.page.attempts"] for page in pages] == [1, 2, 1]
    assert all(document.began <= page.began <= page.ended <= document.ended + 1 for page in pages)
    assert all(page.attributes["gen_ai.usage.output_tokens"] > 0 for page in pages)
    below = {page.id: [each for each in asked if each.parent == page.id] for page in pages}
    assert [len(each) for each in below.values()] == [1, 2, 1]
    assert sorted(each.failed for each in below[pages[1].id]) == [False, True]
    told = {request["traceparent"] for request in ocr.seen["requests"]}
    assert told == {f"00-{TRACE}-{each.id}-01" for each in asked}
    assert "report" not in str(collector.spans)


def test_it_goes_on_in_its_trace_after_a_kill(site: Site, collector: Collector, ocr: FakeOcr) -> None:
    ocr.behave(model="deepseek-ocr", concurrency=4, pages={"2": ["hang"]})
    with site.client() as client:
        task = submitted(client, pages="1-2")
        eventually(lambda: "2" in {str(each["page"]) for each in ocr.seen["requests"]})
        collector.found(lambda span: span.name == "page")
        site.processes["documents"].send_signal(signal.SIGKILL)
        site.processes["documents"].wait()
        site.start_documents()
        assert finished(client, task)["status"] == "succeeded"
    (document,) = of_the_trace(collector, "document")
    assert [page.parent for page in of_the_trace(collector, "page")] == [document.id] * 2


def test_a_retry_is_part_of_the_request_that_asks_for_it(site: Site, collector: Collector, ocr: FakeOcr) -> None:
    ocr.behave(model="deepseek-ocr", concurrency=4, pages={"1": ["empty"]})
    with site.client() as client:
        task = submitted(client, pages="3")
        client.post(f"/api/tasks/{task}/cancel")
        finished(client, task)
        (first,) = of_the_trace(collector, "document")
        client.post(f"/api/tasks/{task}/retry").raise_for_status()
        finished(client, task)
    second = collector.found(lambda span: span.name == "document" and span.trace != TRACE)[0]
    request = collector.one("POST /api/tasks/{id}/retry")
    assert (second.trace, second.parent) == (request.trace, request.id)
    assert second.id != first.id
