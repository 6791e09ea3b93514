"""What an operator sees and does: keys at work, usage, metrics, log, drain; on the real router."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import eventually
from tests.router.conftest import Deployment
from vllm_unified.settings.keys import add_key, new_key

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}


def make_key(deployment: Deployment, name: str, **fields: Any) -> str:
    """Its value."""
    value, hashed = new_key()
    add_key(deployment.project.home, {"name": name, "hash": hashed, **fields})
    return value


def chat(deployment: Deployment, key: str, **body: Any) -> httpx.Response:
    with deployment.client(key) as client:
        return client.post("/v1/chat/completions", json={**CHAT, **body})


def usage(deployment: Deployment, key: str) -> dict[str, int]:
    with deployment.client() as client:
        rows = client.get("/usage", params={"key": key}).json()["data"]
    counted = ("requests", "errors", "prompt_tokens", "completion_tokens")
    return {name: sum(row[name] for row in rows) for name in counted}


def metric(deployment: Deployment, name: str, **labels: str) -> float:
    with deployment.client() as client:
        text = client.get("/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"vllm_unified_{name}" and labels.items() <= sample.labels.items()
    )


@pytest.fixture
def two_models(deployment: Deployment) -> Deployment:
    deployment.start(
        {
            "chat": {"type": "chat", "fake": {"golden": "right"}},
            "other": {"type": "chat"},
            "embedding": {"type": "embedding", "aliases": ["ada"]},
        }
    )
    return deployment


def test_keys_are_made_limited_and_revoked_while_it_runs(two_models: Deployment) -> None:
    team = make_key(two_models, "team", models=["chat", "ada"], requests_per_minute=3)
    eventually(lambda: chat(two_models, team).status_code == 200)
    assert chat(two_models, team, model="other").status_code == 403
    with two_models.client(team) as client:
        assert {each["id"] for each in client.get("/v1/models").json()["data"]} == {"chat", "embedding", "ada"}
        unknown = client.post("/v1/chat/completions", json={**CHAT, "model": "gpt"})
        assert "other" not in unknown.json()["error"]["message"]
        # the one chat model that is the key's needs no name
        assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 200
        assert client.post("/v1/embeddings", json={"model": "ada", "input": "x"}).status_code == 200
        refused = client.post("/v1/embeddings", json={"model": "ada", "input": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["x-error-source"] == "router"

    (two_models.project.home / "config" / "keys.yaml").write_text("keys: [")
    with two_models.client() as client:
        eventually(lambda: "keys" in client.get("/health").json())
    assert chat(two_models, team).status_code == 429  # the old keys stay

    (two_models.project.home / "config" / "keys.yaml").write_text("keys: []")
    eventually(lambda: chat(two_models, team).status_code == 401)
    assert chat(two_models, "sk-of-nobody").status_code == 401


def test_requests_at_once_of_a_key(deployment: Deployment) -> None:
    deployment.start({"chat": {"type": "chat", "fake": {"busy_seconds": 1}}})
    key = make_key(deployment, "team", max_concurrent=2)
    eventually(lambda: chat(deployment, key).status_code == 200)
    with ThreadPoolExecutor(3) as pool:
        found = sorted(pool.map(lambda _: chat(deployment, key).status_code, range(3)))
    assert found == [200, 200, 429]
    assert chat(deployment, key).status_code == 200


def test_of_those_who_wait_the_highest_priority_goes_first(deployment: Deployment) -> None:
    deployment.start({"chat": {"type": "chat", "max_concurrent": 1, "fake": {"busy_seconds": 2}}})
    keys = {name: make_key(deployment, name, priority=priority) for name, priority in (("low", -1), ("high", 5))}
    eventually(lambda: all(chat(deployment, key, model="").status_code == 404 for key in keys.values()))
    ended: list[str] = []

    def ask(name: str) -> None:
        assert chat(deployment, keys[name]).status_code == 200
        ended.append(name)

    with ThreadPoolExecutor(3) as pool:
        pool.submit(chat, deployment, keys["low"])
        eventually(lambda: metric(deployment, "in_flight", model="chat") == 1)
        waiting = [pool.submit(ask, "low")]
        eventually(lambda: metric(deployment, "queued", model="chat") == 1)
        waiting.append(pool.submit(ask, "high"))
        for each in waiting:
            each.result()
    assert ended == ["high", "low"]


def test_tokens_of_answers_and_of_streams_are_booked(two_models: Deployment) -> None:
    key = make_key(two_models, "team", tokens_per_minute=25)
    eventually(lambda: chat(two_models, key, model="").status_code == 404)
    whole = chat(two_models, key).json()["usage"]
    stream = chat(two_models, key, stream=True)
    assert stream.status_code == 200
    # the usage that the router asked for is not shown to a client that did not
    assert "usage" not in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    asked = chat(two_models, key, stream=True, stream_options={"include_usage": True})
    assert '"prompt_tokens": 5' in asked.text
    expected = {
        "requests": 3,
        "errors": 0,
        "prompt_tokens": whole["prompt_tokens"] + 10,
        "completion_tokens": whole["completion_tokens"] + 10,
    }
    eventually(lambda: usage(two_models, "team") == expected)
    assert metric(two_models, "key_tokens_total", key="team") == sum(expected.values()) - 3
    over = chat(two_models, key)
    while over.status_code == 200:
        over = chat(two_models, key)
    assert "tokens_per_minute" in over.json()["error"]["message"]


def test_usage_and_limits_survive_a_restart(two_models: Deployment) -> None:
    key = make_key(two_models, "team", tokens_per_day=1)
    eventually(lambda: chat(two_models, key).status_code == 200)
    before = usage(two_models, "team")
    router = two_models.processes.pop("router")
    router.send_signal(signal.SIGTERM)
    assert router.wait(20) == 0
    for engine in ("chat", "other", "embedding"):
        two_models.stop_engine(engine)
    two_models.start({"chat": {"type": "chat"}})
    assert usage(two_models, "team") == before
    assert chat(two_models, key).status_code == 429


@pytest.mark.parametrize("path", ["/metrics", "/metrics/engines", "/sd", "/system/info"])
def test_what_is_for_admins(two_models: Deployment, path: str) -> None:
    team, boss = make_key(two_models, "team"), make_key(two_models, "boss", admin=True)
    eventually(lambda: chat(two_models, boss, model="").status_code == 404)
    for key, status in ((None, 401), (team, 403), (boss, 200)):
        with two_models.client(key) as client:
            assert client.get(path).status_code == status


def test_metrics_name_whose_errors_they_were(two_models: Deployment) -> None:
    refused = chat(two_models, "sk-wrong")
    assert (refused.status_code, "x-request-id" in refused.headers) == (401, True)
    with two_models.client() as client:
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "gone"}).status_code == 404
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        engines = client.get("/metrics/engines").text
        assert 'model="embedding"' in engines
    assert metric(two_models, "requests_total", model="chat", code="2xx") == 1
    assert metric(two_models, "requests_total", model="", code="4xx") == 2
    assert metric(two_models, "errors_total", owner="client") == 2
    assert metric(two_models, "errors_total", owner="engine") == 0
    assert metric(two_models, "replica_up", model="chat", replica="chat") == 1


def test_the_log_has_a_line_a_request_and_no_secret(two_models: Deployment) -> None:
    key = make_key(two_models, "team")
    eventually(lambda: chat(two_models, key, model="").status_code == 404)
    with two_models.client(key) as client:
        body = {**CHAT, "user": "a secret of mine"}
        answer = client.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert two_models.seen("chat")["requests"][-1]["headers"]["x-request-id"] == "mine-1"

    def lines() -> list[dict[str, Any]]:
        found = [line for line in two_models.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in map(json.loads, found) if line.get("id") == "mine-1"]

    (line,) = eventually(lines)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(line["time"])) < timedelta(minutes=1)
    assert (line["key"], line["model"], line["status"], line["upstream"]) == ("team", "chat", 200, "chat")
    text = two_models.log.read_text()
    assert key not in text
    assert "secret" not in text


def test_a_drained_model_lets_in_nothing_and_ends_what_runs(deployment: Deployment) -> None:
    far = deployment.remote("engine", busy_seconds=1)
    deployment.start({"far": {"type": "chat", "endpoints": [far]}, "chat": {"type": "chat"}})
    with deployment.client() as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/v1/chat/completions", json={**CHAT, "model": "far"})
        eventually(lambda: metric(deployment, "in_flight", model="far") == 1)
        drained = httpx.post(f"{deployment.url}/admin/models/far/drain", headers=client.headers, timeout=20)
        assert (drained.status_code, drained.json()["in_flight"]) == (200, 0)
        assert running.result().status_code == 200
        refused = client.post("/v1/chat/completions", json={**CHAT, "model": "far"})
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert "drained" in refused.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert client.get("/v1/models/far").json()["state"] == "drained"
        assert client.post("/admin/models/far/start").status_code == 200
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "far"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/admin/models/nothing/drain", 404, "there are chat, other, embedding"),
        ("/admin/models/chat/explode", 400, ""),
        ("/admin/models/chat/stop", 409, "not running"),
    ],
)
def test_what_an_operator_cannot_do(two_models: Deployment, path: str, status: int, words: str) -> None:
    with two_models.client() as client:
        refused = client.post(path)
        assert refused.status_code == status
        assert words in refused.text


def test_admin_calls_are_for_admins_on_this_machine(two_models: Deployment) -> None:
    team = make_key(two_models, "team")
    eventually(lambda: chat(two_models, team, model="").status_code == 404)
    with two_models.client(team) as client:
        assert client.post("/admin/models/chat/drain").status_code == 403
    with two_models.client() as client:
        assert client.post("/admin/reload", headers={"x-forwarded-for": "10.0.0.7"}).status_code == 403
    assert chat(two_models, team).status_code == 200
