import asyncio
import base64
import contextlib
import errno
import hashlib
import os
import socket
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from tests.conftest import eventually, free_port
from tests.documents import bad_files
from vllm_unified.documents.kinds import Kind
from vllm_unified.documents.problems import DocumentError, on_disk
from vllm_unified.documents.uploads import (
    Form,
    Unpacked,
    Upload,
    receive_body,
    receive_form,
    safe_name,
    save_base64,
    unpack,
)

PNG = bad_files.image("PNG")
PDF = bad_files.written(bad_files.pdf())
MIB = 1 << 20
B = "boundary"
FORM = {"content-type": f"multipart/form-data; boundary={B}"}


def request_of(body: bytes, headers: dict[str, str], *, piece: int = 1000, whole: bool = True) -> Request:
    """As uvicorn hands it on; the client leaves at the end where it is not `whole`."""
    pieces = [body[start : start + piece] for start in range(0, len(body), piece)] or [b""]
    messages: list[Message] = [{"type": "http.request", "body": each, "more_body": True} for each in pieces]
    if whole:
        messages[-1]["more_body"] = False
    waiting = iter(messages)

    async def receive() -> Message:
        return next(waiting, {"type": "http.disconnect"})

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'--{B}\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"


def form_of(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{B}--\r\n".encode()


def received(body: bytes, folder: Path, headers: dict[str, str] = FORM, max_bytes: int = MIB, **how: Any) -> Form:
    request = request_of(body, headers, **how)
    return asyncio.run(receive_form(request, folder, max_bytes=max_bytes, file_fields=["file", "image"]))


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def refused(error: DocumentError) -> tuple[int, str]:
    return error.status, error.code


@pytest.mark.parametrize("piece", [1, 7, 1000, MIB])
def test_what_a_client_sends(tmp_path: Path, piece: int) -> None:
    sent = httpx.Request(
        "POST",
        "http://service",
        data={"mode": "markdown", "prompt": "请转换\r\n--"},
        files=[("image", ("合同 📄.png", PNG)), ("file", ("b.pdf", PDF, "application/pdf"))],
    )
    form = received(sent.read(), tmp_path, dict(sent.headers), piece=piece)
    assert form.fields == {"mode": "markdown", "prompt": "请转换\r\n--"}
    assert [(each.field, each.name, each.kind) for each in form.files] == [
        ("image", "合同 📄.png", Kind.PNG),
        ("file", "b.pdf", Kind.PDF),
    ]
    assert [each.path.read_bytes() for each in form.files] == [PNG, PDF]
    assert [each.size for each in form.files] == [len(PNG), len(PDF)]
    assert form.files[0].sha256 == hashlib.sha256(PNG).hexdigest()
    assert files_in(tmp_path) == sorted(each.path for each in form.files)


def test_kinds_are_by_content(tmp_path: Path) -> None:
    (upload,) = received(form_of(part("file", PNG, "scan.pdf")), tmp_path).files
    assert (upload.kind, upload.name) == (Kind.PNG, "scan.pdf")


def test_a_file_without_a_name(tmp_path: Path) -> None:
    (upload,) = received(form_of(part("file", PNG, "")), tmp_path).files
    assert upload.name == "document.png"


def test_fields_of_files_that_were_left_empty(tmp_path: Path) -> None:
    form = received(
        form_of(part("file", b"", ""), part("image", b""), part("mode", b"a"), part("mode", b"b")), tmp_path
    )
    assert form == Form({"mode": "b"}, [])
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..\\..\\boot.ini", "/etc/passwd", "a\0b.png", "x" * 4096 + ".png", "😀" * 4096]
)
def test_names_are_no_paths(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (upload,) = received(form_of(part("file", PNG, name)), inner).files
    assert upload.path.parent == inner
    assert upload.name == safe_name(name)
    assert files_in(tmp_path) == [inner]


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        (form_of(part("file", b"", "a.pdf")), 400, "empty_file", "a.pdf: the file is empty"),
        (form_of(part("file", b"Dear Sir", "a.pdf")), 415, "unsupported_file", "a.pdf is plain text"),
        (form_of(part("file", PNG, "a"), part("file", b"Dear Sir", "b")), 415, "unsupported_file", "b is plain text"),
        (form_of(part("other", PNG, "a")), 400, "unexpected_file", 'files go in "file", "image"'),
        (form_of(part("file", b"http://x")), 400, "not_a_file", '"file" must be a file'),
        (form_of(part("mode", b"\xff\xfe")), 400, "invalid_encoding", '"mode" is not UTF-8'),
        (form_of(part("file", PNG + bytes(MIB), "a")), 413, "too_large", "the files are larger than 1 MiB"),
        (form_of(*[part("file", PNG + bytes(MIB // 2), "a")] * 2), 413, "too_large", "1 MiB"),
        (form_of(part("file", bytes(8 * MIB), "a")), 413, "too_large", "1 MiB"),
        (form_of(part("a", bytes(MIB // 2)), part("b", bytes(MIB // 2 + 1))), 413, "fields_too_large", "1 MiB"),
        (form_of(*[part("a", b"")] * 101), 413, "too_many_parts", "more than 100 parts"),
        (b"\r\n" * 3 * MIB, 413, "too_large", "1 MiB"),  # a preamble that does not end
        (form_of(part("a", b"")) + bytes(6 * MIB), 413, "too_large", "1 MiB"),  # nor an epilogue
        (part("file", PNG, "a"), 400, "incomplete_upload", "half-way"),
        (part("file", PNG, "a")[:-500], 400, "incomplete_upload", "half-way"),
        (b"", 400, "incomplete_upload", "half-way"),
        (b"%PDF-1.7", 400, "invalid_form", "the form can't be read"),
        (form_of(f"--{B}\r\ncontent-type: text/plain\r\n\r\nx\r\n".encode()), 400, "invalid_form", "has no name"),
        (form_of(part("x" * 20_000, b"")), 400, "invalid_form", "header size"),
        (form_of(part("x;" * 300, b"")), 400, "invalid_form", "too many parameters"),
        (form_of(f"--{B}\r\n".encode() + b"a: b\r\n" * 50 + b"\r\n"), 400, "invalid_form", "header count"),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_forms_that_are_refused(
    tmp_path: Path, body: bytes, status: int, code: str, words: str, declared: bool
) -> None:
    headers = {**FORM, **({"content-length": str(len(body))} if declared else {})}
    with pytest.raises(DocumentError) as caught:
        received(body, tmp_path, headers, piece=1 << 16)
    assert refused(caught.value) == (status, code)
    assert words in str(caught.value) or declared
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"])
def test_what_is_no_form(tmp_path: Path, content_type: str) -> None:
    with pytest.raises(DocumentError) as caught:
        received(b"{}", tmp_path, {"content-type": content_type})
    assert refused(caught.value) == (415, "not_a_form")


def test_a_boundary_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(DocumentError) as caught:
        received(b"", tmp_path, {"content-type": f"multipart/form-data; boundary={'x' * 500}"})
    assert refused(caught.value) == (400, "invalid_form")


def test_a_declared_length_is_refused_before_it_comes(tmp_path: Path) -> None:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    headers = [(b"content-type", FORM["content-type"].encode()), (b"content-length", b"9" * 30)]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
    with pytest.raises(DocumentError) as caught:
        asyncio.run(receive_form(request, tmp_path, max_bytes=MIB, file_fields=["file"]))
    assert refused(caught.value) == (413, "too_large")


def test_an_upload_that_stops_half_way(tmp_path: Path) -> None:
    with pytest.raises(DocumentError) as caught:
        received(part("file", PNG, "a")[:-500], tmp_path, whole=False)
    assert refused(caught.value) == (400, "incomplete_upload")
    assert files_in(tmp_path) == []


def test_a_client_that_goes_away(tmp_path: Path) -> None:
    """Through a real server and a real connection."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(DocumentError) as caught:
            await receive_form(Request(scope, receive), tmp_path, max_bytes=MIB, file_fields=["file"])
        refusals.append(refused(caught.value))

    async def story() -> None:
        config = uvicorn.Config(app, port=free_port(), lifespan="off", ws="none", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        await asyncio.to_thread(eventually, lambda: server.started)
        await asyncio.to_thread(half_an_upload, config.port)
        await asyncio.to_thread(eventually, lambda: refusals)
        server.should_exit = True
        await serving

    def half_an_upload(port: int) -> None:
        head = f"POST / HTTP/1.1\r\nhost: x\r\ncontent-type: {FORM['content-type']}\r\ncontent-length: 500000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + part("file", PNG + bytes(100_000), "a")[:-100])
            eventually(lambda: files_in(tmp_path))

    refusals: list[tuple[int, str]] = []
    asyncio.run(story())
    assert refusals == [(400, "incomplete_upload")]
    assert files_in(tmp_path) == []


def test_a_task_that_is_cancelled(tmp_path: Path) -> None:
    async def story() -> None:
        async def receive() -> Message:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(), "more_body": True}
            waits.set()
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        pieces = [part("file", PNG, "a")]
        waits = asyncio.Event()
        request = Request({**request_of(b"", FORM).scope}, receive)
        task = asyncio.create_task(receive_form(request, tmp_path, max_bytes=MIB, file_fields=["file"]))
        await waits.wait()
        assert len(files_in(tmp_path)) == 1
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(story())
    assert files_in(tmp_path) == []


# Bodies


def test_a_body_that_is_a_file(tmp_path: Path) -> None:
    upload = asyncio.run(receive_body(request_of(PDF, {}), tmp_path, MIB))
    assert (upload.name, upload.kind, upload.path.read_bytes()) == ("document.pdf", Kind.PDF, PDF)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [(b"", 400, "empty_file"), (bytes(MIB + 1), 413, "too_large"), (b"Dear Sir", 415, "unsupported_file")],
)
def test_bodies_that_are_refused(tmp_path: Path, body: bytes, status: int, code: str) -> None:
    with pytest.raises(DocumentError) as caught:
        asyncio.run(receive_body(request_of(body, {}), tmp_path, MIB))
    assert refused(caught.value) == (status, code)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "wrap"),
    [
        (PNG, "{}"),
        (PNG, "data:image/png;base64,{}"),
        (PDF, "DATA:application/pdf;name=x.pdf;base64,{}"),
        (PNG + b"x" * (3 - len(PNG) % 3 + 1), " {}\n"),
        (PNG + bytes(700_000), "{}"),
    ],
)
def test_base64(tmp_path: Path, content: bytes, wrap: str) -> None:
    for text in (base64.b64encode(content).decode(), base64.encodebytes(content).decode()):
        upload = save_base64(wrap.format(text), tmp_path, max_bytes=MIB, name="a/b.png")
        assert (upload.path.read_bytes(), upload.name) == (content, "b.png")
        assert save_base64(wrap.format(text.rstrip("=\n")), tmp_path, max_bytes=MIB).size == len(content)


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("", 400, "empty_file"),
        ("data:image/png;base64,", 400, "empty_file"),
        ("data:image/png;base64", 400, "invalid_base64"),
        ("data:image/svg+xml,<svg>", 400, "invalid_base64"),
        ("https://example.org/a.png", 400, "invalid_base64"),
        ("iVBORw0KGgo*", 400, "invalid_base64"),
        ("iVBORw0KGgoAA=AA", 400, "invalid_base64"),
        ("图片图片", 400, "invalid_base64"),
        ("a", 400, "invalid_base64"),
        (base64.b64encode(PNG + bytes(MIB)).decode(), 413, "too_large"),
        (base64.b64encode(b"Dear Sir, ...").decode(), 415, "unsupported_file"),
    ],
)
def test_base64_that_is_refused(tmp_path: Path, text: str, status: int, code: str) -> None:
    with pytest.raises(DocumentError) as caught:
        save_base64(text, tmp_path, max_bytes=MIB)
    assert refused(caught.value) == (status, code)
    assert files_in(tmp_path) == []


# ZIP


def unpacked(content: bytes, folder: Path, *, max_files: int = 100, max_bytes: int = 40 * MIB) -> Unpacked:
    """Out of a file beside the folder."""
    folder.mkdir(exist_ok=True)
    path = folder.with_suffix(".zip")
    path.write_bytes(content)
    upload = Upload("file", "all.zip", path, len(content), "", Kind.ZIP)
    return unpack(upload, folder, max_files=max_files, max_bytes=max_bytes)


@pytest.mark.parametrize("size", [100, MIB // 2])  # noticed at its end, and while it comes
@pytest.mark.parametrize("way", ["form", "body", "base64", "zip"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, size: int) -> None:
    def mkstemp(prefix: str, dir: Path) -> tuple[int, str]:
        return os.open("/dev/full", os.O_WRONLY), str(dir / f"{prefix}full")

    (tmp_path / "out").mkdir()
    content = PNG + os.urandom(size)
    ways: dict[str, Callable[[Path], Any]] = {
        "form": lambda folder: received(form_of(part("file", content, "a.png")), folder),
        "body": lambda folder: asyncio.run(receive_body(request_of(content, {}), folder, MIB)),
        "base64": lambda folder: save_base64(base64.b64encode(content).decode(), folder, max_bytes=MIB),
        "zip": lambda folder: unpacked(bad_files.zip_of({"a.png": content}), folder),
    }
    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    with pytest.raises(DocumentError, match="free some space in data/documents") as caught:
        ways[way](tmp_path / "out")
    assert refused(caught.value) == (507, "no_space")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize(("number", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_what_a_full_disk_is(number: int, is_full: bool) -> None:
    with pytest.raises(DocumentError if is_full else OSError), on_disk():
        raise OSError(number, os.strerror(number))


def test_a_zip(tmp_path: Path) -> None:
    members = {
        "two.pdf": PDF,
        "scans/one.png": PNG,
        "scans/": b"",
        "名前.png": PNG,
        "__MACOSX/._two.pdf": b"\0\5\x16\7",
        ".DS_Store": b"\0",
        "readme.txt": b"Dear Sir",
        "nothing.pdf": b"",
        "inner.zip": bad_files.zip_of({"a.pdf": PDF}),
    }
    found = unpacked(bad_files.zip_of(members), tmp_path / "out")
    assert [(each.field, each.name, each.kind) for each in found.files] == [
        ("file", "two.pdf", Kind.PDF),
        ("file", "one.png", Kind.PNG),
        ("file", "名前.png", Kind.PNG),
    ]
    assert [each.path.read_bytes() for each in found.files] == [PDF, PNG, PNG]
    assert found.skipped == [
        "readme.txt is plain text, whatever its name says",
        "nothing.pdf is empty",
        "inner.zip is a ZIP within the ZIP; send it by itself",
    ]
    assert files_in(tmp_path / "out") == sorted(each.path for each in found.files)


@pytest.mark.parametrize("name", ["../../escaped.png", "/etc/escaped.png", "..\\escaped.png", "C:\\escaped.png"])
def test_members_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    (upload,) = unpacked(bad_files.zip_of({name: PNG}), tmp_path / "out").files
    assert upload.path.parent == tmp_path / "out"
    assert upload.name == "escaped.png"
    assert {each.name for each in tmp_path.iterdir()} == {"out", "out.zip"}


def test_links_are_not_followed(tmp_path: Path) -> None:
    found = unpacked(bad_files.zip_with_a_link("link.png", "/etc/passwd"), tmp_path / "out")
    assert ([each.name for each in found.files], found.skipped) == (["good.png"], ["link.png is a link"])


def test_names_in_utf8_that_no_flag_tells(tmp_path: Path) -> None:
    """As macOS writes them."""
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        archive.writestr("xxxxxx.png", PNG)
    content = (tmp_path / "made.zip").read_bytes().replace(b"xxxxxx", "報告".encode())
    (upload,) = unpacked(content, tmp_path / "out").files
    assert upload.name == "報告.png"


def test_a_damaged_member_costs_no_other(tmp_path: Path) -> None:
    content = bytearray(bad_files.zip_of({"bad.bmp": bad_files.image("BMP"), "good.png": PNG}, zipfile.ZIP_STORED))
    content[1000] ^= 0xFF
    found = unpacked(bytes(content), tmp_path / "out")
    assert ([each.name for each in found.files], found.skipped) == (["good.png"], ["bad.bmp is damaged"])
    assert len(files_in(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("content", "status", "code", "words"),
    [
        (bad_files.encrypted_zip(), 400, "encrypted_zip", "secret.pdf in all.zip is encrypted"),
        (bad_files.zip_bomb(30), 413, "zip_bomb", "decompression bomb"),
        (bad_files.zip_bomb(30, claim=100), 415, "nothing_readable", "bomb.bmp is damaged"),
        (bad_files.zip_of({f"{n}.bmp": bad_files.image("BMP") * 10 for n in range(8)}), 413, "too_large", "40 MiB"),
        (bad_files.zip_of({f"{n}.png": PNG for n in range(101)}), 413, "too_many_files", "101 files, and at most 100"),
        (bad_files.zip_with_many_entries(1_000_000 // 54), 413, "too_many_files", "files, and at most 100"),
        (bad_files.zip_with_many_entries(60_000), 413, "too_many_files", "larger than 1 MiB"),
        (bad_files.zip_of({"a.zip": bad_files.zip_of({"a.pdf": PDF})}), 415, "nothing_readable", "a ZIP within"),
        (bad_files.zip_of({}), 415, "nothing_readable", "it is empty"),
        (bad_files.zip_of({"a.png": PNG}, zipfile.ZIP_LZMA), 415, "nothing_readable", "use deflate"),
        (
            bad_files.zip_of({"[Content_Types].xml": b"<a/>", "i.png": PNG}),
            415,
            "unsupported_file",
            "an Office document",
        ),
        (bad_files.zip_of({"a.png": PNG})[:-30], 400, "damaged_zip", "all.zip is damaged"),
        (b"PK\x03\x04" + bytes(1000), 400, "damaged_zip", "all.zip is damaged"),
    ],
)
def test_zips_that_are_refused(tmp_path: Path, content: bytes, status: int, code: str, words: str) -> None:
    with pytest.raises(DocumentError) as caught:
        unpacked(content, tmp_path / "out")
    assert refused(caught.value) == (status, code)
    assert words in str(caught.value)
    assert files_in(tmp_path / "out") == []


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
def test_a_zip_with_any_damage_is_no_surprise(tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes) -> None:
    content = bytearray(bad_files.zip_of({"a.png": PNG, "b/ü.png": PNG}))
    at %= len(content)
    content[at : at + len(noise)] = noise
    with contextlib.suppress(DocumentError):
        assert unpacked(bytes(content), tmp_path_factory.mktemp("zip") / "out").files


# Names


@pytest.mark.parametrize(
    ("given_name", "safe"),
    [
        ("report.pdf", "report.pdf"),
        ("Jahres bericht (2).PDF", "Jahres bericht (2).PDF"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\windows\\system.ini", "system.ini"),
        ("C:\\Users\\me\\scan.png", "scan.png"),
        ("a/../b/./c.png", "c.png"),
        ("a\0.png", "a.png"),
        ("a\r\nb\x7f\x85.png", "ab.png"),
        ("gpj.\u202efdp.exe", "gpj.fdp.exe"),
        ("a\u2066b\u200fc\ufeff.pdf", "abc.pdf"),
        ("half \ud83d a pair.pdf", "half  a pair.pdf"),
        ("👩‍👩‍👧 ❤️.png", "👩‍👩‍👧 ❤️.png"),
        ("报告（最终）.pdf", "报告（最终）.pdf"),
        ("e\u0301te\u0301.pdf", "été.pdf"),
        ('a<b>c:d"e|f?g*.pdf', "a_b_c_d_e_f_g_.pdf"),
        (".htaccess", "htaccess"),
        ("name. . .", "name"),
        ("CON", "_CON"),
        ("nul.pdf", "_nul.pdf"),
        ("com1.tar.gz", "_com1.tar.gz"),
        ("console.pdf", "console.pdf"),
        ("", "document"),
        ("/", "document"),
        ("..", "document"),
        ("\u202e\0", "document"),
        ("x" * 4096, "x" * 119),
        ("x" * 4096 + ".pdf", "x" * 115 + ".pdf"),
        ("é" * 4096 + ".pdf", "é" * 57 + ".pdf"),
        ("a." + "x" * 4096, "a." + "x" * 117),
    ],
)
def test_safe_name(given_name: str, safe: str) -> None:
    assert safe_name(given_name) == safe


@settings(deadline=None)
@given(st.text(st.characters() | st.sampled_from("./\\\0\u202e\ud800:"), max_size=600))
def test_every_safe_name_is_a_file_name(given_name: str) -> None:
    name = safe_name(given_name)
    assert 0 < len(name.encode()) <= 120
    assert not set(name) & set('/\\\0:<>"|?*\n\r\u202e')
    assert name not in (".", "..")
    assert not name.startswith(".")
    assert not name.endswith((".", " "))
    assert safe_name(name) == name
