"""docs/metrics.md beside what is exported: by the router and the document service, and by a real vLLM."""

import asyncio
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import CHECKOUT, TOPOLOGIES, Project
from tests.router.test_machine import certificate
from tests.router.test_metrics import record
from vllm_unified.documents.jobs import Load
from vllm_unified.documents.metrics import Metrics as DocumentMetrics
from vllm_unified.documents.store import Store
from vllm_unified.router.engine_metrics import merged
from vllm_unified.router.keys import Key
from vllm_unified.router.machine import CERTIFICATE, Machine
from vllm_unified.router.metrics import Metrics
from vllm_unified.router.registry import Registry
from vllm_unified.router.replica import Replica
from vllm_unified.settings.keys import KeyEntry, hash_of
from vllm_unified.state import EngineState, Phase, Process

# Of the demonstration's chat engine, as it came from /metrics/engines/chat. Of each new vLLM the same is put here.
VLLM = (CHECKOUT / "tests" / "vllm_metrics.txt").read_text(encoding="utf-8")
CATALOGUE = (CHECKOUT / "docs" / "metrics.md").read_text(encoding="utf-8")
# Name → type and labels.
TOLD = {
    name: (kind, frozenset(labels.split(", ")) - {""})
    for name, kind, labels in re.findall(r"^\| `([\w:]+)` \| (\w+) \| ([\w, ]*?) ?\|", CATALOGUE, re.MULTILINE)
}
PROCESS = set(re.findall(r"`(process_\w+)`", CATALOGUE))


# What only a GPU's driver tells.
OF_A_DRIVER = {
    "vllm_unified_engine_gpu_memory_bytes",
    "vllm_unified_gpu_utilization_ratio",
    "vllm_unified_gpu_temperature_celsius",
    "vllm_unified_gpu_temperature_limit_celsius",
    "vllm_unified_gpu_power_watts",
}


@pytest.fixture
def router(project: Project) -> str:
    """Of a deployment of which everything is known but what a driver would tell."""
    project.write({"chat": {"name": "Qwen", "type": "chat"}})
    settings = project.load({"VLLM_UNIFIED_DEVICES": str(TOPOLOGIES / "1x24.json")})
    (project.home / CERTIFICATE).parent.mkdir(parents=True)
    (project.home / CERTIFICATE).write_bytes(certificate(90))
    registry = Registry(settings)
    (replica,) = registry.served[0].replicas
    engine = Process.of(os.getpgid(0))
    replica.engine = EngineState("chat", Phase.READY, 0.0, engine=engine, ready_after=1.0, down_for=1.0)
    keys = [Key(KeyEntry(name="team", hash=hash_of("team"), tokens_per_day=100))]
    metrics = Metrics(registry, lambda: keys, lambda: 1, lambda: 0, Machine(lambda: settings, lambda: [replica]))
    metrics.note(record())
    return metrics.text().decode()


@pytest.fixture
def documents(tmp_path: Path) -> str:
    return DocumentMetrics(Store(tmp_path / "documents.db"), tmp_path).text(Load(0, 0, 0, 0.0), 1).decode()


@pytest.fixture
def engines(router: str, project: Project) -> str:
    async def fetch(_replica: Replica, _path: str, _seconds: float) -> tuple[int, bytes]:
        return 200, VLLM.encode()

    return asyncio.run(merged(Registry(project.load()), fetch)).decode()


def families(text: str) -> dict[str, Metric]:
    """By their names as docs/metrics.md has them: a counter's with _total."""
    found = text_string_to_metric_families(text)
    return {f"{family.name}_total" if family.type == "counter" else family.name: family for family in found}


def described(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Name → type and labels, of all that is ours."""
    return {
        name: (family.type, frozenset(label for sample in family.samples for label in sample.labels) - {"le"})
        for name, family in families(text).items()
        if name.startswith("vllm_unified") and family.samples
    }


def test_all_that_is_exported_is_in_the_catalogue_and_nothing_else(router: str, documents: str, engines: str) -> None:
    scrape_up = "vllm_unified_engine_scrape_up"
    found = described(router) | described(documents) | {scrape_up: described(engines)[scrape_up]}
    ours = {name: told for name, told in TOLD.items() if name.startswith("vllm_unified") and name not in OF_A_DRIVER}
    assert found == ours
    assert TOLD.keys() >= OF_A_DRIVER


def test_what_a_process_tells_of_itself(router: str, documents: str) -> None:
    for text in (router, documents):
        assert {name for name in families(text) if not name.startswith("vllm_unified")} == PROCESS


def test_what_is_said_of_vllm_is_so() -> None:
    of_vllm = {name: told for name, told in TOLD.items() if name.startswith("vllm:")}
    assert len(of_vllm) > 10
    real = families(VLLM)
    everywhere = {"engine", "model_name", "le"}
    for name, (kind, labels) in of_vllm.items():
        family = real[name]
        assert (family.type, {label for each in family.samples for label in each.labels} - everywhere) == (kind, labels)


def test_rules_and_dashboards_ask_for_what_there_is() -> None:
    folder = CHECKOUT / "monitoring"
    files = [*folder.glob("rules/*.yml"), *folder.glob("grafana/dashboards/*.json")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    asked = set(re.findall(r"(?<!:)\bvllm(?::|_unified_)\w+", " ".join(texts)))
    parts = ("", "_bucket", "_count", "_sum")
    assert len(asked) > 20
    assert {name for name in asked if not any(name.removesuffix(part) in TOLD for part in parts)} == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
def test_promtool_finds_nothing_to_say(router: str, documents: str) -> None:
    for text in (router, documents):
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
