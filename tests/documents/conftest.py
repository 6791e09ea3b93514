"""The real service in a process of its own, with a stand-in of the router and the OCR model before it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import API_KEY, CHECKOUT, Project, eventually, free_port
from tests.documents.fake_ocr import FakeOcr


class Served:
    """`url` of the service; `ask` is a client of it as the router is, in the name of a key."""

    def __init__(self, project: Project, ocr: FakeOcr, **documents: Any) -> None:
        self.project = project
        self.ocr = ocr
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.configure(**documents)

    def configure(self, **documents: Any) -> None:
        """For its next start."""
        entry = {"name": "reader", "type": "ocr", "endpoints": ["http://127.0.0.1:9"]}
        router = {"port": int(self.ocr.url.rpartition(":")[2])}
        self.project.write({"ocr": entry}, router=router, documents={"port": self.port, **documents})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.project.home / "documents.log"

    @property
    def folder(self) -> Path:
        return self.project.home / "data" / "documents"

    def start(self, **environ: str) -> None:
        given = {**os.environ, "VLLM_UNIFIED_HOME": str(self.project.home), "VLLM_API_KEY": API_KEY, **environ}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm_unified", "documents"], env=given, cwd=CHECKOUT, stdout=log, stderr=log
            )
        with self.client() as client:
            eventually(lambda: _is_up(client), 60)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(20)
            self.process = None

    def client(self, key: str = "alice", *, admin: bool = False, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {API_KEY}", "x-api-key-name": key, "x-api-key-admin": str(int(admin))}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code in (200, 503)
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def ocr() -> Iterator[FakeOcr]:
    with FakeOcr(model="deepseek-ocr", concurrency=4) as ocr:
        yield ocr


@pytest.fixture(scope="module")
def served(ocr: FakeOcr, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    project = Project(tmp_path_factory.mktemp("documents") / "project")
    (project.home / "config").mkdir(parents=True)
    served = Served(project, ocr)
    served.start()
    yield served
    served.kill(signal.SIGTERM)


@pytest.fixture
def fresh(ocr: FakeOcr, tmp_path: Path) -> Iterator[Served]:
    """One that was not started yet, for a test that has it to itself."""
    project = Project(tmp_path / "project")
    (project.home / "config").mkdir(parents=True)
    ocr.behave(model="deepseek-ocr", concurrency=4)
    served = Served(project, ocr)
    yield served
    served.kill(signal.SIGTERM)


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client
