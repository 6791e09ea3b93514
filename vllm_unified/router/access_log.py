"""The access log: one line of JSON for each request to a model, without any text of it and without a secret."""

import contextlib
import os
import queue
import threading
import time
from typing import BinaryIO

import msgspec

from vllm_unified.router.record import Record
from vllm_unified.router.registry import Registry

# Batches that a slow reader may owe: at a flush each half second that is five seconds' worth of lines.
LONGEST_BACKLOG = 10
LONGEST_ASKED = 100


class _Line(msgspec.Struct, gc=False):
    time: str
    id: str
    peer: str
    key: str
    path: str
    model: str
    asked: str | msgspec.UnsetType
    upstream: str
    status: int
    error: str
    stream: bool
    tries: int
    queued_ms: float
    first_byte_ms: float | None
    duration_ms: float
    prompt_tokens: int
    completion_tokens: int
    bytes_in: int
    bytes_out: int


class AccessLog:
    """A thread writes, so neither a full disk nor a pipe that nobody reads holds a request; lines are lost instead.

    `time` is the end of the request. `asked` is there when the client called the model by another name than its own.
    """

    def __init__(self, out: BinaryIO, registry: Registry) -> None:
        """`out` must have a file descriptor. What it has buffered itself stays where it is."""
        self._descriptor = out.fileno()
        self._registry = registry
        self._lines: list[bytes] = []
        self._encoder = msgspec.json.Encoder()
        self._second = 0
        self._date = ""
        self._batches: queue.Queue[list[bytes] | None] = queue.Queue(LONGEST_BACKLOG)
        self._not_taken = 0
        self._not_written = 0
        self._writer = threading.Thread(target=self._write_all, name="access log", daemon=True)
        self._writer.start()

    @property
    def dropped(self) -> int:
        """Lines that were lost."""
        return self._not_taken + self._not_written

    def note(self, record: Record) -> None:
        """Called for every request when it is over, so it costs some microseconds."""
        asked = record.asked
        served = self._registry.by_name(asked)
        started, first_byte = record.started, record.first_byte
        line = _Line(
            self._now(),
            record.request_id,
            record.peer,
            record.key,
            record.path,
            record.model,
            msgspec.UNSET if not asked or (served and served.model.name == asked) else asked[:LONGEST_ASKED],
            record.upstream,
            record.status,
            record.error,
            record.stream,
            record.tries,
            _milliseconds(record.queued),
            None if first_byte is None else _milliseconds(first_byte - started),
            _milliseconds(record.ended - started),
            record.prompt_tokens,
            record.completion_tokens,
            record.bytes_in,
            record.bytes_out,
        )
        try:
            self._lines.append(self._encoder.encode(line))
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say and UTF-8 cannot
            line.asked, line.id = _encodable(asked[:LONGEST_ASKED]), _encodable(line.id)
            self._lines.append(self._encoder.encode(line))

    def flush(self) -> None:
        """Hand what was noted to the writer. Never waits."""
        lines, self._lines = self._lines, []
        if lines:
            try:
                self._batches.put_nowait(lines)
            except queue.Full:
                self._not_taken += len(lines)

    def close(self, seconds: float = 1.0) -> None:
        """Flush, and wait up to `seconds` until it is written."""
        self.flush()
        with contextlib.suppress(queue.Full):
            self._batches.put(None, timeout=seconds)
            self._writer.join(seconds)

    def _now(self) -> str:
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._date}.{int((now - second) * 1000):03}Z"

    def _write_all(self) -> None:
        end = b""  # of a line that was written in part
        while lines := self._batches.get():
            text = end + b"\n".join((*lines, b""))
            written = self._write(text)
            self._not_written += min(len(lines), text.count(b"\n", written))
            if written:
                end = b"" if text[written - 1 : written] == b"\n" else b"\n"

    def _write(self, text: bytes) -> int:
        """Bytes of it that were written: all, or those before an error."""
        left = memoryview(text)
        with contextlib.suppress(OSError):
            while left:
                left = left[os.write(self._descriptor, left) :]
        return len(text) - len(left)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e6) / 1e3


def _encodable(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode("ascii")
