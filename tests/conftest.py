"""A project folder that a test fills, and ports that nobody uses."""

import contextlib
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_unified.settings import Settings, load

CHECKOUT = Path(__file__).parents[1]
FAKE_ENGINE = f"{sys.executable} {CHECKOUT / 'tests' / 'fake_engine.py'}"
TOPOLOGIES = CHECKOUT / "tests" / "topologies"
AUTHORITY = CHECKOUT / "tests" / "settings" / "authority.pem"  # a certificate, in force until 2126
API_KEY = "sk-of-the-tests"

# A shell that starts the tests in the background has Ctrl-C ignored, by them and by all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Project:
    """A folder with config/, .env and run/."""

    home: Path

    @property
    def file(self) -> Path:
        return self.home / "config" / "models.json"

    def write(self, models: Any, **sections: Any) -> None:
        """`models` as in models.json, or the whole text of the file."""
        text = models if isinstance(models, str) else json.dumps({"models": models, **sections})
        self.file.write_text(text, encoding="utf-8")

    def write_defaults(self, text: str) -> None:
        (self.home / "config" / "vllm_config.yaml").write_text(text, encoding="utf-8")

    def load(self, environ: Mapping[str, str] | None = None) -> Settings:
        return load(self.file, self.home, environ or {})

    def model_folder(self, key: str, weights: float = 0, architecture: str | None = None) -> None:
        """`weights`: GiB, of a file without content."""
        folder = self.home / "models" / key
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"architectures": [architecture]} if architecture else {}))
        if weights:
            with (folder / "model.safetensors").open("wb") as file:
                file.truncate(int(weights * (1 << 30)))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    home = tmp_path / "project"
    (home / "config").mkdir(parents=True)
    return Project(home)


# Below those that the kernel gives to outgoing connections: the tests make thousands, and one of them could take the
# port before the server does that it is for. In another order in each run, so that two runs do not meet.
PORTS = itertools.cycle(random.sample(range(20_000, 32_000), 12_000))


def free_port() -> int:
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("unreachable: the ports go round")


@contextlib.contextmanager
def listening(port: int) -> Iterator[None]:
    """A stranger on the port."""
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        yield


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true value of `condition`; fails with its last value when none comes in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"did not come true in {seconds} s; last: {value!r}"
        time.sleep(0.05)
    return value


def processes_with(variable: str, beginning: str) -> list[psutil.Process]:
    """Those in whose environment `variable` begins so; zombies hold nothing any more."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(variable, "").startswith(beginning) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def command_line(process: psutil.Process) -> str:
    """Empty for one that has just ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and server.pem that it signed for 127.0.0.1; other-ca.pem, which signed nothing."""
    folder = tmp_path_factory.mktemp("certificates")
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    for name in ("ca", "other-ca"):
        openssl(folder, *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl(
        folder, *new, "-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1", "-addext",
        "basicConstraints=critical,CA:FALSE", "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "server.key", "-out",
        "server.pem",
    )  # fmt: skip
    return folder
