"""Tables in three notations to a grid and back, however they are closed, and whatever they hold."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unified.documents.tables import (
    MOST_CELLS,
    MOST_COLUMNS,
    Cell,
    Marker,
    Table,
    around_tables,
    as_markdown,
    merged,
    parse_pipes,
    parse_table,
    table_html,
    without_loose_end,
)


def texts(table: Table | None) -> list[list[str | None]]:
    assert table is not None
    return [[cell.text if cell else None for cell in row] for row in table.rows]


@pytest.mark.parametrize(
    ("html", "wanted"),
    [
        ("<table><tr><td>1</td><td>2</td></tr><tr><td>3</td><td>4</td></tr></table>", [["1", "2"], ["3", "4"]]),
        ("<TABLE border=1><TR><TD>1<TD>2<TR><TD>3<TD>4", [["1", "2"], ["3", "4"]]),
        ("text <table><tbody><tr><td> a \n b<br/>c </td></tr></tbody></table> more", [["a b\nc"]]),
        ("<table><tr><td>1</td></tr><tr><td>2</td><td>3</td></tr></table>", [["1", ""], ["2", "3"]]),
        ("<table><tr><td colspan=2>a</td></tr><tr><td>b</td><td>c</td></tr></table>", [["a", None], ["b", "c"]]),
        ("<table><tr><td rowspan='2'>a</td><td>b</td></tr><tr><td>c</td></tr></table>", [["a", "b"], [None, "c"]]),
        ('<table><tr><td>a</td><td rowspan="2">b</td></tr><tr></tr></table>', [["a", "b"], ["", None]]),
        ("<table><tr><td>a</td></tr><tr></tr><tr><td>b</td></tr></table>", [["a"], ["b"]]),
        ("<table><tr><td><b>Total</b> <i>net</i></td><td><p>x</p><p>y</p></td></tr></table>", [["Total net", "x\ny"]]),
        (
            "<table><tr><td>10<sup>-3</sup></td><td>CO<sub>2</sub></td><td>1<sup>st</sup></td></tr></table>",
            [["10⁻³", "CO₂", "1st"]],
        ),
        (
            "<table><tr><td>p<0.05</td><td>a <b and c> d</td><td>List<int></td></tr></table>",
            [["p<0.05", "a <b and c> d", "List<int>"]],
        ),
        ("<table><tr><td>R&amp;D &lt;b&gt;</td><td>AT&T</td></tr></table>", [["R&D <b>", "AT&T"]]),
        ("<table><tr><td>a<script>alert('</td>')</script>b<style>td{}</style></td></tr></table>", [["ab"]]),
        ("<table><tr><td>a<script>alert(1)</td></tr></table>", [["a"]]),
        (
            "<table><tr><td>a<table><tr><td>b</td><td>c</td></tr></table>d</td><td>e</td></tr></table>",
            [["a\nb c\nd", "e"]],
        ),
        ("<table><tr>stray<td>a</td></tr></table>", [["stray", "a"]]),
        ("<table><tr><td>1</td></tr><table><tr><td>2</td></tr></table>", [["1"], ["2"]]),
        ("<table></table>", []),
        ("no table", []),
        ("", []),
    ],
)
def test_html(html: str, wanted: list[list[str | None]]) -> None:
    table = parse_table(html)
    assert texts(table) == wanted
    assert parse_table(table_html(table)) == table


@pytest.mark.parametrize(
    ("html", "wanted"),
    [
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>c</td><td>d</td></tr></table>", 1),
        ("<table><thead><tr><td>a</td></tr><tr><td>b</td></tr></thead><tbody><tr><td>c</td></tr></tbody></table>", 2),
        ("<table><tr><th>a</th><td>b</td></tr></table>", 0),
        ("<table></table>", 0),
    ],
)
def test_header_rows(html: str, wanted: int) -> None:
    assert parse_table(html).header_rows == wanted


def test_caption() -> None:
    table = parse_table("<table><caption>表 1 <b>结果</b></caption><tr><td>一</td></tr></table>")
    assert table == Table(((Cell("一"),),), caption="表 1 结果")


@pytest.mark.parametrize(
    "html",
    [
        '<table><tr><td rowspan="1000000000">a</td><td>b</td></tr><tr><td>c</td></tr></table>',
        '<table><tr><td rowspan="2">a</td><td>b</td></tr><tr><td>c</td></tr></table>',
        '<table><tr><td rowspan="0">a</td><td>b</td></tr><tr><td>c</td></tr></table>',
    ],
)
def test_a_span_ends_with_the_table(html: str) -> None:
    assert parse_table(html).rows == ((Cell("a", rowspan=2), Cell("b")), (None, Cell("c")))


@pytest.mark.parametrize(
    ("html", "rows", "columns"),
    [
        ("<table><tr><td colspan=1000000000>a</td><td>b</td></tr></table>", 1, MOST_COLUMNS),
        ("<table><tr>" + "<td>a" * (MOST_COLUMNS + 5), 1, MOST_COLUMNS),
        ("<table>" + ("<tr>" + "<td>a" * 500) * 201, MOST_CELLS // 500, 500),
        ("<table>" + "<tr><td>a" * 101 + "<tr>" + "<td>a" * MOST_COLUMNS, 101, 1),
    ],
)
def test_what_is_too_large_is_cut(html: str, rows: int, columns: int) -> None:
    table = parse_table(html)
    assert (len(table.rows), table.columns, table.cut) == (rows, columns, True)


@pytest.mark.parametrize(
    ("matrix", "wanted"),
    [
        # https://github.com/chatdoc-com/OCRFlux: as the model writes a header over two columns and two rows.
        (
            [["Name", "Score", "<l>"], ["<t>", "Math", "Art"], ["Li", "1", "2"]],
            [
                [("Name", 1, 2), ("Score", 2, 1), None],
                [None, ("Math", 1, 1), ("Art", 1, 1)],
                [("Li", 1, 1), ("1", 1, 1), ("2", 1, 1)],
            ],
        ),
        ([["a", "<l>"], ["<t>", "<lt>"]], [[("a", 2, 2), None], [None, None]]),
        ([["<l>", "a"], ["<lt>", "<l>"]], [[("", 1, 1), ("a", 1, 1)], [("", 1, 1), ("", 1, 1)]]),
        ([["a", "<l>"], ["<t>", "b"]], [[("a", 2, 1), None], [("", 1, 1), ("b", 1, 1)]]),
        ([["List<t>", "<l>"]], [[("List<t>", 2, 1), None]]),
    ],
)
def test_matrix(matrix: list[list[str]], wanted: list[list[tuple[str, int, int] | None]]) -> None:
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in matrix)
    table = parse_table(f"<table>{rows}</table>")
    assert [[cell and (cell.text, cell.colspan, cell.rowspan) for cell in row] for row in table.rows] == wanted


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (
            [[Cell("a", header=True), "<l>"], ["<t>", "<lt>"], [Cell("b"), Cell("<l>")]],
            '<tr><th colspan="2" rowspan="2">a</th></tr><tr></tr><tr><td>b</td><td>&lt;l&gt;</td></tr>',
        ),
        ([["<l>", Cell("a")], [Cell("b")]], "<tr><td></td><td>a</td></tr><tr><td>b</td><td></td></tr>"),
        ([], ""),
    ],
)
def test_merged(rows: list[list[Cell | Marker]], wanted: str) -> None:
    assert table_html(merged(rows)) == f"<table>{wanted}</table>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("| A | B |\n|---|:-:|\n| 1 | 2 |", [["A", "B"], ["1", "2"]]),
        ("A | B\n--- | ---\n1 | 2", [["A", "B"], ["1", "2"]]),
        ("|名称|数量|\n|-|-|\n|甲\\|乙|R&amp;D<br>x|", [["名称", "数量"], ["甲|乙", "R&D\nx"]]),
        ("| A | B |\n|---|---|\n| 1 |\n| 1 | 2 | 3 |", [["A", "B", ""], ["1", "", ""], ["1", "2", "3"]]),
    ],
)
def test_pipes(text: str, wanted: list[list[str]]) -> None:
    table = parse_pipes(text)
    assert texts(table) == wanted
    assert table is not None
    assert table.header_rows == 1


@pytest.mark.parametrize(
    "text", ["", "a | b", "| A |\ntext", "| A | B |\n| 1 | 2 |", "| A | B |\n|---|\n| 1 |", "A\n---\nb"]
)
def test_no_pipes(text: str) -> None:
    assert parse_pipes(text) is None


def test_markdown() -> None:
    table = parse_table(
        "<table><tr><th>名称</th><th>|x|</th></tr><tr><td>a &lt;script&gt;</td><td>\\|<br>2</td></tr></table>"
    )
    text = as_markdown(table)
    assert text == "| 名称 | \\|x\\| |\n| --- | --- |\n| a &lt;script&gt; | \\&#124;<br>2 |"
    assert parse_pipes(text) == table


@pytest.mark.parametrize("html", ["<table><tr><td colspan=2>a</td></tr></table>", "<table></table>"])
def test_what_markdown_cannot_tell(html: str) -> None:
    assert as_markdown(parse_table(html)) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a <table><tr><td>1</td></tr></table> b", ["<table><tr><td>1</td></tr></table>"]),
        (
            "<table><tr><td>1</td></table>\n<table><tr><td>2</td></table>",
            ["<table><tr><td>1</td></table>", "<table><tr><td>2</td></table>"],
        ),
        (
            "a <table><tr><td><table><td>1</table></td></tr></table> b",
            ["<table><tr><td><table><td>1</table></td></tr></table>"],
        ),
        ("a <table><tr><td>1", ["<table><tr><td>1"]),
        ("<table><tr><td>1\n<table><tr><td>2</table> b", ["<table><tr><td>1\n<table><tr><td>2</table>"]),
        ("a </table> b", []),
        ("the <table> tag, a <tablet> and <table></table>", []),
        ("", []),
    ],
)
def test_around_tables(text: str, wanted: list[str]) -> None:
    pieces = list(around_tables(text))
    assert [piece for piece, is_table in pieces if is_table] == wanted
    assert "".join(piece for piece, _ in pieces) == text


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        ("", ""),
        ("</td></tr></table>", "</td></tr></table>"),
        ("</td></tr><tr><td", "</td></tr>"),
        ("</td></tr><tr><td colspan='2", "</td></tr>"),
        ("</td></tr><tr>\n<td>", "</td></tr>"),
        ("</td><td></td", "</td>"),
        ("</td><td>p<0.05", "</td><td>p<0.05"),
        (" a > b <", " a > b "),
    ],
)
def test_what_a_table_was_cut_off_with(end: str, wanted: str) -> None:
    assert without_loose_end(f"<table><tr><td>1{end}") == f"<table><tr><td>1{wanted}"


def test_nothing_but_the_beginning_of_a_table() -> None:
    assert without_loose_end("<table><tr><td>" * 10_000) == ("<table><tr><td>" * 10_000).removesuffix("<tr><td>")
    assert without_loose_end("") == ""


TOKENS = [
    "<table>",
    "</table>",
    "<tr>",
    "</tr>",
    "<td>",
    "<td colspan=2>",
    "<td rowspan=3>",
    "<th>",
    "</td>",
    "<l>",
    "<t>",
]
TOKENS += [
    "<lt>",
    "a",
    "表",
    " ",
    "|",
    "\\",
    "<",
    "&lt;",
    "<sup>",
    "2",
    "</sup>",
    "<br>",
    "<caption>",
    "<script>",
    "</script>",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=40))
def test_any_table_is_a_grid_that_comes_back(tokens: list[str]) -> None:
    table = parse_table("<table>" + "".join(tokens))
    assert all(len(row) == table.columns for row in table.rows)
    covered = sum(cell.colspan * cell.rowspan for row in table.rows for cell in row if cell)
    assert covered >= len(table.rows) * table.columns - sum(cell is None for row in table.rows for cell in row)
    assert "<script" not in table_html(table)
    pipes = as_markdown(table)
    if pipes and not table.caption:
        assert texts(parse_pipes(pipes)) == texts(table)


@pytest.mark.parametrize(
    "part",
    ["<table>", "<tr><td>", "<td>", "<td ", "<b>", "<sup>", "<", "&", "<td rowspan=999999>", "<td><l>", "<script>"],
)
def test_time_is_linear(part: str) -> None:
    def seconds(size: int) -> float:
        html = "<table><tr><td>" + part * (size // len(part))
        begun = time.process_time()
        parse_table(html)
        list(around_tables(html))
        return time.process_time() - begun

    once, twice = (min(seconds(size) for _ in range(2)) for size in (20_000, 40_000))
    assert twice < 4 * max(once, 0.005)
