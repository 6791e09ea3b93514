"""`vllm-unified logs`, the program."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Project
from vllm_unified.logs.lines import line


@pytest.fixture
def written(project: Project) -> Path:
    folder = project.home / "run" / "logs"
    folder.mkdir(parents=True)
    now = time.time()
    with (folder / "chat.log").open("w") as file:
        for seconds in range(100, 0, -1):
            file.write(f"{line('error' if seconds == 70 else 'info', 'engine', f'{seconds} s', at=now - seconds)}\n")
    return project.home


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vllm_unified", "logs", *arguments]


def run(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(home)}
    return subprocess.run(command(*arguments), env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "first", "count"),
    [
        ((), "50 s", 50),
        (("chat", "--lines", "3"), "3 s", 3),
        (("--lines", "0"), None, 0),
        (("--since", "1m"), "5", None),
        (("--since", "1h"), "100 s", 100),
        (("--since", "1h", "--lines", "2"), "2 s", 2),
        (("--since", "2000-01-01T15:00"), "100 s", 100),
        (("--since", "2000-01-01"), "100 s", 100),
        (("--since", "2999-01-01T00:00:00Z"), None, 0),
        (("--errors",), "70 s", 1),
        (("--errors", "--since", "30s"), None, 0),
    ],
)
def test_what_is_chosen(written: Path, arguments: tuple[str, ...], first: str | None, count: int | None) -> None:
    done = run(written, *arguments, "--json")
    messages = [json.loads(each)["message"] for each in done.stdout.splitlines()]
    assert count is None or len(messages) == count, done.stderr
    assert first is None or messages[0].startswith(first)


@pytest.mark.parametrize("since", ["10", "m", "-1h", "yesterday", "99:99", "9999999d", "999999d", "0001-01-01"])
def test_no_time(written: Path, since: str) -> None:
    done = run(written, "--since", since)
    assert (done.returncode, done.stdout) == (2, "")
    assert f'"{since}" is neither 30s, 10m, 2h or 3d nor a moment as 2026-11-22T15:00' in done.stderr


def test_a_broken_configuration_hides_no_logs(written: Path) -> None:
    (written / "config" / "models.json").write_text("{")
    assert run(written, "--lines", "1").stdout.endswith("chat INFO     1 s\n")


def test_colours_are_for_a_terminal(written: Path) -> None:
    assert "\x1b" not in run(written, "--errors").stdout
    ours, its = pty.openpty()
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(written)}
    with subprocess.Popen(command("--errors"), env=environ, stdout=its):
        os.close(its)
        assert os.read(ours, 4).startswith(b"\x1b[31")
    os.close(ours)


def test_a_reader_that_leaves(written: Path) -> None:
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(written)}
    with subprocess.Popen(command(), env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        assert program.stderr.read() == b""
