"""A real Prometheus, with what is rendered for it, beside a deployment with fake engines."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import API_KEY, Project, eventually, free_port
from tests.test_reload import Reloaded
from vllm_unified.supervision.prometheus import prometheus_files

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no Prometheus")
QUICK = "1s"  # in place of the intervals, and of what an alert waits for


class Prometheus:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, files: dict[Path, str]) -> None:
        for path, text in files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(_hurried(text) if path.suffix == ".yml" else text)
        command = ["prometheus", f"--config.file={self.folder / 'prometheus.yml'}"]
        command += [
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address={self.url.partition('//')[2]}",
        ]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)

    def ask(self, expression: str) -> dict[tuple[str, str], float]:
        """Type and model → value; nothing while Prometheus is not there yet."""
        try:
            answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10)
        except httpx.TransportError:
            return {}
        result: list[Any] = answer.json()["data"]["result"] if answer.status_code == 200 else []
        labels = ((each["metric"], each["value"][1]) for each in result)
        return {(metric.get("type", ""), metric.get("model", "")): float(value) for metric, value in labels}


def _hurried(text: str) -> str:
    document = yaml.safe_load(text)
    for name in ("scrape_interval", "evaluation_interval"):
        if name in document.get("global", {}):
            document["global"][name] = QUICK
    for job in document.get("scrape_configs", []):
        for discovery in job["http_sd_configs"]:
            discovery["refresh_interval"] = QUICK
    for group in document.get("groups", []):
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = QUICK
    return yaml.safe_dump(document)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    started = Prometheus(tmp_path / "prometheus")
    yield started
    started.stop()


@pytest.fixture
def deployed(project: Project) -> Iterator[Reloaded]:
    each = Reloaded(project)
    yield each
    each.run("stop")
    eventually(lambda: not each.processes())


def test_targets_come_by_themselves_and_a_dead_engine_is_an_alert(deployed: Reloaded, prometheus: Prometheus) -> None:
    slow = {"env": {"FAKE_ENGINE": json.dumps({"ready_after": 6})}}  # so that nobody misses that it is away
    deployed.engine("chat", **slow)
    deployed.engine("vectors", type="embedding")
    deployed.engine("late", enabled=False)
    deployed.start()
    prometheus.start(prometheus_files(deployed.project.load({"VLLM_API_KEY": API_KEY})))
    up = {("router", ""): 1.0, ("chat", "chat"): 1.0, ("embedding", "vectors"): 1.0}
    eventually(lambda: prometheus.ask("up") == up, 60)
    eventually(lambda: prometheus.ask("model:vllm_unified_waiting:sum").keys() == {("", "chat"), ("", "vectors")}, 60)
    assert prometheus.ask("vllm:num_requests_running").keys() == {("chat", "chat"), ("embedding", "vectors")}
    ready = {("router", "chat"): 1.0, ("router", "vectors"): 1.0}
    assert prometheus.ask('vllm_unified_engine_phase{phase="ready"}') == ready
    eventually(lambda: prometheus.ask('ALERTS{alertname=~"(Model|Router).*"}') == {})  # once the router was found

    deployed.models["late"]["enabled"] = True
    assert deployed.reload().returncode == 0
    eventually(lambda: prometheus.ask("up") == {**up, ("chat", "late"): 1.0}, 60)

    os.kill(deployed.pids()["chat"], signal.SIGKILL)
    eventually(lambda: prometheus.ask('up{model="chat"}') == {("chat", "chat"): 0.0}, 60)
    firing = 'ALERTS{alertname="ModelDown",alertstate="firing"}'
    eventually(lambda: prometheus.ask(firing) == {("", "chat"): 1.0}, 60)
    eventually(lambda: prometheus.ask(firing) == {}, 60)  # its keeper has restarted it
    eventually(lambda: prometheus.ask('up{model="chat"}') == {("chat", "chat"): 1.0}, 60)
    assert prometheus.ask("vllm_unified_engine_downtime_seconds")["router", "chat"] > 6
    assert prometheus.ask("vllm_unified_engine_restarts_total > 0") == {("router", "chat"): 1.0}
