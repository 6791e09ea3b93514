"""What users of the earlier systems have in their scripts, against the service behind the real router.

Paths, fields and form names are theirs; an answer is read into the types that their clients declare, so that a field
that is missing, or of another type, fails. Only the address is ours, and it carries the key: http://any:KEY@host.
KnowFlow's own calls are in tests/engine/test_clients.py.
"""

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import UUID

import httpx
import msgspec
import openai
import pytest
from PIL import Image

from tests.conftest import API_KEY, CHECKOUT, Project, eventually, free_port
from tests.documents.fake_ocr import FakeOcr, page_image
from tests.documents.test_service import pdf_of
from tests.documents.web import OPEN
from tests.router.conftest import Deployment
from vllm_unified.settings.keys import add_key, hash_of

KEY = "sk-of-a-script"
TOKEN = "token-of-the-workers"
BEHAVIOUR: dict[str, Any] = {"model": "DeepSeek-OCR", "key": "", "concurrency": 4}

T = TypeVar("T")


# --- what their clients declare ---


class Box(msgspec.Struct):
    label: str
    box: tuple[int, int, int, int]


class Dims(msgspec.Struct):
    w: int
    h: int


class Timing(msgspec.Struct):
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    duration_ms: int | None


class ImageAnswer(msgspec.Struct):
    success: bool
    text: str
    raw_text: str
    boxes: list[Box]
    image_dims: Dims
    task_id: UUID
    timing: Timing
    duration_ms: int


class Accepted(msgspec.Struct):
    task_id: UUID


class TaskPage(msgspec.Struct):
    index: int
    markdown: str
    raw_text: str
    image_assets: list[str]
    boxes: list[Box]


class Result(msgspec.Struct):
    markdown_url: str
    raw_json_url: str
    archive_url: str
    image_urls: list[str]
    pages: list[TaskPage]


class Progress(msgspec.Struct):
    current: int
    total: int
    percent: float
    message: str
    pages_completed: int
    pages_total: int


class TaskAnswer(msgspec.Struct):
    task_id: UUID
    status: Literal["pending", "running", "succeeded", "failed"]
    task_type: Literal["image", "pdf"]
    created_at: datetime
    updated_at: datetime
    error_message: str | None
    result: Result | None
    progress: Progress
    timing: Timing


class RawPage(TaskPage):
    page_number: int


class Raw(msgspec.Struct):
    pages: list[RawPage]


class OlderMetadata(msgspec.Struct):
    mode: str
    grounding: bool
    base_size: int
    image_size: int
    crop_mode: bool
    inference_engine: str


class OlderImageAnswer(msgspec.Struct):
    success: bool
    text: str
    raw_text: str
    boxes: list[Box]
    image_dims: Dims
    metadata: OlderMetadata


class OlderPage(msgspec.Struct):
    page_number: int
    text: str
    raw_text: str
    boxes: list[Box]
    images: list[str]
    image_dims: Dims


class OlderPdfAnswer(msgspec.Struct):
    success: bool
    total_pages: int
    pages: list[OlderPage]
    metadata: OlderMetadata


class Converted(msgspec.Struct):
    class Metadata(msgspec.Struct):
        filename: str
        file_size: int
        pages_processed: int
        fallback_pages: list[int]
        url: str = ""

    status: Literal["success", "error"]
    format: str | None
    content: str | None
    error: str | None
    metadata: Metadata | None


class MistralAnswer(msgspec.Struct):
    class Page(msgspec.Struct):
        class Figure(msgspec.Struct):
            id: str
            top_left_x: int
            top_left_y: int
            bottom_right_x: int
            bottom_right_y: int
            image_base64: str | None

        class Dimensions(msgspec.Struct):
            dpi: int
            height: int
            width: int

        index: int
        markdown: str
        images: list[Figure]
        dimensions: Dimensions

    class Usage(msgspec.Struct):
        pages_processed: int
        doc_size_bytes: int

    pages: list[Page]
    model: str
    usage_info: Usage


def read_as(kind: type[T], content: bytes) -> T:
    return msgspec.json.decode(content, type=kind)


# --- where they find it ---


class Site:
    """Router, service and OCR model. `address` is all that a script is told."""

    def __init__(self, deployment: Deployment, documents: int) -> None:
        self.deployment = deployment
        self.documents = documents

    @property
    def address(self) -> str:
        return self.deployment.url.replace("://", f"://any:{KEY}@")

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=60, trust_env=False)


@pytest.fixture(scope="module")
def ocr() -> Iterator[FakeOcr]:
    with FakeOcr(**BEHAVIOUR) as ocr:
        yield ocr


@pytest.fixture(scope="module")
def site(ocr: FakeOcr, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("site")
    (home / "config").mkdir()
    (home / ".env").write_text(f"INTERNAL_API_TOKEN={TOKEN}\n")
    add_key(home, {"name": "script", "hash": hash_of(KEY)})
    deployment, port = Deployment(Project(home)), free_port()
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(home), "VLLM_API_KEY": API_KEY}
    try:
        deployment.start(
            {"ocr": {"name": "DeepSeek-OCR", "type": "ocr", "endpoints": [ocr.url], "served_model_names": ["dsocr"]}},
            documents={"port": port, "allowed_networks": [f"{OPEN}/32"]},
        )
        with (home / "documents.log").open("ab") as log:
            service = [sys.executable, "-m", "vllm_unified", "documents"]
            deployment.processes["documents"] = subprocess.Popen(
                service, env=environ, cwd=CHECKOUT, stdout=log, stderr=log
            )
        found = Site(deployment, port)
        with found.client() as client:
            eventually(lambda: client.get("/api/tasks").status_code == 200, 60)
        yield found
    finally:
        deployment.stop()


@pytest.fixture
def client(site: Site, ocr: FakeOcr) -> Iterator[httpx.Client]:
    ocr.behave(**BEHAVIOUR)
    with site.client() as client:
        yield client


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with the files that the scripts name."""
    Image.open(io.BytesIO(page_image(3, 400, 560))).save(tmp_path / "document.jpg", quality=95)
    (tmp_path / "image.png").write_bytes(page_image(4, 400, 560))
    (tmp_path / "document.pdf").write_bytes(pdf_of(2))
    return tmp_path


@pytest.fixture
def curl(site: Site, desk: Path) -> Any:
    """The answer's body to a command as it stands in a document, but for the address."""

    def run(path: str, *arguments: str) -> bytes:
        command = ["curl", "-sS", "--fail-with-body", "--noproxy", "*", f"{site.address}{path}", *arguments]
        return subprocess.run(command, cwd=desk, capture_output=True, timeout=60, check=True).stdout

    return run


def watched(client: httpx.Client, task_id: UUID) -> TaskAnswer:
    """Their panel: look again and again until it is neither pending nor running."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        task = read_as(TaskAnswer, client.get(f"/api/tasks/{task_id}").raise_for_status().content)
        if task.status not in ("pending", "running"):
            return task
        time.sleep(0.1)
    raise AssertionError(task)


# --- DeepSeek-OCR's applications ---


def test_the_image_panel(client: httpx.Client, desk: Path) -> None:
    with (desk / "document.jpg").open("rb") as image:
        answer = client.post("/api/ocr/image", files={"image": image}).raise_for_status()
    found = read_as(ImageAnswer, answer.content)
    assert found.success
    assert "Page 3" in found.text
    assert "<|ref|>" in found.raw_text
    assert "<|ref|>" not in found.text
    assert (found.image_dims.w, found.image_dims.h) == (400, 560)
    assert {box.label for box in found.boxes} >= {"title", "text", "table", "image"}
    assert all(0 <= box.box[0] < box.box[2] <= 400 and 0 <= box.box[1] < box.box[3] <= 560 for box in found.boxes)
    assert found.timing.started_at is not None
    assert found.timing.finished_at is not None
    assert found.timing.queued_at <= found.timing.started_at <= found.timing.finished_at
    # And the panel that looks a task up by its id.
    looked_up = watched(client, found.task_id)
    assert (looked_up.status, looked_up.task_type) == ("succeeded", "image")


def test_an_image_with_curl(curl: Any) -> None:
    assert "Page 3" in read_as(ImageAnswer, curl("/api/ocr/image", "-X", "POST", "-F", "image=@document.jpg")).text


def test_the_pdf_panel(client: httpx.Client, curl: Any) -> None:
    task = watched(client, read_as(Accepted, curl("/api/ocr/pdf", "-X", "POST", "-F", "pdf=@document.pdf")).task_id)
    assert (task.status, task.task_type, task.error_message) == ("succeeded", "pdf", None)
    assert (task.progress.current, task.progress.total, task.progress.percent) == (2, 2, 100)
    assert (task.progress.pages_completed, task.progress.pages_total) == (2, 2)
    result = task.result
    assert result is not None
    figures = ["images/page-1-img-1.jpg", "images/page-2-img-1.jpg"]
    assert [(page.index, page.image_assets) for page in result.pages] == [(0, figures[:1]), (1, figures[1:])]
    assert "Page 2" in client.get(result.markdown_url).raise_for_status().text
    raw = read_as(Raw, client.get(result.raw_json_url).raise_for_status().content)
    assert [(page.index, page.page_number) for page in raw.pages] == [(0, 1), (1, 2)]
    for url in result.image_urls:
        with Image.open(io.BytesIO(client.get(url).raise_for_status().content)) as figure:
            assert figure.format == "JPEG"
    with zipfile.ZipFile(io.BytesIO(client.get(result.archive_url).raise_for_status().content)) as archive:
        assert {"result.md", "raw.json", "images/page-1-img-1.jpg", "images/page-2-img-1.jpg"} <= set(
            archive.namelist()
        )
    for name in ("result.md", "raw.json", "result.zip", *figures):
        assert client.get(f"/api/tasks/{task.task_id}/download/{name}").status_code == 200


def test_a_task_while_it_goes_on(client: httpx.Client, ocr: FakeOcr) -> None:
    ocr.behave(**BEHAVIOUR, latency=0.3)
    sent = client.post("/api/ocr/pdf", files={"pdf": ("long.pdf", pdf_of(8), "application/pdf")})
    assert sent.status_code == 202
    task_id = read_as(Accepted, sent.content).task_id
    seen = [watched_once(client, task_id)]
    while seen[-1].status in ("pending", "running"):
        time.sleep(0.1)
        seen.append(watched_once(client, task_id))
    assert seen[0].result is None
    assert {task.progress.percent for task in seen} - {0.0, 100.0}
    assert seen[-1].status == "succeeded"


def watched_once(client: httpx.Client, task_id: UUID) -> TaskAnswer:
    return read_as(TaskAnswer, client.get(f"/api/tasks/{task_id}").content)


def test_a_task_that_nobody_knows(client: httpx.Client) -> None:
    assert client.get("/api/tasks/c1b7bdf2-0000-4000-8000-000000000000").status_code == 404


def test_the_older_python_script(client: httpx.Client, desk: Path) -> None:
    """The library that it uses writes a flag as True."""
    sizes = {"base_size": "1024", "image_size": "640", "crop_mode": "True"}
    with (desk / "document.jpg").open("rb") as image:
        sent = {"files": {"image": image}, "data": {"mode": "markdown", "grounding": "True", **sizes}}
        answer = client.post("/api/ocr", **sent).raise_for_status()  # type: ignore[arg-type]
    found = read_as(OlderImageAnswer, answer.content)
    assert "Page 3" in found.text
    assert found.boxes
    metadata = found.metadata
    assert (metadata.mode, metadata.grounding) == ("markdown", True)
    assert (metadata.base_size, metadata.image_size, metadata.crop_mode) == (1024, 640, True)


def test_the_older_curl_command(curl: Any) -> None:
    answer = curl("/api/ocr", "-X", "POST", "-F", "image=@document.jpg", "-F", "mode=markdown", "-F", "grounding=true")
    assert "Page 3" in json.loads(answer)["text"]


@pytest.mark.parametrize(
    ("mode", "more", "prompt"),
    [
        ("plain_ocr", {}, "Free OCR."),
        ("markdown", {}, "<|grounding|>Convert the document to markdown."),
        ("find_ref", {"find_term": "Total", "grounding": "true"}, "Locate <|ref|>Total<|/ref|> in the image."),
        ("freeform", {"prompt": "How many lines?"}, "How many lines?"),
    ],
)
def test_the_form_of_the_older_front_end(
    client: httpx.Client, ocr: FakeOcr, mode: str, more: dict[str, str], prompt: str
) -> None:
    """It sends every field, most of them empty."""
    fields = {
        "mode": mode,
        "prompt": "",
        "grounding": "false",
        "include_caption": "false",
        "find_term": "",
        "schema": "",
        "base_size": "1024",
        "image_size": "640",
        "crop_mode": "true",
        "test_compress": "false",
        **more,
    }
    answer = client.post("/api/ocr", files={"image": ("page.png", page_image(5, 400, 560))}, data=fields)
    found = read_as(OlderImageAnswer, answer.raise_for_status().content)
    assert found.text
    assert found.metadata.grounding is (fields["grounding"] == "true")
    assert ocr.seen["requests"][0]["prompt"] == prompt


@pytest.mark.parametrize("wanted", ["json", "markdown", "html", "docx"])
def test_the_older_pdf_form(client: httpx.Client, desk: Path, wanted: str) -> None:
    fields = {"mode": "markdown", "prompt": "", "output_format": wanted, "grounding": "true", "dpi": "144"}
    more = {"include_caption": "false", "extract_images": "true", "base_size": "1024", "image_size": "640"}
    with (desk / "document.pdf").open("rb") as file:
        sent = {"files": {"pdf_file": file}, "data": {**fields, **more, "crop_mode": "true"}}
        answer = client.post("/api/process-pdf", **sent).raise_for_status()  # type: ignore[arg-type]
    if wanted == "json":
        found = read_as(OlderPdfAnswer, answer.content)
        assert (found.total_pages, [page.page_number for page in found.pages]) == (2, [1, 2])
        task_id = answer.json()["metadata"]["task_id"]
        for figure in found.pages[0].images:
            assert client.get(f"/api/tasks/{task_id}/download/{figure}").status_code == 200
    else:
        ending = {"markdown": "md"}.get(wanted, wanted)
        assert f'filename="document.{ending}"' in answer.headers["content-disposition"]
        assert answer.content.startswith({"markdown": b"<!-- page 1", "html": b"<!", "docx": b"PK"}[wanted])


def test_openai_straight_to_the_model(site: Site, client: httpx.Client, desk: Path) -> None:
    image = base64.b64encode((desk / "document.jpg").read_bytes()).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}}
    asked = {"type": "text", "text": "<image>\n<|grounding|>Convert the document to markdown."}
    with openai.OpenAI(base_url=f"{site.deployment.url}/v1", api_key=KEY, max_retries=0) as script:
        answer = script.chat.completions.create(
            model="dsocr",
            messages=[{"role": "user", "content": [shown, asked]}],  # type: ignore[list-item, misc]
            temperature=0.0,
            max_tokens=4096,
        )
    assert "Page 3" in (answer.choices[0].message.content or "")


class TestWorkers:
    """They have the internal token, and no key."""

    @pytest.fixture
    def worker(self, site: Site) -> Iterator[httpx.Client]:
        with httpx.Client(
            base_url=site.deployment.url, headers={"X-Internal-Token": TOKEN}, timeout=60, trust_env=False
        ) as worker:
            yield worker

    def test_a_page(self, worker: httpx.Client, client: httpx.Client, desk: Path) -> None:
        asked = {
            "prompt": "<image>\n<|grounding|>Convert the document to markdown.",
            "image_base64": base64.encodebytes((desk / "document.jpg").read_bytes()).decode(),
            "base_size": 1024,
            "image_size": 640,
            "crop_mode": True,
        }
        answer = worker.post("/internal/infer", json=asked).raise_for_status()
        assert answer.json().keys() == {"text"}
        assert answer.json()["text"].startswith("<|ref|>title<|/ref|>")

    def test_words_alone(self, worker: httpx.Client, client: httpx.Client, ocr: FakeOcr) -> None:
        asked = {"prompt": "Hello.", "image_base64": None, "base_size": None, "image_size": None, "crop_mode": None}
        assert worker.post("/internal/infer", json=asked).raise_for_status().json()["text"]
        assert [each["prompt"] for each in ocr.seen["requests"]] == ["Hello."]

    @pytest.mark.parametrize(
        ("token", "body", "status"),
        [
            ("wrong", {"prompt": "x"}, 403),
            (TOKEN, {}, 400),
            (TOKEN, {"prompt": "x", "image_base64": "no base64!"}, 400),
            (TOKEN, {"prompt": "x", "base_size": "large"}, 400),
        ],
    )
    def test_refused(self, worker: httpx.Client, token: str, body: dict[str, Any], status: int) -> None:
        answer = worker.post("/internal/infer", json=body, headers={"X-Internal-Token": token})
        assert answer.status_code == status


# --- OCRFlux's document API ---


@pytest.mark.parametrize(
    ("file", "wanted", "pages"),
    [("document.pdf", "markdown", 2), ("image.png", "text", 1), ("document.jpg", "markdown", 1)],
)
def test_convert_file(curl: Any, desk: Path, file: str, wanted: str, pages: int) -> None:
    answer = curl("/convert/file", "-X", "POST", "-F", f"file=@{file}", "-F", f"output_format={wanted}")
    found = read_as(Converted, answer)
    assert (found.status, found.format, found.error) == ("success", wanted, None)
    assert found.content
    assert ("<table>" in found.content) == (wanted == "markdown")
    metadata = found.metadata
    assert metadata is not None
    assert (metadata.filename, metadata.file_size) == (file, (desk / file).stat().st_size)
    assert (metadata.pages_processed, metadata.fallback_pages) == (pages, [])


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "JPEG"])
def test_convert_file_of_each_kind(client: httpx.Client, kind: str) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(page_image(6, 400, 560))).save(file, kind)
    answer = client.post("/convert/file", files={"file": (f"a.{kind.lower()}", file.getvalue())})
    assert "Page 6" in (read_as(Converted, answer.raise_for_status().content).content or "")


def test_convert_file_says_which_pages_fell_back(client: httpx.Client, ocr: FakeOcr) -> None:
    """With max_page_retries 0 it was an empty document and "success"."""
    ocr.behave(**BEHAVIOUR, pages={"2": ["500"]})
    fields = {"output_format": "markdown", "max_page_retries": "0", "skip_cross_page_merge": "true"}
    answer = client.post("/convert/file", files={"file": ("a.pdf", pdf_of(3))}, data=fields)
    found = read_as(Converted, answer.raise_for_status().content)
    assert found.metadata is not None
    assert (found.metadata.pages_processed, found.metadata.fallback_pages) == (3, [2])
    assert ocr.seen["pages"] == {"1": 1, "3": 1}
    assert all(f"Page {page}" in (found.content or "") for page in (1, 3))


@pytest.fixture
def web(desk: Path) -> Iterator[str]:
    """The folder as a web site."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((OPEN, 0), partial(Quiet, directory=str(desk))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://{OPEN}:{server.server_port}"
        server.shutdown()
        thread.join()


def test_convert_url(curl: Any, web: str) -> None:
    body = json.dumps({"url": f"{web}/document.pdf", "output_format": "markdown", "max_page_retries": 2})
    answer = curl("/convert/url", "-X", "POST", "-H", "Content-Type: application/json", "-d", body)
    found = read_as(Converted, answer)
    assert (found.status, found.format, found.error) == ("success", "markdown", None)
    assert "Page 2" in (found.content or "")
    assert found.metadata is not None
    assert (found.metadata.filename, found.metadata.url) == ("document.pdf", f"{web}/document.pdf")


def test_what_is_refused_is_no_success(client: httpx.Client, web: str) -> None:
    """An error was answered with the status 200."""
    gone = client.post("/convert/url", json={"url": f"{web}/gone.pdf"})
    letter = client.post("/convert/file", files={"file": ("a.pdf", b"Dear Sir")})
    other = client.post("/convert/file", files={"file": ("a.pdf", pdf_of(1))}, data={"output_format": "poem"})
    for answer, status in ((gone, 502), (letter, 415), (other, 400)):
        found = read_as(Converted, answer.content)
        assert (answer.status_code, found.status, found.content) == (status, "error", None), answer.text
        assert found.error


# --- Mistral's clients ---


def test_mistral_with_a_document_in_the_request(client: httpx.Client) -> None:
    url = "data:application/pdf;base64," + base64.b64encode(pdf_of(3)).decode()
    body = {
        "model": "mistral-ocr-latest",
        "document": {"type": "document_url", "document_url": url},
        "pages": [0, 2],
        "include_image_base64": True,
    }
    found = read_as(MistralAnswer, client.post("/v1/ocr", json=body).raise_for_status().content)
    assert [page.index for page in found.pages] == [0, 2]
    assert "# Page 3" in found.pages[1].markdown
    (figure,) = found.pages[0].images
    assert f"]({figure.id})" in found.pages[0].markdown
    assert (figure.image_base64 or "").startswith("data:image/jpeg;base64,")
    assert 0 <= figure.top_left_x < figure.bottom_right_x <= found.pages[0].dimensions.width
    assert 0 <= figure.top_left_y < figure.bottom_right_y <= found.pages[0].dimensions.height
    assert (found.usage_info.pages_processed, found.usage_info.doc_size_bytes) == (2, len(pdf_of(3)))


@pytest.mark.parametrize("document", ["document_url", "image_url", "image_url in an object"])
def test_mistral_with_an_address(client: httpx.Client, web: str, document: str) -> None:
    source: dict[str, Any] = {"type": "document_url", "document_url": f"{web}/document.pdf"}
    if document.startswith("image_url"):
        at = f"{web}/document.jpg"
        source = {"type": "image_url", "image_url": {"url": at} if "object" in document else at}
    answer = client.post("/v1/ocr", json={"model": "mistral-ocr-latest", "document": source})
    found = read_as(MistralAnswer, answer.raise_for_status().content)
    assert all(page.markdown for page in found.pages)
    assert all(figure.image_base64 is None for page in found.pages for figure in page.images)


# --- health ---


def test_health(site: Site, client: httpx.Client) -> None:
    """In the words of both, through the router and of the service itself."""
    itself = httpx.get(f"http://127.0.0.1:{site.documents}/health", trust_env=False)
    for answer in (client.get("/health"), itself):
        health = answer.raise_for_status().json()
        assert (health["status"], health["model_loaded"], health["inference_engine"]) == ("healthy", True, "vllm")
        assert (health["vllm_configured"], health["vllm_healthy"]) == (True, True)
        assert isinstance(health["timestamp"], float)


def test_a_script_without_the_key(site: Site, client: httpx.Client) -> None:
    for address in (site.deployment.url, site.deployment.url.replace("://", "://any:wrong@")):
        sent = {"files": {"image": ("a.png", page_image(1))}, "trust_env": False}
        assert httpx.post(f"{address}/api/ocr/image", **sent).status_code == 401  # type: ignore[arg-type]


def test_the_pages_are_charged_to_the_key_in_the_address(client: httpx.Client, site: Site) -> None:
    client.post("/api/ocr/image", files={"image": ("a.png", page_image(7, 400, 560))}).raise_for_status()
    client.get("/api/tasks").raise_for_status()

    def uses() -> bool:
        with site.deployment.client() as admin:
            return "script" in admin.get("/usage").text

    eventually(uses)
