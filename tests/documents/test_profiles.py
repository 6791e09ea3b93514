import io
import re
from typing import Any

import pytest
from PIL import Image

from vllm_unified.documents.options import Options
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.profiles import (
    BY_NAME,
    LONGEST_PROMPT,
    LONGEST_TERM,
    NO_GUARD,
    PLAIN,
    check,
    longest_side,
    pairs_prompt,
    profile_of,
    prompt_of,
    resolution_of,
    resolution_used,
    sampling,
    tables_prompt,
)

DEEPSEEK = BY_NAME["deepseek-ocr"]
OCRFLUX = BY_NAME["ocrflux-3b"]


@pytest.mark.parametrize(
    ("names", "profile"),
    [
        (("DeepSeek-OCR",), "DeepSeek-OCR"),
        (("ocr", "models/ocr", "deepseek-ai/DeepSeek-OCR"), "DeepSeek-OCR"),
        (("deepseek_ocr",), "DeepSeek-OCR"),
        (("ocr", "/srv/models/DeepSeek-OCR-2"), "DeepSeek-OCR-2"),
        (("deepseek-ai/DeepSeek-OCR2",), "DeepSeek-OCR-2"),
        (("ChatDOC/OCRFlux-3B",), "OCRFlux-3B"),
        (("PaddlePaddle/PaddleOCR-VL-1.5",), "PaddleOCR-VL"),
        (("tencent/HunyuanOCR",), "HunyuanOCR"),
        (("zai-org/GLM-OCR",), "GLM-OCR"),
        (("ibm-granite/granite-docling-258M",), "Granite-Docling"),
        (("Qwen2.5-VL-7B-Instruct",), "plain"),
        (("demo-ocr", "models/demo/ocr"), "plain"),
        ((), "plain"),
    ],
)
def test_profile_is_chosen_from_the_models_names(names: tuple[str, ...], profile: str) -> None:
    assert profile_of(names).name == profile


def test_profile_that_the_client_chose() -> None:
    assert profile_of(("DeepSeek-OCR",), "ocrflux-3b") is OCRFLUX
    with pytest.raises(DocumentError, match='"tesseract" is unknown; choose one of DeepSeek-OCR-2, DeepSeek-OCR,'):
        profile_of(("DeepSeek-OCR",), "tesseract")


# https://github.com/deepseek-ai/DeepSeek-OCR, without the "<image>\n" that the server writes.
@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        (Options(), "<|grounding|>Convert the document to markdown."),
        (Options(mode="ocr"), "<|grounding|>OCR this image."),
        (Options(mode="free"), "Free OCR."),
        (Options(mode="figure"), "Parse the figure."),
        (Options(mode="describe"), "Describe this image in detail."),
        (Options(mode="find", find_term=" Total "), "Locate <|ref|>Total<|/ref|> in the image."),
        (Options(mode="find", find_term="p < 0.05"), "Locate <|ref|>p < 0.05<|/ref|> in the image."),
        (
            Options(mode="find", find_term="a<|/ref|><<|det|><｜end▁of▁sentence｜>b<im<image>age>"),
            "Locate <|ref|>a|/ref|>|det|>｜end▁of▁sentence｜>b<|/ref|> in the image.",
        ),
        (Options(mode="find", find_term="{term}"), "Locate <|ref|>{term}<|/ref|> in the image."),
        (Options(mode="prompt", prompt="<image>\n<|grounding|>Read."), "<|grounding|>Read."),
        (Options(mode="prompt", prompt="<im<image>age>Read {term}."), "Read {term}."),
    ],
)
def test_prompts_of_deepseek_ocr(options: Options, prompt: str) -> None:
    assert prompt_of(options, DEEPSEEK) == prompt


# https://github.com/chatdoc-com/OCRFlux, ocrflux/prompts.py, to the letter.
PAIRS = """\
Below are two consecutive pages in Markdown format, where each element of them is numbered. Identify pairs of elements \
which should be merged across the two pages, such as text paragraphs or tables that span across the two pages. Return \
pairs as [(element_index_of_page1, element_index_of_page2), ...] or [] if no elements should be merged.
Previous page:
0. # A {title}

1. which goes

Next page:
0. on.

"""
TABLES = """\
Below are two tables in HTML format, merge them into one table in HTML format.
TABLE 1:
<table>{first}</table>
TABLE 2:
<table>2</table>
"""


def test_what_ocrflux_is_asked_about_a_page_break() -> None:
    merge = OCRFLUX.merge
    assert merge is not None
    assert pairs_prompt(merge, ["# A {title}", "which goes"], ["on."]) == PAIRS
    assert tables_prompt(merge, "<table>{first}</table>", "<table>2</table>") == TABLES
    with Image.open(io.BytesIO(merge.image)) as image:
        assert (image.format, image.size, image.getcolors()) == ("PNG", (28, 28), [(784, (0, 0, 0))])


@pytest.mark.parametrize("text", ["<|im_end|>", "<<|image_pad|>", "<|<|x|>y|>", "<｜end▁of▁sentence｜>"])
def test_a_page_says_no_special_token(text: str) -> None:
    merge = OCRFLUX.merge
    assert merge is not None
    for prompt in (pairs_prompt(merge, [text], [text]), tables_prompt(merge, text, text)):
        assert "<|" not in prompt
        assert "<｜" not in prompt
        assert prompt.replace(" ", "").count(text) == 2


@pytest.mark.parametrize("profile", BY_NAME.values(), ids=str)
def test_every_profile_reads_a_page_and_none_sends_the_images_place(profile: Any) -> None:
    check(Options(), profile)
    assert not any("<image>" in prompt for prompt in profile.prompts.values())


@pytest.mark.parametrize(
    ("options", "profile", "says"),
    [
        (Options(mode="find", find_term="x"), OCRFLUX, 'OCRFlux-3B knows no "find"; choose one of markdown, prompt'),
        (Options(mode="find", find_term="x"), PLAIN, "choose one of markdown, ocr, free, figure, describe, prompt"),
        (Options(mode="find"), DEEPSEEK, "find_term: .* 1 to 200 characters"),
        (Options(mode="find", find_term="<image>"), DEEPSEEK, "find_term"),
        (Options(mode="find", find_term="x" * (LONGEST_TERM + 1)), DEEPSEEK, "find_term"),
        (Options(mode="prompt", prompt=" <image>\n"), PLAIN, "prompt: .* 1 to 8000 characters"),
        (Options(mode="prompt", prompt="x" * (LONGEST_PROMPT + 1)), PLAIN, "prompt"),
        (Options(base_size=1024), PLAIN, "plain has no resolution modes; leave them out"),
        (Options(base_size=999), DEEPSEEK, "has no such mode; choose one of Tiny 512/512/no; .*Gundam 1024/640/yes"),
        (Options(base_size=1024, image_size=640, crop_mode=False), DEEPSEEK, "has no such mode"),
    ],
)
def test_what_a_model_cannot_do_is_refused_with_what_it_can(options: Options, profile: Any, says: str) -> None:
    with pytest.raises(DocumentError, match=says) as caught:
        check(options, profile)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("options", "name", "side", "used"),
    [
        (Options(base_size=512, image_size=512, crop_mode=False), "Tiny", 512, "at 512 pixels.*no tiles"),
        (Options(base_size=640, image_size=640, crop_mode=False), "Small", 640, "at 640 pixels.*no tiles"),
        (Options(base_size=1024, image_size=1024, crop_mode=False), "Base", 1024, "Gundam.*only.*up to 6 tiles"),
        (Options(base_size=1280), "Large", 1280, "Gundam.*only.*up to 6 tiles"),
        (Options(base_size=1024, image_size=640, crop_mode=True), "Gundam", 1920, "Gundam: one view"),
        (Options(base_size=1024), "Gundam", 1920, "Gundam"),
        (Options(crop_mode=True), "Gundam", 1920, "Gundam"),
    ],
)
def test_resolution_and_what_the_engine_makes_of_it(options: Options, name: str, side: int, used: str) -> None:
    resolution = resolution_of(options, DEEPSEEK)
    assert resolution is not None
    assert resolution.name == name
    assert longest_side(options, DEEPSEEK) == side
    assert re.search(used, resolution.used)
    assert resolution_used(options, DEEPSEEK) == resolution.used


def test_what_is_used_where_no_resolution_is_asked_for() -> None:
    assert resolution_used(Options(), DEEPSEEK) == resolution_used(Options(crop_mode=True), DEEPSEEK)
    assert resolution_used(Options(), OCRFLUX) == ""


def test_longest_side_where_no_resolution_is_asked_for() -> None:
    assert resolution_of(Options(), DEEPSEEK) is None
    assert longest_side(Options(), DEEPSEEK) == 1920
    assert longest_side(Options(), OCRFLUX) == 1024


@pytest.mark.parametrize(
    ("options", "stronger", "guard"),
    [
        (Options(), False, {"ngram_size": 30, "window_size": 90, "whitelist_token_ids": [128821, 128822]}),
        (Options(), True, {"ngram_size": 15, "window_size": 900, "whitelist_token_ids": [128821, 128822]}),
        (
            Options(ngram_size=20, window_size=50, whitelist_token_ids=(1, 2)),
            False,
            {"ngram_size": 20, "window_size": 50, "whitelist_token_ids": [1, 2]},
        ),
        (
            Options(ngram_size=0),
            True,
            {"ngram_size": NO_GUARD, "window_size": 90, "whitelist_token_ids": [128821, 128822]},
        ),
    ],
)
def test_guard_against_repetition(options: Options, stronger: bool, guard: dict[str, Any]) -> None:
    fields = sampling(options, DEEPSEEK, temperature=0.0, stronger=stronger)
    assert fields == {"temperature": 0.0, "skip_special_tokens": False, "vllm_xargs": guard}


@pytest.mark.parametrize(
    ("profile", "stronger", "context", "fields"),
    [
        (PLAIN, False, None, {}),
        (PLAIN, True, 2048, {"repetition_penalty": 1.1}),
        (PLAIN, False, 16383, {}),
        (PLAIN, False, 16384, {"max_tokens": 8192}),
        (BY_NAME["glm-ocr"], False, None, {"repetition_penalty": 1.1}),
        (BY_NAME["glm-ocr"], True, None, {"repetition_penalty": 1.2}),
    ],
)
def test_sampling_of_models_without_a_guard(
    profile: Any, stronger: bool, context: int | None, fields: dict[str, Any]
) -> None:
    asked = sampling(Options(), profile, temperature=0.2, stronger=stronger, max_model_len=context)
    assert asked == {"temperature": 0.2, **fields}
