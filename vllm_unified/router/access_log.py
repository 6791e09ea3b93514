"""The access log: one line of JSON for each request to a model, without any text of it and without a secret."""

import contextlib
import os
import queue
import threading
from typing import BinaryIO

import msgspec

from vllm_unified.router.record import Record

# What is handed to the writer at once, and how many of such batches a slow disk may owe.
LONGEST_BATCH = 200
LONGEST_BACKLOG = 500


class AccessLog:
    """A thread writes, so neither a full disk nor a pipe that nobody reads holds a request; lines are lost instead."""

    def __init__(self, out: BinaryIO) -> None:
        """`out` must have a file descriptor. What it has buffered itself stays where it is."""
        self._descriptor = out.fileno()
        self._lines: list[Record] = []
        self._encoder = msgspec.json.Encoder()
        self._batches: queue.Queue[list[Record] | None] = queue.Queue(LONGEST_BACKLOG)
        self._not_taken = 0
        self._not_written = 0
        self._writer = threading.Thread(target=self._write_all, name="access log", daemon=True)
        self._writer.start()

    @property
    def dropped(self) -> int:
        """Lines that were lost."""
        return self._not_taken + self._not_written

    def note(self, record: Record) -> None:
        """Called for every request when it is over, so it costs less than a microsecond."""
        self._lines.append(record)
        if len(self._lines) >= LONGEST_BATCH:
            self.flush()

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

    def _write_all(self) -> None:
        end = b""  # of a line that was written in part
        while lines := self._batches.get():
            text = end + self._encoder.encode_lines(lines)
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
