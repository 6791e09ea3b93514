"""A PDF of the project's own: prose, a table over two pages, a chart, a scan that lies on its side, and Chinese.

It is drawn from the words that a reader should find in it, so that it says of each page what stands there, where, and
how DeepSeek-OCR would write that. To look at it: `python -m tests.documents.own_pdf report.pdf`.
"""

import io
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pikepdf
from fpdf import FPDF
from PIL import Image, ImageDraw, ImageFont

from tests.documents.fake_ocr import END, SHARE, colour_of

WIDTH, HEIGHT = 595, 842  # points, of every page
LEFT, RIGHT = 80, 515
PIXELS = 2  # a point, of what was scanned
SCAN, CHINESE = 5, 6  # numbers of pages

Box = tuple[int, int, int, int]
Rgb = tuple[int, int, int]
PAPER: Rgb = (244, 241, 230)
CHART: Rgb = (255, 244, 214)
BAR: Rgb = (31, 97, 141)
STAMP: Rgb = (176, 32, 32)


@dataclass(frozen=True)
class Part:
    """Of a page: the model's label, what it writes, and where it stands, in points from the top left."""

    label: str
    text: str
    boxes: tuple[Box, ...]
    rows: tuple[tuple[str, ...], ...] = ()

    @property
    def box(self) -> Box:
        return self.boxes[0]


def _part(label: str, top: int, bottom: int, text: str = "", left: int = LEFT, right: int = RIGHT) -> Part:
    return Part(label, text, ((left, top, right, bottom),))


def _table(top: int, bottom: int, head: str, rows: Sequence[tuple[str, ...]]) -> Part:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return Part("table", f"<table>{head}{body}</table>", ((LEFT, top, RIGHT, bottom),), tuple(rows))


# --- what stands on its pages ---

DISTRICTS = (
    ("Harbour", "1,204", "1,187", "9.1 %"),
    ("Old Town", "988", "991", "4.2 %"),
    ("Mill Lane", "412", "409", "3.8 %"),
    ("Castle Hill", "365", "371", "5.0 %"),
    ("Eastgate", "874", "866", "4.4 %"),
    ("Westgate", "790", "802", "4.1 %"),
    ("Northfield", "655", "640", "3.9 %"),
    ("Southfield", "702", "715", "4.7 %"),
    ("Lakeshore", "530", "548", "2.9 %"),
    ("Riverside", "611", "603", "5.3 %"),
    ("Station", "447", "452", "4.0 %"),
    ("Orchard", "298", "301", "3.1 %"),
    ("Quarry", "186", "179", "6.2 %"),
    ("Meadow", "254", "260", "3.3 %"),
    ("Chapel", "321", "318", "3.6 %"),
    ("Bridge End", "409", "415", "4.9 %"),
    ("Airfield", "577", "590", "2.5 %"),
    ("University", "836", "829", "3.0 %"),
    ("Hospital", "268", "272", "1.8 %"),
    ("Forest", "143", "139", "5.7 %"),
)
ON_FIRST = 12  # of them
HEAD = (
    '<tr><td rowspan="2">District</td><td colspan="2">Delivered</td><td rowspan="2">Lost</td></tr>'
    "<tr><td>2024</td><td>2025</td></tr>"
)
LOSSES = (("Q1", 5.1), ("Q2", 4.6), ("Q3", 4.9), ("Q4", 3.8))
HEADER = "Lakeside Water: annual report 2025"
QUARTERS = (("第一季度", "2,680", "5.1"), ("第二季度", "2,791", "4.6"), ("第三季度", "2,912", "4.9"))

PAGES: tuple[tuple[Part, ...], ...] = (
    (
        _part("header", 40, 54, HEADER),
        _part("title", 84, 112, "# Annual report 2025"),
        _part("sub_title", 134, 152, "## 1 Introduction"),
        _part(
            "text",
            168,
            212,
            "Lakeside Water supplies **212,000 people** in twenty districts. This report tells where the water came "
            "from, how much of it was delivered, and how much was lost on the way.",
        ),
        _part(
            "text",
            226,
            256,
            "The year was dry. From May to August the lake stood 38 cm below its mean, and the wells gave more than "
            "their usual share:",
        ),
        _part("text", 270, 318, "1. The lake: 52 %\n2. Wells: 41 %\n3. Springs: 7 %"),
        _part(
            "text",
            332,
            362,
            "Less water was lost than in any year since the records begin. The loss fell in every district but the",
        ),
        _part("page_number", 800, 814, "1", 290, 305),
    ),
    (
        _part("header", 40, 54, HEADER),
        _part("text", 84, 100, "harbour, where works on the quay broke a main twice."),
        _part("sub_title", 122, 140, "## 2 Supply"),
        _part("text", 156, 172, "Table 1 tells what each district got, and what was lost on the way to it."),
        _part("table_caption", 190, 206, "<center>Table 1: Water delivered, in 1,000 m³, and lost.</center>"),
        _table(216, 782, HEAD, DISTRICTS[:ON_FIRST]),
        _part("page_number", 800, 814, "2", 290, 305),
    ),
    (
        _part("header", 40, 54, HEADER),
        _table(84, 374, HEAD, DISTRICTS[ON_FIRST:]),
        _part("text", 400, 430, "Of all districts the hospital's lost least: its mains are from 2019."),
        _part("page_number", 800, 814, "3", 290, 305),
    ),
    (
        _part("header", 40, 54, HEADER),
        _part("sub_title", 84, 102, "## 3 Losses"),
        _part("text", 118, 148, "Figure 1 shows the loss by quarter. It is highest in winter, when pipes burst."),
        _part("image", 170, 420),
        _part("image_caption", 430, 446, "<center>Figure 1: Loss by quarter, in per cent.</center>"),
        _part("equation", 470, 492, "\\[ L = 1 - \\frac{D}{S} \\]", 220, 375),
        _part("text", 510, 526, "Here \\(D\\) is what was delivered, and \\(S\\) what was supplied."),
        _part("page_number", 800, 814, "4", 290, 305),
    ),
    (
        _part("title", 84, 112, "# Letter of the auditor"),
        _part(
            "text",
            140,
            200,
            "We have read the meters of all twenty districts, and found the figures of this report right.",
        ),
        _part("text", 220, 240, "Anna Brook, 3 March 2026"),
        _part("image", 300, 420, "", 380, 500),
    ),
    (
        _part("header", 40, 54, "湖滨水务：二〇二五年年度报告"),
        _part("sub_title", 84, 104, "## 4 摘要"),
        Part(
            "text",
            "湖滨水务为二十个区的二十一万二千人供水。本年度气候干旱，五月至八月湖面比平均水位低三十八厘米，因此井水的比例高于往年。"
            "漏损率为有记录以来最低，只有码头区例外。",
            ((LEFT, 124, RIGHT, 142), (LEFT, 144, RIGHT, 182)),
        ),
        _table(210, 330, "<tr><td>季度</td><td>供水量（千立方米）</td><td>漏损率（%）</td></tr>", QUARTERS),
        _part("text", 350, 370, "负责人：陈静（总工程师）"),
        _part("page_number", 800, 814, "6", 290, 305),
    ),
)


def answers() -> dict[int, str]:
    """DeepSeek-OCR's answers by the number of the page, as it writes them for "Convert the document to markdown."."""
    return {number: _answer(parts) for number, parts in enumerate(PAGES, 1)}


def _answer(parts: Sequence[Part]) -> str:
    """A table's place stands before that of its caption, and its text after that of the caption."""
    written = []
    for part, following in pairwise((*parts, Part("", "", ()))):
        if part.label == "table_caption":
            written.append(f"{_place(following)}{_place(part)}{part.text}\n\n{following.text}")
        elif not (part.rows and written[-1].endswith(part.text)):
            written.append(_place(part) + part.text)
    return "\n\n".join(written) + END


def _place(part: Part) -> str:
    boxes = [[round(999 * at / (WIDTH, HEIGHT)[side % 2]) for side, at in enumerate(box)] for box in part.boxes]
    return f"<|ref|>{part.label}<|/ref|><|det|>{boxes}<|/det|>\n"


# --- how it is drawn ---


def document() -> bytes:
    """The same bytes each time."""
    drawn = FPDF(unit="pt", format=(WIDTH, HEIGHT))
    drawn.set_creation_date(datetime(2026, 1, 2, tzinfo=UTC))
    drawn.set_auto_page_break(False)
    for number, parts in enumerate(PAGES, 1):
        if number == SCAN:
            drawn.add_page(format=(HEIGHT, WIDTH))
            drawn.image(scan().transpose(Image.Transpose.ROTATE_90), 0, 0, HEIGHT, WIDTH)
            continue
        drawn.add_page()
        if number == CHINESE:
            drawn.image(_chinese(), 0, 0, WIDTH, HEIGHT)
        else:
            _draw(drawn, number, parts)
    with pikepdf.open(io.BytesIO(bytes(drawn.output()))) as pdf:
        pdf.pages[SCAN - 1].rotate(90, relative=False)
        _add_text_layer(pdf, pdf.pages[CHINESE - 1])
        written = io.BytesIO()
        pdf.save(written, deterministic_id=True)
    return written.getvalue()


def scan() -> Image.Image:
    """The letter, upright."""
    picture = _sheet(SCAN, PAPER)
    draw = ImageDraw.Draw(picture)
    for part in PAGES[SCAN - 1]:
        left, top, right, bottom = (PIXELS * at for at in part.box)
        if part.label == "image":
            draw.ellipse((left, top, right - 1, bottom - 1), fill=STAMP)
            # So that one sees which way up it is.
            draw.rectangle((left + 80, top + 60, right - 80, top + 80), fill="white")
        else:
            size = PIXELS * (22 if part.label == "title" else 12)
            lines = "\n".join(textwrap.wrap(_words(part.text), 68))
            draw.text((left, top), lines, "black", ImageFont.load_default(size), spacing=size // 2)
    return picture


def lying_photo() -> bytes:
    """The letter as a JPEG whose pixels lie on their side, and whose EXIF says so."""
    photo = scan().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    written = io.BytesIO()
    photo.save(written, "JPEG", quality=90, exif=exif)
    return written.getvalue()


def _sheet(number: int, colour: Rgb) -> Image.Image:
    picture = Image.new("RGB", (PIXELS * WIDTH, PIXELS * HEIGHT), colour)
    side = PIXELS * WIDTH * SHARE
    ImageDraw.Draw(picture).rectangle((0, 0, side, side), fill=colour_of(number))
    return picture


def _words(text: str) -> str:
    """Without signs of Markdown and HTML."""
    for sign in ("**", "# ", "#", "<center>", "</center>", "\\[", "\\]", "\\(", "\\)"):
        text = text.replace(sign, "")
    return text.replace("\\frac{D}{S}", "D / S").strip()


def _draw(pdf: FPDF, number: int, parts: Sequence[Part]) -> None:
    pdf.set_fill_color(*colour_of(number))
    pdf.rect(0, 0, WIDTH * SHARE, WIDTH * SHARE, "F")
    for part in parts:
        left, top, right, _ = part.box
        if part.rows:
            _draw_table(pdf, part)
        elif part.label == "image":
            _draw_chart(pdf, part.box)
        else:
            size = {"title": 22, "sub_title": 15, "header": 9, "page_number": 9}.get(part.label, 11)
            pdf.set_font("Helvetica", "B" if part.label.endswith("title") else "", size)
            pdf.set_xy(left, top)
            align = "C" if part.label in ("equation", "page_number") or part.label.endswith("caption") else "L"
            pdf.multi_cell(right - left, 1.3 * size, _words(part.text), align=align)


def _draw_table(pdf: FPDF, part: Part) -> None:
    left, top, right, bottom = part.box
    columns, height = (right - left) / 4, (bottom - top) / (len(part.rows) + 2)
    pdf.set_font("Helvetica", "B", 10)
    for column, down, wide, high, text in (
        (0, 0, 1, 2, "District"),
        (1, 0, 2, 1, "Delivered"),
        (3, 0, 1, 2, "Lost"),
        (1, 1, 1, 1, "2024"),
        (2, 1, 1, 1, "2025"),
    ):
        pdf.set_xy(left + column * columns, top + down * height)
        pdf.cell(wide * columns, high * height, text, border=1, align="C")
    pdf.set_font("Helvetica", "", 10)
    for down, row in enumerate(part.rows, 2):
        for column, text in enumerate(row):
            pdf.set_xy(left + column * columns, top + down * height)
            pdf.cell(columns, height, text, border=1)


def _draw_chart(pdf: FPDF, box: Box) -> None:
    left, top, right, bottom = box
    pdf.set_fill_color(*CHART)
    pdf.rect(left, top, right - left, bottom - top, "F")
    pdf.set_font("Helvetica", "", 10)
    for which, (bar, lost) in enumerate(bars(box)):
        x, y, x2, y2 = bar
        pdf.set_fill_color(*BAR)
        pdf.rect(x, y, x2 - x, y2 - y, "F")
        pdf.set_xy(x, y - 16)
        pdf.cell(x2 - x, 14, f"{lost} %", align="C")
        pdf.set_xy(x, y2 + 4)
        pdf.cell(x2 - x, 14, LOSSES[which][0], align="C")


def bars(box: Box) -> Iterator[tuple[tuple[float, float, float, float], float]]:
    """Of the chart in this box, each with what it shows."""
    left, _, right, bottom = box
    step = (right - left) / len(LOSSES)
    for which, (_, lost) in enumerate(LOSSES):
        x = left + (which + 0.25) * step
        yield (x, bottom - 30 - 35 * lost, x + step / 2, bottom - 30), lost


def _chinese() -> Image.Image:
    """OpenCV carries the one free typeface with Chinese characters that comes with a Python package."""
    pixels = np.array(_sheet(CHINESE, (255, 255, 255)))
    font = cv2.FontFace("uni")
    for text, x, y, size in _chinese_lines():
        cv2.putText(pixels, text, (round(PIXELS * x), round(PIXELS * y)), (0, 0, 0), font, PIXELS * size)
    picture = Image.fromarray(pixels)
    (table,) = (part for part in PAGES[CHINESE - 1] if part.rows)
    left, top, right, bottom = (PIXELS * at for at in table.box)
    draw = ImageDraw.Draw(picture)
    for row in range(5):
        y = top + (bottom - top) * row // 4
        draw.line((left, y, right, y), "black")
    for column in range(4):
        x = left + (right - left) * column // 3
        draw.line((x, top, x, bottom), "black")
    return picture


def _chinese_lines() -> Iterator[tuple[str, float, float, int]]:
    """Each with where its first character stands, in points, and how large it is."""
    for part in PAGES[CHINESE - 1]:
        left, top, right, bottom = part.box
        size = {"sub_title": 15, "header": 9, "page_number": 9}.get(part.label, 12)
        if part.rows:
            head = ("季度", "供水量（千立方米）", "漏损率（%）")
            for row, cells in enumerate((head, *part.rows)):
                for column, text in enumerate(cells):
                    yield text, left + 8 + (right - left) * column / 3, top + 20 + (bottom - top) * row / 4, size
            continue
        text = _words(part.text)
        most = int((right - left) / (1.05 * size))
        for line in range(0, len(text), most):
            yield text[line : line + most], left, top + size + 20 * line // most, size


def _add_text_layer(pdf: pikepdf.Pdf, page: pikepdf.Page) -> None:
    """What the picture says, unseen: with ISO 32000-1's own Chinese font, which no file has to carry."""
    name, dictionary = pikepdf.Name, pikepdf.Dictionary
    below = dictionary(
        Type=name.Font,
        Subtype=name.CIDFontType0,
        BaseFont=name("/STSong-Light"),
        CIDSystemInfo=dictionary(Registry=b"Adobe", Ordering=b"GB1", Supplement=4),
        DW=1000,
    )
    font = dictionary(
        Type=name.Font,
        Subtype=name.Type0,
        BaseFont=name("/STSong-Light"),
        Encoding=name("/UniGB-UCS2-H"),
        DescendantFonts=pikepdf.Array([pdf.make_indirect(below)]),
    )
    written = page.add_resource(pdf.make_indirect(font), name.Font, name("/Chinese"))
    lines = (
        f"BT {written} {size} Tf 3 Tr {x:.2f} {HEIGHT - y:.2f} Td <{text.encode('utf-16-be').hex()}> Tj ET"
        for text, x, y, size in _chinese_lines()
    )
    page.contents_add(pdf.make_stream("\n".join(lines).encode()))


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(document())
