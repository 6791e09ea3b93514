"""The true Dockerfile, built by build.sh, and the four demonstration models in its container, on the Docker engine
that `docker info` reaches."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import CHECKOUT, free_port
from tests.containers import stand_in

KEYS = ("chat", "embedding", "rerank", "ocr")
NAME = "vllm-unified-test"
IMAGE = f"{NAME}:latest"
# Stands in the pip.conf that the build is lent, where a password could.
SECRET = "of-the-index-6b1f0c"
TIMES: list[tuple[str, float]] = []


def run(*command: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, **options)


def docker(*arguments: str | Path) -> str:
    done = run("docker", *arguments)
    assert done.returncode == 0, f"docker {arguments}: {done.stdout}\n{done.stderr}"
    return done.stdout


def build(*options: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return run(CHECKOUT / "build.sh", "--cpu", "--name", NAME, *options, env={**os.environ, **environ})


@dataclass
class Built:
    """`printed`: by build.sh. `pip_conf`: what its pip was configured with."""

    image: str
    printed: str
    pip_conf: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    base = _base_image()
    if run("docker", "image", "inspect", base).returncode:
        with timed(f"stand-in for {base}"):
            stand_in.make(base)
    pip_conf = tmp_path_factory.mktemp("pip") / "pip.conf"
    pip_conf.write_text(f"# {SECRET}\n{_own_pip_conf()}")
    with timed("build.sh, all layers new"):
        done = build("--no-cache", PIP_CONFIG_FILE=str(pip_conf))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return Built(IMAGE, done.stdout, pip_conf)


def _base_image() -> str:
    command = ["bash", "-c", 'source scripts/versions.env && echo "$CPU_IMAGE"']
    return run(*command, cwd=CHECKOUT).stdout.strip()


def _own_pip_conf() -> str:
    """This machine's, which may be all that leads to an index."""
    candidates = (os.environ.get("PIP_CONFIG_FILE"), Path("~/.config/pip/pip.conf").expanduser(), "/etc/pip.conf")
    found = next((Path(each) for each in candidates if each and Path(each).is_file()), None)
    return found.read_text() if found else ""


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    TIMES.append((what, time.monotonic() - began))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TIMES:
        terminalreporter.section("the image: seconds")
    for what, seconds in TIMES:
        terminalreporter.write_line(f"{seconds:6.1f} s  {what}")


@dataclass
class Deployment:
    """`home`: with config/ and .env, where compose is called."""

    home: Path
    ports: dict[str, int]

    def compose(self, *arguments: str) -> str:
        files = (
            CHECKOUT / "docker-compose.yml",
            CHECKOUT / "docker-compose.cpu.yml",
            CHECKOUT / "tests/containers/compose.yml",
        )
        named = [word for file in files for word in ("--file", str(file))]
        command: list[str | Path] = ["docker", "compose", "--project-directory", self.home, *named, *arguments]
        done = run(*command, env={**os.environ, "VLLM_UNIFIED_CONFIG": "config/models.demo.json"})
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def up(self) -> None:
        self.compose("up", "--detach", "--wait", "--wait-timeout", "600")

    def inside(self, *command: str) -> str:
        return docker("exec", NAME, *command)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.inside("vllm-unified", "status", "--json"))
        return document

    def api_key(self) -> str:
        return self.inside("sed", "-n", "s/^VLLM_API_KEY=//p", "data/.env").strip()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def openai(self, name: str = "router") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url(name)}/v1", api_key=self.api_key(), max_retries=0)

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.api_key()}"}
        return httpx.Client(base_url=self.url("router"), headers=headers, timeout=120)


@pytest.fixture(scope="session")
def deployment(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("compose")
    shutil.copytree(CHECKOUT / "config", home / "config")
    deployment = Deployment(home, {name: free_port() for name in ("router", *KEYS)})
    variables = {
        "VLLM_UNIFIED_IMAGE": built.image,
        "VLLM_UNIFIED_MODELS": str(CHECKOUT / "models"),
        **{f"VLLM_{name.upper()}_PORT": str(port) for name, port in deployment.ports.items()},
    }
    (home / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    deployment.compose("down", "--volumes")
    try:
        with timed("docker compose up --wait, four engines on an empty cache"):
            deployment.up()
        yield deployment
    finally:
        print(run("docker", "logs", NAME).stdout[-20_000:])
        deployment.compose("down", "--volumes")
