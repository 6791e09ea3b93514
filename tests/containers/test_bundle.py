"""The offline bundle: made here, and installed, used, upgraded, taken back and removed where no cable goes out."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.containers.airgap import Airgap, airgap
from tests.containers.conftest import BUNDLED, Built, Sender, docker, run, timed

# As a user does it, with the real client.
ASK = """
import openai, sys
client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2], max_retries=0)
print(len(client.embeddings.create(model="demo-embedding", input="Paris").data[0].embedding))
"""

PROFILES = ("--with-nginx", "--with-monitoring")


@pytest.fixture(scope="module")
def gap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airgap]:
    with airgap(tmp_path_factory.mktemp("engine")) as gap:
        yield gap


@pytest.fixture(scope="module")
def sender(built: Built, companion_images: list[str], tmp_path_factory: pytest.TempPathFactory) -> Sender:
    docker("tag", built.image, f"{BUNDLED}:latest")
    sender = Sender(tmp_path_factory.mktemp("sender"))
    with timed("the bundle made"):
        sender.make("v1", "--split", "400M", *PROFILES)
    return sender


def key(gap: Airgap) -> str:
    return gap.done("docker", "exec", "vllm-unified", "sed", "-n", "s/^VLLM_API_KEY=//p", "data/.env").strip()


def ask(gap: Airgap, url: str = "http://127.0.0.1:8000/v1") -> str:
    return gap.done(sys.executable, "-c", ASK, url, key(gap)).strip()


def companions(gap: Airgap, site: Path) -> dict[str, str]:
    found = json.loads(gap.done(site / "deploy.sh", "status", "--json"))["companions"]
    return {name: each["state"] for name, each in found.items()}


def running(gap: Airgap) -> list[str]:
    return sorted(gap.done("docker", "ps", "--format", "{{.Image}}").split())


def volume_made(gap: Airgap) -> str:
    return gap.done("docker", "volume", "inspect", "--format", "{{.CreatedAt}}", "vllm-unified_vllm_prometheus")


def images(gap: Airgap) -> list[str]:
    return sorted(gap.done("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split())


def test_a_flipped_byte_or_a_missing_part_changes_nothing(gap: Airgap, bundle: Path, site: Path) -> None:
    blob = max((bundle / "images/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    flip(blob)
    damaged = gap.run(bundle / "install.sh", "--to", site)
    flip(blob)
    away = blob.rename(blob.with_name("away"))
    missing = gap.run(bundle / "install.sh", "--to", site)
    away.rename(blob)
    assert f"images/blobs/sha256/{blob.name}: damaged" in damaged.stderr
    assert f"1 of the bundle's files missing, as images/blobs/sha256/{blob.name}" in missing.stderr
    assert (damaged.returncode, missing.returncode) == (1, 1)
    assert (site.exists(), images(gap)) == (False, [])


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))


def test_a_taken_port_is_known_before(gap: Airgap, bundle: Path, site: Path) -> None:
    listening = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 8002)); print('up', flush=True); time.sleep(60)"
    )
    inside = ["nsenter", "--net=/run/netns/vllm-unified-test", sys.executable, "-c", listening]
    with subprocess.Popen(inside, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        done = gap.run(bundle / "install.sh", "--to", site, "--no-verify")
        server.kill()
    assert (done.returncode, "port 8002 is taken" in done.stderr) == (1, True)
    assert not site.exists()


def test_a_dry_run_changes_nothing(gap: Airgap, bundle: Path, site: Path) -> None:
    said = gap.done(bundle / "install.sh", "--to", site, "--dry-run").splitlines()
    switched_on = f"switches on: nginx,monitoring (COMPOSE_PROFILES in {site}/.env)"
    assert said[-4:] == ["installs v1", switched_on, "adds models/demo/minilm", "nothing was changed"]
    assert (site.exists(), images(gap)) == (False, [])


def test_an_install_that_was_killed_goes_on(gap: Airgap, companion_images: list[str], bundle: Path, site: Path) -> None:
    with gap.started(bundle / "install.sh", "--to", site, "--no-verify") as installing:
        eventually(lambda: (site / "releases").exists(), 60)
        time.sleep(3)  # docker load is at work
        os.killpg(installing.pid, signal.SIGKILL)
    assert not (site / "current").exists()
    with timed("the bundle installed, without verifying it"):
        said = gap.done(bundle / "install.sh", "--to", site, "--no-verify")
    assert "start it:" in said
    assert images(gap) == sorted([f"{BUNDLED}:v1", *companion_images])
    assert (site / ".env").read_text() == "COMPOSE_PROFILES=nginx,monitoring\n"
    again = gap.done(bundle / "install.sh", "--to", site)
    assert "loaded already" in again
    assert "v1 is installed; what is missing of it is added" in again


def test_start_and_ask(gap: Airgap, site: Path) -> None:
    with timed("./deploy.sh start, one model"):
        said = gap.done(site / "deploy.sh", "start")
    assert "no model is missing" in said
    assert ask(gap) == ask(gap, "http://127.0.0.1/v1") == "384"
    assert gap.run("curl", "-sf", "http://127.0.0.1:8000/docs").returncode == 0
    assert companions(gap, site) == dict.fromkeys(("nginx", "prometheus", "grafana"), "healthy")


def test_an_upgrade_keeps_all_that_is_the_deployments(
    gap: Airgap, sender: Sender, companion_images: list[str], site: Path, tmp_path: Path
) -> None:
    """By an increment, and without the bundle that it builds on at hand."""
    before, measured = key(gap), volume_made(gap)
    (site / "config/models.json").write_text((site / "config/models.json").read_text() + "\n")
    mine = (site / "config/models.json").read_text()
    variables = (site / ".env").read_text() + "# mine\n"
    (site / ".env").write_text(variables)
    command = ("docker", "build", "--quiet", "--tag", f"{BUNDLED}:latest", "-")
    assert run(*command, input=f"FROM {BUNDLED}:latest\nLABEL next=yes\n").returncode == 0
    since = sender.folder / "dist/knowflow-offline-v1.SHA256SUMS"
    sender.make("v2", "--since", str(since), "--no-verify", *PROFILES)
    assert (sender.folder / "dist/knowflow-offline-v2.tar").stat().st_size < 10_000_000
    bundle = sender.unpack("v2", tmp_path / "v2")
    with timed("an upgrade of what runs, one model"):
        said = gap.done(bundle / "install.sh", "--to", site)
    assert "takes v1 to v2" in said
    assert json.loads(gap.done(site / "deploy.sh", "status", "--json"))["ready"]
    assert running(gap) == sorted([f"{BUNDLED}:v2", *companion_images])
    assert (key(gap), volume_made(gap)) == (before, measured)
    assert ((site / "config/models.json").read_text(), (site / ".env").read_text()) == (mine, variables)
    assert ask(gap) == "384"


def test_the_way_back(gap: Airgap, companion_images: list[str], site: Path) -> None:
    with timed("./rollback.sh, one model"):
        gap.done(site / "rollback.sh")
    assert running(gap) == sorted([f"{BUNDLED}:v1", *companion_images])
    assert ask(gap) == "384"


def test_uninstall_removes_its_own_alone(gap: Airgap, companion_images: list[str], bundle: Path, site: Path) -> None:
    gap.done("docker", "tag", f"{BUNDLED}:v1", "of-another:v1")
    gap.done("docker", "volume", "create", "of-another")
    assert gap.run(site / "uninstall.sh").returncode == 1, "nobody can answer"
    gap.done(site / "uninstall.sh", "--force")
    assert gap.done("docker", "ps", "--all", "--quiet") == ""
    assert images(gap) == sorted(["of-another:v1", *companion_images])
    volumes = gap.done("docker", "volume", "ls", "--quiet").split()
    assert volumes == ["of-another", *(f"vllm-unified_vllm_{kind}" for kind in ("data", "grafana", "prometheus"))]
    assert {path.name for path in site.iterdir()} == {".vllm-unified", ".env", "config", "models"}
    gap.done(bundle / "uninstall.sh", "--to", site, "--all", "--force")
    assert not site.exists()
    assert gap.done("docker", "volume", "ls", "--quiet").split() == ["of-another"]


def test_not_one_packet_went_out(gap: Airgap) -> None:
    assert gap.sent() == 0
    gap.run(sys.executable, "-c", "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.9', 9))")
    assert gap.sent() > 0, "and it would have been seen"
