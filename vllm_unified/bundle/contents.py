"""What goes into a bundle: the program, the weights of models, and what came before."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_unified.errors import UserError
from vllm_unified.hub import manifest
from vllm_unified.hub.manifest import PART, State, look
from vllm_unified.settings import Model, Settings

# The program's own files: what runs in both runtimes, and what only a host without Docker needs of it.
PROGRAM = (
    *(".env.example", "CHANGELOG.md", "LICENSE", "README.md", "README.zh.md", "deploy.sh", "docs", "config"),
    "monitoring",
    *("docker-compose.yml", "docker-compose.cpu.yml", "docker-compose.demo.yml"),
    *("scripts/lib.sh", "scripts/docker.sh", "scripts/versions.env", "scripts/offline"),
)
NATIVE = ("pyproject.toml", "vllm_unified", "scripts/make_demo_models.py", "demo")
# For the first level of the unpacked folder.
TOP = {"install.sh", "verify.sh", "uninstall.sh", "README.md", "README.zh.md"}
# config/keys.yaml, and what is called after it.
KEYS = "keys.yaml"
# Of this machine alone: its certificate, and the key of that.
TLS = "release/config/tls/"


@dataclass(frozen=True)
class Source:
    """A file and its place in the bundle. `sha256`: what it has to be, where that is known."""

    place: str
    path: Path
    size: int
    sha256: str | None = None

    @property
    def executable(self) -> bool:
        return os.access(self.path, os.X_OK)


def files_below(folder: Path, place: str) -> Iterator[Source]:
    """Neither hidden ones, nor keys, nor what Python, an editor or a download leaves. Raises UserError."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        full = "/".join((place, *parts))
        if path.is_file() and not full.startswith(TLS) and not any(_is_left_out(part) for part in parts):
            yield _source(full, path)


def _is_left_out(name: str) -> bool:
    return name == "__pycache__" or name.startswith((".", KEYS)) or name.endswith((PART, ".pyc", "~"))


def _source(place: str, path: Path) -> Source:
    if re.search(r"[\n\\]", place):
        raise UserError(f"{path}: with letters that no checksum file can have; rename it")
    return Source(place, path, path.stat().st_size)


def program(checkout: Path, native: bool) -> list[Source]:
    """The release, and the scripts that work on the unpacked folder. Raises UserError where one is missing."""
    found: list[Source] = []
    for name in (*PROGRAM, *(NATIVE if native else ())):
        if not (checkout / name).exists():
            raise UserError(f"{checkout / name}: missing; make the bundle from a whole checkout")
        path, place = checkout / name, f"release/{name}"
        found += files_below(path, place) if path.is_dir() else [_source(place, path)]
    for source in files_below(checkout / "scripts" / "offline", "scripts"):
        name = source.path.name
        place = name if name in TOP else source.place
        found.append(Source(place, source.path, source.size))
    return found


def config(settings: Settings) -> list[Source]:
    """The configuration of this deployment, without its keys, in place of the one that is shipped."""
    return list(files_below(settings.home / "config", "release/config"))


def models(settings: Settings, chosen: Sequence[Model]) -> list[Source]:
    """Their folders, each once, at the places where the configuration looks for them. Raises UserError."""
    found: dict[str, Source] = {}
    for model in chosen:
        folder = settings.folder(model)
        place = _place_of(settings, model, folder)
        recorded = manifest.read(folder)
        if recorded is None:
            sources = list(files_below(folder, place))
        else:
            sources = [
                Source(f"{place}/{file.path}", folder / file.path, file.size, file.sha256) for file in recorded.files
            ]
            sources.append(_source(f"{place}/{manifest.NAME}", folder / manifest.NAME))
        found |= {source.place: source for source in sources}
    return list(found.values())


def _place_of(settings: Settings, model: Model, folder: Path) -> str:
    below = settings.home / "models"
    if not folder.is_relative_to(below) or folder == below:
        raise UserError(
            f"models.{model.key}.path: {folder}: a bundle carries what is below {below}; take it in with "
            f"./deploy.sh models import {folder} {model.key}, or leave the model out: --models LIST"
        )
    return folder.relative_to(settings.home).as_posix()


def missing(settings: Settings, chosen: Sequence[Model]) -> list[Model]:
    """Those whose weights are not there, or not in full."""
    return [model for model in chosen if look(settings.folder(model), model).state in (State.MISSING, State.INCOMPLETE)]


def read_sums(path: Path) -> dict[str, str]:
    """Path and SHA-256 of each file of a bundle, as SHA256SUMS has them. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error.strerror if isinstance(error, OSError) else 'not a text file'}") from None
    sums = {}
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if not match:
            raise UserError(f"{path}:{number}: not a checksum and a path; name the SHA256SUMS of an earlier bundle")
        sums[match[2]] = match[1]
    return sums


def as_sums(files: dict[str, str]) -> bytes:
    return "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(files.items())).encode()
