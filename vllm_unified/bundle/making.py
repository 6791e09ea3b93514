"""Making the bundle."""

import hashlib
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.filesize import decimal

from vllm_unified.bundle.archive import BLOCK, Archive, Member, hash_of_member
from vllm_unified.bundle.contents import Source, as_sums
from vllm_unified.bundle.images import Image, Layout
from vllm_unified.errors import UserError
from vllm_unified.hub.folders import of_disk
from vllm_unified.hub.manifest import File
from vllm_unified.hub.parallel import Stopped, in_parallel
from vllm_unified.hub.progress import shown
from vllm_unified.hub.sums import Progress

FOLDER = "knowflow-offline"
SUMS = "SHA256SUMS"
SINCE = "SINCE"
ABOUT = "bundle.env"
# What an earlier bundle may stand in for; the program is always carried whole.
LARGE = ("images/", "models/", "wheels/")
MOST_PARTS = 999
# Of the size of what is compressed; vLLM's images come to less than half.
LARGEST_SHARE = 0.6


@dataclass(frozen=True)
class Plan:
    """`about`: what the scripts of the bundle read, as shell variables. `since`: files of an earlier bundle, and their
    sums. `part_bytes`: of each part, or None for one file. `jobs`: threads."""

    output: Path
    version: str
    about: dict[str, str]
    sources: Sequence[Source]
    images: Sequence[Image] = ()
    since: dict[str, str] = field(default_factory=dict)
    part_bytes: int | None = None
    jobs: int = 1

    @property
    def name(self) -> str:
        return f"{FOLDER}-{self.version}"

    @property
    def bytes(self) -> int:
        return sum(source.size for source in self.sources)

    @property
    def image_bytes(self) -> int:
        """Unpacked."""
        return sum(image.size for image in self.images)

    def inputs(self) -> dict[str, object]:
        """What an interrupted run has to have in common with the next one."""
        sources = [(each.place, each.size, each.path.stat().st_mtime_ns) for each in self.sources]
        return {"about": self.about, "since": self.since, "sources": sources}


@dataclass(frozen=True)
class Made:
    """`parts`: the files to carry, with their SHA-256. `sums`: of all that is in them, for an increment on it.

    `fingerprint`: SHA-256 of the SHA256SUMS that is carried.
    """

    parts: dict[Path, str]
    sums: Path
    fingerprint: str
    seconds: float


def make(plan: Plan, verify: bool, say: Callable[[str], None]) -> Made:
    """Raises UserError. What is made when it is broken off stays, and the next run goes on there."""
    began = time.monotonic()
    place = plan.output / f"{plan.name}.tar"
    sums, parts_sums = place.with_name(f"{plan.name}.{SUMS}"), place.with_name(f"{plan.name}.sha256")
    if parts_sums.exists():
        raise UserError(f"{parts_sums}: the bundle is made already; remove it, or give this one a --version of its own")
    if plan.part_bytes and plan.bytes / plan.part_bytes > MOST_PARTS:
        raise UserError(f"--split: more than {MOST_PARTS} parts, which are no longer in order when they are joined")
    _need_room(plan, place)
    plan.output.mkdir(parents=True, exist_ok=True)
    archive = Archive(place, FOLDER, plan.part_bytes, plan.inputs())
    if archive.members:
        say(f"goes on with {place.name}: {len(archive.members)} files are in it already")
    try:
        carried = _fill(plan, archive, say)
        members = list(archive.members.values())
        parts = archive.finish()
        if verify:
            _read_back(archive, members, plan.jobs)
    except OSError as error:
        raise of_disk(error, place) from None
    finally:
        archive.close()
    sums.write_bytes(as_sums(carried))
    parts_sums.write_bytes(as_sums({path.name: sha256 for path, sha256 in parts.items()}))
    fingerprint = next(member.sha256 for member in members if member.path == SUMS)
    return Made(parts, sums, fingerprint, time.monotonic() - began)


def _need_room(plan: Plan, place: Path) -> None:
    packed = LARGEST_SHARE * plan.image_bytes
    there = [place, *place.parent.glob(f"{place.name}.*")]
    needed = int(plan.bytes + packed) - sum(part.stat().st_size for part in there if part.exists())
    disk = next(folder for folder in (plan.output, *plan.output.parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(
            f"{plan.output}: needs about {decimal(needed)}, {decimal(free)} are free; make room, or name another "
            "place with --output"
        )


def _fill(plan: Plan, archive: Archive, say: Callable[[str], None]) -> dict[str, str]:
    """Path and sum of every file that the bundle has, and those of the earlier one that it builds on."""
    known = {path: sha256 for path, sha256 in plan.since.items() if path.startswith(LARGE)}
    files = [Progress(File(source.place, source.size)) for source in plan.sources]
    image = Progress(File("image", plan.image_bytes))
    unchanged: dict[str, str] = {}

    def is_there(path: str, sha256: str) -> bool:
        if known.get(path) == sha256:
            unchanged[path] = sha256
        return path in unchanged

    with shown(f"{plan.name}.tar", [image, *files]) as tick:

        def took(size: int) -> None:
            image.done += size
            tick()

        if plan.images:
            say("Docker gathers the image first; that takes a while")
            image.started = True
            Layout(archive, plan.jobs, took, is_there).save(plan.images)
            image.done = image.file.size
        for progress, source in zip(files, plan.sources, strict=True):
            if source.place not in archive.members and not _is_unchanged(source, known, is_there):
                progress.started = True
                blocks = _blocks(source, progress, tick)
                archive.add(source.place, source.size, blocks, expected=source.sha256, executable=source.executable)
            progress.done = source.size
    about = "".join(f"{name}={shlex.quote(value)}\n" for name, value in plan.about.items())
    archive.add_content(ABOUT, about.encode())
    archive.add_content(SINCE, as_sums(unchanged))
    carried = {path: member.sha256 for path, member in archive.members.items() if path != SUMS}
    archive.add_content(SUMS, as_sums(carried))
    return carried | unchanged


def _is_unchanged(source: Source, known: Mapping[str, str], is_there: Callable[[str, str], bool]) -> bool:
    if source.place not in known:
        return False
    with source.path.open("rb") as file:
        return is_there(source.place, source.sha256 or hashlib.file_digest(file, "sha256").hexdigest())


def _blocks(source: Source, progress: Progress, tick: Callable[[], None]) -> Iterator[bytes]:
    with source.path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            progress.done += len(block)
            tick()
            yield block


def _read_back(archive: Archive, members: Sequence[Member], jobs: int) -> None:
    """What the disk gives back is what was written."""
    files = {member.path: Progress(File(member.path, member.size)) for member in members}

    def check(member: Member, stop: threading.Event) -> bool:
        progress = files[member.path]
        progress.started = True

        def data() -> Iterator[bytes]:
            for block in archive.parts.read(member.start, member.end):
                if stop.is_set():
                    raise Stopped
                progress.done += len(block)
                yield block

        return hash_of_member(data(), member) == member.sha256

    with shown("verifying", list(files.values())) as tick:
        largest_first = sorted(members, key=lambda member: -member.size)
        for member, right in in_parallel(check, largest_first, jobs, tick):
            if not right:
                raise UserError(
                    f"{archive.parts.place}: {member.path} is damaged in what the disk gives back; remove the bundle, "
                    "look at the disk, and make it again"
                )
