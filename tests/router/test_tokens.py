"""Streams of server-sent events in any pieces: nothing but the usage that nobody asked for is missing."""

import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.router.tokens import LARGEST_EVENT, AnswerTokens, StreamTokens


@dataclass
class Event:
    document: Any
    before: tuple[str, ...] = ()  # other lines of the event
    lines: int = 1  # over which its data is spread
    space: str = " "

    @property
    def is_usage_alone(self) -> bool:
        return isinstance(self.document, dict) and self.document.get("choices") == [] and "usage" in self.document

    def text(self, newline: str) -> bytes:
        data = json.dumps(self.document, indent=1 if self.lines > 1 else None, ensure_ascii=False)
        lines = [*self.before, *(f"data:{self.space}{line}" for line in data.splitlines())]
        return "".join(f"{line}{newline}" for line in [*lines, ""]).encode()


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


COUNTS = st.builds(usage, st.integers(0, 9999), st.integers(0, 9999))
DELTA = st.fixed_dictionaries({"delta": st.fixed_dictionaries({"content": st.text(max_size=20)})})
CHUNKS = st.fixed_dictionaries(
    {"choices": st.lists(DELTA, min_size=1, max_size=2)}, optional={"usage": st.one_of(st.none(), COUNTS)}
)
LAST = st.fixed_dictionaries({"choices": st.just([]), "usage": COUNTS})
EVENTS = st.builds(
    Event,
    st.one_of(CHUNKS, LAST, st.just("[DONE]"), st.just({"text": 'says "usage" itself'})),
    st.sampled_from([(), (": a comment",), ("event: message", "id: 7"), (': a comment with "usage"',)]),
    st.sampled_from([1, 1, 2]),
    st.sampled_from([" ", "", "  "]),
)


@st.composite
def pieces(draw: st.DrawFn, text: bytes) -> list[bytes]:
    places = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12)))
    return [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)]) if start < end]


def passed(tokens: StreamTokens, parts: list[bytes]) -> bytes:
    return b"".join([*map(tokens.take, parts), tokens.end()])


def counted(events: list[Event]) -> tuple[int, int]:
    found = [
        each.document["usage"] for each in events if isinstance(each.document, dict) and each.document.get("usage")
    ]
    counts = [(each["prompt_tokens"], each["completion_tokens"]) for each in found]
    return max((prompt for prompt, _ in counts), default=0), max((completion for _, completion in counts), default=0)


@given(st.lists(EVENTS, max_size=6), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.data())
def test_a_stream_in_any_pieces(events: list[Event], newline: str, hide: bool, data: st.DataObject) -> None:
    text = b"".join(event.text(newline) for event in events)
    wanted = b"".join(event.text(newline) for event in events if not (hide and event.is_usage_alone))
    tokens = StreamTokens(hide=hide)
    assert passed(tokens, data.draw(pieces(text))) == wanted
    assert (tokens.prompt, tokens.completion) == counted(events)
    assert tokens.at_border


@given(st.lists(EVENTS, max_size=4), EVENTS, st.booleans(), st.data())
def test_a_stream_that_ends_within_an_event(events: list[Event], last: Event, hide: bool, data: st.DataObject) -> None:
    whole = b"".join(event.text("\n") for event in events)
    text = last.text("\n")
    text = whole + text[: data.draw(st.integers(1, len(text) - 2))]
    tokens = StreamTokens(hide=hide)
    out = passed(tokens, data.draw(pieces(text)))
    assert out.startswith(b"".join(event.text("\n") for event in events if not (hide and event.is_usage_alone)))
    assert hide or out == text


@given(st.lists(EVENTS, max_size=4), EVENTS, st.booleans(), st.data())
def test_an_error_behind_half_an_event_is_an_event(
    events: list[Event], last: Event, hide: bool, data: st.DataObject
) -> None:
    whole, text = b"".join(event.text("\n") for event in events), last.text("\n")
    tokens = StreamTokens(hide=hide)
    parts = data.draw(pieces(whole + text[: data.draw(st.integers(1, len(text) - 2))]))
    out = b"".join(map(tokens.take, parts)) + tokens.broken_off() + b"data: error\n\n"
    assert out.split(b"\n\n")[-2].lstrip(b"\n") == b"data: error"


@pytest.mark.parametrize("hide", [True, False])
def test_an_event_of_many_mebibytes_is_not_kept(hide: bool) -> None:
    event = b'data: {"x": "' + b"y" * (5 * LARGEST_EVENT) + b'"}\n\n'
    tokens = StreamTokens(hide=hide)
    out = held = 0
    parts = [event[start : start + 100_000] for start in range(0, len(event), 100_000)]
    for number, part in enumerate(parts[:-1], 1):
        out += len(tokens.take(part))
        held = max(held, number * 100_000 - out)
        assert out == 0 or not tokens.at_border
    out += len(tokens.take(parts[-1]))
    assert out == len(event)
    assert held <= LARGEST_EVENT
    assert tokens.at_border


@given(COUNTS, st.data())
def test_an_answer_in_any_pieces(counts: dict[str, int], data: st.DataObject) -> None:
    text = json.dumps({"choices": [{"text": "é"}], "usage": counts}, ensure_ascii=False).encode()
    tokens = AnswerTokens()
    for piece in data.draw(pieces(text)):
        tokens.take(piece)
    assert tokens.counts() == (counts["prompt_tokens"], counts["completion_tokens"])


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        (b'{"usage": {"input_tokens": 3, "output_tokens": 4}}', (3, 4)),
        (b'{"usage": {"prompt_tokens": 3, "total_tokens": 3}}', (3, 0)),
        (b'{"usage": {"total_tokens": 5}}', (5, 0)),
        (b'{"usage": {"prompt_tokens": -3, "completion_tokens": 2}}', (0, 2)),
        (b'{"usage": null}', (0, 0)),
        (b'{"usage": {"prompt_tokens": "3"}}', (0, 0)),
        (b'{"usage": 5}', (0, 0)),
        (b"[]", (0, 0)),
        (b"", (0, 0)),
        (b"rubbish", (0, 0)),
        (b"[" * 100_000, (0, 0)),
    ],
)
def test_what_an_answer_says_of_its_tokens(answer: bytes, counts: tuple[int, int]) -> None:
    tokens = AnswerTokens()
    tokens.take(answer)
    assert tokens.counts() == counts


def test_a_stream_that_told_nothing_has_as_many_tokens_as_pieces() -> None:
    tokens = StreamTokens(hide=True)
    for number in range(5):
        tokens.take(b'data: {"choices": [{"delta": {"content": "%d"}}]}\n\n' % number)
    assert tokens.counts == (0, 5)
    tokens.take(b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n')
    assert tokens.counts == (3, 7)
