"""Lines as a reader gets them: from a file, a full disk, a pipe."""

import io
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Project, eventually
from vllm_unified.router.access_log import LONGEST_BACKLOG, AccessLog
from vllm_unified.router.record import Record
from vllm_unified.router.registry import Registry


@pytest.fixture
def registry(project: Project) -> Registry:
    project.write({"chat": {"name": "Qwen", "type": "chat", "aliases": ["gpt-4"]}})
    return Registry(project.load())


def record(**values: Any) -> Record:
    made = Record("id-1", "/v1/chat/completions", "team", "10.0.0.7", 100.0, 812)
    made.model, made.asked, made.upstream, made.status = "chat", "Qwen", "chat", 200
    made.stream, made.tries, made.queued, made.first_byte, made.ended = True, 2, 0.0015, 100.25, 101.5
    made.prompt_tokens, made.completion_tokens, made.bytes_out = 12, 34, 5678
    for name, value in values.items():
        setattr(made, name, value)
    return made


def written(registry: Registry, path: Path, *records: Record) -> list[dict[str, Any]]:
    with path.open("wb") as file:
        log = AccessLog(file, registry)
        for each in records:
            log.note(each)
        log.close()
    assert log.dropped == 0
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_line(registry: Registry, tmp_path: Path) -> None:
    (line,) = written(registry, tmp_path / "log", record())
    said = datetime.strptime(line.pop("time"), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - said) < timedelta(minutes=1)
    assert line == {
        "id": "id-1",
        "peer": "10.0.0.7",
        "key": "team",
        "path": "/v1/chat/completions",
        "model": "chat",
        "upstream": "chat",
        "status": 200,
        "error": "",
        "stream": True,
        "tries": 2,
        "queued_ms": 1.5,
        "first_byte_ms": 250.0,
        "duration_ms": 1500.0,
        "prompt_tokens": 12,
        "completion_tokens": 34,
        "bytes_in": 812,
        "bytes_out": 5678,
    }


def test_without_an_answer(registry: Registry, tmp_path: Path) -> None:
    (line,) = written(registry, tmp_path / "log", record(status=0, error="client", first_byte=None, upstream=""))
    assert (line["status"], line["error"], line["first_byte_ms"], line["upstream"]) == (0, "client", None, "")


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("Qwen", None),
        ("", None),
        ("gpt-4", "gpt-4"),
        ("通义", "通义"),
        ("no such model", "no such model"),
        ('two\nlines\r\n{"status":500}\u2028\x00', 'two\nlines\r\n{"status":500}\u2028\x00'),
        ("half a pair \ud83d", "half a pair \\ud83d"),
        ("x" * 5000, "x" * 100),
    ],
)
def test_the_name_that_was_asked_for(registry: Registry, tmp_path: Path, asked: str, shown: str | None) -> None:
    lines = written(registry, tmp_path / "log", record(asked=asked), record())
    assert len(lines) == 2
    assert lines[0].get("asked") == shown


@pytest.fixture
def pipe() -> Iterator[tuple[io.FileIO, io.FileIO]]:
    """Its reading and its writing end."""
    reader, writer = os.pipe()
    with io.FileIO(reader, "rb") as reading, io.FileIO(writer, "wb") as writing:
        yield reading, writing


def test_a_full_disk_loses_lines_and_nothing_else(registry: Registry) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        log = AccessLog(full, registry)
        for _ in range(3):
            log.note(record())
        log.close()
        assert log.dropped == 3


def test_a_reader_that_is_gone(registry: Registry, pipe: tuple[io.FileIO, io.FileIO]) -> None:
    reading, writing = pipe
    reading.close()
    log = AccessLog(writing, registry)
    log.note(record())
    log.close()
    assert log.dropped == 1


def test_a_reader_that_sleeps_holds_nobody(registry: Registry, pipe: tuple[io.FileIO, io.FileIO]) -> None:
    """Every line comes, in order, or is counted."""
    reading, writing = pipe
    log = AccessLog(writing, registry)
    batches, each = LONGEST_BACKLOG + 10, 1000  # a batch is more than a pipe holds
    for number in range(batches):
        for _ in range(each):
            log.note(record(bytes_out=number))
        log.flush()  # would not come back if it waited
    waiting = log.dropped
    assert 0 < waiting <= 10 * each

    text = b""
    while text.count(b"\n") < batches * each - waiting:
        text += reading.read(1 << 20)
    log.close()
    numbers = [json.loads(line)["bytes_out"] for line in text.splitlines()]
    assert numbers == sorted(numbers)
    assert len(numbers) + log.dropped == batches * each


def test_a_line_that_broke_off_does_not_spoil_the_next(registry: Registry, pipe: tuple[io.FileIO, io.FileIO]) -> None:
    """A pipe that never waits takes what fits, as a disk does that fills up."""
    reading, writing = pipe
    os.set_blocking(writing.fileno(), False)
    log = AccessLog(writing, registry)
    for _ in range(1000):
        log.note(record(status=200))
    log.flush()
    eventually(lambda: log.dropped)
    text = reading.read(1 << 20)
    lost = log.dropped
    log.note(record(status=204))
    log.close()
    whole, _, rest = (text + reading.read(1 << 20)).rpartition(b"\n{")
    *lines, torn = whole.splitlines()
    assert [json.loads(line)["status"] for line in lines] == [200] * (1000 - lost)
    with pytest.raises(json.JSONDecodeError):
        json.loads(torn)
    assert json.loads(b"{" + rest)["status"] == 204
