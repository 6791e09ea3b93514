"""What is known of one page of a document: the words that every file of this room shares."""

from typing import Literal

import msgspec

# x1, y1, x2, y2 in pixels of the page's image as it was read: upright, (0, 0) at the top left, x1 <= x2 <= width.
Box = tuple[int, int, int, int]

# Labels of DeepSeek-OCR and of those who made its training data: PP-DocLayout, which has a `number` for a page's and
# an image within a head, and MinerU; of DocTags, with an underscore; of dots.ocr, with a hyphen.
FIGURES = frozenset({"image", "figure", "picture", "chart", "diagram", "header_image", "footer_image"})
RUNNING_HEADS = frozenset(
    {"header", "footer", "page_number", "number", "header_image", "footer_image"}
    | {"page_header", "page_footer", "page-header", "page-footer"}
)


class Block(msgspec.Struct, frozen=True, omit_defaults=True):
    """A part of a page, in reading order.

    `label`: the model's word in lower case, as text, title, table, image; "" where it says none. `text`: Markdown
    (an HTML table stays HTML in it), "" of a figure. `html`: a table's `<table>` alone. `asset`: where a figure was
    cut out to, within the document's products, as images/page-3-img-1.jpg.
    """

    label: str = ""
    text: str = ""
    boxes: tuple[Box, ...] = ()
    html: str = ""
    asset: str = ""


class Page(msgspec.Struct, frozen=True, omit_defaults=True):
    """A page that was dealt with: read by the model, or else taken from its text layer, or given up.

    `width`, `height`: pixels of the image that `blocks` refer to. `markdown` links its figures where they stand.
    `raw_text` is the model's answer to the letter. `reason` says why no answer of the model was good enough; then
    `source` is what stands in its place, and the page is one of the document's `fallback_pages`.
    """

    number: int
    width: int = 0
    height: int = 0
    markdown: str = ""
    raw_text: str = ""
    blocks: tuple[Block, ...] = ()
    source: Literal["model", "text_layer", "nothing"] = "model"
    reason: str = ""
    # What is odd about an answer that was kept: truncated, repeats itself, boxes that are no boxes.
    warnings: tuple[str, ...] = ()
    attempts: int = 1
    # Degrees clockwise by which the page was turned upright before it was read, beyond what the file itself says.
    rotation: Literal[0, 90, 180, 270] = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    # What the engine makes of the resolution mode that was asked for; "" of a model that has no modes.
    resolution_used: str = ""


def as_shares(box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    """A box as shares of the page, 0 to 1, whatever its image measured."""
    x1, y1, x2, y2 = box
    return x1 / width, y1 / height, x2 / width, y2 / height
