"""A document as plain text: no sign of Markdown, and tables whose columns stand under each other."""

from collections.abc import Iterator
from itertools import groupby
from typing import TextIO

from rich.cells import cell_len, chop_cells

from vllm_unified.documents.markdown import Cell, Paragraph, Span, Table

# In columns of a terminal, of which a Chinese character takes two.
WIDEST_COLUMN = 40
GAP = "  "
INDENT = "  "
RULE = "\u2500" * 20


class PlainText:
    """Takes the blocks of a document in order, and writes each as it comes."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._is_first = True
        self._after_item = False

    def add(self, block: Paragraph | Table) -> None:
        item = block if isinstance(block, Paragraph) and block.kind == "item" else None
        follows = item is not None and self._after_item and not (item.begins and item.level == 1)
        if not self._is_first and not follows:
            self._file.write("\n")
        self._is_first, self._after_item = False, item is not None
        for line in _table(block) if isinstance(block, Table) else _paragraph(block):
            self._file.write(f"{line.rstrip()}\n")


def _paragraph(paragraph: Paragraph) -> Iterator[str]:
    if paragraph.kind == "rule":
        yield RULE
        return
    mark = ""
    if paragraph.kind == "item":
        mark = "\u2022 " if paragraph.number is None else f"{paragraph.number}. "
    depth = 0 if paragraph.kind == "heading" else paragraph.level - bool(mark) + 2 * paragraph.quoted
    for line in _plain(paragraph.spans).split("\n"):
        yield INDENT * depth + mark + line
        mark = " " * len(mark)


def _plain(spans: tuple[Span, ...]) -> str:
    """A link's address after its text, a figure's description in brackets, m^2 for a superscript."""
    said = []
    for href, linked in groupby(spans, key=lambda span: span.href):
        text = "".join(_said(span) for span in linked)
        said.append(f"{text} ({href})" if href and text.strip() not in (href, href.removeprefix("mailto:")) else text)
    return "".join(said)


def _said(span: Span) -> str:
    if span.image:
        return f"[{span.text or span.image}]"
    if span.text.strip() and "sup" in span.styles:
        return f"^{span.text}"
    if span.text.strip() and "sub" in span.styles:
        return f"_{span.text}"
    return span.text


def _table(table: Table) -> Iterator[str]:
    rows = [[cell for column, cell in enumerate(cells) if cell.column == column] for cells in table.rows]
    texts = {id(cell): "\n".join(_plain(p.spans) for p in cell.paragraphs) for cells in rows for cell in cells}
    widths = _widths(table.columns, rows, texts)
    headers = table.header_rows
    wraps = False
    for row, cells in enumerate(rows):
        held = [(cell, _wrapped(texts[id(cell)] if cell.row == row else "", _width_of(cell, widths))) for cell in cells]
        height = max((len(lines) for _, lines in held), default=1)
        # Where a row takes several lines, blank ones tell the rows apart.
        if row and row != headers and (wraps or height > 1):
            yield ""
        wraps = height > 1
        for line in range(height):
            yield _line([(cell, lines[line] if line < len(lines) else "") for cell, lines in held], widths)
        if row + 1 == headers:
            yield GAP.join("-" * width for width in widths)


def _widths(columns: int, rows: list[list[Cell]], texts: dict[int, str]) -> list[int]:
    widths = [1] * columns
    for cells in rows:
        for cell in cells:
            if cell.colspan == 1:
                longest = max(cell_len(line) for line in texts[id(cell)].split("\n"))
                widths[cell.column] = min(WIDEST_COLUMN, max(widths[cell.column], longest))
    return widths


def _width_of(cell: Cell, widths: list[int]) -> int:
    return sum(widths[cell.column : cell.column + cell.colspan]) + len(GAP) * (cell.colspan - 1)


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in text.split("\n"):
        held = ""
        for word in line.split():
            if held and cell_len(held) + 1 + cell_len(word) <= width:
                held += f" {word}"
                continue
            if held:
                lines.append(held)
            *full, held = chop_cells(word, max(width, 2))
            lines.extend(full)
        lines.append(held)
    return lines


def _line(cells: list[tuple[Cell, str]], widths: list[int]) -> str:
    line, at = [], 0
    for cell, text in cells:
        while at < cell.column:
            line.append(" " * widths[at])
            at += 1
        room = " " * max(0, _width_of(cell, widths) - cell_len(text))
        half = len(room) // 2
        line.append({"right": room + text, "center": room[:half] + text + room[half:]}.get(cell.align, text + room))
        at += cell.colspan
    return GAP.join(line)
