"""deploy.sh in Docker: the same verbs and looks as natively, and an update with its way back."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from demo.training import chat
from tests.conftest import CHECKOUT, free_port
from tests.containers.conftest import KEYS, Built, docker, run, timed

NAME = "vllm-unified-test-deploy"
NEXT = "vllm-unified-test-next"


class Deployed:
    """`home`: with config/ and .env; `image`: a name of its own, which is given to one image after the other."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ports = {name: free_port() for name in ("router", *KEYS)}
        self.image = f"{NEXT}:latest"
        variables = {
            "VLLM_UNIFIED_NAME": NAME,
            "VLLM_UNIFIED_IMAGE": self.image,
            "VLLM_UNIFIED_MODELS": str(CHECKOUT / "models"),
            **{f"VLLM_{name.upper()}_PORT": str(port) for name, port in self.ports.items()},
        }
        (home / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return run(CHECKOUT / "deploy.sh", *arguments, env={**os.environ, "VLLM_UNIFIED_HOME": str(self.home)})

    def done(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return document

    def states(self) -> dict[str, str]:
        return {key: each["state"] for key, each in self.status()["models"].items()}

    def running_image(self) -> str:
        return docker("container", "inspect", "--format", "{{.Image}}", NAME).strip()

    def give_name_to(self, image: str, *lines: str) -> str:
        """Of an image that is `image` and these lines of a Dockerfile; its id."""
        command = ("docker", "build", "--quiet", "--tag", self.image, "-")
        done = run(*command, input="\n".join([f"FROM {image}", *lines]))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def deployed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    home = tmp_path_factory.mktemp("deploy")
    shutil.copytree(CHECKOUT / "config", home / "config")
    deployed = Deployed(home)
    docker("tag", built.image, deployed.image)
    try:
        yield deployed
    finally:
        print(run("docker", "logs", NAME).stdout[-20_000:])
        deployed.run("clean", "--force")
        run("docker", "volume", "rm", f"{NAME}_vllm_data")


def test_it_takes_docker_where_docker_has_the_image(deployed: Deployed) -> None:
    refused = deployed.run("start")
    assert refused.returncode == 1
    assert f"In Docker, of the image {deployed.image}" in refused.stdout
    assert "models.chat.path: /app/models/chat: no such folder" in refused.stderr
    assert docker("ps", "--all", "--quiet", "--filter", f"name={NAME}") == ""


def test_start_and_use(deployed: Deployed) -> None:
    with timed("./deploy.sh start --demo in Docker"):
        printed = deployed.done("start", "--demo")
    assert all(re.search(rf"\] {key} +ready ", printed) for key in KEYS)
    key = re.search(r"^KEY=(.+)$", printed, re.MULTILINE)
    assert key
    url = f"http://127.0.0.1:{deployed.ports['router']}/v1"
    with openai.OpenAI(base_url=url, api_key=key[1], max_retries=0) as client:
        asked: Any = {"model": "demo-chat", "messages": [{"role": "user", "content": "What are you?"}]}
        answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == chat.Lessons("en").answers["who_are_you"]
    # The page that the last example sends is in the container.
    pasted = printed[printed.index("KEY=") : printed.index("Next:")]
    read = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, check=True).stdout
    assert read.count('"choices"') == 2
    assert '"results"' in read


def test_the_verbs(deployed: Deployed) -> None:
    assert deployed.states() == dict.fromkeys(KEYS, "ready")
    assert deployed.done("start", "--demo").startswith("already running and ready; nothing to do")
    assert "already here: docker" in deployed.run("start", "--demo", "--native").stderr
    assert json.loads(deployed.done("health"))["status"] == "healthy"
    assert deployed.done("reload") == "nothing has changed\n"
    assert "starting order: chat, embedding, rerank, ocr" in deployed.done("plan")
    assert "vLLM" in deployed.done("logs", "chat", "--lines", "400")
    assert deployed.run("logs", "../../etc/passwd").returncode == 1
    assert deployed.done("stop", "rerank") == "stopped rerank; ./deploy.sh start rerank starts it again\n"
    assert deployed.run("status").returncode == 3
    assert deployed.states()["rerank"] == "stopped"
    deployed.done("start", "rerank")
    assert deployed.states()["rerank"] == "ready"


def test_an_update_that_does_not_become_ready_is_taken_back(deployed: Deployed) -> None:
    before = deployed.running_image()
    broken = deployed.give_name_to(deployed.image, "ENV VLLM_UNIFIED_ENGINE_PROGRAM=/bin/false")
    done = deployed.run("update", "--timeout", "600")
    assert done.returncode == 1
    assert "the new image did not become ready; the old one runs again" in done.stderr
    assert deployed.running_image() == before
    assert deployed.states() == dict.fromkeys(KEYS, "ready")
    assert docker("image", "inspect", "--format", "{{.Id}}", f"{NEXT}:failed").strip() == broken


def test_an_update(deployed: Deployed) -> None:
    assert "as it is already" in deployed.done("update")
    new = deployed.give_name_to(deployed.image, "LABEL next=yes")
    assert deployed.done("update", "--timeout", "600").endswith("updated\n")
    assert deployed.running_image() == new
    assert deployed.status()["ready"]


def test_stop_and_clean(deployed: Deployed) -> None:
    assert deployed.done("stop").endswith("stopped\n")
    assert docker("ps", "--all", "--quiet", "--filter", f"name={NAME}") == ""
    others = docker("image", "ls", "--quiet", "vllm-unified-test")
    deployed.done("clean", "--force")
    assert docker("image", "ls", "--quiet", NEXT) == ""
    assert docker("image", "ls", "--quiet", "vllm-unified-test") == others != ""
    volumes = docker("volume", "ls", "--quiet", "--filter", f"name={NAME}").split()
    assert volumes == [f"{NAME}_vllm_data"], "the key and the jobs stay"
