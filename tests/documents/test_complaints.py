"""What users of the systems before this one complained about most: each complaint has its tests, and they pass."""

import ast
import io
import os
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image, ImageChops

from tests.conftest import API_KEY, CHECKOUT, Project, eventually, free_port
from tests.documents.conftest import Served
from tests.documents.fake_ocr import FakeOcr, page_image
from tests.documents.test_service import ended, pdf_of
from vllm_unified.documents.api import tasks
from vllm_unified.documents.app import create_app
from vllm_unified.documents.service import Service

HERE = "documents/test_complaints.py"
SERVICE = "documents/test_service.py"
COMPLAINTS: dict[str, list[str]] = {
    "repetition loops": [
        f"{HERE}::test_a_loop_is_asked_again_and_left_out",
        "documents/test_repetition.py::test_text_without_its_loop",
        "documents/test_profiles.py::test_guard_against_repetition",
        "documents/test_reading.py::test_a_loop_is_left_out_of_the_answer_that_is_kept",
    ],
    "silent truncation at 8192": [
        f"{HERE}::test_a_page_that_was_cut_off_says_so",
        "documents/test_reading.py::test_a_page_that_was_only_cut_off_goes_on_to_a_mode_with_shorter_answers",
    ],
    "large PDFs that crash": [
        f"{HERE}::test_a_long_document",
        f"{SERVICE}::test_after_a_kill_it_goes_on_and_reads_no_page_twice",
        "documents/test_products.py::test_memory_does_not_grow_with_the_pages",
        "documents/test_joining.py::test_two_pages_are_held_at_a_time",
    ],
    "proxies that cut at 60 to 120 s": [
        f"{HERE}::test_a_wait_ends_before_a_proxy_cuts_it",
        f"{HERE}::test_events_are_never_silent_for_long",
    ],
    "one page at a time": [
        f"{HERE}::test_the_engine_is_kept_busy",
        "documents/test_engine.py::test_engine_is_kept_busy_and_its_queue_short",
    ],
    "one failed page costs the document": [
        f"{SERVICE}::test_a_page_that_is_never_read_is_listed_and_can_be_retried",
        "documents/test_jobs.py::test_of_pages_fails_no_document",
    ],
    "lost pages": [
        f"{HERE}::test_no_page_is_lost_and_no_number_shifts",
        "documents/test_rendering.py::test_a_lost_page_costs_no_other",
    ],
    "figures missing from the Markdown": [f"{HERE}::test_figures_stand_where_they_were"],
    "cross-page tables": [
        f"{HERE}::test_a_table_over_two_pages_is_one",
        "documents/test_joining.py::test_tables",
        "documents/test_joining.py::test_a_merge_that_failed_glues_no_tables_together",
    ],
    "headers and footers that cannot be kept or dropped": [
        f"{HERE}::test_running_heads_are_kept_or_dropped",
        "documents/test_joining.py::test_repeated_lines_are_running_heads",
    ],
    "boxes that are off": [
        f"{HERE}::test_boxes_are_on_the_page_as_it_is_seen",
        "documents/test_grounding.py::test_any_answer_has_boxes_within_the_image",
        "documents/test_products.py::test_layout_shows_each_page_and_its_boxes",
    ],
    "installation: no two versions fit": [
        "test_docs.py::test_one_version",
        "test_docs.py::test_versions_stand_in_one_file",
    ],
    "offline, and still something is downloaded": [f"{HERE}::test_nothing_is_asked_of_other_machines"],
    "/docs needs a CDN": ["router/test_docs_page.py::test_what_the_page_loads_asks_no_other_host"],
}


@pytest.mark.parametrize("complaint", COMPLAINTS)
def test_every_complaint_has_its_tests(complaint: str) -> None:
    for test in COMPLAINTS[complaint]:
        file, _, name = test.partition("::")
        tree = ast.parse((CHECKOUT / "tests" / file).read_text())
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        assert name in {each.name for each in ast.walk(tree) if isinstance(each, functions)}, test


# ---

BEHAVIOUR: dict[str, Any] = {"model": "deepseek-ocr", "concurrency": 4}


@pytest.fixture(autouse=True)
def well_behaved(ocr: FakeOcr) -> None:
    ocr.behave(**BEHAVIOUR)


def read(client: httpx.Client, content: bytes, name: str = "a.pdf", **fields: str) -> dict[str, Any]:
    """The task, when it has ended."""
    answer = client.post("/api/ocr/pdf", files={"pdf": (name, content)}, data=fields)
    return ended(client, answer.raise_for_status().json()["task_id"])


def product(client: httpx.Client, task: dict[str, Any], name: str = "result.md") -> httpx.Response:
    return client.get(task["result"]["product_urls"][name]).raise_for_status()


def test_a_loop_is_asked_again_and_left_out(client: httpx.Client, ocr: FakeOcr) -> None:
    ocr.behave(**BEHAVIOUR, pages={"1": ["loop"], "2": ["loop"] * 9, "3": ["loop_numbers"] * 9})
    task = read(client, pdf_of(4))
    asked = [each for each in ocr.seen["requests"] if each["page"] == 1]
    first, second = asked
    assert first["vllm_xargs"]["ngram_size"] == 30
    assert second["vllm_xargs"] != first["vllm_xargs"], "the same question brings the same answer"
    once, for_ever, counting, good = task["result"]["pages"]
    assert (once["warnings"], once["reason"], good["warnings"]) == ([], "", [])
    for page in (for_ever, counting):
        assert page["warnings"] or page["reason"]
        assert f"Page {page['page_number']}" in page["markdown"]
    text = product(client, task).text
    assert text.count("This sentence comes again and again.") < 5
    assert text.count("of the list, which has no end.") < 200


def test_a_page_that_was_cut_off_says_so(client: httpx.Client, ocr: FakeOcr) -> None:
    ocr.behave(**BEHAVIOUR, pages={"1": ["truncate"] * 9, "2": ["truncate"]})
    task = read(client, pdf_of(3))
    cut, again, whole = task["result"]["pages"]
    assert "cut off" in " ".join([*cut["warnings"], cut["reason"]])
    assert "cut off" not in " ".join([*again["warnings"], again["reason"]])
    assert ocr.seen["pages"]["2"] == again["attempts"] == 2
    assert "the third one of page 2 ends." in again["markdown"]
    assert (whole["attempts"], whole["warnings"]) == (1, [])
    assert product(client, task, "raw.json").json()["pages"][0]["warnings"] == cut["warnings"]
    image = client.post("/api/ocr/image", files={"image": ("a.png", page_image(5, 400, 560))}).json()
    assert image["warnings"] == []
    ocr.behave(**BEHAVIOUR, pages={"5": ["truncate"] * 9})
    image = client.post("/api/ocr/image", files={"image": ("a.png", page_image(5, 400, 560))}).json()
    assert "cut off" in " ".join(image["warnings"])


def test_a_long_document(client: httpx.Client, served: Served, ocr: FakeOcr) -> None:
    """Read in the background while others are; 2,800 pages are measured in benchmarks/documents."""
    ocr.behave(**BEHAVIOUR, latency=0.005)
    sent = client.post("/api/ocr/pdf", files={"pdf": ("long.pdf", pdf_of(120))}).json()["task_id"]
    eventually(lambda: client.get(f"/api/tasks/{sent}").json()["progress"]["current"] > 4)
    with served.client("bob") as bob:
        assert read(bob, pdf_of(1, first=200))["status"] == "succeeded"
    progress = client.get(f"/api/tasks/{sent}").json()["progress"]
    assert 0 < progress["current"] < 120
    task = ended(client, sent, 120)
    assert (task["status"], task["progress"]["pages_completed"]) == ("succeeded", 120)
    assert ocr.seen["pages"] == {str(number): 1 for number in (*range(1, 121), 200)}


@pytest.fixture
def here(ocr: FakeOcr, project: Project) -> Iterator[str]:
    """The service within this process; its address."""
    port = free_port()
    entry = {"name": "reader", "type": "ocr", "endpoints": ["http://127.0.0.1:9"]}
    project.write({"ocr": entry}, router={"port": int(ocr.url.rpartition(":")[2])}, documents={"port": port})
    config = uvicorn.Config(create_app(Service(project.load({"VLLM_API_KEY": API_KEY}))), port=port, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_a_wait_ends_before_a_proxy_cuts_it(ocr: FakeOcr, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tasks.LONGEST_WAIT < 60
    monkeypatch.setattr(tasks, "LONGEST_WAIT", 0.5)
    ocr.behave(**BEHAVIOUR, cue="hang")
    headers = {"authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=here, headers=headers, timeout=20, trust_env=False) as client:
        sent = client.post("/api/ocr/pdf?wait=86400", files={"pdf": ("a.pdf", pdf_of(1))})
        assert (sent.status_code, sent.json().keys()) == (202, {"task_id"})
        task = client.get(f"/api/tasks/{sent.json()['task_id']}?wait=86400").json()
        assert task["status"] in ("pending", "running")
        client.delete(f"/api/tasks/{task['task_id']}").raise_for_status()


def test_events_are_never_silent_for_long(ocr: FakeOcr, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tasks.KEEP_ALIVE_SECONDS < 60
    monkeypatch.setattr(tasks, "KEEP_ALIVE_SECONDS", 0.1)
    ocr.behave(**BEHAVIOUR, cue="hang")
    headers = {"authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=here, headers=headers, timeout=20, trust_env=False) as client:
        task_id = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(1))}).json()["task_id"]
        with client.stream("GET", f"/api/tasks/{task_id}/events") as events:
            comments = (line for line in events.iter_lines() if line.startswith(":"))
            assert [next(comments), next(comments)] == [": still here"] * 2
        client.delete(f"/api/tasks/{task_id}").raise_for_status()


def test_the_engine_is_kept_busy(client: httpx.Client, ocr: FakeOcr) -> None:
    ocr.behave(**BEHAVIOUR, latency=0.2)
    assert read(client, pdf_of(16))["status"] == "succeeded"
    assert ocr.seen["most_running"] == BEHAVIOUR["concurrency"]


def test_no_page_is_lost_and_no_number_shifts(client: httpx.Client, ocr: FakeOcr) -> None:
    ocr.behave(**BEHAVIOUR, pages={"1": ["500"] * 9, "4": ["empty"] * 9, "7": ["cut"] * 9, "9": ["nonsense"] * 9})
    task = read(client, pdf_of(9), retries="1")
    assert task["status"] == "succeeded"
    assert [each["page"] for each in task["fallback_pages"]] == [1, 4, 7, 9]
    assert all(each["reason"] for each in task["fallback_pages"])
    assert [page["page_number"] for page in task["result"]["pages"]] == list(range(1, 10))
    text = product(client, task).text
    for number in (2, 3, 5, 6, 8):
        assert f"<!-- page {number} -->\n\n# Page {number}\n" in text
    raw = product(client, task, "raw.json").json()["pages"]
    assert [(page["page_number"], bool(page["reason"])) for page in raw] == [
        (number, number in (1, 4, 7, 9)) for number in range(1, 10)
    ]


def test_figures_stand_where_they_were(client: httpx.Client) -> None:
    """Between the text before and the caption after, as files of their own, which are what was on the page."""
    page = Image.open(io.BytesIO(page_image(1, 400, 560))).convert("RGB")
    page.paste((200, 30, 30), (40, 180, 360, 280))
    file = io.BytesIO()
    page.save(file, "PNG")
    task = read(client, file.getvalue(), "photo.png", formats="html,docx")
    text = product(client, task).text
    link = text.index("](images/page-1-img-1.jpg)")
    assert text.index("This is what page 1 says first.") < link < text.index("Figure 1: what page 1 shows.")
    with zipfile.ZipFile(io.BytesIO(product(client, task, "result.zip").content)) as archive:
        assert archive.read("result.md").decode() == text
        figure = Image.open(io.BytesIO(archive.read("images/page-1-img-1.jpg"))).convert("RGB")
    assert figure.size == pytest.approx((round(840 / 999 * 400), round(220 / 999 * 560)), abs=2)
    red = Image.new("RGB", (200, 60), (200, 30, 30))
    middle = figure.crop((60, 20, 260, 80))
    assert max(high for _, high in ImageChops.difference(middle, red).getextrema()) < 20  # type: ignore[misc]
    assert 'src="data:image/jpeg;base64,' in product(client, task, "result.html").text
    with zipfile.ZipFile(io.BytesIO(product(client, task, "result.docx").content)) as docx:
        assert [name for name in docx.namelist() if name.startswith("word/media/")]


def test_a_table_over_two_pages_is_one(client: httpx.Client, ocr: FakeOcr) -> None:
    head = "<tr><td>No.</td><td>Value</td></tr>"
    rows = ("".join(f"<tr><td>{page}.{row}</td><td>{row}</td></tr>" for row in (1, 2, 3)) for page in (1, 2))
    ocr.behave(**BEHAVIOUR, texts=dict(enumerate((f"<table>{head}{each}</table>" for each in rows), 1)))
    joined = product(client, read(client, pdf_of(2))).text
    assert joined.count("<table") == 1
    assert joined.count("No.") == 1
    assert re.findall(r"<td>(\d\.\d)</td>", joined) == ["1.1", "1.2", "1.3", "2.1", "2.2", "2.3"]
    apart = product(client, read(client, pdf_of(2), join_pages="false")).text
    assert apart.count("<table") == 2


def test_running_heads_are_kept_or_dropped(client: httpx.Client) -> None:
    def numbers(**fields: str) -> list[str]:
        text = product(client, read(client, pdf_of(4), **fields)).text
        assert all(f"# Page {number}" in text for number in range(1, 5))
        return re.findall(r"^\d$", text, re.MULTILINE)

    assert numbers() == numbers(running_heads="keep") == ["1", "2", "3", "4"]
    assert numbers(running_heads="drop") == []


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_boxes_are_on_the_page_as_it_is_seen(client: httpx.Client, orientation: int) -> None:
    """A photo that lies on its side in the file, and says so: they were scaled by its sides as they are stored."""
    seen = Image.open(io.BytesIO(page_image(2, 400, 560))).convert("RGB")
    stored = seen.rotate({1: 0, 3: 180, 6: 90, 8: -90}[orientation], expand=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "JPEG", quality=95, exif=exif)
    answer = client.post("/api/ocr/image", files={"image": ("a.jpg", file.getvalue())}).raise_for_status().json()
    assert answer["image_dims"] == {"w": 400, "h": 560}
    (title,) = [box["box"] for box in answer["boxes"] if box["label"] == "title"]
    assert title == pytest.approx([80 / 999 * 400, 60 / 999 * 560, 620 / 999 * 400, 100 / 999 * 560], abs=1)
    page = client.get(f"/api/tasks/{answer['task_id']}").json()["result"]["pages"][0]
    for block in page["blocks"]:
        for box, share in zip(block["boxes"], block["shares"], strict=True):
            sides = (400, 560, 400, 560)
            assert [part * side for part, side in zip(share, sides, strict=True)] == pytest.approx(box, abs=1)


WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        place = arguments[1] if event == "socket.connect" else arguments
        with open(os.environ["CONNECTIONS"], "a") as log:
            log.write(f"{place[0] if isinstance(place, tuple) else 'unix'}\\n")

sys.addaudithook(watch)
sys.modules["uvloop"] = None  # it connects in C, past the hook
"""


def test_nothing_is_asked_of_other_machines(ocr: FakeOcr, tmp_path: Path) -> None:
    """Every look-up and every connection of the service and its processes, from its start to its last product."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    connections = tmp_path / "connections"
    project = Project(tmp_path / "project")
    (project.home / "config").mkdir(parents=True)
    served = Served(project, ocr)
    served.start(PYTHONPATH=os.pathsep.join([str(tmp_path / "watch"), str(CHECKOUT)]), CONNECTIONS=str(connections))
    try:
        with served.client() as client:
            task = read(client, pdf_of(2), formats="html,docx,text")
            assert set(task["result"]["product_urls"]) >= {"result.md", "result.docx", "result.html", "layout.pdf"}
            time.sleep(1.2)  # it looks after itself each second
    finally:
        served.kill()
    assert set(connections.read_text().split()) == {"127.0.0.1"}
