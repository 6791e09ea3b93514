"""One start at a time on a device: a lock file a device, held by the kernel for as long as its holder lives."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def held(
    folder: Path, names: Sequence[str], pause: Callable[[], object], is_our_turn: Callable[[], bool]
) -> Iterator[list[int]]:
    """Hold the locks `names`; while another holds one, or it is not our turn, `pause` is called again and again.

    Locks are taken in the order of their names, everywhere the same, and who has one asks no more for its turn: so
    no two keepers wait for each other. A process that inherits the descriptors holds the locks too: until it ends,
    should its keeper be killed, or until the keeper lets go of them for both.
    """
    with contextlib.ExitStack() as stack:
        descriptors: list[int] = []
        for name in sorted(names):
            descriptor = stack.enter_context(_opened(folder, name))
            while (not descriptors and not is_our_turn()) or not _taken(descriptor, fcntl.LOCK_EX):
                pause()
            stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
            descriptors.append(descriptor)
        yield descriptors


@contextlib.contextmanager
def shared(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Hold those of the locks that nobody holds alone; others may do the same, and `held` waits for all of them."""
    with contextlib.ExitStack() as stack:
        for name in sorted(names):
            _taken(stack.enter_context(_opened(folder, name)), fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def owned(folder: Path, name: str) -> Iterator[bool]:
    """Hold one lock, or yield False at once when another holds it."""
    with _opened(folder, name) as descriptor:
        yield _taken(descriptor, fcntl.LOCK_EX)


@contextlib.contextmanager
def _opened(folder: Path, name: str) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
