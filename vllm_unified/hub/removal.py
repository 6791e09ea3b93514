"""Removing a model's files: those of its manifest, and nothing else."""

from pathlib import Path

from vllm_unified.errors import UserError
from vllm_unified.hub import manifest
from vllm_unified.hub.folders import must_not_run, part_of, remove_empty_folders
from vllm_unified.hub.manifest import LOCK, NAME, Manifest
from vllm_unified.settings import Model, Settings


def to_remove(settings: Settings, model: Model) -> Manifest:
    """What would go. Raises UserError where it may not."""
    folder = settings.folder(model)
    must_not_run(settings, model)
    if not folder.exists():
        raise UserError(f"models.{model.key}: {folder}: no such folder; nothing to remove")
    for other in settings.all_engines:
        theirs = settings.folder(other).resolve()
        if other.key != model.key and theirs.is_relative_to(folder.resolve()):
            raise UserError(f"{folder}: models.{other.key} uses it too; nothing was removed")
    recorded = manifest.read(folder)
    if recorded is None:
        raise UserError(f"{folder}: no manifest says which files are the model's; remove them yourself: rm -r {folder}")
    manifest.refuse_symlinks(folder, recorded.files)
    return recorded


def remove(settings: Settings, model: Model) -> str:
    """Says what was done. Raises UserError, as above."""
    folder = settings.folder(model)
    to_remove(settings, model)
    with manifest.locked(folder):
        recorded = to_remove(settings, model)
        # The manifest last: broken off, it can be done again.
        for file in recorded.files:
            for path in (folder / file.path, part_of(folder / file.path)):
                path.unlink(missing_ok=True)
        for name in (NAME, LOCK):
            (folder / name).unlink(missing_ok=True)
    return _left(model, folder)


def _left(model: Model, folder: Path) -> str:
    remove_empty_folders(folder)
    if folder.exists():
        return f"{model.key}: removed; {folder} keeps what is not the model's"
    return f"{model.key}: removed {folder}"
