"""What a model answered, in its own form, as the blocks of a page. Literal parsing, in time linear in the answer."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from vllm_unified.documents.page import Block, Box
from vllm_unified.documents.profiles import Form
from vllm_unified.documents.tables import MARKERS, Cell, Marker, merged, parse_table, table_html


class Grounded(Protocol):
    """What the parser of grounded answers found."""

    @property
    def blocks(self) -> Sequence[Block]: ...

    @property
    def warnings(self) -> Sequence[str]: ...


# The answer, width and height of the image in pixels.
Understand = Callable[[str, int, int], Grounded]
# Degrees clockwise.
Rotation = Literal[0, 90, 180, 270]
_ROTATIONS: tuple[Rotation, ...] = (90, 180, 270)


class Understood(msgspec.Struct, frozen=True):
    """`malformed` says what is wrong with the form of the answer, "" where nothing is.

    `rotation`: degrees clockwise that would turn the page upright, as the model says.
    """

    blocks: tuple[Block, ...] = ()
    warnings: tuple[str, ...] = ()
    malformed: str = ""
    rotation: Rotation = 0

    @property
    def markdown(self) -> str:
        """Without links to the figures, which are cut out later."""
        return "\n\n".join(block.text for block in self.blocks if block.text)


SPECIAL_TOKEN = re.compile(r"<\|[^<>|]{1,40}\|>|<｜[^<>｜]{1,40}｜>")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_GROUNDING_TOKENS = frozenset({"<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"})


def understood(answer: str, form: Form, width: int, height: int, understand: Understand) -> Understood:
    """`width`, `height`: pixels of the image that was sent."""
    answer = printable(answer)
    if form == "grounding":
        return _grounding(answer, width, height, understand)
    if form == "ocrflux-json":
        return _ocrflux(answer, width, height)
    if form == "doctags":
        return _doctags(answer, width, height)
    return Understood(paragraphs(answer))


def printable(text: str) -> str:
    """Without what neither XML nor UTF-8 can hold."""
    return _CONTROL.sub("", text).encode("utf-8", "replace").decode("utf-8")


def noise_in(answer: str) -> float:
    """The share of an answer that is special tokens which belong to no answer."""
    noise = sum(len(token) for token in SPECIAL_TOKEN.findall(answer) if token not in _GROUNDING_TOKENS)
    return noise / max(1, len(answer))


# --- grounding and Markdown ---


def _grounding(answer: str, width: int, height: int, understand: Understand) -> Understood:
    found = understand(answer, width, height)
    boxes = sum(len(block.boxes) for block in found.blocks)
    marks = answer.count("<|det|>")
    if not boxes and not marks and "<|ref|>" not in answer:  # a mode without boxes
        return Understood(paragraphs(answer), tuple(found.warnings))
    malformed = "" if 2 * boxes >= max(1, marks) else f"has {marks} places, of which {boxes} are boxes"
    blocks = tuple(found.blocks) or paragraphs(answer)
    return Understood(blocks, tuple(found.warnings), malformed)


def paragraphs(markdown: str) -> tuple[Block, ...]:
    """Split at empty lines; tables in HTML and fenced code stay whole. Special tokens are left out."""
    text = _unfenced(SPECIAL_TOKEN.sub("", markdown).strip())
    parts: list[list[str]] = [[]]
    fenced, tables = False, 0
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        tables = max(0, tables + line.count("<table") - line.count("</table"))
        if line.strip() or fenced or tables:
            parts[-1].append(line.rstrip())
        elif parts[-1]:
            parts.append([])
    return tuple(_paragraph("\n".join(lines)) for lines in parts if lines)


def _paragraph(text: str) -> Block:
    if text.startswith("<table") and text.endswith("</table>"):
        return Block("table", text, html=text)
    if text.startswith("|"):
        return Block("table", text)
    return Block("title" if text.startswith("#") else "text", text)


def _unfenced(text: str) -> str:
    """Models like to put their whole answer in a fence, and do not always close it."""
    opening, newline, rest = text.partition("\n")
    if newline and opening in ("```", "```json", "```markdown", "```md", "```html"):
        return rest.rstrip().removesuffix("```").rstrip()
    return text


# --- OCRFlux: https://github.com/chatdoc-com/OCRFlux, ocrflux/prompts.py and ocrflux/table_format.py ---

_NATURAL_TEXT = re.compile(r'"natural_text"\s{0,10}:\s{0,10}"')
_STRING = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_HALF_ESCAPE = re.compile(r"\\u[0-9a-fA-F]{0,3}\Z|\\ud[89abAB][0-9a-fA-F]{2}\Z")
_FIGURE = re.compile(r"<Image>\s*+\((\d{1,5}),\s*+(\d{1,5})\),\s*+\((\d{1,5}),\s*+(\d{1,5})\)\s*+</Image>")


def _ocrflux(answer: str, width: int, height: int) -> Understood:
    text = _unfenced(SPECIAL_TOKEN.sub("", answer).strip())
    page = _json_object(text)
    natural_text = page.get("natural_text", "")
    rotation: Rotation = 0
    malformed = ""
    if isinstance(natural_text, str | None) and page:
        if page.get("is_rotation_valid") is False:
            rotation = next((each for each in _ROTATIONS if each == page.get("rotation_correction")), 0)
    else:
        natural_text = _half_of_natural_text(text)
        malformed = "is not the JSON that the model was trained to write"
        if natural_text is None:
            natural_text = "" if text.startswith("{") else text
    blocks = tuple(_element(block, width, height) for block in paragraphs(printable(natural_text or "")))
    return Understood(blocks, malformed=malformed, rotation=rotation)


def _json_object(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _half_of_natural_text(text: str) -> str | None:
    """Of an object that was cut off."""
    begin = _NATURAL_TEXT.search(text)
    if begin is None:
        return None
    written = _STRING.match(text, begin.end())
    body = _HALF_ESCAPE.sub("", written.group()) if written else ""
    try:
        return str(json.loads(f'"{body}"', strict=False))
    except ValueError:
        return None


def _element(block: Block, width: int, height: int) -> Block:
    if figure := _FIGURE.fullmatch(block.text):
        x1, y1, x2, y2 = map(int, figure.groups())
        return Block("image", boxes=(_clamped(x1, y1, x2, y2, width, height),))
    if block.html:
        table = _from_matrix(block.html)
        return Block("table", table, html=table)
    return block


def _from_matrix(table: str) -> str:
    """Its tables have as many cells in each row; a marker says that a cell goes with the one beside or above it."""
    if "<td " in table or not any(f"<td>{marker}</td>" in table for marker in MARKERS):  # it is HTML already
        return table
    return table_html(parse_table(table))


# --- DocTags: https://github.com/docling-project/docling-core, docling_core/types/doc/tokens.py ---

_TAG = re.compile(r"<(/?)([A-Za-z0-9_#+]{1,40})>")
_LOCATION = re.compile(r"loc_(\d{1,4})")
_HEADING = re.compile(r"section_header_level_([0-5])")
_LOCATIONS = 500  # per side
_DEEPEST = 8
_LABELS = {"paragraph": "text", "otsl": "table", "document_index": "table"}
# fmt: off
_ELEMENTS = frozenset((
    "title", "text", "paragraph", "caption", "footnote", "formula", "list_item", "page_header", "page_footer",
    "picture", "chart", "otsl", "table", "document_index", "code", "form", "key_value_region", "reference",
    "checkbox_selected", "checkbox_unselected", "smiles",
))
# fmt: on
_AROUND = frozenset({"doctag", "ordered_list", "unordered_list", "inline", "page_break"})
_CELLS = frozenset({"fcel", "ecel", "srow", "ched", "rhed", "lcel", "ucel", "xcel"})
_HEADERS = frozenset({"ched", "rhed"})
_MERGED: dict[str, Marker] = {"lcel": "<l>", "ucel": "<t>", "xcel": "<lt>"}


class _Element:
    def __init__(self, tag: str, ordered: bool) -> None:
        self.tag = tag
        self.ordered = ordered
        self.locations: list[int] = []
        self.texts: list[str] = []
        self.rows: list[list[tuple[str, list[str]]]] = []

    def says(self, tag: str) -> bool:
        """Whether the tag is one of those within an element: where it is, its cells, what a picture shows."""
        known = tag in _CELLS or tag == "nl" or _LOCATION.fullmatch(tag)
        shown = self.tag in ("picture", "chart") or (self.tag == "code" and tag.startswith("_"))
        return bool(known or shown)

    def take(self, tag: str) -> None:
        if location := _LOCATION.fullmatch(tag):
            self.locations.append(int(location.group(1)))
        elif tag == "nl":
            self.rows.append([])
        elif tag in _CELLS:
            self.rows = self.rows or [[]]
            self.rows[-1].append((tag, []))

    def say(self, text: str) -> None:
        texts = self.rows[-1][-1][1] if self.rows and self.rows[-1] else self.texts
        texts.append(text)

    def block(self, width: int, height: int) -> Block:
        x, y = width / _LOCATIONS, height / _LOCATIONS
        boxes = tuple(
            _clamped(int(x1 * x), int(y1 * y), int(x2 * x), int(y2 * y), width, height)
            for x1, y1, x2, y2 in zip(*[iter(self.locations)] * 4, strict=False)
        )
        text = "".join(self.texts).strip()
        if rows := [row for row in self.rows if row]:
            table = table_html(merged([[_cell(tag, "".join(said)) for tag, said in row] for row in rows]))
            return Block("table", table, boxes, table)
        if heading := _HEADING.fullmatch(self.tag):
            return Block("title", f"{'#' * (1 + int(heading.group(1)))} {text}", boxes)
        label = _LABELS.get(self.tag, self.tag)
        return Block(label, _as_markdown(self.tag, text, self.ordered), boxes)


def _cell(tag: str, text: str) -> Cell | Marker:
    return _MERGED.get(tag) or Cell(" ".join(text.split()), header=tag in _HEADERS)


def _as_markdown(tag: str, text: str, ordered: bool) -> str:
    if tag in ("picture", "chart") or not text:
        return ""
    if tag == "title":
        return f"# {text}"
    if tag == "list_item":
        return f"{'1.' if ordered else '-'} {text}"
    if tag == "formula":
        return f"$$\n{text}\n$$"
    if tag == "code":
        return f"```\n{text}\n```"
    if tag in ("checkbox_selected", "checkbox_unselected"):
        return f"- [{'x' if tag == 'checkbox_selected' else ' '}] {text}"
    return text


def _doctags(answer: str, width: int, height: int) -> Understood:
    text = SPECIAL_TOKEN.sub("", answer)
    elements = [_Element("text", False)]  # of what stands in no element
    opened = elements[:]
    ordered, known, behind = False, False, 0
    for tag in _TAG.finditer(text):
        closing, name = tag.group(1), tag.group(2)
        begins = name in _ELEMENTS or _HEADING.fullmatch(name)
        if not (begins or name in _AROUND or opened[-1].says(name)):
            continue
        known = True
        opened[-1].say(text[behind : tag.start()])
        behind = tag.end()
        if name in ("ordered_list", "unordered_list"):
            ordered = name == "ordered_list" and not closing
        elif begins and closing:
            opened = _without(name, opened)
        elif begins:
            elements.append(_Element(name, ordered))
            opened = [*opened[:_DEEPEST], elements[-1]]
        elif name not in _AROUND and not closing:
            opened[-1].take(name)
    opened[-1].say(text[behind:])
    if not known:
        return Understood(paragraphs(text), malformed="has none of the tags that the model was trained to write")
    blocks = (element.block(width, height) for element in elements)
    return Understood(tuple(block for block in blocks if block.text or block.boxes))


def _without(name: str, opened: list[_Element]) -> list[_Element]:
    """The innermost element of that name is closed, and all within it."""
    for depth in range(len(opened) - 1, 0, -1):
        if opened[depth].tag == name:
            return opened[:depth]
    return opened


def _clamped(x1: int, y1: int, x2: int, y2: int, width: int, height: int) -> Box:
    left, right = sorted((min(x1, width), min(x2, width)))
    top, bottom = sorted((min(y1, height), min(y2, height)))
    return left, top, right, bottom
