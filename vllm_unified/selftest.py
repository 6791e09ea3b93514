"""Golden questions to a running deployment, through its router: does every model do what its clients rely on?"""

import base64
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_unified import loopback
from vllm_unified.settings import Kind, Model, Settings

PATIENCE_SECONDS = 120.0
# A query, the text that answers it, and one that has nothing to do with it.
ENGLISH = (
    ("What is the capital of France?", "Paris is the capital of France.", "Bananas are yellow when they are ripe."),
    (
        "How do I reset my password?",
        "Click 'forgot password' on the sign-in page to choose a new password.",
        "Whisk two eggs with a cup of flour and some milk.",
    ),
    (
        "Which animal is the largest in the sea?",
        "The blue whale is the largest animal that lives in the ocean.",
        "The invoice has to be paid within thirty days.",
    ),
)
CHINESE = (
    ("法国的首都是哪里？", "巴黎是法国的首都。", "香蕉成熟时是黄色的。"),
    ("怎么重置密码？", "在登录页面点击“忘记密码”，即可设置新密码。", "把两个鸡蛋、一杯面粉和一些牛奶搅匀。"),
    ("海里最大的动物是什么？", "蓝鲸是生活在海洋里的最大的动物。", "发票须在三十天内付款。"),
)
WORD = "HOTEL"
# A page that says it, as PNG: 512 × 512 pixels, in Aileron (CC0).
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAgAAAAIAAgMAAACJFjxpAAAADFBMVEX////Nzc1ISEgAAAAoRaGkAAABFklEQVR42u3Wr0qDURgH4J/b"
    "LJaBIIjZe7B+NzGtZpOItgXRYBBEEJbN+/ASZLsEq2CxeQEGw9yxOZBVd0SeJ7285fzOX04CAAAAAAAAAMAf028yzMb8vFtK6Zdy+fTb"
    "A3aWNc8eTks7adO20yorsPaRx2SYfpNulRXovOVkZTNeFqB3n5emaoAkdQNMM1tZgN7PxiSfd991WV99gDabi7pU2ILR/uLujw7qnIFZ"
    "k9605iGcJakb4DC7VQPMt3NT9SUsV+1ekuRo3OyMb1d8DZPk+v0iSTLI89bg9dgnBQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAACA/+0Lz3gzwS6upr0AAAAASUVORK5CYII="
)

LOOK = "./deploy.sh status and ./deploy.sh logs MODEL say why"
POOLING = 'is it an embedding model? its pooling is set by engine_args "pooler-config"'
PRECISION = 'try "dtype": "float32" for this model; if that helps, its weights overflow in half precision'
# https://github.com/vllm-project/vllm/issues/21681
TEMPLATE = (
    'a Qwen3-Reranker needs engine_args "hf-overrides": {"architectures": ["Qwen3ForSequenceClassification"], '
    '"classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker": true} and its prompt template as '
    '"chat-template"; any other model: is it a reranker?'
)
REPORT = "the router and this model's server disagree: please report it with both their logs"
READING = "the model may not be one for OCR, or lacks its chat template"


@dataclass(frozen=True)
class Outcome:
    """`passed`: None is for information."""

    model: str
    kind: Kind
    check: str
    passed: bool | None
    measured: str
    remedy: str = ""


class Wrong(Exception):
    """An answer that no check can use."""


@dataclass(frozen=True)
class Door:
    """One model, behind the router."""

    url: str
    api_key: str
    model: Model

    def text(self, path: str, **fields: Any) -> str:
        """Raises Wrong for every status but 200."""
        body = {"model": self.model.name, **fields}
        try:
            status, said = loopback.post(f"{self.url}{path}", body, self.api_key, PATIENCE_SECONDS)
        except OSError as error:
            raise Wrong(f"{path}: {error}") from None
        if status != 200:
            raise Wrong(f"{path} answers {status}: {said[:200]}")
        return said

    def ask(self, path: str, **fields: Any) -> Any:
        return json.loads(self.text(path, **fields))

    def vectors(self, texts: Sequence[str]) -> list[list[float]]:
        data = self.ask("/v1/embeddings", input=list(texts))["data"]
        return [list(map(float, each["embedding"])) for each in data]

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """In the order of `documents`."""
        results = self.ask("/v1/rerank", query=query, documents=list(documents))["results"]
        return _in_order((each["index"], each["relevance_score"]) for each in results)


Found = tuple[bool | None, str]


@dataclass(frozen=True)
class Check:
    name: str
    look: Callable[[Door], Found]
    remedy: str


def run(settings: Settings, api_key: str) -> Iterator[Outcome]:
    """Raises OSError when the router does not answer."""
    loopback.get(f"{settings.router_url}/live", timeout=10)
    for model in settings.models:
        door = Door(settings.router_url, api_key, model)
        for check in CHECKS[model.type]:
            yield _outcome(check, door)


def _outcome(check: Check, door: Door) -> Outcome:
    try:
        passed, measured = check.look(door)
        remedy = check.remedy
    except Wrong as error:
        passed, measured, remedy = False, str(error), LOOK.replace("MODEL", door.model.key)
    except (ValueError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        passed, measured, remedy = False, f"an answer of another shape: {error!r}", check.remedy or REPORT
    return Outcome(door.model.key, door.model.type, check.name, passed, measured, remedy if passed is False else "")


# --- embedding ---


def _vectors(door: Door) -> Found:
    found = door.vectors([query for query, _, _ in (*ENGLISH, *CHINESE)])
    widths, lengths = {len(each) for each in found}, [math.hypot(*each) for each in found]
    usable = len(widths) == 1 and all(math.isfinite(length) and length > 0 for length in lengths)
    normalised = "normalised" if all(abs(length - 1) < 0.01 for length in lengths) else "not normalised"
    return usable, f"{'/'.join(map(str, sorted(widths)))} dimensions, {normalised}"


def _same_twice(door: Door) -> Found:
    text = ENGLISH[1][1]
    return _alike(cosine(door.vectors([text])[0], door.vectors([text])[0]), 0.9999)


def _batch_as_single(door: Door) -> Found:
    texts = [text for triple in ENGLISH for text in triple]
    singles = [door.vectors([text])[0] for text in texts]
    return _alike(min(map(cosine, door.vectors(texts), singles)), 0.999)


def _base64_as_floats(door: Door) -> Found:
    text = ENGLISH[0][1]
    encoded = door.ask("/v1/embeddings", input=text, encoding_format="base64")["data"][0]["embedding"]
    packed = base64.b64decode(encoded, validate=True)
    return _alike(cosine(struct.unpack(f"<{len(packed) // 4}f", packed), door.vectors([text])[0]), 0.9999)


def _alike(similarity: float, least: float) -> Found:
    return similarity > least, f"cosine {similarity:.5f}"


def _nearer(triples: Sequence[tuple[str, str, str]]) -> Callable[[Door], Found]:
    def look(door: Door) -> Found:
        found = door.vectors([text for triple in triples for text in triple])
        leads = [
            cosine(query, related) - cosine(query, unrelated)
            for query, related, unrelated in zip(found[::3], found[1::3], found[2::3], strict=True)
        ]
        right = sum(lead > 0 for lead in leads)
        return right == len(triples), f"{right} of {len(triples)}, smallest lead {min(leads):+.3f}"

    return look


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Not a number where one has no direction."""
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else math.nan


# --- rerank ---


def _first(triples: Sequence[tuple[str, str, str]]) -> Callable[[Door], Found]:
    """The answer of each query must come first among those of all."""
    documents = [text for _, related, unrelated in triples for text in (unrelated, related)]

    def look(door: Door) -> Found:
        leads = []
        for query, related, _ in triples:
            scores = door.scores(query, documents)
            own = scores.pop(documents.index(related))
            leads.append(own - max(scores))
        right = sum(lead > 0 for lead in leads)
        return right == len(triples), f"{right} of {len(triples)}, smallest lead {min(leads):+.3f}"

    return look


def _same_in_every_shape(door: Door) -> Found:
    query, texts = ENGLISH[0][0], [text for triple in ENGLISH for text in triple[1:]]
    shapes = {
        "/rerank": door.ask("/rerank", query=query, documents=texts)["results"],
        "/v1/rerank": door.ask("/v1/rerank", query=query, documents=[{"text": text} for text in texts])["results"],
        "/v2/rerank": door.ask("/v2/rerank", query=query, documents=texts, top_n=len(texts))["results"],
        "TEI": [
            {"index": each["index"], "relevance_score": each["score"]}
            for each in door.ask("/rerank", query=query, texts=texts)
        ],
    }
    orders = {name: [each["index"] for each in results] for name, results in shapes.items()}
    scores = {
        name: _in_order((each["index"], each["relevance_score"]) for each in results)
        for name, results in shapes.items()
    }
    other = [name for name in shapes if orders[name] != orders["/rerank"]]
    if other or any(len(order) != len(texts) for order in orders.values()):
        return False, f"{', '.join(other) or '/rerank'}: another order than /rerank, or not all documents"
    difference = max(abs(a - b) for name in shapes for a, b in zip(scores[name], scores["/rerank"], strict=True))
    return difference < 0.01, f"one order, scores differ by {difference:.4f}"


def _spread(door: Door) -> Found:
    """A reranker that says nearly the same of everything orders by noise."""
    documents = [text for triple in ENGLISH for text in triple[1:]]
    scores = [score for query, _, _ in ENGLISH for score in door.scores(query, documents)]
    return max(scores) - min(scores) > 0.01, f"from {min(scores):.4f} to {max(scores):.4f}"


def _in_order(pairs: Iterator[tuple[int, float]]) -> list[float]:
    return [float(score) for _, score in sorted(pairs)]


# --- chat and OCR ---


def _answers(door: Door) -> Found:
    return _answer_of(door, "Say hello.")


def _streams(door: Door) -> Found:
    body = _question("Count to five.")
    said = door.text("/v1/chat/completions", **body, stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data:").strip() for line in said.splitlines() if line.startswith("data:")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    pieces = sum(bool(event.get("choices")) for event in events)
    usage = next((event["usage"] for event in reversed(events) if event.get("usage")), None)
    ended = lines[-1:] == ["[DONE]"]
    tokens = usage["completion_tokens"] if usage else 0
    return bool(pieces and ended and tokens), f"{pieces} pieces, {tokens} tokens{'' if ended else ', no [DONE]'}"


def _looks(door: Door) -> Found:
    return _answer_of(door, _about_the_picture())


def _reads(door: Door) -> Found:
    message = door.ask("/v1/chat/completions", **_question(_about_the_picture()))["choices"][0]["message"]
    said = str(message.get("content") or "")
    reads = WORD.lower() in said.lower()
    return reads, f"reads {WORD}" if reads else f"does not read {WORD}: {said.strip()[:30]!r}"


def _answer_of(door: Door, content: Any) -> Found:
    answer = door.ask("/v1/chat/completions", **_question(content))
    usage, choice = answer["usage"], answer["choices"][0]
    tokens = usage["completion_tokens"]
    counted = usage["prompt_tokens"] > 0 and usage["total_tokens"] == usage["prompt_tokens"] + tokens
    return bool(tokens and counted), f"{usage['prompt_tokens']} + {tokens} tokens, {choice['finish_reason']}"


def _question(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 48, "temperature": 0}


def _about_the_picture() -> list[dict[str, Any]]:
    url = "data:image/png;base64," + PICTURE
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Free OCR."}]


def _for_information(look: Callable[[Door], Found]) -> Callable[[Door], Found]:
    """A model need not know every language."""

    def told(door: Door) -> Found:
        passed, measured = look(door)
        return passed or None, measured

    return told


_TALKS = (Check("answers", _answers, LOOK), Check("streams, and counts its tokens", _streams, REPORT))
CHECKS: dict[Kind, tuple[Check, ...]] = {
    "chat": _TALKS,
    "ocr": (*_TALKS, Check("answers about a picture", _looks, READING), Check("reads a word", _reads, READING)),
    "embedding": (
        Check("vectors of one width", _vectors, PRECISION),
        Check("the same text twice", _same_twice, PRECISION),
        Check("many at once as one by one", _batch_as_single, PRECISION),
        Check("base64 as floats", _base64_as_floats, REPORT),
        Check("related is nearer, English", _nearer(ENGLISH), POOLING),
        Check("related is nearer, Chinese", _for_information(_nearer(CHINESE)), ""),
    ),
    "rerank": (
        Check("the answer comes first, English", _first(ENGLISH), TEMPLATE),
        Check("the answer comes first, Chinese", _for_information(_first(CHINESE)), ""),
        Check("scores are apart", _spread, TEMPLATE),
        Check("one ranking in every shape", _same_in_every_shape, REPORT),
    ),
}


# --- what is shown ---

MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "yellow")}


def passed(outcomes: Sequence[Outcome]) -> bool:
    return all(outcome.passed is not False for outcome in outcomes)


def table(outcomes: Sequence[Outcome]) -> RenderableType:
    """A line a check; below it what to do."""
    lines = Table("model", "", "check", "measured", box=None, pad_edge=False)
    for each in outcomes:
        mark, style = MARKS[each.passed]
        lines.add_row(each.model, Text(mark, style), each.check, Text(each.measured))
    remedies = [
        Text(f"{MARKS[each.passed][0]} {each.model}: {each.check}: {each.remedy}") for each in outcomes if each.remedy
    ]
    return Group(lines, *remedies)


def document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Stable: fields are added, never renamed. `passed` of a check that is for information may be null."""
    return {"passed": passed(outcomes), "checks": [asdict(outcome) for outcome in outcomes]}
