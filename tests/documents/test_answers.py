import json
import time
from typing import Any

import msgspec
import pytest

from vllm_unified.documents.answers import noise_in, paragraphs, understood
from vllm_unified.documents.page import Block
from vllm_unified.documents.profiles import Form


class Found(msgspec.Struct, frozen=True):
    blocks: tuple[Block, ...] = ()
    warnings: tuple[str, ...] = ()


def nothing(answer: str, width: int, height: int) -> Found:
    return Found()


# --- Markdown ---


@pytest.mark.parametrize(
    ("markdown", "blocks"),
    [
        ("", ()),
        ("# Title\n\nOne\ntwo.\n\n\nThree.", (("title", "# Title"), ("text", "One\ntwo."), ("text", "Three."))),
        ("```markdown\n# Title\n\nText.\n```", (("title", "# Title"), ("text", "Text."))),
        ("```markdown\nNever closed.", (("text", "Never closed."),)),
        ("Code:\n\n```\na\n\nb\n```\n\nEnd.", (("text", "Code:"), ("text", "```\na\n\nb\n```"), ("text", "End."))),
        ("<table>\n\n<tr></tr>\n\n</table>\n\nEnd.", (("table", "<table>\n\n<tr></tr>\n\n</table>"), ("text", "End."))),
        ("| a |\n|---|\n| b |", (("table", "| a |\n|---|\n| b |"),)),
        ("Said.<|im_end|><｜end▁of▁sentence｜>", (("text", "Said."),)),
        ("p <|> q", (("text", "p <|> q"),)),
    ],
)
def test_paragraphs(markdown: str, blocks: tuple[tuple[str, str], ...]) -> None:
    assert tuple((block.label, block.text) for block in paragraphs(markdown)) == blocks


@pytest.mark.parametrize(
    ("answer", "noise"),
    [("", 0.0), ("text", 0.0), ("<|ref|>text<|/ref|>", 0.0), ("<|im_end|>", 1.0), ("1234567890<|im_end|>", 0.5)],
)
def test_noise(answer: str, noise: float) -> None:
    assert noise_in(answer) == noise


# --- grounding ---


@pytest.mark.parametrize(
    ("answer", "found", "malformed", "markdown"),
    [
        ("Free text.", Found(), "", "Free text."),
        ("<|ref|>text<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>\nA", Found((Block("text", "A", ((1, 2, 3, 4),)),)), "", "A"),
        (
            "<|ref|>text<|/ref|><|det|>[[1, 2, x]]<|/det|>\nA",
            Found((Block("text", "A"),), ("no box",)),
            "has 1 places, of which 0 are boxes",
            "A",
        ),
        ("<|ref|>text", Found((Block("", "text"),)), "has 0 places, of which 0 are boxes", "text"),
    ],
)
def test_grounding_is_left_to_its_parser(answer: str, found: Found, malformed: str, markdown: str) -> None:
    page = understood(answer, "grounding", 100, 200, lambda *_: found)
    assert (page.malformed, page.markdown, page.warnings) == (malformed, markdown, found.warnings)


# --- OCRFlux ---


def ocrflux(text: str | None, **fields: Any) -> str:
    page = {"primary_language": "en", "is_rotation_valid": True, "rotation_correction": 0, "is_table": False}
    return json.dumps({**page, "is_diagram": False, "natural_text": text, **fields})


@pytest.mark.parametrize(
    ("answer", "markdown", "malformed"),
    [
        (ocrflux("# Title\n\nText."), "# Title\n\nText.", False),
        (f"```json\n{ocrflux('Text.')}\n```", "Text.", False),
        (ocrflux(None), "", False),
        (ocrflux("No\x00 control\ud83d"), "No control?", False),
        (ocrflux("One\nline").replace("\\n", "\n"), "One\nline", False),
        ('{"primary_language": "en", "natural_text": "Half a sen', "Half a sen", True),
        ('{"natural_text": "A \\"quoted\\" word and \\u4f6', 'A "quoted" word and', True),
        ('{"natural_text": "Half a pair \\ud83d', "Half a pair", True),
        ('{"natural_text": "Ends \\', "Ends", True),
        ('{"primary_language": "en", "is_rot', "", True),
        ("Plain text.", "Plain text.", True),
        ('["natural_text"]', '["natural_text"]', True),
        ('{"natural_text": 7}', "", True),
        ("[" * 100_000, "[" * 100_000, True),
        ("__import__('os').system('true')", "__import__('os').system('true')", True),
    ],
)
def test_ocrflux(answer: str, markdown: str, malformed: bool) -> None:
    page = understood(answer, "ocrflux-json", 1000, 1000, nothing)
    assert page.markdown == markdown
    assert bool(page.malformed) is malformed


@pytest.mark.parametrize(
    ("valid", "correction", "rotation"),
    [(False, 90, 90), (False, 270, 270), (False, 0, 0), (True, 90, 0), (False, 45, 0), (False, "90", 0), (None, 90, 0)],
)
def test_ocrflux_says_how_a_page_is_turned(valid: Any, correction: Any, rotation: int) -> None:
    answer = ocrflux("Text.", is_rotation_valid=valid, rotation_correction=correction)
    assert understood(answer, "ocrflux-json", 1000, 1000, nothing).rotation == rotation


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("<Image>(10,20),(300,400)</Image>", Block("image", boxes=((10, 20, 300, 400),))),
        ("<Image>(300,400),(10,99999)</Image>", Block("image", boxes=((10, 400, 300, 500),))),
        ("<Image>(1,2),(3,x)</Image>", Block("text", "<Image>(1,2),(3,x)</Image>")),
    ],
)
def test_ocrflux_figures_have_a_place(text: str, block: Block) -> None:
    assert understood(ocrflux(text), "ocrflux-json", 1000, 500, nothing).blocks == (block,)


@pytest.mark.parametrize(
    ("matrix", "table"),
    [
        ("<tr><td>a</td><td>b</td></tr>", "<tr><td>a</td><td>b</td></tr>"),
        ("<tr><td>a</td><td><l></td></tr>", '<tr><td colspan="2">a</td></tr>'),
        (
            "<tr><td>a</td><td><l></td><td>b</td></tr><tr><td><t></td><td><lt></td><td>c</td></tr>",
            '<tr><td colspan="2" rowspan="2">a</td><td>b</td></tr><tr><td>c</td></tr>',
        ),
        (
            "<tr><td><l></td><td>a</td></tr><tr><td>b</td></tr>",
            "<tr><td></td><td>a</td></tr><tr><td>b</td><td></td></tr>",
        ),
        ('<tr><td rowspan="2">a</td></tr>', '<tr><td rowspan="2">a</td></tr>'),
    ],
)
def test_ocrflux_tables(matrix: str, table: str) -> None:
    (block,) = understood(ocrflux(f"<table>{matrix}</table>"), "ocrflux-json", 9, 9, nothing).blocks
    assert block == Block("table", f"<table>{table}</table>", html=f"<table>{table}</table>")


# --- DocTags ---

DOCTAGS = """<doctag><page_header><loc_15><loc_104><loc_30><loc_350>A journal</page_header>
<title><loc_50><loc_50><loc_450><loc_70>On tables</title>
<section_header_level_1><loc_50><loc_80><loc_200><loc_90>1 Method</section_header_level_1>
<text><loc_50><loc_100><loc_450><loc_150>If a <b and b> c.</text>
<unordered_list><list_item><loc_50><loc_160><loc_450><loc_170>first</list_item><list_item>second</list_item>
</unordered_list><ordered_list><list_item>third</list_item></ordered_list>
<otsl><loc_50><loc_200><loc_450><loc_300><caption><loc_50><loc_190><loc_450><loc_199>Table 1</caption>\
<ched>n<ched>of<lcel><nl><fcel>1 < 2<ecel><fcel>3<nl></otsl>
<picture><loc_50><loc_310><loc_450><loc_400><pie_chart></picture>
<formula>a^2</formula><code><_Python_>print("<div>")</code></doctag>"""


def test_doctags() -> None:
    page = understood(DOCTAGS, "doctags", 1000, 2000, nothing)
    table = '<table><tr><th>n</th><th colspan="2">of</th></tr><tr><td>1 &lt; 2</td><td></td><td>3</td></tr></table>'
    assert not page.malformed
    assert page.blocks == (
        Block("page_header", "A journal", ((30, 416, 60, 1400),)),
        Block("title", "# On tables", ((100, 200, 900, 280),)),
        Block("title", "## 1 Method", ((100, 320, 400, 360),)),
        Block("text", "If a <b and b> c.", ((100, 400, 900, 600),)),
        Block("list_item", "- first", ((100, 640, 900, 680),)),
        Block("list_item", "- second"),
        Block("list_item", "1. third"),
        Block("table", table, ((100, 800, 900, 1200),), table),
        Block("caption", "Table 1", ((100, 760, 900, 796),)),
        Block("picture", "", ((100, 1240, 900, 1600),)),
        Block("formula", "$$\na^2\n$$"),
        Block("code", '```\nprint("<div>")\n```'),
    )


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ("<doctag><text>Cut off", ["Cut off"]),
        ("<doctag>Loose.<text>Said.</text>", ["Loose.", "Said."]),
        ("<text>a</title>b</text>c", ["c", "ab"]),
        ("<text><loc_1><loc_2>Half a place.", ["Half a place."]),
        ("<otsl><fcel>a<nl><nl><fcel>b", ["<table><tr><td>a</td></tr><tr><td>b</td></tr></table>"]),
    ],
)
def test_doctags_that_are_broken(answer: str, texts: list[str]) -> None:
    page = understood(answer, "doctags", 100, 100, nothing)
    assert [block.text for block in page.blocks] == texts


def test_an_answer_without_doctags() -> None:
    page = understood("Plain text.", "doctags", 100, 100, nothing)
    assert page.markdown == "Plain text."
    assert page.malformed


@pytest.mark.parametrize("form", ["markdown", "grounding", "ocrflux-json", "doctags"])
@pytest.mark.parametrize(
    "hostile",
    [
        "<", "<|", "<|a", "\n\n", "```\n", "<table>", '{"natural_text": "', '{"natural_text": "\\', "<Image>(1,", "[",
        "<text>", "<text></title>", "<fcel>", "<nl>", "<loc_1>", "<picture><x>", "<td>", "<Image> ",
    ],
)  # fmt: skip
def test_hostile_answers_take_no_longer_than_their_length_allows(form: Form, hostile: str) -> None:
    began = time.process_time()
    understood(hostile * (200_000 // len(hostile)), form, 1000, 1000, nothing)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("cell", ["<td>a</td>", "<td><l></td>", "<td><t></td>", "<td><lt></td>"])
def test_hostile_tables(cell: str) -> None:
    began = time.process_time()
    understood(ocrflux(f"<table>{'<tr>' + cell * 10_000 + '</tr>'}</table>"), "ocrflux-json", 9, 9, nothing)
    understood(ocrflux(f"<table>{('<tr>' + cell + '</tr>') * 10_000}</table>"), "ocrflux-json", 9, 9, nothing)
    assert time.process_time() - began < 5
