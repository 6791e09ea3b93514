"""The two programs: the fake engine, which stands in for the router too, and the service in front of it."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil

from benchmarks.demo import API_KEY, CHECKOUT
from benchmarks.router.programs import BenchmarkError, Server, free_ports, serving

FAKE_OCR = CHECKOUT / "tests" / "documents" / "fake_ocr.py"
MODEL = "deepseek-ocr"
LOOK_SECONDS = 0.1
LONGEST_SECONDS = 1800.0


@dataclass(frozen=True)
class Engine:
    """Its own count is what pages a second, and pages read twice, are told from."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def behave(self, *, latency: float, concurrency: int) -> None:
        """From now on; what it saw before is forgotten."""
        said = {"model": MODEL, "latency": latency, "concurrency": concurrency}
        httpx.post(f"{self.url}/behave", json=said, timeout=30).raise_for_status()

    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = httpx.get(f"{self.url}/seen", timeout=30).raise_for_status().json()
        return seen

    def pages_per_second(self, pages: int, began: float) -> float:
        """Until the last answer. Raises BenchmarkError where it gave more or fewer answers than there are pages."""
        answered: list[float] = [each["answered"] for each in self.seen()["requests"] if each["status"] == 200]
        if len(answered) != pages:
            raise BenchmarkError(f"the engine answered {len(answered)} times, for {pages} pages")
        return pages / (max(answered) - began)


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    (port,) = free_ports(1)
    found = Engine(port)
    command = [sys.executable, str(FAKE_OCR), "--port", str(port)]
    with serving(command, {}, folder / "engine.log", lambda: _answers(found.url)):
        yield found


@dataclass(frozen=True)
class Service:
    """One that runs, with its data in `home`."""

    home: Path
    port: int
    server: Server

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {API_KEY}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=120)

    def send(self, pdf: Path, **fields: str) -> str:
        """The task's id."""
        with self.client() as client, pdf.open("rb") as file:
            answer = client.post("/api/ocr/pdf", files={"pdf": file}, data=fields).raise_for_status()
            task: str = answer.json()["task_id"]
            return task

    def delete(self, task: str) -> None:
        with self.client() as client:
            client.delete(f"/api/tasks/{task}").raise_for_status()

    def wait_for_pages(self, task: str, count: int) -> None:
        """Until so many were read."""
        self._wait(task, lambda progress, _: progress["pages_completed"] >= count)

    def wait_for_end(self, task: str) -> None:
        """Until its products are there."""
        self._wait(task, lambda _, status: status == "succeeded")

    def _wait(self, task: str, is_there: Callable[[dict[str, Any], str], bool]) -> None:
        """Raises BenchmarkError where the task, or a page of it, fails."""
        deadline = time.monotonic() + LONGEST_SECONDS
        with self.client() as client:
            while time.monotonic() < deadline:
                found = client.get("/api/tasks?limit=1").raise_for_status().json()["tasks"][0]
                progress, status = found["progress"], found["status"]
                if found["task_id"] != task or status == "failed" or progress["pages_failed"]:
                    raise BenchmarkError(f"the task failed: {found}; {self._log()}")
                if is_there(progress, status):
                    return
                time.sleep(LOOK_SECONDS)
        raise BenchmarkError(f"the task took longer than {LONGEST_SECONDS:g} s; {self._log()}")

    def _log(self) -> str:
        return f"the service's log ends:\n{(self.home / 'service.log').read_text(errors='replace')[-1500:]}"

    def kill(self) -> None:
        """As the kernel does when memory is short: nothing is tidied up."""
        self.server.process.send_signal(signal.SIGKILL)
        self.server.process.wait()

    def pages_on_the_disk(self) -> set[int]:
        """Numbers of those that its database has as read. Of a copy: who opens one after a kill also mends it."""
        with tempfile.TemporaryDirectory() as folder:
            for file in (self.home / "data" / "documents").glob("documents.db*"):
                shutil.copy(file, folder)
            with contextlib.closing(sqlite3.connect(Path(folder) / "documents.db")) as database:
                return {number for (number,) in database.execute("SELECT number FROM pages WHERE state = 'done'")}

    def rss_mb(self) -> tuple[float, float]:
        """Of the service, and of all its processes together, in MB of 10^6 bytes."""
        own = self.server.process.memory_info().rss
        others = 0
        for child in self.server.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                others += child.memory_info().rss
        return own / 1e6, (own + others) / 1e6


@contextlib.contextmanager
def service(home: Path, engine: Engine) -> Iterator[Service]:
    """Goes on with what an earlier one left in `home`."""
    (port,) = free_ports(1)
    config = home / "config"
    config.mkdir(parents=True, exist_ok=True)
    entry = {"name": "reader", "type": "ocr", "endpoints": ["http://127.0.0.1:9"]}
    settings = {"models": {"ocr": entry}, "router": {"port": engine.port}, "documents": {"port": port}}
    (config / "models.json").write_text(json.dumps(settings))
    environ = {"VLLM_UNIFIED_HOME": str(home), "VLLM_API_KEY": API_KEY, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "vllm_unified", "documents"]
    is_ready = lambda: _answers(f"http://127.0.0.1:{port}")  # noqa: E731
    with serving(command, environ, home / "service.log", is_ready) as server:
        yield Service(home, port, server)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


@contextlib.contextmanager
def repeatedly(*looks: tuple[Callable[[], None], float]) -> Iterator[None]:
    """Each in a thread of its own, with so many seconds between two; what one raises is raised at the end."""
    ending = Event()

    def repeat(look: Callable[[], None], seconds: float) -> None:
        while not ending.wait(seconds):
            look()

    with ThreadPoolExecutor(len(looks)) as pool:
        begun = [pool.submit(repeat, look, seconds) for look, seconds in looks]
        try:
            yield
        finally:
            ending.set()
        for each in begun:
            each.result()


def load_average() -> float:
    return round(os.getloadavg()[0], 2)


def percentile(values: Sequence[float], share: float) -> float:
    """The least of them that is not below that share of all."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
