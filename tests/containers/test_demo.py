"""./deploy.sh start --demo: four real engines in the container, of the image alone."""

import io
import json
import re
import subprocess
import threading
from typing import Any

import httpx
import pytest
from PIL import Image

from demo.training import chat, ocr
from tests.conftest import CHECKOUT, eventually
from tests.containers.conftest import KEYS, NAME, Demo, docker, run, timed

ASKED: Any = {"model": "demo-chat", "messages": [{"role": "user", "content": "What are you?"}]}
PAGE = CHECKOUT / "demo" / "ocr" / "page.png"


def test_start_shows_each_model_and_ends_with_examples(demo: Demo) -> None:
    assert f"In Docker, of the image {NAME}:latest" in demo.printed
    assert all(re.search(rf"\] {key} +ready ", demo.printed) for key in KEYS)
    # The page that the last example sends is in the container.
    pasted = demo.printed[demo.printed.index("KEY=") : demo.printed.index("Next:")]
    read = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, check=True).stdout
    assert read.count('"choices"') == 2
    assert '"results"' in read


def test_compose_finds_it_up_as_it_wants_it(demo: Demo) -> None:
    started = docker("inspect", "--format", "{{.Id}} {{.State.StartedAt}}", NAME)
    demo.compose("up", "--detach", "--wait", "--wait-timeout", "60")
    assert docker("inspect", "--format", "{{.Id}} {{.State.StartedAt}}", NAME) == started
    assert docker("inspect", "--format", "{{.State.Health.Status}}", NAME) == "healthy\n"


def test_the_verbs(demo: Demo) -> None:
    status = demo.status()
    assert status["ready"]
    assert {key: each["state"] for key, each in status["models"].items()} == dict.fromkeys(KEYS, "ready")
    assert demo.done("start", "--demo").startswith("already running and ready; nothing to do")
    assert "already here: docker" in demo.refused("start", "--demo", "--native")
    assert json.loads(demo.done("health"))["status"] == "healthy"
    assert demo.done("check") == "config/models.demo.json: 4 models, nothing wrong\n"
    assert demo.done("reload") == "nothing has changed\n"
    assert "starting order: chat, embedding, rerank, ocr" in demo.done("plan")
    assert "vLLM" in demo.done("logs", "chat", "--lines", "400")
    assert "no log of" in demo.refused("logs", "../../etc/passwd")
    assert demo.done("models", "list").count("unverified") == 4
    assert "models.chat runs" in demo.refused("models", "remove", "chat", "--force")


@pytest.mark.parametrize("door", ["router", "chat"])
def test_chat(demo: Demo, door: str) -> None:
    with demo.openai(door) as client:
        answer = client.chat.completions.create(**ASKED)
        pieces = list(client.chat.completions.create(**ASKED, stream=True))
    assert answer.choices[0].message.content == chat.Lessons("en").answers["who_are_you"]
    assert "".join(each.choices[0].delta.content or "" for each in pieces) == answer.choices[0].message.content


@pytest.mark.parametrize("door", ["router", "embedding"])
def test_embedding(demo: Demo, door: str) -> None:
    with demo.openai(door) as client:
        assert len(client.embeddings.create(model="demo-embedding", input="Paris").data[0].embedding) == 384


@pytest.mark.parametrize("door", ["router", "rerank"])
def test_rerank(demo: Demo, door: str) -> None:
    body = {"model": "demo-rerank", "query": "capital of France?", "documents": ["Bananas.", "Paris, France."]}
    with demo.openai(door) as client:
        ranked: Any = client.post("/rerank", body=body, cast_to=object)
    assert [each["index"] for each in ranked["results"]] == [1, 0]


@pytest.mark.parametrize("door", ["router", "ocr"])
def test_ocr(demo: Demo, door: str) -> None:
    with demo.openai(door) as client:
        assert [each.id for each in client.models.list().data if each.id == "demo-ocr"] == ["demo-ocr"]
        completion = client.completions.create(model="demo-ocr", prompt="1", max_tokens=1)
    assert completion.usage is not None


def test_a_page_is_read(demo: Demo) -> None:
    with demo.client() as client:
        answer = client.post("/api/ocr/image", files={"image": ("page.png", PAGE.read_bytes())}).raise_for_status()
    wanted = ocr.EXAMPLE.markdown
    assert ocr.edit_distance(wanted, answer.json()["text"]) <= 0.05 * len(wanted)


def test_what_is_published(demo: Demo) -> None:
    """The document service is not, and all the rest on the host's loopback alone."""
    published = json.loads(docker("inspect", NAME))[0]["NetworkSettings"]["Ports"]
    bound = {(each["HostIp"], int(each["HostPort"])) for all_of_it in published.values() for each in all_of_it or ()}
    assert bound == {("127.0.0.1", port) for port in demo.ports.values()}


def test_all_logs_reach_docker(demo: Demo) -> None:
    def names() -> set[str]:
        done = run("docker", "logs", NAME)
        return {line.split(" | ")[0] for line in done.stdout.splitlines() if " | " in line}

    with demo.client() as client:
        client.get("/v1/models")
    eventually(lambda: names() >= {"router", "documents", *KEYS}, 20)
    logs = run("docker", "logs", NAME)
    assert demo.api_key() not in logs.stdout + logs.stderr


def test_supervisord_is_the_first_process(demo: Demo) -> None:
    assert "supervisord" in demo.inside("cat", "/proc/1/cmdline")
    status = demo.inside("cat", "/proc/1/status")
    assert "\nUid:\t1000\t1000\t" in status
    assert "\nCapBnd:\t0000000000800000\n" in status, "SYS_NICE alone"


def test_what_it_writes_is_its_own(demo: Demo) -> None:
    readable = demo.inside("find", "data", "run", "-type", "f", "-perm", "/077")
    assert readable == ""


def test_stop_drains_and_a_start_keeps_key_and_jobs(demo: Demo) -> None:
    key = demo.api_key()
    with demo.client() as client:
        task = client.post("/api/ocr/pdf", files={"pdf": ("page.pdf", _as_pdf())}).raise_for_status().json()["task_id"]
        eventually(lambda: client.get(f"/api/tasks/{task}").json()["status"] == "succeeded", 120)

    began, ended = threading.Event(), []

    def stream() -> None:
        body = {**ASKED, "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 8, "temperature": 1}
        body["stream_options"] = {"include_usage": True}
        with demo.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
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
    assert json.loads(last[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 8 * 900
    state = json.loads(docker("inspect", NAME))[0]["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    assert demo.run("status").returncode == 3

    docker("start", NAME)  # its documents do not wait for the engines
    eventually(lambda: "run/supervisord.pid" in run("docker", "exec", NAME, "ls", "run/supervisord.pid").stdout, 60)
    assert demo.api_key() == key
    with demo.client() as client:
        eventually(lambda: _status(client, task) == "succeeded", 60)


def _status(client: httpx.Client, task: str) -> str | None:
    try:
        answer = client.get(f"/api/tasks/{task}")
    except httpx.TransportError:
        return None
    status: str | None = answer.json().get("status")
    return status


def _as_pdf() -> bytes:
    written = io.BytesIO()
    Image.open(PAGE).convert("RGB").save(written, "PDF")
    return written.getvalue()
