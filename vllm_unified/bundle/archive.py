"""A tar file written from front to back, in parts if wanted, which goes on where it was interrupted."""

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_unified.errors import UserError

BLOCK = 4 << 20
# Blocks that may wait to be written: reading and hashing go on meanwhile.
WAITING = 4


@dataclass(frozen=True)
class Member:
    """`start` and `end`: bytes of the whole stream, with the header before and the padding behind.

    `made_of`: what tells that the source is still the same, where the content is not kept as it was.
    """

    path: str
    size: int
    sha256: str
    start: int
    end: int
    made_of: str | None = None


class Parts:
    """One stream of bytes in files of at most `limit` bytes, called PLACE.001 and so on; without a limit, in PLACE.

    `sums`: SHA-256 of the parts that are whole. Writing and hashing them has a thread of its own.
    """

    def __init__(self, place: Path, limit: int | None) -> None:
        self.place = place
        self.limit = limit
        self.offset = 0
        self.sums: list[str] = []
        self._sum = hashlib.sha256()
        self._file: int | None = None
        self._writer = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def part(self, number: int) -> Path:
        return self.place if self.limit is None else self.place.with_name(f"{self.place.name}.{number + 1:03}")

    def all(self) -> list[Path]:
        """Those that there are, in their order."""
        if self.limit is None:
            return [self.place] if self.place.exists() else []
        names = re.compile(re.escape(self.place.name) + r"\.\d{3,}")
        found = [path for path in self.place.parent.iterdir() if names.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.suffix[1:]))

    def cut(self, offset: int) -> None:
        """Let the stream end there, and go on from there. Raises OSError."""
        self._close_part()
        self._remove_of_other_limit()
        self.offset, self.sums, self._sum = offset, [], hashlib.sha256()
        for number, part in enumerate(self.all()):
            keep = offset if self.limit is None else min(self.limit, max(0, offset - number * self.limit))
            if not keep:
                part.unlink()
                continue
            os.truncate(part, keep)
            with part.open("rb") as file:
                self._sum = hashlib.file_digest(file, "sha256")
            if keep == self.limit:
                self._end_part()

    def _remove_of_other_limit(self) -> None:
        """What one file was, or parts were, would be carried too."""
        for part in Parts(self.place, None if self.limit else 1).all():
            part.unlink()

    def write(self, block: bytes) -> None:
        """Raises OSError, of this block or of one before it."""
        while len(self._waiting) >= WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._writer.submit(self._write, block))

    def flush(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        self._writer.shutdown(cancel_futures=True)
        self._close_part()

    def finish(self) -> dict[Path, str]:
        """Each part with its SHA-256. Raises OSError."""
        self.flush()
        self.close()
        if self.limit is None or self.offset % self.limit:
            self._end_part()
        return dict(zip(self.all(), self.sums, strict=True))

    def _write(self, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            if self._file is None:
                number = 0 if self.limit is None else self.offset // self.limit
                self._file = os.open(self.part(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            room = len(rest) if self.limit is None else self.limit - self.offset % self.limit
            written = os.write(self._file, rest[:room])
            self._sum.update(rest[:written])
            self.offset += written
            rest = rest[written:]
            if self.limit is not None and self.offset % self.limit == 0:
                self._close_part()
                self._end_part()

    def _end_part(self) -> None:
        self.sums.append(self._sum.hexdigest())
        self._sum = hashlib.sha256()

    def _close_part(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)  # who reads it back reads the disk
            os.close(self._file)
            self._file = None

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """What stands between these offsets, as far as it is there. Raises OSError."""
        while start < end:
            number, at = (0, start) if self.limit is None else divmod(start, self.limit)
            if not self.part(number).exists():
                return
            with self.part(number).open("rb", buffering=0) as file:
                file.seek(at)
                while start < end and (block := file.read(min(BLOCK, end - start))):
                    start += len(block)
                    yield block
            if self.limit is None or start % self.limit:
                return


class Archive:
    """The tar file at `place`, of members that all lie in `folder`.

    Beside it a journal says which members are in it as a whole. What `inputs` says has to be the same for the archive
    of an interrupted run to be gone on with; otherwise it is begun anew.
    """

    def __init__(self, place: Path, folder: str, limit: int | None, inputs: dict[str, object]) -> None:
        self.folder = folder
        self.parts = Parts(place, limit)
        self.members: dict[str, Member] = {}
        self._journal = place.with_name(f".{place.name}.journal")
        self._inputs = json.dumps({"folder": folder, "limit": limit, **inputs}, sort_keys=True)
        self._go_on()

    def _go_on(self) -> None:
        for member in self._recorded():
            data = self.parts.read(member.start, member.end)
            if hash_of_member(data, member) != member.sha256:
                break
            self.members[member.path] = member
        end = max((member.end for member in self.members.values()), default=0)
        self.parts.cut(end)
        lines = [self._inputs, *(json.dumps(asdict(member)) for member in self.members.values())]
        self._journal.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _recorded(self) -> list[Member]:
        """As far as the journal can be read: power may have been lost while it was written."""
        if not self._journal.exists():
            return []
        inputs, *lines = self._journal.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        members: list[Member] = []
        if inputs == self._inputs:
            with contextlib.suppress(ValueError, TypeError):
                for line in lines:
                    members.append(Member(**json.loads(line)))
        return members

    def made_of(self, source: str) -> Member | None:
        return next((member for member in self.members.values() if member.made_of == source), None)

    def add(
        self,
        path: str,
        size: int,
        blocks: Iterable[bytes],
        *,
        expected: str | None = None,
        executable: bool = False,
        made_of: str | None = None,
    ) -> Member:
        """Raises UserError where the blocks are not `size` bytes, or have another SHA-256 than the one expected."""
        self.parts.flush()
        start = self.parts.offset
        entry = tarfile.TarInfo(f"{self.folder}/{path}")
        entry.size, entry.mode = size, 0o755 if executable else 0o644
        header = entry.tobuf(tarfile.GNU_FORMAT)
        self.parts.write(header)
        sha256 = hashlib.sha256()
        left = size
        for block in blocks:
            sha256.update(block)
            self.parts.write(block)
            left -= len(block)
        if left or (expected and sha256.hexdigest() != expected):
            remedy = "; ./deploy.sh models verify --repair" if path.startswith("models/") else ""
            damaged = f"damaged, its checksum is another than it should be{remedy}"
            raise UserError(f"{path}: {'its size changed meanwhile' if left else damaged}")
        self.parts.write(bytes(-size % tarfile.BLOCKSIZE))
        self.parts.flush()
        member = Member(path, size, sha256.hexdigest(), start, self.parts.offset, made_of)
        self.members[path] = member
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(f"{json.dumps(asdict(member))}\n")
        return member

    def add_content(self, path: str, content: bytes) -> None:
        """Unless an interrupted run did."""
        if path not in self.members:
            self.add(path, len(content), [content])

    def close(self) -> None:
        """As it is: another run goes on with it."""
        self.parts.close()

    def finish(self) -> dict[Path, str]:
        """Each part with its SHA-256. Raises OSError."""
        self.parts.write(bytes(2 * tarfile.BLOCKSIZE))
        sums = self.parts.finish()
        self._journal.unlink()
        return sums


def hash_of_member(data: Iterable[bytes], member: Member) -> str:
    """SHA-256 of the content alone, of all that belongs to a member."""
    header = member.end - member.start - member.size - -member.size % tarfile.BLOCKSIZE
    sha256 = hashlib.sha256()
    skipped, left = 0, member.size
    for block in data:
        skip = min(len(block), header - skipped)
        skipped += skip
        piece = memoryview(block)[skip : skip + left]
        sha256.update(piece)
        left -= len(piece)
    return sha256.hexdigest()
