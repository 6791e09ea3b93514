import contextlib
import subprocess
import sys
from pathlib import Path

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


def test_the_file_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_unified.engines.log.FILE_BYTES", 1000)
    with contextlib.closing(EngineLog(tmp_path / "a.log")) as log:
        for number in range(500):
            log.say(f"line {number} of many")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["a.log", *(f"a.log.{number}" for number in range(1, FILES_KEPT + 1))]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
