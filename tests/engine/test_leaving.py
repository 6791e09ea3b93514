"""The ends of a deployment, on the real vLLM. The tests run in their order."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import psutil

from tests.conftest import CHECKOUT, command_line, eventually
from tests.engine.conftest import HEADERS, KEYS, RECOVERIES, Demo, ports_and_environment
from vllm_unified.state import Phase


def test_a_second_start_while_starting(demo: Demo) -> None:
    second = demo.second_start
    assert second is not None
    assert second.returncode in (0, 1)
    expected = (
        "already running; waiting until it is ready" if second.returncode == 0 else "another ./deploy.sh is at work"
    )
    assert expected in second.stdout + second.stderr


def test_stop_while_streams_run(demo: Demo) -> None:
    """They finish, new requests are refused, and nothing is left."""
    group = [demo.pid(key) for key in KEYS]
    scratch = [demo.state(key).scratch for key in KEYS]
    with Streams(demo, "router", "chat") as streams:
        stopping = subprocess.Popen([CHECKOUT / "deploy.sh", "stop"], env=demo.environ, stdout=subprocess.DEVNULL)
        eventually(lambda: demo.state("chat").phase is Phase.DRAINING, 10)
        time.sleep(0.5)
        refused = demo.ask("chat")
        assert refused.status_code == 503
        assert "stopping" in refused.json()["error"]["message"]
    assert streams.whole == {"router": True, "chat": True}
    assert stopping.wait(120) == 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            assert os.getpgid(process.pid) not in group
    assert demo.processes() == []
    left = {path.name for path in demo.run_folder.iterdir()}
    assert left <= {"logs", "cache", "supervisord.conf"}
    assert not any(Path(str(each)).exists() for each in scratch)


class Streams:
    """A long stream through each door; `whole` says which of them came to its end."""

    TOKENS = 1500

    def __init__(self, demo: Demo, *doors: str) -> None:
        self.demo = demo
        self.whole: dict[str, bool] = {}
        self.begun = {door: threading.Event() for door in doors}
        self.threads = [threading.Thread(target=self._read, args=(door,)) for door in doors]

    def __enter__(self) -> "Streams":
        for thread in self.threads:
            thread.start()
        for begun in self.begun.values():
            assert begun.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self.threads:
            thread.join()

    def _read(self, door: str) -> None:
        body = {"model": "demo-chat", "prompt": "x", "max_tokens": self.TOKENS, "ignore_eos": True, "stream": True}
        lines = []
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream(
                "POST", f"{self.demo.url(door)}/completions", json=body, headers=HEADERS, timeout=60
            ) as answer,
        ):
            for line in answer.iter_lines():
                self.begun[door].set()
                lines.append(line)
        self.whole[door] = "data: [DONE]" in lines


def test_supervisord_told_to_end_during_a_warm_up(tmp_path: Path) -> None:
    home = tmp_path / "warm-up"
    shutil.copytree(CHECKOUT / "config", home / "config")
    (home / "models").mkdir()
    (home / "models" / "demo").symlink_to(CHECKOUT / "models" / "demo")
    demo = Demo(home, *ports_and_environment(home))
    command = [str(CHECKOUT / "deploy.sh"), "start", "--demo"]
    starting = subprocess.Popen(command, env=demo.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: any("VLLM::" in command_line(each) for each in demo.engine_processes()), 180)
        began = time.monotonic()
        os.kill(int((demo.run_folder / "supervisord.pid").read_text()), signal.SIGTERM)
        eventually(lambda: demo.engine_processes() == [], 60)
        RECOVERIES.append(
            ("supervisord SIGTERMed during a warm-up: until nothing is left", time.monotonic() - began, [])
        )
        _, errors = starting.communicate(timeout=60)
        assert starting.returncode == 1
        assert "supervisord has ended" in errors
        eventually(lambda: demo.processes() == [], 30)
    finally:
        assert demo.run("stop").returncode == 0
