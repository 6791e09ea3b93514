"""A deployment that takes up changes while it runs, whole: deploy.sh, supervisord, router, fake engines."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import API_KEY, CHECKOUT, Project, eventually, free_port
from tests.test_deploy import Deployed


class Reloaded(Deployed):
    """With a file that a test changes entry by entry."""

    def __init__(self, project: Project) -> None:
        super().__init__(project)
        self.environ["VLLM_API_KEY"] = API_KEY
        self.router = {"port": self.ports["router"], "health_check_interval": 0.2}
        self.models: dict[str, dict[str, Any]] = {}

    def engine(self, key: str, **fields: Any) -> None:
        self.project.model_folder(key)
        self.models[key] = {
            "name": f"the-{key}",
            "type": "chat",
            "port": free_port(),
            "engine_args": {"kv-cache-memory-bytes": "1M"},
            **fields,
        }

    def write(self) -> None:
        self.project.write(self.models, router=self.router)

    def start(self) -> None:
        self.write()
        started = self.run("start")
        assert started.returncode == 0, started.stderr

    def reload(self, *options: str) -> "subprocess.CompletedProcess[str]":
        self.write()
        return self.run("reload", *options)

    def ask(self, model: str) -> int:
        """Status of a request to the router."""
        url = f"http://127.0.0.1:{self.ports['router']}/v1/chat/completions"
        headers = {"authorization": f"Bearer {API_KEY}"}
        return httpx.post(url, json={"model": model}, headers=headers, timeout=20).status_code

    def admin(self, action: str) -> str:
        """What state `chat` is in after it."""
        url = f"http://127.0.0.1:{self.ports['router']}/admin/models/chat/{action}"
        answer = httpx.post(url, headers={"authorization": f"Bearer {API_KEY}"}, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["state"])

    def pids(self) -> dict[str, int]:
        return {key: each["pid"] for key, each in self.status()["models"].items() if each.get("pid")}


@pytest.fixture
def deployed(project: Project) -> Iterator[Reloaded]:
    each = Reloaded(project)
    yield each
    each.run("stop")
    eventually(lambda: not each.processes())


@contextlib.contextmanager
def elsewhere() -> Iterator[str]:
    """The address of a server that is none of ours."""
    port = free_port()
    command = [sys.executable, str(CHECKOUT / "tests" / "fake_engine.py"), "--port", str(port)]
    with subprocess.Popen(
        command, env={**os.environ, "VLLM_API_KEY": "sk-theirs"}, stdout=subprocess.DEVNULL
    ) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def test_what_is_taken_up_at_once_and_what_waits(deployed: Reloaded) -> None:
    deployed.engine("chat")
    deployed.start()
    before = deployed.pids()
    assert deployed.reload().stdout == "nothing has changed\n"

    deployed.models["chat"] |= {"aliases": ["alias"], "max_concurrent": 4}
    assert deployed.ask("alias") == 404
    done = deployed.reload()
    assert (done.returncode, done.stdout) == (
        0,
        'applied   models.chat.served_model_names: [] → ["alias"]\napplied   models.chat.max_concurrent: unset → 4\n',
    )
    assert deployed.ask("alias") == 200

    old, new = deployed.models["chat"]["port"], free_port()
    deployed.models["chat"] |= {"port": new, "name": "renamed"}
    deployed.router["retries"] = 1
    done = deployed.reload()
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            "applied   router.retries: 3 → 1",
            'waiting   models.chat.name: "the-chat" → "renamed"',
            f"waiting   models.chat.port: {old} → {new}",
            "What is waiting needs a restart: ./deploy.sh restart chat",
        ],
    )
    assert deployed.pids() == before
    assert (deployed.ask("the-chat"), deployed.ask("renamed")) == (200, 404)

    restarted = deployed.run("restart", "chat")
    assert restarted.returncode == 0, restarted.stderr
    assert deployed.pids() != before
    eventually(lambda: deployed.ask("renamed") == 200)
    assert deployed.ask("the-chat") == 404
    assert json.loads(deployed.reload("--json").stdout) == {"applied": [], "restart": [], "started": [], "stopped": []}


def test_models_are_switched_on_and_off(deployed: Reloaded) -> None:
    deployed.engine("chat")
    deployed.engine("second", enabled=False)
    deployed.start()
    before = deployed.pids()
    assert deployed.status()["models"]["second"]["state"] == "disabled"
    assert deployed.run("start", "second").returncode == 1

    deployed.models["second"]["enabled"] = True
    done = deployed.reload()
    assert (done.returncode, done.stdout) == (0, "started   second\n")
    eventually(lambda: deployed.ask("the-second") == 200)
    assert deployed.pids()["chat"] == before["chat"]

    deployed.models["chat"]["enabled"] = False
    assert deployed.reload().stdout == "stopped   chat\n"
    assert (deployed.ask("the-chat"), deployed.ask("the-second")) == (404, 200)
    assert list(deployed.pids()) == ["second"]
    assert deployed.run("status").returncode == 0

    deployed.engine("third")
    assert deployed.reload().stdout == (
        "waiting   models.third: a new engine\nWhat is waiting needs a restart: ./deploy.sh restart\n"
    )
    assert deployed.run("restart").returncode == 0
    assert deployed.ask("the-third") == 200


def test_an_operator_stops_starts_and_restarts_a_model(deployed: Reloaded) -> None:
    deployed.engine("chat")
    deployed.engine("other")
    deployed.start()
    before = deployed.pids()
    assert (deployed.admin("stop"), deployed.ask("the-chat"), deployed.ask("the-other")) == ("stopped", 503, 200)
    assert list(deployed.pids()) == ["other"]
    assert deployed.admin("start") == "starting"
    eventually(lambda: deployed.ask("the-chat") == 200)
    deployed.models["chat"]["name"] = "renamed"
    deployed.write()
    assert deployed.admin("restart") == "starting"
    eventually(lambda: deployed.ask("renamed") == 200)
    assert deployed.ask("the-chat") == 404
    assert deployed.pids()["other"] == before["other"]


def test_what_is_wrong_is_refused_whole(deployed: Reloaded) -> None:
    deployed.engine("chat")
    deployed.engine("large", enabled=False, engine_args={"kv-cache-memory-bytes": "9000G"})
    deployed.start()
    before = deployed.pids()
    deployed.models["chat"]["aliases"] = ["alias"]
    deployed.models["large"]["enabled"] = True
    done = deployed.reload()
    assert done.returncode == 1
    assert "asked for 90" in done.stderr
    deployed.models["chat"]["wrong"] = 1
    done = deployed.reload()
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert 'models.chat: nothing reads "wrong"' in done.stderr
    assert (deployed.ask("alias"), deployed.ask("the-chat")) == (404, 200)
    del deployed.models["chat"]["wrong"]
    deployed.write()
    assert deployed.pids() == before


def test_a_router_that_listens_elsewhere_than_the_file_says(deployed: Reloaded) -> None:
    deployed.engine("chat")
    deployed.start()
    deployed.router["port"] = free_port()
    done = deployed.reload()
    assert done.returncode == 1
    assert "where its port, address or key was changed, ./deploy.sh restart takes that up" in done.stderr


def test_a_deployment_of_models_that_are_served_elsewhere(deployed: Reloaded) -> None:
    """Without vLLM, which nothing needs here."""
    del deployed.environ["VLLM_UNIFIED_ENGINE_PROGRAM"]
    vllm = Path(CHECKOUT / ".venv" / ".installed-vllm")
    was_installed = vllm.exists()
    with elsewhere() as first, elsewhere() as second:
        theirs = {"api_key": "$THEIR_KEY", "model": "x"}
        (deployed.project.home / ".env").write_text("THEIR_KEY=sk-theirs\n")
        deployed.models["far"] = {"name": "far", "type": "chat", "endpoints": [{"url": first, **theirs}]}
        deployed.start()
        assert vllm.exists() == was_installed
        assert deployed.ask("far") == 200
        shown = deployed.run("status")
        assert shown.returncode == 0
        assert "far: 1 endpoint\n" in shown.stdout

        deployed.models["far"]["endpoints"].append({"url": f"{second}/v1", **theirs})
        deployed.models["further"] = {**deployed.models["far"], "name": "further"}
        assert deployed.reload().stdout.splitlines() == [
            f"applied   models.far.endpoints: {second}: added",
            "applied   models.further: served by its endpoints",
        ]
        eventually(lambda: deployed.ask("further") == 200)
        logs = deployed.project.home / "run" / "logs"
        assert [path.name for path in logs.iterdir() if "sk-theirs" in path.read_text()] == []
