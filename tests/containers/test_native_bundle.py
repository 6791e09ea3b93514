"""The bundle for hosts without Docker: made here, and installed, used, upgraded, taken back and removed where no cable
goes out."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.containers.airgap import NAMESPACE, Airgap, airgap
from tests.containers.conftest import Sender, run, timed
from tests.containers.test_bundle import ASK


@pytest.fixture(scope="module")
def gap() -> Iterator[Airgap]:
    with airgap() as gap:
        yield gap


@pytest.fixture(scope="module")
def sender(gap: Airgap, tmp_path_factory: pytest.TempPathFactory) -> Sender:
    sender = Sender(tmp_path_factory.mktemp("sender"))
    with timed("the native bundle made, its packages collected first"):
        sender.make("v1", "--runtime", "native")
    return sender


def key(site: Path) -> str:
    (line,) = (line for line in (site / ".env").read_text().splitlines() if line.startswith("VLLM_API_KEY="))
    return line.partition("=")[2]


def ask(gap: Airgap, site: Path) -> str:
    return gap.done(sys.executable, "-c", ASK, "http://127.0.0.1:8000/v1", key(site)).strip()


def cut_the_power() -> None:
    """Of all that runs in the namespace."""
    pids = run("ip", "netns", "pids", NAMESPACE).stdout.split()
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)


def test_a_full_disk_is_known_before(gap: Airgap, bundle: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500M", "tmpfs", disk], check=True)
    try:
        done = gap.run(bundle / "install.sh", "--to", disk / "site", "--no-verify")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
    assert (done.returncode, f"{disk}: needs " in done.stderr) == (1, True)


def test_an_install_that_lost_its_power_goes_on(gap: Airgap, bundle: Path, site: Path) -> None:
    packages = site / "releases/v1/.venv"
    with gap.started(bundle / "install.sh", "--to", site, "--no-verify") as installing:
        eventually(lambda: any((packages / "lib").glob("python*/site-packages/vllm*")), 300)
        cut_the_power()
    assert installing.returncode == -signal.SIGKILL
    assert not (site / "current").exists()
    with timed("the native bundle installed, after it lost its power"):
        said = gap.done(bundle / "install.sh", "--to", site)
    assert "start it:" in said
    again = gap.done(bundle / "install.sh", "--to", site, "--no-verify")
    assert "v1 is installed; what is missing of it is added" in again
    assert "Installing" not in again


def test_start_and_ask(gap: Airgap, site: Path) -> None:
    with timed("./deploy.sh start of the native bundle, one model"):
        gap.done(site / "deploy.sh", "start")
    assert ask(gap, site) == "384"


def test_an_upgrade_keeps_all_that_is_the_deployments(gap: Airgap, sender: Sender, bundle: Path, site: Path) -> None:
    """By an increment, which carries no packages when they are the same."""
    before = key(site)
    mine = (site / "config/models.json").read_text() + "\n"
    (site / "config/models.json").write_text(mine)
    sender.make("v2", "--runtime", "native", "--since", str(sender.folder / "dist/knowflow-offline-v1.SHA256SUMS"))
    assert (sender.folder / "dist/knowflow-offline-v2.tar").stat().st_size < 20_000_000
    sender.unpack("v2", bundle.parent)
    with timed("an upgrade of what runs, natively, one model"):
        said = gap.done(bundle / "install.sh", "--to", site)
    assert "takes v1 to v2" in said
    assert json.loads(gap.done(site / "deploy.sh", "status", "--json"))["ready"]
    assert (key(site), (site / "config/models.json").read_text(), ask(gap, site)) == (before, mine, "384")
    assert (site / "current").readlink().name == "v2"


def test_the_way_back(gap: Airgap, site: Path) -> None:
    with timed("./rollback.sh, natively, one model"):
        gap.done(site / "rollback.sh")
    assert (site / "current").readlink().name == "v1"
    assert ask(gap, site) == "384"


def test_an_installation_that_was_moved_says_so(gap: Airgap, site: Path) -> None:
    gap.done(site / "deploy.sh", "stop")
    moved = site.rename(site.with_name("elsewhere"))
    done = gap.run(moved / "deploy.sh", "start")
    moved.rename(site)
    assert done.returncode == 1
    assert "run install.sh of the bundle v1 again" in done.stderr


def test_uninstall_removes_its_own_alone(gap: Airgap, bundle: Path, site: Path) -> None:
    gap.done(site / "uninstall.sh", "--force")
    assert {path.name for path in site.iterdir()} == {".vllm-unified", ".env", "config", "data", "models"}
    gap.done(bundle / "uninstall.sh", "--to", site, "--all", "--force")
    assert not site.exists()
    assert run("ip", "netns", "pids", NAMESPACE).stdout == ""
    shutil.rmtree(bundle)


def test_not_one_packet_went_out(gap: Airgap) -> None:
    assert gap.sent() == 0
    gap.run(sys.executable, "-c", "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.9', 9))")
    assert gap.sent() > 0, "and it would have been seen"
