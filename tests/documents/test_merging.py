"""What a page break has cut, through the real client and over a socket to an OCRFlux that misbehaves on cue."""

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from tests.conftest import Project
from tests.documents.conftest import Served
from tests.documents.fake_ocr import FakeOcr
from tests.documents.test_service import ended, pdf_of
from vllm_unified.documents import engine as engines
from vllm_unified.documents.engine import Engine, EngineError
from vllm_unified.documents.joining import Joint
from vllm_unified.documents.merging import LONGEST_PAIRS, LONGEST_QUESTION, joints, pairs_in
from vllm_unified.documents.options import Options
from vllm_unified.documents.page import Block, Page
from vllm_unified.documents.profiles import BY_NAME

OCRFLUX = BY_NAME["ocrflux-3b"]
HEAD = "<tr><td>Name</td><td>Count</td></tr>"
LI, WU = "<tr><td>Li</td><td>1</td></tr>", "<tr><td>Wu</td><td>2</td></tr>"
# None of the tables that the tests have.
NO_TABLE = "<table><tr><td>nothing of it</td></tr></table>"


@pytest.mark.parametrize(
    ("answer", "pairs"),
    [
        ("[]", []),
        (" [ ]\n", []),
        ("[(3, 0)]", [(3, 0)]),
        ("[(3,0),(4, 12)]", [(3, 0), (4, 12)]),
        ("[[3, 0], [4, 1]]", [(3, 0), (4, 1)]),
        ("[(3, 0)]<|im_end|>", [(3, 0)]),
        ("", None),
        ("[", None),
        ("()", None),
        ("(3, 0)", None),
        ("[3, 0]", None),
        ("[(3, 0)", None),
        ("[(3, 0),]", None),
        ("[(3, 0)(4, 1)]", None),
        ("[(3, 0, 1)]", None),
        ("[(-1, 0)]", None),
        ("[(3.0, 0)]", None),
        ("[(99999, 0)]", None),
        ("[(٣, 0)]", None),
        ("[(3, 0), (3, 1)]", None),
        ("[(3, 0), (4, 0)]", None),
        ("The pairs are [(3, 0)]", None),
        ("[(__import__('os').system('true'), 0)]", None),
        ("[" * 500, None),
        ("[" + "(" * 900 + "]", None),
        (f"[{', '.join(f'({n}, {n})' for n in range(LONGEST_PAIRS))}]", None),
    ],
)
def test_pairs(answer: str, pairs: list[tuple[int, int]] | None) -> None:
    assert pairs_in(answer) == pairs


@pytest.fixture
def ocr() -> Iterator[FakeOcr]:
    with FakeOcr(form="ocrflux-json") as fake:
        yield fake


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "FIRST_PAUSE_SECONDS", 0.01)


def page(number: int, *blocks: Block | str) -> Page:
    return Page(number, blocks=tuple(Block("text", each) if isinstance(each, str) else each for each in blocks))


def table(*rows: str) -> Block:
    html = f"<table>{''.join(rows)}</table>"
    return Block("table", html, html=html)


UPPER = page(1, "# Names", Block("image", asset="images/page-1-img-1.jpg"), "They are these.", table(HEAD, LI))
LOWER = page(2, table(HEAD, WU), "That was all.")
BOTH = [Joint(3, 0, f"<table>{HEAD}{LI}{WU}</table>")]


def told(ocr: FakeOcr, first: Page, second: Page, options: Options | None = None, **more: Any) -> Any:
    """A list of joints, None where nothing was asked, and why there was no answer."""

    async def asked() -> Any:
        engine = Engine(ocr.url, "k")
        try:
            found = await joints(
                partial(engine.ask, "ocr", on_behalf_of="alice"),
                first,
                second,
                options or Options(),
                more.pop("profile", OCRFLUX),
                **more,
            )
            return None if found is None else list(found)
        except EngineError as error:
            return str(error)
        finally:
            await engine.aclose()

    return asyncio.run(asked())


def test_which_go_on_and_two_tables_as_one(ocr: FakeOcr) -> None:
    assert told(ocr, UPPER, LOWER, max_model_len=32_768) == BOTH
    pairs, tables = ocr.seen["requests"]
    # The figure is none of the elements that the model counts.
    assert "0. # Names\n\n1. They are these.\n\n2. <table>" in pairs["prompt"]
    assert (pairs["mode"], tables["mode"]) == ("pairs", "tables")
    assert {(each["width"], each["height"], each["on_behalf_of"], each["temperature"]) for each in (pairs, tables)} == {
        (28, 28, "alice", 0.0)
    }
    assert "max_tokens" in pairs["fields"]


def test_paragraphs_need_no_second_question(ocr: FakeOcr) -> None:
    assert told(ocr, page(1, "A text that goes"), page(2, "on.", "Another.")) == [Joint(0, 0)]
    assert told(ocr, page(1, "A text that ends."), page(2, "Another.")) == []
    assert [each["mode"] for each in ocr.seen["requests"]] == ["pairs", "pairs"]


@pytest.mark.parametrize(
    ("first", "second", "more"),
    [
        (page(1), LOWER, {}),
        (UPPER, page(2, Block("image", asset="images/page-2-img-1.jpg")), {}),
        (UPPER, LOWER, {"profile": BY_NAME["deepseek-ocr"]}),
        (page(1, "long " * LONGEST_QUESTION), LOWER, {}),
    ],
)
def test_what_is_not_asked(ocr: FakeOcr, first: Page, second: Page, more: dict[str, Any]) -> None:
    assert told(ocr, first, second, **more) is None
    assert ocr.seen["requests"] == []


@pytest.mark.parametrize(
    ("cues", "found", "temperatures"),
    [
        (["empty"], BOTH, [0.0, 0.1]),
        (["say:[(2, 0", "refusal", "nonsense"], BOTH, [0.0, 0.1, 0.2, 0.3]),
        (["500"], BOTH, [0.0, 0.1]),
        (["html"] * 4, "the model's answer is not in its own form", [0.0, 0.1, 0.2, 0.3]),
        (["html", "html", "html", "500"], "the engine answered 500: fake OCR: 500 as asked", [0.0, 0.1, 0.2, 0.3]),
        (["400"], "the engine answered 400: fake OCR: 400 as asked", [0.0]),
        (["truncate"], "the model's answer was cut off", [0.0]),
        (["say:[(0, 99), (99, 0), (7, 7)]"], [], [0.0]),
        (["say:[(99, 1), (2, 0)]"], BOTH, [0.0]),
        (["million_boxes"] * 4, "the engine's answer is longer than 4 MiB", [0.0, 0.1, 0.2, 0.3]),
    ],
)
def test_pairs_that_are_none(ocr: FakeOcr, cues: list[str], found: Any, temperatures: list[float]) -> None:
    ocr.behave(form="ocrflux-json", pairs=cues)
    assert told(ocr, UPPER, LOWER) == found
    assert [each["temperature"] for each in ocr.seen["requests"] if each["mode"] == "pairs"] == temperatures


@pytest.mark.parametrize(
    ("cues", "found", "asked"),
    [
        (["html"], BOTH, 2),
        ([f"say:{NO_TABLE}", "empty"], BOTH, 3),
        ([f"say:<table>{HEAD}{LI}{WU}<tr><td>Yu</td><td>3</td></tr></table>"] * 4, [Joint(3, 0)], 4),
        ([f"say:<table>{HEAD}{WU}</table>"] * 4, [Joint(3, 0)], 4),
        (["truncate"], [Joint(3, 0)], 1),
        (["400"], [Joint(3, 0)], 1),
        (["million_boxes"] * 4, [Joint(3, 0)], 4),
        ([f"say:<table onclick=x>{HEAD}{LI}{WU}<script>x</script></table>"], BOTH, 1),
        ([f"say:<table>{HEAD}{LI}<tr><td>Wu\x07</td><td>2</td></tr></table>"], BOTH, 1),
        ([f"say:<table>{HEAD}{LI}{WU}\ud83d</table>"], BOTH, 2),
    ],
)
def test_a_table_that_is_none_is_left_to_our_rules(ocr: FakeOcr, cues: list[str], found: Any, asked: int) -> None:
    ocr.behave(form="ocrflux-json", tables=cues)
    assert told(ocr, UPPER, LOWER) == found
    assert sum(each["mode"] == "tables" for each in ocr.seen["requests"]) == asked


def test_retries_are_those_that_were_asked_for(ocr: FakeOcr) -> None:
    ocr.behave(form="ocrflux-json", pairs=["empty"] * 9)
    assert told(ocr, UPPER, LOWER, Options(retries=0)) == "the model's answer is not in its own form"
    assert len(ocr.seen["requests"]) == 1


# --- as the service's clients meet it ---

# A table over three pages, its header once more on the second; and a sentence that our own rule leaves apart.
TEXTS = {
    "1": f"# Names\n\n<Image>(80,300),(320,420)</Image>\n\nThey are these.\n\n<table>{HEAD}{LI}</table>",
    "2": f"<table>{HEAD}{WU}</table>",
    "3": "<table><tr><td>Yu</td><td>3</td></tr></table>\n\nThis is what they say of the house",
    "4": "Wu & Sons.",
}
JOINED = f"""\
<!-- page 1 -->

# Names

They are these.

<table>{HEAD}{LI}{WU}<tr><td>Yu</td><td>3</td></tr></table>

<!-- page 3 -->

This is what they say of the house Wu & Sons.
"""
MODEL: dict[str, Any] = {"model": "OCRFlux-3B", "form": "ocrflux-json"}


@pytest.fixture(scope="module")
def flux() -> Iterator[FakeOcr]:
    with FakeOcr(**MODEL) as fake:
        yield fake


@pytest.fixture(scope="module")
def served(flux: FakeOcr, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    project = Project(tmp_path_factory.mktemp("documents") / "project")
    (project.home / "config").mkdir(parents=True)
    served = Served(project, flux, pages_in_flight=2)
    served.start()
    yield served
    served.kill()


def converted(client: httpx.Client, **fields: str) -> str:
    sent = {"extract_images": "false", "max_page_retries": "0", **fields}
    answer = client.post("/convert/file", files={"file": ("a.pdf", pdf_of(4))}, data=sent)
    content = answer.raise_for_status().json()["content"]
    assert answer.json()["metadata"]["fallback_pages"] == []
    return str(content)


def asked_of(flux: FakeOcr, mode: str) -> list[str]:
    return [each["prompt"] for each in flux.seen["requests"] if each["mode"] == mode]


def test_a_document_is_put_together_as_the_model_says(client: httpx.Client, flux: FakeOcr) -> None:
    flux.behave(**MODEL, texts=TEXTS)
    assert converted(client) == JOINED
    assert (len(asked_of(flux, "pairs")), len(asked_of(flux, "tables"))) == (3, 2)
    assert {each["on_behalf_of"] for each in flux.seen["requests"]} == {"alice"}
    assert flux.seen["most_running"] <= 2


def test_nothing_is_asked_where_pages_stay_apart(client: httpx.Client, flux: FakeOcr) -> None:
    flux.behave(**MODEL, texts=TEXTS)
    content = converted(client, skip_cross_page_merge="true")
    assert content.count("<table>") == 3
    assert len(flux.seen["requests"]) == 4


@pytest.mark.parametrize(
    "merge",
    [
        {"pairs": ["say:[(99, 0)]", "html", "500"]},
        {"pairs": ["million_boxes", "refusal", "empty"]},
        {"pairs": ["400"] * 3},
        {"pairs": ["say:[(0, 0), (1, 1)]", "say:[(0, 1)]", "say:[(1, 0), (0, 0)]"], "tables": ["html"]},
        {"tables": [f"say:{NO_TABLE}", f"say:<table>{LI * 900}</table>"]},
        {"tables": ["million_boxes", "half_json"]},
        {"tables": ["400", "nonsense"]},
    ],
)
def test_no_answer_of_the_model_costs_the_document(
    client: httpx.Client, flux: FakeOcr, merge: dict[str, list[str]]
) -> None:
    flux.behave(**MODEL, texts=TEXTS, **merge)
    content = converted(client)
    for part in ("# Names", "They are these.", LI, WU, "<td>Yu</td><td>3</td>", "they say of the house", "Wu & Sons."):
        assert content.count(part) == 1, part
    assert "nothing of it" not in content
    assert "script" not in content


def test_killed_while_it_merges_it_asks_for_the_rest_alone(served: Served, flux: FakeOcr) -> None:
    texts = {str(number): f"<table>{HEAD}<tr><td>{number}</td><td>x</td></tr></table>" for number in range(1, 13)}
    flux.behave(**MODEL, latency=0.2, texts=texts)
    with served.client() as client:
        task_id = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(12))}).json()["task_id"]
        deadline = time.monotonic() + 60
        while len(asked_of(flux, "pairs")) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        served.kill()
        before = len(asked_of(flux, "pairs"))
        assert 4 <= before < 11
        served.start()
        document = ended(client, task_id)
        assert document["status"] == "succeeded"
        markdown = client.get(document["result"]["markdown_url"]).text
    asked = asked_of(flux, "pairs")
    assert len(set(asked)) == 11
    # Those that were in flight when it was killed, and no others; and no page.
    assert len(asked) <= 11 + 2
    assert {flux.seen["pages"][str(number)] for number in range(1, 13)} == {1}
    assert markdown.count("<table>") == 1
    assert markdown.count("</tr>") == 13
