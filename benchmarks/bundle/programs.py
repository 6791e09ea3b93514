"""What is run: commands, an empty Docker engine, a hub; and the content that they work on."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.bundle.hub import REPO
from benchmarks.demo import CHECKOUT
from benchmarks.router.programs import BenchmarkError, free_ports, serving

FILES = 4
BLOCK = 4 << 20
KEY = "weights"
BUNDLE = "knowflow-offline"
# Of all cores, in a second in which nothing of ours runs.
BUSY_PERCENT = 15.0


@dataclass(frozen=True)
class Project:
    """A home with one model of random bytes, as `vllm-unified` sees it."""

    home: Path

    @property
    def folder(self) -> Path:
        return self.home / "models" / KEY

    @property
    def weights(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.weights)

    def run(self, *arguments: str | Path, **environ: str) -> float:
        return run(
            [sys.executable, "-m", "vllm_unified", *arguments],
            cwd=CHECKOUT,
            environ={"VLLM_UNIFIED_HOME": str(self.home), **environ},
        )


def make_project(home: Path, size: int) -> Project:
    """`size`: bytes of weights; 0 for none. Its sums are in the manifest that `models import` writes."""
    (home / "config").mkdir(parents=True)
    entry = {"name": KEY, "type": "embedding", "repo": REPO, "source": "huggingface"}
    (home / "config" / "models.json").write_text(json.dumps({"models": {KEY: entry}}))
    project = Project(home)
    if size:
        brought = home / "brought"
        brought.mkdir()
        (brought / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
        for number in range(FILES):
            _write_random(brought / f"model-{number + 1:05}-of-{FILES:05}.safetensors", size // FILES)
        project.run("models", "import", brought, KEY, "--move")
    return project


def _write_random(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for start in range(0, size, BLOCK):
            file.write(os.urandom(min(BLOCK, size - start)))


@contextlib.contextmanager
def hub(folder: Path, log: Path) -> Iterator[str]:
    """Its address; it serves what is in the model's folder."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "benchmarks.bundle.hub", "--folder", str(folder), "--port", str(port)]
    with serving(command, {"PYTHONPATH": str(CHECKOUT)}, log, lambda: _lists(url)):
        yield url


def _lists(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/api/models/{REPO}", timeout=5) as answer:  # noqa: S310
        return bool(answer.status == 200)
    return False


@contextlib.contextmanager
def empty_engine(folder: Path) -> Iterator[str]:
    """The DOCKER_HOST of an engine without an image, which keeps everything in `folder`. Raises BenchmarkError."""
    if not shutil.which("dockerd") or os.geteuid() != 0:
        raise BenchmarkError("images are loaded into an engine of their own: that takes dockerd, and root to start it")
    folder.mkdir()
    host = f"unix://{folder / 'docker.sock'}"
    places = ("--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid", "-H", host)
    # In a network of its own: without a bridge it would remove that of the machine's engine.
    command = ["unshare", "--net", "dockerd", *map(str, places), "--bridge=none", "--iptables=false"]
    try:
        with serving(command, {}, folder / "log", lambda: _engine_answers(host)):
            yield host
    finally:
        shutil.rmtree(folder)


def _engine_answers(host: str) -> bool:
    return subprocess.run(["docker", "-H", host, "info"], capture_output=True).returncode == 0


def run(command: Sequence[str | Path], *, cwd: Path, environ: Mapping[str, str] | None = None) -> float:
    """Its seconds. Raises BenchmarkError where it fails."""
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(environ or {})}, capture_output=True, text=True, errors="replace"
    )
    seconds = time.monotonic() - began
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise BenchmarkError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{said}")
    return seconds


def shell(line: str, *, cwd: Path, **environ: str) -> float:
    return run(["bash", "-euo", "pipefail", "-c", line], cwd=cwd, environ=environ)


def forget(paths: Iterable[Path]) -> None:
    """The next one to read these files reads them from the disk."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_busy() -> bool:
    """Whether others work on this machine now. Takes a second."""
    return psutil.cpu_percent(interval=1.0) > BUSY_PERCENT
