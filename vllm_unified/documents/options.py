"""What a client may ask of the reading of a document."""

from typing import Literal

import msgspec

Mode = Literal["markdown", "ocr", "free", "figure", "describe", "find", "prompt"]
Format = Literal["markdown", "html", "docx", "text", "json"]


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
