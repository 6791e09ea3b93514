"""deploy.sh on a machine with Docker alone, with one small model: from its weights to an update and its way back."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import CHECKOUT, eventually
from tests.containers.conftest import Built, Host, docker, run, timed
from tests.hub.server import Hub, hub

NAME = "vllm-unified-test-deploy"
IMAGE = "vllm-unified-test-next:latest"
WEIGHTS = CHECKOUT / "models" / "demo" / "minilm"
EMBEDDING = {
    "name": "small",
    "type": "embedding",
    "repo": "someone/minilm",
    "source": "modelscope",
    "gpu_memory_utilization": 0.1,
    "engine_args": {"enforce-eager": True, "kv-cache-memory-bytes": "128M"},
}
# What build.sh and the Dockerfile read.
OF_THE_IMAGE = (
    ".dockerignore",
    "Dockerfile",
    "LICENSE",
    "README.md",
    "build.sh",
    "config",
    "demo",
    "docker-compose.cpu.yml",
    "docker-compose.yml",
    "pyproject.toml",
    "requirements.lock",
    "scripts",
    "monitoring",
    "vllm_unified",
)


@pytest.fixture(scope="module")
def weights() -> Iterator[Hub]:
    """A hub that containers and builds reach, at an address of this machine that no other network has."""
    network = "vllm-unified-test-hub"
    docker("network", "create", network)
    try:
        gateway = docker("network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", network).strip()
        with hub(gateway) as served:
            files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
            served.put("someone/minilm", {path.relative_to(WEIGHTS).as_posix(): path.read_bytes() for path in files})
            yield served
    finally:
        docker("network", "rm", network)


def write_config(home: Path, **fields: Any) -> None:
    (home / "config" / "models.json").write_text(json.dumps({"models": {"embedding": {**EMBEDDING, **fields}}}))


@pytest.fixture(scope="module")
def host(built: Built, weights: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """With an image of a name of its own, which is given to one image after the other."""
    home = tmp_path_factory.mktemp("host") / "a folder"
    (home / "models").mkdir(parents=True)
    os.chown(home / "models", 1000, 0)
    docker("tag", built.image, IMAGE)
    host = Host.made(home, NAME, IMAGE, home / "models", MODELSCOPE_ENDPOINT=weights.url)
    write_config(home)
    try:
        yield host
    finally:
        host.clear()


def give_name_to(*lines: str) -> str:
    """Of an image that is the one it has now and these lines of a Dockerfile; its id."""
    done = run("docker", "build", "--quiet", "--tag", IMAGE, "-", input="\n".join([f"FROM {IMAGE}", *lines]))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def running_image() -> str:
    return docker("container", "inspect", "--format", "{{.Image}}", NAME).strip()


def has_embeddings(host: Host, key: str | None = None) -> bool:
    with host.openai(key=key) as client:
        return len(client.embeddings.create(model="small", input="Paris").data[0].embedding) == 384


def test_before_anything_runs(host: Host) -> None:
    for verb in ("status", "health", "selftest", "reload"):
        done = host.run(verb)
        assert (done.returncode, done.stderr) == (3, "not running; start it with ./deploy.sh start\n"), verb
    assert host.done("stop") == "not running\n"
    assert "no such folder; fetch someone/minilm with: ./deploy.sh models download" in host.refused("check")
    assert "starting order" in host.done("plan")
    (host.home.parent / "cards.json").write_text('{"devices": [{"name": "NVIDIA L4", "memory_gib": 24}]}')
    assert "GPU 0  NVIDIA L4  24.0 GiB" in host.done("plan", "--devices", "cards.json")
    refused = host.run("start", "--offline")
    assert refused.returncode == 1
    assert f"In Docker, of the image {IMAGE}" in refused.stdout
    assert "offline, so bring someone/minilm" in refused.stderr
    assert docker("ps", "--all", "--quiet", "--filter", f"name={NAME}") == ""


def test_weights_that_were_brought(host: Host) -> None:
    stick = host.home.parent / "stick"
    shutil.copytree(WEIGHTS, stick / "minilm")
    assert "./minilm: not there" in host.refused("models", "import", "./minilm", "embedding")
    assert "leave it out" in host.refused("models", "import", "--move", "stick/minilm", "embedding")
    # As deploy.sh is called, in the folder above it.
    assert "embedding: " in host.done("models", "import", "stick/minilm", "embedding")
    assert "nothing wrong" in host.done("models", "verify")
    (row,) = json.loads(host.done("models", "list", "--json"))
    assert (row["model"], row["state"]) == ("embedding", "complete")
    assert "say --force" in host.refused("models", "remove", "embedding")
    host.done("models", "remove", "embedding", "--force")


def test_start_fetches_the_weights(host: Host) -> None:
    with timed("./deploy.sh start, one small model from a hub"):
        printed = host.done("start")
    assert "embedding: someone/minilm at " in printed
    assert has_embeddings(host)
    assert "nothing wrong" in host.done("models", "verify")
    assert "models.embedding runs" in host.refused("models", "remove", "embedding", "--force")


def test_keys(host: Host) -> None:
    key = host.done("keys", "create", "alice", "--model", "small").strip()
    assert (host.home / "config" / "keys.yaml").stat().st_mode & 0o777 == 0o640
    eventually(lambda: _is_let_in(host, key), 10)
    assert "alice" in host.done("keys", "list")
    host.done("keys", "revoke", "alice")
    eventually(lambda: not _is_let_in(host, key), 10)
    assert 'no key "alice"' in host.refused("keys", "revoke", "alice")
    host.done("keys", "create", "bob")


def _is_let_in(host: Host, key: str) -> bool:
    try:
        return has_embeddings(host, key)
    except openai.AuthenticationError:
        return False


def test_one_model(host: Host) -> None:
    assert host.done("stop", "embedding") == "stopped embedding; ./deploy.sh start embedding starts it again\n"
    assert host.run("status").returncode == 3
    assert host.states() == {"embedding": "stopped"}  # until the update starts all of it


def test_an_update_that_does_not_become_ready_is_taken_back(host: Host) -> None:
    before = running_image()
    broken = give_name_to("ENV VLLM_UNIFIED_ENGINE_PROGRAM=/bin/false")
    with timed("./deploy.sh update, and back"):
        assert "the new image did not become ready; the old one runs again" in host.refused("update")
    assert running_image() == before
    assert host.states() == {"embedding": "ready"}
    assert docker("image", "inspect", "--format", "{{.Id}}", IMAGE.replace("latest", "failed")).strip() == broken


def test_an_update_keeps_key_and_keys(host: Host) -> None:
    key = host.api_key()
    assert "as it is already" in host.done("update")
    new = give_name_to("LABEL next=yes")
    with timed("./deploy.sh update"):
        assert host.done("update").endswith("updated\n")
    assert running_image() == new
    assert host.status()["ready"]
    assert host.api_key() == key
    assert "bob" in host.done("keys", "list")


def test_backup_and_restore(host: Host) -> None:
    key, spent = host.api_key(), _requests(host)
    assert spent > 0
    made = host.home.parent / "kept.tar"
    host.done("backup", "kept.tar", "--with-models")
    assert made.stat().st_mode & 0o777 == 0o600
    assert "./deploy.sh stop ends it first" in host.refused("restore", "kept.tar", "--force")
    assert host.done("stop").endswith("stopped\n")
    assert docker("ps", "--all", "--quiet", "--filter", f"name={NAME}") == ""

    before = {path.name: path.read_bytes() for path in (host.home / "config").iterdir() if path.is_file()}
    docker("volume", "rm", f"{NAME}_vllm_data")
    host.done("models", "remove", "embedding", "--force")
    (host.home / "config" / "keys.yaml").unlink()
    write_config(host.home, name="other")
    made.with_name("half.tar").write_bytes(made.read_bytes()[: made.stat().st_size // 2])
    assert "damaged" in host.refused("restore", "half.tar", "--force")
    assert "say --force" in host.refused("restore", "kept.tar")
    assert host.done("restore", "kept.tar", "--force").startswith("restored config, .env, data, models, of ")

    assert {path.name: path.read_bytes() for path in (host.home / "config").iterdir() if path.is_file()} == before
    assert "nothing wrong" in host.done("models", "verify")
    with timed("./deploy.sh start, after a restore"):
        host.done("start", "--offline")
    assert host.api_key() == key
    assert _requests(host) == spent
    assert "bob" in host.done("keys", "list")
    assert has_embeddings(host)


def _requests(host: Host) -> int:
    with host.client() as client:
        return int(client.get("/usage").raise_for_status().json()["total"]["requests"])


def test_clean(host: Host) -> None:
    others = docker("image", "ls", "--quiet", "vllm-unified-test")
    host.done("clean", "--force")
    assert docker("image", "ls", "--quiet", IMAGE.partition(":")[0]) == ""
    assert docker("image", "ls", "--quiet", "vllm-unified-test") == others != ""
    volumes = docker("volume", "ls", "--quiet", "--filter", f"name={NAME}").split()
    assert volumes == [f"{NAME}_vllm_data"], "the key and the jobs stay"


def test_an_image_with_the_weights(built: Built, weights: Hub, tmp_path: Path) -> None:
    for name in OF_THE_IMAGE:
        copy = shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copy
        copy(CHECKOUT / name, tmp_path / name)
    write_config(tmp_path)
    image = "vllm-unified-test:with-models"
    environ = {**os.environ, "MODELSCOPE_ENDPOINT": weights.url, "PIP_CONFIG_FILE": str(built.pip_conf)}
    options = ("--cpu", "--with-models", "--name", "vllm-unified-test", "--tag", "with-models", "--no-verify")
    done = run(tmp_path / "build.sh", *options, env=environ)
    assert done.returncode == 0, done.stderr
    try:
        verified = docker("run", "--rm", "--network", "none", image, "vllm-unified", "models", "verify")
    finally:
        docker("image", "rm", image)
    assert "embedding: " in verified
    assert "nothing wrong" in verified
