"""What every command asks of a model's folder: what its files are, whether there is room, whether it is in use."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.filesize import decimal

from vllm_unified import state
from vllm_unified.errors import UserError
from vllm_unified.hub.manifest import PART, File, size_of
from vllm_unified.hub.parallel import in_parallel
from vllm_unified.hub.sums import Progress, read_sums
from vllm_unified.settings import Model, Settings


def read_all(
    folder: Path, files: Sequence[Progress], tick: Callable[[], None]
) -> Iterator[tuple[Progress, File | None]]:
    """Each file with what it is; None where it has another size, or can't be read."""

    def sums(progress: Progress, stop: threading.Event) -> File | None:
        progress.started = True
        path = folder / progress.file.path
        if size_of(path) != progress.file.size:
            return None
        try:
            return read_sums(path, progress, stop)
        except OSError:  # of a disk that is failing
            return None

    largest_first = sorted(files, key=lambda each: -each.file.size)
    return in_parallel(sums, largest_first, os.cpu_count() or 1, tick)


def need_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder}: needs {decimal(size)}, {decimal(free)} are free; free {decimal(size - free)}, "
            "or name another place in `path`"
        )


def of_disk(error: OSError, path: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full; make room, and run it again")
    return UserError(f"{path}: {error.strerror}")


def must_not_run(settings: Settings, model: Model) -> None:
    if state.read(settings.run, model.key).is_kept:
        raise UserError(f"models.{model.key} runs; ./deploy.sh stop {model.key} ends it first")


def part_of(place: Path) -> Path:
    """Where the bytes stand until they are known to be right."""
    return place.with_name(place.name + PART)


def size_of_folder(folder: Path) -> int:
    """Bytes of what stands in it, unfinished files too."""
    return sum(size_of(Path(path) / name) or 0 for path, _, names in os.walk(folder) for name in names)


def remove_empty_folders(folder: Path) -> None:
    """`folder` too, if nothing is left in it."""
    for path, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(path) and not os.path.islink(path):
            os.rmdir(path)
