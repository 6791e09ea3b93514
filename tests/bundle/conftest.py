"""Small bundles, made and unpacked as the large ones are."""

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT
from vllm_unified.bundle.contents import Source, program
from vllm_unified.bundle.making import Plan, make

Unpack = Callable[..., Path]


def sources_of(folder: Path, files: Mapping[str, bytes]) -> list[Source]:
    for place, content in files.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755 if content.startswith(b"#!") else 0o644)
    return [Source(place, folder / place, len(content)) for place, content in files.items()]


ABOUT = {
    "BUNDLE_VERSION": "v1",
    "BUNDLE_RUNTIME": "docker",
    "BUNDLE_ARCHITECTURE": "amd64",
    "BUNDLE_DEVICES": "cpu",
    "BUNDLE_MODEL_BYTES": "0",
    "BUNDLE_IMAGE": "knowflow/vllm-unified:v1",
    "BUNDLE_COMPANIONS": "",
    "BUNDLE_IMAGE_BYTES": "0",
    "BUNDLE_PROFILES": "",
    "BUNDLE_PYTHON": "",
}


@pytest.fixture
def unpack(tmp_path: Path) -> Unpack:
    """A bundle with these files beside the program, unpacked into a folder with a space in its name."""

    def unpack(files: Mapping[str, bytes], since: Mapping[str, str] = {}, **about: str) -> Path:
        return unpacked(tmp_path, files, since, about)

    return unpack


def unpacked(folder: Path, files: Mapping[str, bytes], since: Mapping[str, str], about: Mapping[str, str]) -> Path:
    native = about.get("BUNDLE_RUNTIME") == "native"
    version = about.get("BUNDLE_VERSION", "v1")
    scratch = folder / f"of {version}"
    sources = {each.place: each for each in (*program(CHECKOUT, native=native), *sources_of(scratch / "in", files))}
    plan = Plan(scratch, version, {**ABOUT, **about}, list(sources.values()), since=dict(since))
    made = make(plan, verify=True, say=print)
    (tar,) = made.parts
    subprocess.run(["tar", "x", "-C", scratch, "-f", tar], check=True)
    return scratch / "knowflow-offline"
