import io
import zipfile

import pytest
from PIL import Image
from pillow_heif import register_heif_opener

from vllm_unified.documents.kinds import Kind, kind_of, require_kind
from vllm_unified.documents.problems import DocumentError

register_heif_opener()


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.PDF, Kind.ZIP)])
def test_what_is_really_written(kind: Kind) -> None:
    written = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(written, "HEIF" if kind is Kind.HEIC else kind.upper())
    assert kind_of(written.getvalue()[:4096]) is kind


def test_zip() -> None:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        assert kind_of(written.getvalue()) is None
    assert kind_of(written.getvalue()) is Kind.ZIP
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("stored.pdf", b"%PDF-1.7")
    assert kind_of(written.getvalue()) is Kind.ZIP


def ftyp(major: bytes, *compatible: bytes) -> bytes:
    body = b"ftyp" + major + b"\0\0\0\0" + b"".join(compatible)
    return (len(body) + 4).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"%PDF-1.7\n", Kind.PDF),
        (b"\xef\xbb\xbf\r\n%PDF-1.4\n", Kind.PDF),
        (b"\0" * 1019 + b"%PDF-", Kind.PDF),
        (b"\0" * 1020 + b"%PDF-", None),
        (b"\x89PNG\r\n\x1a\n%PDF-1.7", Kind.PNG),  # both: the program that opens it goes by its beginning
        (b"II+\0\x08\0\0\0", Kind.TIFF),
        (b"BM" + b"x" * 100, None),  # a text about BMW
        (b"BM", None),
        (b"RIFF\0\0\0\0WAVE", None),
        (ftyp(b"mif1", b"miaf", b"heic"), Kind.HEIC),
        (ftyp(b"mif1", b"miaf", b"avif"), Kind.AVIF),
        (ftyp(b"isom", b"mp42"), None),
        (ftyp(b"isom") + b"heic", None),  # behind the box
        (b"\0\0\0\xffftypheic", Kind.HEIC),  # shorter than it says
        (b"\0\0\0", None),
        (b"", None),
    ],
)
def test_kind_of(head: bytes, kind: Kind | None) -> None:
    assert kind_of(head) is kind


@pytest.mark.parametrize(
    ("head", "status", "code", "words"),
    [
        (b"", 400, "empty_file", "the file is empty"),
        (b"Dear Sir,\n", 415, "unsupported_file", "plain text, whatever its name says"),
        (("合同" * 2000).encode()[:4096], 415, "unsupported_file", "plain text"),
        (b"<!doctype html><script>alert(1)</script>", 415, "unsupported_file", "HTML or XML"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0", 415, "unsupported_file", "an old Office document; save it as PDF"),
        (b"\xff\xfeD\0e\0a\0r\0", 415, "unsupported_file", "of an unknown kind"),
        (b"\x7fELF\x02\x01\x01\0", 415, "unsupported_file", "of an unknown kind"),
    ],
)
def test_what_is_not_read(head: bytes, status: int, code: str, words: str) -> None:
    with pytest.raises(DocumentError, match=f"contract.pdf.*{words}") as caught:
        require_kind(head, "contract.pdf")
    assert (caught.value.status, caught.value.code) == (status, code)


def test_types_and_extensions() -> None:
    assert [kind.media_type for kind in (Kind.PDF, Kind.JPEG, Kind.ZIP)] == [
        "application/pdf",
        "image/jpeg",
        "application/zip",
    ]
    assert [kind.extension for kind in (Kind.PDF, Kind.JPEG, Kind.TIFF)] == [".pdf", ".jpg", ".tif"]
