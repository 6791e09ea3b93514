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
from tests.containers import companions, stand_in

KEYS = ("chat", "embedding", "rerank", "ocr")
COMPANIONS = ("nginx", "nginx_tls", "prometheus", "grafana")
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


@pytest.fixture(scope="session")
def companion_images() -> list[str]:
    """Of nginx, Prometheus and Grafana."""
    images = list(companions.names().values())
    if any(run("docker", "image", "inspect", image).returncode for image in images):
        with timed("stand-ins for nginx, Prometheus and Grafana"):
            companions.make()
    return images


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


# All of the project that a machine with Docker alone needs.
ON_THE_HOST = (
    "deploy.sh",
    "docker-compose.yml",
    "docker-compose.cpu.yml",
    "docker-compose.demo.yml",
    "scripts/lib.sh",
    "scripts/docker.sh",
    "scripts/versions.env",
    "config",
    "monitoring",
)


@dataclass
class Host:
    """A machine with Docker alone: `home` has deploy.sh and what it reads, and no Python environment."""

    home: Path
    name: str
    ports: dict[str, int]

    @classmethod
    def made(cls, home: Path, name: str, image: str, models: Path, **variables: str) -> "Host":
        for path in ON_THE_HOST:
            copy = shutil.copytree if (CHECKOUT / path).is_dir() else shutil.copy
            (home / path).parent.mkdir(exist_ok=True)
            copy(CHECKOUT / path, home / path)
        host = cls(home, name, {port: free_port() for port in ("router", *KEYS, *COMPANIONS)})
        all_variables = {
            "VLLM_UNIFIED_NAME": name,
            "VLLM_UNIFIED_IMAGE": image,
            "VLLM_UNIFIED_MODELS": str(models),
            **{f"VLLM_{port.upper()}_PORT": str(number) for port, number in host.ports.items()},
            **variables,
        }
        (home / ".env").write_text("".join(f"{name}={value}\n" for name, value in all_variables.items()))
        return host

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return run(self.home / "deploy.sh", *arguments, cwd=self.home.parent, stdin=subprocess.DEVNULL)

    def done(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def refused(self, *arguments: str) -> str:
        """What it says."""
        done = self.run(*arguments)
        assert done.returncode == 1, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stderr

    def inside(self, *command: str) -> str:
        return docker("exec", self.name, *command)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return document

    def states(self) -> dict[str, str]:
        return {key: each["state"] for key, each in self.status()["models"].items()}

    def api_key(self) -> str:
        return self.inside("sed", "-n", "s/^VLLM_API_KEY=//p", "data/.env").strip()

    def url(self, name: str = "router") -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def openai(self, name: str = "router", key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url(name)}/v1", api_key=key or self.api_key(), max_retries=0)

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.api_key()}"}
        return httpx.Client(base_url=self.url(), headers=headers, timeout=120)

    def clear(self) -> None:
        """After a test; the end of what it printed goes into the report."""
        print(run("docker", "logs", self.name).stdout[-20_000:])
        run("docker", "rm", "--force", self.name)
        self.run("stop")
        kinds = ("data", "cache", "rendered", "prometheus", "grafana")
        run("docker", "volume", "rm", *(f"{self.name}_vllm_{kind}" for kind in kinds))


@dataclass
class Demo(Host):
    """The demonstration, running. `printed`: by start."""

    printed: str = ""

    def beside(self, name: str, *command: str) -> str:
        return docker("exec", f"{self.name}-{name}", *command)

    def compose(self, *arguments: str) -> str:
        files = [self.home / f"docker-compose{name}.yml" for name in ("", ".cpu", ".demo")]
        named = [word for file in files for word in ("--file", str(file))]
        return docker("compose", "--project-directory", self.home, *named, *arguments)


@pytest.fixture(scope="module")
def demo(built: Built, companion_images: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    home = tmp_path_factory.mktemp("demo")
    nothing = home / "nothing"
    nothing.mkdir(mode=0o555)
    demo = Demo.made(home, NAME, built.image, nothing, COMPOSE_PROFILES="nginx,monitoring")
    assert isinstance(demo, Demo)
    try:
        with timed("./deploy.sh start --demo, four engines on an empty cache"):
            demo.printed = demo.done("start", "--demo", "--offline")
        yield demo
    finally:
        demo.clear()


# What the image is called that goes into a bundle.
BUNDLED = "vllm-unified-test-bundle"


class Sender:
    """Where bundles are made: `home` has one model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        shutil.copytree(CHECKOUT / "config", self.home / "config")
        shutil.copytree(CHECKOUT / "models/demo/minilm", self.home / "models/demo/minilm")
        demo = json.loads((CHECKOUT / "config/models.demo.json").read_text())
        (self.home / "config/models.json").write_text(
            json.dumps({"models": {"embedding": demo["models"]["embedding"]}})
        )

    def make(self, version: str, *options: str) -> str:
        environ = {**os.environ, "VLLM_UNIFIED_HOME": str(self.home), "VLLM_UNIFIED_IMAGE": f"{BUNDLED}:latest"}
        command = ("--version", version, "--output", str(self.folder / "dist"), *options)
        done = run(CHECKOUT / "build_offline_package.sh", *command, env=environ)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def unpack(self, version: str, into: Path) -> Path:
        """With the parts, in their order, and the command that the making ended with."""
        into.mkdir(exist_ok=True)
        parts = sorted((self.folder / "dist").glob(f"knowflow-offline-{version}.tar*"))
        subprocess.run(["sh", "-c", 'cat "$@" | tar x', "sh", *parts], cwd=into, check=True)
        return into / "knowflow-offline"


@pytest.fixture(scope="module")
def bundle(sender: Sender, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first bundle of the module's own `sender`, unpacked."""
    return sender.unpack("v1", tmp_path_factory.mktemp("bundle") / "on a stick")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is installed."""
    return tmp_path_factory.mktemp("opt") / "vllm unified"
