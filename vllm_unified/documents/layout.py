"""layout.pdf: each page as it was read, with the boxes of its blocks drawn over it, numbered and labelled."""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import pikepdf
from PIL import Image, ImageOps

from vllm_unified.documents.page import FIGURES, RUNNING_HEADS, Page, as_shares

# Of a PDF page, in points; every page is as long as A4, so that labels are as large on all.
LONGEST_SIDE = 842.0
# Of an image as it is embedded: 150 dpi on that page. One that is larger is made smaller.
LONGEST_IMAGE = 1754
MOST_BOXES = 2000
# qpdf keeps the pages of a file that it makes in memory, and those of a file that it reads on disk.
PART_BYTES = 16 << 20
PART_PAGES = 256

FONT_SIZE = 7.0
# Courier's letters are all as wide, so that a label can be measured without the font.
LETTER = 0.6 * FONT_SIZE

Colour = tuple[float, float, float]
COLOURS: dict[str, Colour] = {
    "title": (0.80, 0.13, 0.13),
    "sub_title": (0.85, 0.35, 0.05),
    "text": (0.10, 0.35, 0.75),
    "table": (0.00, 0.48, 0.25),
    "equation": (0.45, 0.15, 0.65),
    "formula": (0.45, 0.15, 0.65),
    "list": (0.00, 0.45, 0.55),
    "image_caption": (0.70, 0.10, 0.50),
    "table_caption": (0.70, 0.10, 0.50),
    "": (0.35, 0.35, 0.35),
    **dict.fromkeys(FIGURES, (0.70, 0.40, 0.00)),
    **dict.fromkeys(RUNNING_HEADS, (0.45, 0.45, 0.45)),
}
OTHER_COLOURS: tuple[Colour, ...] = ((0.55, 0.10, 0.25), (0.15, 0.30, 0.55), (0.25, 0.45, 0.10), (0.50, 0.30, 0.10))


def write_layout(path: Path, pages: Iterable[Page], image_of: Callable[[int], Path | None]) -> int:
    """Writes a PDF to `path`; returns how many pages it has, and writes nothing for none.

    `image_of(number)` is the file of the page as it was read, upright; without one the page is white. Parts of it go
    to the folder of `path` and are removed. Memory holds one part of PART_BYTES. Raises OSError.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".layout-", dir=path.parent)))
        whole = stack.enter_context(pikepdf.new())
        for part in _write_parts(folder, pages, image_of):
            whole.pages.extend(stack.enter_context(pikepdf.open(part)).pages)
        count = len(whole.pages)
        if count:
            whole.save(path, deterministic_id=True)
        return count


def _write_parts(folder: Path, pages: Iterable[Page], image_of: Callable[[int], Path | None]) -> Iterator[Path]:
    part, size, written = pikepdf.new(), 0, 0
    for page in pages:
        size += _add_page(part, page, image_of(page.number))
        if size > PART_BYTES or len(part.pages) >= PART_PAGES:
            yield _saved(part, folder / f"{written}.pdf")
            part, size, written = pikepdf.new(), 0, written + 1
    if len(part.pages):
        yield _saved(part, folder / f"{written}.pdf")


def _saved(part: pikepdf.Pdf, path: Path) -> Path:
    part.save(path, static_id=True)
    part.close()
    return path


def _add_page(part: pikepdf.Pdf, page: Page, image: Path | None) -> int:
    """How many bytes it took."""
    picture = _picture(image) if image is not None else None
    pixels = (page.width, page.height) if page.width > 0 and page.height > 0 else None
    if pixels is None:
        pixels = (picture.width, picture.height) if picture is not None else (595, 842)
    scale = LONGEST_SIDE / max(pixels)
    # A strip of 100,000 by 10 pixels is still a page that viewers open.
    width, height = (max(36.0, side * scale) for side in pixels)
    part.add_blank_page(page_size=(width, height))
    drawn = part.pages[-1]
    drawn.Resources = pikepdf.Dictionary(
        Font=pikepdf.Dictionary(
            F=pikepdf.Dictionary(
                Type=pikepdf.Name.Font,
                Subtype=pikepdf.Name.Type1,
                BaseFont=pikepdf.Name("/Courier-Bold"),
                Encoding=pikepdf.Name.WinAnsiEncoding,
            )
        )
    )
    content = [] if picture is None else [b"q %.2f 0 0 %.2f 0 0 cm /I Do Q" % (width, height)]
    if picture is not None:
        drawn.Resources.XObject = pikepdf.Dictionary(I=_embedded(part, picture))
    content += _overlay(page, width, height)
    stream = b"\n".join(content)
    drawn.Contents = part.make_stream(stream)
    return len(stream) + (len(picture.jpeg) if picture is not None else 0)


class _Picture(NamedTuple):
    jpeg: bytes
    width: int
    height: int
    is_grey: bool


def _picture(path: Path) -> _Picture | None:
    """None for what is no image."""
    try:
        with Image.open(path) as image:
            as_it_is = image.format == "JPEG" and image.mode in ("L", "RGB") and max(image.size) <= LONGEST_IMAGE
            if as_it_is and image.getexif().get(0x0112, 1) == 1:
                return _Picture(path.read_bytes(), image.width, image.height, image.mode == "L")
            image.draft("RGB", (LONGEST_IMAGE, LONGEST_IMAGE))
            upright = ImageOps.exif_transpose(image)
            upright.thumbnail((LONGEST_IMAGE, LONGEST_IMAGE))
            jpeg = io.BytesIO()
            upright.convert("RGB").save(jpeg, "JPEG", quality=80)
            return _Picture(jpeg.getvalue(), upright.width, upright.height, is_grey=False)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _embedded(part: pikepdf.Pdf, picture: _Picture) -> pikepdf.Stream:
    return part.make_stream(
        picture.jpeg,
        Type=pikepdf.Name.XObject,
        Subtype=pikepdf.Name.Image,
        Width=picture.width,
        Height=picture.height,
        ColorSpace=pikepdf.Name.DeviceGray if picture.is_grey else pikepdf.Name.DeviceRGB,
        BitsPerComponent=8,
        Filter=pikepdf.Name.DCTDecode,
    )


def _overlay(page: Page, width: float, height: float) -> list[bytes]:
    drawn = []
    boxes = [(which, block.label, box) for which, block in enumerate(page.blocks, 1) for box in block.boxes]
    if page.width > 0 and page.height > 0:
        for which, label, box in boxes[:MOST_BOXES]:
            left, top, right, bottom = as_shares(box, page.width, page.height)
            colour = _colour_of(label)
            drawn.append(
                b"%.2f %.2f %.2f RG 1 w %.2f %.2f %.2f %.2f re S"
                % (*colour, left * width, (1 - bottom) * height, (right - left) * width, (bottom - top) * height)
            )
            drawn.append(_label(f"{which} {label}", colour, left * width, (1 - top) * height, width, height))
    notes = _notes(page, len(boxes) - MOST_BOXES)
    if notes:
        drawn.append(_label(f"page {page.number}: {'; '.join(notes)}", COLOURS["title"], 2, 2, width, height))
    return drawn


def _notes(page: Page, not_drawn: int) -> list[str]:
    notes = []
    if page.source != "model":
        notes.append("taken from its text layer" if page.source == "text_layer" else "could not be read")
    if page.reason:
        notes.append(page.reason)
    if not_drawn > 0:
        notes.append(f"{not_drawn} more boxes are not drawn")
    return notes


def _colour_of(label: str) -> Colour:
    return COLOURS.get(label) or OTHER_COLOURS[crc32(label.encode("utf-8", "replace")) % len(OTHER_COLOURS)]


def _label(text: str, colour: Colour, x: float, y: float, width: float, height: float) -> bytes:
    """White on the colour, from the left end of a box and above it, moved to where it can be read.

    The fonts that every viewer has know Western letters alone; "?" stands for others.
    """
    letters = " ".join(text.split())[: max(1, int((width - 4) / LETTER))].encode("cp1252", "replace")
    wide, high = len(letters) * LETTER + 4, FONT_SIZE + 3
    x, y = max(0.0, min(x, width - wide)), max(0.0, min(y, height - high))
    escaped = letters.replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")
    return b"%.2f %.2f %.2f rg %.2f %.2f %.2f %.2f re f BT /F %.1f Tf 1 g %.2f %.2f Td (%s) Tj ET" % (
        *colour,
        x,
        y,
        wide,
        high,
        FONT_SIZE,
        x + 2,
        y + 3,
        escaped,
    )
