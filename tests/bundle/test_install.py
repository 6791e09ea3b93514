"""The real install.sh from end to end, with a stand-in for Docker, and one for the program that it installs."""

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.bundle.conftest import Unpack
from tests.bundle.test_scripts import RELEASE, run
from tests.conftest import free_port
from vllm_unified.bundle.contents import read_sums

# Has the image once it was loaded; does not answer while the file `down` is there.
DOCKER = """#!/usr/bin/env bash
here=$(dirname "${BASH_SOURCE[0]}")
[[ ! -e $here/down ]] || { echo "Cannot connect to the Docker daemon" >&2; exit 1; }
case "$*" in
  *Server.Version*) echo 27.5.1 ;;
  *Server.Arch*) echo amd64 ;;
  "compose version"*) echo 2.32.1 ;;
  *DockerRootDir*) echo /nowhere ;;
  "image inspect"*) [[ -e $here/loaded ]] && echo sha256:feed ;;
  load) cat >/dev/null && touch "$here/loaded" && echo "Loaded image" ;;
esac
"""
INDEX = '{"digest":"sha256:feed","name":"%s"}'
PROGRAM = {"images/manifest.json": b"[]", "release/deploy.sh": RELEASE.encode()}
OLD = {"models/chat/config.json": b"old", "models/chat/weights": bytes(5000), "models/same/config.json": b"same"}
NEW = {**OLD, "models/chat/config.json": b"new", "models/more/config.json": b"new"}


class Host:
    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.bin / "docker").write_text(DOCKER)
        (self.bin / "docker").chmod(0o755)
        self.site = folder / "opt" / "vllm unified"
        self.site.mkdir(parents=True)
        # Others than those of a deployment that runs on this machine.
        ports = "".join(
            f"VLLM_{name}_PORT={free_port()}\n" for name in ("ROUTER", "CHAT", "EMBEDDING", "RERANK", "OCR")
        )
        (self.site / ".env").write_text(ports)
        self.path = f"{self.bin}:{os.environ['PATH']}"

    def install(self, bundle: Path, *options: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return run(bundle / "install.sh", "--to", str(self.site), *options, PATH=self.path, **environ)

    def installed(self, bundle: Path, *options: str) -> str:
        done = self.install(bundle, *options)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def call(self, script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return run(self.site / script, *arguments, PATH=self.path)

    def weights(self) -> dict[str, bytes]:
        found = {path.relative_to(self.site).as_posix(): path for path in self.site.glob("models/[!.]*/**/*")}
        return {name: path.read_bytes() for name, path in found.items() if path.is_file()}

    def calls(self) -> list[str]:
        return [line for line in (self.site / "calls").read_text().splitlines() if " status" not in line]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def bundle_of(unpack: Unpack, weights: Mapping[str, bytes], version: str = "v1", since: Mapping[str, str] = {}) -> Path:
    index = {"images/index.json": (INDEX % version).encode()}
    return unpack({**PROGRAM, **index, **weights}, since, BUNDLE_VERSION=version)


def test_from_first_to_last(unpack: Unpack, host: Host) -> None:
    first = bundle_of(unpack, OLD)
    said = host.installed(first)
    assert said.splitlines()[-1].startswith("start it:  cd ")
    assert host.weights() == OLD
    assert host.call("deploy.sh", "start").returncode == 0
    second = bundle_of(unpack, NEW, "v2")
    said = host.installed(second)
    assert "replaces models/chat" in said
    assert "adds models/more" in said
    assert "start it" not in said
    assert host.weights() == NEW
    assert host.call("rollback.sh").returncode == 0
    assert host.weights() == OLD
    (host.site / "mine").write_text("kept")
    assert host.call("uninstall.sh", "--force").returncode == 0
    assert {each.name for each in host.site.iterdir()} == {".env", ".vllm-unified", "config", "models", "mine", "calls"}
    assert host.weights() == OLD
    # What stayed is taken up, and every way is open again.
    host.installed(first)
    host.installed(second)
    assert host.weights() == NEW
    done = host.call("uninstall.sh", "--all", "--force")
    assert (done.returncode, "is not of the installation" in done.stdout) == (0, True)
    assert {each.name for each in host.site.iterdir()} == {"mine", "calls"}


def test_again_changes_nothing(unpack: Unpack, host: Host) -> None:
    bundle = bundle_of(unpack, OLD)
    host.installed(bundle)
    host.call("deploy.sh", "start")
    said = host.installed(bundle)
    assert "v1 is installed; what is missing of it is added" in said
    assert host.calls() == ["v1 start"]


def test_again_brings_back_what_is_lost_or_damaged(unpack: Unpack, host: Host) -> None:
    bundle = bundle_of(unpack, OLD)
    host.installed(bundle)
    shutil.rmtree(host.site / "models/same")
    weights = host.site / "models/chat/weights"
    weights.unlink()
    weights.write_bytes(bytes(4999) + b"x")
    host.installed(bundle)
    assert host.weights() == OLD


def test_a_stick_without_modes_and_a_strict_umask(unpack: Unpack, host: Host) -> None:
    bundle = bundle_of(unpack, OLD)
    for path in bundle.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    command = 'umask 077; exec bash "$0" --to "$1"'
    environ = {**os.environ, "PATH": host.path}
    subprocess.run(["bash", "-c", command, bundle / "install.sh", host.site], env=environ, check=True)
    assert host.call("deploy.sh", "start").returncode == 0
    for part in ("config", "models"):
        assert all(path.stat().st_mode & 0o004 for path in (host.site / part).rglob("*")), part


@pytest.mark.parametrize("odd", ["chat[1]", "a|b", "Q2.5", "with space", "-x", "a&b"])
def test_odd_names_of_models(unpack: Unpack, host: Host, odd: str) -> None:
    weights = {f"models/{odd}/config.json": b"1", "models/Q2x5/config.json": b"2", "models/chat-big/a": b"3"}
    host.installed(bundle_of(unpack, weights))
    assert host.weights() == weights


def test_no_room_for_checksums_is_no_installation(unpack: Unpack, host: Host) -> None:
    done = host.install(bundle_of(unpack, OLD), "--no-verify", TMPDIR="/nowhere")
    assert (done.returncode, "no room for temporary files" in done.stderr) == (1, True)
    assert not (host.site / "current").exists()


def increment(unpack: Unpack, weights: Mapping[str, bytes], on: Path) -> Path:
    """On the bundle, in a folder of its own."""
    return bundle_of(unpack, weights, "v2", since=read_sums(on / "SHA256SUMS"))


def test_an_increment_on_what_it_builds_on(unpack: Unpack, host: Host) -> None:
    first = bundle_of(unpack, OLD)
    host.installed(first)
    second = increment(unpack, NEW, first)
    assert not (second / "models/chat/weights").exists()
    shutil.rmtree(first)
    host.installed(second)
    assert host.weights() == NEW


def test_an_increment_beside_what_it_builds_on(unpack: Unpack, host: Host) -> None:
    first = bundle_of(unpack, OLD)
    host.installed(first)
    second = increment(unpack, NEW, first)
    shutil.copytree(second, first, dirs_exist_ok=True)
    host.installed(first)
    assert host.weights() == NEW


@pytest.mark.parametrize("base", ["other", "none"])
def test_an_increment_on_something_else(unpack: Unpack, host: Host, base: str) -> None:
    first = bundle_of(unpack, OLD)
    if base == "other":
        host.installed(first)
        weights = host.site / "models/chat/weights"
        weights.unlink()
        weights.write_bytes(bytes(4999) + b"x")
    done = host.install(increment(unpack, NEW, first))
    assert done.returncode == 1
    said = {
        "other": "models/chat/weights: damaged",
        "none": "this is an increment: unpack the bundle that it builds on",
    }
    assert said[base] in done.stderr
    if base == "other":
        assert os.readlink(host.site / "current") == "releases/v1"
    else:
        assert [path.name for path in host.site.iterdir()] == [".env"]


def test_where_docker_is_down_nothing_is_taken_for_stopped(unpack: Unpack, host: Host) -> None:
    host.installed(bundle_of(unpack, OLD))
    host.installed(bundle_of(unpack, NEW, "v2"))
    (host.bin / "down").touch()
    for script, options in (("rollback.sh", []), ("uninstall.sh", ["--all", "--force"])):
        done = host.call(script, *options)
        assert (done.returncode, "the Docker engine does not answer" in done.stderr) == (1, True)
    assert host.weights() == NEW
    assert os.readlink(host.site / "current") == "releases/v2"


def test_ports_can_be_named_before(unpack: Unpack, host: Host) -> None:
    bundle = bundle_of(unpack, {})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (host.site / ".env").open("a") as file:
            file.write(f"VLLM_OCR_PORT={port}\n")
        taken = host.install(bundle)
    assert (taken.returncode, f"port {port} is taken" in taken.stderr) == (1, True)
    host.installed(bundle)


def test_images_of_profiles_are_missed_before_anything_is_stopped(unpack: Unpack, host: Host) -> None:
    host.installed(bundle_of(unpack, OLD))
    with (host.site / ".env").open("a") as file:
        file.write("COMPOSE_PROFILES=nginx\nNGINX_IMAGE=mine/nginx:1\n")
    (host.bin / "loaded").unlink()
    calls = host.calls()
    done = host.install(bundle_of(unpack, NEW, "v2"))
    assert (done.returncode, "the image mine/nginx:1 is not here" in done.stderr) == (1, True), done.stderr
    assert host.calls() == calls
    assert os.readlink(host.site / "current") == "releases/v1"
