"""A real keeper in a process of its own, over the fake engine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import API_KEY, CHECKOUT, FAKE_ENGINE, Project, eventually, free_port, listening, processes_with
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
        return processes_with("VLLM_UNIFIED_ENGINE", f"{self.project.home}:")


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
    assert (first.down_for, second.hangs) == (None, 0)
    assert second.down_for is not None
    assert second.down_for >= 0.7  # the first pause after a failure, and then its start
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
    assert second.restarts == 1
    assert second.down_for is not None
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
    reason = str(keepers.until("a", Phase.BACKOFF).reason)
    assert reason.startswith("not ready after 1 s (startup_timeout); last: fake engine:")
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


HASTY = {"progress_interval": 0.2, "progress_timeout": 0.5, "progress_misses": 3}


def hang(keepers: Keepers, key: str) -> int:
    """As SIGSTOP of vLLM's EngineCore does: health and metrics go on, requests are never answered. Its pid."""
    engine = keepers.state(key).engine
    assert engine is not None
    os.kill(engine.pid, signal.SIGUSR1)
    return engine.pid


def ask(keepers: Keepers, key: str, seconds: float = 10) -> None:
    """One request; raises when it is not answered in time."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{keepers.entries[key]['port']}/v1/completions",
        b'{"model": "a"}',
        {"authorization": f"Bearer {API_KEY}"},
    )
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        assert answer.status == 200


def test_an_engine_that_hangs_while_idle_is_restarted(keepers: Keepers) -> None:
    keepers.configure({"a": {}}, system=HASTY)
    keepers.start("a")
    keepers.until("a", Phase.READY)
    pid = hang(keepers, "a")
    eventually(lambda: "no progress, 1 of 3" in (keepers.state("a").note or ""))
    assert keepers.state("a").phase is Phase.READY
    eventually(lambda: keepers.state("a").restarts == 1)
    assert keepers.state("a").reason == "hung: its server answers, but 3 looks of 0.5 s saw no progress"
    assert keepers.state("a").hangs == 1
    assert not psutil.pid_exists(pid)
    assert keepers.until("a", Phase.READY).note is None


def test_an_engine_that_hangs_with_requests_in_it_is_restarted(keepers: Keepers) -> None:
    keepers.configure({"a": {}}, system=HASTY)
    keepers.start("a")
    keepers.until("a", Phase.READY)
    hang(keepers, "a")
    began = time.monotonic()
    with pytest.raises(ConnectionError):
        ask(keepers, "a", seconds=60)
    assert time.monotonic() - began < 30, "its client is let go when it is ended"
    eventually(lambda: keepers.state("a").restarts == 1 and keepers.state("a").phase is Phase.READY)


def test_the_switch_for_the_progress_check(keepers: Keepers) -> None:
    keepers.configure({"a": {}}, system={**HASTY, "progress_check": False})
    keepers.start("a")
    keepers.until("a", Phase.READY)
    hang(keepers, "a")
    time.sleep(5)
    assert keepers.state("a").restarts == 0


@pytest.mark.parametrize("behaviour", [{"busy_seconds": 2.5}, {"no_metrics": True}])
def test_work_that_takes_long_is_no_hang(keepers: Keepers, behaviour: dict[str, Any]) -> None:
    """A prefill of minutes moves no counter; three misses in a row take longer."""
    keepers.configure({"a": behaviour}, system={**HASTY, "progress_timeout": 1.5})
    keepers.start("a")
    keepers.until("a", Phase.READY)
    for _ in range(3):
        ask(keepers, "a")
    assert keepers.state("a").restarts == 0


def test_real_traffic_replaces_our_own_requests(keepers: Keepers) -> None:
    keepers.configure({"a": {}}, system={**HASTY, "progress_interval": 1.0})
    keepers.start("a")
    keepers.until("a", Phase.READY)
    until = time.monotonic() + 6
    sent = 0
    while time.monotonic() < until:
        ask(keepers, "a")
        sent += 1
        time.sleep(0.1)
    assert len(requests_at(keepers, "a")) - sent == 1, "the first answer that made it ready"


def requests_at(keepers: Keepers, key: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{keepers.entries[key]['port']}/seen") as answer:
        seen: list[dict[str, Any]] = json.load(answer)["requests"]
    return seen


def test_its_own_requests_make_no_traces(keepers: Keepers, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM begins a trace for each request that brings no word of one."""
    for endpoint, expected in (("http://127.0.0.1:9", "-00"), ("", "")):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        keepers.configure({"a": {}})
        process = keepers.start("a")
        keepers.until("a", Phase.READY)
        (request,) = requests_at(keepers, "a")
        assert request["headers"].get("traceparent", "")[-3:] == expected
        process.terminate()
        process.wait(20)


def test_ready_is_when_a_first_request_is_answered(keepers: Keepers) -> None:
    keepers.configure({"a": {"refuse": 500, "field:type": "embedding"}, "b": {"hang": True}})
    keepers.start("a")
    reason = str(keepers.until("a", Phase.BACKOFF).reason)
    assert reason.startswith("its first answer is an error: /v1/embeddings answers 500:")
    assert "fake engine: refused" in reason
    slow = keepers.start("b")
    note = eventually(lambda: keepers.state("b").phase is Phase.STARTING and keepers.state("b").note)
    assert note == "answers its health check; asked for its first answer"
    slow.terminate()
    assert slow.wait(10) == 0


def test_the_order_of_priority(keepers: Keepers) -> None:
    """However they are started; and later among those that wait at the same time."""
    keepers.configure({"a": {"ready_after": 1}, "b": {"ready_after": 1}, "c": {"field:priority": 5, "ready_after": 1}})
    for key in "bac":
        keepers.start(key)
    assert order_of_starts(keepers) == ["c", "a", "b"]
    for engine in [keepers.state(key).engine for key in "abc"]:
        assert engine is not None
        os.kill(engine.pid, signal.SIGKILL)
    eventually(lambda: all(keepers.state(key).restarts for key in "abc"))
    assert order_of_starts(keepers).index("c") <= 1, "one may have come to wait before it"


def order_of_starts(keepers: Keepers) -> list[str]:
    ready = {key: keepers.until(key, Phase.READY, 40).since for key in "abc"}
    return sorted(ready, key=lambda key: ready[key])


def test_memory_is_waited_for_and_then_said(keepers: Keepers, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = keepers.project.home / "devices.json"

    def free(gib: float) -> None:
        devices.write_text(json.dumps({"devices": [{"kind": "cpu", "name": "x", "memory_gib": 64, "free_gib": gib}]}))

    monkeypatch.setenv("VLLM_UNIFIED_DEVICES", str(devices))
    free(1)
    keepers.configure({"a": {}})
    keepers.start("a")
    note = eventually(lambda: keepers.state("a").note)
    assert note == "waits for memory: CPU has 1.0 GiB free, 2.0 are needed"
    assert keepers.state("a").phase is Phase.WAITING
    free(32)
    keepers.until("a", Phase.READY)


def test_requests_in_flight_end_before_it_leaves(keepers: Keepers) -> None:
    keepers.configure({"a": {"busy_seconds": 3}})
    process = keepers.start("a")
    keepers.until("a", Phase.READY)
    failures: list[Exception] = []

    def client() -> None:
        try:
            ask(keepers, "a")
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    time.sleep(0.5)
    process.terminate()
    keepers.until("a", Phase.DRAINING, 5)
    thread.join()
    assert failures == []
    assert process.wait(20) == 0


def test_a_disk_that_is_full(keepers: Keepers) -> None:
    """The state is written over in place, the log loses lines, and nothing ends for it."""
    run = keepers.project.home / "run"
    run.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", run], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        keepers.configure({"a": {}})
        process = keepers.start("a")
        first = keepers.until("a", Phase.READY)
        with contextlib.suppress(OSError), (run / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        assert first.engine is not None
        os.kill(first.engine.pid, signal.SIGKILL)
        eventually(lambda: keepers.state("a").restarts == 1 and keepers.state("a").phase is Phase.READY)
        (run / "filler").unlink()
        process.terminate()
        assert process.wait(20) == 0
        assert keepers.state("a").phase is Phase.STOPPED
        assert "stopped" in keepers.log("a")
    finally:
        subprocess.run(["umount", "--lazy", run], check=True)


def has_restarted(keepers: Keepers, key: str, times: int) -> bool:
    return keepers.state(key).restarts >= times


def test_a_clock_that_steps(keepers: Keepers, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an hour, forth and back: nothing is restarted, given up or shown wrong for it."""
    folder = keepers.project.home / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, time\nreal = time.time\n"
        f"time.time = lambda: real() + float(open({str(folder / 'offset')!r}).read() or 0)\n"
    )
    (folder / "offset").write_text("0")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    keepers.configure({"a": {}, "b": {"fail": "x"}}, system={"longest_backoff": 1})
    keepers.start("a")
    keepers.start("b")
    first = keepers.until("a", Phase.READY)
    for offset in ("3600", "-3600"):
        (folder / "offset").write_text(offset)
        tried = keepers.state("b").restarts + 2
        eventually(partial(has_restarted, keepers, "b", tried))
        assert keepers.state("a") == first
    assert abs(state.wall_clock(first.since) - time.time()) < 60


def test_a_keeper_takes_little_memory(keepers: Keepers) -> None:
    keepers.configure({"a": {}})
    process = keepers.start("a")
    keepers.until("a", Phase.READY)
    assert psutil.Process(process.pid).memory_info().rss < 40 << 20


def test_why_there_is_no_keeper(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write({"a": {"name": "a", "type": "chat", "gpus": [0, 0]}})
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(project.home), "SUPERVISOR_ENABLED": "1"}
    command = [sys.executable, "-m", "vllm_unified", "engine", "a"]
    assert subprocess.run(command, env=environ, cwd=CHECKOUT, capture_output=True).returncode == 1
    assert "names a GPU twice" in str(state.read(project.home / "run", "a").reason)


def test_a_state_file_that_cannot_be_read_counts_as_stopped(project: Project) -> None:
    run = project.home / "run"
    (run / "engines").mkdir(parents=True)
    for text in ("", "{}", '{"phase": "asleep"}', "[]", "\x00"):
        (run / "engines" / "a.json").write_text(text)
        assert state.read(run, "a").phase is Phase.STOPPED
