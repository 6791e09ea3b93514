"""The real Nginx in front of the real router, which has fake engines behind it."""

import json
import os
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import API_KEY, CHECKOUT, Project, eventually, free_port
from tests.router.conftest import Deployment, is_listening
from vllm_unified.supervision.nginx import nginx_files

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin") or "nginx"


def write_nginx(project: Project, **variables: str) -> Path:
    """Render it, and return the path of nginx.conf. `variables`: of the environment."""
    for name in ("nginx.conf", "maintenance.html"):
        if not (project.home / "config" / name).exists():
            shutil.copy(CHECKOUT / "config" / name, project.home / "config")
    settings = project.load({"VLLM_API_KEY": API_KEY, **variables})
    folder = settings.rendered / "nginx"
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in nginx_files(settings).items():
        (folder / path).write_text(text)
    return folder / "nginx.conf"


class Nginx:
    """A running one; it ends with the `with`. `tls`: the authority that signed its certificate."""

    def __init__(self, project: Project, tls: Path | None = None) -> None:
        self.project = project
        self.port, self.tls_port = free_port(), free_port()
        self.authority = tls
        self.log = project.home / "nginx.log"

    def __enter__(self) -> "Nginx":
        ports = {"VLLM_NGINX_PORT": str(self.port), "VLLM_NGINX_TLS_PORT": str(self.tls_port)}
        self.start(write_nginx(self.project, **ports))
        return self

    def start(self, conf: Path) -> None:
        self.conf = conf
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self.command("-g", "daemon off;"), stdout=log, stderr=log)
        try:
            eventually(lambda: is_listening(self.port))
        except AssertionError:
            self.stop()
            raise AssertionError(self.log.read_text()) from None

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(20)

    def command(self, *options: str) -> list[str]:
        return [NGINX, "-e", "stderr", "-c", str(self.conf), *options]

    def reload(self) -> None:
        """Until new workers answer; the old ones end when their last request has."""
        old = self.workers
        subprocess.run(self.command("-s", "reload"), check=True, capture_output=True)
        eventually(lambda: set(self.workers) - set(old))

    @property
    def workers(self) -> list[int]:
        return [child.pid for child in psutil.Process(self._process.pid).children()]

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.tls_port}" if self.authority else f"http://127.0.0.1:{self.port}"

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Of the access log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def client(self, key: str | None = API_KEY, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        if self.authority:
            options["verify"] = ssl.create_default_context(cafile=str(self.authority))
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, **options)


@pytest.fixture
def deployment(project: Project) -> Iterator[Deployment]:
    started = Deployment(project)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A model with a fake engine; one whose engine a test has to bring; documents, whose service it brings too."""
    home = tmp_path_factory.mktemp("project")
    (home / "config").mkdir()
    started = Deployment(Project(home))
    models: dict[str, dict[str, Any]] = {
        "chat": {"type": "chat"},
        "raw": {"type": "chat", "fake": None},
        "reader": {"type": "ocr", "fake": None},
    }
    started.ports["documents"] = free_port()
    started.start(models, {"port": started.ports["documents"], "max_upload_mib": 128})
    yield started
    started.stop()


@pytest.fixture(scope="module")
def nginx(site: Deployment) -> Iterator[Nginx]:
    """In front of the site, as long as the site is there."""
    with Nginx(site.project) as started:
        yield started
