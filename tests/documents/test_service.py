"""The service as its clients meet it: every path, in a process of its own."""

import io
import json
import time
import zipfile
from typing import Any

import httpx
import pypdfium2
import pytest
from PIL import Image

from tests.conftest import API_KEY
from tests.documents.conftest import Served
from tests.documents.fake_ocr import FakeOcr, page_image


def pdf_of(count: int, first: int = 1) -> bytes:
    """A PDF of pages that say which one they are."""
    images = [Image.open(io.BytesIO(page_image(number, 400, 560))) for number in range(first, first + count)]
    written = io.BytesIO()
    images[0].save(written, "PDF", save_all=True, append_images=images[1:], resolution=72)
    return written.getvalue()


def ended(client: httpx.Client, task_id: str, seconds: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        document: dict[str, Any] = client.get(f"/api/tasks/{task_id}").raise_for_status().json()
        if document["status"] not in ("pending", "running"):
            return document
        time.sleep(0.1)
    raise AssertionError(document)


class TestTasks:
    def test_an_image(self, client: httpx.Client) -> None:
        answer = client.post("/api/ocr/image", files={"image": ("page.png", page_image(3, 400, 560))})
        document = answer.raise_for_status().json()
        assert document["success"] is True
        assert "3" in document["text"]
        assert document["image_dims"] == {"w": 400, "h": 560}
        assert document["boxes"]
        assert all(set(box) == {"label", "box"} for box in document["boxes"])
        assert set(document["timing"]) == {"queued_at", "started_at", "finished_at", "duration_ms"}
        assert document["duration_ms"] == document["timing"]["duration_ms"] >= 0

    def test_the_resolution_that_was_really_used(self, client: httpx.Client) -> None:
        tiny = {"base_size": "512", "image_size": "512", "crop_mode": "false"}
        words = (
            "Gundam, the only mode that vLLM serves, on the page at 512 pixels: one view of 1024 x 1024 and no tiles"
        )
        image = ("page.png", page_image(3, 400, 560))
        assert client.post("/api/ocr/image", files={"image": image}, data=tiny).json()["resolution_used"] == words
        older = client.post("/api/ocr", files={"image": image}, data=tiny).json()["metadata"]
        assert (older["base_size"], older["resolution_used"]) == (512, words)
        sent = {"files": {"pdf": ("a.pdf", pdf_of(2))}, "data": tiny, "params": {"wait": 60}}
        result = client.post("/api/ocr/pdf", **sent).json()["result"]  # type: ignore[arg-type]
        raw = client.get(result["raw_json_url"]).json()
        assert [result["resolution_used"], *(page["resolution_used"] for page in raw["pages"])] == [words] * 3
        unasked = client.post("/api/ocr/image", files={"image": image}).json()["resolution_used"]
        assert unasked == "Gundam: one view of 1024 x 1024 and up to 6 tiles of 640 x 640"

    def test_a_pdf_and_its_products(self, client: httpx.Client) -> None:
        accepted = client.post(
            "/api/ocr/pdf", files={"pdf": ("Report-7.pdf", pdf_of(3))}, data={"formats": "html,docx,text"}
        )
        assert accepted.status_code == 202
        task_id = accepted.json()["task_id"]
        document = ended(client, task_id)
        assert (document["status"], document["error_message"]) == ("succeeded", None), document
        assert document["progress"] | {"pages_per_minute": 0} == {
            "current": 3,
            "total": 3,
            "percent": 100,
            "message": "3 pages read",
            "pages_completed": 3,
            "pages_failed": 0,
            "pages_total": 3,
            "queue_position": None,
            "pages_per_minute": 0,
            "seconds_left": document["progress"]["seconds_left"],
        }
        result = document["result"]
        assert [page["index"] for page in result["pages"]] == [0, 1, 2]
        for name, url in result["product_urls"].items():
            got = client.get(url).raise_for_status()
            assert got.content, name
            assert "Report-7" in got.headers["content-disposition"]
        markdown = client.get(result["markdown_url"]).text
        assert "<!-- page 2 -->" in markdown
        raw = client.get(result["raw_json_url"]).json()
        assert [page["page_number"] for page in raw["pages"]] == [1, 2, 3]
        archive = zipfile.ZipFile(io.BytesIO(client.get(result["archive_url"]).content))
        assert {"result.md", "raw.json"} <= set(archive.namelist())
        for url in result["image_urls"]:
            with Image.open(io.BytesIO(client.get(url).raise_for_status().content)) as figure:
                assert figure.format == "JPEG"
        assert result["image_urls"]
        with pypdfium2.PdfDocument(client.get(result["product_urls"]["layout.pdf"]).content) as layout:
            assert len(layout) == 3

    def test_events_tell_each_change_and_the_end(self, client: httpx.Client) -> None:
        task_id = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(4))}).json()["task_id"]
        with client.stream("GET", f"/api/tasks/{task_id}/events") as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data:")]
        told = [json.loads(line.removeprefix("data:")) for line in lines]
        assert told[-1]["status"] == "succeeded"
        assert told[-1]["result"]["pages"]
        assert [each["progress"]["current"] for each in told] == sorted(each["progress"]["current"] for each in told)

    def test_whose_task_it_is(self, served: Served, client: httpx.Client) -> None:
        task_id = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(1))}).json()["task_id"]
        with served.client("bob") as bob, served.client("root", admin=True) as admin:
            for answer in (
                bob.get(f"/api/tasks/{task_id}"),
                bob.delete(f"/api/tasks/{task_id}"),
                bob.post(f"/api/tasks/{task_id}/cancel"),
                bob.get(f"/api/tasks/{task_id}/download/result.md"),
                bob.get(f"/api/tasks/{task_id}/events"),
            ):
                assert answer.status_code == 404, answer.url
            assert task_id not in bob.get("/api/tasks").text
            assert task_id in admin.get("/api/tasks").text
        ended(client, task_id)
        assert client.delete(f"/api/tasks/{task_id}").status_code == 204
        assert client.get(f"/api/tasks/{task_id}").status_code == 404
        assert not (served.project.home / "data" / "documents" / task_id).exists()

    def test_the_pages_are_asked_for_in_the_clients_name(self, client: httpx.Client, ocr: FakeOcr) -> None:
        ocr.behave(model="deepseek-ocr", concurrency=4)
        client.post("/api/ocr/image", files={"image": ("page.png", page_image(9))}).raise_for_status()
        assert {each["on_behalf_of"] for each in ocr.seen["requests"]} == {"alice"}

    def test_a_page_that_is_never_read_is_listed_and_can_be_retried(self, client: httpx.Client, ocr: FakeOcr) -> None:
        ocr.behave(model="deepseek-ocr", concurrency=4, pages={"2": ["500"] * 4})
        task_id = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(3))}).json()["task_id"]
        document = ended(client, task_id)
        assert document["status"] == "succeeded"
        assert [each["page"] for each in document["fallback_pages"]] == [2]
        assert [page["page_number"] for page in document["result"]["pages"]] == [1, 2, 3]
        ocr.behave(model="deepseek-ocr", concurrency=4)
        assert client.post(f"/api/tasks/{task_id}/retry").status_code == 202
        document = ended(client, task_id)
        assert document["fallback_pages"] == []
        assert ocr.seen["pages"] == {"2": 1}

    def test_the_same_twice_is_once(self, client: httpx.Client) -> None:
        sent = {"files": {"pdf": ("a.pdf", pdf_of(1))}, "headers": {"idempotency-key": "one"}}
        first, second = (client.post("/api/ocr/pdf", **sent).json()["task_id"] for _ in range(2))  # type: ignore[arg-type]
        assert first == second
        other = client.post("/api/ocr/pdf", files={"pdf": ("b.pdf", pdf_of(2))}, headers={"idempotency-key": "one"})
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")

    def test_a_zip_is_a_task_for_each_file(self, client: httpx.Client) -> None:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("one.png", page_image(1))
            archive.writestr("two.pdf", pdf_of(2))
            archive.writestr("notes.txt", "just text")
        answer = client.post("/api/ocr/pdf", files={"file": ("all.zip", packed.getvalue())})
        assert answer.status_code == 202
        assert len(answer.json()["task_ids"]) == 2
        assert len(answer.json()["skipped"]) == 1
        for task_id in answer.json()["task_ids"]:
            assert ended(client, task_id)["status"] == "succeeded"

    def test_of_several_files_all_are_taken_or_none(self, served: Served, client: httpx.Client) -> None:
        before = client.get("/api/tasks").json()["counts"]
        files = [("files", ("good.pdf", pdf_of(1))), ("files", ("bad.pdf", b"%PDF-1.7\nnothing"))]
        assert client.post("/api/ocr/pdf", files=files).status_code == 422
        assert client.get("/api/tasks").json()["counts"] == before
        assert list((served.project.home / "data" / "documents" / "incoming").iterdir()) == []

    def test_waiting(self, client: httpx.Client) -> None:
        answer = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(1))}, params={"wait": 60})
        assert answer.status_code == 200
        assert answer.json()["status"] == "succeeded"

    def test_a_range_of_pages(self, client: httpx.Client) -> None:
        sent = {"files": {"pdf": ("a.pdf", pdf_of(4))}, "data": {"pages": "2,4-"}, "params": {"wait": 60}}
        pages = client.post("/api/ocr/pdf", **sent).json()["result"]["pages"]  # type: ignore[arg-type]
        assert [page["page_number"] for page in pages] == [2, 4]


class TestOlder:
    def test_an_image(self, client: httpx.Client) -> None:
        answer = client.post(
            "/api/ocr", files={"image": ("a.png", page_image(5))}, data={"mode": "markdown", "grounding": "True"}
        )
        document = answer.raise_for_status().json()
        assert set(document) == {"success", "text", "raw_text", "boxes", "image_dims", "metadata"}
        assert document["metadata"]["mode"] == "markdown"

    @pytest.mark.parametrize(
        ("wanted", "begins"), [("json", b"{"), ("markdown", b"<!-- page 1"), ("html", b"<!"), ("docx", b"PK")]
    )
    def test_a_pdf(self, client: httpx.Client, wanted: str, begins: bytes) -> None:
        sent = {"files": {"pdf_file": ("a.pdf", pdf_of(2))}, "data": {"output_format": wanted, "dpi": "100"}}
        answer = client.post("/api/process-pdf", **sent).raise_for_status()  # type: ignore[arg-type]
        assert answer.content.startswith(begins)
        if wanted == "json":
            document = answer.json()
            assert document["total_pages"] == len(document["pages"]) == 2
            assert set(document["pages"][0]) >= {"page_number", "text", "raw_text", "boxes", "images", "image_dims"}

    def test_infer_is_closed_without_a_token(self, client: httpx.Client) -> None:
        assert client.post("/internal/infer", json={"prompt": "x"}).status_code == 403


class TestOcrflux:
    @pytest.mark.parametrize("wanted", ["markdown", "text"])
    def test_a_file(self, client: httpx.Client, wanted: str) -> None:
        sent = {"files": {"file": ("a.pdf", pdf_of(2))}, "data": {"output_format": wanted, "max_page_retries": "0"}}
        document = client.post("/convert/file", **sent).raise_for_status().json()  # type: ignore[arg-type]
        assert (document["status"], document["format"], document["error"]) == ("success", wanted, None)
        assert document["content"]
        metadata = document["metadata"]
        assert (metadata["filename"], metadata["pages_processed"], metadata["fallback_pages"]) == ("a.pdf", 2, [])

    @pytest.mark.parametrize(
        ("url", "status"),
        [("http://127.0.0.1:1/x", 403), ("file:///etc/passwd", 400), ("", 400), ("http://[::1]:8000/", 403)],
    )
    def test_an_address_that_is_not_asked(self, client: httpx.Client, url: str, status: int) -> None:
        answer = client.post("/convert/url", json={"url": url, "output_format": "markdown"})
        assert answer.status_code == status
        assert answer.json()["status"] == "error"


class TestMistral:
    def test_a_data_url(self, client: httpx.Client) -> None:
        import base64

        url = "data:application/pdf;base64," + base64.b64encode(pdf_of(2)).decode()
        body = {
            "model": "mistral-ocr-latest",
            "document": {"type": "document_url", "document_url": url},
            "pages": [1],
            "include_image_base64": True,
        }
        document = client.post("/v1/ocr", json=body).raise_for_status().json()
        (page,) = document["pages"]
        assert page["index"] == 1
        assert set(page["dimensions"]) == {"dpi", "height", "width"}
        assert page["images"][0]["id"] in page["markdown"]
        assert page["images"][0]["image_base64"].startswith("data:image/jpeg;base64,")
        assert document["usage_info"]["pages_processed"] == 1


@pytest.mark.parametrize(
    ("path", "sent", "status", "code"),
    [
        ("/api/ocr/image", {"files": {"image": ("a.pdf", b"just text")}}, 415, "unsupported_file"),
        ("/api/ocr/image", {"files": {"image": ("a.png", b"")}}, 400, "empty_file"),
        ("/api/ocr/image", {"data": {"mode": "markdown"}}, None, None),
        (
            "/api/ocr/image",
            {"files": {"image": ("a.png", page_image(1))}, "data": {"mode": "poem"}},
            400,
            "invalid_value",
        ),
        (
            "/api/ocr/image",
            {"files": {"image": ("a.png", page_image(1))}, "data": {"colour": "x"}},
            400,
            "invalid_value",
        ),
        ("/api/ocr/pdf", {"files": {"pdf": ("a.pdf", b"%PDF-1.7\nnothing")}}, 422, "damaged_file"),
        ("/api/ocr/pdf", {"files": {"pdf": ("a.pdf", pdf_of(1))}, "data": {"pages": "7"}}, 400, "invalid_value"),
        ("/api/tasks/unknown/cancel", {}, 404, "document_not_found"),
        ("/v1/ocr", {"content": b"{"}, 400, "invalid_json"),
        ("/api/nothing", {}, 404, "not_found"),
    ],
)
def test_what_is_refused(client: httpx.Client, path: str, sent: Any, status: int | None, code: str | None) -> None:
    answer = client.post(path, **sent)
    assert 400 <= answer.status_code < 500
    assert answer.headers["x-error-source"] == "documents"
    if status is not None:
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_nothing_of_a_refused_upload_is_left(served: Served, client: httpx.Client) -> None:
    client.post("/api/ocr/image", files={"image": ("a.png", b"just text")})
    assert list((served.project.home / "data" / "documents" / "incoming").iterdir()) == []


def test_only_the_router_is_let_in(served: Served) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": API_KEY}):
        assert httpx.get(f"{served.url}/api/tasks", headers=headers).status_code == 401


def test_a_job_that_finds_the_disk_full_keeps_its_pages(served: Served, ocr: FakeOcr) -> None:
    ocr.behave(model="deepseek-ocr", concurrency=1, latency=0.3)
    with served.client() as client:
        task_id = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(3))}).json()["task_id"]
        # What is written there meets a full disk.
        (served.project.home / "data" / "documents" / task_id / "raw.json.part").symlink_to("/dev/full")
        document = ended(client, task_id)
        assert document["status"] == "failed"
        assert (
            f"free some space in data/documents, or lower documents.keep_gib, and then POST /api/tasks/{task_id}"
            in (document["error_message"])
        )
        assert (document["progress"]["pages_completed"], document["progress"]["pages_failed"]) == (3, 0)
        assert client.post(f"/api/tasks/{task_id}/retry").status_code == 202
        assert ended(client, task_id)["status"] == "succeeded"
        assert client.get(f"/api/tasks/{task_id}/download/raw.json").status_code == 200
    assert ocr.seen["pages"] == {"1": 1, "2": 1, "3": 1}


def test_a_page_whose_figures_find_the_disk_full_keeps_its_text(served: Served, ocr: FakeOcr) -> None:
    ocr.behave(model="deepseek-ocr", concurrency=1, latency=0.3)
    with served.client() as client:
        task_id = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(2))}).json()["task_id"]
        figure = served.folder / task_id / "images" / "page-2-img-1.jpg.new"
        figure.parent.mkdir(exist_ok=True)
        figure.symlink_to("/dev/full")
        document = ended(client, task_id)
        (failed,) = document["fallback_pages"]
        assert (document["status"], failed["page"]) == ("succeeded", 2)
        assert "the disk is full" in failed["reason"]
        assert "page 2 says" in client.get(document["result"]["markdown_url"]).text
        figure.unlink()
        assert client.post(f"/api/tasks/{task_id}/retry").status_code == 202
        document = ended(client, task_id)
        assert document["fallback_pages"] == []
        for url in document["result"]["image_urls"]:
            client.get(url).raise_for_status()
    assert ocr.seen["pages"] == {"1": 1, "2": 2}


def test_a_loop_of_a_model_without_a_guard_is_cut(fresh: Served, ocr: FakeOcr) -> None:
    ocr.behave(model="any-vlm", form="markdown", cue="loop")
    fresh.start()
    with fresh.client() as client:
        document = client.post("/api/ocr/image", files={"image": ("a.png", page_image(3, 400, 560))}).json()
    assert "page 3 says" in document["text"]
    assert document["raw_text"].count("again and again") == 200
    assert document["text"].count("again and again") == 1
    assert any("repeats itself" in warning for warning in document["warnings"])


def test_after_a_kill_it_goes_on_and_reads_no_page_twice(served: Served, ocr: FakeOcr) -> None:
    ocr.behave(model="deepseek-ocr", concurrency=2, latency=0.1)
    with served.client() as client:
        task_id = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(12))}).json()["task_id"]
        while client.get(f"/api/tasks/{task_id}").json()["progress"]["current"] < 4:
            time.sleep(0.02)
        served.kill()
        before = ocr.seen["pages"]
        served.start()
        document = ended(client, task_id)
    assert document["status"] == "succeeded"
    assert document["progress"]["pages_completed"] == 12
    again = {page: count for page, count in ocr.seen["pages"].items() if count > 1}
    # Those that were in flight when it was killed, and no others.
    assert len(again) <= 8, (before, again)
