"""The tar file: in parts or one, gone on with wherever it was broken off, and what tar makes of it."""

import hashlib
import random
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from vllm_unified.bundle.archive import Archive, Parts
from vllm_unified.errors import UserError

FILES: Mapping[str, bytes] = {
    "release/deploy.sh": b"#!/bin/sh\n",
    "models/chat/model.safetensors": random.Random(1).randbytes(70_001),
    "models/chat/empty": b"",
    f"models/{'long/' * 40}config.json": b"{}",
    "images/blobs/sha256/aa": random.Random(2).randbytes(1024),
}
INPUTS: dict[str, object] = {"version": "v1"}


class Interrupted(Exception):
    pass


def pieces(content: bytes, break_after: int | None = None) -> Iterator[bytes]:
    for at in range(0, len(content), 1000):
        if break_after is not None and at >= break_after:
            raise Interrupted
        yield content[at : at + 1000]


def fill(place: Path, limit: int | None, inputs: dict[str, object] = INPUTS) -> dict[Path, str]:
    """As an uninterrupted run does; what is there stays."""
    archive = Archive(place, "folder", limit, inputs)
    for path, content in FILES.items():
        if path not in archive.members:
            archive.add(path, len(content), pieces(content), executable=path.endswith(".sh"))
    return archive.finish()


def unpacked(parts: Mapping[Path, str], into: Path) -> dict[str, bytes]:
    """By the real tar."""
    into.mkdir()
    stream = b"".join(part.read_bytes() for part in parts)
    subprocess.run(["tar", "x", "-C", into], input=stream, check=True)
    files = (path for path in sorted(into.rglob("*")) if path.is_file())
    return {path.relative_to(into / "folder").as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("limit", [None, 512, 10_000, 65_536, 10**9])
def test_tar_finds_what_was_put_in(tmp_path: Path, limit: int | None) -> None:
    parts = fill(tmp_path / "bundle.tar", limit)
    assert unpacked(parts, tmp_path / "there") == FILES
    assert (tmp_path / "there/folder/release/deploy.sh").stat().st_mode & 0o777 == 0o755
    assert parts == {part: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts}
    assert all(part.stat().st_size <= (limit or 10**9) for part in parts)
    assert {path.name for path in tmp_path.iterdir()} == {"there", *(part.name for part in parts)}


@pytest.mark.parametrize("limit", [None, 10_000])
@pytest.mark.parametrize("break_after", [0, 1000, 30_000, 70_000])
def test_a_broken_off_run_is_gone_on_with(tmp_path: Path, limit: int | None, break_after: int) -> None:
    whole = fill(tmp_path / "whole.tar", limit)
    place = tmp_path / "bundle.tar"
    archive = Archive(place, "folder", limit, INPUTS)
    (first, first_content), (second, content), *_ = FILES.items()
    archive.add(first, len(first_content), [first_content], executable=True)
    with pytest.raises(Interrupted):
        archive.add(second, len(content), pieces(content, break_after))
    archive.close()
    assert list(Archive(place, "folder", limit, INPUTS).members) == [first]
    assert list(fill(place, limit).values()) == list(whole.values())


def test_what_the_disk_lost_is_written_again(tmp_path: Path) -> None:
    whole = fill(tmp_path / "whole.tar", 10_000)
    place = tmp_path / "bundle.tar"
    archive = Archive(place, "folder", 10_000, INPUTS)
    for path, content in FILES.items():
        archive.add(path, len(content), [content], executable=path.endswith(".sh"))
    archive.close()
    damaged = tmp_path / "bundle.tar.003"
    bytes_there = bytearray(damaged.read_bytes())
    bytes_there[5000] ^= 1
    damaged.write_bytes(bytes_there)
    again = Archive(place, "folder", 10_000, INPUTS)
    assert list(again.members) == ["release/deploy.sh"]
    again.close()
    assert list(fill(place, 10_000).values()) == list(whole.values())


@pytest.mark.parametrize("cut", [1, 20, 180])
def test_a_journal_whose_last_line_was_cut_off(tmp_path: Path, cut: int) -> None:
    place = tmp_path / "bundle.tar"
    archive = Archive(place, "folder", None, INPUTS)
    for path, content in list(FILES.items())[:2]:
        archive.add(path, len(content), [content], executable=path.endswith(".sh"))
    archive.close()
    journal = tmp_path / ".bundle.tar.journal"
    journal.write_bytes(journal.read_bytes()[: -1 - cut])
    again = Archive(place, "folder", None, INPUTS)
    assert list(again.members) == ["release/deploy.sh"]
    again.close()
    assert unpacked(fill(place, None), tmp_path / "there") == FILES


@pytest.mark.parametrize("lost", [b"", bytes(300), b"{}\n"])
def test_a_journal_that_was_lost(tmp_path: Path, lost: bytes) -> None:
    place = tmp_path / "bundle.tar"
    place.write_bytes(bytes(5000))
    (tmp_path / ".bundle.tar.journal").write_bytes(lost)
    assert unpacked(fill(place, None), tmp_path / "there") == FILES


def test_other_inputs_begin_anew(tmp_path: Path) -> None:
    place = tmp_path / "bundle.tar"
    archive = Archive(place, "folder", 10_000, INPUTS)
    archive.add("old", 50_000, [bytes(50_000)])
    archive.close()
    parts = fill(place, 10_000, {"version": "v2"})
    assert unpacked(parts, tmp_path / "there") == FILES


def test_other_parts_than_before_leave_none(tmp_path: Path) -> None:
    place = tmp_path / "bundle.tar"
    made = [fill(place, limit) for limit in (512, 50_000, None, 50_000)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(part.name for part in made[-1])
    assert [len(parts) for parts in made] == [150, 2, 1, 2]


@pytest.mark.parametrize(("size", "sha256", "said"), [(9, None, "its size changed"), (10, "0" * 64, "damaged")])
def test_a_file_that_is_not_what_it_should_be(tmp_path: Path, size: int, sha256: str | None, said: str) -> None:
    archive = Archive(tmp_path / "bundle.tar", "folder", None, INPUTS)
    with pytest.raises(UserError, match=f"weights: {said}"):
        archive.add("weights", size, [bytes(10)] if size == 10 else [bytes(8)], expected=sha256)
    archive.close()
    assert unpacked(fill(tmp_path / "bundle.tar", None), tmp_path / "there") == FILES


def test_a_disk_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    parts = Parts(Path("/dev/full"), None)
    parts.write(bytes(100))
    with pytest.raises(OSError, match="No space left"):
        parts.flush()
