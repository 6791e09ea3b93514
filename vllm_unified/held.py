"""What process groups, as those of engines, hold of this machine's memory and of its GPUs."""

import contextlib
import os
from collections.abc import Collection, Mapping

import psutil


def processes_of(leaders: Collection[int]) -> dict[int, set[int]]:
    """By the leader of each group: the processes that are in it now."""
    found: dict[int, set[int]] = {leader: set() for leader in leaders}
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if (group := found.get(os.getpgid(pid))) is not None:
                group.add(pid)
    return found


def memory_of(pids: Collection[int]) -> int | None:
    """Bytes of the machine's memory; pages that the processes share count once (PSS). None where it can't be told.

    The kernel looks at every page: some milliseconds for each GiB.
    """
    sizes = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            sizes.append(int(psutil.Process(pid).memory_full_info().pss))
    return sum(sizes) or None


def gpu_memory_of(pids: Collection[int], by_process: Mapping[int, int] | None) -> int | None:
    """Bytes on all GPUs, with what `devices.held_on_gpus` told. None where it can't be told."""
    return sum((by_process or {}).get(pid, 0) for pid in pids) or None
