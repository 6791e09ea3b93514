"""One start at a time on a device: a lock file a device, held by the kernel for as long as its holder lives."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def held(folder: Path, names: Sequence[str], pause: Callable[[], object]) -> Iterator[None]:
    """Hold the locks `names`; while another holds one, `pause` is called again and again.

    Locks are taken in the order of their names, everywhere the same, so no two keepers wait for each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name in sorted(names):
            descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, descriptor)
            while not _taken(descriptor):
                pause()
        yield


@contextlib.contextmanager
def owned(folder: Path, name: str) -> Iterator[bool]:
    """Hold one lock, or yield False at once when another holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield _taken(descriptor)
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
