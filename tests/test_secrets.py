"""What users send is in no log: prompts, documents, keys, what stands behind the question mark of an address."""

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fpdf import FPDF

from tests.conftest import Project, eventually, free_port
from tests.documents.fake_ocr import page_image
from tests.documents.test_service import ended
from tests.documents.web import OPEN
from tests.test_deploy import Deployed

MARK = "xyzzy"
SECRET = f"{MARK}-secret-of-a-client"
ANSWER = {"choices": [{"message": {"content": f"{SECRET} read"}, "finish_reason": "stop"}], "usage": {}}
NOBODY = f"http://{OPEN}:1024"
CHAT = {"model": "the-chat", "messages": [{"role": "user", "content": SECRET}], "user": SECRET}


@pytest.fixture
def deployed(project: Project) -> Iterator[Deployed]:
    each = Deployed(project)
    ports = {name: free_port() for name in ("router", "documents", "chat", "ocr")}
    fake = {"answer": ANSWER, "says": True}
    entries = {
        key: {
            "name": f"the-{key}",
            "type": key,
            "port": ports[key],
            "engine_args": {"kv-cache-memory-bytes": "1M"},
            "env": {"FAKE_ENGINE": json.dumps(fake)},
        }
        for key in ("chat", "ocr")
    }
    each.ports = ports
    documents = {"port": ports["documents"], "allowed_networks": [f"{OPEN}/32"]}
    project.write(entries, router={"port": ports["router"]}, documents=documents)
    for key in entries:
        project.model_folder(key)
    yield each
    each.run("stop")


def test_no_log_has_what_users_send(deployed: Deployed) -> None:
    started = deployed.run("start")
    assert started.returncode == 0, started.stderr
    key = (deployed.project.home / ".env").read_text().strip().removeprefix("VLLM_API_KEY=")
    url = f"http://127.0.0.1:{deployed.ports['router']}"
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        eventually(lambda: client.get("/api/tasks").status_code == 200, 60)
        ask_models(client)
        send_documents(client)
        break_an_engine(client, deployed.ports["chat"], key)
    assert deployed.run("stop").returncode == 0
    logs = deployed.project.home / "run" / "logs"
    read = {path.name: path.read_text() for path in logs.iterdir()}
    # What was sent went through all of them, and they do write.
    assert all("/v1/chat/completions" in read[name] for name in ("router.log", "chat.log"))
    assert "webhook" in read["documents.log"]
    assert [name for name, text in read.items() if MARK in text] == []
    assert [name for name, text in read.items() if key in text] == []


def ask_models(client: httpx.Client) -> None:
    """In all ways that keys and prompts are sent in, rightly and wrongly."""
    behind = {"api_key": SECRET, "token": SECRET}
    assert client.post("/v1/chat/completions", json=CHAT, params=behind).status_code == 200
    client.post("/v1/chat/completions", json={**CHAT, "stream": True}, params=behind)
    client.post("/v1/embeddings", json={"model": "the-chat", "input": [SECRET]}, params=behind)
    client.post("/rerank", json={"model": "the-chat", "query": SECRET, "documents": [SECRET]})
    client.post("/v1/chat/completions", content=json.dumps(CHAT)[:-2], headers={"x-token": SECRET})
    client.post("/v1/chat/completions", content=b"\xff" + SECRET.encode())
    client.post("/v1/chat/completions", json={**CHAT, "messages": SECRET, "max_tokens": SECRET, "stream": SECRET})
    client.post("/v1/audio/transcriptions", files={"file": (SECRET, SECRET)}, data={"prompt": SECRET})
    client.post("/admin/models/chat/start", json={SECRET: SECRET}, params=behind)
    client.post("/admin/reload", json={"restarted": SECRET}, params=behind)
    client.get("/usage", params={"from": SECRET, **behind})
    client.get("/nowhere", params=behind)
    for headers in ({"authorization": f"Bearer {SECRET}"}, {"x-api-key": SECRET}, {"cookie": SECRET}):
        assert httpx.post(f"{client.base_url}/v1/chat/completions", json=CHAT, headers=headers).status_code == 401
    httpx.get(f"{client.base_url}/v1/models", auth=("any", SECRET))


def send_documents(client: httpx.Client) -> None:
    """Read, broken, fetched, and told of."""
    fields = {
        "prompt": SECRET,
        "mode": "freeform",
        "password": SECRET,
        "webhook_url": f"{NOBODY}/hook/{SECRET}?token={SECRET}",
        "webhook_secret": "whsec_" + base64.b64encode(SECRET.encode()).decode(),
        "retries": "0",
    }
    sent = client.post("/api/ocr/pdf", files={"pdf": (f"{SECRET}.pdf", pdf())}, data=fields, params={"token": SECRET})
    assert sent.status_code == 202, sent.text
    document = ended(client, sent.json()["task_id"])
    assert MARK in json.dumps(document)
    client.post("/api/ocr/image", files={"image": (SECRET, page_image(1, 400, 560))}, data={"find_term": SECRET})
    client.post("/api/ocr/image", files={"image": (SECRET, SECRET)})
    client.post(
        "/api/ocr/image",
        content=f'--{SECRET}\r\n"{SECRET}',
        headers={"content-type": f"multipart/form-data; boundary={SECRET}"},
    )
    client.post("/api/ocr/pdf", files={"pdf": (SECRET, b"%PDF-1.4\n" + SECRET.encode())})
    client.post("/api/ocr/pdf", files={"pdf": (f"{SECRET}.zip", archive())})
    client.post("/v1/ocr", content=json.dumps({"document": SECRET}))
    for address in (
        f"https://user:{SECRET}@{SECRET}.invalid/a?token={SECRET}",
        f"{NOBODY}/{SECRET}?token={SECRET}",
        f"data:application/pdf;base64,{SECRET}",
    ):
        client.post("/v1/ocr", json={"model": SECRET, "document": {"type": "document_url", "document_url": address}})
        client.post("/convert/url", json={"url": address})
    client.get(f"/api/tasks/{SECRET}", params={"wait": SECRET})


def break_an_engine(client: httpx.Client, port: int, key: str) -> None:
    """It answers with no JSON, breaks off in the middle of a stream, refuses, hangs up."""
    for behaviour in ({"answer": SECRET}, {"break_stream": 2}, {"refuse": 500}, {"hang_up": True}):
        behave(port, {"key": key, "says": True, **behaviour})
        for stream in (False, True):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(client.post, "/v1/chat/completions", json={**CHAT, "stream": stream}).result()


def behave(port: int, behaviour: dict[str, object]) -> None:
    httpx.post(f"http://127.0.0.1:{port}/behave", json=behaviour).raise_for_status()


def pdf() -> bytes:
    """A page with text in it, which the service takes where the model reads nothing."""
    written = FPDF()
    written.add_page()
    written.set_font("Helvetica", size=12)
    written.cell(text=SECRET)
    written.set_title(SECRET)
    return bytes(written.output())


def archive() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(f"{SECRET}.pdf", pdf())
        file.writestr(f"../{SECRET}.exe", SECRET)
    return content.getvalue()
