"""Lines as a reader gets them: from a file, a full disk, a pipe."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually
from vllm_unified.router.access_log import LONGEST_BACKLOG, LONGEST_BATCH, AccessLog
from vllm_unified.router.record import Record

LINE: dict[str, Any] = {
    "time": "2026-11-21T18:30:20.461Z",
    "id": "id-1",
    "peer": "10.0.0.7",
    "key": "team",
    "path": "/v1/chat/completions",
    "model": "chat",
    "asked": "gpt-4",
    "upstream": "chat",
    "status": 200,
    "error": "",
    "stream": True,
    "tries": 2,
    "queued_us": 1500,
    "first_byte_us": 250_000,
    "duration_us": 1_500_000,
    "prompt_tokens": 12,
    "completion_tokens": 34,
    "bytes_in": 812,
    "bytes_out": 5678,
    "level": "info",
    "source": "router",
}


def record(**values: Any) -> Record:
    return Record(**{**LINE, **values})


def written(path: Path, *records: Record) -> list[dict[str, Any]]:
    with path.open("wb") as file:
        log = AccessLog(file)
        for each in records:
            log.note(each)
        log.close()
    assert log.dropped == 0
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_line(tmp_path: Path) -> None:
    (line,) = written(tmp_path / "log", record())
    assert line == LINE


def test_without_an_answer(tmp_path: Path) -> None:
    (line,) = written(tmp_path / "log", record(status=0, error="client", first_byte_us=None, upstream=""))
    assert (line["status"], line["error"], line["first_byte_us"], line["upstream"]) == (0, "client", None, "")


@pytest.mark.parametrize("asked", ["", "通义", 'two\nlines\r\n{"status":500}\u2028\x00'])
def test_a_name_that_was_asked_for_is_one_line(tmp_path: Path, asked: str) -> None:
    lines = written(tmp_path / "log", record(asked=asked), record())
    assert [line["asked"] for line in lines] == [asked, "gpt-4"]


@pytest.fixture
def pipe() -> Iterator[tuple[io.FileIO, io.FileIO]]:
    """Its reading and its writing end."""
    reader, writer = os.pipe()
    with io.FileIO(reader, "rb") as reading, io.FileIO(writer, "wb") as writing:
        yield reading, writing


def test_a_full_disk_loses_lines_and_nothing_else() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        log = AccessLog(full)
        for _ in range(3):
            log.note(record())
        log.close()
        assert log.dropped == 3


def test_a_reader_that_is_gone(pipe: tuple[io.FileIO, io.FileIO]) -> None:
    reading, writing = pipe
    reading.close()
    log = AccessLog(writing)
    log.note(record())
    log.close()
    assert log.dropped == 1


def test_a_reader_that_sleeps_holds_nobody(pipe: tuple[io.FileIO, io.FileIO]) -> None:
    """Every line comes, in order, or is counted."""
    reading, writing = pipe
    log = AccessLog(writing)
    batches, each = LONGEST_BACKLOG + 10, LONGEST_BATCH
    for number in range(batches):
        for _ in range(each):
            log.note(record(bytes_out=number))  # would not come back if it waited
    waiting = log.dropped
    assert 0 < waiting <= 10 * each

    text = b""
    while text.count(b"\n") < batches * each - waiting:
        text += reading.read(1 << 20)
    log.close()
    numbers = [json.loads(line)["bytes_out"] for line in text.splitlines()]
    assert numbers == sorted(numbers)
    assert len(numbers) + log.dropped == batches * each


def test_a_line_that_broke_off_does_not_spoil_the_next(pipe: tuple[io.FileIO, io.FileIO]) -> None:
    """A pipe that never waits takes what fits, as a disk does that fills up."""
    reading, writing = pipe
    os.set_blocking(writing.fileno(), False)
    log = AccessLog(writing)
    for _ in range(1000):
        log.note(record(status=200))
    eventually(lambda: log.dropped > 1000 - LONGEST_BATCH)  # it is at the end of them
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
