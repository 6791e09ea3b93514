"""Figures of a page: cut out of its image, and linked where they stand."""

from collections.abc import Iterator

import msgspec

from vllm_unified.documents.page import FIGURES, Block, Box, Page


def named(page: Page) -> Page:
    """Each figure that has a box gets a name that no other of the document has, and its link in the Markdown."""
    blocks = tuple(_named(page))
    if blocks == page.blocks:
        return page
    parts = (link(block) or block.text for block in blocks)
    return msgspec.structs.replace(page, blocks=blocks, markdown="\n\n".join(part for part in parts if part.strip()))


def link(block: Block) -> str:
    """In Markdown; "" for what is no figure."""
    return f"![]({block.asset})" if block.asset else ""


def boxes_of(page: Page) -> dict[str, Box]:
    """By the figure's name, what is to be cut out."""
    return {block.asset: _around(block.boxes) for block in page.blocks if block.asset}


def _named(page: Page) -> Iterator[Block]:
    number = 0
    for block in page.blocks:
        if block.label in FIGURES and block.boxes:
            number += 1
            yield msgspec.structs.replace(block, asset=f"images/page-{page.number}-img-{number}.jpg")
        else:
            yield block


def _around(boxes: tuple[Box, ...]) -> Box:
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)
