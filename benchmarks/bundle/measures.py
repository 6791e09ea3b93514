"""What is measured: ways to do the same with the same bytes, in turn, on cold files."""

import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.bundle.hub import COMMIT, REPO
from benchmarks.bundle.programs import (
    BUNDLE,
    KEY,
    Project,
    empty_engine,
    forget,
    hub,
    is_busy,
    make_project,
    run,
    shell,
)

Figures = dict[str, Any]
OURS = "vllm-unified"
VERSION = "benchmark"


@dataclass(frozen=True)
class Sizes:
    """`weights`: bytes. `image`: one that the Docker engine has."""

    rounds: int
    weights: int
    image: str


@dataclass(frozen=True)
class Took:
    """`stages`: seconds of each. `size`: bytes that came out, or were read."""

    stages: dict[str, float]
    size: int


def images(work: Path, sizes: Sizes) -> Figures:
    """An image out of one engine and into an empty one."""
    project = make_project(work / "home", 0)
    image = shlex.quote(sizes.image)

    def ours() -> Took:
        made = _bundle(project, work, "--skip-models", "--image", sizes.image)
        tar = work / f"{BUNDLE}-{VERSION}.tar"
        size = tar.stat().st_size
        with empty_engine(work / "engine") as host:
            line = f"tar xf {tar.name} && {BUNDLE}/scripts/load_images.sh && sync"
            installed = shell(line, cwd=work, DOCKER_HOST=host)
        shutil.rmtree(work / BUNDLE)
        _remove(work.glob(f"{BUNDLE}-*"))
        return Took({"made": made, "installed": installed}, size)

    def plain() -> Took:
        made = shell(f"docker save {image} | gzip >image.tar.gz && sync image.tar.gz", cwd=work)
        size = (work / "image.tar.gz").stat().st_size
        with empty_engine(work / "engine") as host:
            installed = shell("gunzip -c image.tar.gz | docker load && sync", cwd=work, DOCKER_HOST=host)
        _remove([work / "image.tar.gz"])
        return Took({"made": made, "installed": installed}, size)

    return _in_turn({OURS: ours, "docker save | gzip, gunzip | docker load": plain}, sizes.rounds)


def packing(work: Path, sizes: Sizes) -> Figures:
    """Weights from the disk into one file on the same disk, with their checksums."""
    project = make_project(work / "home", sizes.weights)
    out = work / "out"
    out.mkdir()

    def after_forgetting(line: str) -> Took:
        forget(project.weights)
        took = Took({"packed": shell(line, cwd=work)}, project.bytes)
        _remove(out.iterdir())
        return took

    def ours() -> Took:
        forget(project.weights)
        took = Took({"packed": _bundle(project, out, "--no-verify")}, project.bytes)
        _remove(out.iterdir())
        return took

    weights = _quoted(project.weights)
    ways = {
        OURS: ours,
        "cp + sha256sum": lambda: after_forgetting(f"cp {weights} out && sha256sum out/* >/dev/null && sync out/*"),
        "dd": lambda: after_forgetting(
            f"dd if=/dev/zero of=out/zeros bs=4M count={project.bytes} iflag=count_bytes conv=fsync"
        ),
    }
    return _in_turn(ways, sizes.rounds)


def verification(work: Path, sizes: Sizes) -> Figures:
    """The same files, read from the disk."""
    project = make_project(work / "home", sizes.weights)
    _bundle(project, work, "--no-verify")
    unpacked = work / BUNDLE
    shell(f"tar xf {BUNDLE}-{VERSION}.tar --exclude={BUNDLE}/models", cwd=work)
    _remove(work.glob(f"{BUNDLE}-*"))
    # Links, so that all three read the same places of the disk.
    shutil.copytree(project.home / "models", unpacked / "models", copy_function=os.link)

    def cold(read: Callable[[], float]) -> Callable[[], Took]:
        def way() -> Took:
            forget(project.weights)
            return Took({"read": read()}, project.bytes)

        return way

    ways = {
        "verify.sh": lambda: run(["./verify.sh"], cwd=unpacked),
        "models verify": lambda: project.run("models", "verify", KEY),
        "cat": lambda: shell(f"cat {_quoted(project.weights)} >/dev/null", cwd=work),
    }
    return _in_turn({name: cold(read) for name, read in ways.items()}, sizes.rounds)


def downloads(work: Path, sizes: Sizes) -> Figures:
    """From one server on this machine, which has all in memory where that is large enough."""
    source = make_project(work / "hub", sizes.weights)
    target = make_project(work / "home", 0)
    with hub(source.folder, work / "hub.log") as url:

        def ours() -> Took:
            seconds = target.run("models", "download", KEY, HF_ENDPOINT=url)
            shutil.rmtree(target.folder)
            return Took({"fetched": seconds}, source.bytes)

        def curl(*options: str) -> Callable[[], Took]:
            def way() -> Took:
                out = work / "out"
                out.mkdir()
                asked = [word for path in source.weights for word in ("-o", path.name, f"{url}{_path(path)}")]
                seconds = run(["curl", "-fsS", *options, *asked], cwd=out)
                shutil.rmtree(out)
                return Took({"fetched": seconds}, source.bytes)

            return way

        ways = {OURS: ours, "curl -o": curl(), "curl --parallel": curl("--parallel")}
        return _in_turn(ways, sizes.rounds)


def _path(path: Path) -> str:
    return f"/{REPO}/resolve/{COMMIT}/{path.name}"


def _bundle(project: Project, output: Path, *options: str) -> float:
    return project.run("bundle", "--output", output, "--version", VERSION, "--devices", "cpu", *options)


def _in_turn(ways: Mapping[str, Callable[[], Took]], rounds: int) -> Figures:
    """Every second round the other way round, so that none is always the one behind the same other."""
    found: list[dict[str, dict[str, Any]]] = []
    busy = 0
    for number in range(rounds):
        found.append({})
        for name in list(ways)[:: -1 if number % 2 else 1]:
            os.sync()
            busy += is_busy()
            found[-1][name] = asdict(ways[name]())
    return {"rounds": [{name: each[name] for name in ways} for each in found], "busy": busy}


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink()


def _quoted(paths: Sequence[Path]) -> str:
    return shlex.join(map(str, paths))
