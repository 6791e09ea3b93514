import json
import re
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from tests.router.test_access_log import LINE
from vllm_unified.logs import shown
from vllm_unified.logs.files import read

NOW = datetime(2026, 11, 22, 16, 0, tzinfo=timezone(timedelta(hours=1)))
TIME = "2026-11-22T14:04:05.678Z"


def shown_as(raw: str, name: str = "chat", colour: bool = False) -> str:
    return shown.text(read(name, raw), len("embedding"), NOW, colour=colour)


def line(**fields: Any) -> str:
    return json.dumps({"time": TIME, **fields})


def access(**fields: Any) -> str:
    return shown_as(line(**{**LINE, "time": TIME, **fields}), "router").split(maxsplit=3)[-1]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (line(level="error", source="engine", message="broke"), "15:04:05 chat      ERROR    broke"),
        (line(level="info", source="keeper", message="stopped"), "15:04:05 chat      INFO     keeper: stopped"),
        (
            line(level="info", source="x", message="m", time="2026-11-21T23:04:05.000Z"),
            "15:04:05 chat".replace("15:04:05", "00:04:05") + "      INFO     m",
        ),
        (
            line(level="info", source="x", message="m", time="2026-11-20T14:04:05.000Z"),
            "2026-11-20 15:04:05 chat      INFO     m",
        ),
        (
            line(level="error", source="router", message="it failed", exception="Traceback\n  File\nKeyError: 1"),
            "15:04:05 chat      ERROR    it failed\n    Traceback\n      File\n    KeyError: 1",
        ),
        (line(level="info", source="x", message="a\nb"), "15:04:05 chat      INFO     a\n    b"),
        (
            line(kind="of another program"),
            f'15:04:05 chat      INFO     {{"time": "{TIME}", "kind": "of another program"}}',
        ),
        (
            "2026-11-22 14:04:05,678 CRIT could not write pidfile",
            "CRITICAL 2026-11-22 14:04:05,678 CRIT could not write pidfile",
        ),
    ],
)
def test_a_line(raw: str, text: str) -> None:
    assert shown_as(raw).endswith(text)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "/v1/chat/completions chat 200 1.5 s 12+34 tokens key=team"),
        ({"status": 0, "error": "client", "duration_us": 4200}, "left 4 ms"),
        (
            {"status": 503, "error": "engine", "prompt_tokens": 0, "completion_tokens": 0},
            "503 1.5 s key=team error=engine",
        ),
        ({"model": "", "key": "", "path": "/v1/x"}, "/v1/x 200 1.5 s 12+34 tokens"),
    ],
)
def test_a_request(fields: dict[str, Any], text: str) -> None:
    assert text in access(**fields)


@pytest.mark.parametrize(
    ("error", "level"), [("", "INFO"), ("client", "INFO"), ("router", "ERROR"), ("engine", "ERROR")]
)
def test_whose_error_a_request_is(error: str, level: str) -> None:
    assert f" {level} " in shown_as(line(**{**LINE, "time": TIME, "error": error}))


def test_colours() -> None:
    assert shown_as(line(level="error", message="m"), colour=True).startswith("\x1b[31m15:04:05")
    assert shown_as(line(level="info", message="m"), colour=True).startswith("15:04:05")


HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\r\x00\x7f\u202edrow\u2028\u2066x\x08"


@pytest.mark.parametrize(
    "raw",
    [
        line(level="error", message=HOSTILE),
        line(level="error", message="m", exception=HOSTILE),
        HOSTILE,
        "{" + HOSTILE,
        line(**{**LINE, "time": TIME, "path": HOSTILE, "key": HOSTILE, "model": HOSTILE}),
        '{"time": "2026-11-22T14:04:05Z", "message": "half \\ud800 of a pair"}',
    ],
)
def test_nothing_of_it_moves_a_terminal(raw: str) -> None:
    text = shown_as(raw)
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\u2066\ud800]", text) is None
    text.encode()
    for character in shown.json(read("chat", raw)):
        assert character >= " "


def test_a_line_cannot_pretend_to_be_two() -> None:
    _, second = shown_as(line(level="info", message="a\n15:04:05 router CRITICAL not said by it")).splitlines()
    assert second.startswith("    ")


def test_endless_lines_are_cut() -> None:
    text = shown_as(line(level="info", message="x" * 1_000_000))
    assert len(text) < 2200
    assert text.endswith("… (1,000,000 characters, --json has all of them)")
    below = shown_as(line(level="error", message="m", exception="\n".join(map(str, range(1000))))).splitlines()
    assert len(below) < 210
    assert (below[1], below[-1]) == ("    … (800 lines more, --json has all of them)", "    999")


def test_json_is_as_it_was_and_else_becomes_it() -> None:
    raw = line(level="info", message="m")
    assert shown.json(read("chat", raw)) == raw
    plain = json.loads(shown.json(read("supervisord", "2026-11-22T14:04:05Z WARN gone")))
    assert plain == {
        "time": "2026-11-22T14:04:05.000Z",
        "level": "warning",
        "source": "supervisord",
        "message": "2026-11-22T14:04:05Z WARN gone",
    }
