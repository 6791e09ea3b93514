"""What a process writes on standard error once its lines are JSON."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vllm_unified.logs.lines import line


def written(program: str, **environ: str) -> list[dict[str, Any]]:
    start = "from vllm_unified.logs.lines import *; write_json('router', None)\n"
    done = subprocess.run([sys.executable, "-c", start + program], capture_output=True, env={**os.environ, **environ})
    return [json.loads(each) for each in done.stderr.splitlines()]


def test_a_line() -> None:
    found = json.loads(line("error", "keeper", 'two\nlines "通义"', model="chat", at=1_795_359_600.5))
    assert found == {
        "time": "2026-11-22T15:00:00.500Z",
        "level": "error",
        "source": "keeper",
        "model": "chat",
        "message": 'two\nlines "通义"',
    }


def test_a_whole_second_has_its_milliseconds_too() -> None:
    assert json.loads(line("info", "router", "", at=0))["time"] == "1970-01-01T00:00:00.000Z"


def test_a_logger() -> None:
    (found,) = written("logging.getLogger('vllm_unified.router').warning('%s is slow', 'chat')")
    assert abs(datetime.now(UTC) - datetime.fromisoformat(found.pop("time"))) < timedelta(minutes=1)
    assert found == {"level": "warning", "source": "router", "message": "chat is slow"}


@pytest.mark.parametrize(
    ("program", "level", "message", "exception"),
    [
        (
            "try: 1/0\nexcept ZeroDivisionError: logging.exception('it failed')",
            "error",
            "it failed",
            "ZeroDivisionError: division by zero",
        ),
        ("1/0", "critical", "ended by what nobody caught", "ZeroDivisionError: division by zero"),
        (
            "t = threading.Thread(target=lambda: 1/0, name='writer'); t.start(); t.join()",
            "error",
            "the thread writer was ended by what nobody caught",
            "ZeroDivisionError: division by zero",
        ),
    ],
)
def test_a_traceback_is_in_one_line(program: str, level: str, message: str, exception: str) -> None:
    (found,) = written(program)
    assert (found["level"], found["message"]) == (level, message)
    assert found["exception"].startswith("Traceback (most recent call last):\n")
    assert found["exception"].endswith(f"\n{exception}")


def test_a_warning_of_python() -> None:
    (found,) = written("import warnings; warnings.warn('old', UserWarning)")
    assert (found["level"], "UserWarning: old" in found["message"]) == ("warning", True)


def test_any_text_in_any_locale() -> None:
    program = "logging.error('%s', '通义\\ud800\\n\\x1b\\u2028')"
    (found,) = written(program, LC_ALL="C", PYTHONIOENCODING="latin-1")
    assert found["message"] == "通义\ud800\n\x1b\u2028"


def test_why_it_ends() -> None:
    (found,) = written("end('no key; make one')", SUPERVISOR_ENABLED="1")
    assert (found["level"], found["message"]) == ("critical", "no key; make one")


def test_why_it_ends_for_a_person() -> None:
    program = "from vllm_unified.logs.lines import *; write_json('router'); end('no key; make one')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "no key; make one\n")
