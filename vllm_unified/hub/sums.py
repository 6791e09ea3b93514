"""Checksums of files, read in large blocks on all cores."""

import hashlib
import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_unified.hub.manifest import File
from vllm_unified.hub.parallel import Stopped

BLOCK = 4 << 20


class Sums:
    """Of a file that comes in pieces: SHA-256, and git's of a blob where that is what the hub says."""

    def __init__(self, file: File) -> None:
        self._sha256 = hashlib.sha256()
        self._git = None
        if file.git_sha1:
            self._git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)

    def update(self, block: bytes | memoryview) -> None:
        self._sha256.update(block)
        if self._git:
            self._git.update(block)

    def of(self, file: File) -> File:
        """What the file is, after all of it."""
        return replace(file, sha256=self._sha256.hexdigest(), git_sha1=self._git.hexdigest() if self._git else None)


@dataclass
class Progress:
    """`done` of `size` bytes of one file; written by the thread that works on it, read by the one that shows it."""

    file: File
    done: int = 0
    started: bool = False


def read_sums(place: Path, progress: Progress, stop: threading.Event) -> File:
    """What the file at `place` is. Raises OSError, and Stopped."""
    return _read(place, progress, stop, lambda block: None)


def copied(place: Path, target: Path, progress: Progress, stop: threading.Event) -> File:
    """The same, while it is copied to `target`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(target, flags, 0o644), "wb", buffering=0) as copy:
        return _read(place, progress, stop, lambda block: write(copy, block))


def _read(place: Path, progress: Progress, stop: threading.Event, take: Callable[[memoryview], None]) -> File:
    sums = Sums(progress.file)
    buffer = memoryview(bytearray(min(BLOCK, max(1, progress.file.size))))
    with place.open("rb", buffering=0) as source:
        while length := source.readinto(buffer):
            sums.update(buffer[:length])
            take(buffer[:length])
            progress.done += length
            if stop.is_set():
                raise Stopped
    return sums.of(progress.file)


def write(file: io.FileIO, block: bytes | memoryview) -> None:
    """All of it: what a disk that is filling up takes may be a piece."""
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]
