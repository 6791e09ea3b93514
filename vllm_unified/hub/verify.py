"""Reading every file of a model, and comparing it with the manifest."""

import time
from dataclasses import dataclass

from vllm_unified.errors import UserError
from vllm_unified.hub import manifest
from vllm_unified.hub.folders import read_all
from vllm_unified.hub.manifest import Manifest, State, how_to_get, look, size_of
from vllm_unified.hub.progress import shown
from vllm_unified.hub.sums import Progress
from vllm_unified.settings import Model, Settings


@dataclass(frozen=True)
class Verdict:
    """`damage`: what is wrong with which file of the manifest."""

    manifest: Manifest
    damage: dict[str, str]
    seconds: float


def verify(settings: Settings, model: Model) -> Verdict:
    """Reads every file. Raises UserError where no manifest says what they should be."""
    folder = settings.folder(model)
    expected = manifest.read(folder)
    if expected is None:
        found = look(folder, model)
        if found.state is State.MISSING:
            raise UserError(f"models.{model.key}: {folder}: {found.note}; {how_to_get(settings, model)}")
        raise UserError(
            f"models.{model.key}: {folder}: no manifest says what its files should be; compare them with the hub "
            f"(./deploy.sh models download {model.key}), or take them as they are "
            f"(./deploy.sh models import {folder} {model.key})"
        )
    began = time.monotonic()
    files = [Progress(file) for file in expected.files]
    damage: dict[str, str] = {}
    with shown(f"{model.key}: verifying", files) as tick:
        for progress, found_file in read_all(folder, files, tick):
            file = progress.file
            size = size_of(folder / file.path)
            if size is None:
                damage[file.path] = "missing"
            elif size != file.size:
                damage[file.path] = f"{size} bytes, should be {file.size}"
            elif found_file is None or not found_file.is_same(file):
                damage[file.path] = "damaged, its checksum differs" if found_file else "unreadable"
    return Verdict(expected, {path: damage[path] for path in sorted(damage)}, time.monotonic() - began)
