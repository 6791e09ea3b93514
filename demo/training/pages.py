"""Pages as the demonstration's OCR model reads them, drawn with what they say and where.

The typeface is Aileron (CC0), which Pillow carries.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import cast

from PIL import Image, ImageDraw, ImageFont

# What a page measures, in its own units: positions and sizes below are in them, however many pixels it is drawn with.
SIDE = 512
MARGIN = 12
BODY_SIZES = (21, 23, 25, 27)
HEADING_SIZES = (34, 37, 40)
LINES = 12
LINE_CHARACTERS = 30
LETTERS = string.ascii_letters + string.digits + string.punctuation
# What a word is made of.
ALPHABETS = (
    string.ascii_lowercase,
    string.ascii_uppercase,
    string.digits,
    string.ascii_letters + string.digits,
    LETTERS,
)
HEADING = "# "


@dataclass(frozen=True)
class Word:
    text: str
    left: float
    centers: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """A line of text; `left`, `top` (of its em box) and `size` are in units of the page."""

    words: tuple[Word, ...]
    left: float
    top: float
    size: int
    is_heading: bool = False
    # True where a line's width or a larger gap stands between it and the line before.
    opens_block: bool = False

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def middle(self) -> float:
        """Half-way between the baseline and the top of a small letter, near enough."""
        return self.top + 0.62 * self.size


@dataclass(frozen=True)
class Look:
    """How a page is printed: grey values are 0 to 255, `noise` is their standard deviation, `pixels` a side."""

    paper: int = 255
    ink: int = 0
    noise: float = 0.0
    pixels: tuple[int, int] = (SIDE, SIDE)

    @property
    def scale(self) -> float:
        """Pixels per unit when the text is set. Letters stand on whole pixels, so it moves them."""
        return max(1.0, *(side / SIDE for side in self.pixels))


@dataclass(frozen=True)
class Page:
    lines: tuple[Line, ...]
    look: Look = field(default_factory=Look)

    @property
    def markdown(self) -> str:
        text = ""
        for line in self.lines:
            if text:
                text += "\n\n" if line.opens_block else "\n"
            text += (HEADING if line.is_heading else "") + line.text
        return text

    def draw(self, seed: int = 0) -> Image.Image:
        """The page in grey; `seed` is that of its noise."""
        scale = self.look.scale
        side = round(SIDE * scale)
        image = Image.new("L", (side, side), self.look.paper)
        pen = ImageDraw.Draw(image)
        for line in self.lines:
            at = (line.left * scale, line.top * scale)
            pen.text(at, line.text, font=_font(line.size * scale), fill=self.look.ink)
        if image.size != self.look.pixels:
            image = image.resize(self.look.pixels, Image.Resampling.LANCZOS)
        if self.look.noise:
            import numpy as np  # nothing else here needs it

            drawn = np.asarray(image, dtype=np.float32)
            drawn = drawn + np.random.default_rng(seed).normal(0, self.look.noise, drawn.shape).astype(np.float32)
            image = Image.fromarray(np.clip(drawn, 0, 255).astype(np.uint8))
        return image


def written(texts: Sequence[str], size: int = 21, left: float = 40, top: float = 40, look: Look | None = None) -> Page:
    """A page that says `texts`, line for line; "# " makes a heading, an empty text a gap."""
    look = look or Look()
    lines: list[Line] = []
    gap = False
    for text in texts:
        if not text:
            gap = True
            top += 1.15 * size
            continue
        is_heading = text.startswith(HEADING)
        line = _line(
            text.removeprefix(HEADING),
            left,
            top,
            HEADING_SIZES[1] if is_heading else size,
            is_heading=is_heading,
            opens_block=gap or is_heading or (bool(lines) and lines[-1].is_heading),
            scale=look.scale,
        )
        lines.append(line)
        top += line.size * (1.7 if is_heading else 1.4)
        gap = False
    return Page(tuple(lines), look)


def drawn_at_random(seed: int, *, lines: int = LINES, plain: bool = False) -> Page:
    """A page of about `lines` lines, often fewer, that say nothing in any language. `plain`: black on white, at 512
    pixels."""
    dice = random.Random(seed)
    look = Look() if plain else _look(dice)
    size = dice.choice(BODY_SIZES)
    pitch = size * dice.uniform(1.28, 1.55)
    wanted = dice.randint(1, lines) if dice.random() < 0.4 else max(1, lines + dice.randint(-2, 1))
    plan: list[tuple[bool, bool, float]] = []  # is_heading, opens_block, distance from the line before
    if dice.random() < 0.5:
        plan.append((True, True, 0))
    while len(plan) < wanted:
        after_heading = bool(plan) and plan[-1][0]
        if len(plan) > 2 and not after_heading and dice.random() < 0.06:
            plan.append((True, True, pitch * dice.uniform(1.4, 1.8)))
        elif after_heading:
            plan.append((False, True, max(HEADING_SIZES) * 1.2 + pitch * dice.uniform(0.3, 0.6)))
        elif plan and dice.random() < 0.15:
            plan.append((False, True, pitch * dice.uniform(1.8, 2.2)))
        else:
            plan.append((False, not plan, pitch if plan else 0))
    heights = [distance for *_, distance in plan]
    while sum(heights) + 40 > SIDE - 2 * MARGIN:
        heights.pop()
        plan.pop()
    top = dice.uniform(MARGIN, SIDE - MARGIN - 40 - sum(heights))
    drawn: list[Line] = []
    left = 0.0
    for is_heading, opens_block, distance in plan:
        top += distance
        if is_heading:
            letters = dice.randint(3, 16)
        elif dice.random() < 0.25:
            letters = dice.randint(1, LINE_CHARACTERS)
        else:
            letters = LINE_CHARACTERS + dice.randint(-12, 4)
        text = _nonsense(dice, letters)
        em = dice.choice(HEADING_SIZES) if is_heading else size
        while len(text) > 1 and _width(text, em, look.scale) > SIDE - 2 * MARGIN - 1:
            text = text[:-1].rstrip()
        room = SIDE - MARGIN - _width(text, em, look.scale)
        if opens_block or left > room:
            left = dice.uniform(MARGIN, room)
        drawn.append(_line(text, left, top, em, is_heading=is_heading, opens_block=opens_block, scale=look.scale))
    return Page(tuple(drawn), look)


def _look(dice: random.Random) -> Look:
    width = height = SIDE
    if dice.random() < 0.5:
        height = dice.randint(480, 900)
        width = round(height * dice.uniform(0.72, 1.05))
    return Look(
        dice.randint(225, 255), dice.randint(0, 70), dice.choice((0.0, 0.0, dice.uniform(0, 12))), (width, height)
    )


def _nonsense(dice: random.Random, length: int) -> str:
    words: list[str] = []
    while (left := length - len(" ".join(words)) - bool(words)) > 0:
        letters = min(left, dice.randint(1, 9))
        (alphabet,) = dice.choices(ALPHABETS, (30, 10, 12, 18, 30))
        word = "".join(dice.choices(alphabet, k=letters))
        if alphabet is string.ascii_lowercase and dice.random() < 0.2:
            word = word.capitalize()
        if letters > 2 and dice.random() < 0.12:
            word = word[:-1] + dice.choice(".,:;!?)")
        words.append(word)
    # What a line may begin with must not be taken for Markdown's sign of a heading.
    return " ".join(words).removeprefix("#").lstrip() or "x"


def _line(text: str, left: float, top: float, size: int, *, is_heading: bool, opens_block: bool, scale: float) -> Line:
    font = _font(size * scale)
    edges = list(accumulate((font.getlength(letter) / scale for letter in text), initial=0.0))
    words: list[Word] = []
    start = 0
    for word in text.split(" "):
        end = start + len(word)
        centers = tuple(left + (edges[at] + edges[at + 1]) / 2 for at in range(start, end))
        words.append(Word(word, left + edges[start], centers))
        start = end + 1
    return Line(tuple(words), left, top, size, is_heading, opens_block)


def _width(text: str, size: int, scale: float) -> float:
    return _font(size * scale).getlength(text) / scale


# Of any number of sizes, for a page may be drawn with any number of pixels.
@lru_cache(maxsize=32)
def _font(size: float) -> ImageFont.FreeTypeFont:
    return cast("ImageFont.FreeTypeFont", ImageFont.load_default(size))
