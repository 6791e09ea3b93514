"""What is known of each family of OCR models: how it is asked, and in what form it answers. All of it is data.

Sources: the models' own repositories, which stand at each profile, and vLLM's processors of them.
"""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from vllm_unified.documents.options import Mode, Options
from vllm_unified.documents.problems import DocumentError

Form = Literal["grounding", "markdown", "ocrflux-json", "doctags"]

LONGEST_PROMPT = 8000  # characters
LONGEST_TERM = 200
# More than any answer has: vLLM refuses 0, and the router fills in what is not said.
NO_GUARD = 1 << 20
# What opens a special token, as in <|ref|> or <｜end▁of▁sentence｜>.
_OPENS_TOKEN = re.compile("<+(?=[|｜])")
_IMAGE = "<image>"


class Resolution(msgspec.Struct, frozen=True):
    """A resolution mode by the numbers that clients name it with, and what comes of it under vLLM.

    `longest_side`: pixels that the page is made to fit in before it is sent. `used` is told to the client.
    """

    name: str
    base_size: int
    image_size: int
    crop_mode: bool
    longest_side: int
    used: str


class Merge(msgspec.Struct, frozen=True):
    """How a model is asked what a page break has cut, where it was trained for that.

    `pairs`: which elements of two pages go on, a template with `previous` and `following`: a text each of `element`s
    with `number`, from 0, and `text`. The answer is `[(3, 0)]`. `tables`: two tables as one, a template with `first`
    and `second`, all in HTML. `image`: a PNG that goes with the words, since the model never saw any without.
    """

    pairs: str
    element: str
    tables: str
    image: bytes


class Profile(msgspec.Struct, frozen=True):
    """How a family of models is asked and understood.

    `names`: how its name is written, in lower case without `-`, `_`, `.`, `/` and blanks; found anywhere in the
    model's name or path. `prompts`: by mode. `longest_side`: pixels of the page's image, when no resolution is
    asked for. `fields` go with every request, `stronger` with one whose first try repeated itself. `guard`: the
    model has vLLM's n-gram logits processor, and `whitelist` are the tokens that may repeat. `max_tokens`: no
    page needs more in an answer. `merge`: None leaves page breaks to our own rules.
    """

    name: str
    names: tuple[str, ...]
    prompts: Mapping[Mode, str]
    form: Form
    longest_side: int
    fields: Mapping[str, Any] = MappingProxyType({})
    stronger: Mapping[str, Any] = MappingProxyType({"repetition_penalty": 1.1})
    guard: bool = False
    whitelist: tuple[int, ...] = ()
    max_tokens: int = 8192
    image_first: bool = True
    system: str | None = None
    resolutions: tuple[Resolution, ...] = ()
    merge: Merge | None = None


# vLLM serves Gundam alone (vllm/transformers_utils/processors/deepseek_ocr.py): one view of 1024 x 1024, and tiles
# of 640 x 640 as soon as a side of the image is longer than 640.
_VIEW = "Gundam, the only mode that vLLM serves, on the page at {0} pixels: one view of 1024 x 1024 and no tiles"
_TILES = "Gundam, the only mode that vLLM serves, on the page at {0} pixels: one view of 1024 x 1024 and up to 6 tiles"
_DEEPSEEK_OCR_RESOLUTIONS = (
    Resolution("Tiny", 512, 512, False, 512, _VIEW.format(512)),
    Resolution("Small", 640, 640, False, 640, _VIEW.format(640)),
    Resolution("Base", 1024, 1024, False, 1024, _TILES.format(1024)),
    Resolution("Large", 1280, 1280, False, 1280, _TILES.format(1280)),
    Resolution("Gundam", 1024, 640, True, 1920, "Gundam: one view of 1024 x 1024 and up to 6 tiles of 640 x 640"),
)

_DEEPSEEK_PROMPTS: Mapping[Mode, str] = {
    "markdown": "<|grounding|>Convert the document to markdown.",
    "ocr": "<|grounding|>OCR this image.",
    "free": "Free OCR.",
    "figure": "Parse the figure.",
    "describe": "Describe this image in detail.",
    "find": "Locate <|ref|>{term}<|/ref|> in the image.",
}

# 28 x 28 pixels of black, the smallest picture that the model takes.
_BLACK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAIAAAD9b0jDAAAAGUlEQVR42u3BMQEAAADCoPVPbQdvoAAAeA0JTAABY3ZqfQAAAABJRU5ErkJggg=="
)
_OCRFLUX_MERGE = Merge(
    pairs="Below are two consecutive pages in Markdown format, where each element of them is numbered. Identify pairs "
    "of elements which should be merged across the two pages, such as text paragraphs or tables that span across the "
    "two pages. Return pairs as [(element_index_of_page1, element_index_of_page2), ...] or [] if no elements should "
    "be merged.\nPrevious page:\n{previous}Next page:\n{following}",
    element="{number}. {text}\n\n",
    tables="Below are two tables in HTML format, merge them into one table in HTML format.\n"
    "TABLE 1:\n{first}\nTABLE 2:\n{second}\n",
    image=_BLACK,
)

# The more particular name stands before the one that it contains.
PROFILES = (
    # https://github.com/deepseek-ai/DeepSeek-OCR-2; 128821 and 128822 are <td> and </td>.
    Profile(
        "DeepSeek-OCR-2",
        ("deepseekocr2", "deepseekocrv2"),
        {"markdown": _DEEPSEEK_PROMPTS["markdown"], "free": _DEEPSEEK_PROMPTS["free"]},
        "grounding",
        longest_side=2304,
        fields={"skip_special_tokens": False},
        guard=True,
        whitelist=(128821, 128822),
        resolutions=(
            Resolution("Default", 1024, 768, True, 2304, "one view of 1024 x 1024 and up to 6 tiles of 768 x 768"),
        ),
    ),
    # https://github.com/deepseek-ai/DeepSeek-OCR
    Profile(
        "DeepSeek-OCR",
        ("deepseekocr",),
        _DEEPSEEK_PROMPTS,
        "grounding",
        longest_side=1920,
        fields={"skip_special_tokens": False},
        guard=True,
        whitelist=(128821, 128822),
        resolutions=_DEEPSEEK_OCR_RESOLUTIONS,
    ),
    # https://github.com/chatdoc-com/OCRFlux: ocrflux/prompts.py, ocrflux/client.py
    Profile(
        "OCRFlux-3B",
        ("ocrflux",),
        {
            "markdown": "Below is the image of one page of a document. "
            "Just return the plain text representation of this document as if you were reading it naturally.\n"
            "ALL tables should be presented in HTML format.\n"
            'If there are images or figures in the page, present them as "<Image>(left,top),(right,bottom)</Image>", '
            "(left,top,right,bottom) are the coordinates of the top-left and bottom-right corners of the image or "
            "figure.\nPresent all titles and headings as H1 headings.\nDo not hallucinate.\n"
        },
        "ocrflux-json",
        longest_side=1024,
        image_first=False,
        merge=_OCRFLUX_MERGE,
    ),
    # https://github.com/vllm-project/recipes: PaddlePaddle/PaddleOCR-VL.md; it was made for parts of a page.
    Profile(
        "PaddleOCR-VL",
        ("paddleocrvl",),
        {"markdown": "OCR:", "ocr": "OCR:", "free": "OCR:", "figure": "Chart Recognition:"},
        "markdown",
        longest_side=2000,
    ),
    # https://github.com/Tencent-Hunyuan/HunyuanOCR: the recommended prompts, and the empty system message.
    Profile(
        "HunyuanOCR",
        ("hunyuanocr",),
        {
            "markdown": "提取文档图片中正文的所有信息用 markdown 格式表示，其中页眉、页脚部分忽略，"
            "表格用 html 格式表达，文档中公式用 latex 格式表示，按照阅读顺序组织进行解析。",
            "ocr": "提取图中的文字。",
            "free": "提取图中的文字。",
            "figure": "解析图中的图表，对于流程图使用 Mermaid 格式表示，其他图表使用 Markdown 格式表示。",
        },
        "markdown",
        longest_side=2048,
        max_tokens=16384,
        system="",
    ),
    # https://github.com/zai-org/GLM-OCR: glmocr/config.yaml
    Profile(
        "GLM-OCR",
        ("glmocr",),
        {"markdown": "Text Recognition:", "ocr": "Text Recognition:", "free": "Text Recognition:"},
        "markdown",
        longest_side=2340,
        fields={"repetition_penalty": 1.1},
        stronger={"repetition_penalty": 1.2},
    ),
    # https://github.com/docling-project/docling: docling/datamodel/vlm_model_specs.py
    Profile(
        "Granite-Docling",
        ("granitedocling", "smoldocling"),
        {"markdown": "Convert this page to docling."},
        "doctags",
        longest_side=2048,
        fields={"skip_special_tokens": False, "stop": ["</doctag>", "<|end_of_text|>"]},
    ),
)

# Any model that reads pictures. The first prompt is docling's for such models.
PLAIN = Profile(
    "plain",
    (),
    {
        "markdown": "Convert this page to markdown. Do not miss any text and only output the bare markdown!",
        "ocr": "Extract the text of this image.",
        "free": "Free OCR.",
        "figure": "Parse the figure.",
        "describe": "Describe this image in detail.",
    },
    "markdown",
    longest_side=2048,
)

BY_NAME = {profile.name.lower(): profile for profile in (*PROFILES, PLAIN)}


def profile_of(names: Iterable[str], chosen: str = "") -> Profile:
    """The one that is `chosen` by its name, else that of the model with these names and paths, else the plain one.

    Raises DocumentError 400 for a name that no profile has.
    """
    if chosen:
        if (found := BY_NAME.get(chosen.lower())) is None:
            known = ", ".join(profile.name for profile in BY_NAME.values())
            raise DocumentError(400, f'profile: "{chosen[:100]}" is unknown; choose one of {known}', code="bad_profile")
        return found
    written = [re.sub(r"[-_. /\\]", "", name.lower()) for name in names]
    return next((each for each in PROFILES if any(name in text for name in each.names for text in written)), PLAIN)


def check(options: Options, profile: Profile) -> None:
    """Refuse what this model cannot do before a page is read. Raises DocumentError 400."""
    prompt_of(options, profile)
    resolution_of(options, profile)


def prompt_of(options: Options, profile: Profile, mode: Mode | None = None) -> str:
    """The text beside the page's image, in the options' mode or in another. Raises DocumentError 400."""
    mode = mode or options.mode
    if mode == "prompt":
        prompt = _without_image_token(options.prompt).strip()
        if not prompt or len(options.prompt) > LONGEST_PROMPT:
            message = f'prompt: mode "prompt" wants a prompt of 1 to {LONGEST_PROMPT} characters'
            raise DocumentError(400, message, code="bad_prompt")
        return prompt
    if mode not in profile.prompts:
        known = ", ".join((*profile.prompts, "prompt"))
        raise DocumentError(400, f'mode: {profile.name} knows no "{mode}"; choose one of {known}', code="bad_mode")
    return profile.prompts[mode].replace("{term}", _term(options) if mode == "find" else "")


def _term(options: Options) -> str:
    term = _without_image_token(_OPENS_TOKEN.sub("", options.find_term[: LONGEST_TERM + 1])).strip()
    if not term or len(options.find_term) > LONGEST_TERM:
        message = f'find_term: mode "find" wants a term of 1 to {LONGEST_TERM} characters'
        raise DocumentError(400, message, code="bad_find_term")
    return term


def _without_image_token(text: str) -> str:
    """The server writes the image's place itself, and one more would be a second image."""
    text = text[: LONGEST_PROMPT + 1]
    while _IMAGE in text:
        text = text.replace(_IMAGE, "")
    return text


def pairs_prompt(merge: Merge, previous: Sequence[str], following: Sequence[str]) -> str:
    """Which elements of two pages go on across the page break."""

    def listed(texts: Sequence[str]) -> str:
        return "".join(merge.element.format(number=n, text=_without_tokens(text)) for n, text in enumerate(texts))

    return merge.pairs.format(previous=listed(previous), following=listed(following))


def tables_prompt(merge: Merge, first: str, second: str) -> str:
    """Two tables as one, in HTML."""
    return merge.tables.format(first=_without_tokens(first), second=_without_tokens(second))


def _without_tokens(text: str) -> str:
    """What stands on a page is no special token, whatever it looks like."""
    return text.replace("<|", "< |").replace("<｜", "< ｜")


def resolution_of(options: Options, profile: Profile) -> Resolution | None:
    """The resolution mode that the client asked for; None where it said nothing. Raises DocumentError 400.

    What it did not say of the three numbers is that of the mode that has the others.
    """
    asked = (options.base_size, options.image_size, options.crop_mode)
    if asked == (None, None, None):
        return None
    # Clients send Gundam's numbers as their default, so that is looked at first.
    for each in reversed(profile.resolutions):
        numbers = (each.base_size, each.image_size, each.crop_mode)
        if all(said in (None, number) for said, number in zip(asked, numbers, strict=True)):
            return each
    if not profile.resolutions:
        message = f"base_size, image_size, crop_mode: {profile.name} has no resolution modes; leave them out"
    else:
        modes = "; ".join(
            f"{each.name} {each.base_size}/{each.image_size}/{'yes' if each.crop_mode else 'no'}"
            for each in profile.resolutions
        )
        message = f"base_size, image_size, crop_mode: {profile.name} has no such mode; choose one of {modes}"
    raise DocumentError(400, message, code="bad_resolution")


def longest_side(options: Options, profile: Profile) -> int:
    """Pixels that a page's longer side may have at most."""
    resolution = resolution_of(options, profile)
    return resolution.longest_side if resolution else profile.longest_side


def resolution_used(options: Options, profile: Profile) -> str:
    """What the engine makes of the mode that was asked for, or of none; "" of a model that has no modes."""
    asked = resolution_of(options, profile)
    without = (each for each in profile.resolutions if each.longest_side == profile.longest_side)
    found = asked or next(without, None)
    return found.used if found else ""


def sampling(
    options: Options, profile: Profile, *, temperature: float, stronger: bool, max_model_len: int | None = None
) -> dict[str, Any]:
    """Fields of the chat request beside the messages and the model.

    `max_tokens` is said only where the engine's context has room for it beside the picture: vLLM refuses one that
    leaves none, and without it an answer ends where the context does.
    """
    fields: dict[str, Any] = {"temperature": temperature, **profile.fields}
    if max_model_len and max_model_len >= 2 * profile.max_tokens:
        fields["max_tokens"] = profile.max_tokens
    if profile.guard:
        fields["vllm_xargs"] = _guard(options, profile, stronger)
    elif stronger:
        fields |= profile.stronger
    return fields


def _guard(options: Options, profile: Profile, stronger: bool) -> dict[str, Any]:
    """As numbers: vLLM takes a whitelist that is a string, and does nothing with it."""
    size, window = options.ngram_size or NO_GUARD, options.window_size
    if stronger and options.ngram_size:
        size, window = max(min(size, 4), size // 2), min(10 * window, 2000)
    return {
        "ngram_size": size,
        "window_size": max(window, 1),
        "whitelist_token_ids": list(options.whitelist_token_ids or profile.whitelist),
    }
