"""That the guard against repetition is found out about: of engines that have it, pass it over, or refuse it."""

import io
import json
from typing import Any

import httpx
import pytest
from rich.console import Console

from tests.conftest import eventually
from tests.documents.conftest import Served
from tests.documents.fake_ocr import FakeOcr
from vllm_unified.console import Status
from vllm_unified.console import guard_of as guard_of_service
from vllm_unified.documents.guard import has_pair_twice


def guard_of(served: Served) -> dict[str, Any]:
    """Once it was tested."""
    eventually(lambda: "not tested yet" not in httpx.get(f"{served.url}/health").text, 30)
    found: dict[str, Any] = httpx.get(f"{served.url}/health").json()["repetition_guard"]
    return found


@pytest.mark.parametrize(
    ("model", "guard", "works", "words"),
    [
        ("deepseek-ocr", "works", True, "keeps its answers from repeating"),
        ("deepseek-ocr", "passed over", False, '"logits-processors": ["vllm.model_executor.models.deepseek_ocr:'),
        ("deepseek-ocr", "without effect", False, '"VLLM_USE_V2_MODEL_RUNNER": "0" into env'),
        ("deepseek-ocr", "refused", False, "400: fake OCR: vllm_xargs is not known"),
        ("any-vlm", "works", True, "cut and asked for again"),
        ("any-vlm", "no finish_reason", False, "(finish_reason)"),
        ("any-vlm", "refused", False, "it refuses every page"),
    ],
)
def test_what_is_found(fresh: Served, ocr: FakeOcr, model: str, guard: str, works: bool, words: str) -> None:
    ocr.behave(model=model, guard=guard)
    fresh.start()
    found = guard_of(fresh)
    assert (found["works"], words in found["message"]) == (works, True), found
    lines = [(line["level"], line["message"]) for line in map(json.loads, fresh.log.read_text().splitlines())]
    assert lines.count(("info" if works else "warning", f"guard against repetition, {model}: {found['message']}")) == 1
    assert "\n" not in found["message"]


def test_status_says_what_to_do(fresh: Served, ocr: FakeOcr) -> None:
    def shown() -> str:
        console = Console(file=io.StringIO(), width=400)
        status = Status(settings, "running", "running", guard_of_service(settings), [], {}, {})
        console.print(status.text())
        assert status.document()["documents"]["repetition_guard"] == status.guard
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    settings = fresh.project.load()
    assert "guard" not in shown()  # nobody answers
    ocr.behave(model="deepseek-ocr", guard="passed over")
    fresh.start()
    assert f"guard against repetition: {guard_of(fresh)['message']}\n" in shown()
    fresh.kill()
    ocr.behave(model="deepseek-ocr")
    fresh.start()
    assert guard_of(fresh)["works"] is True
    assert "guard" not in shown()


def test_a_busy_engine_is_not_asked(fresh: Served, ocr: FakeOcr) -> None:
    ocr.behave(model="deepseek-ocr")
    ocr.waiting = 3  # of somebody else
    try:
        fresh.start()
        eventually(lambda: json.loads(httpx.get(f"{fresh.url}/health").text)["model_loaded"])
        with pytest.raises(AssertionError):
            eventually(lambda: ocr.seen["guard_tests"], 3)
        assert httpx.get(f"{fresh.url}/health").json()["repetition_guard"]["works"] is None
    finally:
        ocr.waiting = 0
    assert guard_of(fresh)["works"] is True


@pytest.mark.parametrize(
    ("tokens", "whitelist", "twice"),
    [
        ([], (), False),
        ([1], (), False),
        ([1, 2, 3, 1, 3, 2], (), False),
        ([1, 2, 1, 2], (), True),
        ([1, 2, 1, 2], (2,), False),
        ([1, 2, 1, 2, 1], (2,), True),
        ([7, 7, 7], (), True),
        ([7, 7, 7], (7,), False),
    ],
)
def test_pairs(tokens: list[int], whitelist: tuple[int, ...], twice: bool) -> None:
    assert has_pair_twice(tokens, whitelist) is twice
