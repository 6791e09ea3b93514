"""Markdown as models answer it, broken and hostile, becomes HTML that is safe, and blocks that lose nothing."""

import io
import re
from typing import Any

import lxml.html  # type: ignore[import-untyped]
import pytest

from vllm_unified.documents.markdown import LONGEST_PART, Paragraph, Table, blocks, fragments
from vllm_unified.documents.plain import PlainText


def html_of(markdown: str) -> str:
    return "\n".join(fragments(markdown))


def blocks_of(markdown: str) -> list[Paragraph | Table]:
    return [block for fragment in fragments(markdown) for block in blocks(fragment)]


def plain(markdown: str) -> str:
    file = io.StringIO()
    text = PlainText(file)
    for block in blocks_of(markdown):
        text.add(block)
    return file.getvalue()


def texts(table: Paragraph | Table) -> list[list[str]]:
    assert isinstance(table, Table)
    return [[cell.text for cell in row] for row in table.rows]


@pytest.mark.parametrize(
    "markdown",
    [
        "<script>alert(1)</script>",
        "<SCRIPT\n>alert(1)</SCRIPT\n>",
        "a <script>alert(1)",
        "<table><tr><td><script>alert(1)</script></td></tr></table>",
        "<img src=x onerror=alert(1)>",
        '<table onclick="alert(1)"><tr onmouseover=alert(1)><td>x</td></tr></table>',
        "[a](javascript:alert(1))",
        "<a href='java\nscript:alert(1)'>a</a>",
        '<a href="data:text/html,<script>alert(1)</script>">a</a>',
        '<a title="<img src=x onerror=alert(1)>">a</a>',
        "<svg/onload=alert(1)>",
        "<iframe src=//a.example></iframe>",
        "<style>@import '//a.example'</style><p style='background:url(//a.example)'>x",
        "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
        "![a](//a.example/x.png) ![b](../../etc/passwd) ![c](images/../../x.jpg) ![d](data:image/png;base64,AAAA)",
        "<form action=//a.example><input><button formaction=javascript:alert(1)>x</form>",
        "<!--><img src=x onerror=alert(1)>-->",
        "<b x='><img src=x onerror=alert(1)>'>",
        "[a](../../internal) <a href=//a.example>b</a>",
    ],
)
def test_nothing_that_acts_or_leads_elsewhere(markdown: str) -> None:
    for element in lxml.html.fragment_fromstring(html_of(markdown), create_parent="main").iter():
        assert element.tag in {"main", "p", "a", "b", "br", "img", "table", "tbody", "tr", "td"}
        assert set(element.attrib) <= {"alt", "title", "rel"}


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("# A *b*", "<h1>A <em>b</em></h1>"),
        ("~~a~~ <sup>2</sup>", "<p><s>a</s> <sup>2</sup></p>"),
        ("![f](images/page-2-img-1.jpg)", '<p><img src="images/page-2-img-1.jpg" alt="f"></p>'),
        ("[a](https://a.example/?b=1&c=2)", '<p><a href="https://a.example/?b=1&amp;c=2" rel="noopener noreferrer '
         'nofollow">a</a></p>'),
        ("<center>Figure 1</center>", '<div align="center">Figure 1</div>'),
        ("a\nb", "<p>a<br>\nb</p>"),
        ("Total\n---", "<p>Total</p>\n<hr>"),
        ("[1]: Smith, J. (1999)", "<p>[1]: Smith, J. (1999)</p>"),
        ("    no code", "<p>no code</p>"),
        ("3 < 4 > 2 & <unknown>x</unknown>", "<p>3 &lt; 4 &gt; 2 &amp; x</p>"),
        ("<b>left open", "<p><b>left open</b></p>"),
        ("3. a\n7. b", '<ol start="3">\n<li value="3">a</li>\n<li value="7">b</li>\n</ol>'),
        ("\\(a_1 * b_2 * c\\) and $x_i*y_i*$", "<p>\\(a_1 * b_2 * c\\) and $x_i*y_i*$</p>"),
        ("\\[\na_1\n- b \\\\\n= c < d\n\\]", "<p>\\[\na_1\n- b \\\\\n= c &lt; d\n\\]</p>"),
        ("$5 *a* $6", "<p>$5 <em>a</em> $6</p>"),
        ("```\n<table>\n```", "<pre><code>&lt;table&gt;\n</code></pre>"),
        ("the `<table>` tag", "<p>the <code>&lt;table&gt;</code> tag</p>"),
    ],
)  # fmt: skip
def test_markdown_as_pages_have_it(markdown: str, expected: str) -> None:
    # What was left open may leave an empty element behind.
    assert html_of(markdown).startswith(expected)


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("|a|b|\n|-|-|\n|1|2|", [["a", "b"], ["1", "2"]]),
        ("<table><tr><td rowspan=2>a<td colspan=2>b<tr><td>c<td>d</table>", [["a", "b", "b"], ["a", "c", "d"]]),
        ("<table>\n\n<tr>\n\n    <td>a</td>\n\n</tr>\n\n</table>", [["a"]]),
        ("<table><tr><td rowspan=0>a<td>b<tr><td>c<tr><td>d</table>", [["a", "b"], ["a", "c"], ["a", "d"]]),
        ("<table><tr><td>a<td rowspan=2>b<tr><td colspan=3>c</table>", [["a", "b"], ["c", "b"]]),
        ("<table><tr><td colspan=x rowspan=-1>a</table>", [["a"]]),
        ("<table><tr><td>a<br>b</td><td><b>c</b> d</td></tr></table>", [["a\nb", "c d"]]),
        ("<table><tr><td>a<table><tr><td>b<td>c</table></table>", [["a b  c"]]),
        ("<table><tr><th>cut off", [["cut off"]]),
    ],
)
def test_a_table_is_a_grid(markdown: str, expected: list[list[str]]) -> None:
    assert texts(blocks_of(markdown)[0]) == expected


@pytest.mark.parametrize("header", ["<tr><th>a</th><th>b</th></tr>", "<thead><tr><td>a</td><td>b</td></tr></thead>"])
def test_a_header_is_one_however_it_is_written(header: str) -> None:
    (table,) = blocks_of(f"<table>{header}<tr><td>1</td></tr></table>")
    assert isinstance(table, Table)
    assert (table.header_rows, texts(table)) == (1, [["a", "b"], ["1", ""]])


def test_a_table_too_wide_for_a_grid_is_lines_that_lose_nothing() -> None:
    cells = [f"c{number}" for number in range(1_200)]
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    found: list[Any] = blocks_of(f"<table><tr>{row}</tr><tr><td colspan=2>d</td></tr></table>")
    assert [block.text for block in found] == ["  ".join(cells), "d"]


def test_text_goes_on_after_a_table_that_was_cut_off() -> None:
    first, second = blocks_of("<table><tr><td>a</td><td>b\n\n## The next page")
    assert texts(first) == [["a", "b"]]
    assert isinstance(second, Paragraph)
    assert (second.kind, second.text) == ("heading", "The next page")


def test_a_table_in_a_line_of_text() -> None:
    before, table, after = blocks_of("before <table><tr><td>x</td></tr></table> after")
    assert isinstance(before, Paragraph)
    assert isinstance(after, Paragraph)
    assert (before.text, texts(table), after.text) == ("before", [["x"]], "after")


PLAIN = """Report

Two words, m^2, a link (https://a.example/).

1. one
3. three
   \u2022 inner

[Sales] next

\u5b63\u5ea6      Revenue
--------  -------
\u7b2c\u4e00\u5b63\u5ea6     12.5
                8
both columns

a * b
"""


def test_plain_text_without_signs_of_markdown() -> None:
    markdown = (
        "# Report\n\n**Two** *words*, m<sup>2</sup>, [a link](https://a.example/).\n\n"
        "1. one\n3. three\n   - inner\n\n![Sales](images/page-1-img-1.jpg) next\n\n"
        "<table><tr><th>\u5b63\u5ea6</th><th align=right>Revenue</th></tr><tr><td rowspan=2>\u7b2c\u4e00\u5b63\u5ea6"
        "</td><td align=right>12.5</td></tr><tr><td align=right>8</td></tr><tr><td colspan=2>both columns</td></tr>"
        "</table>\n\n```\na * b\n```\n"
    )
    assert plain(markdown) == PLAIN.replace("   \u2022 inner", "  \u2022 inner")


def test_a_long_cell_is_wrapped_within_its_column() -> None:
    lines = plain(f"<table><tr><td>{'word ' * 30}</td><td>x</td></tr></table>").splitlines()
    assert len(lines) == 4
    assert lines[0] == f"{'word ' * 8}  x".replace("word   x", "word   x")
    assert plain(f"<table><tr><td>{'w' * 95}</td></tr></table>").split() == ["w" * 40, "w" * 40, "w" * 15]


DEEP = 20_000


@pytest.mark.parametrize(
    "markdown",
    [
        "<div>" * DEEP + "kept",
        "<p>x".join(f"<b x={i}>" for i in range(2000)) + "kept",
        "<table><tr><td>" + "".join(f"<i x={i}>" for i in range(2000)) + "<p>x" * 2000 + "kept",
        "<table><tr><td>" * 500 + "kept",
        "<script>" * DEEP + "kept",
        "<!--" * DEEP + "kept",
        "<" * DEEP + "kept",
        "<" + "a" * DEEP + " kept",
        "[" * DEEP + "kept",
        "\\[\n" * DEEP + "kept",
        "$a " * DEEP + "kept",
        "**a *" * (DEEP // 10) + "kept",
        "a " + "`" * DEEP + "kept",
        "<table>" + "<tr><td colspan=999999999 rowspan=999999999>x</td><td></td></tr>" * 1000 + "</table>kept",
    ],
)
def test_hostile_markdown_costs_no_more_than_its_length(markdown: str) -> None:
    html = html_of(markdown)
    assert len(html) < 12 * len(markdown) + 1000
    assert "kept" in html
    assert "kept" in plain(markdown)


def test_characters_that_xml_cannot_hold() -> None:
    html = html_of("a\x00b\x0bc\ud800d &#0;&#11;&#12;&#xd800;\ufffe")
    assert html.startswith("<p>abcd")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe]", html)


@pytest.mark.parametrize("ending", ["\n\n", "\n", " "])
def test_a_long_page_comes_in_pieces_and_loses_no_word(ending: str) -> None:
    words = [f"w{number}" for number in range(30_000)]
    pieces = list(fragments(ending.join(" ".join(words[at : at + 50]) for at in range(0, len(words), 50))))
    assert len(pieces) > 1
    assert max(map(len, pieces)) < 2 * LONGEST_PART
    # Where a line is longer than a piece a word may be cut in two.
    found = "".join("".join(piece.itertext()) for piece in map(lxml.html.fromstring, pieces))
    assert re.sub(r"\s", "", found) == "".join(words)


@pytest.mark.parametrize("is_html", [True, False])
def test_a_table_of_ten_thousand_cells(is_html: bool) -> None:
    if is_html:
        markdown = "<table>" + ("<tr>" + "<td>cell</td>" * 10 + "</tr>\n") * 1000 + "</table>"
    else:
        markdown = "|c" * 10 + "|\n" + "|-" * 10 + "|\n" + ("|cell" * 10 + "|\n") * 999
    (table,) = blocks_of(markdown)
    assert isinstance(table, Table)
    assert (len(table.rows), table.columns) == (1000, 10)


def test_of_a_table_beyond_all_measure_the_text_remains() -> None:
    found: list[Any] = blocks_of("<table>" + "<tr><td>a</td><td>b</td></tr>" * 26_000 + "</table>")
    assert all(isinstance(block, Paragraph) for block in found)
    assert sum(block.text.count("a") for block in found) == 26_000
