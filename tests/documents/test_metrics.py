"""What Prometheus sees of the service."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import eventually
from tests.documents.conftest import Served
from tests.documents.fake_ocr import FakeOcr
from tests.documents.test_service import ended, pdf_of
from vllm_unified.documents.jobs import FAULT
from vllm_unified.documents.metrics import reason_of
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import full_disk

PREFIX = "vllm_unified_documents"


def metrics_of(served: Served) -> Callable[..., float]:
    """Of now: the value of a sample by its name and labels."""
    answer = httpx.get(f"{served.url}/metrics").raise_for_status()
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    samples = {
        (each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples
    }
    return lambda name, **labels: samples[f"{PREFIX}{name}", frozenset(labels.items())]


def sent(served: Served, pages: int, **fields: str) -> str:
    with served.client() as client:
        answer = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(pages))}, data=fields)
        task_id: str = answer.raise_for_status().json()["task_id"]
        return task_id


def test_what_came_of_documents_and_pages(fresh: Served, ocr: FakeOcr) -> None:
    fresh.start()
    before = metrics_of(fresh)
    reasons = ("empty", "truncated", "repetition", "engine", "file", "disk", "service")
    assert {before("_pages_failed_total", reason=reason) for reason in reasons} == {0}
    wrong = {2: ["empty"] * 2, 3: ["400"], 4: ["malformed"]}
    ocr.behave(model="deepseek-ocr", latency=0.3, pages={str(page): cues for page, cues in wrong.items()})
    with fresh.client() as client:
        document = ended(client, sent(fresh, 5, retries="1"))
    assert document["progress"]["pages_failed"] == 2, document
    found = metrics_of(fresh)
    assert found("", state="succeeded") == 1
    assert [found("_finished_total", state=state) for state in ("succeeded", "failed", "cancelled")] == [1, 0, 0]
    assert (found("", state="failed"), found("_unfinished"), found("_pages_waiting")) == (0, 0, 0)
    assert (found("_pages_done_total"), found("_page_retries_total")) == (3, 2)
    assert {reason: found("_pages_failed_total", reason=reason) for reason in reasons if reason != "file"} == {
        "empty": 1,
        "truncated": 0,
        "repetition": 0,
        "engine": 1,
        "disk": 0,
        "service": 0,
    }
    assert (found("_page_seconds_count"), found("_page_seconds_bucket", le="0.25")) == (4, 0)
    assert found("_page_seconds_sum") > 4 * 0.3
    files = [path for path in (fresh.folder / document["task_id"]).rglob("*") if path.is_file()]
    assert found("_bytes") == sum(path.stat().st_size for path in files)
    assert found("_disk_free_bytes") > 0


def test_what_waits(fresh: Served, ocr: FakeOcr) -> None:
    fresh.configure(pages_in_flight=3)
    fresh.start()
    ocr.behave(model="deepseek-ocr", cue="hang")
    assert metrics_of(fresh)("_oldest_waiting_seconds") == 0
    tasks = [sent(fresh, 4), sent(fresh, 6)]
    eventually(lambda: metrics_of(fresh)("_pages_in_flight") == 3)
    found = metrics_of(fresh)
    assert (found("_unfinished"), found("_pages_waiting"), found("_pages_in_flight_limit")) == (2, 10, 3)
    assert found("", state="running") + found("", state="queued") == 2
    with fresh.client() as client:
        for task in tasks:
            client.delete(f"/api/tasks/{task}").raise_for_status()
    found = metrics_of(fresh)
    assert found("_finished_total", state="cancelled") == 2
    assert (found("_unfinished"), found("_pages_waiting"), found("_pages_in_flight"), found("_bytes")) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ({"reason": FAULT}, "service"),
        ({"reason": str(full_disk("again"))}, "disk"),
        ({"reason": "this page is damaged"}, "file"),
        ({"reason": "the engine said nothing for 900 s", "width": 9}, "engine"),
        ({"reason": "the model's answer repeats itself; 500: oh", "width": 9, "raw_text": "a a"}, "repetition"),
        ({"reason": "the model's answer has no boxes", "width": 9, "raw_text": "a"}, "malformed"),
    ],
)
def test_why_a_page_failed(page: dict[str, Any], reason: str) -> None:
    assert reason_of(Page(number=1, source="nothing", **page)) == reason
