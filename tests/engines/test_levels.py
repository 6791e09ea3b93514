"""Lines as vLLM 0.32 and the libraries below it write them."""

import pytest

from vllm_unified.engines.levels import Levels

CORE = "(EngineCore pid=7) "


@pytest.mark.parametrize(
    ("line", "level", "rest"),
    [
        (
            "(APIServer pid=12110) INFO 11-21 14:01:04 [model.py:733] Resolved architecture: Qwen2ForCausalLM",
            "info",
            "(APIServer pid=12110) [model.py:733] Resolved architecture: Qwen2ForCausalLM",
        ),
        ("INFO 11-21 14:01:04 [core.py:12] no process", "info", "[core.py:12] no process"),
        ("(Worker_TP0 pid=3) WARNING 11-21 14:01:21 [a.py:1] slow", "warning", "(Worker_TP0 pid=3) [a.py:1] slow"),
        (f"{CORE}ERROR 11-21 09:37:36 [core.py:1510] Traceback (most recent call last):", "error", None),
        (f"{CORE}CRITICAL 11-21 09:37:36 [core.py:1] gone", "critical", f"{CORE}[core.py:1] gone"),
        (f"{CORE}DEBUG 11-21 09:37:36 [core.py:1] idle", "debug", f"{CORE}[core.py:1] idle"),
        (
            "(APIServer pid=1) INFO:     Started server process [1]",
            "info",
            "(APIServer pid=1) Started server process [1]",
        ),
        ("(APIServer pid=1) WARNING:  Invalid HTTP request received.", "warning", None),
        ("/srv/vllm/a.py:24: DeprecationWarning: `vllm.old` is deprecated", "warning", None),
        ("[W1121 14:01:21.595889254 utils.cpp:68] Warning: NUMA binding", "warning", None),
        ("[rank0]:[E1121 14:01:21.595 ProcessGroupNCCL.cpp:1] watchdog", "error", None),
        ("api_server.py: error: unrecognized arguments: --nosuch", "error", None),
        ("ValueError: on its own", "error", None),
        ("Triton is installed, but doesn't include CPU backend.", "info", None),
        ("This is no error: only a sentence", "info", None),
        ("INFORMATION 11-21 14:01:04 is no level", "info", None),
        ("", "info", None),
    ],
)
def test_a_line(line: str, level: str, rest: str | None) -> None:
    found = Levels().of(line)
    assert found[0] == level
    if rest is not None:
        assert found[1] == rest


def levels_of(text: str) -> list[str]:
    levels = Levels()
    return [levels.of(line)[0][0] for line in text.splitlines()]


TRACEBACK = """\
before
Traceback (most recent call last):
  File "a.py", line 1, in f
    raise KeyError(1)
KeyError: 1

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in g
my.Broken
  its second line
after
  and more
"""


@pytest.mark.parametrize("process", ["", CORE, "[rank0]: "])
def test_a_traceback_is_an_error_from_its_first_line_to_its_last(process: str) -> None:
    text = "".join(f"{process}{line}\n" for line in TRACEBACK.splitlines())
    assert "".join(levels_of(text)) == "i" + "e" * 11 + "ii"


def test_two_processes_write_at_once() -> None:
    text = """\
(EngineCore pid=7) Traceback (most recent call last):
(APIServer pid=1) INFO:     Started
(EngineCore pid=7)   File "a.py"
(Worker pid=2) plain
(EngineCore pid=7) KeyError
(EngineCore pid=7) plain
"""
    assert levels_of(text) == ["e", "i", "e", "i", "e", "i"]


def test_a_line_with_a_level_ends_a_traceback() -> None:
    assert levels_of("Traceback (most recent call last):\n  File\nINFO 11-21 14:01:04 [a.py:1] b\n  c") == list("eeii")
