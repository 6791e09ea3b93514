"""Asking the OCR model through the router, and how many pages at a time keep it busy."""

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from vllm_unified import tracing
from vllm_unified.documents.options import Options
from vllm_unified.documents.profiles import Profile, profile_of

MOST_IN_FLIGHT = 64
CONNECT_SECONDS = 10.0
# A page of 8192 tokens at 10 tokens a second, which is a slow engine under load.
READ_SECONDS = 900.0
# How long an engine may be full or away before a page is given up for it; one that loads a large model takes minutes.
PATIENCE_SECONDS = 1800.0
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
LONGEST_RETRY_AFTER_SECONDS = 120.0
# One page may bring an engine down, so it is not sent for ever.
MOST_BREAKS = 3
# No context holds more; what is beyond is no answer of a model.
MOST_ANSWER_BYTES = 4 << 20
LONGEST_WORDS = 500
METRICS_SECONDS = 10.0
# How old may be what is known of the models.
FOUND_SECONDS = 5.0

_COME_BACK = frozenset({429, 503})
_BROKEN = frozenset({502, 504})


class Answer(msgspec.Struct, frozen=True):
    """`finish_reason` as the engine says it: "stop", "length" where the answer was cut off; "" where it says none.

    `token_ids`: where they were asked for, of an engine that tells them.
    """

    text: str
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    token_ids: tuple[int, ...] = ()


class EngineError(Exception):
    """No answer was had. `again`: another way of asking may get one. The message has the engine's own words.

    `status`: that of its refusal, 0 where it refused nothing.
    """

    def __init__(self, message: str, *, again: bool = False, status: int = 0) -> None:
        super().__init__(message)
        self.again = again
        self.status = status


class Queue(msgspec.Struct, frozen=True):
    """Requests that the engines of a model run, and that wait in them."""

    running: int
    waiting: int


class OcrModel(msgspec.Struct, frozen=True):
    """The first model of the type ocr. `max_model_len`: its context in tokens, where that is known."""

    name: str
    path: str
    max_model_len: int | None
    ready: bool

    def profile(self, options: Options) -> Profile:
        """Raises DocumentError 400 where the options name one that there is not."""
        return profile_of((self.name, self.path), options.profile)


class _Listed(msgspec.Struct):
    """An entry of the router's /models, or of its /v1/models."""

    id: str
    type: str = ""
    path: str | None = None
    max_model_len: int | None = None
    state: str = ""


class _List(msgspec.Struct):
    data: list[_Listed]


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class _Said(msgspec.Struct):
    message: str = ""


class _Refusal(msgspec.Struct):
    error: _Said = msgspec.field(default_factory=_Said)


_list = msgspec.json.Decoder(_List)
_completion = msgspec.json.Decoder(_Completion)
_refusal = msgspec.json.Decoder(_Refusal)


class Engine:
    """The models of the type ocr, as the router at `url` serves them. `key`: the deployment's own."""

    def __init__(
        self, url: str, key: str, *, patience: float = PATIENCE_SECONDS, read_seconds: float = READ_SECONDS
    ) -> None:
        self._found: OcrModel | None = None
        self._found_at = float("-inf")
        self._patience = patience
        self._read_seconds = read_seconds
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {key}"},
            # The caller says how many pages are in flight, so nobody waits for a connection.
            timeout=httpx.Timeout(read_seconds, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=MOST_IN_FLIGHT),
            trust_env=False,
            verify=url.startswith("https:"),  # the authorities' certificates take 50 ms to read
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    @property
    def found(self) -> OcrModel | None:
        """By the last `find`."""
        return self._found

    async def find(self) -> OcrModel | None:
        """As it was FOUND_SECONDS ago or later: a reload may name another. None: there is none, or no router."""
        if time.monotonic() - self._found_at > FOUND_SECONDS:
            try:
                self._found = await self._look()
                self._found_at = time.monotonic()
            except (httpx.HTTPError, msgspec.MsgspecError):
                return self._found
        return self._found

    async def _look(self) -> OcrModel | None:
        listed, told = await self._listed("/models"), await self._listed("/v1/models")
        first = next((each for each in listed if each.type == "ocr"), None)
        if first is None:
            return None
        known = next((each for each in told if each.id == first.id), first)
        return OcrModel(first.id, first.path or "", known.max_model_len, known.state == "ready")

    async def _listed(self, path: str) -> list[_Listed]:
        answer = await self._client.get(path, timeout=METRICS_SECONDS)
        return _list.decode(answer.raise_for_status().content).data

    async def ask(self, model: str, request: Mapping[str, Any], on_behalf_of: str = "") -> Answer:
        """`request`: a chat completion's fields but for the model. `on_behalf_of`: whose key the page is charged to.

        Waits while the engine is full or away, and sends the page again when the connection breaks. Raises
        EngineError.
        """
        body = msgspec.json.encode({**request, "model": model})
        del request  # it holds the page's image in base64, which is in the body now
        headers = {b"content-type": b"application/json"}
        if on_behalf_of:
            headers[b"x-on-behalf-of"] = on_behalf_of.encode("utf-8")
        if (span := tracing.CURRENT.get()) is not None:
            headers[tracing.HEADER] = span.traceparent
        deadline = time.monotonic() + self._patience
        pause, breaks = FIRST_PAUSE_SECONDS, 0
        while True:
            began = time.monotonic()
            seconds = pause
            try:
                response, content = await self._post(body, headers)
            except httpx.ConnectError as error:
                problem = f"the router cannot be reached: {error}"
            except httpx.ReadTimeout:
                raise EngineError(f"the engine said nothing for {self._read_seconds:g} s") from None
            except httpx.TransportError as error:
                problem = f"the connection broke: {error or type(error).__name__}"
                breaks += 1
            else:
                if response.status_code == 200:
                    return _answer(content, time.monotonic() - began)
                problem = f"{response.status_code}: {_words(content)}"
                if response.status_code in _COME_BACK:
                    seconds = _retry_after(response.headers) or pause
                elif response.status_code in _BROKEN:
                    breaks += 1
                else:
                    status = response.status_code
                    raise EngineError(f"the engine answered {problem}", again=status >= 500, status=status)
            seconds *= random.uniform(1.0, 1.25)  # noqa: S311 - so that not all pages come back at once
            if breaks >= MOST_BREAKS:
                raise EngineError(f"{problem}; it was sent {breaks} times")
            if time.monotonic() + seconds > deadline:
                raise EngineError(f"{problem}; given up after {self._patience:g} s")
            await asyncio.sleep(seconds)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def queue(self, model: str) -> Queue | None:
        """What waits in the model's engines now; None where they do not say, as those of another machine."""
        try:
            response = await self._client.get("/metrics/engines", timeout=METRICS_SECONDS)
        except httpx.HTTPError:
            return None
        return _queue(response.text, model) if response.status_code == 200 else None

    async def _post(self, body: bytes, headers: Mapping[bytes, bytes]) -> tuple[httpx.Response, bytes]:
        async with self._client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MOST_ANSWER_BYTES:
                    raise EngineError(f"the engine's answer is longer than {MOST_ANSWER_BYTES >> 20} MiB", again=True)
            return response, bytes(content)


def _answer(content: bytes, seconds: float) -> Answer:
    try:
        completion = _completion.decode(content)
        choice = completion.choices[0]
    except (msgspec.MsgspecError, IndexError, ValueError, RecursionError) as error:
        raise EngineError(f"the engine's answer is no chat completion: {error}", again=True) from None
    usage = completion.usage or _Usage()
    return Answer(
        choice.message.content or "",
        choice.finish_reason or "",
        usage.prompt_tokens or 0,
        usage.completion_tokens or 0,
        seconds,
        choice.token_ids or (),
    )


def _words(content: bytes) -> str:
    """The message in OpenAI's shape of an error, else what there is."""
    try:
        said = _refusal.decode(content).error.message
    except (msgspec.MsgspecError, ValueError, RecursionError):
        said = ""
    return (said or content.decode("utf-8", "replace")).strip()[:LONGEST_WORDS] or "no word of why"


def _retry_after(headers: httpx.Headers) -> float:
    """Seconds; 0 where it says none, or a date."""
    value = headers.get("retry-after", "")
    return min(float(value), LONGEST_RETRY_AFTER_SECONDS) if value.isascii() and value.isdigit() else 0.0


def _queue(text: str, model: str) -> Queue | None:
    """`text` in Prometheus' format. Its other families are many and large, so they are not parsed."""
    counts = {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0}
    lines = "\n".join(line for line in text.splitlines() if line.startswith(tuple(counts)))
    found = False
    try:
        for family in text_string_to_metric_families(lines):
            for sample in family.samples:
                if sample.name in counts and model in (sample.labels.get("model"), sample.labels.get("model_name")):
                    counts[sample.name] += sample.value
                    found = True
        running, waiting = map(int, counts.values())
    except (ValueError, OverflowError):  # no such format, or NaN
        return None
    return Queue(running, waiting) if found else None


class InFlight:
    """How many pages to send at a time, so that the engine always has a next one and hardly more.

    It grows fast until pages wait in the engine for the first time, and then by one (additive increase); it shrinks
    by a quarter at most (multiplicative decrease). Others may use the engine too: those that wait are everybody's.
    """

    # Of what waits. vLLM counts a request as waiting for a moment even when it has room.
    ENOUGH = 2
    TOO_MANY = 4
    # Between two changes, so that the engine has seen the pages that came of the last.
    SETTLE_SECONDS = 1.0

    def __init__(self, start: int = 4, least: int = 1, most: int = MOST_IN_FLIGHT) -> None:
        self.limit = start
        self._least = least
        self._most = most
        self._fast = True
        self._changed = float("-inf")

    def observe(self, queue: Queue, sent: int, now: float) -> None:
        """`sent`: pages that are in flight now; `now`: of any clock, in seconds. Call it about every second."""
        if queue.waiting > 0:
            self._fast = False
        if now - self._changed < self.SETTLE_SECONDS:
            return
        limit = self.limit
        if queue.waiting > self.TOO_MANY and sent <= limit:
            limit -= min(queue.waiting - self.ENOUGH, max(1, limit // 4))
        elif queue.waiting == 0 and sent >= limit and 2 * (queue.running + queue.waiting) >= sent:
            limit += limit if self._fast else 1
        limit = max(self._least, min(limit, self._most))
        if limit != self.limit:
            self.limit, self._changed = limit, now
