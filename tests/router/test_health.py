"""What the router believes of its servers, from their keepers and from its own looks."""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import API_KEY, Project, eventually, free_port, listening
from tests.router.conftest import Deployment
from vllm_unified.router.health import NOT_READY, hear_keeper, look
from vllm_unified.router.registry import LONGEST_RETRY_AFTER, RETRY_AFTER_SECONDS, Registry
from vllm_unified.router.replica import FAILURES_THAT_OPEN, Replica
from vllm_unified.settings.schema import Endpoint
from vllm_unified.state import EngineState, Phase, Process

PATH = "/v1/chat/completions"


def own_engine(port: int = 1) -> Replica:
    return Replica("chat", Endpoint(url=f"http://127.0.0.1:{port}"), "chat", local=True)


def keeper_says(run: Path, phase: Phase, **fields: Any) -> None:
    EngineState("chat", phase, since=time.monotonic(), keeper=Process.of(os.getpid()), **fields).write(run)


# --- a keeper's word ---


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in (Phase.READY, Phase.STOPPED)])
def test_a_keeper_closes_its_engine(tmp_path: Path, phase: Phase) -> None:
    replica = own_engine()
    replica.error = None
    keeper_says(tmp_path, phase, reason="out of memory")
    hear_keeper(replica, tmp_path)
    assert not replica.ready
    assert replica.problem == NOT_READY.get(phase, phase.value)
    assert replica.reason == "out of memory"


@pytest.mark.parametrize(
    ("phase", "fields", "seconds"),
    [
        (Phase.STARTING, {"ready_after": 40.0}, 40),
        (Phase.STARTING, {"ready_after": 4000.0}, LONGEST_RETRY_AFTER),
        (Phase.STARTING, {}, RETRY_AFTER_SECONDS),
        (Phase.BACKOFF, {"ready_after": 40.0, "retry_at": 100.0}, 140),
        (Phase.WAITING, {"ready_after": 40.0}, RETRY_AFTER_SECONDS),
    ],
)
def test_when_to_come_back(project: Project, phase: Phase, fields: dict[str, float], seconds: int) -> None:
    """By what the last start took; times in `fields` are from now on."""
    project.write({"chat": {"name": "chat", "type": "chat"}})
    (served,) = Registry(project.load()).served
    now = time.monotonic()
    at = {"retry_at": fields["retry_at"] + now} if "retry_at" in fields else {}
    keeper_says(project.home / "run", phase, **{**fields, **at})
    hear_keeper(served.replicas[0], project.home / "run")
    assert abs(served.retry_after(now) - seconds) <= 1


def test_when_to_come_back_to_an_open_breaker(project: Project) -> None:
    project.write({"chat": {"name": "chat", "type": "chat"}})
    (served,) = Registry(project.load()).served
    breaker = served.replicas[0].breaker
    for failures in range(1, 4 * FAILURES_THAT_OPEN):
        breaker.fail(100.0 * failures)
    now = breaker.open_until - 7.5
    assert served.retry_after(now) == 8


def test_a_keeper_opens_its_engine_at_once(tmp_path: Path) -> None:
    """It answered a first request: what failed before it was restarted says nothing any more."""
    replica = own_engine()
    keeper_says(tmp_path, Phase.STARTING, reason="out of memory")
    hear_keeper(replica, tmp_path)
    for _ in range(FAILURES_THAT_OPEN):
        replica.breaker.fail(0)
    keeper_says(tmp_path, Phase.READY)
    hear_keeper(replica, tmp_path)
    assert (replica.ready, replica.reason, replica.breaker.state(0)) == (True, None, "closed")


def test_a_ready_engine_that_fails_stays_failed(tmp_path: Path) -> None:
    """Its keeper repeats what it said long ago."""
    replica = own_engine()
    keeper_says(tmp_path, Phase.READY)
    hear_keeper(replica, tmp_path)
    replica.error = "its health check answers 503"
    for _ in range(FAILURES_THAT_OPEN):
        replica.breaker.fail(0)
    hear_keeper(replica, tmp_path)
    assert (replica.problem, replica.breaker.state(0)) == ("its health check answers 503", "open")


def test_without_a_keeper_our_own_looks_decide(tmp_path: Path) -> None:
    replica = own_engine()
    replica.error = None
    hear_keeper(replica, tmp_path)
    assert replica.ready
    keeper_says(tmp_path, Phase.DRAINING)
    hear_keeper(replica, tmp_path)
    assert not replica.ready
    keeper_says(tmp_path, Phase.STOPPED)
    hear_keeper(replica, tmp_path)
    assert replica.ready


def test_a_keeper_that_was_killed_closes_its_engine(tmp_path: Path) -> None:
    replica = own_engine()
    keeper = subprocess.Popen(["sleep", "60"])
    EngineState("chat", Phase.READY, since=0, keeper=Process.of(keeper.pid)).write(tmp_path)
    keeper.kill()
    keeper.wait()
    hear_keeper(replica, tmp_path)
    assert replica.problem == "its keeper is gone, it is about to be restarted"


@pytest.mark.parametrize(
    ("phase", "fields", "known"),
    [
        (Phase.READY, {}, Phase.READY),
        (Phase.READY, {"keeper": Process(pid=1, started=0)}, Phase.BACKOFF),  # it was killed
        (Phase.STOPPED, {"keeper": None}, Phase.STOPPED),  # somebody stopped it
        (Phase.STOPPED, {"keeper": None, "reason": "models.json: no port"}, Phase.BACKOFF),  # it can't run
    ],
)
def test_the_phase_that_is_told(tmp_path: Path, phase: Phase, fields: dict[str, Any], known: Phase) -> None:
    replica = own_engine()
    hear_keeper(replica, tmp_path)
    assert replica.engine is None
    EngineState("chat", phase, **{"since": 0.0, "keeper": Process.of(os.getpid()), **fields}).write(tmp_path)
    hear_keeper(replica, tmp_path)
    assert replica.engine is not None
    assert replica.engine.phase is known


# --- looks ---


def test_a_server_that_is_silent_holds_up_no_other_look(deployment: Deployment, tmp_path: Path) -> None:
    async def eventually_known(replica: Replica) -> None:
        while replica.error == "not looked at yet":  # noqa: ASYNC110 - nothing tells of a look
            await asyncio.sleep(0.01)

    async def test(silent: Replica, good: Replica) -> None:
        looking = asyncio.create_task(look([silent, good], tmp_path))
        async with asyncio.timeout(20):
            await eventually_known(good)
        assert (good.error, silent.error) == (None, "not looked at yet")
        looking.cancel()
        await asyncio.wait([looking])
        good.close_idle()

    good, port = deployment.remote("good"), free_port()
    eventually(lambda: is_answering(good))
    with listening(port):
        silent = Endpoint(url=f"http://127.0.0.1:{port}")
        asyncio.run(test(*(Replica(each.url, each, "x", local=False) for each in (silent, Endpoint(url=good)))))


def is_answering(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


def test_what_a_look_at_a_remote_server_finds(deployment: Deployment) -> None:
    a, gone = deployment.remote("a"), deployment.remote("gone", behind=False)
    statuses: dict[int, str | None] = {
        200: None,
        404: None,
        405: None,
        401: "it refuses the key of its endpoint (401)",
        403: "it refuses the key of its endpoint (403)",
        307: "its health check answers 307",
        500: "its health check answers 500",
        503: "its health check answers 503",
    }
    endpoints: dict[str, Any] = {
        "plain": a,
        "deep": {"url": f"{a}/deep/v1", "api_key": "sk-deep"},
        "gone": gone,
        "by-name": gone.replace("127.0.0.1", "localhost"),
        "misspelt": "http://gpu..2:8000",
    }
    deployment.start({name: {"type": "chat", "endpoints": [url]} for name, url in endpoints.items()}, retries=0)
    with deployment.client() as client:

        def error(name: str) -> Any:
            return deployment.service(client, name).get("error")

        def becomes(name: str, expected: str | None) -> Callable[[], bool]:
            return lambda: error(name) == expected

        for status, expected in statuses.items():
            deployment.behave("a", models=status)
            eventually(becomes("plain", expected))
            eventually(becomes("deep", expected))
        looks = deployment.seen("a")["looks"]
        assert looks["/deep/v1/models"]["authorization"] == "Bearer sk-deep"
        assert "authorization" not in {name.lower() for name in looks["/v1/models"]}
        assert API_KEY not in json.dumps(looks)

        assert error("gone") == error("by-name") == "it does not answer on its port"
        assert error("misspelt") == 'its health check fails: "gpu..2" is no name of a host'
        for name in ("gone", "by-name", "misspelt"):
            answer = client.post(PATH, json={"model": name})
            assert answer.status_code == 502
            assert "can't be reached" in answer.json()["error"]["message"]
        metrics = client.get("/metrics").text
        assert f'vllm_unified_replica_up{{model="gone",replica="{deployment.name("gone")}"}} 0.0' in metrics


def test_an_engine_that_says_503_is_asked_where_nothing_else_is_left(deployment: Deployment) -> None:
    """A look is some seconds old; a request finds out."""
    a = deployment.remote("a")
    both = {"type": "chat", "path": "models/both", "balancing": "round_robin", "endpoints": [a]}
    deployment.start({"alone": {"type": "chat"}, "both": both})
    with deployment.client() as client:

        def up() -> set[str]:
            lines = client.get("/metrics").text.splitlines()
            found = [line for line in lines if line.startswith("vllm_unified_replica_up{") and line.endswith(" 1.0")]
            return {line.partition('replica="')[2].partition('"')[0] for line in found}

        eventually(lambda: up() == {"alone", "both", deployment.name("a")})
        for key in ("alone", "both"):
            deployment.behave(key, unhealthy=True)
        eventually(lambda: up() == {deployment.name("a")})
        assert deployment.service(client, "alone")["error"] == "its health check answers 503"
        assert client.get("/ready").json()["waiting_for"] == {"alone": "its health check answers 503"}
        assert client.post(PATH, json={"model": "alone"}).status_code == 200
        served = {client.post(PATH, json={"model": "both"}).headers["x-served-by"] for _ in range(4)}
        assert served == {deployment.name("a")}
        deployment.behave("both")
        eventually(lambda: "both" in up())
        served = {client.post(PATH, json={"model": "both"}).headers["x-served-by"] for _ in range(4)}
        assert served == {deployment.name("a"), "both"}


# --- connections ---


def test_a_reload_closes_the_connections_to_what_it_removes(deployment: Deployment) -> None:
    """Those that are idle at once, one that is in use after its answer: the server would keep them for ever."""
    a, b = deployment.remote("a", chunk_seconds=0.3), deployment.remote("b")

    def connections(key: str) -> int:
        found = psutil.Process(deployment.processes["router"].pid).net_connections("tcp")
        return len([each for each in found if each.raddr and each.raddr.port == deployment.ports[key]])

    chat = {"type": "chat", "balancing": "round_robin", "endpoints": [a, b]}
    deployment.start({"chat": chat}, health_check_interval=3600)
    with deployment.client() as client:
        assert {client.post(PATH, json={"model": "chat"}).status_code for _ in range(2)} == {200}
        body = {"model": "chat", "stream": True}
        streams = [client.stream("POST", PATH, json=body), client.stream("POST", PATH, json=body)]
        with streams[0] as one, streams[1] as another:
            assert client.post(PATH, json={"model": "chat"}).status_code == 200
            on_a = next(each for each in (one, another) if each.headers["x-served-by"] == deployment.name("a"))
            assert connections("a") >= 1
            document = json.loads(deployment.project.file.read_text())
            document["models"]["chat"]["endpoints"] = [b]
            deployment.project.file.write_text(json.dumps(document))
            client.post("/admin/reload").raise_for_status()
            assert on_a.read().endswith(b"data: [DONE]\n\n")
        eventually(lambda: connections("a") == 0, 3)
        assert client.post(PATH, json={"model": "chat"}).headers["x-served-by"] == deployment.name("b")


def test_idle_connections_end_before_the_server_ends_them(deployment: Deployment) -> None:
    deployment.start({"chat": {"type": "chat"}}, health_check_interval=3600)
    port = deployment.ports["chat"]

    def idle() -> int:
        found = psutil.Process(deployment.processes["router"].pid).net_connections("tcp")
        return len([each for each in found if each.raddr and each.raddr.port == port])

    with deployment.client() as client:
        for _ in range(3):
            assert client.post(PATH, json={"model": "chat"}).status_code == 200
        assert idle() == 1, "one connection is used again"
        eventually(lambda: idle() == 0, 10)
        assert client.post(PATH, json={"model": "chat"}).status_code == 200
