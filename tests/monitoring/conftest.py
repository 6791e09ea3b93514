"""A real Prometheus, which scraped the real router and document service under load, before engines that answer."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import API_KEY, AUTHORITY, CHECKOUT, TOPOLOGIES, Project, eventually, free_port
from tests.documents.fake_ocr import FakeOcr
from tests.documents.test_service import pdf_of
from tests.router.conftest import Deployment
from vllm_unified.monitoring.prometheus import Prometheus, Span
from vllm_unified.settings import Settings
from vllm_unified.settings.keys import add_key, hash_of
from vllm_unified.state import EngineState, Phase, Process
from vllm_unified.supervision.prometheus import prometheus_files

# What a vLLM 0.32 server told of a chat model under load, shortened.
VLLM = Path(__file__).parent / "vllm.txt"
LOAD_SECONDS = 6.0
# A label that nobody should give a model or an alert, and somebody will: with markup, a formula, and letters that turn
# the line around or end it.
HOSTILE = "_<script>alert(1)</script> $x$ \u202e\x07<b>&amp;\"'"
ALICE, BOB = "sk-of-alice", "sk-of-bob"
RULE = {"alert": "Always", "expr": "vector(1)", "labels": {"severity": "warning", "about": HOSTILE}}
# What only a driver of NVIDIA tells, and a model with a hostile name.
CARDS = """
vllm_unified_model_ready{model="HOSTILE"} 1
vllm_unified_gpu_utilization_ratio{gpu="0"} 0.62
vllm_unified_gpu_temperature_celsius{gpu="0"} 61
vllm_unified_gpu_temperature_limit_celsius{gpu="0"} 89
vllm_unified_gpu_power_watts{gpu="0"} 412
vllm_unified_engine_gpu_memory_bytes{model="chat"} 5.2e10
"""


@dataclass
class Scene:
    """`ended`: seconds since the epoch, when it had all been scraped."""

    url: str
    home: Path
    ended: float
    router_port: int

    @property
    def span(self) -> Span:
        return Span(self.ended - 120, self.ended)


@pytest.fixture(scope="session")
def asked(scene: Scene) -> Iterator[Prometheus]:
    with Prometheus(scene.url, scene.span) as prometheus:
        yield prometheus


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    project = Project(tmp_path_factory.mktemp("monitoring") / "project")
    (project.home / "config" / "tls").mkdir(parents=True)
    shutil.copy(AUTHORITY, project.home / "config" / "tls" / "cert.pem")
    deployment = Deployment(project)
    with contextlib.ExitStack() as stack:
        stack.callback(deployment.stop)
        ocr = stack.enter_context(FakeOcr(model="ocr", concurrency=4, latency=0.05, pages={"2": ["empty"] * 9}))
        cards = stack.enter_context(cards_exporter())
        start(deployment, ocr)
        stack.enter_context(keepers(project.home))
        stack.enter_context(documents(project))
        settings = project.load({"VLLM_API_KEY": API_KEY})
        url = stack.enter_context(prometheus(settings, cards, rules=[RULE]))
        load(deployment)
        yield Scene(url, project.home, scraped(url), deployment.ports["router"])


def start(deployment: Deployment, ocr: FakeOcr) -> None:
    home = deployment.project.home
    (home / ".env").write_text(f"VLLM_UNIFIED_DEVICES={TOPOLOGIES / '2x80.json'}\n")
    limits = {"requests_per_minute": 20, "tokens_per_day": 1000}
    created = datetime.now(UTC).replace(microsecond=0)
    for name, value in (("alice", ALICE), ("bob", BOB)):
        add_key(home, {"name": name, "hash": hash_of(value), "created": created, **limits})
    usage = {"prompt_tokens": 50, "completion_tokens": 20, "total_tokens": 70}
    fake = {"metrics": str(VLLM), "answer": {"choices": [], "usage": usage}, "busy_seconds": 0.1}
    deployment.start(
        {
            "chat": {"type": "chat", "max_concurrent": 2, "fake": fake},
            "embedding": {"type": "embedding", "fake": {**fake}},
            "ocr": {"type": "ocr", "endpoints": [ocr.url]},
        },
        documents={"port": free_port(), "retries": 1},
    )


@contextlib.contextmanager
def keepers(home: Path) -> Iterator[None]:
    """What they leave written of their engines; the router reads it, and what the engine's processes hold."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as engine:
        for key in ("chat", "embedding"):
            told = {"keeper": Process.of(os.getpid()), "engine": Process.of(engine.pid), "ready_after": 39.0}
            state = EngineState(key, Phase.READY, time.monotonic(), **told, restarts=1, hangs=1, down_for=61.0)  # type: ignore[arg-type]
            state.write(home / "run")
        try:
            yield
        finally:
            engine.kill()


@contextlib.contextmanager
def running(command: list[str], home: Path, log: str) -> Iterator[None]:
    environ = {"VLLM_UNIFIED_HOME": str(home), "VLLM_API_KEY": API_KEY, "PATH": "/usr/bin"}
    with (home / log).open("ab") as file:
        process = subprocess.Popen(command, env=environ, cwd=CHECKOUT, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def documents(project: Project) -> Iterator[None]:
    port = project.load().documents.port
    with running([sys.executable, "-m", "vllm_unified", "documents"], project.home, "documents.log"):
        eventually(lambda: answers(f"http://127.0.0.1:{port}/health", 200, 503), 120)
        yield


@contextlib.contextmanager
def prometheus(settings: Settings, *targets: str, rules: Sequence[dict[str, Any]] = ()) -> Iterator[str]:
    """Its address. As it is rendered for a deployment, but each second, and with more targets and rules."""
    folder = settings.run / "rendered" / "prometheus"
    for path, text in prometheus_files(settings).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    config: dict[str, Any] = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        for discovery in job["http_sd_configs"]:
            discovery["refresh_interval"] = "1s"
    config["scrape_configs"].append({"job_name": "more", "static_configs": [{"targets": [*targets]}]})
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules" / "more.yml").write_text(yaml.safe_dump({"groups": [{"name": "more", "rules": [*rules]}]}))
    port = free_port()
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": settings.home / "data" / "prometheus",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    with running(command, settings.home, "prometheus.log"):
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: answers(f"{url}/-/ready", 200), 120)
        count = 2 + len(settings.engines) + len(targets)
        eventually(lambda: len(httpx.get(f"{url}/api/v1/targets").json()["data"]["activeTargets"]) == count, 60)
        yield url


def answers(url: str, *statuses: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code in statuses
    return False


@contextlib.contextmanager
def cards_exporter() -> Iterator[str]:
    class Exporter(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CARDS.replace("HOSTILE", HOSTILE.replace('"', r"\"")).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Exporter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def load(deployment: Deployment) -> None:
    """Streams, answers, vectors, refusals and documents, for some seconds."""
    until = time.monotonic() + LOAD_SECONDS
    chat = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
    requests: list[tuple[str, str, dict[str, Any]]] = [
        (API_KEY, "/v1/chat/completions", chat),
        (API_KEY, "/v1/chat/completions", {**chat, "stream": True}),
        (API_KEY, "/v1/chat/completions", {**chat, "model": "no-such-model"}),
        (BOB, "/v1/embeddings", {"model": "embedding", "input": "hi"}),
        (ALICE, "/v1/chat/completions", chat),  # its limit is soon met
    ]

    def ask(key: str, path: str, body: dict[str, Any]) -> None:
        with deployment.client(key) as client:
            while time.monotonic() < until:
                client.post(path, json=body)

    def read(count: int) -> None:
        with deployment.client() as client:
            sent = {"files": {"pdf": ("a.pdf", pdf_of(count))}, "params": {"wait": "30"}}
            client.post("/api/ocr/pdf", **sent).raise_for_status()  # type: ignore[arg-type]
            time.sleep(2)  # pages that are read between two scrapes

    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask, *each) for each in requests]
        asked += [pool.submit(read, count) for count in (3, 4)]
        for each in asked:
            each.result()


def scraped(url: str) -> float:
    """The time at which the last of the load is in Prometheus."""
    ended = time.time()
    newest: Callable[[], bool] = lambda: (  # noqa: E731
        float(
            httpx.get(f"{url}/api/v1/query", params={"query": "min(timestamp(up))"}).json()["data"]["result"][0][
                "value"
            ][1]
        )
        > ended + 1
    )
    eventually(newest, 30)
    return time.time()
