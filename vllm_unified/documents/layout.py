"""layout.pdf: each page as it was read, with the boxes of its blocks drawn over it, numbered and labelled."""

import io
import zlib
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image, ImageOps

from vllm_unified.documents.page import FIGURES, RUNNING_HEADS, Page, as_shares

# Of a PDF page, in points; every page is as long as A4, so that labels are as large on all.
LONGEST_SIDE = 842.0
# Of an image as it is embedded: 150 dpi on that page. One that is larger is made smaller.
LONGEST_IMAGE = 1754
MOST_BOXES = 2000

FONT_SIZE = 7.0
# Courier's letters are all as wide, so that a label can be measured without the font.
LETTER = 0.6 * FONT_SIZE
LABEL_HEIGHT = FONT_SIZE + 3

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


def write_layout(file: BinaryIO, pages: Iterable[Page], image_of: Callable[[int], Path | None]) -> int:
    """Writes a PDF, page by page, to an empty `file`; returns how many pages it has.

    `image_of(number)` is the file of the page as it was read, upright; without one the page is white. Memory holds one
    page, and a number for each that is written. Raises OSError.
    """
    pdf = _Pdf(file)
    for page in pages:
        image = image_of(page.number)
        _add_page(pdf, page, None if image is None else _picture(image))
    pdf.close()
    return len(pdf.pages)


class _Pdf:
    """ISO 32000-1, 7.5, as far as pages of one image and some lines need it.

    fpdf2 keeps a document's images in memory until it is saved, and so does pikepdf those of files that it merges:
    three thousand pages are more than the service may have.
    """

    CATALOG, TREE, FONT = 1, 2, 3

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets: dict[int, int] = {}
        self._last = self.FONT
        self.pages: list[int] = []
        file.write(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
        font = b"<</Type/Font/Subtype/Type1/BaseFont/Courier-Bold/Encoding/WinAnsiEncoding>>"
        self._write(self.FONT, font)

    def add(self, dictionary: bytes, stream: bytes | None = None) -> int:
        """The number of the new object. `dictionary` is what stands between its signs."""
        self._last += 1
        if stream is None:
            self._write(self._last, b"<<%s>>" % dictionary)
        else:
            head = b"<<%s/Length %d>>stream\n" % (dictionary, len(stream))
            self._write(self._last, b"%s%s\nendstream" % (head, stream))
        return self._last

    def close(self) -> None:
        kids = b" ".join(b"%d 0 R" % page for page in self.pages)
        self._write(self.TREE, b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(self.pages), kids))
        self._write(self.CATALOG, b"<</Type/Catalog/Pages %d 0 R>>" % self.TREE)
        begin = self._file.tell()
        self._file.write(b"xref\n0 %d\n0000000000 65535 f \n" % (self._last + 1))
        for number in range(1, self._last + 1):
            self._file.write(b"%010d 00000 n \n" % self._offsets[number])
        trailer = b"trailer\n<</Size %d/Root %d 0 R>>\nstartxref\n%d\n%%%%EOF\n"
        self._file.write(trailer % (self._last + 1, self.CATALOG, begin))

    def _write(self, number: int, content: bytes) -> None:
        self._offsets[number] = self._file.tell()
        self._file.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))


class _Picture(NamedTuple):
    jpeg: bytes
    width: int
    height: int
    is_grey: bool


def _add_page(pdf: _Pdf, page: Page, picture: _Picture | None) -> None:
    pixels = (page.width, page.height) if page.width > 0 and page.height > 0 else None
    if pixels is None:
        pixels = (595, 842) if picture is None else (picture.width, picture.height)
    scale = LONGEST_SIDE / max(pixels)
    # A strip of 100,000 by 10 pixels is still a page that viewers open.
    width, height = (max(36.0, side * scale) for side in pixels)
    resources = b"/Font<</F %d 0 R>>" % pdf.FONT
    content = _overlay(page, width, height)
    if picture is not None:
        content.insert(0, b"q %.2f 0 0 %.2f 0 0 cm /I Do Q" % (width, height))
        resources += b"/XObject<</I %d 0 R>>" % _add_picture(pdf, picture)
    drawn = pdf.add(b"/Filter/FlateDecode", zlib.compress(b"\n".join(content)))
    pdf.pages.append(
        pdf.add(
            b"/Type/Page/Parent %d 0 R/MediaBox[0 0 %.2f %.2f]/Resources<<%s>>/Contents %d 0 R"
            % (pdf.TREE, width, height, resources, drawn)
        )
    )


def _add_picture(pdf: _Pdf, picture: _Picture) -> int:
    return pdf.add(
        b"/Type/XObject/Subtype/Image/Width %d/Height %d/ColorSpace/%s/BitsPerComponent 8/Filter/DCTDecode"
        % (picture.width, picture.height, b"DeviceGray" if picture.is_grey else b"DeviceRGB"),
        picture.jpeg,
    )


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


def _overlay(page: Page, width: float, height: float) -> list[bytes]:
    drawn = []
    boxes = [
        (which, block.label, further, box)
        for which, block in enumerate(page.blocks, 1)
        for further, box in enumerate(block.boxes)
    ]
    if page.width > 0 and page.height > 0:
        for which, label, further, box in boxes[:MOST_BOXES]:
            left, top, right, bottom = as_shares(box, page.width, page.height)
            colour = _colour_of(label)
            drawn.append(
                b"%.2f %.2f %.2f RG 1 w %.2f %.2f %.2f %.2f re S"
                % (*colour, left * width, (1 - bottom) * height, (right - left) * width, (bottom - top) * height)
            )
            if further:  # the block's own text is above it
                x, y = left * width - _width_of(str(which)), (1 - top) * height - LABEL_HEIGHT
                drawn.append(_label(str(which), colour, x, y, width, height))
            else:
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
    return COLOURS.get(label) or OTHER_COLOURS[zlib.crc32(label.encode("utf-8", "replace")) % len(OTHER_COLOURS)]


def _width_of(letters: Sized) -> float:
    return len(letters) * LETTER + 4


def _label(text: str, colour: Colour, x: float, y: float, width: float, height: float) -> bytes:
    """White on the colour, from (x, y) to the right and up, moved to where it can be read.

    The fonts that every viewer has know Western letters alone; "?" stands for others.
    """
    letters = " ".join(text.split())[: max(1, int((width - 4) / LETTER))].encode("cp1252", "replace")
    wide = _width_of(letters)
    x, y = max(0.0, min(x, width - wide)), max(0.0, min(y, height - LABEL_HEIGHT))
    escaped = letters.replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")
    return b"%.2f %.2f %.2f rg %.2f %.2f %.2f %.2f re f BT /F %.1f Tf 1 g %.2f %.2f Td (%s) Tj ET" % (
        *colour,
        x,
        y,
        wide,
        LABEL_HEIGHT,
        FONT_SIZE,
        x + 2,
        y + 3,
        escaped,
    )
