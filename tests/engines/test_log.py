import contextlib
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from vllm_unified.engines.log import FILES_KEPT, EngineLog


def reason_of(tmp_path: Path, text: str) -> str | None:
    program = f"import sys; sys.stdout.write({text!r})"
    return reason_of_program(tmp_path, program)


def reason_of_program(tmp_path: Path, program: str) -> str | None:
    with contextlib.closing(EngineLog(tmp_path / "a.log")) as log:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        log.follow(process).join()
        process.wait()
        return log.reason()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", None),
        ("hello\n", "hello"),
        # A fault that the table explains.
        (
            "(EngineCore pid=1) ERROR 11-21 09:37:36 [core.py:1510] ValueError: No available memory for the "
            "cache blocks.\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
            "the weights leave no room for the KV cache; raise gpu_memory_utilization, memory_gib or "
            "kv_cache_memory_gib in config/models.json, or take a smaller model",
        ),
        # In vLLM's own forms, faults that the table does not have.
        (
            "                     [--jit-monitor-mode {error,warn}]\napi_server.py: error: --nosuch is said twice\n",
            "api_server.py: error: --nosuch is said twice",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, User-specified max_model_len (999999) is greater than the derived max_model_len\n"
            "    For further information visit https://errors.pydantic.dev/2.14/v/value_error\n",
            "Value error, User-specified max_model_len (999999) is greater than the derived max_model_len",
        ),
        (
            "(APIServer pid=11479) WARNING 11-21 09:36:29 [system_utils.py:255] Found ulimit of 20000. This can cause "
            "fd limit errors like `OSError: [Errno 24] Too many open files`. Consider increasing with ulimit -n\n"
            "  Value error, Model architectures need a rest.\n",
            "Value error, Model architectures need a rest.",
        ),
        (
            "(Worker pid=11503) ERROR 11-21 09:36:59 [multiproc_executor.py:953] "
            "safetensors._safetensors_rust.SafetensorError: Error while reading\n"
            "    raise RuntimeError(\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
            "{'EngineCore': 1}\n",
            "safetensors._safetensors_rust.SafetensorError: Error while reading",
        ),
        (
            "(EngineCore pid=11561) ERROR 11-21 09:37:36 [core.py:1510]     raise ValueError(\n"
            "(EngineCore pid=11561) ERROR 11-21 09:37:36 [core.py:1510] ValueError: No available memory for "
            "whatever.\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
            "{'EngineCore': 1}\n",
            "ValueError: No available memory for whatever.",
        ),
    ],
)
def test_the_line_that_says_why(tmp_path: Path, text: str, reason: str | None) -> None:
    assert reason_of(tmp_path, text) == reason


def test_not_utf8_and_endless_lines_are_taken(tmp_path: Path) -> None:
    program = "import sys; sys.stdout.buffer.write(b'\\xff' * 300_000); print(); print('end')"
    assert reason_of_program(tmp_path, program) == "end"


def lines_of(tmp_path: Path, program: str) -> list[dict[str, Any]]:
    reason_of_program(tmp_path, program)
    return [json.loads(line) for line in (tmp_path / "a.log").read_text().splitlines()]


def test_a_line_of_the_engine(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, "print('(EngineCore pid=7) WARNING 11-21 14:01:21 [a.py:1] \\x1b[31m通义 \\'\"')")
    assert datetime.fromisoformat(line.pop("time")) - datetime.now(UTC) < timedelta(minutes=1)
    message = "(EngineCore pid=7) [a.py:1] \x1b[31m通义 '\""
    assert line == {"level": "warning", "source": "engine", "model": "a", "message": message}


def test_each_line_is_a_line(tmp_path: Path) -> None:
    found = lines_of(tmp_path, "print('a\\n\\n \\nb\\r50 %\\r100 %\\n  c')")
    assert [line["message"] for line in found] == ["a", "b", "50 %", "100 %", "  c"]


def test_what_stands_behind_a_question_mark_is_the_clients(tmp_path: Path) -> None:
    access = '(APIServer pid=1) INFO:     127.0.0.1:5 - "POST /v1/chat/completions{} HTTP/1.1" 200 OK'
    (line,) = lines_of(tmp_path, f"print({access.format('?api_key=sk-1&b=c')!r})")
    assert line["message"] == access.format("").replace(" INFO:    ", "")


def test_the_keepers_own_lines(tmp_path: Path) -> None:
    with contextlib.closing(EngineLog(tmp_path / "a.log")) as log:
        log.say("stopped")
        log.say("the keeper failed", "error", exception="Traceback\n  here\nKeyError: 1")
    stopped, failed = (json.loads(line) for line in (tmp_path / "a.log").read_text().splitlines())
    assert (stopped["level"], stopped["source"], stopped["model"], stopped["message"]) == (
        "info",
        "keeper",
        "a",
        "stopped",
    )
    assert (failed["level"], failed["exception"]) == ("error", "Traceback\n  here\nKeyError: 1")


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.log").symlink_to("/dev/full")
    assert reason_of_program(tmp_path, "print('some', 'word'); print('ValueError: a reason')") == "ValueError: a reason"
    assert capfd.readouterr().err == ""


def test_the_file_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_unified.engines.log.FILE_BYTES", 1000)
    with contextlib.closing(EngineLog(tmp_path / "a.log")) as log:
        for number in range(500):
            log.say(f"line {number} of many")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["a.log", *(f"a.log.{number}" for number in range(1, FILES_KEPT + 1))]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
