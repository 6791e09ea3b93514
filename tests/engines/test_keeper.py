"""A real keeper in a process of its own, over the fake engine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import API_KEY, CHECKOUT, FAKE_ENGINE, Project, eventually, free_port, listening
from vllm_unified import state
from vllm_unified.engines.keeper import is_healthy
from vllm_unified.state import EngineState, Phase


class Keepers:
    """Starts keepers of one project and looks at them from outside."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.started: list[subprocess.Popen[bytes]] = []

    def configure(self, models: dict[str, dict[str, Any]], **sections: Any) -> None:
        """`models`: key → behaviour of the fake engine, and `field:NAME` for fields of the entry."""
        entries: dict[str, Any] = {}
        for key, behaviour in models.items():
            fields = {name[6:]: value for name, value in behaviour.items() if name.startswith("field:")}
            faked = {name: value for name, value in behaviour.items() if not name.startswith("field:")}
            entries[key] = {
                "name": key,
                "type": "chat",
                "port": free_port(),
                "engine_args": {"kv-cache-memory-bytes": "1M"},
                "env": {"FAKE_ENGINE": json.dumps(faked)},
                **fields,
            }
            self.project.model_folder(key)
        self.project.write(entries, **sections)
        self.entries = entries

    def start(self, key: str) -> "subprocess.Popen[bytes]":
        environ = {
            **os.environ,
            "VLLM_UNIFIED_HOME": str(self.project.home),
            "VLLM_UNIFIED_ENGINE_PROGRAM": FAKE_ENGINE,
            "VLLM_API_KEY": API_KEY,
        }
        process = subprocess.Popen([sys.executable, "-m", "vllm_unified", "engine", key], env=environ, cwd=CHECKOUT)
        self.started.append(process)
        return process

    def state(self, key: str) -> EngineState:
        return state.read(self.project.home / "run", key)

    def until(self, key: str, phase: Phase, seconds: float = 20.0) -> EngineState:
        eventually(lambda: self.state(key).phase is phase, seconds)
        return self.state(key)

    def group(self, key: str) -> list[psutil.Process]:
        engine = self.state(key).engine
        assert engine is not None
        return [each for each in psutil.process_iter() if os.getpgid(each.pid) == engine.pid]

    def log(self, key: str) -> str:
        return (self.project.home / "run" / "logs" / f"{key}.log").read_text()

    def left_over(self) -> list[psutil.Process]:
        """Whatever still runs of this project."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mark = process.environ().get("VLLM_UNIFIED_ENGINE", "")
                if mark.startswith(f"{self.project.home}:") and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@pytest.fixture
def keepers(project: Project) -> Iterator[Keepers]:
    started = Keepers(project)
    yield started
    for process in started.started:
        process.send_signal(signal.SIGTERM)
    for process in started.started:
        process.wait(60)
    eventually(lambda: not started.left_over())


def test_a_whole_life(keepers: Keepers) -> None:
    keepers.configure({"a": {"ready_after": 0.5, "children": 2}})
    process = keepers.start("a")
    starting = keepers.until("a", Phase.STARTING)
    assert starting.ready_after is None
    ready = keepers.until("a", Phase.READY)
    assert ready.ready_after is not None
    assert 0.5 <= ready.ready_after < 10
    assert ready.devices == ("CPU",)
    assert is_healthy(keepers.project.load().engine_url(keepers.project.load().models[0]))
    assert len(keepers.group("a")) == 3
    scratch = Path(str(ready.scratch))
    assert scratch.is_dir()

    process.terminate()
    assert process.wait(20) == 0
    assert keepers.state("a").phase is Phase.STOPPED
    assert keepers.left_over() == []
    assert not scratch.exists()
    assert "fake engine:" in keepers.log("a")


def test_a_crashed_engine_is_restarted_and_leaves_no_orphan(keepers: Keepers) -> None:
    """As SIGKILL of vLLM's API server does, which leaves its EngineCore and workers running."""
    keepers.configure({"a": {"children": 2}})
    keepers.start("a")
    first = keepers.until("a", Phase.READY)
    before = keepers.group("a")
    assert first.engine is not None
    os.kill(first.engine.pid, signal.SIGKILL)
    eventually(lambda: keepers.state("a").restarts == 1 and keepers.state("a").phase is Phase.READY)
    assert not any(process.is_running() for process in before)
    second = keepers.state("a")
    assert second.engine != first.engine
    assert "killed by SIGKILL" in keepers.log("a")


def test_failures_back_off_and_tell_the_reason(keepers: Keepers) -> None:
    keepers.configure({"a": {"fail": "ValueError: no such thing"}})
    keepers.start("a")
    failed = eventually(lambda: (now := keepers.state("a")).restarts >= 3 and now.phase is Phase.BACKOFF and now)
    assert failed.reason == "ValueError: no such thing (exit code 1)"
    assert failed.retry_at is not None
    assert 2.5 < failed.retry_at - failed.since <= 4.1


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.READY])
def test_an_engine_that_ignores_sigterm_is_killed(keepers: Keepers, phase: Phase) -> None:
    slow = {"ready_after": 30} if phase is Phase.STARTING else {}
    keepers.configure({"a": {"ignore_sigterm": True, "children": 1, **slow}}, system={"drain_timeout": 0})
    process = keepers.start("a")
    keepers.until("a", phase)
    eventually(lambda: len(keepers.group("a")) == 2)
    began = time.monotonic()
    process.terminate()
    assert process.wait(30) == 0
    assert time.monotonic() - began < (5 if phase is Phase.STARTING else 20)
    assert keepers.left_over() == []


def test_a_killed_keeper_takes_its_engine_with_it(keepers: Keepers) -> None:
    keepers.configure({"a": {}})
    process = keepers.start("a")
    keepers.until("a", Phase.READY)
    process.kill()
    process.wait()
    assert keepers.state("a").phase is Phase.STOPPED
    eventually(lambda: not keepers.left_over())


def test_the_next_keeper_ends_what_a_killed_one_left(keepers: Keepers) -> None:
    keepers.configure({"a": {"ignore_sigterm": True, "children": 2}}, system={"drain_timeout": 0})
    process = keepers.start("a")
    first = keepers.until("a", Phase.READY)
    process.kill()
    process.wait()
    assert len(keepers.left_over()) == 3
    keepers.start("a")
    second = keepers.until("a", Phase.READY)
    assert second.engine != first.engine
    assert second.restarts == 0
    assert "left behind by a killed keeper" in keepers.log("a")
    assert len(keepers.left_over()) == 3


def test_one_start_at_a_time_on_a_device(keepers: Keepers) -> None:
    keepers.configure({"a": {"ready_after": 1}, "b": {"ready_after": 1}, "c": {"ready_after": 1}})
    for key in "abc":
        keepers.start(key)
    seen: set[str] = set()

    def all_ready() -> bool:
        phases = [keepers.state(key).phase for key in "abc"]
        assert phases.count(Phase.STARTING) <= 1
        seen.update(phases)
        return phases == [Phase.READY] * 3

    eventually(all_ready, 30)
    assert {Phase.WAITING, Phase.STARTING} <= seen


def test_a_keeper_that_waits_for_its_device_stops_at_once(keepers: Keepers) -> None:
    keepers.configure({"a": {"ready_after": 20}, "b": {}})
    keepers.start("a")
    keepers.until("a", Phase.STARTING)
    waiting = keepers.start("b")
    keepers.until("b", Phase.WAITING)
    waiting.terminate()
    assert waiting.wait(5) == 0


def test_a_start_that_takes_too_long_is_ended(keepers: Keepers) -> None:
    keepers.configure({"a": {"ready_after": 30, "children": 1, "field:startup_timeout": 1.0}})
    keepers.start("a")
    assert keepers.until("a", Phase.BACKOFF).reason == "not ready after 1 s (startup_timeout)"
    assert keepers.left_over() == []


def test_a_port_taken_by_a_stranger_and_freed(keepers: Keepers) -> None:
    keepers.configure({"a": {}})
    port = keepers.entries["a"]["port"]
    with listening(port):
        keepers.start("a")
        assert keepers.until("a", Phase.BACKOFF).reason == f"port {port} on 127.0.0.1: address already in use"
    keepers.until("a", Phase.READY)


def test_a_folder_that_is_missing_and_comes_back(keepers: Keepers) -> None:
    keepers.configure({"a": {}})
    folder = keepers.project.home / "models" / "a"
    folder.rename(folder.with_name("away"))
    keepers.start("a")
    assert "no such folder" in str(keepers.until("a", Phase.BACKOFF).reason)
    folder.with_name("away").rename(folder)
    keepers.until("a", Phase.READY)


def test_a_program_that_is_not_there(keepers: Keepers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.engines.test_keeper.FAKE_ENGINE", "/no/such/vllm serve")
    keepers.configure({"a": {}})
    keepers.start("a")
    reason = keepers.until("a", Phase.BACKOFF).reason
    assert reason == "/no/such/vllm: no such file or directory; is vLLM installed?"


def test_stopped_in_the_middle_of_a_back_off(keepers: Keepers) -> None:
    keepers.configure({"a": {"fail": "x"}})
    process = keepers.start("a")
    eventually(lambda: keepers.state("a").restarts >= 4)
    keepers.until("a", Phase.BACKOFF)
    process.terminate()
    assert process.wait(3) == 0
    assert keepers.state("a").phase is Phase.STOPPED


def test_a_second_keeper_of_the_same_engine_is_refused(keepers: Keepers) -> None:
    keepers.configure({"a": {}})
    keepers.start("a")
    first = keepers.until("a", Phase.READY)
    assert keepers.start("a").wait(10) == 1
    assert keepers.state("a") == first


def test_a_proxy_of_the_environment_is_for_the_world_outside(keepers: Keepers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    keepers.configure({"a": {}})
    keepers.start("a")
    keepers.until("a", Phase.READY)


def test_what_left_the_engines_group_ends_too(keepers: Keepers) -> None:
    keepers.configure({"a": {"children": 1, "children_in_sessions": 2}})
    process = keepers.start("a")
    keepers.until("a", Phase.READY)
    eventually(lambda: len(keepers.left_over()) == 4)
    process.terminate()
    assert process.wait(20) == 0
    assert keepers.left_over() == []


def test_a_state_file_that_cannot_be_read_counts_as_stopped(project: Project) -> None:
    run = project.home / "run"
    (run / "engines").mkdir(parents=True)
    for text in ("", "{}", '{"phase": "asleep"}', "[]", "\x00"):
        (run / "engines" / "a.json").write_text(text)
        assert state.read(run, "a").phase is Phase.STOPPED
