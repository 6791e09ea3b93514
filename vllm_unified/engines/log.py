"""An engine's output: read to the end so that it never blocks, kept in a rotating file, its last lines at hand."""

import collections
import contextlib
import io
import logging
import logging.handlers
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from vllm_unified.engines import levels, reasons
from vllm_unified.logs.lines import line

FILE_BYTES = 20 << 20
FILES_KEPT = 4
LINES_AT_HAND = 400
LONGEST_LINE = 65536
# True of every engine that could not start; says nothing of the cause.
SAYS_NOTHING = ("Engine core initialization failed", "WorkerProc initialization failed", "See root cause above")
# Of the server's own access log: clients put keys there.
QUERY = re.compile(r'("[A-Z]+ [^ ?"]*)\?[^ "]*(?= HTTP/)')


class EngineLog:
    """run/logs/KEY.log: 20 MiB a file, four older ones kept. Lines that the disk has no room for are lost."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.key = path.stem
        self._handler = _File(path, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8")
        self._logger = logging.Logger(f"engine:{self.key}")
        self._logger.addHandler(self._handler)
        self._last: collections.deque[str] = collections.deque(maxlen=LINES_AT_HAND)

    def say(self, message: str, level: str = "info", *, exception: str | None = None) -> None:
        """A line of the keeper's own among the engine's."""
        self._write([line(level, "keeper", message, model=self.key, exception=exception)])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # lines that wait for room on the disk
            self._handler.close()

    def follow(self, process: "subprocess.Popen[bytes]") -> threading.Thread:
        """Read what the process writes, in a thread, until the last writer has closed its end."""
        self._last.clear()
        thread = threading.Thread(target=self._read, args=(cast(io.BufferedReader, process.stdout),), daemon=True)
        thread.start()
        return thread

    def _read(self, stream: io.BufferedReader) -> None:
        of_engine = levels.Levels()
        with stream:
            for came in _at_once(stream):
                self._write([each for raw in came for each in self._taken(raw, of_engine)])

    def _taken(self, raw: bytes, of_engine: levels.Levels) -> Iterator[str]:
        """One line of the engine, as lines of JSON; none where it is empty."""
        written = raw.decode("utf-8", "replace").rstrip()
        self._last.append(written)
        for each in written.split("\r"):  # a bar of progress is drawn over itself
            level, message = of_engine.of(QUERY.sub(r"\1", each))
            if message.strip():
                yield line(level, "engine", message, model=self.key)

    def _write(self, lines: Sequence[str]) -> None:
        if lines:
            self._logger.info("%s", "\n".join(lines))

    def reason(self, returncode: int | None = None) -> str | None:
        """Why the engine ended and what to do, or else the line that says best why."""
        lines = tuple(self._last)  # the engine may be writing yet
        explained = reasons.explain(lines, returncode)
        return explained.replace(" NAME", f" {self.key}") if explained else _last_error(lines)

    def forget(self) -> None:
        """What was written before an engine was ready explains no later end of it."""
        self._last.clear()


class _File(logging.handlers.RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """On a full disk a line is lost, and not told of by five others."""


def _at_once(stream: io.BufferedReader) -> Iterator[list[bytes]]:
    """The lines that are there at the same time, which are written together. One without end comes in pieces."""
    rest = b""
    while came := stream.read1(LONGEST_LINE):
        *whole, rest = (rest + came).split(b"\n")
        if len(rest) >= LONGEST_LINE:
            whole, rest = [*whole, rest], b""
        yield whole
    if rest:
        yield [rest]


def _last_error(lines: Sequence[str]) -> str | None:
    bare = [reasons.bare(line) for line in lines]
    errors = [line for line in bare if levels.ERROR.match(line) and not any(phrase in line for phrase in SAYS_NOTHING)]
    best = errors or [line for line in bare if line]
    return best[-1][: reasons.LONGEST] if best else None
