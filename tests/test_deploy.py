"""deploy.sh in the native runtime, whole, with the fake engine in place of vLLM."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import (
    CHECKOUT,
    FAKE_ENGINE,
    Project,
    command_line,
    eventually,
    free_port,
    listening,
    processes_with,
)

DEPLOY = str(CHECKOUT / "deploy.sh")


class Deployed:
    def __init__(self, project: Project) -> None:
        self.project = project
        self.environ = {
            **os.environ,
            "DOCKER_HOST": "unix:///nowhere",
            "VLLM_UNIFIED_HOME": str(project.home),
            "VLLM_UNIFIED_ENGINE_PROGRAM": FAKE_ENGINE,
            "COLUMNS": "200",
        }
        self.ports = {key: free_port() for key in ("router", "chat", "embedding")}

    def configure(self, **behaviours: dict[str, Any]) -> None:
        entries = {
            key: {
                "name": f"the-{key}",
                "type": key,
                "port": self.ports[key],
                "engine_args": {"kv-cache-memory-bytes": "1M"},
                "env": {"FAKE_ENGINE": json.dumps(behaviours.get(key, {}))},
            }
            for key in ("chat", "embedding")
        }
        self.project.write(entries, router={"port": self.ports["router"], "health_check_interval": 0.2})
        for key in entries:
            self.project.model_folder(key)

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [DEPLOY, *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return document

    def processes(self) -> list[psutil.Process]:
        own = processes_with("VLLM_UNIFIED_HOME", str(self.project.home))
        engines = processes_with("VLLM_UNIFIED_ENGINE", f"{self.project.home}:")
        return [process for process in {*own, *engines} if process.pid != os.getpid()]

    def traces(self) -> set[str]:
        """What a stopped deployment may leave is its logs, its caches and its configuration."""
        return {path.name for path in (self.project.home / "run").iterdir()} - {"logs", "cache", "supervisord.conf"}


def test_plan_reads_a_file_from_where_it_is_called(project: Project) -> None:
    deployed = Deployed(project)
    deployed.configure()
    (project.home / "cards.json").write_text('{"devices": [{"name": "NVIDIA L4", "memory_gib": 24}]}')
    done = subprocess.run(
        [DEPLOY, "plan", "--devices", "cards.json"],
        env=deployed.environ,
        cwd=project.home,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("GPU 0  NVIDIA L4  24.0 GiB, 0.0 held by others"), done.stderr


@pytest.fixture
def deployed(project: Project) -> Iterator[Deployed]:
    each = Deployed(project)
    yield each
    each.run("stop")
    eventually(lambda: not each.processes())


def test_start_use_and_stop(deployed: Deployed) -> None:
    deployed.configure()
    started = deployed.run("start")
    assert started.returncode == 0, started.stderr
    assert "ready after" in started.stdout
    key = (deployed.project.home / ".env").read_text().strip().removeprefix("VLLM_API_KEY=")
    assert (deployed.project.home / ".env").stat().st_mode & 0o777 == 0o600

    pasted = started.stdout[started.stdout.index("KEY=") : started.stdout.index("Next:")]
    answer = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer)["model"] == "the-chat"
    headers = {"authorization": f"Bearer {key}"}
    for port in deployed.ports.values():
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        assert httpx.post(url, json={"model": "the-chat"}, headers=headers).status_code == 200

    document = deployed.status()
    assert (document["running"], document["ready"]) == (True, True)
    assert {each["state"] for each in document["models"].values()} == {"ready"}
    assert document["router"] == {"state": "running", "port": deployed.ports["router"]}
    assert deployed.run("health").returncode == 0
    assert deployed.run("check").returncode == 0
    shown = deployed.run("status").stdout
    assert re.search(r"^chat +\d+ +ready +\w+ +0 +CPU +\d+\.\d GiB +0 *$", shown, re.MULTILINE), shown
    assert {each["requests"] for each in document["models"].values()} == {0}
    assert all(each["memory_bytes"] > 1 << 20 for each in document["models"].values())
    watching = subprocess.Popen([DEPLOY, "status", "--watch"], env=deployed.environ, stdout=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        watching.wait(4)
    os.kill(psutil.Process(watching.pid).children()[0].pid, signal.SIGINT)
    assert b"ready" in watching.communicate(timeout=10)[0]
    assert deployed.run("status", "--watch", "--json").returncode == 2

    again = deployed.run("start")
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "already running and ready; nothing to do")
    pids = {key: each["pid"] for key, each in document["models"].items()}
    assert {key: each["pid"] for key, each in deployed.status()["models"].items()} == pids
    other = deployed.run("start", "--demo")
    assert other.returncode == 1
    assert "./deploy.sh stop ends it first" in other.stderr

    stopped = deployed.run("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
    assert deployed.processes() == []
    assert deployed.traces() == set()
    assert deployed.run("stop").stdout == "not running\n"
    assert deployed.run("status").returncode == 3
    assert (deployed.project.home / ".env").read_text().strip().endswith(key)


def test_restart_of_one_model_and_of_all(deployed: Deployed) -> None:
    deployed.configure()
    assert deployed.run("start").returncode == 0
    before = deployed.status()["models"]
    assert deployed.run("restart", "chat").returncode == 0
    after = deployed.status()["models"]
    assert after["chat"]["pid"] != before["chat"]["pid"]
    assert after["embedding"]["pid"] == before["embedding"]["pid"]
    unknown = deployed.run("restart", "nobody")
    assert (unknown.returncode, unknown.stderr) == (
        1,
        'deploy.sh: no model "nobody" runs here; see ./deploy.sh status\n',
    )
    assert deployed.run("restart").returncode == 0
    assert deployed.status()["models"]["embedding"]["pid"] != before["embedding"]["pid"]


def test_stop_and_start_of_one_model(deployed: Deployed) -> None:
    deployed.configure()
    assert deployed.run("start").returncode == 0
    before = deployed.status()["models"]
    assert deployed.run("stop", "chat").stdout == "stopped chat; ./deploy.sh start chat starts it again\n"
    after = deployed.status()["models"]
    assert {key: each["state"] for key, each in after.items()} == {"chat": "stopped", "embedding": "ready"}
    assert after["embedding"]["pid"] == before["embedding"]["pid"]
    # another that is stopped is not waited for
    assert deployed.run("restart", "embedding").returncode == 0
    assert deployed.run("start", "chat").returncode == 0
    assert {each["state"] for each in deployed.status()["models"].values()} == {"ready"}
    for verb in ("start", "stop"):
        unknown = deployed.run(verb, "nobody")
        assert (unknown.returncode, unknown.stderr) == (
            1,
            'deploy.sh: no model "nobody" runs here; see ./deploy.sh status\n',
        )


def test_logs(deployed: Deployed) -> None:
    deployed.configure()
    none = deployed.run("logs")
    assert (none.returncode, none.stderr) == (1, "no logs yet; start it with ./deploy.sh start\n")
    deployed.run("start")
    assert "fake engine:" in deployed.run("logs", "chat").stdout
    every = [line.split()[1] for line in deployed.run("logs", "--lines", "200").stdout.splitlines()]
    assert {"chat", "embedding", "router", "supervisord"} <= set(every)
    lines = [json.loads(line) for line in deployed.run("logs", "--since", "1h", "--json").stdout.splitlines()]
    assert {line["source"] for line in lines} == {"supervisord", "router", "keeper", "engine"}
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    unknown = deployed.run("logs", "../../etc/passwd")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert 'no log of "../../etc/passwd"' in unknown.stderr
    command = [DEPLOY, "logs", "chat", "--follow"]
    with subprocess.Popen(command, env=deployed.environ, stdout=subprocess.PIPE, text=True) as follow:
        assert follow.stdout is not None
        assert any("keeper: started" in line for line in iter(follow.stdout.readline, ""))
        stopped = deployed.run("stop")
        assert stopped.returncode == 0, stopped.stderr
        assert any("keeper: stopped" in line for line in iter(follow.stdout.readline, ""))
        for child in psutil.Process(follow.pid).children():
            child.terminate()
    # Its files are still there.
    assert "keeper: stopped" in deployed.run("logs", "chat").stdout


def test_logs_where_the_program_is_not_installed(tmp_path: Path) -> None:
    shutil.copy(DEPLOY, tmp_path)
    shutil.copytree(CHECKOUT / "scripts", tmp_path / "scripts")
    environ = {**os.environ, "DOCKER_HOST": "unix:///nowhere", "VLLM_UNIFIED_HOME": str(tmp_path)}
    done = subprocess.run([tmp_path / "deploy.sh", "logs"], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"deploy.sh: .*/.venv is not there, and reading logs needs it; .*\n", done.stderr)


def test_a_model_that_cannot_start_is_named_with_its_reason(deployed: Deployed) -> None:
    deployed.configure(chat={"fail": "ValueError: too small a card"})
    started = deployed.run("start")
    assert started.returncode == 1
    assert "not ready: chat: ValueError: too small a card (exit code 1)" in started.stderr
    assert deployed.status()["models"]["embedding"]["state"] == "ready"
    assert deployed.run("stop").returncode == 0
    assert deployed.processes() == []


def test_a_start_that_takes_too_long(deployed: Deployed) -> None:
    deployed.configure(chat={"ready_after": 60})
    started = deployed.run("start", "--timeout", "3")
    assert started.returncode == 1
    assert "not ready after 3 s: " in started.stderr
    assert deployed.run("stop").returncode == 0
    assert deployed.processes() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_half_started(deployed: Deployed, number: signal.Signals) -> None:
    deployed.configure(chat={"ready_after": 60, "children": 2}, embedding={"ready_after": 60, "children": 2})
    starting = subprocess.Popen(
        [DEPLOY, "start"], env=deployed.environ, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    eventually(lambda: any("fake_engine" in command_line(each) for each in deployed.processes()))
    os.killpg(starting.pid, number)
    output, _ = starting.communicate(timeout=30)
    assert starting.returncode == 130
    assert output.endswith("nothing is left running\n")
    assert deployed.processes() == []
    assert deployed.traces() == set()


def test_two_starts_at_the_same_moment(deployed: Deployed) -> None:
    deployed.configure(chat={"ready_after": 1})
    both = [
        subprocess.Popen(
            [DEPLOY, "start"], env=deployed.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    ended = [(each.communicate(timeout=60), each.returncode) for each in both]
    assert 0 in [code for _, code in ended]
    for (_, said), code in ended:
        assert code == 0 or "another ./deploy.sh is at work here" in said
    assert deployed.status()["ready"]
    assert len([each for each in deployed.processes() if "supervisord" in command_line(each)]) == 1


def test_a_killed_supervisord_leaves_nothing_and_the_next_start_works(deployed: Deployed) -> None:
    deployed.configure()
    assert deployed.run("start").returncode == 0
    pid = int((deployed.project.home / "run" / "supervisord.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not deployed.processes())
    assert deployed.status()["running"] is False
    assert deployed.run("start").returncode == 0
    assert deployed.status()["ready"]


def test_ready_means_the_router_too(deployed: Deployed) -> None:
    deployed.configure()
    assert deployed.run("start").returncode == 0
    conf = str(deployed.project.home / "run" / "supervisord.conf")
    supervisorctl = str(CHECKOUT / ".venv" / "bin" / "supervisorctl")
    subprocess.run([supervisorctl, "-c", conf, "stop", "router"], check=True, stdout=subprocess.DEVNULL)
    assert deployed.status()["ready"] is False
    assert deployed.run("status").returncode == 3


def test_refused_before_anything_is_started(deployed: Deployed) -> None:
    deployed.configure()
    shutil.rmtree(deployed.project.home / "models" / "chat")
    with listening(deployed.ports["embedding"]):
        started = deployed.run("start")
    assert started.returncode == 1
    lines = started.stderr.splitlines()
    assert len(lines) == 3
    assert "models.chat.path" in lines[0]
    assert "models.embedding.port" in lines[1]
    assert lines[2] == "To see it work without a GPU and without weights: ./deploy.sh start --demo"
    assert deployed.processes() == []
    assert not (deployed.project.home / ".env").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nonsense"], 2, "usage: ./deploy.sh VERB"),
        (["start", "--nonsense"], 2, 'what is "--nonsense"?'),
        (["start", "--timeout", "soon"], 1, "--timeout wants a number of seconds"),
        (["start", "--docker"], 1, "ocker"),  # neither installed nor answering
        (["update"], 1, "is for Docker"),
        (["stop", "chat", "now"], 2, 'what is "now"?'),
        (["stop", "chat"], 1, "not running; start it with ./deploy.sh start"),
        (["start", "chat"], 1, "not running; start it with ./deploy.sh start"),
        (["clean"], 1, "say --force where nobody can answer"),
    ],
)
def test_wrong_usage(deployed: Deployed, arguments: list[str], code: int, said: str) -> None:
    done = deployed.run(*arguments)
    assert done.returncode == code
    assert said in done.stderr


def test_help(deployed: Deployed) -> None:
    for asked in (["help"], ["--help"], []):
        assert "./deploy.sh start --demo" in deployed.run(*asked).stdout


def test_plan_of_a_running_deployment(deployed: Deployed) -> None:
    deployed.configure()
    assert deployed.run("start").returncode == 0
    recorded = json.loads((deployed.project.home / "run" / "placement.json").read_text())
    assert recorded == {"chat": [""], "embedding": [""]}
    planned = json.loads(deployed.run("plan", "--json").stdout)
    assert planned["order"] == ["chat", "embedding"]
    assert deployed.run("check").returncode == 0


# Keeps what it was told, and runs until it is ended.
GRAFANA = """\
#!/bin/sh
mkdir -p "$GF_PATHS_DATA"
env >"$GF_PATHS_DATA/environment"
exec sleep 600
"""


def test_nginx_prometheus_and_grafana_beside_it(deployed: Deployed) -> None:
    """The real nginx and Prometheus."""
    home = deployed.project.home
    deployed.configure()
    for name in ("nginx.conf", "maintenance.html"):
        shutil.copy(CHECKOUT / "config" / name, home / "config")
    (home / "bin").mkdir()
    (home / "bin/grafana").write_text(GRAFANA)
    (home / "bin/grafana").chmod(0o755)
    ports = {name: free_port() for name in ("NGINX", "NGINX_TLS", "PROMETHEUS", "GRAFANA")}
    variables = {f"VLLM_{name}_PORT": port for name, port in ports.items()} | {"COMPOSE_PROFILES": "nginx,monitoring"}
    (home / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    deployed.environ["PATH"] = f"{home / 'bin'}:{deployed.environ['PATH']}"
    urls = {name: f"http://127.0.0.1:{ports[name.upper()]}" for name in ("nginx", "prometheus", "grafana")}

    started = deployed.run("start")
    assert started.returncode == 0, started.stderr
    password = (home / "data/grafana.password").read_text()
    assert f"user admin, password {password}   (this once" in started.stdout
    assert deployed.status()["companions"] == {name: {"state": "running", "url": url} for name, url in urls.items()}
    assert re.search(rf"^nginx +{urls['nginx']} +running$", deployed.run("status").stdout, re.MULTILINE)
    assert f"PROMETHEUS_URL={urls['prometheus']}" in (home / "data/grafana/environment").read_text().splitlines()
    key = re.search(r"^KEY=(.+)$", started.stdout, re.MULTILINE)
    assert key
    headers = {"authorization": f"Bearer {key[1]}"}
    asked = {"model": "the-chat", "messages": []}
    assert httpx.post(f"{urls['nginx']}/v1/chat/completions", json=asked, headers=headers).status_code == 200
    assert "/v1/chat/completions 200" in deployed.run("logs", "nginx").stdout

    def up() -> set[str]:
        found = httpx.get(f"{urls['prometheus']}/api/v1/query", params={"query": "up == 1"}).json()["data"]["result"]
        return {each["metric"].get("model", each["metric"]["type"]) for each in found}

    eventually(lambda: up() == {"router", "chat", "embedding"}, 60)
    before = _reloaded(urls["prometheus"])
    assert deployed.run("reload").stdout == "nothing has changed\n"
    eventually(lambda: _reloaded(urls["prometheus"]) > before)

    # What nginx refuses is not taken up by anybody, and what it has stays.
    conf = home / "run/rendered/nginx/nginx.conf"
    rendered = conf.read_text()
    template = home / "config/nginx.conf"
    good = template.read_text()
    models = deployed.project.file.read_text()
    deployed.project.file.write_text(models.replace('"the-chat"', '"the-chat", "aliases": ["alias"]'))
    template.write_text(good.replace("gzip on;", "gzip onn;"))
    refused = deployed.run("reload")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert 'nginx refuses it: invalid value "onn"' in refused.stderr
    asked = {**asked, "model": "alias"}
    assert httpx.post(f"{urls['nginx']}/v1/chat/completions", json=asked, headers=headers).status_code == 404
    assert conf.read_text() == rendered
    template.write_text(good)
    assert "alias" in deployed.run("reload").stdout
    assert httpx.post(f"{urls['nginx']}/v1/chat/completions", json=asked, headers=headers).status_code == 200

    # What waits for a restart of all does not reach nginx before.
    with (home / ".env").open("a") as file:
        file.write(f"VLLM_NGINX_PORT={free_port()}\n")
    assert "VLLM_NGINX_PORT" in deployed.run("reload").stdout
    assert conf.read_text() == rendered
    assert deployed.run("stop").stdout == "stopped\n"
    assert deployed.processes() == []
    assert deployed.traces() == set()


def _reloaded(url: str) -> float:
    said = httpx.get(f"{url}/metrics").text
    (value,) = re.findall(r"^prometheus_config_last_reload_success_timestamp_seconds (\S+)$", said, re.MULTILINE)
    return float(value)
