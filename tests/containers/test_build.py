"""build.sh and what is in the image."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import CHECKOUT, eventually
from tests.containers.conftest import SECRET, Built, build, docker, run, timed
from vllm_unified import __version__

# The models of the other file want GPUs, and nothing is started without.
DEMO = ("--env", "VLLM_UNIFIED_CONFIG=config/models.demo.json")


def inspected(image: str) -> Any:
    return json.loads(docker("image", "inspect", image))[0]


def in_image(built: Built, *command: str, options: tuple[str, ...] = ()) -> str:
    return docker("run", "--rm", *options, built.image, *command)


def test_build_says_what_it_tried(built: Built) -> None:
    assert "its version: " in built.printed
    assert "vLLM's version: 0." in built.printed
    assert "models.demo.json: 4 models, nothing wrong" in built.printed


def test_any_command_runs(built: Built) -> None:
    assert in_image(built, "bash", "-c", "id").startswith("uid=1000(vllm-unified) gid=0(root)")
    assert in_image(built, "vllm-unified", "check") == "config/models.json: 4 models, nothing wrong\n"
    assert in_image(built, "id", "--user", options=("--user", "4321")) == "4321\n"


def test_nothing_that_vllm_has_was_moved(built: Built) -> None:
    base = inspected(built.image)["Config"]["Labels"]["org.opencontainers.image.base.name"]
    versions = "python3 -m pip list --format=freeze --disable-pip-version-check"
    there = docker("run", "--rm", base, "bash", "-c", versions).split()
    assert "vllm" in " ".join(there)
    assert set(there) <= set(in_image(built, "bash", "-c", versions).split())


def test_labels_and_how_it_runs(built: Built) -> None:
    config = inspected(built.image)["Config"]
    labels = config["Labels"]
    assert labels["vllm-unified"] == labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.revision"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["User"] == "1000:0"


def test_the_same_sources_give_the_same_layers(built: Built) -> None:
    again = "vllm-unified-test:again"
    with timed("build.sh --no-cache --no-verify"):
        done = build("--tag", "again", "--no-cache", "--no-verify", "--quiet", PIP_CONFIG_FILE=str(built.pip_conf))
    assert done.stdout == f"{again}\n", done.stderr
    try:
        first, second = inspected(built.image), inspected(again)
    finally:
        docker("image", "rm", again)
    assert first["RootFS"]["Layers"] == second["RootFS"]["Layers"]
    assert first["Id"] == second["Id"]


def test_no_layer_keeps_a_secret(built: Built) -> None:
    """No step of the Dockerfile removes what an earlier one made: what is in a layer is in the files."""
    assert SECRET not in docker("history", "--no-trunc", built.image)
    search = f"grep -rlsF -e {SECRET} -e VLLM_API_KEY=sk- --exclude-dir=proc --exclude-dir=sys"
    assert in_image(built, "bash", "-c", f"{search} / || echo none", options=("--user", "0")) == "none\n"
    assert in_image(built, "bash", "-c", f"echo {SECRET} >/app/found; {search} /app") == "/app/found\n"


def test_a_user_without_a_name_can_run_it(built: Built, container: str) -> None:
    docker("run", "--detach", "--name", container, "--user", "4321", *DEMO, built.image)
    ask = ("docker", "exec", container, "vllm-unified", "status", "--json")
    running = eventually(lambda: json.loads(run(*ask).stdout or "{}").get("running"), 60)
    assert running
    assert in_container(container, "stat", "--format", "%u %a", "data/.env") == "4321 600\n"


def test_who_may_not_write_is_told_so(built: Built) -> None:
    done = run("docker", "run", "--rm", "--user", "4321:4321", built.image)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "/app/data: user 4321 of group 4321 may not write there; run as user 1000, as one of group 0 "
        "(--group-add 0), or give the volume to that user"
    ]


def test_stop_before_supervisord_runs(built: Built, container: str) -> None:
    docker("run", "--detach", "--name", container, *DEMO, built.image)
    docker("stop", "--time", "60", container)
    assert json.loads(docker("inspect", container))[0]["State"]["ExitCode"] != 137  # of SIGKILL


@pytest.mark.parametrize("arguments", [["--tag"], ["--tag", "--quiet"], ["--tags", "x"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = run(CHECKOUT / "build.sh", *arguments)
    assert done.returncode == 2
    assert f'build.sh: what is "{arguments[0]}' in done.stderr


def test_no_engine_and_no_base() -> None:
    nowhere = {**os.environ, "DOCKER_HOST": "unix:///nowhere/docker.sock"}
    done = run(CHECKOUT / "build.sh", env=nowhere)
    assert done.returncode == 1
    assert "the Docker engine does not answer: " in done.stderr
    no_way_out = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = run(CHECKOUT / "build.sh", env=no_way_out)
    assert done.returncode == 1
    assert "vllm/vllm-openai:v" in done.stderr.splitlines()[-1]
    assert "docker load" in done.stderr.splitlines()[-1]


def in_container(name: str, *command: str) -> str:
    return docker("exec", name, *command)


@pytest.fixture
def container() -> Iterator[str]:
    name = "vllm-unified-test-alone"
    yield name
    run("docker", "rm", "--force", "--volumes", name)
