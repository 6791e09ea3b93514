"""What can't be made anew, in one tar: configuration and keys, .env, the jobs and usage; on request the models.

A header comes first and the files' SHA-256 last, so that another file, a damaged one and one that breaks off are told.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vllm_unified import __version__
from vllm_unified.errors import UserError
from vllm_unified.hub.manifest import LOCK, PART, File
from vllm_unified.hub.progress import shown
from vllm_unified.hub.sums import BLOCK, Progress

FORMAT = 1
HEADER, SUMS = "vllm-unified-backup.json", "SHA256SUMS"
CONFIG, VARIABLES, DATA, MODELS = "config", ".env", "data", "models"
# Beside what they become and what they were, so that one rename puts each into its place.
STAGED, REPLACED = ".restored", ".replaced"
# Neither saved nor replaced: models that every start can make, and a history that Prometheus writes all the time.
LEFT_OUT = {MODELS: {"demo"}, DATA: {"prometheus"}}
LARGEST_NOTE = 64 << 20  # bytes of the header or of the sums
OF_DATABASE = (".db-wal", ".db-shm", ".db-journal")


@dataclass(frozen=True)
class Places:
    """config/ and .env are in `project`, data/ and models/ in `home`: in a container two folders, else one."""

    project: Path
    home: Path

    @property
    def runtime(self) -> str:
        return "native" if self.project == self.home else "docker"

    def of(self, part: str) -> Path:
        return (self.project if part in (CONFIG, VARIABLES) else self.home) / part


def write(places: Places, out: IO[bytes], *, with_models: bool) -> None:
    """Also of a deployment that runs: databases are copied as SQLite does. Raises UserError."""
    parts = [CONFIG, VARIABLES, DATA, *([MODELS] if with_models else [])]
    header = {"format": FORMAT, "version": __version__, "runtime": places.runtime, "made": _now(), "parts": parts}
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(fileobj=out, mode="w|") as tar:
        entries = [each for part in parts for each in _entries(places.of(part), part)]
        entries = [(name, _snapshot(path, Path(scratch))) for name, path in entries]
        _add_note(tar, HEADER, json.dumps(header))
        progress = Progress(File("", sum(path.stat().st_size for _, path in entries if path.is_file())))
        sums: list[str] = []
        with shown("backup", [progress]) as tick:
            for name, path in entries:
                with contextlib.suppress(FileNotFoundError):  # a job that has just been deleted
                    sums += _add(tar, name, path, progress)
                tick()
        _add_note(tar, SUMS, "".join(sums))


def _now() -> str:
    return datetime.now(UTC).replace(microsecond=0).isoformat()


def _entries(root: Path, part: str) -> Iterator[tuple[str, Path]]:
    """Folders before what is in them. Links are followed, each folder once."""
    if root.is_file():
        yield part, root
    seen = set()
    for folder, names, files in os.walk(root, followlinks=True):
        here = Path(folder)
        seen.add(here.resolve())
        skipped = {STAGED, REPLACED, *(LEFT_OUT.get(part, ()) if here == root else ())}
        names[:] = sorted(name for name in names if name not in skipped and (here / name).resolve() not in seen)
        wanted = [each for each in sorted(files) if each != LOCK and not each.endswith((PART, *OF_DATABASE))]
        for name in (*names, *wanted):
            path = here / name
            if path.is_dir() or path.is_file():
                yield f"{part}/{path.relative_to(root).as_posix()}", path


def _snapshot(path: Path, scratch: Path) -> Path:
    """Of a database one that is whole, whatever is being written to it."""
    if path.suffix != ".db":
        return path
    copy = Path(tempfile.mkstemp(dir=scratch, suffix=".db")[1])
    try:
        with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
            source.backup(target)
    except sqlite3.Error as error:
        raise UserError(f"{path}: {error}; ./deploy.sh logs documents may say more") from None
    owner = path.stat()
    copy.chmod(owner.st_mode & 0o777)
    if os.geteuid() == 0:
        os.chown(copy, owner.st_uid, owner.st_gid)
    return copy


class _Read:
    """A file that is hashed as the tar takes it."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self.file, self.progress, self.sum = file, progress, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.sum.update(block)
        self.progress.done += len(block)
        return block


def _add(tar: tarfile.TarFile, name: str, path: Path, progress: Progress) -> Iterator[str]:
    """Yields its line of the sums."""
    entry = tarfile.TarInfo(name)
    if path.is_dir():
        _describe(entry, path.stat())
        entry.type = tarfile.DIRTYPE
        tar.addfile(entry)
        return
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        _describe(entry, status)
        entry.size = status.st_size
        read: Any = _Read(file, progress)
        try:
            tar.addfile(entry, read)
        except OSError as error:
            raise UserError(f"{path}: {error}; where it was changed meanwhile, try again") from None
    yield f"{read.sum.hexdigest()}  {name}\n"


def _describe(entry: tarfile.TarInfo, status: os.stat_result) -> None:
    entry.mode, entry.mtime = status.st_mode & 0o777, status.st_mtime
    entry.uid, entry.gid = status.st_uid, status.st_gid


def _add_note(tar: tarfile.TarFile, name: str, text: str) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = file.tell(), 0o600
        file.seek(0)
        tar.addfile(entry, file)


def restore(places: Places, stream: IO[bytes]) -> str:
    """Put all of a backup into its place, or nothing. Says what was restored. Raises UserError.

    What the backup has no file of stays: `.env`, all models that it has not.
    """
    parts: list[str] = []
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            header = _header(tar, places)
            parts = [part for part in (CONFIG, VARIABLES, DATA, MODELS) if part in header["parts"]]
            _refuse_leftovers(places, parts)
            _unpack(places, parts, tar)
        os.sync()
        _swap([move for part in parts for move in _moves(places, part)])
        for part in parts:
            _forget(_replaced(places, part))
    except (tarfile.TarError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"no backup of ./deploy.sh backup, or a damaged one ({error}); nothing was changed") from None
    finally:
        for part in parts:
            _forget(_staged(places, part))
    return f"restored {', '.join(parts)}, of {header['made']} and version {header['version']}"


def _header(tar: tarfile.TarFile, places: Places) -> dict[str, Any]:
    first = tar.next()
    if first is None or first.name != HEADER or not first.isfile():
        raise UserError("not a backup: it does not begin as ./deploy.sh backup writes it")
    header = json.loads(_note(tar, first))
    if header["format"] != FORMAT:
        raise UserError(
            f"a backup of format {header['format']}, and {__version__} reads {FORMAT}; take a newer version"
        )
    if header["runtime"] != places.runtime:
        raise UserError(f"a backup of a deployment that was {header['runtime']}, this one is {places.runtime}")
    return dict(header)


def _note(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    if file is None or member.size > LARGEST_NOTE:
        raise UserError(f"not a backup: {member.name} is no file of ours")
    return file.read().decode()


def _refuse_leftovers(places: Places, parts: Sequence[str]) -> None:
    for part in parts:
        aside = _replaced(places, part)
        if aside.is_file() or (aside.is_dir() and any(aside.iterdir())):
            raise UserError(f"{aside}: what was there before a restore that was broken off; move it back or remove it")


def _unpack(places: Places, parts: Sequence[str], tar: tarfile.TarFile) -> None:
    """Into the places beside the true ones. Raises UserError where not all is there as it was written."""
    found: dict[str, str] = {}
    expected: dict[str, str] | None = None
    for part in parts:
        _forget(_staged(places, part))
    for member in iter(tar.next, None):
        if member.name == SUMS:
            lines = (line.split("  ", 1) for line in _note(tar, member).splitlines())
            expected = {name: sum_ for sum_, name in lines}
            continue
        part, *rest = _checked(member, parts)
        target = _staged(places, part).joinpath(*rest)
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            found[member.name] = _write(tar, member, target)
        _give(target, member, places, part)
    if found != expected:
        wrong = next((name for name in found if expected and found[name] != expected.get(name, found[name])), None)
        what = f"{wrong} is not as it was written" if wrong else "it breaks off"
        raise UserError(f"a damaged backup: {what}; nothing was changed")


def _checked(member: tarfile.TarInfo, parts: Sequence[str]) -> tuple[str, ...]:
    path = PurePosixPath(member.name)
    inside = path.parts[0] in parts and not {"..", STAGED, REPLACED}.intersection(path.parts)
    is_variables = path.parts[0] == VARIABLES
    is_right = is_variables == (len(path.parts) == 1) and (member.isfile() or (member.isdir() and not is_variables))
    if not inside or not is_right or member.name != str(path) or "\0" in member.name:
        raise UserError(f"not a backup: {member.name!r} has no place in one; nothing was changed")
    return path.parts


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> str:
    """Its SHA-256."""
    done = hashlib.sha256()
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise UserError(f"not a backup: {member.name!r} stands in it twice; nothing was changed") from None
    with open(descriptor, "wb") as file:
        for block in _blocks(tar, member):
            done.update(block)
            file.write(block)
    os.utime(target, (member.mtime, member.mtime))
    return done.hexdigest()


def _blocks(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    source = tar.extractfile(member)
    while source and (block := source.read(BLOCK)):
        yield block


def _give(target: Path, member: tarfile.TarInfo, places: Places, part: str) -> None:
    """As root: config/ to whoever has the project here, the container's own to whom it belonged there."""
    os.chmod(target, member.mode & 0o777 | (0o700 if target.is_dir() else 0))
    if os.geteuid() == 0:
        in_project = part in (CONFIG, VARIABLES)
        os.chown(target, places.project.stat().st_uid if in_project else member.uid, member.gid)


def _staged(places: Places, part: str) -> Path:
    place = places.of(part)
    return place.with_name(f"{part}{STAGED}") if part == VARIABLES else place / STAGED


def _replaced(places: Places, part: str) -> Path:
    place = places.of(part)
    return place.with_name(f"{part}{REPLACED}") if part == VARIABLES else place / REPLACED


Move = tuple[Path, Path, Path]


def _moves(places: Places, part: str) -> Iterator[Move]:
    """Each place, what comes there (nothing, where the backup has none), and where what is there goes meanwhile."""
    place, staged, replaced = places.of(part), _staged(places, part), _replaced(places, part)
    if part == VARIABLES:
        if staged.exists():
            yield place, staged, replaced
        return
    place.mkdir(parents=True, exist_ok=True)
    replaced.mkdir(exist_ok=True)
    names = set(os.listdir(staged)) if staged.exists() else set()
    if part != MODELS:
        names |= set(os.listdir(place)) - {STAGED, REPLACED, *LEFT_OUT.get(part, ())}
    for name in sorted(names):
        yield place / name, staged / name, replaced / name


def _swap(moves: Sequence[Move]) -> None:
    """All of them, or on an error none."""
    done: list[tuple[Path, Path]] = []
    try:
        for place, staged, replaced in moves:
            for source, target in ((place, replaced), (staged, place)):
                if os.path.lexists(source):
                    os.rename(source, target)
                    done.append((source, target))
    except OSError as error:
        for source, target in reversed(done):
            os.rename(target, source)
        raise UserError(f"{error.filename}: {error.strerror}; nothing was changed") from None


def _forget(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
