"""What a page break cut is put together again, and nothing else, in English and Chinese."""

import time
from collections.abc import Iterator

import pytest

from vllm_unified.documents.joining import Joint, elements, joined, merged_table, page_break, repeated_lines
from vllm_unified.documents.page import RUNNING_HEADS, Block, Page

HEAD = "<tr><th>Name</th><th>Count</th></tr>"
UPPER = f"<table>{HEAD}<tr><td>Li</td><td>1</td></tr></table>"
LOWER = "<table><tr><td>Wu</td><td>2</td></tr></table>"
BOTH = f"<table>{HEAD}<tr><td>Li</td><td>1</td></tr><tr><td>Wu</td><td>2</td></tr></table>"


def page(number: int, *blocks: Block | str) -> Page:
    return Page(number, blocks=tuple(Block(text=block) if isinstance(block, str) else block for block in blocks))


def table(html: str) -> Block:
    return Block("table", html, html=html)


def parts(*pages: Page, drop: bool = False) -> list[tuple[int, str]]:
    found = joined(pages, running_heads="drop" if drop else "keep", repeated=repeated_lines(pages))
    return [(each.page, each.block.text or each.block.asset) for each in found]


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (
            "The method was applied to a large",
            "sample of patients.",
            "The method was applied to a large sample of patients.",
        ),
        ("We propose an effi-", "cient method.", "We propose an efficient method."),
        ("The spread of COVID-", "19 was fast.", "The spread of COVID-19 was fast."),
        ("It was measured in the state of", "New York, twice.", "It was measured in the state of New York, twice."),
        ("There were apples, pears,", "Williams pears too.", "There were apples, pears, Williams pears too."),
        (
            "Results are given elsewhere (see",
            "(again) the list).",
            "Results are given elsewhere (see (again) the list).",
        ),
        (
            "本研究采用了一种新的方法来处理跨页的段落，并且进行了",
            "验证，结果表明有效。",
            "本研究采用了一种新的方法来处理跨页的段落，并且进行了验证，结果表明有效。",
        ),
        ("以下各节介绍本系统在生产环境之中如何部署与使用", "Python 语言。", None),
        ("The first sentence has ended.", "the next begins oddly.", None),
        ("“The quoted sentence has ended.”", "and more", None),
        ("The heading of a section", "The next paragraph begins.", None),
        ("这一句话已经结束了，后面没有其他的内容了。", "下一段从这里开始，不应当合并。", None),
        ("2024年3月1日", "各有关单位，请遵照执行。", None),
        ("Anna Brook, 3 March 2026", "湖滨水务：二〇二五年年度报告", None),
        ("# A heading without an end", "and a text", None),
        ("- an item of a list that goes", "on here", None),
        ("The conditions are the ones that follow here", "- an item", None),
        ("The formula of which we speak is this", "\\[x = 1\\]", None),
        ("The code of which we speak is this", "```\nx = 1\n```", None),
        ("以下条款适用于本合同所涉及的全部产品和服务以及", "第三章 附则", None),
        ("以下条款适用于本合同所涉及的全部产品和服务以及", "一、总则，适用范围", None),
    ],
)
def test_paragraphs(first: str, second: str, wanted: str | None) -> None:
    assert parts(page(1, first), page(2, second)) == ([(1, wanted)] if wanted else [(1, first), (2, second)])


def test_what_stands_between_two_parts_stays_where_it_was() -> None:
    pages = [
        page(
            1, "The text goes on and", Block("image", asset="images/page-1-img-1.jpg"), Block("footer", "ACME"), "- 1 -"
        ),
        page(2, Block("header", "Report"), Block("image_caption", "Figure 1"), "on and", Block("page_number", "2")),
        page(3, "ends here.\n\nNext."),
    ]
    text, figure, caption = (
        (1, "The text goes on and on and ends here."),
        (1, "images/page-1-img-1.jpg"),
        (2, "Figure 1"),
    )
    kept = [text, figure, (1, "ACME"), (1, "- 1 -"), (2, "Report"), caption, (2, "2"), (3, "Next.")]
    assert parts(*pages) == kept
    assert parts(*pages, drop=True) == [text, figure, (1, "- 1 -"), caption, (3, "Next.")]


@pytest.mark.parametrize("label", sorted(RUNNING_HEADS))
def test_every_label_of_a_running_head_is_dropped(label: str) -> None:
    assert parts(page(1, Block(label, "ACME"), "A text."), drop=True) == [(1, "A text.")]


def test_a_head_is_known_on_pages_without_labels_by_those_with_them() -> None:
    labelled = page(1, Block("header", "ACME: a report"), "It goes on and", Block("page_number", "1"))
    plain = page(2, "ACME: a report\non and ends.\n1\n2")
    assert parts(labelled, plain, drop=True) == [(1, "It goes on and on and ends.\n1")]
    kept = [(1, "ACME: a report"), (1, "It goes on and on and ends.\n1"), (1, "1"), (2, "ACME: a report"), (2, "2")]
    assert parts(labelled, plain) == kept


def test_heads_that_no_model_has_labelled_are_kept_out_of_paragraphs() -> None:
    pages = [page(number, f"ACME report\nPart {number} goes on and on in the\n- {number} -") for number in (1, 2, 3)]
    wanted = "Part 1 goes on and on in the Part 2 goes on and on in the Part 3 goes on and on in the"
    assert parts(*pages, drop=True) == [(1, wanted)]
    assert parts(*pages) == [
        (1, "ACME report"),
        (1, wanted),
        (1, "- 1 -"),
        (2, "ACME report"),
        (2, "- 2 -"),
        (3, "ACME report"),
        (3, "- 3 -"),
    ]


@pytest.mark.parametrize(
    "pages",
    [
        [page(1, "The text goes on and"), page(3, "on and ends.")],
        [page(1, "The text goes on and"), Page(2, source="nothing"), page(3, "on and ends.")],
    ],
)
def test_pages_that_are_no_neighbours_are_not_joined(pages: list[Page]) -> None:
    assert parts(*pages) == [(1, "The text goes on and"), (3, "on and ends.")]


def test_nothing_is_joined_when_not_asked_for() -> None:
    pages = [page(1, "The text goes on and"), page(2, "on and ends.")]
    assert [each.page for each in joined(pages, join_pages=False)] == [1, 2]


@pytest.mark.parametrize(
    ("upper", "lower", "wanted"),
    [
        (UPPER, LOWER, BOTH),
        (UPPER, f"<table>{HEAD}<tr><td>Wu</td><td>2</td></tr></table>", BOTH),
        (UPPER, "<table><tr><td>Wu</td></tr></table>", None),
        (UPPER, "<table><tr><th>City</th><th>Rain</th></tr><tr><td>Wu</td><td>2</td></tr></table>", None),
        (UPPER, "<table><tr><td>City</td><td>Rain</td></tr><tr><td>Wu</td><td>2</td></tr></table>", None),
        (
            "<table><tr><td>名称</td><td>数量</td></tr><tr><td>甲</td><td>1</td></tr></table>",
            "<table><tr><td> 名称</td><td>数量</td></tr><tr><td>乙</td><td>2</td></tr></table>",
            "<table><tr><td>名称</td><td>数量</td></tr><tr><td>甲</td><td>1</td></tr><tr><td>乙</td><td>2</td></tr></table>",
        ),
        (
            "| A | B |\n|---|---|\n| x | 1 |",
            "| y | 2 |\n|---|---|\n| z | 3 |",
            "| A | B |\n| --- | --- |\n| x | 1 |\n| y | 2 |\n| z | 3 |",
        ),
    ],
)
def test_tables(upper: str, lower: str, wanted: str | None) -> None:
    assert parts(page(1, upper), page(2, lower)) == ([(1, wanted)] if wanted else [(1, upper), (2, lower)])


@pytest.mark.parametrize("caption", ["Table 2 (continued)", "Table 2. Cont'd", "续表2", "表 2（续）"])
def test_a_caption_that_says_continued_goes(caption: str) -> None:
    assert parts(page(1, table(UPPER)), page(2, caption, table(LOWER))) == [(1, BOTH)]


@pytest.mark.parametrize("between", ["Table 3: Rain", "表3：降水", "# Rain", "A text between the two."])
def test_another_text_keeps_tables_apart(between: str) -> None:
    assert parts(page(1, table(UPPER)), page(2, between, table(LOWER))) == [(1, UPPER), (2, between), (2, LOWER)]


def report(number: int, head: str, foot: str) -> Page:
    return page(
        number, f"{head}\nThis is the text of page {number * number}.\n\nIt ends at {number * number}.\n\n{foot}"
    )


@pytest.mark.parametrize(
    ("head", "foot"),
    [("ACME Annual Report 2024", "Page {} of 90"), ("年度报告", "第 {} 页"), ("Report | {}", "- {} -")],
)
def test_repeated_lines_are_running_heads(head: str, foot: str) -> None:
    pages = [report(number, head.format(number + 4), foot.format(number + 4)) for number in range(1, 6)]
    assert [text for _, text in parts(*pages, drop=True)] == [
        text
        for number in range(1, 6)
        for text in (f"This is the text of page {number * number}.", f"It ends at {number * number}.")
    ]
    assert len(parts(*pages)) == 4 * 5


@pytest.mark.parametrize("head", ["Question {}", "第 {} 题", "# Report", "- an item", "| a | b |"])
def test_what_may_be_the_document_s_own_is_never_dropped(head: str) -> None:
    pages = [
        page(number, head.format(number), f"This is the text of page {number * number}.") for number in range(1, 6)
    ]
    assert parts(*pages, drop=True) == parts(*pages)


def test_two_pages_are_too_few_to_tell() -> None:
    pages = [report(number, "ACME", "3") for number in (1, 2)]
    assert parts(*pages, drop=True) == parts(*pages)


def told(first: Page, second: Page, joint: Joint) -> tuple[list[str], list[str]]:
    warnings: list[str] = []
    found = joined([first, second], joints={1: [joint]}.get, warn=warnings.append)
    return [each.block.text for each in found], warnings


def test_a_model_s_decision_stands_for_our_rule() -> None:
    assert told(page(1, "It has ended.", "B"), page(2, "C", "D"), Joint(0, 1)) == (["It has ended. D", "B", "C"], [])
    assert told(page(1, UPPER), page(2, LOWER), Joint(0, 0, BOTH)) == ([BOTH], [])


@pytest.mark.parametrize("joint", [Joint(-1, 0), Joint(0, 99), Joint(5, 0)])
def test_a_bad_index_is_ignored(joint: Joint) -> None:
    texts, warnings = told(page(1, "The text goes on and"), page(2, "on."), joint)
    assert texts == ["The text goes on and", "on."]
    assert len(warnings) == 1


@pytest.mark.parametrize("html", ["", "half a table", "<table><tr><td>lost</td></tr></table>"])
def test_a_merge_that_failed_glues_no_tables_together(html: str) -> None:
    lower = "<table><tr><td>1</td><td>2</td><td>3</td></tr></table>"
    texts, warnings = told(page(1, UPPER), page(2, lower), Joint(0, 0, html))
    assert texts == [UPPER, lower]
    assert len(warnings) == 1


def rows(*lines: str) -> str:
    """Cells between blanks, a header where the line ends with *."""
    written = []
    for line in lines:
        tag = "th" if line.endswith("*") else "td"
        written.append("".join(f"<{tag}>{cell}</{tag}>" for cell in line.removesuffix("*").split()))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in written)}</table>"


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (rows("a b", "c 1"), rows("d 2"), rows("a b", "c 1", "d 2")),
        (rows("a b*", "c 1"), rows("a b*", "d 2"), rows("a b*", "c 1", "d 2")),
        (rows("a b", "c 1"), rows("A B", "d 2"), rows("a b", "c 1", "d 2")),
        (rows("a b", "c 1", "effi- 2"), rows("cient 3"), rows("a b", "c 1", "efficient 23")),
        (rows("a b", "c 1"), rows("x y", "z 2"), rows("a b x y", "c 1 z 2")),
        (rows("名 数", "甲 1"), rows("乙 2"), rows("名 数", "甲 1", "乙 2")),
    ],
)
def test_a_table_that_a_model_merged(first: str, second: str, told: str) -> None:
    assert merged_table(first, second, told) == told


@pytest.mark.parametrize(
    "told",
    [
        "",
        "<table></table>",
        "I cannot merge them.",
        rows("a b", "c 1"),
        rows("a b", "d 2"),
        rows("a b", "c 1", "d 3"),
        rows("a b", "c 1", "d 2", "e 3"),
        rows("a b", "c 1", "d 2", "d 2"),
        rows("ab c1 d2"),
        f"<table>{'<tr><td>a</td></tr>' * 200_000}</table>",
    ],
    ids=lambda told: told[:60],
)
def test_a_table_that_is_not_both_of_them_is_none(told: str) -> None:
    assert merged_table(rows("a b", "c 1"), rows("a b", "d 2"), told) == ""


@pytest.mark.parametrize("second", ["", "no table", "<table></table>"])
def test_a_table_and_what_is_none_are_none(second: str) -> None:
    assert merged_table(rows("a b", "c 1"), second, rows("a b", "c 1")) == ""


def test_what_a_model_merged_is_written_anew() -> None:
    told = (
        '<table onclick="alert(1)"><caption>Buy now</caption><tr><td>a</td><td><script>x</script>b</td></tr>'
        '<tr><td style="x">c</td><td>1 &lt; 2</td></tr><tr><td>d</td><td>2</td></tr></table>'
    )
    first = "<table><caption>T</caption><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>1 &lt; 2</td></tr></table>"
    written = first.replace("</table>", "<tr><td>d</td><td>2</td></tr></table>")
    assert merged_table(first, rows("d 2"), told) == written


def test_time_is_linear_in_what_a_model_merged() -> None:
    def seconds(count: int) -> float:
        first, second = (rows(*(f"{side}{number} 1" for number in range(count))) for side in "ab")
        begun = time.process_time()
        assert merged_table(first, second, first.removesuffix("</table>") + second.removeprefix("<table>"))
        return time.process_time() - begun

    seconds(100)
    assert seconds(8000) < 16 * 4 * max(seconds(500), 1e-3)


@pytest.mark.parametrize(
    ("tables", "merged", "wanted"),
    [
        # The header comes again, then a row that the page break has cut.
        (
            (rows("a b", "c 1"), rows("a b", "d 2", "e x"), rows("y z", "f 3")),
            (rows("a b", "c 1", "d 2", "e x"), rows("a b", "d 2", "ey xz", "f 3")),
            [rows("a b", "c 1", "d 2", "ey xz", "f 3")],
        ),
        # A short part before longer ones: none of its rows is lost.
        (
            (rows("a b"), rows("c 1", "d 2"), rows("e 3", "f 4", "g 5")),
            (rows("a b", "c 1", "d 2"), rows("c 1", "d 2", "e 3", "f 4", "g 5")),
            [rows("a b", "c 1", "d 2", "e 3", "f 4", "g 5")],
        ),
        # The second answer does not begin with what the second page has: our own rule.
        (
            (rows("a b*", "c 1"), rows("a b*", "d 2"), rows("a b*", "e 3")),
            (rows("a b*", "c 1", "d 2"), rows("e 3", "d 2", "a b")),
            [rows("a b*", "c 1", "d 2", "e 3")],
        ),
        # And where that one cannot tell, both parts stay.
        (
            (rows("a b", "c 1"), rows("d 2"), rows("x y z")),
            (rows("a b", "c 1", "d 2"), rows("x y z", "d 2")),
            [rows("a b", "c 1", "d 2"), rows("x y z")],
        ),
    ],
)
def test_a_table_over_three_pages(tables: tuple[str, ...], merged: tuple[str, str], wanted: list[str]) -> None:
    pages = [page(number, table(html)) for number, html in enumerate(tables, 1)]
    joints = {number: [Joint(0, 0, html)] for number, html in enumerate(merged, 1)}
    assert [part.block.html or part.block.text for part in joined(pages, joints=joints.get)] == wanted


def test_where_nothing_is_told_our_rules_hold() -> None:
    pages = [page(number, "The text goes on and") for number in (1, 2, 3)]
    assert [part.page for part in joined(pages, joints={1: [], 2: []}.get)] == [1, 2, 3]
    pages = [page(1, "The text goes on and"), page(2, "which goes on and"), page(3, "on.")]
    texts = [part.block.text for part in joined(pages, joints={1: []}.get)]
    assert texts == ["The text goes on and", "which goes on and on."]


def test_elements() -> None:
    text = f"# A\nText\nof it.\n\n```\na\n\nb\n```\n{LOWER.replace('table', 'div')}\n\n- one\n- two"
    assert [block.text for block in elements(page(1, text))] == [
        "# A",
        "Text\nof it.",
        "```\na\n\nb\n```",
        LOWER.replace("table", "div"),
        "- one\n- two",
    ]
    assert [block.html for block in elements(page(1, f"Text\n{LOWER}\nmore"))] == ["", LOWER, ""]


def test_two_pages_are_held_at_a_time() -> None:
    walked = 0

    def pages() -> Iterator[Page]:
        nonlocal walked
        for walked in range(1, 1_001):
            yield page(walked, "The text ends here.", "Another one goes on and", "Nothing")

    for part in joined(pages()):
        assert walked - part.page <= 2


def test_page_break() -> None:
    assert page_break(3) == "<!-- page 3 -->"
