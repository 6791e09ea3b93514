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
    return [Source(place, folder / place, len(content)) for place, content in files.items()]


ABOUT = {
    "BUNDLE_VERSION": "v1",
    "BUNDLE_RUNTIME": "docker",
    "BUNDLE_ARCHITECTURE": "amd64",
    "BUNDLE_DEVICES": "cpu",
    "BUNDLE_MODEL_BYTES": "0",
    "BUNDLE_IMAGE": "knowflow/vllm-unified:v1",
    "BUNDLE_IMAGE_ID": "sha256:0",
    "BUNDLE_IMAGE_BYTES": "0",
    "BUNDLE_PYTHON": "",
}


@pytest.fixture
def unpack(tmp_path: Path) -> Unpack:
    """A bundle with these files beside the program, unpacked into a folder with a space in its name."""

    def unpack(files: Mapping[str, bytes], since: Mapping[str, str] = {}, **about: str) -> Path:
        version = about.get("BUNDLE_VERSION", "v1")
        scratch = tmp_path / f"of {version}"
        sources = [*program(CHECKOUT, native=False), *sources_of(scratch / "in", files)]
        made = make(Plan(scratch, version, {**ABOUT, **about}, sources, since=dict(since)), verify=True, say=print)
        (tar,) = made.parts
        subprocess.run(["tar", "x", "-C", scratch, "-f", tar], check=True)
        return scratch / "knowflow-offline"

    return unpack
