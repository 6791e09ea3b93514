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
BESIDE = ("nginx", "prometheus", "grafana")
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
    found = json.loads(docker("inspect", NAME, *(f"{NAME}-{name}" for name in BESIDE)))
    published = [ports for each in found for ports in each["NetworkSettings"]["Ports"].values() if ports]
    bound = {(each["HostIp"], int(each["HostPort"])) for ports in published for each in ports}
    assert bound == {("127.0.0.1", port) for port in demo.ports.values()}


def test_nginx_prometheus_and_grafana_run_beside_it(demo: Demo) -> None:
    found = demo.status()["companions"]
    assert {name: each["state"] for name, each in found.items()} == dict.fromkeys(BESIDE, "healthy")
    assert {name: each["url"] for name, each in found.items()} == {name: demo.url(name) for name in BESIDE}
    for name in BESIDE:
        process = demo.beside(name, "cat", "/proc/1/status")
        assert "\nNoNewPrivs:\t1\n" in process
        assert ("\nCapBnd:\t0000000000000000\n" in process) == (name != "nginx")
    assert "GET" in demo.done("logs", "nginx") or "{" in demo.done("logs", "nginx")


def test_chat_through_nginx(demo: Demo) -> None:
    with demo.openai("nginx") as client:
        answer = client.chat.completions.create(**ASKED)
    assert answer.choices[0].message.content == chat.Lessons("en").answers["who_are_you"]


def test_prometheus_has_the_router_the_documents_and_every_model(demo: Demo) -> None:
    def up() -> set[tuple[str, str]]:
        found = httpx.get(f"{demo.url('prometheus')}/api/v1/query", params={"query": "up == 1"}).json()
        return {(each["metric"]["type"], each["metric"].get("model", "")) for each in found["data"]["result"]}

    wanted = {("router", ""), ("documents", ""), *((key, key) for key in KEYS)}
    eventually(lambda: up() == wanted, 90)
    key, own = "/app/run/rendered/prometheus/key", demo.api_key()
    assert demo.inside("stat", "--format", "%a %g", key) == "640 0\n"
    assert own not in demo.beside("prometheus", "cat", key)


def test_grafana_has_a_password_that_was_said_once(demo: Demo) -> None:
    told = re.search(r"user admin, password (\S+)   \(this once; docker exec (.+)\)", demo.printed)
    assert told
    password = docker("exec", *told[2].split())
    assert password == told[1]
    assert f"(docker exec {told[2]})" in demo.inside("vllm-unified", "welcome").replace(
        "in /app/", f"docker exec {NAME} cat "
    )
    organisation = f"{demo.url('grafana')}/api/org"
    assert httpx.get(organisation, auth=("admin", password)).status_code == 200
    assert httpx.get(organisation, auth=("admin", "admin")).status_code == 401
    assert httpx.get(organisation).status_code == 401


def test_a_reload_reaches_prometheus(demo: Demo) -> None:
    def reloaded() -> float:
        said = httpx.get(f"{demo.url('prometheus')}/metrics").text
        (value,) = re.findall(r"^prometheus_config_last_reload_success_timestamp_seconds (\S+)$", said, re.MULTILINE)
        return float(value)

    before = reloaded()
    demo.done("reload")
    eventually(lambda: reloaded() > before, 30)


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
    """But for what nginx, Prometheus and Grafana read."""
    rendered = ("-path", "run/rendered", "-prune", "-o")
    assert demo.inside("find", "data", "run", *rendered, "-type", "f", "-perm", "/077", "-print") == ""
    assert demo.inside("find", "run/rendered", "-type", "f", "-perm", "/022") == ""


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
    meanwhile = httpx.get(f"{demo.url('nginx')}/v1/models", timeout=30)
    assert (meanwhile.status_code, meanwhile.headers["x-error-source"]) == (503, "nginx")

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
