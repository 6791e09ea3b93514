"""The scripts of an unpacked bundle, where they need no Docker: checks, and the way from one release to another."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.bundle.conftest import Unpack
from tests.conftest import CHECKOUT
from vllm_unified.bundle.contents import read_sums

WEIGHTS = {
    "models/chat/model.safetensors": bytes(range(256)) * 40_000,  # read on its own
    "models/chat/sub/tokenizer.json": b"{}",
    "models/rank/config.json": b"{}",
}


def run(script: Path, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [script, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environ}
    )


def path_without(name: str, folder: Path) -> str:
    """A PATH on which every program is but this one."""
    folder.mkdir()
    for place in os.environ["PATH"].split(":"):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if program.name != name and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    return str(folder)


@pytest.mark.parametrize("lacking", ["nothing", "openssl"])
def test_a_whole_bundle(unpack: Unpack, tmp_path: Path, lacking: str) -> None:
    bundle = unpack(WEIGHTS)
    done = run(bundle / "verify.sh", PATH=path_without(lacking, tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"the bundle is whole: {len(read_sums(bundle / 'SHA256SUMS'))} files, 10.")
    again = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=bundle, capture_output=True)
    assert again.returncode == 0


@pytest.mark.parametrize("lacking", ["nothing", "openssl"])
def test_damage_is_named(unpack: Unpack, tmp_path: Path, lacking: str) -> None:
    bundle = unpack(WEIGHTS)
    weights = bundle / "models/chat/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[5_000_000] ^= 1
    weights.write_bytes(content)
    (bundle / "models/rank/config.json").unlink()
    (bundle / "scripts/common.sh").chmod(0o755)  # of no matter
    done = run(bundle / "verify.sh", PATH=path_without(lacking, tmp_path / "bin"))
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines()[:-1]) == [
        "models/chat/model.safetensors: damaged",
        "models/rank/config.json: missing",
    ]
    assert done.stderr.splitlines()[-1].startswith("verify.sh: 2 files are not as they were made; bring the bundle")


def test_a_check_that_has_no_room_is_no_proof(unpack: Unpack, tmp_path: Path) -> None:
    bundle = unpack(WEIGHTS)
    done = run(bundle / "verify.sh", TMPDIR="/nowhere")
    assert (done.returncode, "no room for temporary files" in done.stderr) == (1, True)
    assert "is whole" not in done.stdout


def test_what_could_not_be_looked_at_is_not_whole(unpack: Unpack, tmp_path: Path) -> None:
    bundle = unpack(WEIGHTS)
    path = path_without("openssl", tmp_path / "bin")
    (tmp_path / "bin/openssl").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/openssl").chmod(0o755)
    done = run(bundle / "verify.sh", PATH=path)
    assert (done.returncode, "models/chat/model.safetensors: can't be read" in done.stderr) == (1, True)


def test_half_a_bundle(unpack: Unpack) -> None:
    bundle = unpack(WEIGHTS)
    (bundle / "SHA256SUMS").unlink()
    done = run(bundle / "verify.sh")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no whole bundle; unpack it again" in done.stderr


@pytest.mark.parametrize("script", ["install.sh", "verify.sh", "uninstall.sh", "scripts/load_images.sh"])
def test_help_and_wrong_usage(unpack: Unpack, script: str) -> None:
    bundle = unpack({})
    assert run(bundle / script, "--help").stdout.startswith("usage: ")
    wrong = run(bundle / script, "--what")
    assert (wrong.returncode, 'what is "--what"?' in wrong.stderr) == (2, True)


def test_everything_that_is_wrong_is_said_before_anything_is_changed(unpack: Unpack, tmp_path: Path) -> None:
    bundle = unpack(WEIGHTS)
    (bundle / "models/rank/config.json").unlink()
    there = tmp_path / "there"
    there.mkdir()
    (there / "of another").write_text("kept")
    done = run(bundle / "install.sh", "--to", str(there), PATH=path_without("docker", tmp_path / "bin"))
    assert done.returncode == 1
    assert "holds something else" in done.stderr
    assert "1 of the bundle's files missing, as models/rank/config.json" in done.stderr
    assert "docker is not installed" in done.stderr
    assert [path.name for path in there.iterdir()] == ["of another"]


@pytest.mark.parametrize(
    ("folder", "said"),
    [("bundle/inside", "the bundle itself is there"), ("a%b", "has a letter"), ("a:b", "has a letter")],
)
def test_folders_that_can_not_be(unpack: Unpack, tmp_path: Path, folder: str, said: str) -> None:
    bundle = unpack({})
    place = bundle / "inside" if folder.startswith("bundle") else tmp_path / folder
    done = run(bundle / "install.sh", "--to", str(place), "--dry-run", PATH=path_without("docker", tmp_path / "bin"))
    assert (done.returncode, said in done.stderr) == (1, True)
    assert not place.exists()


def test_a_full_disk_is_known_before(unpack: Unpack, tmp_path: Path) -> None:
    bundle = unpack(WEIGHTS, BUNDLE_MODEL_BYTES=str(10**15))
    done = run(bundle / "install.sh", "--to", "/dev/shm/vllm-unified-test", PATH=path_without("docker", tmp_path / "b"))
    assert "/dev/shm: needs 1000.0 TB" in done.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "COMPOSE_PROFILES=nginx\n"),
        ("A=1\n", "A=1\nCOMPOSE_PROFILES=nginx\n"),
        ("A=1", "A=1\nCOMPOSE_PROFILES=nginx\n"),
        ("COMPOSE_PROFILES=\n", "COMPOSE_PROFILES=\nCOMPOSE_PROFILES=nginx\n"),
        ("COMPOSE_PROFILES=monitoring", "COMPOSE_PROFILES=monitoring"),
    ],
)
def test_profiles_go_into_an_env_that_names_none(tmp_path: Path, before: str | None, after: str) -> None:
    env = tmp_path / ".env"
    if before is not None:
        env.write_text(before)
    command = 'source "$1"; BUNDLE_PROFILES=nginx; write_profiles "$2"'
    common = CHECKOUT / "scripts/offline/common.sh"
    subprocess.run(["bash", "-euo", "pipefail", "-c", command, "bash", common, env], check=True)
    assert env.read_text() == after


# --- from one release to another ---

RELEASE = """#!/usr/bin/env bash
# Stands in for the program: notes what it is told, and is as ready as the file `broken` lets it.
here=$(dirname "${BASH_SOURCE[0]}")
echo "$(basename "$here") $*" >>"$VLLM_UNIFIED_HOME/calls"
case $1 in
  start)
    [[ ! -e $here/broken ]] || exit 1
    echo "$*" >"$VLLM_UNIFIED_HOME/up"
    sleep 20 &>/dev/null & # as supervisord, it must not hold the lock of who started it
    ;;
  stop) rm -f "$VLLM_UNIFIED_HOME/up" ;;
  status)
    [[ -e $VLLM_UNIFIED_HOME/up ]] || exit 3
    config=models.json
    grep -q demo "$VLLM_UNIFIED_HOME/up" && config=models.demo.json
    printf '{\\n  "running": true,\\n  "config": "/x/config/%s",\\n  "ready": true}\\n' "$config"
    ;;
esac
"""


class Installed:
    """A folder with releases v1, v2 … of stand-ins, each with weights of its own for the model `chat`."""

    def __init__(self, bundle: Path, home: Path) -> None:
        self.bundle = bundle
        self.home = home
        (home / "releases").mkdir(parents=True)
        (home / "models").mkdir()
        (home / "config").mkdir()

    def bring(self, version: str, weights: Mapping[str, str], broken: bool = False) -> None:
        release = self.home / "releases" / version
        shutil.copytree(self.bundle / "release/scripts", release / "scripts")
        (release / "bundle.env").write_text(f"BUNDLE_RUNTIME=native\nBUNDLE_VERSION={version}\n")
        (release / "deploy.sh").write_text(RELEASE)
        (release / "deploy.sh").chmod(0o755)
        if broken:
            (release / "broken").touch()
        stage = self.home / "models" / f".{version}"
        for path, content in weights.items():
            place = stage / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content)
        models = {str(Path(path).parent).removesuffix("/1") for path in weights}
        (stage / ".models").write_text("".join(f"{model}\n" for model in sorted(models)))

    def change_to(self, version: str, fault: str = "") -> "subprocess.CompletedProcess[str]":
        scripts = self.home / "releases" / version / "scripts/offline"
        command = f'{fault or ":"}\nTO=$1; source "$2/common.sh"; source "$2/installed.sh"; change_release "$3" 5'
        return subprocess.run(
            ["bash", "-euc", command, "bash", self.home, scripts, version], capture_output=True, text=True, timeout=60
        )

    def calls(self) -> list[str]:
        path = self.home / "calls"
        said = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in said if " status" not in line]

    def weights(self) -> dict[str, str]:
        below = self.home / "models"
        files = (path for path in below.rglob("*") if path.is_file() and path.relative_to(below).parts[0][0] != ".")
        return {path.relative_to(below).as_posix(): path.read_text() for path in files}

    def releases(self) -> tuple[str, str]:
        return tuple(  # type: ignore[return-value]
            link.readlink().name if (link := self.home / name).is_symlink() else "" for name in ("current", "previous")
        )


OLD = {"chat/config.json": "old", "chat/1/a": "old", "demo/minilm/config.json": "same"}
NEW = {"chat/config.json": "new", "more/config.json": "new"}


@pytest.fixture
def installed(unpack: Unpack, tmp_path: Path) -> Installed:
    installed = Installed(unpack({}), tmp_path / "opt with space")
    installed.bring("v1", OLD)
    assert installed.change_to("v1").returncode == 0
    return installed


def test_the_first_release(installed: Installed) -> None:
    assert installed.releases() == ("v1", "")
    assert installed.weights() == OLD
    assert installed.calls() == []


@pytest.mark.parametrize("start", [["start"], ["start", "--demo"]])
def test_an_upgrade_and_back_and_forth(installed: Installed, start: list[str]) -> None:
    assert run(installed.home / "deploy.sh", *start).returncode == 0
    installed.bring("v2", NEW)
    assert installed.change_to("v2").returncode == 0
    assert installed.releases() == ("v2", "v1")
    newer = {**NEW, "demo/minilm/config.json": "same"}
    assert installed.weights() == newer
    again = " ".join([*start, "--timeout", "5"])
    assert installed.calls() == [f"v1 {' '.join(start)}", "v1 stop", f"v2 {again}"]
    back = run(installed.home / "rollback.sh", "--timeout", "5")
    assert (back.returncode, back.stdout.splitlines()[-1]) == (0, "v1 is the current one")
    assert installed.releases() == ("v1", "v2")
    assert installed.weights() == OLD
    assert installed.calls() == ["v2 stop", f"v1 {again}"]
    assert run(installed.home / "rollback.sh", "--timeout", "5").returncode == 0
    assert (installed.releases(), installed.weights()) == (("v2", "v1"), newer)


def test_a_release_that_does_not_become_ready_is_taken_back(installed: Installed) -> None:
    run(installed.home / "deploy.sh", "start")
    installed.bring("v2", NEW, broken=True)
    done = installed.change_to("v2")
    assert done.returncode == 1
    assert "v2 did not become ready; v1 runs again" in done.stderr
    assert (installed.releases(), installed.weights()) == (("v1", ""), OLD)
    assert installed.calls() == ["v1 start", "v1 stop", "v2 start --timeout 5", "v2 stop", "v1 start --timeout 5"]


def test_what_does_not_run_is_not_started(installed: Installed) -> None:
    installed.bring("v2", NEW)
    assert installed.change_to("v2").returncode == 0
    assert installed.releases() == ("v2", "v1")
    assert installed.calls() == ["v1 stop"]


POWER = """
steps=0
counted() {{ ((++steps <= {step})) || exit 99; command "$@"; }}
mv() {{ counted mv "$@"; }}; rm() {{ counted rm "$@"; }}; ln() {{ counted ln "$@"; }}
mkdir() {{ counted mkdir "$@"; }}; cp() {{ counted cp "$@"; }}
"""


@pytest.mark.parametrize("step", range(1, 40, 2))
def test_power_may_be_lost_between_any_two_steps(installed: Installed, step: int) -> None:
    """Each move and link is a step; after `step` of them nothing happens any more."""
    installed.bring("v2", NEW)
    assert installed.change_to("v2", POWER.format(step=step)).returncode in (0, 99)
    assert installed.change_to("v2").returncode == 0
    assert installed.releases() == ("v2", "v1")
    assert installed.weights() == {**NEW, "demo/minilm/config.json": "same"}
    assert run(installed.home / "rollback.sh").returncode == 0
    assert installed.weights() == OLD
    assert not (installed.home / ".changing").exists()


@pytest.mark.parametrize("step", range(1, 40, 2))
def test_another_release_after_one_whose_change_was_broken_off(installed: Installed, step: int) -> None:
    installed.bring("v2", NEW)
    broken_off = installed.change_to("v2", POWER.format(step=step)).returncode
    installed.bring("v3", {"chat/config.json": "newest"})
    assert installed.change_to("v3").returncode == 0
    assert run(installed.home / "rollback.sh").returncode == 0
    back, expected = installed.releases()[0], {"v1": OLD, "v2": {**NEW, "demo/minilm/config.json": "same"}}
    assert installed.weights() == expected[back]
    assert back == "v2" or broken_off == 99


def test_the_same_release_again_brings_back_what_was_lost(installed: Installed) -> None:
    shutil.rmtree(installed.home / "models/chat")
    stage = installed.home / "models/.v1"
    (stage / "chat/1").mkdir(parents=True)
    for path in ("chat/config.json", "chat/1/a"):
        (stage / path).write_text("old")
    (stage / ".models").write_text("chat\n")
    assert installed.change_to("v1").returncode == 0
    assert (installed.releases(), installed.weights()) == (("v1", ""), OLD)


def test_weights_behind_a_symlink_come_back(installed: Installed, tmp_path: Path) -> None:
    chat = installed.home / "models/chat"
    chat.rename(tmp_path / "elsewhere")
    chat.symlink_to(tmp_path / "elsewhere")
    installed.bring("v2", NEW)
    assert installed.change_to("v2").returncode == 0
    assert not chat.is_symlink()
    assert run(installed.home / "rollback.sh").returncode == 0
    assert chat.is_symlink()
    assert (chat / "config.json").read_text() == "old"


def test_the_same_release_again_changes_nothing(installed: Installed) -> None:
    run(installed.home / "deploy.sh", "start")
    assert installed.change_to("v1").returncode == 0
    assert installed.calls() == ["v1 start"]


def test_there_is_nothing_before_the_first(installed: Installed) -> None:
    done = run(installed.home / "rollback.sh")
    assert (done.returncode, done.stderr) == (1, "rollback.sh: there is no release before v1\n")
