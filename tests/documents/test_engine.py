import asyncio
import heapq
import io
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.conftest import free_port
from tests.documents.fake_ocr import FakeOcr, colour_of, number_of, page_image
from vllm_unified.documents import engine as engines
from vllm_unified.documents.engine import Answer, Engine, EngineError, InFlight, Queue
from vllm_unified.documents.reading import request_of

PNG = page_image(7)
REQUEST = request_of("Free OCR.", PNG, "image/png", {"temperature": 0.0})


@pytest.fixture
def ocr() -> Iterator[FakeOcr]:
    with FakeOcr(retry_after="") as fake:
        yield fake


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "FIRST_PAUSE_SECONDS", 0.01)


def asked(url: str, *, times: int = 1, on_behalf_of: str = "", **settings: Any) -> list[Answer]:
    """All at once."""

    async def ask() -> list[Answer]:
        engine = Engine(url, "sk-deployment", **settings)
        try:
            return await asyncio.gather(*(engine.ask("ocr", REQUEST, on_behalf_of) for _ in range(times)))
        finally:
            await engine.aclose()

    return asyncio.run(ask())


# --- the stand-in itself ---


@pytest.mark.parametrize("number", [1, 15, 16, 255, 256, 2800, 4000])
@pytest.mark.parametrize("turned", [0, 90, 180, 270])
def test_stand_in_knows_a_page_by_its_mark(number: int, turned: int) -> None:
    image = Image.open(io.BytesIO(page_image(number, 595, 842))).rotate(-turned, expand=True)
    blurred = io.BytesIO()
    image.save(blurred, "JPEG", quality=80)
    assert number_of(Image.open(blurred)) == (number, turned)
    assert len({colour_of(each) for each in range(1, 4001)}) == 4000


def test_a_page_without_a_mark_has_no_number() -> None:
    assert number_of(Image.new("L", (100, 100), 255)) == (0, 0)


def test_special_tokens_are_there_for_who_asks_for_them(ocr: FakeOcr) -> None:
    request = request_of("<|grounding|>OCR this image.", PNG, "image/png", {})
    texts = [
        httpx.post(f"{ocr.url}/v1/chat/completions", json={**request, "model": "ocr", **fields}).json()["choices"][0]
        for fields in ({}, {"skip_special_tokens": False})
    ]
    assert texts[0]["message"]["content"].startswith("Page 7[[80, 60, 920, 90]]\n")
    assert texts[1]["message"]["content"].startswith("<|ref|>Page 7<|/ref|><|det|>[[80, 60, 920, 90]]<|/det|>\n")


# --- asking ---


def test_page_is_read(ocr: FakeOcr) -> None:
    ocr.behave(key="sk-deployment")
    (answer,) = asked(ocr.url, on_behalf_of="team-a")
    assert answer.text.startswith("# Page 7\n")
    assert (answer.finish_reason, answer.prompt_tokens) == ("stop", 903)
    assert answer.completion_tokens > 0
    assert answer.seconds > 0
    (seen,) = ocr.seen["requests"]
    assert (seen["page"], seen["model"], seen["on_behalf_of"]) == (7, "ocr", "team-a")


def test_name_of_a_key_in_any_alphabet(ocr: FakeOcr) -> None:
    asked(ocr.url, on_behalf_of="团队")
    assert ocr.seen["requests"][0]["on_behalf_of"].encode("latin-1").decode() == "团队"


def test_proxies_of_the_environment_are_left_alone(ocr: FakeOcr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert asked(ocr.url)


def test_many_pages_at_a_time(ocr: FakeOcr) -> None:
    ocr.behave(latency=0.2)
    assert len(asked(ocr.url, times=64)) == 64
    assert ocr.seen["most_running"] > 32


@pytest.mark.parametrize("cues", [["429"], ["503", "429", "503"], ["cut"], ["cut", "cut"]])
def test_what_passes_is_waited_for(ocr: FakeOcr, cues: list[str]) -> None:
    ocr.behave(retry_after="", cues=list(cues))
    (answer,) = asked(ocr.url)
    assert answer.finish_reason == "stop"
    assert [each["cue"] for each in ocr.seen["requests"]] == [*cues, ""]
    assert ocr.seen["pages"] == {"7": 1}


def test_as_long_as_the_router_asks_for(ocr: FakeOcr) -> None:
    ocr.behave(retry_after="1", cues=["429"])
    began = time.monotonic()
    asked(ocr.url)
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize("said", ["soon", "Wed, 21 Oct 2026 07:28:00 GMT", "-1", "²", ""])
def test_a_word_of_when_to_come_back_that_is_no_number(ocr: FakeOcr, said: str) -> None:
    ocr.behave(retry_after=said.encode("utf-8").decode("latin-1"), cues=["503"])
    assert asked(ocr.url)


def test_a_router_that_is_away_is_waited_for() -> None:
    port = free_port()

    async def ask() -> Answer:
        engine = Engine(f"http://127.0.0.1:{port}", "k")
        try:
            waiting = asyncio.create_task(engine.ask("ocr", REQUEST))
            await asyncio.sleep(0.1)
            with FakeOcr(port):
                return await waiting
        finally:
            await engine.aclose()

    assert asyncio.run(ask()).finish_reason == "stop"


@pytest.mark.parametrize(
    ("behaviour", "says", "again", "requests"),
    [
        ({"cue": "400"}, "the engine answered 400: fake OCR: 400 as asked", False, 1),
        ({"key": "sk-other", "cue": ""}, "the engine answered 401: fake OCR: wrong key", False, 0),
        ({"cue": "500"}, "the engine answered 500: fake OCR: 500 as asked", True, 1),
        ({"cue": "cut"}, "the connection broke: .*; it was sent 3 times", False, 3),
        ({"cue": "nonsense"}, "the engine's answer is no chat completion: Expected", True, 1),
        ({"cue": "million_boxes"}, "the engine's answer is longer than 4 MiB", True, 1),
        ({"cue": "hang"}, "the engine said nothing for 0.3 s", False, 1),
    ],
)
def test_no_answer(ocr: FakeOcr, behaviour: dict[str, Any], says: str, again: bool, requests: int) -> None:
    ocr.behave(**behaviour)
    with pytest.raises(EngineError, match=says) as caught:
        asked(ocr.url, read_seconds=0.3 if behaviour["cue"] == "hang" else 60)
    assert caught.value.again is again
    assert len(ocr.seen["requests"]) == requests


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ({"cue": "429", "retry_after": ""}, "429: fake OCR: 429 as asked; given up after 0.2 s"),
        ({"cue": "503", "retry_after": "60"}, "503: fake OCR: 503 as asked; given up after 0.2 s"),
    ],
)
def test_patience_ends(ocr: FakeOcr, behaviour: dict[str, Any], says: str) -> None:
    ocr.behave(**behaviour)
    began = time.monotonic()
    with pytest.raises(EngineError, match=says):
        asked(ocr.url, patience=0.2)
    assert time.monotonic() - began < 10


def test_patience_ends_with_nobody_there() -> None:
    with pytest.raises(EngineError, match=r"the router cannot be reached: .*; given up after 0\.1 s"):
        asked(f"http://127.0.0.1:{free_port()}", patience=0.1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'{"error": {"message": "too large"}}', "too large"),
        (b'{"error": "plain"}', '{"error": "plain"}'),
        (b"<html>Bad</html>", "<html>Bad</html>"),
        (b"", "no word of why"),
        (b"\xff" * 9999, "\ufffd" * engines.LONGEST_WORDS),
    ],
)
def test_words_of_an_engine(answer: bytes, words: str) -> None:
    assert engines._words(answer) == words


def test_giving_up_a_page_ends_it_in_the_engine(ocr: FakeOcr) -> None:
    ocr.behave(cue="hang")

    async def leave() -> None:
        engine = Engine(ocr.url, "k")
        asking = asyncio.create_task(engine.ask("ocr", REQUEST))
        while not ocr.running:  # noqa: ASYNC110 - it runs in threads
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await engine.aclose()

    asyncio.run(leave())
    deadline = time.monotonic() + 10
    while not ocr.seen["cancelled"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ocr.seen["cancelled"] == 1


# --- how many at a time ---

METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model="ocr",replica="a",engine="0",model_name="DeepSeek-OCR"} 3.0
vllm:num_requests_running{model="ocr",replica="b",engine="0",model_name="DeepSeek-OCR"} 4.0
vllm:num_requests_running{model="chat",replica="a",engine="0",model_name="Qwen"} 50.0
vllm:num_requests_waiting{model="ocr",replica="a",engine="0",model_name="DeepSeek-OCR"} 1.0
vllm:num_requests_waiting_by_reason{model="ocr",engine="0",reason="capacity"} 1.0
vllm:e2e_request_latency_seconds_bucket{model="ocr",le="+Inf"} 12.0
"""


@pytest.mark.parametrize(
    ("text", "model", "queue"),
    [
        (METRICS, "ocr", Queue(7, 1)),
        (METRICS, "DeepSeek-OCR", Queue(7, 1)),
        (METRICS, "chat", Queue(50, 0)),
        (METRICS, "embedding", None),
        ("", "ocr", None),
        ("vllm:num_requests_running{model=", "ocr", None),
        ('vllm:num_requests_running{model="ocr"} NaN', "ocr", None),
        ("<html>", "ocr", None),
    ],
)
def test_queue_from_metrics(text: str, model: str, queue: Queue | None) -> None:
    assert engines._queue(text, model) == queue


def test_queue_of_an_engine(ocr: FakeOcr) -> None:
    async def look(url: str) -> Queue | None:
        engine = Engine(url, "k")
        try:
            return await engine.queue("ocr")
        finally:
            await engine.aclose()

    assert asyncio.run(look(ocr.url)) == Queue(0, 0)
    ocr.behave(no_metrics=True)
    assert asyncio.run(look(ocr.url)) is None
    assert asyncio.run(look(f"http://127.0.0.1:{free_port()}")) is None


class SimulatedEngine:
    """`slots` requests at a time, each `seconds` long and a fifth more or less, in the order in which they came."""

    def __init__(self, slots: int, seconds: float, others: int = 0) -> None:
        self.slots = slots
        self.seconds = seconds
        self.dice = random.Random(3)
        self.ends: list[float] = []
        self.queue = 0
        self.others = others  # requests of other clients that always wait
        self.done = 0

    def look(self, now: float) -> Queue:
        return Queue(len(self.ends), self.queue + self.others)

    def advance(self, now: float) -> None:
        while self.ends and self.ends[0] <= now:
            ended = heapq.heappop(self.ends)
            self.done += 1
            self._begin(ended)
        while self.queue and len(self.ends) < self.slots:
            self._begin(now)

    def _begin(self, at: float) -> None:
        if self.queue and len(self.ends) < self.slots:
            self.queue -= 1
            heapq.heappush(self.ends, at + self.seconds * self.dice.uniform(0.8, 1.2))

    @property
    def sent(self) -> int:
        return len(self.ends) + self.queue


def run(engine: SimulatedEngine, control: InFlight, began: float, ended: float) -> list[int]:
    """Sends as many pages at a time as are let in. What waits of them in the engine, each second."""
    waiting = []
    for tick in range(int(began * 20), int(ended * 20)):
        now = tick / 20
        engine.advance(now)
        engine.queue += max(0, control.limit - engine.sent)
        engine.advance(now)
        if tick % 20 == 10:
            control.observe(engine.look(now), engine.sent, now)
            waiting.append(engine.queue)
    return waiting


@pytest.mark.parametrize("seconds", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("slots", [1, 2, 5, 16, 48])
def test_engine_is_kept_busy_and_its_queue_short(slots: int, seconds: float) -> None:
    engine, control = SimulatedEngine(slots, seconds), InFlight()
    run(engine, control, 0, 100)  # it finds out
    before = engine.done
    waiting = run(engine, control, 100, 300)
    assert engine.done - before >= 0.95 * 200 * slots / seconds
    assert max(waiting) <= InFlight.TOO_MANY + 1


def test_it_finds_out_in_little_time() -> None:
    engine, control = SimulatedEngine(48, 2.0), InFlight()
    run(engine, control, 0, 10)
    assert control.limit >= 48


def test_engine_that_became_smaller_and_larger_again() -> None:
    engine, control = SimulatedEngine(32, 2.0), InFlight()
    run(engine, control, 0, 60)
    engine.slots = 8
    assert run(engine, control, 60, 120)[-1] <= InFlight.TOO_MANY
    engine.slots = 32
    run(engine, control, 120, 180)
    assert control.limit >= 32


def test_others_who_wait_are_given_way_and_nobody_starves() -> None:
    engine, control = SimulatedEngine(16, 2.0), InFlight()
    run(engine, control, 0, 60)
    engine.others = 50
    run(engine, control, 60, 120)
    assert control.limit == 1
    engine.others = 0
    run(engine, control, 120, 180)
    assert control.limit >= 16


def test_it_does_not_grow_beyond_what_is_used_and_what_it_may() -> None:
    control = InFlight()
    for second in range(100):
        control.observe(Queue(2, 0), 2, float(second))
    assert control.limit == 4
    for second in range(100, 300):
        control.observe(Queue(control.limit, 0), control.limit, float(second))
    assert control.limit == engines.MOST_IN_FLIGHT


def test_it_waits_until_the_engine_has_seen_what_was_sent() -> None:
    control = InFlight()
    control.observe(Queue(0, 0), 4, 0.0)
    assert control.limit == 4
    control.observe(Queue(4, 0), 4, 1.0)
    control.observe(Queue(8, 0), 8, 1.5)
    assert control.limit == 8
    control.observe(Queue(8, 0), 8, 2.0)
    assert control.limit == 16
