"""A page through the real client and over a socket to the stand-in; tables of answers where no socket is needed."""

import asyncio
import io
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import pytest
from PIL import Image

from tests.documents.fake_ocr import FakeOcr, page_image
from vllm_unified.documents import engine as engines
from vllm_unified.documents.answers import Rotation
from vllm_unified.documents.engine import Answer, Engine, EngineError
from vllm_unified.documents.options import Mode, Options
from vllm_unified.documents.page import Block, Page
from vllm_unified.documents.profiles import BY_NAME, PLAIN, Profile
from vllm_unified.documents.reading import Step, ladder, read_page, request_of

DEEPSEEK, OCRFLUX = BY_NAME["deepseek-ocr"], BY_NAME["ocrflux-3b"]
FORMS = {profile.form: profile for profile in (DEEPSEEK, OCRFLUX, BY_NAME["granite-docling"], PLAIN)}
LAYER = "This is what page 7 says first, as the file has it. It has a second sentence. And here the third one."


class Found(msgspec.Struct, frozen=True):
    blocks: tuple[Block, ...] = ()
    warnings: tuple[str, ...] = ()


_PART = re.compile(r"<\|ref\|>([^<]*)<\|/ref\|><\|det\|>\[\[(\d+), (\d+), (\d+), (\d+)\][^<]*<\|/det\|>\n?([^<]*)")


def parse(answer: str, width: int, height: int) -> Found:
    """Enough of a parser for what the stand-in says."""
    return Found(
        tuple(
            Block(label, text.strip(), ((int(x1), int(y1), int(x2), int(y2)),))
            for label, x1, y1, x2, y2, text in _PART.findall(answer)
        )
    )


@pytest.fixture
def ocr() -> Iterator[FakeOcr]:
    with FakeOcr() as fake:
        yield fake


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "FIRST_PAUSE_SECONDS", 0.01)


def read(ocr: FakeOcr, options: Options | None = None, profile: Profile = DEEPSEEK, **more: Any) -> Page:
    limits = {name: more.pop(name) for name in ("read_seconds", "patience") if name in more}

    async def page() -> Page:
        engine = Engine(ocr.url, "k", **limits)
        image = more.pop("image", page_image(7))
        try:
            return await read_page(
                partial(engine.ask, "ocr"),
                image,
                "image/png",
                120,
                160,
                7,
                options or Options(),
                profile,
                understand=parse,
                **more,
            )
        finally:
            await engine.aclose()

    return asyncio.run(page())


# --- a page that is read at once ---


@pytest.mark.parametrize("form", FORMS)
def test_page_in_every_form(ocr: FakeOcr, form: str) -> None:
    ocr.behave(form=form)
    page = read(ocr, profile=FORMS[form])  # type: ignore[index]
    assert (page.number, page.source, page.reason, page.warnings, page.attempts) == (7, "model", "", (), 1)
    assert "# Page 7" in page.markdown
    assert "second sentence" in page.markdown
    assert "<|" not in page.markdown
    assert len(page.blocks) >= 4
    assert page.prompt_tokens == 903
    assert page.completion_tokens > 0
    assert page.seconds > 0


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        (Options(), "markdown"),
        (Options(mode="ocr"), "ocr"),
        (Options(mode="free"), "free"),
        (Options(mode="figure"), "figure"),
        (Options(mode="describe"), "describe"),
        (Options(mode="find", find_term="Total"), "find"),
        (Options(mode="prompt", prompt="What is it?"), "prompt"),
    ],
)
def test_page_in_every_mode(ocr: FakeOcr, options: Options, mode: str) -> None:
    page = read(ocr, options)
    (seen,) = ocr.seen["requests"]
    assert seen["mode"] == mode
    assert (seen["width"], seen["height"], seen["page"]) == (120, 160, 7)
    assert seen["temperature"] == 0.0
    assert seen["vllm_xargs"] == {"ngram_size": 30, "window_size": 90, "whitelist_token_ids": [128821, 128822]}
    assert page.source == "model"
    assert page.blocks


def test_raw_text_is_the_answer_to_the_letter(ocr: FakeOcr) -> None:
    assert read(ocr).raw_text.startswith("<|ref|>title<|/ref|><|det|>[[80, 60, 620, 100]]<|/det|>\n# Page 7\n")


@pytest.mark.parametrize(
    ("image_first", "system", "roles", "types"),
    [
        (True, None, ["user"], ["image_url", "text"]),
        (False, None, ["user"], ["text", "image_url"]),
        (True, "", ["system", "user"], ["image_url", "text"]),
    ],
)
def test_request(image_first: bool, system: str | None, roles: list[str], types: list[str]) -> None:
    request = request_of("OCR:", b"abc", "image/jpeg", {"temperature": 0.0}, image_first=image_first, system=system)
    assert [message["role"] for message in request["messages"]] == roles
    parts = {part["type"]: part for part in request["messages"][-1]["content"]}
    assert list(parts) == types
    assert parts["image_url"]["image_url"]["url"] == "data:image/jpeg;base64,YWJj"
    assert parts["text"]["text"] == "OCR:"
    assert request["temperature"] == 0.0


# --- the ladder ---


def steps(*asked: tuple[Mode, bool, float]) -> list[Step]:
    return [Step(*each) for each in asked]


@pytest.mark.parametrize(
    ("options", "profile", "expected"),
    [
        (Options(retries=0), DEEPSEEK, steps(("markdown", False, 0))),
        (Options(retries=1), DEEPSEEK, steps(("markdown", False, 0), ("markdown", True, 0))),
        (
            Options(retries=3),
            DEEPSEEK,
            steps(("markdown", False, 0), ("markdown", True, 0), ("ocr", True, 0), ("free", True, 0)),
        ),
        (
            Options(retries=5),
            DEEPSEEK,
            steps(
                ("markdown", False, 0),
                ("markdown", True, 0),
                ("ocr", True, 0),
                ("markdown", True, 0.1),
                ("markdown", True, 0.2),
                ("free", True, 0),
            ),
        ),
        (Options(mode="ocr", retries=2), DEEPSEEK, steps(("ocr", False, 0), ("ocr", True, 0), ("free", True, 0))),
        # Another prompt would answer another question.
        (
            Options(mode="describe", retries=2),
            DEEPSEEK,
            steps(("describe", False, 0), ("describe", True, 0), ("describe", True, 0.1)),
        ),
        (
            Options(retries=3),
            OCRFLUX,
            steps(("markdown", False, 0), ("markdown", True, 0), ("markdown", True, 0.1), ("markdown", True, 0.2)),
        ),
        # Its modes have one prompt.
        (
            Options(retries=2),
            BY_NAME["glm-ocr"],
            steps(("markdown", False, 0), ("markdown", True, 0), ("markdown", True, 0.1)),
        ),
    ],
)
def test_ladder(options: Options, profile: Profile, expected: list[Step]) -> None:
    assert ladder(options, profile) == expected


@pytest.mark.parametrize("cue", ["loop", "empty", "malformed", "refusal", "noise", "500", "nonsense", "million_boxes"])
def test_what_is_wrong_with_an_answer_is_noticed_and_the_page_read_again(ocr: FakeOcr, cue: str) -> None:
    ocr.behave(pages={7: [cue]})
    page = read(ocr)
    assert (page.source, page.warnings, page.attempts) == ("model", (), 2)
    assert "# Page 7" in page.markdown
    first, second = ocr.seen["requests"]
    assert first["vllm_xargs"]["ngram_size"] == 30
    assert second["vllm_xargs"] == {"ngram_size": 15, "window_size": 900, "whitelist_token_ids": [128821, 128822]}


def test_a_page_that_was_only_cut_off_goes_on_to_a_mode_with_shorter_answers(ocr: FakeOcr) -> None:
    ocr.behave(pages={7: ["truncate", "truncate"]})
    page = read(ocr)
    assert [seen["mode"] for seen in ocr.seen["requests"]] == ["markdown", "ocr", "free"]
    assert page.attempts == 3
    assert page.warnings == ('read in mode "free", as mode "markdown" gave no good answer',)
    assert page.markdown.endswith("第 7 页到此为止。")


@pytest.mark.parametrize("retries", [0, 1, 2, 5])
def test_as_many_attempts_as_were_asked_for(ocr: FakeOcr, retries: int) -> None:
    ocr.behave(cue="empty")
    page = read(ocr, Options(retries=retries))
    assert page.attempts == len(ocr.seen["requests"]) == 1 + retries
    assert (page.source, page.markdown) == ("nothing", "")


def test_tokens_and_time_of_every_attempt_count(ocr: FakeOcr) -> None:
    ocr.behave(pages={7: ["loop", "truncate"]}, latency=0.05)
    page = read(ocr)
    assert page.attempts == 3
    assert page.prompt_tokens == 3 * 903
    assert page.completion_tokens > 2 * 8192
    assert page.seconds >= 0.15


# --- the best that came of it ---


def test_a_loop_is_left_out_of_the_answer_that_is_kept(ocr: FakeOcr) -> None:
    ocr.behave(cue="loop")
    page = read(ocr)
    assert page.attempts == 4
    assert page.source == "model"
    assert page.warnings[0] == "the answer repeats itself at its end, which was left out"
    assert page.markdown.count("This sentence comes again and again.") == 1
    assert page.raw_text.count("This sentence comes again and again.") == 200


def test_the_best_answer_is_kept(ocr: FakeOcr) -> None:
    ocr.behave(pages={7: ["noise", "truncate", "loop", "empty"]})
    page = read(ocr)
    assert page.attempts == 4
    assert page.warnings == ("the answer was cut off where the model's context ends",)
    assert page.raw_text.startswith("<|ref|>title")


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"cue": "empty"}, "the model's answer is empty"),
        ({"cue": "refusal"}, "the model's answer reads as if the model refused"),
        ({"cue": "noise"}, "the model's answer is mostly special tokens; the model's answer is empty"),
        ({"cue": "400"}, "the engine answered 400: fake OCR: 400 as asked"),
        ({"cue": "500"}, "the engine answered 500: fake OCR: 500 as asked"),
        ({"cue": "cut"}, r"the connection broke: .*; it was sent 3 times"),
        ({"cue": "nonsense"}, "the engine's answer is no chat completion: .*"),
    ],
)
def test_text_layer_stands_in_with_the_reason(ocr: FakeOcr, behaviour: dict[str, Any], reason: str) -> None:
    ocr.behave(**behaviour)
    page = read(ocr, text_layer=f"{LAYER}\n\nAnother paragraph.\n")
    assert re.fullmatch(reason, page.reason)
    assert (page.source, page.number, page.width, page.height) == ("text_layer", 7, 120, 160)
    assert page.markdown == f"{LAYER}\n\nAnother paragraph."
    assert [block.text for block in page.blocks] == [LAYER, "Another paragraph."]


@pytest.mark.parametrize(
    ("cue", "limit", "reason"),
    [
        ("hang", "read_seconds", "the engine said nothing for 0.5 s"),
        ("503", "patience", "503: fake OCR: 503 as asked; given up after 0.5 s"),
    ],
)
def test_an_engine_that_hangs_or_stays_away(ocr: FakeOcr, cue: str, limit: str, reason: str) -> None:
    ocr.behave(cue=cue)
    page = read(ocr, **{limit: 0.5})  # type: ignore[arg-type]
    assert (page.source, page.reason, page.attempts) == ("nothing", reason, 1)


def test_nothing_stands_in_where_the_file_has_no_text(ocr: FakeOcr) -> None:
    ocr.behave(cue="400")
    page = read(ocr, text_layer=" \n")
    assert (page.source, page.markdown, page.blocks, page.attempts) == ("nothing", "", (), 1)
    assert page.reason == "the engine answered 400: fake OCR: 400 as asked"


def test_a_part_of_a_page_gives_way_to_all_of_its_text(ocr: FakeOcr) -> None:
    ocr.behave(cue="truncate")
    assert read(ocr, text_layer=LAYER).source == "model"
    page = read(ocr, text_layer="\n\n".join([LAYER] * 50))
    assert page.source == "text_layer"
    assert page.reason == "the model's answer was cut off where the model's context ends"
    assert page.raw_text


def test_a_refusal_may_be_what_the_page_says(ocr: FakeOcr) -> None:
    ocr.behave(cue="refusal")
    page = read(ocr)
    assert page.source == "model"
    assert page.markdown == "I'm sorry, but I can't assist with reading this image."
    assert page.warnings == ("the answer reads as if the model refused",)


def test_an_answer_is_kept_when_the_engine_goes_away_before_a_better_one(ocr: FakeOcr) -> None:
    ocr.behave(pages={7: ["truncate", "400"]})
    page = read(ocr)
    assert page.source == "model"
    assert page.warnings == (
        "the answer was cut off where the model's context ends",
        "not read again: the engine answered 400: fake OCR: 400 as asked",
    )


@pytest.mark.parametrize("cue", ["html", "half_json"])
@pytest.mark.parametrize("form", FORMS)
def test_an_answer_of_any_kind_is_text_and_no_error(ocr: FakeOcr, form: str, cue: str) -> None:
    ocr.behave(form=form, cue=cue)
    page = read(ocr, Options(retries=0), FORMS[form])  # type: ignore[index]
    assert page.source == "model"
    assert page.markdown
    assert not page.reason


# --- blank pages ---


def test_nothing_is_the_right_answer_for_a_blank_page(ocr: FakeOcr) -> None:
    ocr.behave(cue="empty")
    page = read(ocr, blank=True)
    assert (page.source, page.markdown, page.reason, page.warnings, page.attempts) == ("model", "", "", (), 1)


def test_what_a_model_reads_on_a_blank_page_is_kept(ocr: FakeOcr) -> None:
    assert "# Page 7" in read(ocr, blank=True).markdown


def test_ocrflux_says_null_of_a_blank_page() -> None:
    async def ask(_: dict[str, Any]) -> Answer:
        return Answer('{"is_rotation_valid": true, "natural_text": null}', "stop")

    def page(blank: bool) -> Page:
        return asyncio.run(read_page(ask, b"", "image/png", 9, 9, 1, Options(), OCRFLUX, understand=parse, blank=blank))

    assert (page(True).source, page(True).reason) == ("model", "")
    assert (page(False).source, page(False).reason) == ("nothing", "the model's answer is empty")


# --- turned pages ---


def turned(image: bytes, degrees: int) -> bytes:
    """Clockwise."""
    data = io.BytesIO()
    Image.open(io.BytesIO(image)).rotate(-degrees, expand=True).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(("degrees", "upright"), [(90, 270), (180, 180), (270, 90)])
def test_page_is_turned_upright_and_read_once_more(ocr: FakeOcr, degrees: int, upright: int) -> None:
    ocr.behave(form="ocrflux-json")
    image = turned(page_image(7, 160, 120), degrees)

    async def rotate(by: Rotation) -> bytes:
        return turned(image, by)

    page = read(ocr, profile=OCRFLUX, image=image, rotate=rotate)
    assert [seen["rotation"] for seen in ocr.seen["requests"]] == [degrees, 0]
    assert (page.rotation, page.attempts, page.warnings) == (upright, 2, ())
    assert (page.width, page.height) == ((120, 160) if degrees == 180 else (160, 120))


def test_page_is_turned_once_at_most(ocr: FakeOcr) -> None:
    ocr.behave(form="ocrflux-json")
    image = turned(page_image(7, 160, 120), 90)

    async def rotate(_: Rotation) -> bytes:
        return image

    page = read(ocr, profile=OCRFLUX, image=image, rotate=rotate)
    assert page.attempts == 2
    assert page.warnings == ("the model says that the page is to be turned by 270 degrees clockwise",)


def test_page_that_nobody_can_turn_is_kept_as_it_is(ocr: FakeOcr) -> None:
    ocr.behave(form="ocrflux-json")
    page = read(ocr, profile=OCRFLUX, image=turned(page_image(7, 160, 120), 90))
    assert (page.source, page.rotation, page.attempts) == ("model", 0, 1)
    assert page.warnings == ("the model says that the page is to be turned by 270 degrees clockwise",)


def test_page_that_could_not_be_turned_is_kept_as_it_is(ocr: FakeOcr) -> None:
    ocr.behave(form="ocrflux-json")

    async def rotate(_: Rotation) -> bytes:
        raise OSError("the renderer ended")

    page = read(ocr, profile=OCRFLUX, image=turned(page_image(7, 160, 120), 90), rotate=rotate)
    assert (page.source, page.rotation) == ("model", 0)
    assert page.warnings[-1] == "not read again: the document service failed: OSError"


# --- whatever happens ---


def test_an_error_of_our_own_is_the_pages_and_not_the_documents() -> None:
    async def ask(_: dict[str, Any]) -> Answer:
        raise RuntimeError("a defect")

    page = asyncio.run(read_page(ask, b"", "image/png", 9, 9, 1, Options(), DEEPSEEK, understand=parse))
    assert (page.source, page.reason) == ("nothing", "the document service failed: RuntimeError")


def test_a_page_that_is_given_up_is_let_go() -> None:
    async def ask(_: dict[str, Any]) -> Answer:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(read_page(ask, b"", "image/png", 9, 9, 1, Options(), DEEPSEEK, understand=parse))


def test_engine_errors_that_pass_are_attempts() -> None:
    asked = []

    async def ask(request: dict[str, Any]) -> Answer:
        asked.append(request)
        raise EngineError("no memory", again=True)

    page = asyncio.run(read_page(ask, b"", "image/png", 9, 9, 1, Options(retries=2), DEEPSEEK, understand=parse))
    assert len(asked) == page.attempts == 3
    assert page.reason == "no memory"
