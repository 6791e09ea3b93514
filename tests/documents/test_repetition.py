import random
import time

import pytest

from vllm_unified.documents.repetition import WINDOW, loop_at_end, without_loop

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards make toxic brew for evil queens"
WORDS = SENTENCE.split(" ")
DICE = random.Random(7)
PROSE = " ".join(DICE.choice(WORDS) for _ in range(400))
CHINESE = "".join(
    DICE.choice("的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动") for _ in range(800)
)


def numbered(count: int) -> str:
    return "".join(f"Line number {number} says the same again.\n" for number in range(count))


def boxes(count: int) -> str:
    return "".join(
        f"<|ref|>text<|/ref|><|det|>[[{n}, {n}, {n + 90}, {n + 9}]]<|/det|>\nAll rights are reserved.\n\n"
        for n in range(count)
    )


LOOPS = {
    "words": "and so on, " * 40,
    "a long sentence": f"{SENTENCE}. " * 5,
    "Chinese": "本页内容重复。" * 60,
    "cut off within a round": "The committee approves. " * 30 + "The commi",
    "longer than what is looked at": "over and over, " * (2 * WINDOW // 15),
    "empty cells without end": "<td></td>" * 300,
    "numbered lines": numbered(30),
    "another box each time": boxes(20),
    "nearly the same": "".join(DICE.choice(("yes it is ", "yes it was ")) for _ in range(200)),
}
NOT_LOOPS = {
    "nothing": "",
    "prose": PROSE,
    "Chinese": CHINESE,
    "equal cells of a table": "| 0 | 0 | 0 |\n" * 60,
    "equal cells in HTML": "<tr><td>0</td><td>0</td></tr>" * 60,
    "a table of numbers": "".join(f"| {n} | {n * 7} | {n * n} |\n" for n in range(200)),
    "cells of doctags": "<fcel>pass<fcel>pass<nl>" * 60,
    "dots of a list of contents": "Chapter " + "." * 900,
    "a line": "text\n" + "-" * 900,
    "a paragraph thrice": "This page is left empty. " * 3,
}


@pytest.mark.parametrize("before", ["", PROSE + "\n"], ids=["alone", "after prose"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_loop_of_an_answer_that_was_cut_off(before: str, loop: str) -> None:
    found = loop_at_end(before + loop, ended=False)
    assert found is not None
    assert found.start >= len(before.rstrip()) - 5  # the last letters before it may fit the round


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("text", NOT_LOOPS.values(), ids=NOT_LOOPS)
def test_what_is_no_loop(text: str, ended: bool) -> None:
    assert loop_at_end(text, ended=ended) is None


@pytest.mark.parametrize(
    ("text", "looped"),
    [
        ("Signature: ______ Date: ______\n" * 12, False),
        ("Yes\n" * 60, False),
        (numbered(60), False),
        ("<td></td>" * 300, False),
        ("I am a loop that came to an end. " * 100, True),
    ],
)
def test_an_answer_that_ended_by_itself_is_given_more_credit(text: str, looped: bool) -> None:
    assert (loop_at_end(text, ended=True) is not None) is looped


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (PROSE + ".\n" + "And so on, " * 60, PROSE + ".\nAnd so on,"),
        ("Title\n" + "over and over, " * 2000, "Title\nover and over,"),
        ("Title\n" + numbered(30), "Title\nLine number 0 says the same again."),
        ("Title\n" + boxes(20), "Title\n" + boxes(1).rstrip()),
        (LOOPS["nearly the same"], LOOPS["nearly the same"]),
    ],
)
def test_text_without_its_loop(text: str, left: str) -> None:
    loop = loop_at_end(text, ended=False)
    assert loop is not None
    assert without_loop(text, loop) == left


@pytest.mark.parametrize("hostile", ["a", "ab", "<", "<|", "1", "aab", "\n"])
def test_hostile_text_takes_no_longer_than_its_length_allows(hostile: str) -> None:
    began = time.process_time()
    loop_at_end(hostile * (1_000_000 // len(hostile)) + "!", ended=False)
    loop_at_end(hostile * (1_000_000 // len(hostile)), ended=False)
    assert time.process_time() - began < 5
