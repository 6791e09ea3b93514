"""What the client of a finished document gets, written from its pages one at a time."""

import base64
import hashlib
import html
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

import msgspec

from vllm_unified.documents.layout import write_layout
from vllm_unified.documents.markdown import FIGURE, Paragraph, Table, blocks, fragments, without_controls
from vllm_unified.documents.options import Format
from vllm_unified.documents.page import Block, Page, as_shares
from vllm_unified.documents.plain import PlainText
from vllm_unified.documents.word import EPOCH, WordDocument

RESULT, RAW, ARCHIVE, LAYOUT = "result.md", "raw.json", "result.zip", "layout.pdf"
# Beside those, which every document has.
FILE_OF_FORMAT: dict[Format, str] = {"html": "result.html", "docx": "result.docx", "text": "result.txt"}
PRODUCTS = (RESULT, RAW, LAYOUT, *FILE_OF_FORMAT.values(), ARCHIVE)
MEDIA_TYPES = {
    RESULT: "text/markdown; charset=utf-8",
    RAW: "application/json",
    LAYOUT: "application/pdf",
    "result.html": "text/html; charset=utf-8",
    "result.docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "result.txt": "text/plain; charset=utf-8",
    ARCHIVE: "application/zip",
}

# Larger figures, and those after so many bytes of them, are linked from result.html, as they stand in the archive.
MOST_BYTES_OF_FIGURE = 1 << 20
MOST_BYTES_OF_FIGURES = 32 << 20
LONGEST_NAME = 100

_STYLE = """
body{max-width:52rem;margin:2rem auto;padding:0 1rem;font:1rem/1.6 system-ui,sans-serif;color:#1a1a1a;background:#fff}
h1,h2,h3,h4,h5,h6{line-height:1.25;margin:1.6em 0 .5em}
table{border-collapse:collapse;margin:1em 0}
td,th{border:1px solid #999;padding:.25em .6em;text-align:left;vertical-align:top}
th{background:#f0f0f0}
td[align=right],th[align=right]{text-align:right}
td[align=center],th[align=center]{text-align:center}
img{max-width:100%;height:auto}
pre{overflow-x:auto;padding:.8em;background:#f5f5f5}
code{font-family:ui-monospace,monospace;font-size:.92em}
blockquote{margin:1em 0;padding-left:1em;border-left:3px solid #ccc;color:#444}
@media print{body{max-width:none;margin:0}}
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_FOOT = "</body>\n</html>\n"
_LINKED_FIGURE = re.compile(rf'(<img [^<>]{{0,4000}}?src=")({FIGURE.pattern})(?=")')
_FIGURE_TYPES = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "gif": "gif", "webp": "webp"}


class Products(msgspec.Struct, frozen=True):
    """Paths within the document's folder, result.md first. `images`: the figures that were cropped."""

    files: tuple[str, ...]
    images: tuple[str, ...]


def write_products(
    folder: Path,
    *,
    name: str,
    pages: Callable[[], Iterable[Page]],
    joined: Callable[[], Iterable[str]],
    formats: Collection[Format],
    image_of: Callable[[int], Path | None],
) -> Products:
    """Writes what a document gives into its `folder`, where its figures are in images/.

    `name` is that of the uploaded file. `pages` gives the pages in order, each time anew; `joined` the Markdown of the
    whole in order, each piece of whole blocks. `image_of(number)` is the image of a page as it was read.

    Each file appears whole or not at all, and a second run over the same pages writes the same bytes. In memory are
    one page and one piece of Markdown. It computes: call it in a thread or process of its own.
    Raises OSError where the disk does not take it.
    """
    _write_raw(folder / RAW, pages())
    _write_texts(folder, name, joined(), formats)
    _write_layout(folder / LAYOUT, pages(), image_of)
    images = tuple(_images(folder))
    _write_archive(folder, name, images)
    _sync(folder)
    return Products(tuple(existing(folder)), images)


def existing(folder: Path) -> list[str]:
    """The products that a document has, by their names."""
    return [file for file in PRODUCTS if (folder / file).is_file()]


def raw_page(page: Page) -> dict[str, Any]:
    """A page as raw.json has it: as clients of older services know it, and then what is ours."""
    return {
        "index": page.number - 1,
        "page_number": page.number,
        "raw_text": page.raw_text,
        "markdown": page.markdown,
        "boxes": boxes_of(page),
        "image_assets": [block.asset for block in page.blocks if block.asset],
        "image_dims": {"w": page.width, "h": page.height},
        "resolution_used": page.resolution_used or None,
        "blocks": [_raw_block(block, page) for block in page.blocks],
        "source": page.source,
        "reason": page.reason,
        "warnings": page.warnings,
        "attempts": page.attempts,
        "rotation": page.rotation,
        "prompt_tokens": page.prompt_tokens,
        "completion_tokens": page.completion_tokens,
        "seconds": page.seconds,
    }


def boxes_of(page: Page) -> list[dict[str, Any]]:
    """As clients of older services know them. A line that was read with its place has no label but what it says."""
    return [{"label": block.label or block.text, "box": list(box)} for block in page.blocks for box in block.boxes]


def name_for(file: str, name: str) -> str:
    """What a client's disk may call a product of the document that was uploaded as `name`: "report.layout.pdf"."""
    ending = {RAW: ".json", LAYOUT: ".layout.pdf"}.get(file, Path(file).suffix)
    return f"{_stem(name)}{ending}"


def _stem(name: str) -> str:
    """The last part of a path without its ending: nothing in it that a file system or a shell takes for a sign."""
    last = re.split(r"[/\\]", without_controls(name))[-1]
    stem = re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", last.rpartition(".")[0] or last)
    short = stem.encode()[:LONGEST_NAME].decode(errors="ignore").strip(" .-~")
    is_device = re.fullmatch(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", short, re.I)
    return f"_{short}" if is_device else short or "document"


def _raw_block(block: Block, page: Page) -> dict[str, Any]:
    sized = page.width > 0 and page.height > 0
    return {
        "label": block.label,
        "text": block.text,
        "html": block.html,
        "asset": block.asset,
        "boxes": block.boxes,
        "shares": [as_shares(box, page.width, page.height) for box in block.boxes] if sized else [],
    }


def _write_raw(path: Path, pages: Iterable[Page]) -> None:
    with _replacing(path) as file:
        file.write(b'{"pages":[')
        for which, page in enumerate(pages):
            file.write(b",\n" if which else b"\n")
            file.write(_as_json(raw_page(page)))
        file.write(b"\n]}\n")


def _as_json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # half a surrogate pair in a model's answer, which JSON can say only by its number
        return json.dumps(value).encode("ascii")


class _Text(Protocol):
    """Takes a document as it is read: a piece of its HTML, or each of the blocks in that."""

    def add(self, block: Paragraph | Table) -> None: ...


def _write_texts(folder: Path, name: str, joined: Iterable[str], formats: Collection[Format]) -> None:
    with ExitStack() as stack:
        markdown = stack.enter_context(_replacing(folder / RESULT))
        page: _HtmlPage | None = None
        texts: list[_Text] = []
        if "html" in formats:
            page = stack.enter_context(_html_page(folder, name))
        if "docx" in formats:
            texts.append(stack.enter_context(_word_document(folder, name)))
        if "text" in formats:
            texts.append(PlainText(stack.enter_context(_replacing_text(folder / FILE_OF_FORMAT["text"]))))
        for which, piece in enumerate(joined):
            markdown.write(b"\n" if which else b"")
            markdown.write(piece.strip("\n").encode("utf-8", "replace") + b"\n")
            if page is None and not texts:
                continue
            for fragment in fragments(piece):
                if page is not None:
                    page.add(fragment)
                for block in blocks(fragment) if texts else ():
                    for text in texts:
                        text.add(block)


class _HtmlPage:
    def __init__(self, file: TextIO, folder: Path) -> None:
        self._file = file
        self._folder = folder
        self._room = MOST_BYTES_OF_FIGURES

    def add(self, fragment: str) -> None:
        at = 0
        for found in _LINKED_FIGURE.finditer(fragment):
            self._file.write(fragment[at : found.end(1)])
            self._file.write(self._inlined(found[2]))
            at = found.end()
        self._file.write(f"{fragment[at:]}\n")

    def _inlined(self, figure: str) -> str:
        path = _figure(self._folder, figure)
        size = path.stat().st_size if path is not None else 0
        if path is None or size > min(MOST_BYTES_OF_FIGURE, self._room):
            return figure
        self._room -= size
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        return f"data:image/{_FIGURE_TYPES[figure.rpartition('.')[2]]};base64,{data}"


def _head(title: str) -> str:
    return f"""<!doctype html>
<html>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file: data:; \
style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width">
<title>{html.escape(without_controls(title))}</title>
<style>{_STYLE}</style>
</head>
<body>
"""


@contextmanager
def _html_page(folder: Path, name: str) -> Iterator[_HtmlPage]:
    with _replacing_text(folder / FILE_OF_FORMAT["html"]) as file:
        file.write(_head(name))
        yield _HtmlPage(file, folder)
        file.write(_FOOT)


@contextmanager
def _word_document(folder: Path, name: str) -> Iterator[WordDocument]:
    with _replacing(folder / FILE_OF_FORMAT["docx"]) as file:
        document = WordDocument(file, name, lambda figure: _figure(folder, figure))
        try:
            yield document
            document.close()
        except BaseException:
            document.abandon()
            raise


def _figure(folder: Path, figure: str) -> Path | None:
    """The file of a figure of this document; a link by that name is none."""
    path = folder / figure
    return path if FIGURE.fullmatch(figure) and path.is_file() and not path.is_symlink() else None


def _write_layout(path: Path, pages: Iterable[Page], image_of: Callable[[int], Path | None]) -> None:
    """None for a document of no pages: no viewer opens such a PDF."""
    with _replacing(path) as file:
        count = write_layout(file, pages, image_of)
    if not count:
        path.unlink()


def _images(folder: Path) -> list[str]:
    """In the order of pages: images/page-2-img-1.jpg before images/page-10-img-1.jpg."""
    found = (f"images/{path.name}" for path in folder.glob("images/*"))
    return sorted((figure for figure in found if _figure(folder, figure)), key=_by_numbers)


def _by_numbers(figure: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", figure)]


def _write_archive(folder: Path, name: str, images: Iterable[str]) -> None:
    """result.md, raw.json and images/ under the names that clients look for, the others named after the upload.

    Without layout.pdf: it is as large as all the others, and no text but a proof of the boxes.
    """
    inside = (file for file in PRODUCTS if file not in (LAYOUT, ARCHIVE))
    named = {file: file if file in (RESULT, RAW) else name_for(file, name) for file in inside}
    with _replacing(folder / ARCHIVE) as file, zipfile.ZipFile(file, "w") as archive:
        for member, entry in (*named.items(), *((image, image) for image in images)):
            if (folder / member).is_file():
                _archive(archive, folder / member, entry)


def _archive(archive: zipfile.ZipFile, path: Path, inside: str) -> None:
    entry = zipfile.ZipInfo(inside, EPOCH)
    is_compressed = path.suffix in (".jpg", ".jpeg", ".png", ".gif", ".webp", ".pdf", ".docx")
    entry.compress_type = zipfile.ZIP_STORED if is_compressed else zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    entry.file_size = path.stat().st_size
    with path.open("rb") as source, archive.open(entry, "w") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole and on the disk."""
    unfinished = _unfinished(path)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _replacing_text(path: Path) -> Iterator[TextIO]:
    with _replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="\n")
        try:
            yield text
        finally:
            text.detach()


def _sync(folder: Path) -> None:
    """So that the new names survive a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
