"""Whether the end of an answer is a model that goes round in a loop."""

import re
from itertools import groupby

import msgspec

# Characters at the end that are looked at: half of what DeepSeek-OCR's context holds.
WINDOW = 12_000
_NUMBER = re.compile(r"\d+")
_SPECIAL = re.compile(r"<\|[^<>|]{0,40}\|>")
_WORD = re.compile(r"[^\W\d_]{2,40}")
_CJK = re.compile("[぀-鿿가-힯]")
# A table may rightly have hundreds of equal cells, a form a line of a thousand dots.
LOOKS_LIKE_TABLE = re.compile(r"\||</?t[dhr]|<(?:fcel|ecel|ched|nl)>")

NEAR_LOOP_WORDS = (300, 900)  # a short round shows in the last 300 words, a long one in 900
NEAR_LOOP_SHARE = 0.1  # how many of the runs of four words are different ones


class Loop(msgspec.Struct, frozen=True):
    """`text[start:]` is `text[start:start + period]` over and over.

    `period` is 0 where it is nearly so: then nothing can be cut.
    """

    start: int
    period: int


class _Least(msgspec.Struct, frozen=True):
    """How much has to repeat: so many characters, and so many times."""

    characters: int
    times: int


# An answer that was cut off at the end of the context is in a loop much more often than one that ended by itself.
_CUT_OFF = _Least(300, 4)
_CUT_OFF_TABLE = _Least(2000, 100)
_ENDED = _Least(2000, 20)


def loop_at_end(text: str, *, ended: bool) -> Loop | None:
    """`ended`: the model stopped by itself. Takes time in proportion to the length."""
    text = text.rstrip()
    tail = text[-WINDOW:]
    for period, covered in _periods(tail):
        unit = tail[-period:]
        if _is_loop(unit, covered // period, covered, ended):
            return _grown(text, period)
    if ended:
        return None
    return _loop_but_for_numbers(text, tail) or _near_loop(text, tail)


def without_loop(text: str, loop: Loop) -> str:
    """The text up to the end of the first round."""
    return text[: loop.start + loop.period].rstrip() if loop.period else text


def _is_loop(unit: str, times: int, covered: int, ended: bool) -> bool:
    plain = bool(LOOKS_LIKE_TABLE.search(unit)) or not any(map(str.isalpha, unit))
    if ended and plain:
        return False
    least = _ENDED if ended else _CUT_OFF_TABLE if plain else _CUT_OFF
    return covered >= least.characters and times >= least.times


def _periods(tail: str) -> list[tuple[int, int]]:
    """Each (period, how many characters at the end have it), where that is two rounds at least; shortest first."""
    matches = _z(tail[::-1])
    return [(shift, matches[shift] + shift) for shift in range(1, len(tail) // 2 + 1) if matches[shift] >= shift]


def _z(text: str) -> list[int]:
    """Of each place, how many characters from there are as those from the beginning: the Z function, linear."""
    lengths = [0] * len(text)
    left = right = 0
    for place in range(1, len(text)):
        length = min(right - place, lengths[place - left]) if place < right else 0
        while place + length < len(text) and text[length] == text[place + length]:
            length += 1
        lengths[place] = length
        if place + length > right:
            left, right = place, place + length
    return lengths


def _grown(text: str, period: int) -> Loop:
    """The loop may be longer than what was looked at."""
    start = len(text) - period
    while start > 0 and text[start - 1] == text[start - 1 + period]:
        start -= 1
    return Loop(start, period)


def _loop_but_for_numbers(text: str, tail: str) -> Loop | None:
    """Rounds that count: "Figure 7. ", or the same line with another box each time. Tables are full of numbers."""
    bare = _NUMBER.sub("0", tail)
    for period, covered in _periods(bare):
        unit = bare[-period:]
        letters = sum(map(str.isalpha, _SPECIAL.sub("", unit)))
        if letters < 10 or LOOKS_LIKE_TABLE.search(_SPECIAL.sub("", unit)):
            continue
        if _is_loop(_SPECIAL.sub("", unit), covered // period, covered, False):
            first = _place_in(tail, len(bare) - covered)
            return Loop(len(text) - len(tail) + first, _place_in(tail[first:], period))
    return None


def _place_in(text: str, place: int) -> int:
    """Where in `text` that is which stands at `place` when each number is one character."""
    behind = 0
    for number, run in groupby(text, str.isdecimal):
        length = sum(1 for _ in run)
        width = 1 if number else length
        if place <= width:
            return behind + (length if number and place else place)
        place -= width
        behind += length
    return behind


def _near_loop(text: str, tail: str) -> Loop | None:
    """A guard against repetition turns a loop into one that is slightly different each time."""
    if LOOKS_LIKE_TABLE.search(_SPECIAL.sub("", tail)):
        return None
    words = [word for run in _WORD.findall(_SPECIAL.sub("", tail)) for word in (run if _CJK.match(run) else [run])]
    near = any(_is_monotonous(words[-count:]) for count in NEAR_LOOP_WORDS if len(words) >= count)
    return Loop(len(text), 0) if near else None


def _is_monotonous(words: list[str]) -> bool:
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(set(runs)) < NEAR_LOOP_SHARE * len(runs)
