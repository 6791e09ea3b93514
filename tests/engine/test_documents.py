"""Documents through the whole of it: the router, the document service, the OCR model on the real vLLM."""

import io
import time
import zipfile
from collections.abc import Iterator

import httpx
import pypdfium2
import pytest

from demo.training import ocr, pages
from tests.documents import own_pdf
from tests.engine.conftest import HEADERS, Demo

PAGES = (
    ocr.EXAMPLE,
    pages.written(
        [
            "Packing list, second page 2/2",
            "Box 1: pumps, 14.2 kg, A1-A6",
            "Box 2: hoses and clamps, 9 kg",
            "Box 3: spare seals, manuals",
            "",
            "# Insurance",
            "Value of goods: $1,204.50",
            "Carrier: Northern Star Freight",
            "Policy no. NSF/88-2041-C",
            "",
            "Checked by K. Boateng, bay 4",
        ]
    ),
)


def pdf_of(drawn: tuple[pages.Page, ...]) -> bytes:
    first, *others = (page.draw() for page in drawn)
    written = io.BytesIO()
    # As many points as pixels, so that 72 dpi draws them as they are.
    first.save(written, "PDF", save_all=True, append_images=others, resolution=72)
    return written.getvalue()


@pytest.fixture
def client(demo: Demo) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo.url("router").removesuffix("/v1"), headers=HEADERS, timeout=120) as client:
        yield client


def test_a_pdf_becomes_markdown(client: httpx.Client) -> None:
    sent = {"files": {"pdf": ("order.pdf", pdf_of(PAGES))}, "data": {"dpi": "72", "formats": "html,docx,text"}}
    task_id = client.post("/api/ocr/pdf", **sent).raise_for_status().json()["task_id"]  # type: ignore[arg-type]
    task = client.get(f"/api/tasks/{task_id}", params={"wait": 100}).json()
    assert task["status"] == "succeeded", task
    assert task["fallback_pages"] == []
    wrong = letters = 0
    for page, read in zip(PAGES, task["result"]["pages"], strict=True):
        wrong += ocr.edit_distance(page.markdown, read["markdown"])
        letters += len(page.markdown)
    # JPEG and the service's prompt are not what it was trained on alone.
    assert wrong <= 0.05 * letters, task["result"]["pages"]
    archive = zipfile.ZipFile(io.BytesIO(client.get(task["result"]["archive_url"]).content))
    markdown = archive.read("result.md").decode()
    assert markdown.startswith("<!-- page 1 -->")
    assert "<!-- page 2 -->" in markdown
    assert client.delete(f"/api/tasks/{task_id}").status_code == 204


def test_an_image_is_read_while_the_client_waits(client: httpx.Client) -> None:
    written = io.BytesIO()
    PAGES[0].draw().save(written, "PNG")
    began = time.monotonic()
    answer = client.post("/api/ocr/image", files={"image": ("order.png", written.getvalue())}).raise_for_status()
    assert ocr.edit_distance(PAGES[0].markdown, answer.json()["text"]) <= 0.05 * len(PAGES[0].markdown)
    print("seconds for a page:", time.monotonic() - began)


def test_status_shows_the_service(demo: Demo) -> None:
    documents = demo.status()["documents"]
    assert (documents["state"], documents["port"]) == ("running", demo.ports["documents"])


def test_a_report_that_the_model_was_not_made_for(client: httpx.Client) -> None:
    """Prose in other typefaces, a table over two pages, a chart, a scan on its side, Chinese: no page is lost."""
    sent = {"files": {"pdf": ("report.pdf", own_pdf.document())}, "data": {"formats": "html,docx,text", "retries": "0"}}
    task_id = client.post("/api/ocr/pdf", **sent).raise_for_status().json()["task_id"]  # type: ignore[arg-type]
    deadline = time.monotonic() + 240
    while (task := client.get(f"/api/tasks/{task_id}", params={"wait": 50}).json())["status"] in ("pending", "running"):
        assert time.monotonic() < deadline, task
    assert task["status"] == "succeeded", task
    read = task["result"]["pages"]
    assert [page["page_number"] for page in read] == list(range(1, len(own_pdf.PAGES) + 1))
    # What the model made nothing of has the words that stand in the PDF itself, or is listed.
    assert all(page["markdown"] or page["page_number"] in task["fallback_pages"] for page in read)
    names = set(zipfile.ZipFile(io.BytesIO(client.get(task["result"]["archive_url"]).content)).namelist())
    assert {"result.md", "raw.json", "report.html", "report.docx", "report.txt"} <= names
    layout = client.get(f"/api/tasks/{task_id}/download/layout.pdf").raise_for_status().content
    assert len(pypdfium2.PdfDocument(layout)) == len(own_pdf.PAGES)
