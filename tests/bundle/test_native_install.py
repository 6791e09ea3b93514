"""A bundle for hosts without Docker: what install.sh knows of the machine before it changes anything."""

import base64
import hashlib
import platform
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.bundle.conftest import unpacked
from tests.bundle.test_scripts import path_without, run
from vllm_unified.bundle.commands import ARCHITECTURES
from vllm_unified.bundle.contents import as_sums
from vllm_unified.bundle.wheels import requirements

OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
NATIVE = {
    "BUNDLE_RUNTIME": "native",
    "BUNDLE_ARCHITECTURE": ARCHITECTURES[platform.machine()],
    "BUNDLE_DEVICES": "cpu",
    "BUNDLE_PYTHON": OWN,
    "BUNDLE_PACKAGE_BYTES": "1000",
}


def wheel(folder: Path, name: str, tag: str, scripts: tuple[Path, ...] = ()) -> dict[str, bytes]:
    """Of version 1, in the folder; with its place in a bundle."""
    path = folder / f"{name}-1-{tag}.whl"
    entries = {
        f"{name}-1.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n".encode(),
        f"{name}-1.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
        **{f"{name}-1.data/scripts/{script.name}": script.read_bytes() for script in scripts},
    }
    with zipfile.ZipFile(path, "w") as archive:
        for place, content in entries.items():
            archive.writestr(place, content)
        archive.writestr(f"{name}-1.dist-info/RECORD", "".join(f"{_record(*each)}\n" for each in entries.items()))
    return {f"wheels/{path.name}": path.read_bytes()}


def _record(place: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{place},sha256={digest},{len(content)}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with uv, which is what installs, and a package `one`."""
    scratch = tmp_path_factory.mktemp("native")
    uv = Path(sys.executable).with_name("uv")
    files = {
        "wheels/requirements.txt": b"one==1\nuv==1\n",
        **wheel(scratch, "uv", "py3-none-any", (uv,)),
        **wheel(scratch, "one", "py3-none-any"),
    }
    return unpacked(scratch, files, {}, NATIVE)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """One that a test may change, in a folder with a space in its name."""
    return Path(shutil.copytree(made, tmp_path / "on a stick"))


def change(bundle: Path, about: Mapping[str, str]) -> None:
    lines = "".join(f"{name}={value}\n" for name, value in about.items())
    with (bundle / "bundle.env").open("a", encoding="utf-8") as file:
        file.write(lines)


def dry_run(bundle: Path, tmp_path: Path, *lacking: str, site: str = "s", **environ: str) -> tuple[int, str]:
    """On a machine without a GPU, and without these programs."""
    path = path_without("nvidia-smi", tmp_path / "bin")
    for name in lacking:
        (tmp_path / "bin" / name).unlink(missing_ok=True)
    arguments = ("--dry-run", "--no-verify", "--to", str(tmp_path / site))
    done = run(bundle / "install.sh", *arguments, PATH=path, **{"PYTHON": sys.executable, **environ})
    assert not (tmp_path / site).exists()
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def test_a_machine_on_which_it_goes(bundle: Path, tmp_path: Path) -> None:
    code, said = dry_run(bundle, tmp_path)
    assert (code, "installs v1" in said, "nothing was changed" in said) == (0, True, True), said


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"BUNDLE_PYTHON": "3.99"}, "needs Python 3.99, which the bundle was made for; bring it from the installation"),
        ({"BUNDLE_ARCHITECTURE": "s390x"}, "the bundle is for s390x, this machine is "),
        ({"BUNDLE_DEVICES": "gpu"}, "the bundle is for NVIDIA GPUs, and nvidia-smi shows none; bring the driver"),
        ({"BUNDLE_PACKAGE_BYTES": str(10**15)}, "needs 1000.0 TB"),
    ],
)
def test_another_machine(bundle: Path, tmp_path: Path, about: dict[str, str], said: str) -> None:
    change(bundle, about)
    code, problem = dry_run(bundle, tmp_path)
    assert (code, said in problem) == (1, True), problem


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("cp27-cp27m-manylinux2014_x86_64", "two==1 has no wheels with a matching Python"),
        ("py3-none-manylinux_2_99_x86_64", "two==1 has no wheels with a matching platform tag"),
        ("py3-none-win_amd64", "two==1 has no wheels with a matching platform tag"),
    ],
)
def test_wheels_of_another_system(bundle: Path, tmp_path: Path, tag: str, said: str) -> None:
    wheel(bundle / "wheels", "two", tag)
    with (bundle / "wheels/requirements.txt").open("a") as file:
        file.write("two==1\n")
    code, problem = dry_run(bundle, tmp_path)
    assert (code, said in problem) == (1, True), problem
    assert f"the Python packages are not for {sys.executable}: Because " in problem
    assert problem.count("\n") == 2


def test_a_library_that_no_wheel_brings(bundle: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *libnuma*) exit 1 ;; *libstdc*|*libz*) exit 0 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    code, problem = dry_run(bundle, tmp_path, PYTHON=str(python))
    assert (code, problem.count("\n")) == (1, 2), problem
    assert "the library libnuma.so.1 is missing; bring it (in Debian and Ubuntu the package libnuma1)" in problem


@pytest.mark.parametrize(
    ("devices", "code", "said"),
    [
        ("cpu", 0, "note: without a compiler (in Debian and Ubuntu the package g++), each model wants engine_args."),
        ("gpu", 1, "a compiler (in Debian and Ubuntu the package gcc) is missing, and vLLM compiles kernels"),
    ],
)
def test_what_vllm_compiles_with(bundle: Path, tmp_path: Path, devices: str, code: int, said: str) -> None:
    change(bundle, {"BUNDLE_DEVICES": devices})
    done = dry_run(bundle, tmp_path, "g++", "clang++", "gcc", "clang")
    assert (done[0], said in done[1]) == (code, True), done[1]


def test_a_folder_that_is_too_deep(bundle: Path, tmp_path: Path) -> None:
    code, problem = dry_run(bundle, tmp_path, site="ä" * 40)
    assert (code, "too long a path" in problem) == (1, True), problem


def test_a_bundle_in_a_folder_with_a_comma(bundle: Path, tmp_path: Path) -> None:
    code, problem = dry_run(bundle.rename(tmp_path / "a,b"), tmp_path)
    assert (code, "has a comma" in problem) == (1, True), problem


def test_an_increment_without_the_bundle_before_it(bundle: Path, tmp_path: Path) -> None:
    wheel = bundle / "wheels/one-1-py3-none-any.whl"
    (bundle / "SINCE").write_bytes(as_sums({"wheels/one-1-py3-none-any.whl": "0" * 64}))
    wheel.unlink()
    code, problem = dry_run(bundle, tmp_path)
    assert (code, "wheels/one-1-py3-none-any.whl: neither here nor in" in problem) == (1, True), problem


def test_what_is_carried() -> None:
    """All that uv needs to install offline, and nothing of the tests."""
    names = {line.partition("==")[0].lower() for line in requirements()}
    assert {"click", "fastapi", "setuptools", "uv"} <= names
    assert not names & {"vllm-unified", "pytest", "mypy", "ruff"}
