"""A model that someone brought: a folder on a stick, or one of Hugging Face's cache."""

import os
import re
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.filesize import decimal

from vllm_unified.errors import UserError
from vllm_unified.hub import manifest
from vllm_unified.hub.folders import must_not_run, need_room, of_disk, part_of, remove_empty_folders
from vllm_unified.hub.manifest import CONFIGS, LOCK, NAME, PART, File, Manifest, State, is_wanted, look, size_of, wanted
from vllm_unified.hub.parallel import in_parallel
from vllm_unified.hub.progress import duration, shown
from vllm_unified.hub.sums import Progress, copied, read_sums
from vllm_unified.settings import Model, Settings


@dataclass(frozen=True)
class Brought:
    """What lies in the folder that someone brought. `places`: where each file's bytes are, past symlinks.

    `is_cache`: of Hugging Face's, which has its files once for several snapshots.
    """

    source: Path
    manifest: Manifest
    places: dict[str, Path]
    is_cache: bool = False


def look_at(source: Path) -> Brought:
    """A folder with a manifest, a model of Hugging Face's cache, or any other folder. Raises UserError."""
    source = source.resolve()
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    cached = re.fullmatch(r"models--(.+?)--(.+)", source.name)
    if cached and (source / "snapshots").is_dir():
        source = _snapshot(source)
    recorded = manifest.read(source)
    if recorded is not None:
        manifest.refuse_symlinks(source, recorded.files)
        for file in recorded.files:
            if size_of(source / file.path) != file.size:
                raise UserError(f"{source / file.path}: not there in full ({file.size} bytes); bring it again")
        return Brought(source, recorded, {file.path: source / file.path for file in recorded.files})
    return _without_manifest(source)


def _snapshot(cache: Path) -> Path:
    main = cache / "refs" / "main"
    snapshots = sorted((cache / "snapshots").iterdir())
    if main.is_file():
        commit = main.read_text(encoding="utf-8").strip()
        snapshots = [each for each in snapshots if each.name == commit] or snapshots
    if len(snapshots) != 1:
        raise UserError(f"{cache / 'snapshots'}: {len(snapshots)} snapshots; name the one to import")
    return snapshots[0]


def _without_manifest(source: Path) -> Brought:
    cache = source.parents[1] if source.parent.name == "snapshots" else None
    cached = re.fullmatch(r"models--(.+?)--(.+)", cache.name) if cache else None
    bounds = cache.resolve() if cache and cached else source
    files: list[File] = []
    places: dict[str, Path] = {}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or name.endswith(PART) or path.is_dir():
            continue
        place = path.resolve()
        if not place.is_relative_to(bounds) or not place.is_file():
            raise UserError(f"{path}: leads out of {bounds}, or to nothing; bring the file itself")
        files.append(_of_blob(name, place) if cached else File(name, place.stat().st_size))
        places[name] = place
    if not any(name in places for name in CONFIGS):
        raise UserError(f"{source}: no config.json in it; name the folder of one model")
    repo = f"{cached[1]}/{cached[2]}" if cached else None
    commit = source.name if cached else None
    manifest.refuse_twice(list(places), str(source))
    made = Manifest(repo, "huggingface" if repo else None, commit, None, tuple(files))
    return Brought(source, made, places, is_cache=bool(cached))


def _of_blob(name: str, place: Path) -> File:
    """The cache calls its blobs by the sums that the hub gave: SHA-256 of large files, git's of small ones."""
    size = place.stat().st_size
    if re.fullmatch("[0-9a-f]{64}", place.name):
        return File(name, size, sha256=place.name)
    return File(name, size, git_sha1=place.name if re.fullmatch("[0-9a-f]{40}", place.name) else None)


def bring(settings: Settings, model: Model, brought: Brought, move: bool) -> str:
    """Take it into the model's place, each file with the sums that are known of it. Says what was done.

    Nothing is in its place before all is read and right. Raises UserError.
    """
    folder, files = settings.folder(model), brought.manifest.files
    _refuse(settings, model, brought, move)
    in_place = folder.exists() and folder.samefile(brought.source)
    renamed = in_place or (move and _are_on_one_disk(folder, brought.source))
    began = time.monotonic()
    with manifest.locked(folder):
        if not renamed:
            need_room(folder, brought.manifest.size)
        taken = _taken(model, brought, folder, renamed)
        if not in_place:
            _put_in_place(brought, folder, renamed)
        replace(brought.manifest, files=taken).write(folder)
    if move and not in_place:
        _clear(brought)
    size = decimal(brought.manifest.size)
    return f"{model.key}: {len(files)} files, {size} in {duration(time.monotonic() - began)}, in {folder}"


def _refuse(settings: Settings, model: Model, brought: Brought, move: bool) -> None:
    folder, source = settings.folder(model), brought.source
    if not is_wanted(brought.manifest, model):
        raise UserError(f"{source}: holds {brought.manifest.holds}; models.{model.key} wants {wanted(model)}")
    if move and brought.is_cache:
        raise UserError(f"{source}: Hugging Face's own cache, which would be left broken; leave --move out")
    in_place = folder.exists() and folder.samefile(source)
    if not in_place and look(folder, model).state in (State.COMPLETE, State.UNVERIFIED):
        raise UserError(f"{folder}: holds a model already; ./deploy.sh models remove {model.key} makes room")
    must_not_run(settings, model)
    manifest.refuse_symlinks(folder, brought.manifest.files)


def _taken(model: Model, brought: Brought, folder: Path, renamed: bool) -> tuple[File, ...]:
    """Each file as it was read, and where it is not to be renamed also copied to beside its place."""
    files = brought.manifest.files

    def take(each: Progress, stop: threading.Event) -> File:
        each.started = True
        place = brought.places[each.file.path]
        if renamed:
            return _checked(read_sums(place, each, stop), each.file, place)
        part = part_of(folder / each.file.path)
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _checked(copied(place, part, each, stop), each.file, place)
        except OSError as error:
            raise of_disk(error, part) from None

    progress = [Progress(file) for file in files]
    try:
        with shown(f"{model.key}: importing", progress) as tick:
            taken = {file.path: file for _, file in in_parallel(take, progress, os.cpu_count() or 1, tick)}
    except UserError:
        for file in () if renamed else files:
            part_of(folder / file.path).unlink(missing_ok=True)
        raise
    return tuple(taken[file.path] for file in files)


def _checked(found: File, expected: File, place: Path) -> File:
    known = expected.sha256 or expected.git_sha1
    if found.is_same(expected) or (not known and place.stat().st_size == expected.size):
        return found
    raise UserError(f"{place}: damaged, its checksum differs from the manifest's; bring it again")


def _put_in_place(brought: Brought, folder: Path, renamed: bool) -> None:
    for path, place in brought.places.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(place if renamed else part_of(target), target)


def _clear(brought: Brought) -> None:
    """After a move."""
    for place in (*brought.places.values(), brought.source / NAME, brought.source / LOCK):
        place.unlink(missing_ok=True)
    remove_empty_folders(brought.source)


def _are_on_one_disk(folder: Path, source: Path) -> bool:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return there.stat().st_dev == source.stat().st_dev
