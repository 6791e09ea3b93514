"""Pages to one document: what a page break has cut is put together again, and running heads are left out.

Every rule errs towards both parts staying as they are. Nothing here asks a model: what one says of which elements
belong together comes in as `Joint`s, and is not believed where a table has lost something by it.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from vllm_unified.documents.page import FIGURES, RUNNING_HEADS, Block, Page
from vllm_unified.documents.tables import (
    MOST_CELLS,
    Cell,
    Row,
    Table,
    around_tables,
    as_markdown,
    parse_pipes,
    parse_table,
    table_html,
)

Kind = Literal["head", "figure", "note", "paragraph", "heading", "list", "table", "caption", "code", "formula", "other"]
# What may stand between two parts of a paragraph or a table, on either page.
PASSED_OVER = frozenset({"head", "figure", "note"})

# A joined part grows no longer than this, in characters; what follows starts a part of its own.
LONGEST_PART = 1_000_000
# A shorter part is a date, a name or a heading as likely as the beginning of a sentence.
SHORTEST_PART = 12
SHORTEST_UNCASED = 20
LONGEST_HEAD = 120
FEWEST_REPETITIONS = 3

_PLAIN_LABELS = frozenset({"", "text", "paragraph"})
_KINDS: dict[str, Kind] = {
    "table": "table",
    "image_caption": "note",
    "figure_caption": "note",
    "figure_title": "note",
    "chart_title": "note",
    "footnote": "note",
    "page_footnote": "note",
    "image_footnote": "note",
    "table_footnote": "note",
    "table_caption": "caption",
    "table_title": "caption",
    "caption": "caption",
    "title": "heading",
    "sub_title": "heading",
    "subtitle": "heading",
    "doc_title": "heading",
    "paragraph_title": "heading",
    "section_header": "heading",
    "heading": "heading",
    "list": "list",
    "list_item": "list",
    "code": "code",
    "code_block": "code",
    "algorithm": "code",
    "equation": "formula",
    "interline_equation": "formula",
    "formula": "formula",
}
# Of a text whose label says nothing, the first that it begins with.
_BEGINNINGS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("figure", re.compile(r"!\[|<img\b")),
    ("table", re.compile(r"<table\b|\|")),
    ("heading", re.compile(r"#{1,6}\s|\*\*[^*]+\*\*$|第[一二三四五六七八九十百\d]{1,4}[章节節条條部篇]")),
    ("code", re.compile(r"```|~~~")),
    ("formula", re.compile(r"\\\[|\$\$")),
    (
        "list",
        re.compile(r"[-*+•·●○▪]\s|\(?\d{1,3}(?:[.)]\s|、)|[（(]?[一二三四五六七八九十]{1,3}[）)、]|\(?[A-Za-z][.)]\s"),
    ),
    (
        "note",
        re.compile(r"fig(?:ure|\.)?\s?\d[\d.-]{0,9}\s?(?:[:：|]|[.]\s)|[图圖]\s?\d[\d.-]{0,9}[\s:：]", re.IGNORECASE),
    ),
    ("caption", re.compile(r"(?:table|tab\.|表|续表|續表)\s*\d[\d.-]{0,9}\s*(?:[:：|(（]|[.]\s|$)", re.IGNORECASE)),
    ("other", re.compile(r"[<>]")),
)
_FENCES = ("```", "~~~")
_HEADING = re.compile(r"#{1,6}\s")
_PAGE_NUMBER = re.compile(
    r"[-–—|·~\s]*(?:page|seite|p\.|第)?\s?\d{1,5}\s?[页頁]?(?:\s?(?:/|of|von|，|,)?\s?共?\s?\d{1,5}\s?[页頁]?)?[-–—|·~\s]*",
    re.IGNORECASE,
)
_CONTINUED = re.compile(r"\bcont(?:inued|inuation|['’.]?d)?\b|续表|續表|[（(]\s*[续續接]|続き", re.IGNORECASE)
_NUMBER = re.compile(r"\d{1,5}")
# A number after one of these counts the document's own things, though they may go with the pages.
_COUNTED = re.compile(
    r"(?:\b(?:question|exercise|problem|task|chapter|section|part|lesson|unit|slide|step|day|week|case|example|item"
    r"|figure|fig|table|appendix|invoice|order|no)|[题題例图圖表问問单單第])[\s.:#]{0,3}$",
    re.IGNORECASE,
)
_HYPHENS = "-\u2010\u00ad"
_OPENING = "\"'“‘(（[「『《【*_"
_CLOSING = "\"'”’)）]」』》】*_"
_SENTENCE_ENDS = ".!?:。！？：；…।؟۔"
_MARKS = "，。、；：！？,.،।"
_CONTINUING = ",;)，、。；：）」』”’%％"
_CONNECTING = re.compile(
    r"\b(?:an?|the|of|and|or|nor|but|to|in|on|at|by|for|from|with|without|into|over|under|between|among|through|during"
    r"|as|than|that|which|who|whose|where|when|while|because|if|whether|is|are|was|were|be|been|has|have|had|not|this"
    r"|these|those|its|their|his|her|our|your|my|no|each|every|per|via|und|oder|der|die|das|den|dem|ein|eine|mit|von"
    r"|für|de|la|les?|des|du|et|en|el|los|las|con|por|para)$",
    re.IGNORECASE,
)


class Joined(msgspec.Struct, frozen=True):
    """A part of the document. `page`: the number of the page on which it begins.

    In Markdown a page begins with the line `page_break(page)` before its first part; a page all of whose parts were
    joined to the one before has none.
    """

    page: int
    block: Block


class Joint(msgspec.Struct, frozen=True):
    """A model's word that two elements are one: `first` of `elements(page)`, `second` of those of the next page.

    `html`: for two tables, as `merged_table` has it; "" leaves it to our own rule.
    """

    first: int
    second: int
    html: str = ""


def page_break(number: int) -> str:
    """A comment, which no reader of Markdown or HTML shows: `<!-- page 3 -->`. A blank line stands around it."""
    return f"<!-- page {number} -->"


def elements(page: Page) -> tuple[Block, ...]:
    """The blocks of a page, each paragraph, heading, table or list of an unlabelled one by itself.

    A figure that was cut out to nothing is left out.
    """
    blocks = page.blocks or (Block(text=page.markdown),)
    return tuple(element for block in blocks for element in _elements(block))


def repeated_lines(pages: Iterable[Page]) -> frozenset[str]:
    """The running heads of pages whose model gives no labels, for `joined`: one walk over the document before it.

    A line that is first or last, or next to it, on most pages, or on most of the odd or the even ones, and on three
    at least; but for a number that counts with the pages. And what the model labels so on a page, for those that it
    did not label: read in another mode, or from their text layer.
    """
    walked: Counter[int] = Counter()
    lines: Counter[tuple[int, str]] = Counter()
    labelled: set[str] = set()
    for page in pages:
        walked[page.number % 2] += 1
        blocks = elements(page)
        heads = (line for block in blocks if block.label in RUNNING_HEADS for line in block.text.split("\n"))
        labelled.update(key for line in heads for key in _keys(line, page.number) if not key.isdigit())
        edge = _edge_lines(blocks)
        lines.update({(page.number % 2, key) for _, _, line in edge for key in _keys(line, page.number)})
    keys = {key for _, key in lines}
    repeated = (key for key in keys if _is_repeated([lines[0, key], lines[1, key]], [walked[0], walked[1]]))
    return frozenset(repeated) | labelled


def joined(
    pages: Iterable[Page],
    *,
    running_heads: Literal["keep", "drop"] = "keep",
    join_pages: bool = True,
    repeated: Collection[str] = frozenset(),
    joints: Callable[[int], Sequence[Joint] | None] = lambda number: None,
    warn: Callable[[str], None] = lambda message: None,
) -> Iterator[Joined]:
    """The document's parts in order. `pages` come in order; a page or two are held at a time.

    `repeated`: from `repeated_lines`, of which "drop" leaves out what stands at the edge of a page. `joints`: of a page
    and the next, by the number of the first, and for these instead of our rules, which hold where it gives None; a
    joint that cannot be is ignored, and told to `warn`. Boxes are those of the page on which a part begins.
    """
    seam = _Seam(joints, warn)
    for page in pages:
        parts = _with_heads_apart(elements(page), page.number, repeated)
        if running_heads == "drop":
            parts = [part for part in parts if part.block.label not in RUNNING_HEADS]
        yield from seam.passed(page, parts, join=join_pages)
    yield from seam.rest()


def merged_table(first: str, second: str, told: str) -> str:
    """What a model made of two tables, all three as HTML, written anew; "" where it is not both of them.

    Nothing may have come to it, and nothing of the two be gone but the header that the second repeats.
    """
    table = _both(parse_table(told), parse_table(first), parse_table(second))
    return table_html(table) if table else ""


@dataclass(slots=True, eq=False)
class _Part:
    """An element of a page, as far as it is known. `table` stands for the text of one that was joined."""

    page: int
    index: int
    block: Block
    table: Table | None = None

    @property
    def kind(self) -> Kind:
        return _kind(self.block)

    def finished(self) -> Joined:
        if self.table is None:
            return Joined(self.page, self.block)
        pipes = None if self.block.html else as_markdown(self.table)
        html = table_html(self.table) if pipes is None else ""
        return Joined(self.page, msgspec.structs.replace(self.block, text=pipes or html, html=html))


class _Seam:
    """Between the pages that have passed and the next: the parts that may still grow, and those after them."""

    def __init__(self, joints: Callable[[int], Sequence[Joint] | None], warn: Callable[[str], None]) -> None:
        self._joints = joints
        self._warn = warn
        self._number = 0
        self._open: list[_Part] = []
        self._of_page: dict[int, _Part] = {}  # by index, what the elements of the last page have become part of
        self._own: dict[int, Block] = {}  # the same elements, as they were before
        self._tail: _Part | None = None  # what the next page may go on with

    def passed(self, page: Page, parts: list[_Part], *, join: bool) -> Iterator[Joined]:
        """The parts that no later page can change."""
        of_page = {part.index: part for part in parts}
        own = {part.index: part.block for part in parts}
        if not join or page.number != self._number + 1 or page.source == "nothing":
            self._tail, self._of_page = None, {}
        told = self._joints(self._number) if self._of_page else None
        if told is not None:
            parts = self._joined_as_told(told, of_page)
        elif self._tail:
            parts = self._joined_by_rule(self._tail, parts, of_page)
        self._tail = next((part for part in reversed(parts) if part.kind not in PASSED_OVER), self._tail)
        self._number, self._of_page, self._own = page.number, of_page, own
        self._open += parts
        may_grow = {id(part) for part in [*of_page.values(), self._tail]}
        done = next((at for at, part in enumerate(self._open) if id(part) in may_grow), len(self._open))
        finished, self._open = self._open[:done], self._open[done:]
        return (part.finished() for part in finished)

    def rest(self) -> Iterator[Joined]:
        return (part.finished() for part in self._open)

    def _joined_as_told(self, joints: Sequence[Joint], of_page: dict[int, _Part]) -> list[_Part]:
        """The parts of a page that its joints have left to it."""
        parts = dict(of_page)
        for joint in joints:
            first, second = self._of_page.get(joint.first), parts.get(joint.second)
            if first and second and _join_as_told(first, self._own[joint.first], second, joint.html):
                of_page[joint.second] = first
                del parts[joint.second]
            else:
                place = f"element {joint.first} of page {self._number} and {joint.second} of the next"
                self._warn(f"{place} cannot be joined; both stay as they are")
        return list(parts.values())

    def _joined_by_rule(self, tail: _Part, parts: list[_Part], of_page: dict[int, _Part]) -> list[_Part]:
        gone = [part for part in parts if part.kind not in PASSED_OVER][:2]
        if not (len(gone) == 2 and tail.kind == gone[1].kind == "table" and _says_continued(gone[0].block.text)):
            gone = gone[:1]
        if not gone or not _join_by_rule(tail, gone[-1]):
            return parts
        of_page[gone[-1].index] = tail
        return [part for part in parts if part not in gone]


def _join_by_rule(first: _Part, second: _Part) -> bool:
    if first.kind == second.kind == "table":
        return _join_tables(first, second)
    if first.kind == second.kind == "paragraph" and _goes_on(first.block.text, second.block.text):
        return _join_texts(first, second)
    return False


def _join_as_told(first: _Part, own: Block, second: _Part, html: str) -> bool:
    """`own`: what the page before has of `first`, which may have begun on an earlier one."""
    kinds = {first.kind, second.kind}
    if kinds == {"table"}:
        return _join_told_table(first, own, second, html) or _join_tables(first, second)
    return kinds <= {"paragraph", "list", "caption", "note"} and _join_texts(first, second)


def _join_texts(first: _Part, second: _Part) -> bool:
    text = _glued(first.block.text.rstrip(), second.block.text.lstrip())
    if len(text) > LONGEST_PART:
        return False
    first.block = msgspec.structs.replace(first.block, text=text)
    return True


def _glued(first: str, second: str) -> str:
    """With a space, but none after a hyphen or beside a Chinese or Japanese character; a soft hyphen goes."""
    last, following = first[-1:], second[:1]
    if last and last in _HYPHENS and first[-2:-1].isalnum() and following.isalnum():
        is_soft = last == "\u00ad" or (first[-2].islower() and following.islower())
        return (first[:-1] if is_soft else first) + second
    is_close = _is_unspaced(last) or _is_unspaced(following) or last in ("—", "–")
    return first + ("" if is_close else " ") + second


def _goes_on(first: str, second: str) -> bool:
    """Whether a paragraph that ends as `first` goes on as `second`. False when it is not sure."""
    first, second = first.rstrip(), second.lstrip()
    if len(first) < SHORTEST_PART or not second:
        return False
    last, beginning = first[-1], second.lstrip(_OPENING)[:1]
    if last in _HYPHENS:
        return first[-2].isalnum() and beginning.isalnum()
    if first.rstrip(_CLOSING)[-1:] in _SENTENCE_ENDS:
        return False
    if second[0] in _CONTINUING or beginning.islower():
        return True
    if beginning.isupper() or beginning.isdigit() or second.startswith(("$", "\\(")):
        return last in ",，、—–&" or _CONNECTING.search(first[-20:]) is not None
    # A writing without capitals, as before the page's end: a name, a date or a heading has no mark, and is short.
    is_of_it = len(first) >= SHORTEST_UNCASED and any(map(_is_uncased, first[-SHORTEST_UNCASED:]))
    return is_of_it and beginning.isalpha() and any(mark in second for mark in _MARKS)


def _is_uncased(char: str) -> bool:
    return char.isalpha() and char.lower() == char.upper()


def _is_unspaced(char: str) -> bool:
    """Whether `char` is of a writing that has no spaces: Chinese or Japanese, with its punctuation."""
    return (
        "\u2e80" <= char <= "\u9fff"
        or "\uf900" <= char <= "\ufaff"
        or "\uff00" <= char <= "\uffef"
        or char >= "\U00020000"
    )


def _says_continued(text: str) -> bool:
    return len(text) <= LONGEST_HEAD and bool(_CONTINUED.search(text))


def _table(part: _Part) -> Table:
    return part.table if part.table is not None else _table_in(part.block)


def _table_in(block: Block) -> Table:
    pipes = None if block.html else parse_pipes(block.text)
    return _without_headers(pipes) if pipes else parse_table(block.html or block.text)


def _without_headers(pipes: Table) -> Table:
    """In Markdown the first row is the header whatever it holds, and is left empty where there is none."""
    rows = [tuple(Cell(cell.text) if cell else None for cell in row) for row in pipes.rows]
    first = 0 if any(cell and cell.text for cell in rows[0]) else 1
    return msgspec.structs.replace(pipes, rows=tuple(rows[first:]))


def _join_tables(first: _Part, second: _Part) -> bool:
    upper, lower = _table(first), _table(second)
    rows = _rows_going_on(upper, lower)
    if rows is None or (len(upper.rows) + len(rows)) * upper.columns > MOST_CELLS:
        return False
    first.table = msgspec.structs.replace(upper, rows=upper.rows + rows)
    return True


def _join_told_table(first: _Part, own: Block, second: _Part, html: str) -> bool:
    upper = _table_in(own)
    table = _both(parse_table(html), upper, _table(second))
    if table and first.table:
        table = _continued(first.table, upper, table)
    if table is None:
        return False
    first.table = table
    return True


def _both(told: Table, upper: Table, lower: Table) -> Table | None:
    """`told` where it has all that the two have, but for a header that `lower` repeats, and nothing else."""
    if not upper.rows or not lower.rows or len(told.rows) < max(len(upper.rows), len(lower.rows)):
        return None
    given, said = _letters(upper.rows) + _letters(lower.rows), _letters(told.rows)
    is_whole = said <= given and given - said <= _letters(lower.rows[: _repeated_rows(upper, lower)])
    if not is_whole or told.cut or upper.cut or lower.cut:
        return None
    return msgspec.structs.replace(told, caption=upper.caption)


def _letters(rows: Sequence[Row]) -> Counter[str]:
    """And digits: a hyphen goes where a word is put together, and spaces do not matter."""
    return Counter(char for row in rows for cell in row if cell for char in cell.text if char.isalnum())


def _continued(table: Table, upper: Table, told: Table) -> Table | None:
    """`table`, which ends with `upper`, and of `told`, which begins with it, the rest; None where that is not so.

    The last row of `upper` may have grown: the page break has cut it.
    """
    before = len(upper.rows) - 1
    ends_with_it = table.columns == told.columns and table.rows[-1] == upper.rows[-1]
    rows = table.rows[:-1] + told.rows[before:]
    if not ends_with_it or told.rows[:before] != upper.rows[:before] or len(rows) * table.columns > MOST_CELLS:
        return None
    return msgspec.structs.replace(table, rows=rows)


def _rows_going_on(upper: Table, lower: Table) -> tuple[Row, ...] | None:
    """The rows of `lower` that go on with `upper`, without the header that it repeats; None where it is a new table."""
    if upper.cut or lower.cut or not upper.columns or upper.columns != lower.columns:
        return None
    repeated = _repeated_rows(upper, lower)
    if repeated:
        return lower.rows[repeated:]
    if upper.columns == 1 or _has_header(lower, upper):
        return None
    return lower.rows


def _repeated_rows(upper: Table, lower: Table) -> int:
    """How many rows of `lower` are the header of `upper` once more: all of it, or none."""
    header = upper.rows[: _header_depth(upper)] if upper.rows else ()
    repeated = list(map(_row_key, header)) == list(map(_row_key, lower.rows[: len(header)]))
    return len(header) if repeated else 0


def _header_depth(table: Table) -> int:
    """Rows of the header; where none is marked as such the first row, with the rows that its cells span."""
    return table.header_rows or max(cell.rowspan for cell in table.rows[0] if cell)


def _has_header(lower: Table, upper: Table) -> bool:
    """Marked as such, or words above or below numbers alone."""
    if lower.header_rows:
        return True
    first, *others = lower.rows
    body = [*others, *upper.rows[_header_depth(upper) :]]
    columns = zip(first, zip(*body, strict=True), strict=True) if body else []
    return any(_is_word(top) and all(map(_is_number, below)) for top, below in columns)


def _is_word(cell: Cell | None) -> bool:
    return cell is not None and any(map(str.isalpha, cell.text)) and not any(map(str.isdigit, cell.text))


def _is_number(cell: Cell | None) -> bool:
    return cell is not None and any(map(str.isdigit, cell.text)) and not any(map(str.isalpha, cell.text))


def _row_key(row: Row) -> list[tuple[str, int, int] | None]:
    return [("".join(cell.text.split()).casefold(), cell.colspan, cell.rowspan) if cell else None for cell in row]


def _kind(block: Block) -> Kind:
    text = block.text.strip()
    if block.label in RUNNING_HEADS or (len(text) <= 40 and _PAGE_NUMBER.fullmatch(text)):
        return "head"
    if block.asset or block.label in FIGURES:
        return "figure"
    if block.html:
        return "table"
    if block.label not in _PLAIN_LABELS:
        return _KINDS.get(block.label, "other")
    return next((kind for kind, beginning in _BEGINNINGS if beginning.match(text)), "paragraph")


def _elements(block: Block) -> Iterator[Block]:
    if block.asset or block.html:
        yield block
    elif block.label in _PLAIN_LABELS:
        boxes = block.boxes
        for text, is_table in _around_tables(block.text):
            for part in [text.strip()] if is_table else _paragraphs(text):
                yield msgspec.structs.replace(block, text=part, boxes=boxes, html=part if is_table else "")
                boxes = ()
    elif block.text.strip():
        yield block


def _around_tables(text: str) -> Iterator[tuple[str, bool]]:
    if any(fence in text for fence in _FENCES):  # a table within code is code
        return iter([(text, False)])
    return around_tables(text)


def _paragraphs(text: str) -> Iterator[str]:
    """Between blank lines, a heading's line by itself, code with its blank lines."""
    lines: list[str] = []
    fence = ""
    for line in [*text.split("\n"), ""]:
        opened = next((each for each in _FENCES if line.lstrip().startswith(each)), "")
        if fence:
            lines.append(line)
            if opened == fence:
                yield "\n".join(lines)
                lines, fence = [], ""
            continue
        is_alone = _HEADING.match(line) is not None
        if lines and (is_alone or opened or not line.strip()):
            yield "\n".join(lines)
            lines = []
        if is_alone:
            yield line
        elif line.strip():
            lines.append(line)
            fence = opened
    if lines:
        yield "\n".join(lines)


def _with_heads_apart(blocks: Sequence[Block], page: int, repeated: Collection[str]) -> list[_Part]:
    """The elements of a page, each by its place, and the running heads that were a part of one, by numbers below 0."""
    heads: dict[int, set[int]] = {}
    for at, number, line in _edge_lines(blocks):
        if any(key in repeated for key in _keys(line, page)):
            heads.setdefault(at, set()).add(number)
    further = itertools.count(-1, -1)
    parts = []
    for at, block in enumerate(blocks):
        if at not in heads:
            parts.append(_Part(page, at, block))
            continue
        index = at
        for is_head, text in _lines_apart(block.text, heads[at]):
            if is_head:
                parts.append(_Part(page, next(further), Block(label="header", text=text)))
            elif text.strip():
                parts.append(_Part(page, index, msgspec.structs.replace(block, text=text)))
                index, block = next(further), msgspec.structs.replace(block, boxes=())
    return parts


def _lines_apart(text: str, heads: Collection[int]) -> Iterator[tuple[bool, str]]:
    """The text in pieces of whole lines, and of each whether its lines are `heads`."""
    for is_head, lines in itertools.groupby(enumerate(text.split("\n")), lambda line: line[0] in heads):
        yield is_head, "\n".join(line for _, line in lines)


def _edge_lines(blocks: Sequence[Block]) -> Iterator[tuple[int, int, str]]:
    """The first two lines of a page, and the last two, of blocks that may be anything: which block, which of its
    lines, and the line."""
    for order in (1, -1):
        lines = itertools.takewhile(lambda each: each[2] is not None, _lines(blocks, order))
        yield from ((at, number, line) for at, number, line in itertools.islice(lines, 2) if line)


def _lines(blocks: Sequence[Block], order: Literal[1, -1]) -> Iterator[tuple[int, int, str | None]]:
    """From one end of a page: None where something stands that is no running head."""
    for at, block in list(enumerate(blocks))[::order]:
        if block.label in RUNNING_HEADS:
            continue
        if block.label not in _PLAIN_LABELS or _kind(block) not in ("paragraph", "head", "other"):
            yield at, 0, None
        else:
            yield from ((at, number, line) for number, line in list(enumerate(block.text.split("\n")))[::order])


def _keys(line: str, page: int) -> Iterator[str]:
    """What two lines have in common that are the same running head: all, or all but a number that is the page's."""
    line = " ".join(line.split())
    if not line or len(line) > LONGEST_HEAD:
        return
    yield line
    numbers = list(_NUMBER.finditer(line))
    for number in {numbers[0], numbers[-1]} if numbers else ():
        before, after = line[: number.start()], line[number.end() :]
        if not _COUNTED.search(before) or (before.rstrip().endswith("第") and after.lstrip()[:1] in ("页", "頁")):
            yield f"{before}#{int(number[0]) - page:+d}#{after}"


def _is_repeated(found: Sequence[int], walked: Sequence[int]) -> bool:
    """`found` on `walked` even and odd pages."""
    counts = [*zip(found, walked, strict=True), (sum(found), sum(walked))]
    return any(count >= FEWEST_REPETITIONS and count > of / 2 for count, of in counts)
