"""What a client may ask of the reading of a document."""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Literal, get_args

import msgspec

from vllm_unified.documents.problems import DocumentError

Mode = Literal["markdown", "ocr", "free", "figure", "describe", "find", "prompt"]
Format = Literal["markdown", "html", "docx", "text", "json"]
# Modes by the names that earlier applications gave them.
OLDER_MODES: Mapping[str, Mode] = {
    "plain_ocr": "free",
    "multilingual": "free",
    "free_ocr": "free",
    "layout_map": "ocr",
    "tables_md": "markdown",
    "figure_chart": "figure",
    "find_ref": "find",
    "freeform": "prompt",
}
# Theirs too, but no prompt that a model was trained on: what came back was left to chance.
GONE_MODES = frozenset({"tables_csv", "kv_json", "pii_redact"})
PAGE_RANGE = re.compile(r"(\d{1,6})(?:\s*-\s*(\d{1,6})?)?|-\s*(\d{1,6})")


class Options(msgspec.Struct, frozen=True, omit_defaults=True):
    """Kept with the job as JSON, so that it goes on as it was asked for after a restart.

    `mode` names one of a profile's prompts; "find" wants `find_term`, "prompt" wants `prompt`. `profile` is that of
    the model when it is "". `base_size`, `image_size`, `crop_mode`: DeepSeek-OCR's resolution, None where the client
    said nothing. `retries`: further attempts at a page, each up the ladder; 0 is one attempt. `pages` as "1-3,7";
    "" is all of them. `ngram_size` 0 turns the guard against repetition off.
    """

    mode: Mode = "markdown"
    prompt: str = ""
    find_term: str = ""
    profile: str = ""
    base_size: int | None = None
    image_size: int | None = None
    crop_mode: bool | None = None
    dpi: int = 144
    retries: int = 3
    ngram_size: int = 30
    window_size: int = 90
    whitelist_token_ids: tuple[int, ...] = ()
    pages: str = ""
    password: str = ""
    running_heads: Literal["keep", "drop"] = "keep"
    join_pages: bool = True
    extract_images: bool = True
    formats: tuple[Format, ...] = ("markdown",)


LIMITS: Mapping[str, tuple[int, int]] = {
    "base_size": (256, 4096),
    "image_size": (256, 4096),
    "dpi": (36, 600),
    "retries": (0, 10),
    "ngram_size": (0, 1000),
    "window_size": (1, 100_000),
}
LONGEST_TEXT = 8192
MOST_TOKENS = 1000


def options_in(fields: Mapping[str, str], defaults: Options, known: Collection[str] = ()) -> Options:
    """The options among the fields of a form. `known`: fields that are read elsewhere.

    Raises DocumentError 400 for a value that is none, and for a field that nothing reads.
    """
    said = {name: value.strip() if name != "prompt" else value for name, value in fields.items() if value.strip()}
    for name in said:
        if name not in Options.__struct_fields__ and name not in known:
            near = difflib.get_close_matches(name, (*Options.__struct_fields__, *known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise _invalid(f'the field "{name[:80]}" is not known{hint}')
    values: dict[str, object] = {name: value for name, value in said.items() if name in Options.__struct_fields__}
    if "mode" in said:
        values["mode"] = _mode(said["mode"])
    for name in ("formats", "whitelist_token_ids"):
        if name in said:
            values[name] = [part.strip() for part in said[name].split(",")]
    try:
        options = msgspec.convert({**msgspec.structs.asdict(defaults), **values}, Options, strict=False)
    except msgspec.ValidationError as error:
        what, _, place = str(error).rstrip("`").partition(" - at `$.")
        raise _invalid(f"{place}: {what}{_choices(place)}") from None
    return checked(options)


def checked(options: Options) -> Options:
    """Raises DocumentError 400 for numbers out of bounds and options that want another one."""
    for name, (least, most) in LIMITS.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise _invalid(f"{name} is {value}; use {least} to {most}")
    if options.mode == "find" and not options.find_term:
        raise _invalid('the mode "find" wants find_term, the text to look for')
    if options.mode == "prompt" and not options.prompt:
        raise _invalid('the mode "prompt" wants prompt, the words for the model')
    for name in ("prompt", "find_term", "pages", "password"):
        if len(getattr(options, name)) > LONGEST_TEXT:
            raise _invalid(f"{name} is longer than {LONGEST_TEXT} characters")
    tokens = options.whitelist_token_ids
    if len(tokens) > MOST_TOKENS or not all(0 <= token < 1 << 31 for token in tokens):
        raise _invalid(f"whitelist_token_ids: at most {MOST_TOKENS} numbers of tokens, from 0")
    list(_ranges(options.pages))
    return options


def pages_of(options: Options, total: int) -> list[int]:
    """The numbers of the pages to read, from 1, in order. Raises DocumentError 400 where none is left of `total`."""
    if not options.pages:
        return list(range(1, total + 1))
    wanted: list[int] = []
    for first, last in sorted((first, last or total) for first, last in _ranges(options.pages)):
        wanted += range(max(first, wanted[-1] + 1) if wanted else first, min(last, total) + 1)
    if not wanted:
        raise _invalid(f'the document has {total} pages, and none of them is in "{options.pages[:80]}"')
    return wanted


def _ranges(text: str) -> Iterator[tuple[int, int | None]]:
    """First and last page of each part, the last None where it is open: "1-3,7,9-"."""
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = PAGE_RANGE.fullmatch(part)
        if found is None:
            raise _invalid(f'pages: "{part[:40]}" is no range; use 1-3,7,9-')
        first = int(found[1] or 1)
        last = int(found[2] or found[3]) if found[2] or found[3] else (None if "-" in part else first)
        if first < 1 or (last is not None and last < first):
            raise _invalid(f'pages: "{part[:40]}" is no range; pages count from 1, and the first stands first')
        yield first, last


def _choices(field: str) -> str:
    words = {"mode": Mode, "formats": Format, "running_heads": Literal["keep", "drop"]}.get(field.partition("[")[0])
    return f"; use {', '.join(get_args(words))}" if words else ""


def _mode(given: str) -> str:
    name = given.lower()
    if name in GONE_MODES:
        message = (
            f'the mode "{name}" asked for what no OCR model was trained on; take markdown, where tables are tables'
        )
        raise _invalid(message)
    return OLDER_MODES.get(name, name)


def _invalid(message: str) -> DocumentError:
    return DocumentError(400, message, code="invalid_value")
