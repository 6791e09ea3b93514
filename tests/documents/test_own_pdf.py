"""A document of the project's own through the service: every product of it is what stands on its pages."""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import docx
import httpx
import lxml.html  # type: ignore[import-untyped]
import pypdfium2
import pytest
from docx.table import Table
from PIL import Image

from tests.documents import own_pdf
from tests.documents.conftest import Served
from tests.documents.fake_ocr import FakeOcr
from tests.documents.own_pdf import CHART, DISTRICTS, HEAD, PAGES, PAPER, QUARTERS, STAMP

PIXELS = 2  # a point, at the 144 dpi that pages are drawn with
BODY = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in DISTRICTS)
CHART_FILE, STAMP_FILE = "images/page-4-img-1.jpg", "images/page-5-img-1.jpg"
LETTER = f"""# Letter of the auditor

We have read the meters of all twenty districts, and found the figures of this report right.

Anna Brook, 3 March 2026

![]({STAMP_FILE})
"""
RESULT = f"""<!-- page 1 -->

# Annual report 2025

## 1 Introduction

Lakeside Water supplies **212,000 people** in twenty districts. This report tells where the water came from, how much \
of it was delivered, and how much was lost on the way.

The year was dry. From May to August the lake stood 38 cm below its mean, and the wells gave more than their usual \
share:

1. The lake: 52 %
2. Wells: 41 %
3. Springs: 7 %

Less water was lost than in any year since the records begin. The loss fell in every district but the harbour, where \
works on the quay broke a main twice.

<!-- page 2 -->

## 2 Supply

Table 1 tells what each district got, and what was lost on the way to it.

<center>Table 1: Water delivered, in 1,000 m³, and lost.</center>

<table>{HEAD}{BODY}</table>

<!-- page 3 -->

Of all districts the hospital's lost least: its mains are from 2019.

<!-- page 4 -->

## 3 Losses

Figure 1 shows the loss by quarter. It is highest in winter, when pipes burst.

![]({CHART_FILE})

<center>Figure 1: Loss by quarter, in per cent.</center>

\\[ L = 1 - \\frac{{D}}{{S}} \\]

Here \\(D\\) is what was delivered, and \\(S\\) what was supplied.

<!-- page 5 -->

{LETTER}
<!-- page 6 -->

## 4 摘要

湖滨水务为二十个区的二十一万二千人供水。本年度气候干旱，五月至八月湖面比平均水位低三十八厘米，因此井水的比例高于往年。\
漏损率为有记录以来最低，只有码头区例外。

<table><tr><td>季度</td><td>供水量（千立方米）</td><td>漏损率（%）</td></tr><tr><td>第一季度</td><td>2,680</td><td>5.1</td></tr>\
<tr><td>第二季度</td><td>2,791</td><td>4.6</td></tr><tr><td>第三季度</td><td>2,912</td><td>4.9</td></tr></table>

负责人：陈静（总工程师）
"""
GRID = [["District", "Delivered", "Delivered", "Lost"], ["District", "2024", "2025", "Lost"], *map(list, DISTRICTS)]
CHINESE_GRID = [["季度", "供水量（千立方米）", "漏损率（%）"], *map(list, QUARTERS)]
# What stands on the pages in order, but for their running heads, without signs of Markdown.
WORDS: tuple[tuple[str, Any], ...] = (
    ("h1", "Annual report 2025"),
    ("h2", "1 Introduction"),
    (
        "p",
        "Lakeside Water supplies 212,000 people in twenty districts. This report tells where the water came from, "
        "how much of it was delivered, and how much was lost on the way.",
    ),
    (
        "p",
        "The year was dry. From May to August the lake stood 38 cm below its mean, and the wells gave more than their "
        "usual share:",
    ),
    ("li", "The lake: 52 %"),
    ("li", "Wells: 41 %"),
    ("li", "Springs: 7 %"),
    (
        "p",
        "Less water was lost than in any year since the records begin. The loss fell in every district but the "
        "harbour, where works on the quay broke a main twice.",
    ),
    ("h2", "2 Supply"),
    ("p", "Table 1 tells what each district got, and what was lost on the way to it."),
    ("center", "Table 1: Water delivered, in 1,000 m³, and lost."),
    ("table", GRID),
    ("p", "Of all districts the hospital's lost least: its mains are from 2019."),
    ("h2", "3 Losses"),
    ("p", "Figure 1 shows the loss by quarter. It is highest in winter, when pipes burst."),
    ("img", CHART_FILE),
    ("center", "Figure 1: Loss by quarter, in per cent."),
    ("p", "\\[ L = 1 - \\frac{D}{S} \\]"),
    ("p", "Here \\(D\\) is what was delivered, and \\(S\\) what was supplied."),
    ("h1", "Letter of the auditor"),
    ("p", "We have read the meters of all twenty districts, and found the figures of this report right."),
    ("p", "Anna Brook, 3 March 2026"),
    ("img", STAMP_FILE),
    ("h2", "4 摘要"),
    (
        "p",
        "湖滨水务为二十个区的二十一万二千人供水。本年度气候干旱，五月至八月湖面比平均水位低三十八厘米，因此井水的比例高于往年。"
        "漏损率为有记录以来最低，只有码头区例外。",
    ),
    ("table", CHINESE_GRID),
    ("p", "负责人：陈静（总工程师）"),
)
NAME = "Lakeside 报告.pdf"


@dataclass(frozen=True)
class Read:
    """A document that was read, and its files as a client downloads them."""

    task: dict[str, Any]
    files: dict[str, bytes]


def read(client: httpx.Client, **fields: str) -> Read:
    sent = {"files": {"pdf": (NAME, own_pdf.document())}, "data": {"formats": "html,docx,text", **fields}}
    task = client.post("/api/ocr/pdf", params={"wait": 120}, **sent).raise_for_status().json()  # type: ignore[arg-type]
    assert task["status"] == "succeeded", task
    return Read(task, downloads(client, task))


def downloads(client: httpx.Client, task: dict[str, Any]) -> dict[str, bytes]:
    result = task["result"]
    urls = [*result["product_urls"].values(), *result["image_urls"]]
    return {url.partition("/download/")[2]: client.get(url).raise_for_status().content for url in urls}


@pytest.fixture(scope="module")
def dropped(served: Served, ocr: FakeOcr) -> Iterator[Read]:
    """As a model reads it that makes no mistake, without its running heads."""
    ocr.behave(model="deepseek-ocr", texts=own_pdf.answers())
    with served.client() as client:
        yield read(client, running_heads="drop")


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def is_near(found: Any, wanted: tuple[int, int, int]) -> bool:
    return all(abs(each - other) <= 12 for each, other in zip(found, wanted, strict=True))


def test_it_is_drawn_the_same_each_time() -> None:
    assert own_pdf.document() == own_pdf.document()


def test_every_page_was_read_at_once(dropped: Read) -> None:
    assert dropped.task["fallback_pages"] == []
    pages = json.loads(dropped.files["raw.json"])["pages"]
    assert [(page["attempts"], page["warnings"], page["source"]) for page in pages] == [(1, [], "model")] * 6


def test_result_md(dropped: Read) -> None:
    assert dropped.files["result.md"].decode() == RESULT


def test_running_heads_are_kept_where_they_stood(client: httpx.Client, ocr: FakeOcr, dropped: Read) -> None:
    ocr.behave(model="deepseek-ocr", texts=own_pdf.answers())
    kept = read(client, running_heads="keep").files["result.md"].decode()
    heads = [part.text for parts in PAGES for part in parts if part.label in ("header", "page_number")]
    paragraphs = kept.rstrip("\n").split("\n\n")
    assert [each for each in paragraphs if each in heads] == heads
    assert "\n\n".join(each for each in paragraphs if each not in heads) + "\n" == RESULT


def test_a_model_that_gives_neither_places_nor_labels(client: httpx.Client, ocr: FakeOcr) -> None:
    """It is the same document without its figures; and of a head that stands there once nothing says what it is."""
    ocr.behave(model="deepseek-ocr", texts=own_pdf.answers())
    wanted = RESULT.replace(f"![]({CHART_FILE})\n\n", "").replace(f"![]({STAMP_FILE})\n\n", "")
    wanted = wanted.replace("<!-- page 6 -->\n\n", f"<!-- page 6 -->\n\n{PAGES[5][0].text}\n\n")
    assert read(client, running_heads="drop", profile="plain").files["result.md"].decode() == wanted


def test_raw_json(dropped: Read) -> None:
    pages = json.loads(dropped.files["raw.json"])["pages"]
    answers = own_pdf.answers()
    for page, parts in zip(pages, PAGES, strict=True):
        assert page["raw_text"] == answers[page["page_number"]]
        assert page["image_dims"] == {"w": PIXELS * own_pdf.WIDTH, "h": PIXELS * own_pdf.HEIGHT}
        assert [block["label"] for block in page["blocks"]] == [part.label for part in parts]
        assert [block["text"] for block in page["blocks"]] == [part.text for part in parts]
        assert [block["html"] for block in page["blocks"]] == [part.text if part.rows else "" for part in parts]
        for block, part in zip(page["blocks"], parts, strict=True):
            wanted = [[PIXELS * at for at in box] for box in part.boxes]
            # The model's thousandths are one or two pixels of this page.
            assert block["boxes"] == [pytest.approx(box, abs=1.5) for box in wanted]
            sides = (own_pdf.WIDTH, own_pdf.HEIGHT) * 2
            shares = [[at / side for at, side in zip(box, sides, strict=True)] for box in part.boxes]
            assert block["shares"] == [pytest.approx(box, abs=0.001) for box in shares]
        assert page["boxes"] == [
            {"label": block["label"], "box": box} for block in page["blocks"] for box in block["boxes"]
        ]
    assert [page["image_assets"] for page in pages] == [[], [], [], [CHART_FILE], [STAMP_FILE], []]


def test_the_chart_is_cut_out(dropped: Read) -> None:
    chart = opened(dropped.files[CHART_FILE])
    (part,) = (part for part in PAGES[3] if part.label == "image")
    left, top, right, bottom = part.box
    assert chart.size == pytest.approx((PIXELS * (right - left), PIXELS * (bottom - top)), abs=2)
    for corner in ((3, 3), (chart.width - 4, 3), (3, chart.height - 4), (chart.width - 4, chart.height - 4)):
        assert is_near(chart.getpixel(corner), CHART)
    for (x, y, x2, y2), _ in own_pdf.bars(part.box):
        middle = PIXELS * (x + x2) / 2 - PIXELS * left
        assert is_near(chart.getpixel((int(middle), int(PIXELS * (y2 - top) - 8))), own_pdf.BAR)
        assert is_near(chart.getpixel((int(middle), int(PIXELS * (y - top) + 8))), own_pdf.BAR)
        assert is_near(chart.getpixel((int(middle), int(PIXELS * (y - top) - 40))), CHART)


def test_the_figure_of_the_scan_is_upright(dropped: Read) -> None:
    stamp = opened(dropped.files[STAMP_FILE])
    assert stamp.size == pytest.approx((240, 240), abs=2)
    assert is_near(stamp.getpixel((4, 4)), PAPER)
    assert is_near(stamp.getpixel((120, 70)), (255, 255, 255))
    assert is_near(stamp.getpixel((120, 170)), STAMP)


def test_a_photo_whose_exif_says_how_it_lies(client: httpx.Client, ocr: FakeOcr) -> None:
    ocr.behave(model="deepseek-ocr", texts=own_pdf.answers())
    answer = client.post("/api/ocr/image", files={"image": ("letter.jpg", own_pdf.lying_photo())})
    document = answer.raise_for_status().json()
    assert document["text"].strip() == LETTER.replace("page-5", "page-1").strip()
    assert document["image_dims"] == {"w": 1190, "h": 1684}
    assert ocr.seen["requests"][0]["rotation"] == 0
    assert document["boxes"][-1] == {"label": "image", "box": pytest.approx([760, 600, 1000, 840], abs=1.5)}


def test_layout_pdf_draws_the_boxes_where_the_parts_stand(dropped: Read) -> None:
    layout = pypdfium2.PdfDocument(dropped.files["layout.pdf"])
    source = pypdfium2.PdfDocument(own_pdf.document())
    try:
        assert len(layout) == 6
        for number, parts in enumerate(PAGES):
            page = layout[number]
            assert page.get_size() == pytest.approx((own_pdf.WIDTH, own_pdf.HEIGHT))
            shown, plain = (each.render(scale=PIXELS).to_pil().convert("RGB") for each in (page, source[number]))
            said = page.get_textpage().get_text_range()
            for which, part in enumerate(parts, 1):
                assert f"{which} {part.label}" in said
                for left, top, _, bottom in part.boxes:
                    y = PIXELS * (top + bottom) // 2
                    edge = [(x, y) for x in range(PIXELS * left - 3, PIXELS * left + 4)]
                    assert any(not _is_same(shown, plain, at) for at in edge), (number + 1, which, part.label)
            # Between the parts it is the page itself, upright.
            assert _is_same(shown, plain, (1100, 1400))
            assert _is_same(shown, plain, (20, 20))
    finally:
        layout.close()
        source.close()


def _is_same(shown: Image.Image, plain: Image.Image, at: tuple[int, int]) -> bool:
    return is_near(shown.getpixel(at), plain.getpixel(at))  # type: ignore[arg-type]


def test_result_html(dropped: Read) -> None:
    root = lxml.html.document_fromstring(dropped.files["result.html"].decode())
    assert root.xpath("string(//title)") == NAME
    assert [words for element in root.body for words in _html_words(element)] == list(_with_sources(root))


def _html_words(element: Any) -> Iterator[tuple[str, Any]]:
    if element.tag == "ol":
        yield from (("li", item.text_content()) for item in element)
    elif element.tag == "table":
        yield "table", _spread(element)
    elif image := element.xpath("./img"):
        yield "img", image[0].get("src")
    else:
        yield "center" if element.get("align") == "center" else element.tag, element.text_content()


def _spread(table: Any) -> list[list[str]]:
    """A table's texts, those of a cell in each of the places that it takes."""
    rows = table.xpath(".//tr")
    grid: list[dict[int, str]] = [{} for _ in rows]
    for down, row in enumerate(rows):
        for cell in row:
            column = next(at for at in range(100) if at not in grid[down])
            for y in range(int(cell.get("rowspan", 1))):
                for x in range(int(cell.get("colspan", 1))):
                    grid[down + y][column + x] = cell.text_content()
    return [[row[at] for at in sorted(row)] for row in grid]


def _with_sources(root: Any) -> Iterator[tuple[str, Any]]:
    """The figures stand in the page itself."""
    sources = iter(root.xpath("//img/@src"))
    for kind, words in WORDS:
        if kind == "img":
            words = next(sources)
            assert words.startswith("data:image/jpeg;base64,")
        yield kind, words


def test_result_docx(dropped: Read) -> None:
    document = docx.Document(io.BytesIO(dropped.files["result.docx"]))
    found: list[tuple[str, Any]] = []
    for block in document.iter_inner_content():
        if isinstance(block, Table):
            found.append(("table", [[cell.text for cell in row.cells] for row in block.rows]))
        elif block._p.xpath(".//pic:pic"):
            found.append(("img", ""))
        elif block.text:
            assert block.style is not None
            tag = {"Heading 1": "h1", "Heading 2": "h2", "List Paragraph": "li", "Normal": "p"}[str(block.style.name)]
            found.append(("center" if block.alignment == 1 else tag, block.text))
    assert found == [(kind, "" if kind == "img" else words) for kind, words in WORDS]
    # As large as they are on the page: 435 and 120 points.
    assert [round(shape.width.pt) for shape in document.inline_shapes] == pytest.approx([435, 120], abs=1)
    assert document.styles.element.xpath("./w:docDefaults//w:lang/@w:eastAsia") == ["zh-CN"]


def test_result_txt(dropped: Read) -> None:
    text = dropped.files["result.txt"].decode()
    rows = [f"{name:<11}  {before:<5}  {after:<5}  {lost}" for name, before, after, lost in DISTRICTS]
    table = ["District     Delivered     Lost", "             2024   2025", *rows]
    chinese = [
        "季度      供水量（千立方米）  漏损率（%）",
        *(f"{name}  {water:<18}  {lost}" for name, water, lost in QUARTERS),
    ]
    tables = {id(GRID): table, id(CHINESE_GRID): chinese}
    paragraphs: list[str] = []
    items = 0
    for kind, words in WORDS:
        if kind == "li":
            items += 1
            written = f"{items}. {words}"
        elif kind == "table":
            written = "\n".join(tables[id(words)])
        else:
            written = f"[{words}]" if kind == "img" else words
        if kind == "li" and items > 1:
            paragraphs[-1] += f"\n{written}"
        else:
            paragraphs.append(written)
    assert text == "\n\n".join(paragraphs) + "\n"


def test_result_zip(dropped: Read) -> None:
    with zipfile.ZipFile(io.BytesIO(dropped.files["result.zip"])) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    stem = NAME.removesuffix(".pdf")
    assert inside == {
        "result.md": dropped.files["result.md"],
        "raw.json": dropped.files["raw.json"],
        f"{stem}.html": dropped.files["result.html"],
        f"{stem}.docx": dropped.files["result.docx"],
        f"{stem}.txt": dropped.files["result.txt"],
        CHART_FILE: dropped.files[CHART_FILE],
        STAMP_FILE: dropped.files[STAMP_FILE],
    }


def test_what_goes_wrong_costs_its_own_page_and_is_mended_by_a_retry(client: httpx.Client, ocr: FakeOcr) -> None:
    cues = {
        "1": ["loop"],
        "2": ["malformed", "500"],
        "3": ["truncate"] * 4,
        "4": ["500"] * 4,
        "5": ["empty", "loop", "empty", "noise"],
        "6": ["refusal"] * 4,
    }
    ocr.behave(model="deepseek-ocr", texts=own_pdf.answers(), pages=cues)
    first = read(client, running_heads="drop")
    assert first.task["fallback_pages"] == [
        {"page": 4, "reason": "the engine answered 500: fake OCR: 500 as asked"},
        {"page": 6, "reason": "the model's answer reads as if the model refused"},
    ]
    pages = {page["page_number"]: page for page in json.loads(first.files["raw.json"])["pages"]}
    assert list(pages) == [1, 2, 3, 4, 5, 6]
    assert {number: page["source"] for number, page in pages.items() if page["source"] != "model"} == {
        4: "text_layer",
        6: "text_layer",
    }
    assert pages[1]["warnings"] == []
    assert pages[3]["warnings"] == ["the answer was cut off where the model's context ends"]
    assert pages[5]["warnings"] == ["the answer repeats itself at its end, which was left out"]
    markdown = first.files["result.md"].decode()
    assert "every district but the harbour, where works on the quay broke a main twice." in markdown
    # Of the table that was cut off each row that was read, and nothing that is half a row's beginning.
    assert "<tr><td>University</td><td>836</td><td>829</td><td>3.0 %</td></tr></table>" in markdown
    assert "湖滨水务为二十个区的二十一万二千人供水。" in markdown
    assert own_pdf.HEADER not in markdown
    assert markdown.count("This sentence comes again and again.") == 1

    ocr.behave(model="deepseek-ocr", texts=own_pdf.answers())
    task_id = first.task["task_id"]
    assert client.post(f"/api/tasks/{task_id}/retry").status_code == 202
    task = client.get(f"/api/tasks/{task_id}", params={"wait": 120}).json()
    assert (task["status"], task["fallback_pages"], ocr.seen["pages"]) == ("succeeded", [], {"4": 1, "6": 1})
    mended = downloads(client, task)
    _, chart, _, chinese = RESULT.rsplit("<!-- page ", 3)
    assert f"<!-- page {chart}<!-- page 5 -->" in mended["result.md"].decode()
    assert mended["result.md"].decode().endswith(f"<!-- page {chinese}")
    assert mended[CHART_FILE]
