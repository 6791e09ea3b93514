"""Tables that a model wrote, as HTML, as Markdown or as OCRFlux's matrix, to a grid of cells and back.

What a model wrote is never passed on: a table is read into cells of plain text, and written anew.
"""

import html
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, get_args

import msgspec

MOST_COLUMNS = 1_000
MOST_CELLS = 100_000

_CELLS = frozenset({"td", "th"})
_STRUCTURE = _CELLS | {"table", "thead", "tbody", "tfoot", "tr", "caption"}
_BREAKS = frozenset({"br", "p", "div", "li"})
_UNSEEN = frozenset({"script", "style"})
# Alone in a cell it merges that with its neighbour on the left, on top, or both.
Marker = Literal["<l>", "<t>", "<lt>"]
MARKERS: frozenset[str] = frozenset(get_args(Marker))
_RAISED = {
    "sup": str.maketrans("0123456789+-−=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ"),
    "sub": str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎"),
}
_INLINE = "center|code|col|colgroup|del|em|font|img|ins|mark|math|ol|small|span|strong|ul"
# A model writes `p<0.05`, `a <b and c> d` and `List<int>` as it sees them, and a browser's parser would lose them.
# So nothing but these is a tag, one of a letter only with an attribute or none, and no attribute holds < or >.
_LONG = "|".join(sorted({*_STRUCTURE, *_BREAKS, *_UNSEEN, *_RAISED, _INLINE, "lt"} - {"p"}))
_TAG = re.compile(rf"<(/?)((?:{_LONG})(?=[\s/>])|[abilpstu](?=\s[^<>=]*=|/?>))([^<>]*)>", re.IGNORECASE)
_TABLE = re.compile(r"<(/?)table(?:\s[^<>]*)?>", re.IGNORECASE)
_CELL = re.compile(r"<t[dh][\s>]", re.IGNORECASE)
_HALF_TAG = re.compile(r"<(?:/?[A-Za-z][^<>]{0,200})?")
_OPENED = re.compile(r"<t[rdh](?:\s[^<>]*)?>", re.IGNORECASE)
_COLSPAN = re.compile(r"\bcolspan=[\"']?(\d+)", re.IGNORECASE)
_ROWSPAN = re.compile(r"\browspan=[\"']?(\d+)", re.IGNORECASE)
_RULE = re.compile(r":?-+:?")


class Cell(msgspec.Struct, frozen=True, omit_defaults=True):
    """`text` is plain, with a newline where the cell breaks its line. Spans count columns and rows, from 1."""

    text: str = ""
    colspan: int = 1
    rowspan: int = 1
    header: bool = False


Row = tuple[Cell | None, ...]


class Table(msgspec.Struct, frozen=True, omit_defaults=True):
    """`rows` are all of one length; None is where a cell reaches to, from the left or from above.

    `cut`: the table was larger than `MOST_COLUMNS` or `MOST_CELLS`, and the rest of it is not here.
    """

    rows: tuple[Row, ...] = ()
    caption: str = ""
    cut: bool = False

    @property
    def columns(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    @property
    def header_rows(self) -> int:
        """How many rows at the top hold nothing but headers."""
        headers = itertools.takewhile(lambda row: all(cell is None or cell.header for cell in row), self.rows)
        return sum(1 for _ in headers)

    @property
    def has_spans(self) -> bool:
        return any(cell is None for row in self.rows for cell in row)


def parse_table(text: str) -> Table:
    """The first table of `text`, HTML however unclosed; a table without rows where there is none.

    OCRFlux's matrix is read too: `<l>`, `<t>` and `<lt>` alone in a cell merge it with its neighbour on the left,
    on top, or both (https://github.com/chatdoc-com/OCRFlux). Of inline markup the text stays, of scripts and styles
    nothing. Time is linear in `text`.
    """
    reader = _read(text)
    grid, cut = placed(reader.rows, _RawCell)
    rows = _begun(grid)
    if any(cell.marker for cell in itertools.chain(*rows) if cell):
        _merge(rows)
    return Table(_finished(rows), reader.caption, cut)


def merged(rows: Sequence[Sequence[Cell | Marker]]) -> Table:
    """A table of cells that take one place each, and of markers; a row may be shorter than another."""
    raw = [
        [_RawCell(each, marker=True) if isinstance(each, str) else _RawCell(each.text, each.header) for each in row]
        for row in rows
    ]
    grid, cut = placed(raw, _RawCell)
    begun = _begun(grid)
    _merge(begun)
    return Table(_finished(begun), cut=cut)


def parse_pipes(text: str) -> Table | None:
    """A table in Markdown's pipes; None where `text` is anything else, or more than one."""
    lines = [line.strip() for line in text.strip().splitlines()]
    if len(lines) < 2 or not all("|" in line for line in lines):
        return None
    first, rule, *body = map(_between_pipes, lines)
    if len(rule) != len(first) or not all(_RULE.fullmatch(cell) for cell in rule):
        return None
    header = [_RawCell(_plain(cell), header=True) for cell in first]
    lower = [[_RawCell(_plain(cell)) for cell in row] for row in body]
    header += [_RawCell(header=True) for _ in range(max(map(len, lower), default=0) - len(header))]
    grid, cut = placed([header, *lower], _RawCell)
    return Table(_finished(_begun(grid)), cut=cut)


def around_tables(text: str) -> Iterator[tuple[str, bool]]:
    """`text` in pieces, and of each whether it is an HTML table; put together they are `text` again.

    A table that is not closed ends with the last one that is, or else with the text. Time is linear in `text`.
    """
    end = 0
    for start, stop in _tables_in(text):
        if _CELL.search(text, start, stop):
            yield text[end:start], False
            yield text[start:stop], True
            end = stop
    yield text[end:], False


def without_loose_end(table: str) -> str:
    """A table as HTML without the half of a tag, and the rows and cells of nothing, with which it was cut off."""
    end = table.rfind("<")
    if _HALF_TAG.fullmatch(table, max(end, 0)):
        table = table[:end]
    while table.endswith(">") and _OPENED.fullmatch(table, end := table.rfind("<")):
        table = table[:end].rstrip()
    return table


def table_html(table: Table) -> str:
    """`<table>` with rows and cells and nothing else, its text escaped."""
    caption = f"<caption>{_escaped(table.caption)}</caption>" if table.caption else ""
    rows = (f"<tr>{''.join(_cell_html(cell) for cell in row if cell)}</tr>" for row in table.rows)
    return f"<table>{caption}{''.join(rows)}</table>"


def as_markdown(table: Table) -> str | None:
    """With pipes, the first row as the header; None where it has spans, which Markdown cannot tell, or no cells."""
    if not table.columns or table.has_spans:
        return None
    header, *body = (f"| {' | '.join(_in_pipes(cell.text) for cell in row if cell)} |" for row in table.rows)
    caption = [_escaped(table.caption), ""] if table.caption else []
    return "\n".join([*caption, header, f"|{' --- |' * table.columns}", *body])


class Spanning(Protocol):
    """A cell that wants so many columns and rows, each from 1."""

    colspan: int
    rowspan: int


SpanningCell = TypeVar("SpanningCell", bound=Spanning)


def placed(
    rows: Sequence[Sequence[SpanningCell]], empty: Callable[[], SpanningCell]
) -> tuple[list[list[SpanningCell]], bool]:
    """The grid of a table, its rows all of one length: in each place the cell that covers it; and whether it was cut.

    No place is covered twice, and the spans of a cell become those that it got; where none is stands an `empty` one.
    A row without cells counts where one from above reaches into it. It is cut at `MOST_COLUMNS` and `MOST_CELLS`.
    """
    grid: list[list[SpanningCell]] = []
    covered: list[int] = []  # by column, the row at which the cell from above has ended
    end, cut = 0, False  # the row at which every cell from above has ended
    for cells in rows:
        number = len(grid)
        if not cells and end <= number:
            continue
        row, is_whole = _place(cells, grid[-1] if grid else [], number, covered, empty)
        end = max([end, *(number + cell.rowspan for cell in cells)])
        cut = cut or not is_whole
        if (number + 1) * len(row) > MOST_CELLS:
            cut = True
            break
        grid.append(row)
    columns = max(map(len, grid), default=0)
    for row in grid:
        row.extend(empty() for _ in range(columns - len(row)))
    for number, _, cell in beginnings(grid):
        cell.rowspan = min(cell.rowspan, len(grid) - number)
    return grid, cut


def beginnings(grid: Sequence[Sequence[SpanningCell]]) -> Iterator[tuple[int, int, SpanningCell]]:
    """Row and column of each cell of what `placed` gave, and the cell, once."""
    above: Sequence[SpanningCell | None] = ()
    for number, row in enumerate(grid):
        left = None
        for column, cell in enumerate(row):
            if cell is not left and not (above and cell is above[column]):
                yield number, column, cell
            left = cell
        above = row


@dataclass(slots=True)
class _RawCell:
    text: str = ""
    header: bool = False
    colspan: int = 1
    rowspan: int = 1
    marker: bool = False


def _read(text: str) -> "_Reader":
    reader = _Reader()
    before, *tokens = _TAG.split(text)
    reader.read_text(before)
    for closing, tag, attributes, after in zip(*(tokens[part::4] for part in range(4)), strict=True):
        reader.read_tag(tag.lower(), attributes, is_end=bool(closing))
        reader.read_text(after)
    reader.end()
    return reader


@dataclass(slots=True)
class _Reader:
    """The rows of the first table among tags and text. Text of a table that stands in no cell becomes one."""

    rows: list[list[_RawCell]] = field(default_factory=list)
    caption: str = ""
    _depth: int = 0  # of tables in tables
    _inner: int = 0  # of them, those that stand in a cell: they are read as lines of its text
    _done: bool = False
    _in_head: bool = False
    _unseen: str = ""  # the script or style that we are in
    _raised: list[int] = field(default_factory=list)  # where in `_text` each open <sup> or <sub> begins
    _text: list[str] = field(default_factory=list)
    _cell: _RawCell | None = None
    _is_caption: bool = False

    def read_text(self, text: str) -> None:
        if text and not (self._done or self._unseen):
            self._text.append(html.unescape(text).replace("\n", " "))

    def read_tag(self, tag: str, attributes: str, *, is_end: bool) -> None:
        if self._done:
            return
        if self._unseen:
            self._unseen = "" if is_end and tag == self._unseen else self._unseen
        elif tag in _STRUCTURE and self._inner and tag != "table":
            self._text.append("\n" if tag == "tr" else " ")
        elif is_end:
            self._end_tag(tag)
        else:
            self._begin_tag(tag, attributes)

    def end(self) -> None:
        if not self._done:
            self._end_cell()

    def _begin_tag(self, tag: str, attributes: str) -> None:
        if tag == "table":
            self._enter_table()
        elif tag in _STRUCTURE:
            self._end_cell()
            self._begin_structure(tag, attributes)
        elif tag in _RAISED:
            self._raised.append(len(self._text))
        elif tag in _BREAKS:
            self._text.append("\n")
        elif tag in _UNSEEN:
            self._unseen = tag
        elif f"<{tag}>" in MARKERS:
            self._text.append(f"<{tag}>")

    def _end_tag(self, tag: str) -> None:
        if tag == "table":
            self._leave_table()
        elif tag in _STRUCTURE:
            self._end_cell()
            self._in_head = self._in_head and tag != "thead"
        elif tag in _RAISED:
            self._raise(tag)

    def _enter_table(self) -> None:
        if not self._depth:
            self._text.clear()
        self._depth += 1
        self._inner += self._cell is not None

    def _leave_table(self) -> None:
        self._depth -= 1
        self._inner -= self._inner > 0
        if self._depth <= 0:
            self._end_cell()
            self._done = True

    def _begin_structure(self, tag: str, attributes: str) -> None:
        if tag in _CELLS:
            spans = _span(_COLSPAN, attributes, MOST_COLUMNS, 1), _span(_ROWSPAN, attributes, MOST_CELLS, MOST_CELLS)
            self._cell = _RawCell("", tag == "th" or self._in_head, *spans)
        elif tag == "tr":
            self.rows.append([])
        elif tag == "caption":
            self._is_caption = True
        else:
            self._in_head = tag == "thead"

    def _end_cell(self) -> None:
        lines = (" ".join(line.split()) for line in "".join(self._text).split("\n"))
        text = "\n".join(line for line in lines if line)
        cell, is_caption = self._cell, self._is_caption
        self._text, self._raised, self._cell, self._is_caption = [], [], None, False
        if is_caption:
            self.caption = text
        elif cell or (text and (self._depth or self.rows)):
            cell = cell or _RawCell()
            cell.text = text
            cell.marker = text in MARKERS
            if not self.rows:
                self.rows.append([])
            self.rows[-1].append(cell)

    def _raise(self, tag: str) -> None:
        begin = self._raised.pop() if self._raised else None
        if begin is None or self._raised:  # within another, it is written with the outermost
            return
        text = "".join(self._text[begin:]).strip()
        raised = text.translate(_RAISED[tag])
        self._text[begin:] = [raised if all(map(str.__ne__, text, raised)) else text]


def _span(attribute: re.Pattern[str], attributes: str, most: int, of_zero: int) -> int:
    """HTML: a rowspan of 0 reaches to the last row."""
    found = attribute.search(attributes)
    if not found:
        return 1
    digits = found[1].lstrip("0")
    return most if len(digits) > 6 else min(most, int(digits or of_zero))


_RawRow = list[_RawCell | None]


def _begun(grid: Sequence[Sequence[_RawCell]]) -> list[_RawRow]:
    """With each cell where it begins alone."""
    rows: list[_RawRow] = [[None] * len(row) for row in grid]
    for number, column, cell in beginnings(grid):
        rows[number][column] = cell
    return rows


def _place(
    cells: Sequence[SpanningCell],
    above: Sequence[SpanningCell],
    number: int,
    covered: list[int],
    empty: Callable[[], SpanningCell],
) -> tuple[list[SpanningCell], bool]:
    """A row of `len(covered)` places, and whether all its cells have one. `above`: the row before it."""
    row: list[SpanningCell] = []
    for cell in cells:
        while len(row) < len(covered) and covered[len(row)] > number:
            row.append(above[len(row)])
        column = len(row)
        if column >= MOST_COLUMNS:
            return row, False
        cell.colspan = _room(covered, number, column, cell.colspan)
        covered.extend([0] * (column + cell.colspan - len(covered)))
        covered[column : column + cell.colspan] = [number + cell.rowspan] * cell.colspan
        row += [cell] * cell.colspan
    for column in range(len(row), len(covered)):
        row.append(above[column] if covered[column] > number else empty())
    return row, True


def _room(covered: list[int], number: int, column: int, wanted: int) -> int:
    """How many columns are free from `column` on, `wanted` at most."""
    end = min(column + wanted, MOST_COLUMNS)
    taken = (place for place in range(column + 1, min(end, len(covered))) if covered[place] > number)
    return next(taken, end) - column


def _merge(rows: list[_RawRow]) -> None:
    """Each cell with the markers that point at it; a marker that points at none is an empty cell."""
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            if cell and cell.marker:  # what a cell on the left or above did not take
                row[column] = _RawCell(header=cell.header)
            elif cell:
                _reach(rows, number, column, cell)


def _reach(rows: list[_RawRow], number: int, column: int, cell: _RawCell) -> None:
    width, height = len(rows[number]), len(rows)
    to_right = range(column + cell.colspan, width)
    right = next((place for place in to_right if _marker(rows[number][place]) != "<l>"), width)
    inner = range(column + 1, right)
    below = next(
        (
            place
            for place in range(number + 1, height)
            if _marker(rows[place][column]) != "<t>" or not all(_marker(rows[place][each]) for each in inner)
        ),
        height,
    )
    cell.colspan, cell.rowspan = right - column, max(cell.rowspan, below - number)
    for row in rows[number:below]:
        row[column:right] = [None] * cell.colspan
    rows[number][column] = cell


def _marker(cell: _RawCell | None) -> str:
    return cell.text if cell and cell.marker else ""


def _finished(rows: list[_RawRow]) -> tuple[Row, ...]:
    return tuple(tuple(_finished_cell(cell) for cell in row) for row in rows)


def _finished_cell(cell: _RawCell | None) -> Cell | None:
    return None if cell is None else Cell(cell.text, cell.colspan, cell.rowspan, cell.header)


def _tables_in(text: str) -> Iterator[tuple[int, int]]:
    depth = start = end = 0
    for tag in _TABLE.finditer(text):
        if not tag[1]:
            start, end = (start, end) if depth else (tag.start(), 0)
            depth += 1
        elif depth:
            depth, end = depth - 1, tag.end()
            if not depth:
                yield start, end
    if depth:
        yield start, end or len(text)


def _between_pipes(line: str) -> list[str]:
    escaped = line.replace("\0", "").replace("\\|", "\0")
    inner = escaped.removeprefix("|").removesuffix("|")
    return [cell.replace("\0", "|").strip() for cell in inner.split("|")]


def _plain(cell: str) -> str:
    if "<" not in cell and "&" not in cell:
        return cell
    return " ".join(each.text for row in _read(f"<td>{cell}").rows for each in row)


def _in_pipes(text: str) -> str:
    # After a backslash another would make a backslash of it, and the pipe a border.
    piped = _escaped(text).replace("\\|", "\\&#124;").replace("|", "\\|")
    return piped.replace("\n", "<br>")


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)


def _cell_html(cell: Cell) -> str:
    tag = "th" if cell.header else "td"
    colspan = f' colspan="{cell.colspan}"' if cell.colspan > 1 else ""
    rowspan = f' rowspan="{cell.rowspan}"' if cell.rowspan > 1 else ""
    return f"<{tag}{colspan}{rowspan}>{_escaped(cell.text).replace(chr(10), '<br>')}</{tag}>"
