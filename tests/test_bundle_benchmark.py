"""That the benchmark of the bundle measures what it says; how fast it is is not a test's business."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bundle import report
from benchmarks.bundle.measures import OURS
from benchmarks.bundle.report import PLAIN_IMAGES
from tests.conftest import CHECKOUT

WITHOUT_DOCKER = "packing,verification,downloads"


def test_all_that_needs_no_docker_is_measured(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.bundle", "--quick", "--only", WITHOUT_DOCKER]
    printed = subprocess.run(
        [*command, "--folder", str(tmp_path), "--json", str(found)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert printed.returncode == 0, printed.stdout + printed.stderr
    figures = json.loads(found.read_text())
    ways = {name: list(figures[name]["rounds"][0]) for name in WITHOUT_DOCKER.split(",")}
    assert ways == {
        "packing": [OURS, "cp + sha256sum", "dd"],
        "verification": ["verify.sh", "models verify", "cat"],
        "downloads": [OURS, "curl -o", "curl --parallel"],
    }
    for name in ways:
        for took in figures[name]["rounds"][0].values():
            assert took["size"] == 8_000_000
            assert all(seconds > 0 for seconds in took["stages"].values())
    assert "| verify.sh |" in printed.stdout
    assert list(tmp_path.iterdir()) == [found]


def figures(**seconds: float) -> dict[str, Any]:
    return {"rounds": [{name: {"stages": {"all": each}, "size": 1} for name, each in seconds.items()}], "busy": 0}


MET: dict[str, dict[str, Any]] = {
    "images": figures(**{OURS: 1.0, PLAIN_IMAGES: 3.0}),
    "packing": figures(**{OURS: 1.0, "cp + sha256sum": 1.0}),
    "verification": figures(**{"verify.sh": 10.0, "models verify": 10.0, "cat": 8.0}),
    "downloads": figures(**{OURS: 10.0, "curl -o": 9.0}),
}
MISSED: dict[str, tuple[str, dict[str, Any]]] = {
    "images": ("images", figures(**{OURS: 1.0, PLAIN_IMAGES: 2.9})),
    "packing": ("packing", figures(**{OURS: 1.1, "cp + sha256sum": 1.0})),
    "verify.sh": ("verification", figures(**{"verify.sh": 11.0, "models verify": 10.0, "cat": 8.0})),
    "models verify": ("verification", figures(**{"verify.sh": 10.0, "models verify": 11.0, "cat": 8.0})),
    "downloads": ("downloads", figures(**{OURS: 11.0, "curl -o": 9.0})),
}


def test_bars_that_are_met() -> None:
    assert [bar.is_met for bar in report.bars(MET)] == [True] * 5


@pytest.mark.parametrize(("measure", "found"), MISSED.values(), ids=MISSED)
def test_a_bar_that_is_missed_is_seen(measure: str, found: dict[str, Any]) -> None:
    assert [bar.is_met for bar in report.bars({measure: found})].count(False) == 1


def test_a_ratio_is_that_of_one_round() -> None:
    rounds = [figures(**{OURS: mine, "curl -o": other})["rounds"][0] for mine, other in ((1, 2), (10, 10), (4, 12))]
    assert report.speed({"rounds": rounds}, OURS, "curl -o") == 2
