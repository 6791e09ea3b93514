"""docker compose up: four real engines in the container."""

import io
import json
import threading
from typing import Any

import pytest
from PIL import Image

from demo.training import chat, ocr
from tests.conftest import CHECKOUT, eventually
from tests.containers.conftest import KEYS, NAME, Deployment, docker, run, timed

ASKED: Any = {"model": "demo-chat", "messages": [{"role": "user", "content": "What are you?"}]}
PAGE = CHECKOUT / "demo" / "ocr" / "page.png"


def test_up_waits_until_all_four_are_ready(deployment: Deployment) -> None:
    status = deployment.status()
    assert status["ready"]
    assert {key: each["state"] for key, each in status["models"].items()} == dict.fromkeys(KEYS, "ready")
    assert docker("inspect", "--format", "{{.State.Health.Status}}", NAME) == "healthy\n"


@pytest.mark.parametrize("door", ["router", "chat"])
def test_chat(deployment: Deployment, door: str) -> None:
    with deployment.openai(door) as client:
        answer = client.chat.completions.create(**ASKED)
        pieces = list(client.chat.completions.create(**ASKED, stream=True))
    assert answer.choices[0].message.content == chat.Lessons("en").answers["who_are_you"]
    assert "".join(each.choices[0].delta.content or "" for each in pieces) == answer.choices[0].message.content


@pytest.mark.parametrize("door", ["router", "embedding"])
def test_embedding(deployment: Deployment, door: str) -> None:
    with deployment.openai(door) as client:
        assert len(client.embeddings.create(model="demo-embedding", input="Paris").data[0].embedding) == 384


@pytest.mark.parametrize("door", ["router", "rerank"])
def test_rerank(deployment: Deployment, door: str) -> None:
    body = {"model": "demo-rerank", "query": "capital of France?", "documents": ["Bananas.", "Paris, France."]}
    with deployment.openai(door) as client:
        ranked: Any = client.post("/rerank", body=body, cast_to=object)
    assert [each["index"] for each in ranked["results"]] == [1, 0]


@pytest.mark.parametrize("door", ["router", "ocr"])
def test_ocr(deployment: Deployment, door: str) -> None:
    with deployment.openai(door) as client:
        assert [each.id for each in client.models.list().data if each.id == "demo-ocr"] == ["demo-ocr"]
        completion = client.completions.create(model="demo-ocr", prompt="1", max_tokens=1)
    assert completion.usage is not None


def test_a_page_is_read(deployment: Deployment) -> None:
    with deployment.client() as client:
        answer = client.post("/api/ocr/image", files={"image": ("page.png", PAGE.read_bytes())}).raise_for_status()
    wanted = ocr.EXAMPLE.markdown
    assert ocr.edit_distance(wanted, answer.json()["text"]) <= 0.05 * len(wanted)


def test_what_is_published(deployment: Deployment) -> None:
    """The document service is not, and all the rest on the host's loopback alone."""
    published = json.loads(docker("inspect", NAME))[0]["NetworkSettings"]["Ports"]
    bound = {(each["HostIp"], int(each["HostPort"])) for all_of_it in published.values() for each in all_of_it or ()}
    assert bound == {("127.0.0.1", port) for port in deployment.ports.values()}


def test_all_logs_reach_docker(deployment: Deployment) -> None:
    def names() -> set[str]:
        done = run("docker", "logs", NAME)
        return {line.split(" | ")[0] for line in done.stdout.splitlines() if " | " in line}

    with deployment.client() as client:
        client.get("/v1/models")
    eventually(lambda: names() >= {"router", "documents", *KEYS}, 20)
    logs = run("docker", "logs", NAME)
    assert deployment.api_key() not in logs.stdout + logs.stderr


def test_supervisord_is_the_first_process(deployment: Deployment) -> None:
    assert "supervisord" in deployment.inside("cat", "/proc/1/cmdline")
    status = deployment.inside("cat", "/proc/1/status")
    assert "\nUid:\t1000\t1000\t" in status
    assert "\nCapBnd:\t0000000000800000\n" in status, "SYS_NICE alone"


def test_what_it_writes_is_its_own(deployment: Deployment) -> None:
    readable = deployment.inside("find", "data", "run", "-type", "f", "-perm", "/077")
    assert readable == ""


def test_stop_drains_and_a_start_keeps_key_and_jobs(deployment: Deployment) -> None:
    key = deployment.api_key()
    with deployment.client() as client:
        task = client.post("/api/ocr/pdf", files={"pdf": ("page.pdf", _as_pdf())}).raise_for_status().json()["task_id"]
        eventually(lambda: client.get(f"/api/tasks/{task}").json()["status"] == "succeeded", 120)

    began, ended = threading.Event(), []

    def stream() -> None:
        body = {**ASKED, "max_tokens": 1900, "ignore_eos": True, "stream": True, "n": 8, "temperature": 1}
        body["stream_options"] = {"include_usage": True}
        with deployment.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                began.set()
                ended.append(line)

    streaming = threading.Thread(target=stream)
    streaming.start()
    assert began.wait(60)
    with timed("docker stop while a stream runs"):
        docker("stop", "--time", "240", NAME)
    streaming.join(60)
    last = [line for line in ended if line]
    assert last[-1] == "data: [DONE]"
    assert json.loads(last[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 8 * 1900
    state = json.loads(docker("inspect", NAME))[0]["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)

    with timed("docker start, four engines on a filled cache"):
        deployment.up()
    assert deployment.api_key() == key
    with deployment.client() as client:
        assert client.get(f"/api/tasks/{task}").json()["status"] == "succeeded"


def test_a_new_container_keeps_key_and_jobs(deployment: Deployment) -> None:
    key = deployment.api_key()
    with deployment.client() as client:
        body = {"files": {"image": ("page.png", PAGE.read_bytes())}}
        task = client.post("/api/ocr/image", **body).raise_for_status().json()["task_id"]  # type: ignore[arg-type]
    with timed("docker compose down"):
        deployment.compose("down")
    with timed("docker compose up --wait, a new container"):
        deployment.up()
    assert deployment.api_key() == key
    with deployment.client() as client:
        assert client.get(f"/api/tasks/{task}").json()["status"] == "succeeded"


def _as_pdf() -> bytes:
    written = io.BytesIO()
    Image.open(PAGE).convert("RGB").save(written, "PDF")
    return written.getvalue()
