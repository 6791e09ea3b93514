"""What nobody should send, at every door of the service: a clear refusal, or a page that is listed with its reason.

The cases themselves are tried one by one where they are dealt with: files in test_rendering.py and test_uploads.py,
addresses (look-ups that change their answer, slow and endless answers) in test_fetching.py, models' answers in
test_answers.py, test_grounding.py and test_markdown.py. Here they come over the wire, and others do at the same time.
"""

import base64
import contextlib
import io
import json
import re
import signal
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import lxml.html  # type: ignore[import-untyped]
import pytest
from PIL import Image

from tests.conftest import API_KEY, Project, eventually
from tests.documents import bad_files
from tests.documents.conftest import Served
from tests.documents.fake_ocr import FakeOcr, page_image
from tests.documents.test_service import ended, pdf_of
from tests.documents.web import OPEN

MIB = 1 << 20
LARGEST_MIB = 8
MEMORY_MIB = 400  # that the service may ever have
BEHAVIOUR: dict[str, Any] = {"model": "deepseek-ocr", "concurrency": 4}


@pytest.fixture(scope="module")
def served(ocr: FakeOcr, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With one address that files may be fetched from."""
    project = Project(tmp_path_factory.mktemp("documents") / "project")
    (project.home / "config").mkdir(parents=True)
    served = Served(project, ocr, max_upload_mib=LARGEST_MIB, allowed_networks=[f"{OPEN}/32"])
    served.start()
    yield served
    served.kill(signal.SIGTERM)


@pytest.fixture(autouse=True)
def nothing_is_left(served: Served, ocr: FakeOcr) -> Iterator[None]:
    """Of what was refused, and no error of the service's own."""
    ocr.behave(**BEHAVIOUR)
    before = served.log.read_text()
    yield
    eventually(lambda: not list((folder_of(served) / "incoming").iterdir()))
    assert "Traceback" not in served.log.read_text().removeprefix(before)


def folder_of(served: Served) -> Path:
    return served.project.home / "data" / "documents"


def memory_of(served: Served) -> int:
    """The most that the service ever had, in MiB."""
    assert served.process is not None
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) // 1024


# --- files ---


def as_data(name: str, content: bytes) -> dict[str, Any]:
    url = "data:application/octet-stream;base64," + base64.b64encode(content).decode()
    return {"json": {"document": {"type": "document_url", "document_url": url, "document_name": name}}}


DOORS: dict[str, Callable[[str, bytes], dict[str, Any]]] = {
    "/api/ocr/pdf": lambda name, content: {"files": {"pdf": (name, content)}},
    "/api/ocr/image": lambda name, content: {"files": {"image": (name, content)}},
    "/api/ocr": lambda name, content: {"files": {"image": (name, content)}},
    "/api/process-pdf": lambda name, content: {"files": {"pdf_file": (name, content)}},
    "/convert/file": lambda name, content: {"files": {"file": (name, content)}},
    "/v1/ocr": as_data,
}
NESTED = bad_files.zip_of({"inner.zip": bad_files.zip_of({"a.pdf": bad_files.written(bad_files.pdf())})})
FILES: dict[str, tuple[str, bytes, set[int]]] = {
    "an encrypted PDF": ("a.pdf", bad_files.written(bad_files.pdf(2), "secret"), {400}),
    "a truncated PDF": ("a.pdf", bad_files.written(bad_files.pdf(50))[:3000], {422}),
    "a PDF of no pages": ("a.pdf", bad_files.written(bad_files.pdf(0)), {422}),
    "a PDF of 10,000 pages": ("a.pdf", bad_files.pdf_of_many_pages(10_000), {413}),
    "a PNG of 30,000 x 30,000": ("a.png", bad_files.png_that_says(30_000, 30_000), {413}),
    "an image that is cut off": ("a.png", bad_files.image("PNG")[:20], {422}),
    "a text called .pdf": ("a.pdf", b"Dear Sir, this is a letter.", {415}),
    "an empty file": ("a.pdf", b"", {400}),
    "a ZIP in a ZIP": ("a.zip", NESTED, {415}),
    "a decompression bomb": ("a.zip", bad_files.zip_bomb(30), {413, 415}),
    "an encrypted ZIP": ("a.zip", bad_files.encrypted_zip(), {400, 415}),
    "a ZIP of 60,000 files": ("a.zip", bad_files.zip_with_many_entries(60_000), {413, 415}),
    "a file above the limit": ("a.png", bad_files.image("PNG") + bytes(LARGEST_MIB * MIB), {413}),
}


@pytest.mark.parametrize("path", DOORS)
@pytest.mark.parametrize("case", FILES)
def test_a_file_is_refused(client: httpx.Client, case: str, path: str) -> None:
    name, content, statuses = FILES[case]
    before = client.get("/api/tasks").json()["counts"]
    answer = client.post(path, **DOORS[path](name, content))
    assert answer.status_code in statuses, answer.text
    document = answer.json()
    message = document["error"] if path.startswith("/convert") else document["error"]["message"]
    assert len(message) > 10
    assert not {"Traceback", "/data/documents", "input"} & set(message.split())
    assert client.get("/api/tasks").json()["counts"] == before


@pytest.mark.parametrize(
    ("content", "failed"),
    [
        pytest.param(bad_files.written(bad_files.pdf(1, (14_400, 14_400))), [], id="a page of 200 inches"),
        pytest.param(bad_files.pdf_with_javascript_and_a_file(), [], id="JavaScript and an embedded file"),
        pytest.param(bad_files.pdf_with_a_lost_page(), [2], id="a page that leads nowhere"),
        pytest.param(bad_files.written(bad_files.pdf(1, (3, 14_400))), [], id="a page like a thread"),
    ],
)
def test_an_odd_file_is_read(served: Served, client: httpx.Client, content: bytes, failed: list[int]) -> None:
    task = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", content)}, params={"wait": 60}).json()
    assert (task["status"], [each["page"] for each in task["fallback_pages"]]) == ("succeeded", failed), task
    assert all(each["reason"] for each in task["fallback_pages"])
    assert task["progress"]["current"] == task["progress"]["total"]


def test_a_password_opens_a_file(client: httpx.Client) -> None:
    content = bad_files.written(bad_files.pdf(2), "秘密")
    sent = {"files": {"pdf": ("a.pdf", content)}, "params": {"wait": 60}}
    wrong = client.post("/api/ocr/pdf", **sent, data={"password": "wrong"})  # type: ignore[arg-type]
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "password_wrong")
    right = client.post("/api/ocr/pdf", **sent, data={"password": "秘密"})  # type: ignore[arg-type]
    assert right.json()["status"] == "succeeded"
    assert "秘密" not in right.text


# --- uploads ---


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_that_stops_half_way(served: Served, client: httpx.Client, chunked: bool) -> None:
    body = upload(b"report.pdf", pdf_of(3))
    length = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
    half = body[: len(body) // 2]
    sent = b"%x\r\n%b\r\n" % (len(half), half) if chunked else half
    with socket.create_connection(("127.0.0.1", served.port), 20) as connection:
        connection.sendall(request_head("/api/ocr/pdf", length, MULTIPART) + sent)
        eventually(lambda: list((folder_of(served) / "incoming").iterdir()))
    eventually(lambda: not list((folder_of(served) / "incoming").iterdir()))
    assert client.get("/api/tasks").status_code == 200


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("multipart/form-data; boundary=x", b"--x\r\ncontent-disposition: form-data; na", 400, "incomplete_upload"),
        ("multipart/form-data; boundary=x", b"no boundary anywhere", 400, "invalid_form"),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 400, "invalid_form"),
        ("multipart/form-data; boundary=x", b"", 400, "incomplete_upload"),
        ("multipart/form-data; boundary=" + "x" * 4000, b"--x--\r\n", 400, "invalid_form"),
        ("multipart/form-data", b"--x--\r\n", 415, "not_a_form"),
        ("multipart/mixed; boundary=x", b"--x--\r\n", 415, "not_a_form"),
        ("application/json", b"{}", 415, "not_a_form"),
        ("application/x-www-form-urlencoded", b"pdf=a", 415, "not_a_form"),
        ("application/pdf", b"%PDF-1.7", 415, "not_a_form"),
        ("\xff\xfe", b"x", 415, "not_a_form"),
        ("", b"x", 415, "not_a_form"),
    ],
)
def test_a_body_that_is_no_form(client: httpx.Client, content_type: str, body: bytes, status: int, code: str) -> None:
    headers = {b"content-type": content_type.encode("latin-1")}
    answer = client.post("/api/ocr/pdf", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


NAMES: dict[str, bytes] = {
    "up and away": b"../../../../tmp/escaped.pdf",
    "of Windows": rb"..\\..\\escaped.pdf",
    "absolute": b"/etc/cron.d/escaped.pdf",
    "a NUL in it": b"a\0b.pdf",
    "4,096 characters": b"x" * 4096 + b".pdf",
    "4,096 of four bytes": "😀".encode() * 4096,
    "emoji": "👩‍👩‍👧 ❤️ 报告.pdf".encode(),
    "turned round": "report\u202efdp.exe".encode(),
    "no UTF-8": b"\xff\xfe\xfa.pdf",
    "dots": b"..",
    "a device": b"CON.pdf",
    "lines and quotes": b'a%0d%0aset-cookie: x=1; \\"b\\".pdf',
    "HTML": b"<img src=x onerror=alert(1)>.pdf",
}


@pytest.mark.parametrize("case", NAMES)
def test_a_name_is_only_shown(served: Served, client: httpx.Client, case: str) -> None:
    tree = {path.name for path in folder_of(served).iterdir()}
    answer = client.post(
        "/api/ocr/pdf?wait=60", content=upload(NAMES[case], pdf_of(1)), headers={"content-type": MULTIPART}
    )
    task = answer.raise_for_status().json()
    assert task["status"] == "succeeded"
    assert re.fullmatch(r'[^/\\\0\r\n<>:"|?*\u202e]{1,120}', task["filename"]), task["filename"]
    assert {path.name for path in folder_of(served).iterdir()} - tree == {task["task_id"]}
    for name in task["result"]["product_urls"].values():
        product = client.get(name).raise_for_status()
        assert "set-cookie" not in product.headers
        assert not re.search(r"[/\\\0]", product.headers["content-disposition"].partition("''")[0])


MULTIPART = "multipart/form-data; boundary=frontier"


def upload(name: bytes, content: bytes) -> bytes:
    """A form with one file, whose name stands in it as it is."""
    head = b'--frontier\r\ncontent-disposition: form-data; name="pdf"; filename="%b"\r\n\r\n' % name
    return head + content + b"\r\n--frontier--\r\n"


def request_head(path: str, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"authorization: Bearer {API_KEY}", "x-api-key-name: alice"]
    kinds = [f"content-type: {each}" if each.startswith("multipart") else each for each in headers]
    return "\r\n".join([*lines, *kinds, "", ""]).encode()


# --- addresses ---

CLOSED = [
    "http://127.0.0.1:{port}/health",
    "http://localhost:{port}/health",
    "http://0.0.0.0:{port}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[64:ff9b::7f00:1]/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://10.0.0.1/a.pdf",
    "http://172.16.0.1/a.pdf",
    "http://192.168.1.1/a.pdf",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fe80::1]/",
    "http://[fd00::1]/",
    "http://user:password@127.0.0.2/a.pdf",
    "file:///etc/passwd",
    "ftp://127.0.0.2/a.pdf",
    "//127.0.0.2/a.pdf",
    "javascript:alert(1)",
    "http://" + "a" * 9000,
    "http://\0/",
]
ADDRESS_DOORS: dict[str, Callable[[str], dict[str, Any]]] = {
    "/convert/url": lambda url: {"json": {"url": url}},
    "/v1/ocr": lambda url: {"json": {"document": {"type": "document_url", "document_url": url}}},
    "/api/ocr/pdf": lambda url: {"files": {"pdf": ("a.pdf", pdf_of(1))}, "data": {"webhook_url": url}},
}


@pytest.mark.parametrize("path", ADDRESS_DOORS)
@pytest.mark.parametrize("url", CLOSED)
def test_an_address_is_refused(served: Served, client: httpx.Client, url: str, path: str) -> None:
    answer = client.post(path, **ADDRESS_DOORS[path](url.format(port=served.port)))
    assert answer.status_code in (400, 403), answer.text
    assert "healthy" not in answer.text


class Web(ThreadingHTTPServer):
    """Where files may be fetched from; what it says to a path is told to it."""

    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]]


class WebHandler(BaseHTTPRequestHandler):
    server: Web

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):
            self.server.answers[self.path](self)


@pytest.fixture
def web() -> Iterator[Web]:
    with Web((OPEN, 0), WebHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def redirects_to(location: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("location", location)
        handler.end_headers()

    return answer


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"%PDF-1.7 " * 10_000)


def half(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b"%PDF-1.7")


@pytest.mark.parametrize("path", ["/convert/url", "/v1/ocr"])
@pytest.mark.parametrize(
    ("answer", "status"),
    [
        pytest.param(redirects_to("http://127.0.0.1:1/"), 403, id="redirect to loopback"),
        pytest.param(redirects_to("http://169.254.169.254/"), 403, id="redirect to metadata"),
        pytest.param(redirects_to("http://[::1]/"), 403, id="redirect to IPv6 loopback"),
        pytest.param(redirects_to("file:///etc/passwd"), 400, id="redirect to a file"),
        pytest.param(redirects_to("/a"), 502, id="redirect in a circle"),
        pytest.param(endless, 413, id="endless"),
        pytest.param(half, 502, id="half a body"),
    ],
)
def test_an_address_that_turns_out_bad(
    client: httpx.Client, web: Web, answer: Callable[[BaseHTTPRequestHandler], None], status: int, path: str
) -> None:
    web.answers = {"/a": answer}
    refused = client.post(path, **ADDRESS_DOORS[path](f"http://{OPEN}:{web.server_port}/a"))
    assert refused.status_code == status, refused.text
    assert "root:" not in refused.text


# --- models' answers ---


@pytest.mark.parametrize(
    ("cue", "profile"),
    [
        ("html", ""),
        ("million_boxes", ""),
        ("malformed", ""),
        ("half_json", "OCRFlux-3B"),
        ("half_json", ""),
        ("noise", ""),
        ("empty", ""),
        ("nonsense", ""),
        ("cut", ""),
        ("loop", ""),
    ],
)
def test_an_answer_of_any_kind_is_a_page(client: httpx.Client, ocr: FakeOcr, cue: str, profile: str) -> None:
    """Beside two others, which are read as if nothing were."""
    form = {"form": "ocrflux-json"} if profile else {}
    ocr.behave(**BEHAVIOUR, **form, pages={"2": [cue] * 9})
    fields = {"formats": "html,docx,text", "retries": "1", "profile": profile}
    task = client.post("/api/ocr/pdf?wait=60", files={"pdf": ("a.pdf", pdf_of(3))}, data=fields).json()
    assert task["status"] == "succeeded", task
    pages = task["result"]["pages"]
    assert [page["page_number"] for page in pages] == [1, 2, 3]
    assert all(f"Page {page['page_number']}" in page["markdown"] for page in (pages[0], pages[2]))
    listed = [each["page"] for each in task["fallback_pages"]]
    assert listed in ([], [2])
    if cue != "html":  # which is an answer like others, of HTML
        assert listed or pages[1]["warnings"]
    page = lxml.html.document_fromstring(client.get(task["result"]["product_urls"]["result.html"]).content)
    assert page.xpath("//script | //iframe | //@onclick | //@onerror | //@href[contains(., 'script')]") == []
    for url in task["result"]["product_urls"].values():
        answer = client.get(url).raise_for_status()
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert len(answer.content) < 4 * MIB


# --- requests ---


@pytest.fixture(scope="module")
def task_id(served: Served) -> str:
    with served.client() as client:
        task = client.post("/api/ocr/pdf?wait=60", files={"pdf": ("a.pdf", pdf_of(2))}).json()
    assert task["status"] == "succeeded"
    return str(task["task_id"])


@pytest.mark.parametrize("pages", ["0", "5-2", "-", "1-2-3", "a", "1..2", "1,,x", "9", "9" * 5000, "1" * 7, "²"])
def test_pages_that_are_no_range(client: httpx.Client, pages: str) -> None:
    answer = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(2))}, data={"pages": pages})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert "pages" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("pages", "read"), [("1-", [1, 2, 3]), ("-2", [1, 2]), ("3,1-2,2", [1, 2, 3]), (" 2 - 9 ", [2, 3]), (",3,", [3])]
)
def test_pages_that_are(client: httpx.Client, pages: str, read: list[int]) -> None:
    sent = {"files": {"pdf": ("a.pdf", pdf_of(3))}, "data": {"pages": pages}, "params": {"wait": 60}}
    task = client.post("/api/ocr/pdf", **sent).json()  # type: ignore[arg-type]
    assert [page["page_number"] for page in task["result"]["pages"]] == read


@pytest.mark.parametrize("name", ["dpi", "retries", "base_size", "image_size", "ngram_size", "window_size"])
@pytest.mark.parametrize("value", ["-1", "9" * 5000, "1e9", "x", "nan", "1" + "0" * 18])
def test_a_number_out_of_bounds(client: httpx.Client, name: str, value: str) -> None:
    answer = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(1))}, data={name: value})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert name in answer.json()["error"]["message"]


@pytest.mark.parametrize("tokens", ["1,x", "-1", "9" * 50, ",".join("1" * 1001)])
def test_tokens_that_are_none(client: httpx.Client, tokens: str) -> None:
    answer = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(1))}, data={"whitelist_token_ids": tokens})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert "whitelist_token_ids" in answer.json()["error"]["message"]


@pytest.mark.parametrize("retries", ["-1", "11", "x", "9" * 5000, "²"])
def test_retries_of_ocrflux(client: httpx.Client, retries: str) -> None:
    sent = {"files": {"file": ("a.pdf", pdf_of(1))}, "data": {"max_page_retries": retries}}
    answer = client.post("/convert/file", **sent)  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert "max_page_retries" in answer.json()["error"]


@pytest.mark.parametrize("wait", ["-1", "x", "nan"])
def test_a_wait_that_is_none(client: httpx.Client, task_id: str, wait: str) -> None:
    assert client.get(f"/api/tasks/{task_id}", params={"wait": wait}).status_code == 400


@pytest.mark.parametrize("wait", ["inf", "1e300", "0", "0.01"])
def test_a_wait_of_any_length(client: httpx.Client, task_id: str, wait: str) -> None:
    assert client.get(f"/api/tasks/{task_id}", params={"wait": wait}).status_code == 200


@pytest.mark.parametrize(
    "unknown",
    ["x" * 4000, "%00", "..%2f..%2fdocuments.db", "%2e%2e", "incoming", "%ff%fe", "😀", "' or 1=1 --", "-1", "*"],
)
@pytest.mark.parametrize(
    ("method", "further"),
    [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/retry"), ("GET", "/events"), ("GET", "/download/x")],
)
def test_an_id_that_nobody_has(client: httpx.Client, unknown: str, method: str, further: str) -> None:
    answer = client.request(method, f"/api/tasks/{unknown}{further}")
    assert answer.status_code in (404, 405), answer.text
    assert answer.json()["error"]["code"] in ("document_not_found", "not_found", "bad_request")


@pytest.mark.parametrize(
    "path",
    [
        "input",
        "../documents.db",
        "..%2fdocuments.db",
        "%2fetc%2fpasswd",
        "images/../input",
        "images/page-1-img-1.jpg%00",
        "images/page-9-img-9.jpg",
        "result.md.part",
        "result.MD",
        "x" * 4000,
        "",
    ],
)
def test_a_product_that_is_none(client: httpx.Client, task_id: str, path: str) -> None:
    answer = client.get(f"/api/tasks/{task_id}/download/{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("bytes=0-3", 206),
        ("bytes=-4", 206),
        ("bytes=0-0,2-2", 206),
        ("bytes=999999999-", 416),
        ("bytes=5-2", 400),
        ("bytes=x", 400),
        ("bytes=" + ",".join(f"{n}-{n}" for n in range(0, 4000, 2)), 200),
    ],
)
def test_a_part_of_a_product(client: httpx.Client, task_id: str, given: str, status: int) -> None:
    begun = time.monotonic()
    answer = client.get(f"/api/tasks/{task_id}/download/result.md", headers={"range": given})
    assert answer.status_code == status
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/api/ocr/pdf"),
        ("GET", "/api/ocr/image"),
        ("DELETE", "/api/tasks"),
        ("PATCH", "/api/tasks/x"),
        ("POST", "/api/tasks/x/download/result.md"),
        ("TRACE", "/api/tasks"),
        ("OPTIONS", "/v1/ocr"),
    ],
)
def test_a_method_that_a_path_has_not(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"]
    assert answer.json()["error"]["code"] == "bad_request"


DEEP = b"[" * 100_000


@pytest.mark.parametrize("path", ["/v1/ocr", "/convert/url"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"url": 1.5}',
        b'{"url": "\xff"}',
        b'{"url": "\\ud800", "document": {"type": "document_url", "document_url": "\\ud800"}}',
        b'{"url": ' + DEEP,
        b'{"document": ' + DEEP,
        b'{"max_page_retries": ' + b"9" * 5000 + b', "url": "http://127.0.0.2/"}',
        b'{"document": {"type": "document_url", "document_url": "\xff"}}',
        b'{"document": {"type": "file", "file_id": "x"}}',
        b'{"document": {"type": "document_url"}}',
        b'{"document": {"type": "image_url", "image_url": {}}}',
    ],
)
def test_json_that_is_none(client: httpx.Client, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]


@pytest.mark.parametrize("path", ["/v1/ocr", "/convert/url", "/api/tasks/{task_id}/retry"])
def test_a_small_body_that_stops_half_way(served: Served, client: httpx.Client, task_id: str, path: str) -> None:
    head = request_head(path.format(task_id=task_id), "content-type: application/json", "content-length: 1000")
    with socket.create_connection(("127.0.0.1", served.port), 20) as connection:
        connection.sendall(head + b'{"url": ')
        time.sleep(0.1)  # so that it is waited for
    time.sleep(0.2)
    assert client.get("/api/tasks").status_code == 200


@pytest.mark.parametrize("pages", [[-1], "x", "1-0-2", [], [7], list(range(20_000)), "0," * 20_000, [10**40]])
def test_pages_of_mistral(client: httpx.Client, pages: Any) -> None:
    sent = as_data("a.pdf", pdf_of(2))
    sent["json"]["pages"] = pages
    answer = client.post("/v1/ocr", **sent)
    assert answer.status_code in ({400, 422} if pages else {200}), answer.text


def test_a_body_that_goes_on_for_ever(served: Served, client: httpx.Client, task_id: str) -> None:
    """Where a path takes a few words, as a password."""

    def pieces() -> Iterator[bytes]:
        yield b"password="
        for _ in range(64):
            yield b"x" * MIB

    kinds = {"content-type": "application/x-www-form-urlencoded"}
    answers = []
    with contextlib.suppress(httpx.WriteError):
        answers.append(client.post(f"/api/tasks/{task_id}/retry", content=pieces(), headers=kinds))
    assert [answer.status_code for answer in answers] in ([], [413])
    assert memory_of(served) < MEMORY_MIB


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/json", "text/plain", "\xff"])
def test_a_retry_with_a_body_that_is_no_form(client: httpx.Client, task_id: str, kind: str) -> None:
    headers = {b"content-type": kind.encode("latin-1")}
    answer = client.post(f"/api/tasks/{task_id}/retry", content=b"--y", headers=headers)
    assert answer.status_code in (400, 409), answer.text


# --- several at once ---


def at_once(*asked: Callable[[], httpx.Response]) -> list[httpx.Response]:
    gate = threading.Barrier(len(asked))

    def go(ask: Callable[[], httpx.Response]) -> httpx.Response:
        gate.wait()
        return ask()

    with ThreadPoolExecutor(len(asked)) as threads:
        return list(threads.map(go, asked))


def test_one_idempotency_key_at_once(client: httpx.Client) -> None:
    content = pdf_of(1)

    def send() -> httpx.Response:
        return client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", content)}, headers={"idempotency-key": "at once"})

    before = sum(client.get("/api/tasks").json()["counts"].values())
    assert len({answer.raise_for_status().json()["task_id"] for answer in at_once(*[send] * 8)}) == 1
    assert sum(client.get("/api/tasks").json()["counts"].values()) == before + 1


def test_an_idempotency_key_without_end(client: httpx.Client) -> None:
    """Of which a part would be another's."""
    sent = {"files": {"pdf": ("a.pdf", pdf_of(1))}, "headers": {"idempotency-key": "x" * 300}}
    assert client.post("/api/ocr/pdf", **sent).status_code == 400  # type: ignore[arg-type]


def test_large_documents_in_base64_at_once(served: Served, client: httpx.Client) -> None:
    """Larger than may be uploaded, though the body is not."""
    body = as_data("a.pdf", bad_files.written(bad_files.pdf()) + b"%" * (30 * MIB))["json"]
    answers = at_once(*[lambda: client.post("/v1/ocr", json=body)] * 6)
    assert [answer.status_code for answer in answers] == [413] * 6
    assert memory_of(served) < MEMORY_MIB


def test_a_second_request_costs_none_of_the_first_ones_tasks(client: httpx.Client) -> None:
    """It has the same idempotency key and the same first file, and is refused for its second one."""

    one, two = pdf_of(1), pdf_of(2)  # with the second in which they were made

    def send(second: bytes) -> httpx.Response:
        files = [("files", ("one.pdf", one)), ("files", ("two.pdf", second))]
        return client.post("/api/ocr/pdf", files=files, headers={"idempotency-key": "several"})

    tasks = send(two).raise_for_status().json()["task_ids"]
    assert send(two).json()["task_ids"] == tasks
    assert send(pdf_of(3)).status_code == 409
    assert send(b"%PDF-1.7 nothing").status_code == 422
    for task in tasks:
        assert ended(client, task)["status"] == "succeeded"


def test_cancels_retries_and_deletes_at_once(served: Served, client: httpx.Client, ocr: FakeOcr) -> None:
    """Whichever comes first, none fails for another, and what is left comes to its end."""
    ocr.behave(**BEHAVIOUR, latency=0.02)
    tasks = [client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(6))}).json()["task_id"] for _ in range(6)]
    deadline = time.monotonic() + 60
    for turn in range(8):
        asked: list[Callable[[], httpx.Response]] = [lambda: client.get("/api/tasks")]
        for task in tasks:
            asked.append(lambda task=task: client.post(f"/api/tasks/{task}/cancel"))  # type: ignore[misc]
            asked.append(lambda task=task: client.post(f"/api/tasks/{task}/retry"))  # type: ignore[misc]
            asked.append(lambda task=task: client.get(f"/api/tasks/{task}"))  # type: ignore[misc]
        if turn == 7:
            asked += [lambda task=task: client.delete(f"/api/tasks/{task}") for task in tasks[:3]]  # type: ignore[misc]
        statuses = {answer.status_code for answer in at_once(*asked)}
        assert statuses <= {200, 202, 204, 404, 409}
        assert time.monotonic() < deadline
    for task in tasks[:3]:
        assert client.get(f"/api/tasks/{task}").status_code == 404
        eventually(lambda task=task: not (folder_of(served) / task).exists())  # type: ignore[misc]
    for task in tasks[3:]:
        with contextlib.suppress(httpx.HTTPStatusError):  # it is under way already
            client.post(f"/api/tasks/{task}/retry").raise_for_status()
        assert ended(client, task)["status"] == "succeeded"
    assert client.get("/api/tasks").json()["counts"]["queued"] == 0


def test_a_retry_and_a_delete_at_once(served: Served, client: httpx.Client) -> None:
    for _ in range(10):
        task = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(3))}).json()["task_id"]
        client.post(f"/api/tasks/{task}/cancel")
        retry, delete = at_once(
            lambda task=task: client.post(f"/api/tasks/{task}/retry"),  # type: ignore[misc]
            lambda task=task: client.delete(f"/api/tasks/{task}"),  # type: ignore[misc]
        )
        assert retry.status_code in (202, 404, 409)
        assert delete.status_code == 204
        assert client.get(f"/api/tasks/{task}").status_code == 404
        assert not (folder_of(served) / task).exists()
    task = client.post("/api/ocr/pdf?wait=60", files={"pdf": ("a.pdf", pdf_of(1))}).json()
    assert task["status"] == "succeeded"


def test_deleted_at_any_moment(served: Served, client: httpx.Client) -> None:
    """While it is looked at, read, cut out and written: nothing of it stays, and nothing comes back."""
    for moment in range(12):
        fields = {"formats": "html,docx,text"}
        task = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(6))}, data=fields).json()["task_id"]
        time.sleep(moment * 0.08)
        assert client.delete(f"/api/tasks/{task}").status_code == 204
        assert not (folder_of(served) / task).exists()
    time.sleep(1)
    kept = {path.name for path in folder_of(served).iterdir() if path.is_dir()} - {"incoming"}
    listed = {each["task_id"] for each in client.get("/api/tasks", params={"limit": 200}).json()["tasks"]}
    assert kept == listed


def test_deleted_or_cancelled_while_its_products_are_written(served: Served, client: httpx.Client) -> None:
    def at_its_products() -> str:
        fields = {"formats": "html,docx,text"}
        task = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(24))}, data=fields).json()["task_id"]
        eventually(lambda: list((folder_of(served) / task).glob("*.part")), 60)
        return str(task)

    task = at_its_products()
    assert client.delete(f"/api/tasks/{task}").status_code == 204
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert not (folder_of(served) / task).exists()
        time.sleep(0.05)

    task = at_its_products()
    assert client.post(f"/api/tasks/{task}/cancel").json()["status"] == "cancelled"
    assert not list((folder_of(served) / task).glob("*.part"))
    assert client.post(f"/api/tasks/{task}/retry").status_code == 202
    document = ended(client, task)
    assert (document["status"], document["progress"]["pages_completed"]) == ("succeeded", 24)
    with zipfile.ZipFile(io.BytesIO(client.get(document["result"]["archive_url"]).content)) as archive:
        assert archive.testzip() is None


def test_deleted_while_somebody_waits_for_it(served: Served, client: httpx.Client, ocr: FakeOcr) -> None:
    ocr.behave(**BEHAVIOUR, latency=0.5)

    def delete() -> httpx.Response:
        task = eventually(lambda: client.get("/api/tasks", params={"status": "running"}).json()["tasks"])[0]
        return client.delete(f"/api/tasks/{task['task_id']}")

    waits, deleted = at_once(
        lambda: client.post("/convert/file", files={"file": ("a.pdf", pdf_of(8))}),
        delete,
    )
    assert deleted.status_code == 204
    assert (waits.status_code, waits.json()["status"]) in ((409, "error"), (404, "error")), waits.text


def test_who_watches_may_leave(served: Served, client: httpx.Client, ocr: FakeOcr) -> None:
    ocr.behave(**BEHAVIOUR, latency=0.2)
    task = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(8))}).json()["task_id"]
    for _ in range(10):
        with client.stream("GET", f"/api/tasks/{task}/events") as events:
            assert next(events.iter_lines()) == "event: status"
    with client.stream("GET", f"/api/tasks/{task}/events") as events:
        client.delete(f"/api/tasks/{task}")
        told = [json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:")]
    assert told[-1]["status"] == "cancelled"


# --- and meanwhile ---


def test_others_go_on_and_memory_stays_within_its_limit(served: Served, client: httpx.Client, ocr: FakeOcr) -> None:
    ocr.behave(**BEHAVIOUR, latency=0.05, pages={"100": ["million_boxes"] * 2})
    with served.client("bob") as bob:
        good = bob.post("/api/ocr/pdf", files={"pdf": ("good.pdf", pdf_of(20))}).json()["task_id"]
        odd = client.post("/api/ocr/pdf", files={"pdf": ("odd.pdf", pdf_of(1, 100))}, data={"retries": "1"}).json()
        sent = [
            lambda case=case: client.post("/api/ocr/pdf", **DOORS["/api/ocr/pdf"](*FILES[case][:2])) for case in FILES
        ]
        assert all(400 <= answer.status_code < 500 for answer in at_once(*sent))
        assert client.get("/health").json()["model_loaded"] is True
        assert (ended(bob, good)["status"], ended(bob, good)["fallback_pages"]) == ("succeeded", [])
    assert ended(client, odd["task_id"])["status"] == "succeeded"
    assert memory_of(served) < MEMORY_MIB


def test_a_zip_of_odd_files_is_read_as_far_as_it_can_be(client: httpx.Client) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../up.pdf", pdf_of(1))
        archive.writestr("inner.zip", NESTED)
        archive.writestr("letter.pdf", "Dear Sir")
        archive.writestr("empty.png", b"")
    answer = client.post("/api/ocr/pdf", files={"file": ("all.zip", packed.getvalue())}).json()
    assert len(answer["skipped"]) == 3
    assert ended(client, answer["task_id"])["filename"] == "up.pdf"


def test_pages_in_odd_shapes(client: httpx.Client) -> None:
    """One pixel, and 20,000 of them in a row."""
    for size in ((1, 1), (20_000, 1), (1, 20_000), (20_000, 20)):
        file = io.BytesIO()
        Image.new("RGB", size, "white").save(file, "PNG")
        task = client.post("/api/ocr/pdf?wait=60", files={"pdf": ("a.png", file.getvalue())}).json()
        assert task["status"] == "succeeded", (size, task)
        assert client.post("/api/ocr/image", files={"image": ("a.png", page_image(1))}).status_code == 200
