"""The demonstration on the real vLLM, started as a user starts it: by deploy.sh."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.collector import Collector
from tests.conftest import API_KEY, CHECKOUT, command_line, eventually, free_port, processes_with
from vllm_unified import state
from vllm_unified.engines import locks
from vllm_unified.state import EngineState, Phase, Process

KEYS = ("chat", "embedding", "rerank", "ocr")
HEADERS = {"authorization": f"Bearer {API_KEY}"}
# Quick, so that a test need not wait for what an operator should. Not quicker, because vLLM's worker spins for a second
# after each request, ours among them.
SYSTEM = {"progress_interval": 8, "progress_timeout": 5, "progress_misses": 2, "longest_backoff": 2}
SMALL = {
    "chat": ("/completions", {"model": "demo-chat", "prompt": "1", "max_tokens": 1}),
    "embedding": ("/embeddings", {"model": "demo-embedding", "input": "1"}),
    "rerank": ("/rerank", {"model": "demo-rerank", "query": "1", "documents": ["1"]}),
    "ocr": ("/completions", {"model": "demo-ocr", "prompt": "1", "max_tokens": 1}),
}
# time.time() plus what stands in a file, in every process of the deployment: a clock that can be made to step. The
# file is read twice a second, because vLLM's idle processes look at the clock thousands of times.
CLOCK = """
import time
_real, _offset, _read_at = time.time, 0.0, 0.0
def _stepped():
    global _offset, _read_at
    if time.monotonic() - _read_at > 0.5:
        _read_at = time.monotonic()
        try:
            with open({offset!r}) as file:
                _offset = float(file.read() or 0)
        except OSError:
            _offset = 0.0
    return _real() + _offset
time.time = _stepped
"""


# These leave nothing as it was.
LAST = ("test_faults.py", "test_leaving.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LAST.index(item.path.name) if item.path.name in LAST else -1)


@dataclass
class Demo:
    """`printed`: by the start. `second_start`: what a second start at the same time came to."""

    home: Path
    ports: dict[str, int]
    environ: dict[str, str]
    printed: str = ""
    second_start: "subprocess.CompletedProcess[str] | None" = None

    @property
    def run_folder(self) -> Path:
        return self.home / "run"

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [CHECKOUT / "deploy.sh", *arguments], env=self.environ, capture_output=True, text=True, timeout=600
        )

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return document

    def state(self, key: str) -> EngineState:
        return state.read(self.run_folder, key)

    def pid(self, key: str) -> int:
        engine = self.state(key).engine
        assert engine is not None
        return engine.pid

    def process(self, key: str, title: str) -> psutil.Process:
        """vLLM's EngineCore or Worker of a model."""
        children = psutil.Process(self.pid(key)).children(recursive=True)
        return next(child for child in children if title in command_line(child))

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}/v1"

    def client(self, name: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url(name), api_key=API_KEY, max_retries=0)

    def ask(self, key: str, door: str = "router") -> httpx.Response:
        """The smallest request that the model `key` answers."""
        path, body = SMALL[key]
        return httpx.post(f"{self.url(door)}{path}", json=body, headers=HEADERS, timeout=60)

    def processes(self) -> list[psutil.Process]:
        """All that runs of it."""
        return processes_with("VLLM_UNIFIED_HOME", str(self.home))

    def engine_processes(self) -> list[psutil.Process]:
        """vLLM's, known by the mark that a keeper gives them."""
        return processes_with("VLLM_UNIFIED_ENGINE", f"{self.home}:")

    @contextlib.contextmanager
    def surviving(
        self, fault: str, *keys: str, door: str = "router", is_back: Callable[[], bool] = lambda: True
    ) -> Iterator[None]:
        """The body makes the fault. Afterwards the models `keys` come back by themselves, the others never stopped
        answering, the states told the truth, and nothing is left over."""
        before = {key: self.state(key).engine for key in keys}
        others = [key for key in KEYS if key not in keys]
        with _Watch(self, others, door) as watch:
            yield
            began = time.monotonic()
            eventually(lambda: is_back() and all(self._is_back(key, before[key]) for key in keys), 240)
            seconds = time.monotonic() - began
        RECOVERIES.append((fault, seconds, [self.state(key).ready_after for key in keys]))
        assert watch.failures == []
        assert watch.lies == []
        for key in keys:  # the router hears of it within a quarter of a second
            eventually(lambda: self.ask(key).status_code == 200, 5)  # noqa: B023  (called at once)
        assert {"VLLM::EngineCore", "VLLM::Worker"} <= {each.name() for each in self.engine_processes()}, "the mark"
        current = {self.pid(key) for key in KEYS}
        eventually(lambda: {os.getpgid(each.pid) for each in self.engine_processes()} == current, 10)
        eventually(self._device_is_free, 5)  # a keeper says "ready" before it lets go of the device

    def _device_is_free(self) -> bool:
        with locks.owned(self.run_folder / "locks", "cpu") as free:
            return free

    def _is_back(self, key: str, before: Process | None) -> bool:
        now = self.state(key)
        return now.phase is Phase.READY and now.engine != before


RECOVERIES: list[tuple[str, float, list[float | None]]] = []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if RECOVERIES:
        terminalreporter.section("faults, and the seconds until all is back")
    for fault, seconds, starts in RECOVERIES:
        own = f"   (its own start: {', '.join(str(each) for each in starts)} s)" if starts else ""
        terminalreporter.write_line(f"{seconds:6.1f} s  {fault}{own}")


class _Watch:
    """Asks the models `keys` all the time, and compares every state with the processes that it speaks of."""

    def __init__(self, demo: Demo, keys: list[str], door: str) -> None:
        self.demo = demo
        self.keys = keys
        self.door = door
        self.failures: list[str] = []
        self.lies: list[str] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(key,)) for key in keys]
        self.threads.append(threading.Thread(target=self._compare))

    def __enter__(self) -> "_Watch":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, key: str) -> None:
        while not self.over.wait(4):  # vLLM's worker spins for a second after each request
            try:
                answer = self.demo.ask(key, key if self.door == "own" else self.door)
                if answer.status_code != 200:
                    self.failures.append(f"{key}: {answer.status_code} {answer.text}")
            except httpx.HTTPError as error:
                self.failures.append(f"{key}: {error!r}")

    def _compare(self) -> None:
        """READY of an engine that is gone, for longer than its keeper takes to see it, is a lie."""
        since: dict[str, float] = {}
        while not self.over.wait(0.05):
            for key in KEYS:
                said = self.demo.state(key)
                gone = said.phase is Phase.READY and not (said.engine and said.engine.is_alive())
                if not gone:
                    since.pop(key, None)
                elif time.monotonic() - since.setdefault(key, time.monotonic()) > 2:
                    self.lies.append(key)


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Of the demonstration's traces."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Demo]:
    """Its log folder is a small disk of its own where we may mount one, and its clock can be made to step."""
    home = tmp_path_factory.mktemp("demo")
    shutil.copytree(CHECKOUT / "config", home / "config")
    shutil.copytree(CHECKOUT / "models" / "demo", home / "models" / "demo")
    file = home / "config" / "models.demo.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "system": SYSTEM}))
    (home / "clock").mkdir()
    (home / "clock" / "sitecustomize.py").write_text(CLOCK.format(offset=str(home / "clock" / "offset")))
    logs = home / "run" / "logs"
    logs.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", logs], capture_output=True)
    demo = Demo(home, *ports_and_environment(home))
    demo.environ |= {"PYTHONPATH": str(home / "clock"), "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    try:
        _start_twice(demo)
        yield demo
    finally:
        demo.run("stop")
        subprocess.run(["umount", "--lazy", logs], capture_output=True)


def ports_and_environment(home: Path) -> tuple[dict[str, int], dict[str, str]]:
    ports = {name: free_port() for name in ("router", "documents", *KEYS)}
    environ = {
        **os.environ,
        "VLLM_UNIFIED_HOME": str(home),
        "VLLM_API_KEY": API_KEY,
        **{f"VLLM_{name.upper()}_PORT": str(port) for name, port in ports.items()},
    }
    return ports, environ


def _start_twice(demo: Demo) -> None:
    """The second time while the first is at it."""
    command = [str(CHECKOUT / "deploy.sh"), "start", "--demo", "--timeout", "600"]
    first = subprocess.Popen(command, env=demo.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    eventually(lambda: first.poll() is not None or demo.state("chat").phase is not Phase.STOPPED, 120)
    demo.second_start = demo.run("start", "--demo", "--timeout", "600")
    printed, errors = first.communicate()
    print(printed)
    assert first.returncode == 0, errors
    demo.printed = printed
