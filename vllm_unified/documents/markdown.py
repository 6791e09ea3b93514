"""A page's Markdown as HTML that is safe to open, and that HTML as plain paragraphs and tables.

What a model answers is Markdown with HTML tables in it, and may be broken or hostile. It goes one way: Markdown,
HTML, sanitised HTML; whatever is made of a document is made of the last, so that all its forms say the same.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import nh3
from lxml import etree  # type: ignore[import-untyped]
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererProtocol
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

from vllm_unified.documents.tables import MOST_CELLS, MOST_COLUMNS, beginnings, placed

# A figure of the document, as the Markdown links it. No other image is ever shown.
FIGURE = re.compile(r"images/[A-Za-z0-9_-]{1,100}\.(?:jpe?g|png|gif|webp)", re.ASCII)

PART_CHARACTERS = 1 << 16
LONGEST_PART = 1 << 17
# Beyond these a table is written as its text alone.
MOST_WRITTEN_CELLS = 50_000
LONGEST_TABLE = 1 << 22
DEEPEST = 100
MOST_FORMATTING = 8
LONGEST_FORMULA = 10_000

# What XML cannot hold, surrogates among it.
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

_FENCE_OR_TABLE = re.compile(r"^[ \t]*+(?P<fence>```++|~~~++)|(?<!`)<(?P<end>/?)table(?=[\s/>])", re.MULTILINE | re.I)
_TAG = re.compile(r"<(?:(!--)|(/?)([a-z][a-z0-9]{0,15}+)(?=[\s/>])([^<>]{0,4000}+)>)?", re.I)
_ATTRIBUTE = re.compile(r"""(?<![a-z])([a-z]{1,10})\s{0,4}=\s{0,4}(?:"([^"]*)"|'([^']*)'|([^\s"'=`]+))""", re.I)

_VOID = frozenset({"br", "hr", "img"})
_FORMATTING = frozenset(["a", "b", "code", "del", "em", "i", "s", "small", "span", "strong", "sub", "sup", "u"])
# The parser of HTML ends these by itself, so that one left open nests nothing.
_SELF_ENDING = frozenset(["caption", "col", "colgroup", "li", "p", "tbody", "td", "tfoot", "th", "thead", "tr"])
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_TAGS = _VOID | _FORMATTING | _SELF_ENDING | _HEADINGS | frozenset(["blockquote", "div", "ol", "pre", "table", "ul"])
_ALIGNED = frozenset({"div", "p", "td", "th"}) | _HEADINGS
_ATTRIBUTES = {
    "a": {"href", "title"},
    "img": {"src", "alt"},
    "ol": {"start"},
    "li": {"value"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan"},
}
_LARGEST = {"colspan": MOST_COLUMNS, "rowspan": 65_534, "start": 999_999_999, "value": 999_999_999}


def without_controls(text: str) -> str:
    """The text without what XML cannot hold, in or out of an attribute."""
    return _NO_XML.sub("", text)


def fragments(markdown: str) -> Iterator[str]:
    """The Markdown of a page as pieces of sanitised HTML, each of whole blocks.

    Whatever the Markdown holds, a piece has no script, no style, no address but http, https and mailto, and no image
    but the document's own; neither depth nor length of it costs more than its share. No text is dropped but that
    of `<script>` and `<style>`, and of quotations and lists that are more than 20 deep. The
    source of formulas stays as it is: `\\(…\\)`, `\\[…\\]`, `$…$`, `$$…$$`.
    """
    for part in _parts(without_controls(markdown)):
        unsafe = part.text if part.is_table else _PARSER.render(part.text)
        if safe := without_controls(_CLEANER.clean(_tamed(unsafe))).strip():
            yield safe


class _Part(NamedTuple):
    text: str
    is_table: bool = False


def _parts(markdown: str) -> Iterator[_Part]:
    """Markdown and the HTML tables in it, in turn.

    CommonMark ends HTML at a blank line and takes an indented line after it for code; tables have both.
    """
    last_end = markdown.lower().rfind("</table")
    fence, depth, begin = "", 0, 0
    for mark in _FENCE_OR_TABLE.finditer(markdown):
        if found := mark["fence"]:
            if depth == 0:
                if not fence:
                    fence = found
                elif found.startswith(fence):
                    fence = ""
        elif fence:
            continue
        elif not mark["end"]:
            if depth == 0:
                starts_line = not markdown[markdown.rfind("\n", 0, mark.start()) + 1 : mark.start()].strip()
                if mark.start() > last_end and not starts_line:
                    continue
                yield from _blocks_of_markdown(markdown[begin : mark.start()])
                begin = mark.start()
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                end = markdown.find(">", mark.end()) + 1 or len(markdown)
                yield from _whole_table(markdown[begin:end])
                begin = end
    if depth:
        yield from _unfinished_table(markdown[begin:], nested=depth > 1)
    else:
        yield from _blocks_of_markdown(markdown[begin:])


def _unfinished_table(text: str, *, nested: bool) -> Iterator[_Part]:
    """Of an answer that was cut off: the table ends with its paragraph, or with the text where a table in it ended."""
    end = len(text) if nested else text.find("\n\n")
    yield from _whole_table(text[:end] if end >= 0 else text)
    if end >= 0:
        yield from _blocks_of_markdown(text[end:])


def _whole_table(text: str) -> Iterator[_Part]:
    lowered = text.lower()
    if len(text) <= LONGEST_TABLE and lowered.count("<td") + lowered.count("<th") <= MOST_WRITTEN_CELLS:
        yield _Part(text, is_table=True)
        return
    rows = re.sub(r"</tr\s{0,4}>", "\n", text, flags=re.I)
    yield from _blocks_of_markdown(re.sub(r"<[^<>]{0,4000}+>", " ", rows))


def _blocks_of_markdown(text: str) -> Iterator[_Part]:
    """Cut at blank lines into parts that fit in memory; a longer run of lines is cut at the end of one."""
    if len(text) <= PART_CHARACTERS:
        if text.strip():
            yield _Part(text)
        return
    held: list[str] = []
    size, in_fence = 0, False
    for paragraph in _short(text.split("\n\n")):
        # Two of the same block, as a list with blank lines in it, stay together where they can.
        if held and size + len(paragraph) > (LONGEST_PART if in_fence or paragraph[:1].isspace() else PART_CHARACTERS):
            yield _Part("\n\n".join(held))
            held, size, in_fence = [], 0, False
        held.append(paragraph)
        size += len(paragraph) + 2
        if len(re.findall(r"^ {0,3}(?:```|~~~)", paragraph, re.MULTILINE)) % 2:
            in_fence = not in_fence
    yield _Part("\n\n".join(held))


def _short(paragraphs: list[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        rest = 0
        while len(paragraph) - rest > LONGEST_PART:
            end = paragraph.rfind("\n", rest + 1, rest + LONGEST_PART)
            if end == -1:
                end = rest + LONGEST_PART
            yield paragraph[rest:end]
            rest = end
        yield paragraph[rest:]


def _parser() -> MarkdownIt:
    """CommonMark as models write it, and pages have it.

    A line's end is one on the page too. Indented text is no code, a line of dashes makes no heading of the line above
    it, and "[1]: " begins a line of references instead of vanishing as a definition.
    """
    parser = MarkdownIt("commonmark", {"html": True, "breaks": True})
    parser.enable(["table", "strikethrough"]).disable(["code", "lheading", "reference"])
    parser.block.ruler.before("fence", "formula", _formula_block, {"alt": ["paragraph", "blockquote", "list"]})
    parser.inline.ruler.before("escape", "formula", _formula_inline)
    parser.core.ruler.push("say", _say_numbers_and_alignments)
    parser.add_render_rule("formula_block", _as_paragraph)
    parser.add_render_rule("formula_inline", _as_it_is)
    return parser


def _formula_block(state: StateBlock, line: int, end_line: int, silent: bool) -> bool:
    """`\\[…\\]` or `$$…$$` that begins and ends a line: not a line of it is a list or a heading."""
    begin = state.bMarks[line] + state.tShift[line]
    closing = {"\\[": "\\]", "$$": "$$"}.get(state.src[begin : begin + 2])
    if closing is None:
        return False
    end = state.src.find(closing, begin + 2, min(begin + LONGEST_FORMULA, state.eMarks[end_line - 1])) + 2
    if end < 2:
        return False
    last = line
    while state.eMarks[last] < end:
        last += 1
    if state.src[end : state.eMarks[last]].strip():
        return False
    if not silent:
        state.line = last + 1
        token = state.push("formula_block", "", 0)
        token.content = state.src[begin:end]
        token.map = [line, state.line]
    return True


def _formula_inline(state: StateInline, silent: bool) -> bool:
    opening = state.src[state.pos : state.pos + 2]
    closing = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}.get(opening, "$" if opening[:1] == "$" else "")
    if not closing:
        return False
    begin = state.pos + len(closing)
    found = state.src.find(closing, begin, min(begin + LONGEST_FORMULA, state.posMax))
    if found == -1:
        return False
    end = found + len(closing)
    if closing == "$" and not _is_formula(state.src[begin:found], state.src[end : end + 1]):
        return False
    if not silent:
        state.push("formula_inline", "", 0).content = state.src[state.pos : end]
    state.pos = end
    return True


def _is_formula(between: str, after: str) -> bool:
    """As Pandoc tells `$x$` from two prices."""
    return between.strip() == between != "" and "\n" not in between and not after.isdigit()


def _say_numbers_and_alignments(state: StateCore) -> None:
    """The number that an item was given stands, whatever the first one was; no style in what is to be sanitised."""
    for token in state.tokens:
        if token.type == "list_item_open" and token.info.isdigit():
            token.attrs["value"] = token.info
        elif token.type in ("td_open", "th_open") and "style" in token.attrs:
            token.attrs["align"] = str(token.attrs.pop("style")).removeprefix("text-align:")


def _as_paragraph(
    renderer: RendererProtocol, tokens: list[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    return f"<p>{escapeHtml(tokens[index].content)}</p>\n"


def _as_it_is(renderer: RendererProtocol, tokens: list[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    return escapeHtml(tokens[index].content)


_PARSER = _parser()


def _tamed(unsafe: str) -> str:
    """The HTML with known tags alone, nested no deeper than DEEPEST: what HTML's parser takes in linear time.

    A parser that follows the standard opens every formatting tag that was left open anew in each paragraph, and looks
    through all that is open for each tag: a page of `<b x=1><b x=2>…<p><p>…` would fill any memory. What comes out is
    sanitised afterwards; this is no sanitiser.
    """
    lowered = unsafe.lower()
    last_end = {
        name: lowered.rfind(end) for name, end in (("!--", "-->"), ("script", "</script"), ("style", "</style"))
    }
    is_open: dict[str, int] = {}
    depth = formatting = 0
    tamed: list[str] = []
    position = 0
    while found := _TAG.search(unsafe, position):
        tamed.append(unsafe[position : found.start()])
        position = found.end()
        comment, end, name, attributes = found.groups()
        name = (comment or name or "").lower()
        if not name:
            tamed.append("&lt;")
        elif name in last_end:
            if not end and last_end[name] >= position:
                after = lowered.find("-->" if comment else f"</{name}", position)
                position = lowered.find(">", after) + 1 or len(unsafe)
            elif comment:
                tamed.append("&lt;!--")
        elif name in _VOID or name in _SELF_ENDING:
            tamed.append(f"</{name}>" if end else _tag(name, attributes))
        elif name == "center":
            tamed.append("</div>" if end else '<div align="center">')
        elif name not in _TAGS:
            continue
        elif end:
            if is_open.get(name, 0):
                is_open[name] -= 1
                depth -= 1
                formatting -= name in _FORMATTING
                tamed.append(f"</{name}>")
        elif depth < DEEPEST and (name not in _FORMATTING or formatting < MOST_FORMATTING):
            is_open[name] = is_open.get(name, 0) + 1
            depth += 1
            formatting += name in _FORMATTING
            tamed.append(_tag(name, attributes))
    tamed.append(unsafe[position:])
    return "".join(tamed)


def _tag(name: str, attributes: str) -> str:
    kept = []
    if "=" in attributes and (name in _ATTRIBUTES or name in _ALIGNED):
        for found in _ATTRIBUTE.finditer(attributes):
            value = next((group for group in found.groups()[1:] if group is not None), "").replace('"', "&quot;")
            kept.append(f' {found[1].lower()}="{value}"')
    return f"<{name}{''.join(kept)}>"


def _checked(tag: str, attribute: str, value: str) -> str | None:
    if attribute == "src":
        return value if FIGURE.fullmatch(value) else None
    if attribute in _LARGEST:
        is_number = value.isascii() and value.isdigit() and len(value) <= 9
        return str(min(int(value), _LARGEST[attribute])) if is_number else None
    return value


_CLEANER = nh3.Cleaner(
    tags=_TAGS,
    clean_content_tags={"script", "style"},
    attributes=_ATTRIBUTES,
    tag_attribute_values={tag: {"align": {"left", "center", "right"}} for tag in _ALIGNED},
    attribute_filter=_checked,
    url_schemes={"http", "https", "mailto"},
    url_relative=lambda url: url if FIGURE.fullmatch(url) else None,
    link_rel="noopener noreferrer nofollow",
)


class Span(NamedTuple):
    """Text of one look. `styles`: tags of HTML. `image`: path of a figure, whose description is then the text."""

    text: str
    styles: frozenset[str] = frozenset()
    href: str = ""
    image: str = ""


class Paragraph(NamedTuple):
    """`level` of a heading, 1 to 6, else how deep in lists it stands, 0 for not. `number` of an item; None: a bullet.

    `begins`: the first item of its list. `quoted`: how deep in quotations.
    """

    spans: tuple[Span, ...] = ()
    kind: Literal["body", "heading", "item", "code", "rule"] = "body"
    level: int = 0
    number: int | None = None
    begins: bool = False
    quoted: int = 0
    align: str = ""

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


@dataclass(slots=True, eq=False)
class Cell:
    """It takes `rowspan` times `colspan` places of the grid, from `row` and `column` on. No `element`: it is empty."""

    element: Any = None
    colspan: int = 1
    rowspan: int = 1
    row: int = 0
    column: int = 0

    @property
    def is_header(self) -> bool:
        return self.element is not None and (
            self.element.tag == "th" or next(self.element.iterancestors("thead", "table")).tag == "thead"
        )

    @property
    def align(self) -> str:
        return "" if self.element is None else self.element.get("align") or ""

    @property
    def text(self) -> str:
        return " ".join(paragraph.text for paragraph in self.paragraphs)

    @property
    def paragraphs(self) -> Iterator[Paragraph]:
        """Without a table in it: that one's rows are paragraphs."""
        for block in () if self.element is None else _walk(self.element):
            if isinstance(block, Paragraph):
                yield block
            else:
                yield from block.lines


class Table(NamedTuple):
    """In each place of `rows`, all of one length, stands the cell that covers it."""

    rows: list[list[Cell]]

    @property
    def columns(self) -> int:
        return len(self.rows[0])

    @property
    def header_rows(self) -> int:
        """How many rows at the top hold nothing but headers."""
        return next((at for at, cells in enumerate(self.rows) if not _is_header(cells)), len(self.rows))

    @property
    def lines(self) -> Iterator[Paragraph]:
        """Each row as a paragraph, for where no table can stand."""
        rows: list[list[Cell]] = [[] for _ in self.rows]
        for row, _, cell in beginnings(self.rows):
            rows[row].append(cell)
        return map(_line, rows)


def _line(cells: list[Cell]) -> Paragraph:
    return Paragraph((Span("  ".join(cell.text for cell in cells)),))


def _is_header(cells: list[Cell]) -> bool:
    return any(cell.is_header for cell in cells) and all(cell.is_header or cell.element is None for cell in cells)


def blocks(fragment: str) -> Iterator[Paragraph | Table]:
    """A piece of sanitised HTML, flat: paragraphs and tables in the order of reading."""
    return _walk(etree.fromstring(f"<html><body>{fragment}</body></html>", etree.HTMLParser(huge_tree=True))[0])


def _walk(root: Any) -> Iterator[Paragraph | Table]:
    state = _Walk()
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        breaks = element.tag not in _INLINE
        if breaks:
            yield from state.paragraph()
        if event == "start":
            if element.tag == "table" and element is not root:
                yield from _table(element)
                walk.skip_subtree()
                continue
            if element.tag == "hr":
                yield Paragraph(kind="rule")
            state.enter(element)
            state.add(element.text)
        else:
            state.leave(element)
            if element is not root:
                state.add(element.tail)


_INLINE = _FORMATTING | {"br", "img"}
_STYLES = {
    "a": "",
    "b": "strong",
    "strong": "strong",
    "i": "em",
    "em": "em",
    "s": "del",
    "del": "del",
    "code": "code",
    "sub": "sub",
    "sup": "sup",
    "u": "u",
}


class _Walk:
    """Where a walk over HTML stands: what is open, and the spans of the paragraph that is not yet ended."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.styles: list[str] = []
        self.hrefs: list[str] = []
        self.aligns: list[str] = []
        self.lists: list[_List] = []
        self.item: Paragraph | None = None
        self.quoted = self.preformatted = self.heading = 0

    def enter(self, element: Any) -> None:
        tag = element.tag
        if tag in _STYLES:
            self.styles.append(_STYLES[tag])
        if tag in _ALIGNED:
            self.aligns.append(element.get("align") or "")
        if tag == "a":
            self.hrefs.append(element.get("href") or "")
        elif tag == "br":
            self.spans.append(Span("\n"))
        elif tag == "img":
            self._add_figure(element)
        elif tag in ("ul", "ol"):
            self.lists.append(_List(int(element.get("start") or 1) if tag == "ol" else None))
        elif tag == "li":
            self._begin_item(element.get("value"))
        self._count(tag, 1)

    def leave(self, element: Any) -> None:
        tag = element.tag
        for names, opened in ((_STYLES, self.styles), (_ALIGNED, self.aligns), (("a",), self.hrefs)):
            if tag in names:
                opened.pop()
        if tag in ("ul", "ol"):
            self.lists.pop()
        elif tag == "li":
            self.item = None
        self._count(tag, -1)

    def _count(self, tag: str, by: int) -> None:
        if tag == "blockquote":
            self.quoted += by
        elif tag == "pre":
            self.preformatted += by
        elif tag in _HEADINGS:
            self.heading = int(tag[1]) if by > 0 else 0

    def _begin_item(self, value: str | None) -> None:
        if not self.lists:
            return
        of = self.lists[-1]
        if of.number is not None and value:
            of.number = int(value)
        self.item = Paragraph((), "item", len(self.lists), of.number, of.begins)
        of.begins = False
        if of.number is not None:
            of.number += 1

    def _add_figure(self, element: Any) -> None:
        path, text = element.get("src") or "", element.get("alt") or ""
        if path or text:
            self.spans.append(Span(text, self._look, image=path))

    @property
    def _look(self) -> frozenset[str]:
        return frozenset(filter(None, self.styles))

    def add(self, text: str | None) -> None:
        if not text:
            return
        if not self.preformatted:
            text = re.sub(r"[ \t\r\n]+", " ", text)
            if not self.spans or self.spans[-1].text.endswith((" ", "\n")):
                text = text.lstrip(" ")
        if text:
            self.spans.append(Span(text, self._look, self.hrefs[-1] if self.hrefs else ""))

    def paragraph(self) -> Iterator[Paragraph]:
        """What was gathered since the last one, if anything."""
        spans, self.spans = self.spans, []
        while spans and not spans[-1].image and not spans[-1].text.strip():
            spans.pop()
        if not spans:
            return
        if not self.preformatted:
            spans[-1] = spans[-1]._replace(text=spans[-1].text.rstrip())
        item, self.item = self.item, None
        kind: Literal["body", "heading", "code"] = "body"
        if self.preformatted:
            kind, spans[-1] = "code", spans[-1]._replace(text=spans[-1].text.rstrip("\n"))
        elif self.heading:
            kind = "heading"
        align = next(filter(None, reversed(self.aligns)), "")
        if item is not None and kind == "body":
            yield item._replace(spans=tuple(spans), quoted=self.quoted, align=align)
        else:
            level = self.heading if kind == "heading" else len(self.lists)
            yield Paragraph(tuple(spans), kind, level, quoted=self.quoted, align=align)


class _List:
    def __init__(self, number: int | None) -> None:
        self.number = number
        self.begins = True


def _table(element: Any) -> Iterator[Paragraph | Table]:
    caption = element.find("caption")
    if caption is not None:
        for block in _walk(caption):
            yield block._replace(align="center") if isinstance(block, Paragraph) else block
    trs = [tr for tr in element.iter("tr") if next(tr.iterancestors("table")) is element]
    rows = [[_cell(each) for each in tr.iterchildren("td", "th")] for tr in trs]
    grid, cut = placed(rows, Cell)
    for row, column, cell in beginnings(grid):
        cell.row, cell.column = row, column
    if cut:
        yield from (_line(cells) for cells in rows if cells)
    elif grid:
        yield Table(grid)


def _cell(element: Any) -> Cell:
    down, across = int(element.get("rowspan") or 1), int(element.get("colspan") or 1)
    # HTML: a rowspan of 0 reaches to the last row.
    return Cell(element, min(max(across, 1), MOST_COLUMNS), min(down or MOST_CELLS, MOST_CELLS))
