"""What belongs in a model's folder, in its `.manifest.json`; whether that is there, and how to get it."""

import contextlib
import fcntl
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_unified.errors import UserError
from vllm_unified.settings import Model, Settings

NAME = ".manifest.json"
LOCK = ".download.lock"
PART = ".part"
# One of them describes every model that vLLM loads from a folder.
CONFIGS = ("config.json", "params.json")


@dataclass(frozen=True)
class File:
    """`path`: from the model's folder, with `/`. `size`: bytes. The sums in hex digits; one of them at least.

    `git_sha1`: of a blob in git, which is all that Hugging Face says of small files.
    """

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    def is_same(self, other: "File") -> bool:
        """Whether both say the same bytes, as far as their sums can be compared."""
        pairs = [(self.sha256, other.sha256), (self.git_sha1, other.git_sha1)]
        known = [(one, two) for one, two in pairs if one and two]
        return self.size == other.size and bool(known) and all(one == two for one, two in known)


@dataclass(frozen=True)
class Manifest:
    """`revision`: the commit, as far as the hub names one. `asked`: what the configuration called it.

    Written before the first byte comes, so that a broken-off download is known to be one.
    """

    repo: str | None
    source: str | None
    revision: str | None
    asked: str | None
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def holds(self) -> str:
        return f"{self.repo} at {self.asked or self.revision}"

    def write(self, folder: Path) -> None:
        unfinished = folder / f"{NAME}.new"
        files = [{name: value for name, value in asdict(file).items() if value is not None} for file in self.files]
        with _opened_here(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            os.write(descriptor, f"{json.dumps({**asdict(self), 'files': files}, indent=1)}\n".encode())
        os.replace(unfinished, folder / NAME)


def read(folder: Path) -> Manifest | None:
    """None where there is none. Raises UserError where it is damaged, or names files outside the folder."""
    path = folder / NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(File(**entry) for entry in document.pop("files"))
        manifest = Manifest(**document, files=files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: no manifest ({error}); delete it, and fetch or import the model again") from None
    refuse_unsafe(manifest.files, str(path))
    return manifest


class State(StrEnum):
    COMPLETE = "complete"
    INCOMPLETE = "incomplete"  # begun, and not all there
    MISSING = "missing"
    UNVERIFIED = "unverified"  # there, and nothing says what it should be


@dataclass(frozen=True)
class Found:
    """`note`: what is wrong, where something is."""

    state: State
    manifest: Manifest | None = None
    note: str = ""


def look(folder: Path, model: Model) -> Found:
    """By the sizes of its files alone, which takes no time."""
    try:
        manifest = read(folder)
    except UserError as error:
        return Found(State.INCOMPLETE, note=str(error))
    if manifest is None:
        if any((folder / name).is_file() for name in CONFIGS):
            return Found(State.UNVERIFIED)
        return Found(State.MISSING, note="no config.json in it" if folder.exists() else "no such folder")
    if not is_wanted(manifest, model):
        return Found(State.INCOMPLETE, manifest, f"holds {manifest.holds}, not {wanted(model)}")
    missing = [file.path for file in manifest.files if size_of(folder / file.path) != file.size]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return Found(State.INCOMPLETE, manifest, f"{missing[0]}{more} of {len(manifest.files)} files not there in full")
    return Found(State.COMPLETE, manifest)


def is_wanted(manifest: Manifest, model: Model) -> bool:
    """Whether it holds what the configuration names; any revision will do where it names none."""
    if model.repo is None or manifest.repo is None:
        return True
    return manifest.repo == model.repo and model.revision in (None, manifest.asked, manifest.revision)


def wanted(model: Model) -> str:
    return f"{model.repo} at {model.revision or 'its main revision'}"


def how_to_get(settings: Settings, model: Model) -> str:
    """What to do where weights are missing."""
    if model.repo is None:
        return "put the weights there, or say in `repo` where they come from"
    if settings.environment.is_offline:
        return f"offline, so {how_to_bring(settings, model)}"
    return f"fetch {model.repo} with: ./deploy.sh models download {model.key}"


def how_to_bring(settings: Settings, model: Model) -> str:
    revision = f" at {model.revision}" if model.revision else ""
    return (
        f"bring {model.repo}{revision}: where there is a network, ./deploy.sh models download {model.key}; carry "
        f"{settings.folder(model)} over, and here ./deploy.sh models import FOLDER {model.key}"
    )


def size_of(path: Path) -> int | None:
    try:
        return path.stat(follow_symlinks=False).st_size
    except OSError:
        return None


def refuse_unsafe(files: Iterable[File], said_by: str) -> None:
    """Raises UserError where a list of files leads out of the folder, has no sums, or names one place twice."""
    files = list(files)
    for file in files:
        if wrong := _wrong_path(file.path) or _wrong_numbers(file):
            raise UserError(f"{said_by}: lists {file.path!r}, {wrong}; nothing was written")
    refuse_twice([file.path for file in files], said_by)


def refuse_twice(paths: Sequence[str], said_by: str) -> None:
    """Raises UserError where two of them could be one file, on a disk that knows no case."""
    # With their folders: A/b and a/c would meet in one folder on some disks, and a and a/b can't both be on any.
    folders = {f"{parent}/" for path in paths for parent in list(PurePosixPath(path).parents)[:-1]}
    spelled: dict[str, str] = {}
    for path in [*paths, *sorted(folders)]:
        key = unicodedata.normalize("NFC", path.rstrip("/")).casefold()
        if key in spelled:
            raise UserError(f"{said_by}: lists {spelled[key]!r} and {path!r}, one place on a disk; nothing was written")
        spelled[key] = path


def _wrong_path(path: Any) -> str | None:
    if not isinstance(path, str) or not path or len(path.encode("utf-8", "replace")) > 1024:
        return "which is no path"
    if "\\" in path or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in path):
        return "with letters that no path of a model has"
    if path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        return "which leads out of the model's folder"
    if path in (NAME, LOCK):
        return "a name that is kept for ourselves"
    return None


def _wrong_numbers(file: File) -> str | None:
    if type(file.size) is not int or file.size < 0:
        return "without a size"
    for value, digits in ((file.sha256, 64), (file.git_sha1, 40)):
        if value is not None and (not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value)):
            return "with a checksum that is none"
    return None if file.sha256 or file.git_sha1 else "without a checksum"


def refuse_symlinks(folder: Path, files: Iterable[File]) -> None:
    """Raises UserError where something in the model's folder would take what is written to another place."""
    paths = {PurePosixPath(name) for name in (NAME, f"{NAME}.new", LOCK)}
    for file in files:
        path = PurePosixPath(file.path)
        paths |= {path, path.with_name(path.name + PART), *path.parents}
    for path in sorted(paths - {PurePosixPath(".")}):
        if (folder / path).is_symlink():
            raise UserError(f"{folder / path}: a symlink; nothing was written. Remove it, or move the folder away")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time changes the folder. The file stays: without it two could hold locks on two files."""
    folder.mkdir(parents=True, exist_ok=True)
    with _opened_here(folder / LOCK, os.O_RDWR | os.O_CREAT) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another download is at work there; wait for it, or end it") from None
        yield


@contextlib.contextmanager
def _opened_here(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
