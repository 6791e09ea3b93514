"""Answers of OCR models, whole, cut off and hostile, to blocks."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unified.documents.grounding import MOST_BOXES, grounded
from vllm_unified.documents.page import Block, Box

# A page of 999 × 1998 pixels: a model's x is a pixel, its y two.
WIDTH, HEIGHT = 999, 1998
BOX: Box = (10, 40, 500, 120)
OF_BOX = "[[10, 20, 500, 60]]"


def blocks(raw: str) -> list[Block]:
    return list(grounded(raw, WIDTH, HEIGHT).blocks)


def det(places: str, text: str = "", label: str = "text") -> str:
    return f"<|ref|>{label}<|/ref|><|det|>{places}<|/det|>{text}"


def test_a_page() -> None:
    raw = """<|ref|>title<|/ref|><|det|>[[117, 60, 396, 76]]<|/det|>
# 3.2 Results

<|ref|>image<|/ref|><|det|>[[125, 100, 866, 260]]<|/det|>
<|ref|>image_caption<|/ref|><|det|>[[115, 269, 881, 318]]<|/det|>
<center>Figure 4 | Compression.</center>

<|ref|>text<|/ref|><|det|>[[115, 342, 881, 376]]<|/det|>
The token count becomes \\(4096 / 16 = 256\\), with a < b.

<|ref|>page_number<|/ref|><|det|>[[493, 924, 506, 935]]<|/det|>
7<｜end▁of▁sentence｜>"""
    assert blocks(raw) == [
        Block("title", "# 3.2 Results", ((117, 120, 396, 152),)),
        Block("image", "", ((125, 200, 866, 520),)),
        Block("image_caption", "<center>Figure 4 | Compression.</center>", ((115, 538, 881, 636),)),
        Block("text", "The token count becomes \\(4096 / 16 = 256\\), with a < b.", ((115, 684, 881, 752),)),
        Block("page_number", "7", ((493, 1848, 506, 1870),)),
    ]
    assert grounded(raw, WIDTH, HEIGHT).warnings == ()


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("", []),
        ("Plain.\n\nText.<|im_end|>", [Block(text="Plain.\n\nText.")]),
        (f"Before.\n{det(OF_BOX, 'A.')}", [Block(text="Before."), Block("text", "A.", (BOX,))]),
        (det(OF_BOX, "第一段。", "文本"), [Block("文本", "第一段。", (BOX,))]),
        (det("[[10,20,500,60]]", "A.", " Sub_Title "), [Block("sub_title", "A.", (BOX,))]),
        # In "OCR this image" the label is the text, and for "Locate" it is the term.
        (
            det(OF_BOX, "\n", "Invoice 12") + det(OF_BOX, "", "合计"),
            [Block("", each, (BOX,)) for each in ("Invoice 12", "合计")],
        ),
        (det(OF_BOX, "", "Table"), [Block("", "Table", (BOX,))]),
        (det(OF_BOX, "Rest.", "x" * 65), [Block("", "x" * 65 + "\nRest.", (BOX,))]),
        # A model names a figure's text too: it is a block of its own.
        (det(OF_BOX, "5 kg", "image"), [Block("image", "", (BOX,)), Block("text", "5 kg")]),
        # Several places of one block, each in a tag of its own.
        (
            f"<|ref|>text<|/ref|><|det|>{OF_BOX}<|/det|><|det|>[[0, 0, 9, 9]]<|/det|>\nA.",
            [Block("text", "A.", (BOX, (0, 0, 9, 18)))],
        ),
        (det(OF_BOX, "7", "number"), [Block("number", "7", (BOX,))]),
        (det(OF_BOX, "", "number"), [Block("", "number", (BOX,))]),
        (det(OF_BOX, "", "page_number"), [Block("page_number", "", (BOX,))]),
        # Models that write the label into the place.
        (
            f"<|det|>title {OF_BOX}<|/det|>A<|det|>text {OF_BOX}<|/det|>B",
            [Block("title", "A", (BOX,)), Block("text", "B", (BOX,))],
        ),
    ],
)
def test_blocks(raw: str, wanted: list[Block]) -> None:
    assert blocks(raw) == wanted


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ("[10,20,500,60]", [BOX]),
        ("[[[10, 20, 500, 60]]]", [BOX]),
        ("[[10.0, 20.2, 500, 60]]", [BOX]),
        ("[[500, 60, 10, 20]]", [BOX]),
        ("[[10, 60, 500, 20]]", [BOX]),
        ("[[10, 20], [500, 60]]", [BOX]),
        ("(10,20),(500,60)", [BOX]),
        ("(10,20) (500,60)", [BOX]),
        ("（１０，２０），（５００，６０）", [BOX]),
        ("[[10, 20], [500, 60], [0, 0], [999, 999]]", [BOX, (0, 0, WIDTH, HEIGHT)]),
        ("［［１０，２０，５００，６０］］", [BOX]),
        ("【【10、20、500、60】】", [BOX]),
        ("〈〈10，20，500，60〉〉", [BOX]),
        ("[[10, 20, 500, 60], [0, 0, 999, 999]]", [BOX, (0, 0, WIDTH, HEIGHT)]),
        ("[10, 20, 500, 60, 0, 0, 999, 999]", [BOX, (0, 0, WIDTH, HEIGHT)]),
        ("[[-5, 0, 1000, 99999999]]", [(0, 0, WIDTH, HEIGHT)]),
        ("[[10, 20, 500, 60", [BOX]),
        ("[10, 20, 500, 60]]", [BOX]),
    ],
)
def test_places(places: str, wanted: list[Box]) -> None:
    found = grounded(det(places, "Text."), WIDTH, HEIGHT)
    assert found.blocks == (Block("text", "Text.", tuple(wanted)),)
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("places", "warning"),
    [
        ("[[10, 20, 10, 60]]", "boxes without an area, left out: 1"),
        ("[[1000, 20, 1200, 60], [0, 5, 9, 5]]", "boxes without an area, left out: 2"),
        ("[[10, 20, 500]]", "places that are no boxes, left out: 1"),
        ("[[10, 20]]", "places that are no boxes, left out: 1"),
        ("[[nan, inf, 1e9, 0x10]]", "places that are no boxes, left out: 1"),
        ("[[10, 20, 500, sixty]]", "places that are no boxes, left out: 1"),
    ],
)
def test_places_that_are_no_boxes(places: str, warning: str) -> None:
    found = grounded(det(places, "Text."), WIDTH, HEIGHT)
    assert found.blocks == (Block("text", "Text."),)
    assert found.warnings == (warning,)


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    assert blocks(det(f"[[{code}]]", "Text.")) == [Block("text", "Text.")]
    assert not mark.exists()


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("<|ref|>text<|/ref|><|det|>[[10,20,500,60]]A.", [Block("text", "A.", (BOX,))]),
        ("<|ref|>text<|/ref|><|det|>[[10,20,500,60\n2019 was", [Block("text", "2019 was", (BOX,))]),
        ("<|ref|>text<|/ref|> <|det|> [[10,20,500,60]]<|/det|>A", [Block("text", "A", (BOX,))]),
        ("<|ref|>text<|det|>[[10,20,500,60]]<|/det|>A", [Block("text", "A", (BOX,))]),
        ("<|ref|>text<|/ref|>A", [Block("text", "A")]),
        ("<|ref|>A line that is never closed", [Block("", "A line that is never closed")]),
        ("<|ref|>text<|/ref|><|det|>A text, no place", [Block("text", "A text, no place")]),
        (
            "＜｜ref｜＞标题＜｜/ref｜＞<｜det｜>［［１０，２０，５００，６０］］<｜/det｜>一",
            [Block("标题", "一", (BOX,))],
        ),
        ("＜｜ref｜＞text＜｜/ref｜＞＜｜det｜＞［［１０，２０，５００，６０］］一", [Block("text", "一", (BOX,))]),
        ("＜｜ref｜＞text＜｜det｜＞［［１０，２０，５００，６０］", [Block("text", "", (BOX,))]),
    ],
)
def test_tags_that_are_not_closed(raw: str, wanted: list[Block]) -> None:
    assert blocks(raw) == wanted


def test_an_answer_cut_off_anywhere_keeps_what_it_had() -> None:
    raw = det(OF_BOX, "First.\n") + det("[[480, 270, 860, 930]]", "Second.", "table_footnote")
    end_of_first = raw.index("First.") + len("First.")
    for end in range(end_of_first, len(raw)):
        first, *others = blocks(raw[:end])
        assert first == Block("text", "First.", (BOX,))
        assert all(
            block.text in ("", "Second.") or "Second.".startswith(block.text) or not block.boxes for block in others
        )
        assert all(box == (480, 540, 860, 1860) for block in others for box in block.boxes)


@pytest.mark.parametrize(
    "text",
    [
        "xs <| map f |> ys",
        "⟨ψ| is <|x|>",
        "a <| b",
        "if a < b | c > d",
        "<ref>4</ref>",
        "[[1, 2, 3, 4]]",
        "see [1]",
        "a |<| b",
    ],
)
def test_text_that_looks_like_a_tag_stays(text: str) -> None:
    assert blocks(det(OF_BOX, text)) == [Block("text", text, (BOX,))]
    assert blocks(f"{text} too") == [Block("", f"{text} too")]


def test_text_between_boxes_stays() -> None:
    raw = "".join(det(OF_BOX, f"\nBlock {number}.\n\n") for number in range(50))
    assert [block.text for block in blocks(raw)] == [f"Block {number}." for number in range(50)]


CUT = "<table><tr><td>cut"
TABLE = '<table><tr><td rowspan="2">a</td></tr></table>'


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (det(OF_BOX, f"\n{TABLE}\n", "table"), [Block("table", TABLE, (BOX,), TABLE)]),
        # DeepSeek-OCR: the table's place, its caption's, the caption, the table.
        (
            det(OF_BOX, "\n", "table") + det("[[1, 2, 3, 4]]", f"\nTable 1. Results.\n\n{TABLE}", "table_caption"),
            [Block("table_caption", "Table 1. Results.", ((1, 4, 3, 8),)), Block("table", TABLE, (BOX,), TABLE)],
        ),
        (
            det(OF_BOX, f"表1\n{TABLE}\n注：无", "table"),
            [Block("text", "表1"), Block("table", TABLE, (BOX,), TABLE), Block("text", "注：无")],
        ),
        (f"Before\n\n{TABLE}\n\nafter", [Block("", "Before"), Block("table", TABLE, (), TABLE), Block("", "after")]),
        ("<table><tr><td>cut", [Block("table", "<table><tr><td>cut", (), "<table><tr><td>cut")]),
        ("<table><tr><td>cut</td><td rows", [Block("table", f"{CUT}</td>", (), f"{CUT}</td>")]),
        ("The tag <table> begins one.", [Block("", "The tag <table> begins one.")]),
    ],
)
def test_tables(raw: str, wanted: list[Block]) -> None:
    assert blocks(raw) == wanted


def test_boxes_are_limited_and_text_is_kept() -> None:
    raw = det(f"[{'[1,2,300,400],' * (MOST_BOXES + 1)}]", "One.") + det(OF_BOX, "Two.")
    found = grounded(raw, WIDTH, HEIGHT)
    assert [(block.text, len(block.boxes)) for block in found.blocks] == [("One.", MOST_BOXES), ("Two.", 0)]
    assert found.warnings == (f"more than {MOST_BOXES} boxes: the others are left out, their text is kept",)


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<|ref|>",
                "<|/ref|>",
                "<|det|>",
                "<|/det|>",
                "[[",
                "]]",
                "1,2,3,4",
                "［",
                "text",
                " ",
                "<",
                "|>",
                "<table>",
                "<td>",
                "</table>",
                "图",
            ]
        ),
        max_size=30,
    )
)
def test_any_answer_has_boxes_within_the_image(parts: list[str]) -> None:
    for block in blocks("".join(parts)):
        assert block.text == block.text.strip()
        for x1, y1, x2, y2 in block.boxes:
            assert 0 <= x1 < x2 <= WIDTH
            assert 0 <= y1 < y2 <= HEIGHT


HOSTILE = {
    "open refs": "<|ref|>",
    "open dets": "<|det|> ",
    "refs and dets": "<|ref|>a<|/ref|><|det|>",
    "blocks": "<|ref|>text<|/ref|><|det|>[[1,2,30,40]]<|/det|>abc",
    "half tags": "<|ref",
    "brackets": "[",
    "boxes": "[1,2,300,400],",
    "digits": "9",
    "tables": "<table>",
    "full width": "〈｜",
}


@pytest.mark.parametrize("before", ["", "<|ref|>text<|/ref|><|det|>[["])
@pytest.mark.parametrize("part", HOSTILE.values(), ids=HOSTILE)
def test_time_is_linear(before: str, part: str) -> None:
    def seconds(size: int) -> float:
        raw = before + part * (size // len(part))
        begun = time.process_time()
        grounded(raw, WIDTH, HEIGHT)
        return time.process_time() - begun

    once, twice = (min(seconds(size) for _ in range(2)) for size in (30_000, 60_000))
    assert twice < 4 * max(once, 0.005)
