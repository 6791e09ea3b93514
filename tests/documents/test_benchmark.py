"""That the benchmark of the documents measures what it says; how fast they are is not a test's business."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pypdfium2
import pytest

from benchmarks.documents import report
from benchmarks.documents.measures import request_of
from benchmarks.documents.papers import A4, A6, write_pdf
from benchmarks.documents.programs import Engine
from benchmarks.router.programs import BenchmarkError
from tests.conftest import CHECKOUT
from tests.documents.fake_ocr import FakeOcr


def test_all_is_measured(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.documents", "--quick", "--json", str(found)]
    printed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert printed.returncode == 0, printed.stdout + printed.stderr
    figures = json.loads(found.read_text())
    assert 0 < figures["throughput"]["ratio"] <= 1.1
    assert figures["throughput"]["ratio_of_one_at_a_time"] < figures["throughput"]["ratio"]
    assert all(
        0 < each["rss_mb_while_read"] < each["rss_mb_with_renderers"] for each in figures["documents"]["documents"]
    )
    assert all(each["health_ms"]["asked"] > 0 for each in figures["documents"]["documents"])
    kills = figures["kills"]
    assert kills["pages_read_at_each_kill"][-1] == kills["pages"]
    assert (kills["pages_read_twice"], kills["pages_never_asked_for"]) == (0, 0)
    assert "| service |" in printed.stdout


@pytest.mark.parametrize("size", [A4, A6])
def test_pages_say_which_one_they_are(size: tuple[float, float], tmp_path: Path) -> None:
    with FakeOcr() as ocr, pypdfium2.PdfDocument(write_pdf(tmp_path / "paper.pdf", 20, size)) as opened:
        for page in opened:
            httpx.post(f"{ocr.url}/v1/chat/completions", json=request_of(page)).raise_for_status()
        assert [each["page"] for each in ocr.seen["requests"]] == list(range(1, 21))


@pytest.mark.parametrize("pages", [1, 3])
def test_a_page_that_is_asked_for_again_is_noticed(pages: int, tmp_path: Path) -> None:
    with FakeOcr() as ocr, pypdfium2.PdfDocument(write_pdf(tmp_path / "paper.pdf", 1)) as opened:
        engine = Engine(ocr.server.server_port)
        began = time.monotonic()
        for _ in range(2):
            httpx.post(f"{ocr.url}/v1/chat/completions", json=request_of(opened[0])).raise_for_status()
        with pytest.raises(BenchmarkError, match=f"2 times, for {pages} pages"):
            engine.pages_per_second(pages, began)
        assert engine.pages_per_second(2, began) > 0


def documents(pages: int = 100, **figures: Any) -> dict[str, Any]:
    measured = {
        "read_seconds": pages / 10,
        "product_seconds": pages / 20,
        "rss_mb_while_read": 100,
        "rss_mb_after": 120,
    }
    return {"pages": pages, "health_ms": {"p99": 10.0}, "idle_ms": {"p99": 1.0}, **measured, **figures}


def kills(**figures: int) -> dict[str, int]:
    return {"pages_read_twice": 0, "pages_never_asked_for": 0, **figures}


MISSED: dict[str, tuple[str, dict[str, Any]]] = {
    "slower than the engine": ("throughput", {"ratio": 0.94}),
    "much memory": ("documents", {"documents": [documents(rss_mb_after=400)]}),
    "slower with length": ("documents", {"documents": [documents(), documents(200, read_seconds=31)]}),
    "slow health": ("documents", {"documents": [documents(health_ms={"p99": 50.0})]}),
    "slow grounding": (
        "grounding",
        {"ms": {"a": {500_000: 26, 1_000_000: 51}, "b": {500_000: 1, 1_000_000: 2}}},
    ),
    "grounding that is not linear": ("grounding", {"ms": {"a": {1: 1, 2: 2}, "b": {1: 10, 2: 40}}}),
    "read twice": ("kills", kills(pages_read_twice=1)),
    "lost": ("kills", kills(pages_never_asked_for=1)),
}


@pytest.mark.parametrize(("measure", "figures"), MISSED.values(), ids=MISSED)
def test_a_bar_that_is_missed_is_seen(measure: str, figures: dict[str, Any]) -> None:
    assert [bar.is_met for bar in report.bars({measure: figures})].count(False) == 1


def test_bars_that_are_met() -> None:
    met: dict[str, dict[str, Any]] = {
        "throughput": {"ratio": 0.95},
        "documents": {"documents": [documents(), documents(200)]},
        "grounding": {"ms": {"a": {1: 10, 2: 20}, "b": {1: 10, 2: 20}}},
        "kills": kills(),
    }
    assert all(bar.is_met for bar in report.bars(met))
