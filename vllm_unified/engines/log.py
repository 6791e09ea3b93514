"""An engine's output: read to the end so that it never blocks, kept in a rotating file, its last lines at hand."""

import collections
import logging
import logging.handlers
import re
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from vllm_unified.engines import reasons

FILE_BYTES = 20 << 20
FILES_KEPT = 4
LINES_AT_HAND = 400
# A cause stands at the beginning of a line, behind vLLM's own prefix; the deepest one is written last.
ERROR_LINE = re.compile(r"(?:[\w.]*(?:Error|Exception|Interrupt): |[\w.]+: error: |Value error, ).*")
# True of every engine that could not start; says nothing of the cause.
SAYS_NOTHING = ("Engine core initialization failed", "WorkerProc initialization failed", "See root cause above")


class EngineLog:
    """run/logs/KEY.log: 20 MiB a file, four older ones kept."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8"
        )
        self.key = path.stem
        self._logger = logging.Logger(f"engine:{self.key}")
        self._logger.addHandler(handler)
        self._handler = handler
        self._last: collections.deque[str] = collections.deque(maxlen=LINES_AT_HAND)

    def say(self, message: str) -> None:
        """A line of the keeper's own among the engine's."""
        self._logger.info("keeper: %s", message)

    def close(self) -> None:
        self._handler.close()

    def follow(self, process: "subprocess.Popen[bytes]") -> threading.Thread:
        """Read what the process writes, in a thread, until the last writer has closed its end."""
        self._last.clear()
        thread = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        thread.start()
        return thread

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for raw in iter(lambda: stream.readline(65536), b""):
                line = raw.decode("utf-8", "replace").rstrip()
                self._last.append(line)
                self._logger.info("%s", line)

    def reason(self, returncode: int | None = None) -> str | None:
        """Why the engine ended and what to do, or else the line that says best why."""
        lines = tuple(self._last)  # the engine may be writing yet
        explained = reasons.explain(lines, returncode)
        return explained.replace(" NAME", f" {self.key}") if explained else _last_error(lines)

    def forget(self) -> None:
        """What was written before an engine was ready explains no later end of it."""
        self._last.clear()


def _last_error(lines: Sequence[str]) -> str | None:
    bare = [reasons.bare(line) for line in lines]
    errors = [line for line in bare if ERROR_LINE.match(line) and not any(phrase in line for phrase in SAYS_NOTHING)]
    best = errors or [line for line in bare if line]
    return best[-1][: reasons.LONGEST] if best else None
