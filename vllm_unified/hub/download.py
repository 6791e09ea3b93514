"""Fetching a model: what is there and right stays, the rest comes from the hub."""

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from rich.filesize import decimal

from vllm_unified.errors import UserError
from vllm_unified.hub import manifest
from vllm_unified.hub.fetching import Fetcher
from vllm_unified.hub.folders import need_room, part_of, read_all
from vllm_unified.hub.hubs import HubError, Listing, hubs_of, listings
from vllm_unified.hub.manifest import File, Manifest, how_to_bring, is_wanted, size_of
from vllm_unified.hub.progress import duration, shown
from vllm_unified.hub.sums import Progress
from vllm_unified.settings import Model, Settings


def download(settings: Settings, model: Model, distrusted: Collection[str] = ()) -> str:
    """Make the folder hold what the configuration names; what is there already and right stays. Says what was done.

    `distrusted`: paths that are fetched again though their sizes are right. Raises UserError.
    """
    folder = settings.folder(model)
    if model.repo is None:
        raise UserError(f"{settings.shown_file}: models.{model.key}: no `repo` says where it comes from")
    if settings.environment.is_offline:
        raise UserError(f"models.{model.key}: offline, so {how_to_bring(settings, model)}")
    recorded = manifest.read(folder)
    held = recorded if recorded and is_wanted(recorded, model) else None
    # The rest of a broken-off download is of the commit that it began with.
    asked = [
        (hub, held.revision if held and held.source == hub.key else model.revision)
        for hub in hubs_of(settings.environment, model.source)
    ]
    failure = None
    for listing in listings(asked, model.repo):
        try:
            return _fetch(settings, model, listing, distrusted)
        except HubError as error:
            failure = error
    raise failure or HubError(f"{model.repo}: no hub lists it")


def _fetch(settings: Settings, model: Model, listing: Listing, distrusted: Collection[str]) -> str:
    folder = settings.folder(model)
    manifest.refuse_symlinks(folder, listing.files)
    with manifest.locked(folder):
        recorded = manifest.read(folder)
        before = recorded.files if recorded else ()
        manifest.refuse_symlinks(folder, before)
        there = _there(model, folder, listing, recorded, distrusted)
        wanted = [file for file in listing.files if file.path not in there]
        need_room(folder, sum(file.size - (size_of(part_of(folder / file.path)) or 0) for file in wanted))
        _clear_the_way(folder, wanted, before)
        made = Manifest(model.repo, listing.hub.key, listing.revision, model.revision, listing.files)
        replace(made, files=tuple(there.get(file.path, file) for file in made.files)).write(folder)
        began = time.monotonic()
        progress = [Progress(file) for file in wanted]
        with shown(model.key, progress) as tick:
            fetched = Fetcher(listing, folder, settings.environment.download_timeout).all(progress, tick)
        there |= {file.path: file for file in fetched}
        replace(made, files=tuple(there[file.path] for file in made.files)).write(folder)
        for file in before:
            if file.path not in there:
                (folder / file.path).unlink(missing_ok=True)
    return _said(model, listing, fetched, time.monotonic() - began)


def _clear_the_way(folder: Path, wanted: Sequence[File], before: Sequence[File]) -> None:
    """What is not right now shall not look so after a break, nor what came of another file be gone on with."""
    known = {file.path: file for file in before}
    for file in wanted:
        (folder / file.path).unlink(missing_ok=True)
        if file.path in known and not known[file.path].is_same(file):
            part_of(folder / file.path).unlink(missing_ok=True)


def _there(
    model: Model, folder: Path, listing: Listing, recorded: Manifest | None, distrusted: Collection[str]
) -> dict[str, File]:
    """The files that need not be fetched. Raises UserError where someone else's files would be written over."""
    known = {file.path: file for file in recorded.files} if recorded else {}
    there: dict[str, File] = {}
    unknown = []
    for file in listing.files:
        if file.path in distrusted or size_of(folder / file.path) is None:
            continue
        if file.path in known and size_of(folder / file.path) == file.size and known[file.path].is_same(file):
            there[file.path] = known[file.path]
        else:
            unknown.append(Progress(file))
    with shown(f"{model.key}: looking at what is there", unknown) as tick:
        for progress, found in read_all(folder, unknown, tick):
            if found and found.is_same(progress.file):
                there[found.path] = found
            elif recorded is None:
                raise UserError(
                    f"{folder / progress.file.path}: another file than that of {listing.repo}, and no manifest says "
                    "whose; move the folder away, or say its own place in `path`"
                )
    return there


def _said(model: Model, listing: Listing, fetched: Sequence[File], seconds: float) -> str:
    size = sum(file.size for file in fetched)
    whole = f"{model.key}: {listing.repo} at {listing.revision[:12]} from {listing.hub.name}"
    if not fetched:
        return f"{whole}: complete, nothing to fetch"
    speed = f"{decimal(int(size / max(seconds, 0.001)))}/s"
    return f"{whole}: {len(fetched)} of {len(listing.files)} files, {decimal(size)} in {duration(seconds)} ({speed})"
