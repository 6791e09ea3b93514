"""What a reload does to engines: on a real supervisord, with fake engines on the cards of a file."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import API_KEY, CHECKOUT, FAKE_ENGINE, TOPOLOGIES, Project, eventually, free_port, processes_with
from vllm_unified import state
from vllm_unified.errors import ConfigError, UserError
from vllm_unified.operations import Operations
from vllm_unified.settings.changes import changes
from vllm_unified.state import EngineState, Phase
from vllm_unified.supervision.ask import programs
from vllm_unified.supervision.programs import Programs


class Deployment:
    """On two cards of 80 GiB, of which each of its models takes more than half."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.ports = {key: free_port() for key in ("router", "a", "b", "c")}
        self.environ = {
            "PATH": "/usr/bin:/bin",
            "VLLM_UNIFIED_HOME": str(project.home),
            "VLLM_UNIFIED_ENGINE_PROGRAM": FAKE_ENGINE,
            "VLLM_UNIFIED_DEVICES": str(TOPOLOGIES / "2x80.json"),
            "VLLM_API_KEY": API_KEY,
        }
        self.operations = Operations(project.file, project.home, self.environ)

    @property
    def run(self) -> Path:
        return self.project.home / "run"

    def configure(self, *enabled: str, **fields: Any) -> None:
        """`fields`: more of the entry of one model."""
        entries = {
            key: {
                "name": key,
                "type": "chat",
                "port": self.ports[key],
                "gpu_memory_utilization": 0.6,
                "enabled": key in enabled,
                **fields.get(key, {}),
            }
            for key in "abc"
        }
        for key in entries:
            self.project.model_folder(key)
        self.project.write(entries, router={"port": self.ports["router"]}, system={"drain_timeout": 1})

    def start(self) -> "subprocess.Popen[bytes]":
        render = [sys.executable, "-m", "vllm_unified", "render"]
        subprocess.run(render, env=self.environ, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)
        command = [str(Path(sys.executable).parent / "supervisord"), "-n", "-c", str(self.run / "supervisord.conf")]
        supervisord = subprocess.Popen(command, env=self.environ, stdout=subprocess.DEVNULL)
        eventually(lambda: programs(self.run) is not None)
        return supervisord

    def state(self, key: str) -> EngineState:
        return state.read(self.run, key)

    def is_ready(self, key: str) -> bool:
        return self.state(key).phase is Phase.READY

    def places(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = json.loads((self.run / "placement.json").read_text())
        return found


@pytest.fixture
def deployment(project: Project) -> Iterator[Deployment]:
    """With "a" running, and "b" and "c" disabled."""
    each = Deployment(project)
    each.configure("a")
    supervisord = each.start()
    try:
        eventually(lambda: each.is_ready("a"), 60)
        yield each
    finally:
        supervisord.terminate()
        supervisord.wait(60)
    eventually(lambda: not processes_with("VLLM_UNIFIED_ENGINE", f"{project.home}:"))


def test_enabling_and_disabling(deployment: Deployment) -> None:
    operations = deployment.operations
    first = operations.load()
    assert deployment.places() == {"a": ["GPU-0"]}

    deployment.configure("a", "b")
    second = operations.load()
    assert changes(first, second).started == ["b"]
    operations.enable(second, "b")
    assert deployment.places() == {"a": ["GPU-0"], "b": ["GPU-1"]}
    eventually(lambda: deployment.is_ready("b"), 60)
    assert deployment.state("b").devices == ("GPU 1",)

    deployment.configure("a", "b", "c")
    pids = [deployment.state(key).engine for key in "ab"]
    with pytest.raises(ConfigError, match=r"has 80.0 GiB, asked for 98.0 .*; lower "):
        operations.enable(operations.load(), "c")
    assert deployment.places() == {"a": ["GPU-0"], "b": ["GPU-1"]}
    assert [deployment.state(key).engine for key in "ab"] == pids
    assert deployment.state("c").phase is Phase.STOPPED

    # "a" is still there while "c" is planned in its place.
    deployment.configure("b", "c")
    third = operations.load()
    found = changes(second, third)
    assert (found.started, found.stopped) == (["c"], ["a"])
    operations.enable(third, "c")
    operations.stop("a")
    assert deployment.state("a").phase is Phase.STOPPED
    assert deployment.places() == {"a": ["GPU-0"], "b": ["GPU-1"], "c": ["GPU-0"]}
    eventually(lambda: deployment.is_ready("c"), 60)
    assert deployment.state("b").engine == pids[1]

    # Where "a" was there is no room any more: its old place does not count.
    deployment.configure("a", "c")
    operations.stop("b")
    operations.enable(operations.load(), "a")
    assert deployment.places() == {"a": ["GPU-1"], "c": ["GPU-0"]}
    eventually(lambda: deployment.is_ready("a"), 60)
    assert deployment.state("a").devices == ("GPU 1",)


def test_start_stop_and_restart(deployment: Deployment) -> None:
    operations = deployment.operations
    first = deployment.state("a").keeper
    operations.start("a")
    assert deployment.state("a").keeper == first
    operations.restart("a")
    eventually(lambda: deployment.is_ready("a"), 60)
    assert deployment.state("a").keeper != first
    operations.stop("a")
    assert deployment.state("a").phase is Phase.STOPPED
    operations.stop("a")
    assert Programs(deployment.run).running() == frozenset()
    with pytest.raises(UserError, match=r'^supervisord knows no model "nobody" yet; ./deploy.sh restart tells it$'):
        operations.start("nobody")


def test_a_keeper_that_ends_at_once(deployment: Deployment) -> None:
    def said() -> str:
        began = time.monotonic()
        try:
            deployment.operations.start("b")  # which the file still disables
        except UserError as error:
            assert time.monotonic() - began < 30
            return str(error)
        deployment.operations.stop("b")  # on a busy machine it lives longer than the second that supervisord watches
        return ""

    assert eventually(said, 60) == "b: its keeper ended at once; run/logs/b.keeper.log says why"
    deployment.operations.stop("b")
    assert "models.b is disabled; enable it" in (deployment.run / "logs" / "b.keeper.log").read_text()


def test_without_supervisord(project: Project) -> None:
    deployment = Deployment(project)
    deployment.configure("a")
    operations = deployment.operations
    not_running = r"^supervisord is not running; start it with ./deploy.sh start$"
    for operation in (operations.start, operations.stop, operations.restart):
        with pytest.raises(UserError, match=not_running):
            operation("a")
    with pytest.raises(UserError, match=not_running):
        operations.enable(operations.load(), "a")
