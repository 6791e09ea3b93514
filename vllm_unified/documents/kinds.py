"""What a file is, by its content and never by its name."""

import struct
from enum import StrEnum

from vllm_unified.documents.problems import DocumentError


class Kind(StrEnum):
    """What the service reads. A ZIP is unpacked first."""

    PDF = "pdf"
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    BMP = "bmp"
    GIF = "gif"
    HEIC = "heic"
    AVIF = "avif"
    TIFF = "tiff"
    ZIP = "zip"

    @property
    def media_type(self) -> str:
        return f"application/{self}" if self in (Kind.PDF, Kind.ZIP) else f"image/{self}"

    @property
    def extension(self) -> str:
        return {"jpeg": ".jpg", "tiff": ".tif"}.get(self, f".{self}")


HEAD_BYTES = 4096  # what kind_of looks at
PDF_HEADER_WITHIN = 1024  # bytes, as PDF readers have it: junk may stand before it
READABLE = "PDF, PNG, JPEG, WebP, BMP, GIF, HEIC, AVIF, TIFF, or a ZIP of these"

_BEGINNINGS = (
    (b"\x89PNG\r\n\x1a\n", Kind.PNG),
    (b"\xff\xd8\xff", Kind.JPEG),
    (b"GIF87a", Kind.GIF),
    (b"GIF89a", Kind.GIF),
    (b"II*\0", Kind.TIFF),
    (b"MM\0*", Kind.TIFF),
    (b"II+\0", Kind.TIFF),  # BigTIFF
    (b"MM\0+", Kind.TIFF),
    (b"PK\x03\x04", Kind.ZIP),
    (b"PK\x05\x06", Kind.ZIP),  # one without members
)
# Brands of ISO/IEC 23008-12 (HEIF) and of AV1 in it. mif1 and msf1 say that a file is HEIF, not how it is compressed.
_BRANDS = {
    Kind.AVIF: {b"avif", b"avis"},
    Kind.HEIC: {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"},
}
_BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}  # sizes of the header that follows the first 14 bytes

# Not read, but known well enough to say what to do.
_OTHERS = (
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document; save it as PDF"),
    (b"{\\rtf", "an RTF document; save it as PDF"),
    (b"%!PS", "PostScript; convert it to PDF"),
    (b"AT&TFORM", "a DjVu document; convert it to PDF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image; save it as PNG or JPEG"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image; save it as PNG or JPEG"),
    (b"8BPS", "a Photoshop file; save it as PNG"),
    (b"Rar!", "a RAR archive; send a ZIP"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; send a ZIP"),
    (b"\x1f\x8b", "compressed with gzip; send the file itself"),
)


def kind_of(head: bytes) -> Kind | None:
    """Of the first HEAD_BYTES of a file; None for one that is not read."""
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return Kind.WEBP
    if head.startswith(b"BM") and len(head) >= 18 and struct.unpack_from("<I", head, 14)[0] in _BMP_HEADERS:
        return Kind.BMP
    if head[4:8] == b"ftyp":
        return _heif_kind(head)
    if b"%PDF-" in head[:PDF_HEADER_WITHIN]:
        return Kind.PDF
    return None


def require_kind(head: bytes, name: str) -> Kind:
    """The kind. Raises DocumentError 400 for an empty file, 415 for one that is not read."""
    if not head:
        raise DocumentError(400, f"{name}: the file is empty", code="empty_file")
    kind = kind_of(head)
    if kind is None:
        message = f"{name} is {looks_like(head)}; what is read: {READABLE}"
        raise DocumentError(415, message, code="unsupported_file")
    return kind


def looks_like(head: bytes) -> str:
    """Goes on from "it is", about a file that is not read."""
    for beginning, words in _OTHERS:
        if head.startswith(beginning):
            return words
    # A character that the end of the head cuts in two is no fault of a text.
    text = head.decode("utf-8", "ignore")
    if b"\0" not in head and len(text.encode()) > len(head) - 4:
        start = text.lstrip("\ufeff \t\r\n")[:20].lower()
        return "HTML or XML; print it to PDF" if start.startswith("<") else "plain text, whatever its name says"
    return "of an unknown kind"


def _heif_kind(head: bytes) -> Kind | None:
    size = min(struct.unpack_from(">I", head)[0], len(head))
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, size - 3, 4))}
    return next((kind for kind, known in _BRANDS.items() if brands & known), None)
