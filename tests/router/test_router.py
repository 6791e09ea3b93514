import concurrent.futures
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import API_KEY, eventually
from tests.router.conftest import Deployment
from vllm_unified.state import EngineState, Phase, Process

FOUR: dict[str, dict[str, Any]] = {
    "chat": {"type": "chat", "aliases": ["gpt-4", "通义"]},
    "embedding": {"type": "embedding"},
    "rerank": {"type": "rerank"},
    "ocr": {"type": "ocr"},
}


def four(**chat: Any) -> dict[str, dict[str, Any]]:
    return {key: {**fields, **(chat if key == "chat" else {})} for key, fields in FOUR.items()}


@pytest.fixture
def client(deployment: Deployment) -> Iterator[httpx.Client]:
    deployment.start(four())
    with deployment.client() as client:
        yield client


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object, said to be the router's own."""
    assert answer.headers["x-error-source"] == "router"
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert set(document) == {"error"}
    error: dict[str, Any] = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("path", "model", "answered_by"),
    [
        ("/v1/chat/completions", "chat", "chat"),
        ("/v1/chat/completions", "gpt-4", "chat"),
        ("/v1/chat/completions", "通义", "chat"),
        ("/v1/chat/completions", "ocr", "ocr"),
        ("/v1/chat/completions", None, "chat"),
        ("/v1/completions", "chat", "chat"),
        ("/v1/embeddings", "embedding", "embedding"),
        ("/v1/embeddings", None, "embedding"),
        ("/v1/rerank", "rerank", "rerank"),
        ("/v1/rerank", "embedding", "embedding"),
        ("/v1/score", None, "rerank"),
    ],
)
def test_a_request_reaches_its_model(
    deployment: Deployment, client: httpx.Client, path: str, model: str | None, answered_by: str
) -> None:
    body = {"input": "é漢", **({"model": model} if model else {})}
    answer = client.post(f"{path}?a=b%20c", json=body)
    assert answer.status_code == 200
    # an engine hears the name that it was started with, whichever alias the client used
    assert answer.json() == {"path": f"{path}?a=b%20c", "model": answered_by, "echo": {**body, "model": answered_by}}
    assert [seen["path"] for seen in deployment.seen(answered_by)["requests"]] == [f"{path}?a=b%20c"]


def test_headers_pass_and_hop_by_hop_ones_do_not(deployment: Deployment, client: httpx.Client) -> None:
    client.post(
        "/v1/embeddings", json={}, headers={"x-request-id": "abc", "te": "trailers", "user-agent": "me", "accept": "x"}
    )
    (request,) = deployment.seen("embedding")["requests"]
    headers = {name.lower(): value for name, value in request["headers"].items()}
    assert headers["x-request-id"] == "abc"
    assert headers["user-agent"] == "me"
    assert headers["accept"] == "x"
    assert headers["host"] == f"127.0.0.1:{deployment.ports['embedding']}"
    assert "te" not in headers


BAD_BODIES: list[tuple[bytes, int, str]] = [
    (b"not json", 400, "invalid_json"),
    (b"", 400, "invalid_json"),
    (b'{"model": "chat"', 400, "invalid_json"),
    (b"[]", 400, "invalid_json"),
    (b'"chat"', 400, "invalid_json"),
    (b"[" * 200_000, 400, "invalid_json"),
    (b"1" * 10_000, 400, "invalid_json"),
    (b'{"model": "\xff"}', 400, "invalid_encoding"),
    ('{"model": "chat"}'.encode("utf-16"), 400, "invalid_encoding"),
    (b'{"model": 5}', 400, "invalid_type"),
    (b'{"model": ["chat"]}', 400, "invalid_type"),
    (b'{"model": "../../etc/passwd"}', 404, "model_not_found"),
    (b'{"model": ""}', 404, "model_not_found"),
    (b'{"model": "\\ud800"}', 400, "invalid_json"),
    (b'{"model": "' + b"x" * 100_000 + b'"}', 404, "model_not_found"),
    (b'{"model": "embedding"}', 400, "wrong_model_type"),
    (b'{"model": "chat", "x": "' + b"y" * 50_000_000 + b'"}', 413, "request_too_large"),
]


def test_bad_bodies_get_a_clear_answer_and_the_router_goes_on(deployment: Deployment, client: httpx.Client) -> None:
    for body, status, code in BAD_BODIES:
        answer = client.post("/v1/chat/completions", content=body)
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (status, code), body[:40]
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 500
    assert deployment.seen("chat")["requests"] == []
    assert client.post("/v1/chat/completions", json={"model": "chat"}).status_code == 200


def test_a_chunked_body_over_the_limit(deployment: Deployment) -> None:
    deployment.start(four(), max_body_mib=1)
    with deployment.client() as client:
        answer = client.post("/v1/chat/completions", content=iter([b"x" * 300_000] * 5))
        assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")
        assert client.post("/v1/chat/completions", json={"x": "y" * 900_000}).status_code == 200


def test_several_of_a_kind_need_a_name(deployment: Deployment) -> None:
    deployment.start({"a": {"type": "chat"}, "b": {"type": "chat"}})
    with deployment.client() as client:
        error = error_of(client.post("/v1/chat/completions", json={}))
        assert (error["code"], error["message"]) == ("model_required", "say which model: a, b")
        error = error_of(client.post("/v1/embeddings", json={}))
        assert error["message"] == "say which model: none of the type embedding is served"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/chat/completions/../../admin", 404),
        ("GET", "/v1/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/redoc", 404),
    ],
)
def test_paths_that_are_not_there(client: httpx.Client, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["message"].startswith(f"{method} /")


@pytest.mark.parametrize("key", [None, "wrong", f"{API_KEY}x", API_KEY[:-1], ""])
def test_the_key_is_required(deployment: Deployment, key: str | None) -> None:
    deployment.start({"chat": {"type": "chat"}})
    with deployment.client(key) as stranger:
        for method, path in [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/system/info")]:
            answer = stranger.request(method, path, json={})
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
        assert stranger.get("/nowhere").status_code == 401
        for path in ("/live", "/ready", "/health"):
            assert stranger.get(path).status_code == 200
        assert deployment.seen("chat")["requests"] == []
    with deployment.client(None) as odd:
        assert odd.get("/v1/models", headers={"authorization": f"Basic {API_KEY}"}).status_code == 401
        assert odd.get("/v1/models", headers={"authorization": f"bearer {API_KEY}"}).status_code == 200


def test_it_answers_before_any_model_is_up(deployment: Deployment) -> None:
    deployment.start(
        {"chat": {"type": "chat", "fake": None}, "extra": {"type": "ocr", "required": False, "fake": None}}
    )
    with deployment.client() as client:
        answer = client.post("/v1/chat/completions", json={"model": "chat"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        error = error_of(answer)
        assert (error["code"], error["type"]) == ("model_not_ready", "server_error")
        assert '"chat" is not ready' in error["message"]
        ready = client.get("/ready")
        assert ready.status_code == 503
        assert list(ready.json()["waiting_for"]) == ["chat"]
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "degraded"
        assert {name: each["status"] for name, each in health.json()["services"].items()} == {
            "chat": "unhealthy",
            "extra": "unhealthy",
        }
        deployment.start_engine("chat", {})
        eventually(lambda: client.get("/ready").status_code == 200)
        assert client.post("/v1/chat/completions", json={"model": "chat"}).status_code == 200
        assert client.get("/health").json()["services"]["extra"]["port"] == deployment.ports["extra"]


def test_an_engine_that_goes_and_comes_back(deployment: Deployment, client: httpx.Client) -> None:
    deployment.stop_engine("chat")
    assert client.post("/v1/chat/completions", json={"model": "chat"}).status_code == 503
    assert client.post("/v1/embeddings", json={}).status_code == 200
    eventually(lambda: client.get("/health").json()["services"]["chat"]["status"] == "unhealthy")
    deployment.start_engine("chat", {})
    eventually(lambda: client.post("/v1/chat/completions", json={"model": "chat"}).status_code == 200)


def test_a_ready_engine_that_refuses_connections_is_not_called_ready(deployment: Deployment) -> None:
    keeper = Process.of(os.getpid())
    EngineState("chat", Phase.READY, since=0, keeper=keeper).write(deployment.project.home / "run")
    deployment.start({"chat": {"type": "chat", "fake": None}})
    with deployment.client() as client:
        eventually(lambda: deployment.service(client, "chat")["error"] != "not looked at yet")
        assert deployment.service(client, "chat")["error"] == "it does not answer on its port"
        answer = client.post("/v1/chat/completions", json={"model": "chat"})
        assert error_of(answer)["message"] == '"chat" is not ready: it does not answer on its port'


def keeper_says(deployment: Deployment, phase: Phase, **fields: Any) -> None:
    """As its keeper would write it; this process stands for the keeper."""
    said = EngineState("chat", phase, since=time.monotonic(), keeper=Process.of(os.getpid()), **fields)
    said.write(deployment.project.home / "run")


def test_a_keeper_that_drains_its_engine_is_heard_at_once(deployment: Deployment) -> None:
    """Long before the next health check, which would find nothing wrong."""
    deployment.start({"chat": {"type": "chat"}}, health_check_interval=5)
    with deployment.client() as client:
        assert client.post("/v1/chat/completions", json={"model": "chat"}).status_code == 200
        keeper_says(deployment, Phase.DRAINING)
        time.sleep(0.6)
        answer = client.post("/v1/chat/completions", json={"model": "chat"})
        assert answer.status_code == 503
        assert error_of(answer)["message"] == '"chat" is not ready: stopping'
        assert client.get("/ready").json()["waiting_for"] == {"chat": "stopping"}
        keeper_says(deployment, Phase.BACKOFF, reason="a secret of its log")
        eventually(lambda: "failed, tried again soon" in client.get("/health").text)
        assert "secret" not in client.get("/health").text
        assert "a secret of its log" in client.post("/v1/chat/completions", json={"model": "chat"}).text
        keeper_says(deployment, Phase.READY)
        eventually(lambda: client.post("/v1/chat/completions", json={"model": "chat"}).status_code == 200)


def test_a_killed_keepers_engine_is_not_asked(deployment: Deployment) -> None:
    """vLLM answers 500 to everything while it ends, and 200 to its health check."""
    deployment.start({"chat": {"type": "chat", "fake": {"refuse": 500}}})
    with deployment.client() as client:
        keeper = subprocess.Popen(["sleep", "60"])
        said = EngineState("chat", Phase.READY, since=time.monotonic(), keeper=Process.of(keeper.pid))
        said.write(deployment.project.home / "run")
        assert client.post("/v1/chat/completions", json={"model": "chat"}).status_code == 500
        keeper.kill()
        keeper.wait()
        answer = client.post("/v1/chat/completions", json={"model": "chat"})
        assert answer.status_code == 503
        eventually(lambda: "its keeper is gone" in client.get("/health").text)


def test_a_failing_answer_of_a_dying_engine_is_503(deployment: Deployment) -> None:
    """vLLM answers 500 to what was in it when its core died; a 500 of a healthy engine is its own."""
    deployment.start(
        {
            "dying": {"type": "chat", "fake": {"refuse": 500, "unhealthy_after_refusal": True}},
            "healthy": {"type": "chat", "fake": {"refuse": 500}},
            "gone": {"type": "chat", "fake": {"hang_up": True}},
        },
        health_check_interval=5,
    )
    with deployment.client() as client:
        own = client.post("/v1/chat/completions", json={"model": "healthy"})
        assert own.status_code == 500
        assert own.headers["x-error-source"] == "engine"
        for name, what in (("dying", "it failed while it answered"), ("gone", "it closed the connection")):
            answer = client.post("/v1/chat/completions", json={"model": name})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert what in error_of(answer)["message"]


def test_what_old_scripts_rely_on(deployment: Deployment, client: httpx.Client) -> None:
    """KnowFlow's shapes, and in /health the words of the OCR applications."""
    health = client.get("/health").json()
    assert isinstance(health.pop("timestamp"), float)
    assert health == {
        "status": "healthy",
        "services": {key: {"status": "healthy", "port": deployment.ports[key], "model": key} for key in FOUR},
        "model_loaded": True,
        "inference_engine": "vllm",
        "vllm_configured": True,
        "vllm_healthy": True,
    }
    assert client.get("/models").json()["data"][0] == {
        "id": "chat",
        "type": "chat",
        "port": deployment.ports["chat"],
        "path": "models/chat",
    }
    info = client.get("/system/info").json()
    assert set(info) == {"gpu_info", "processes", "config"}
    assert set(info["gpu_info"]) == {"gpus", "count"}
    assert info["processes"]["chat"] == {"pid": None, "status": "stopped"}
    assert info["config"]["models"]["chat"]["port"] == deployment.ports["chat"]
    assert API_KEY not in json.dumps(info)


def test_models_are_merged(client: httpx.Client) -> None:
    document = client.get("/v1/models").json()
    assert document["object"] == "list"
    assert [(each["id"], each["root"]) for each in document["data"]] == [
        ("chat", "chat"),
        ("gpt-4", "chat"),
        ("通义", "chat"),
        ("embedding", "embedding"),
        ("rerank", "rerank"),
        ("ocr", "ocr"),
    ]


def test_a_stream_passes_as_it_comes(deployment: Deployment) -> None:
    deployment.start(four(fake={"chunk_seconds": 0.3}))
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key=API_KEY) as client:
        arrived, words = [], []
        messages: Any = [{"role": "user", "content": "x"}]
        for chunk in client.chat.completions.create(model="chat", messages=messages, stream=True):
            arrived.append(time.monotonic())
            words.append(chunk.choices[0].delta.content)
    assert "".join(filter(None, words)) == "One word after the other."
    pauses = [later - earlier for earlier, later in itertools.pairwise(arrived)]
    assert min(pauses) > 0.1, "chunks came together"


def test_a_client_that_leaves_a_stream_cancels_it(deployment: Deployment) -> None:
    deployment.start(four(fake={"chunk_seconds": 0.3}))
    with (
        deployment.client() as client,
        client.stream("POST", "/v1/chat/completions", json={"model": "chat", "stream": True}) as answer,
    ):
        next(answer.iter_raw())
    eventually(lambda: deployment.seen("chat")["cancelled"] == 1, 5)


def test_a_client_that_leaves_before_the_answer_cancels_it(deployment: Deployment) -> None:
    deployment.start(four(fake={"hang": True}))
    with deployment.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json={"model": "chat"}, timeout=0.5)
    eventually(lambda: deployment.seen("chat")["cancelled"] == 1, 5)


def test_a_stream_that_breaks_ends_with_an_error_event(deployment: Deployment) -> None:
    deployment.start(four(fake={"break_stream": 2}))
    with deployment.client() as client:
        answer = client.post("/v1/chat/completions", json={"model": "chat", "stream": True})
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert answer.status_code == 200
        assert len(events) == 3
        assert json.loads(events[-1])["error"]["code"] == "engine_error"


def test_an_engines_own_error_passes_as_it_is(deployment: Deployment, client: httpx.Client) -> None:
    port = deployment.ports["chat"]
    direct = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={})
    assert direct.status_code == 401
    assert "x-error-source" not in direct.headers
    through = client.post("/v1/completions", json={"model": "chat"})
    assert through.status_code == 200, "the router brings the engine's key along"


def test_requests_of_many_clients_at_once(deployment: Deployment, client: httpx.Client) -> None:
    def ask(number: int) -> int:
        answer: int = client.post("/v1/embeddings", json={"n": number}).json()["echo"]["n"]
        return answer

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(200))) == list(range(200))


def test_a_client_that_sends_half_a_request(deployment: Deployment, client: httpx.Client) -> None:
    for text in (
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 100\r\n\r\n{",
        b"\x16\x03\x01\x02\x00",
        b"GET",
    ):
        with socket.create_connection(("127.0.0.1", deployment.ports["router"])) as connection:
            connection.sendall(text)
    assert client.get("/v1/models").status_code == 200


def test_endless_headers_are_cut_off(deployment: Deployment, client: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", deployment.ports["router"])) as connection:
        assert sent_before_cut_off(connection, limit=20_000_000) < 20_000_000
    assert client.get("/live").status_code == 200


def sent_before_cut_off(connection: socket.socket, limit: int) -> int:
    sent = connection.send(b"GET /live HTTP/1.1\r\n")
    with contextlib.suppress(OSError):
        while sent < limit:
            sent += connection.send(b"x-" + b"a" * 100_000 + b": 1\r\n")
    return sent


def test_headers_named_by_connection_stay_here(deployment: Deployment, client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json={}, headers={"connection": "x-mine", "x-mine": "1", "x-yours": "2"})
    assert len(answer.headers.get_list("date")) == 1
    headers = {name.lower() for name in deployment.seen("embedding")["requests"][0]["headers"]}
    assert "x-mine" not in headers
    assert "x-yours" in headers


def test_it_lets_streams_end_when_it_is_stopped(deployment: Deployment) -> None:
    deployment.start(four(fake={"chunk_seconds": 0.1}))
    with (
        deployment.client() as client,
        client.stream("POST", "/v1/chat/completions", json={"model": "chat", "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        os.kill(deployment.processes["router"].pid, signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert deployment.processes["router"].wait(10) is not None
