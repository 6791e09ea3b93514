"""Whether an engine works: one small request of its kind, and its own counters of work done."""

import re
from dataclasses import dataclass
from typing import Any

from vllm_unified import loopback

COUNTERS_SECONDS = 10.0
# One token, one text, one pair. Completions and not chat, because not every model has a template for chats.
SMALLEST_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/completions", {"prompt": "1", "max_tokens": 1, "temperature": 0}),
    "ocr": ("/v1/completions", {"prompt": "1", "max_tokens": 1, "temperature": 0}),
    "embedding": ("/v1/embeddings", {"input": "1"}),
    "rerank": ("/v1/rerank", {"query": "1", "documents": ["1"]}),
}
# vLLM's own; the first group says what is in the engine now, the others only grow, with every step of work.
METRIC = re.compile(
    r"^vllm:(?:(num_requests_running|num_requests_waiting)"
    r"|iteration_tokens_total_count|generation_tokens_total|prompt_tokens_total|request_success_total)"
    r"(?:\{[^}]*\})? ([-+.\dEe]+)$",
    re.MULTILINE,
)
LONGEST_ANSWER = 200
# To an engine that traces, so that it makes no trace of a keeper's look at it: the last digit says "not sampled".
UNTRACED = {"traceparent": f"00-{1:032x}-{1:016x}-00"}


@dataclass(frozen=True)
class Counters:
    """`requests`: in the engine now, running or waiting. `work`: grows as long as the engine gets on."""

    requests: int
    work: float


def read_counters(url: str, timeout: float = COUNTERS_SECONDS) -> Counters | None:
    """None where the server has no such counters (`--disable-log-stats`). Raises OSError when it doesn't answer."""
    status, text = loopback.get(f"{url}/metrics", timeout)
    found = METRIC.findall(text) if status == 200 else []
    if not found:
        return None
    requests = sum(float(value) for present, value in found if present)
    return Counters(round(requests), sum(float(value) for present, value in found if not present))


def smallest_request(url: str, kind: str, name: str, api_key: str, timeout: float, *, traces: bool) -> str | None:
    """None when the engine answered it, else what it said. Raises OSError when there is no answer in time."""
    path, body = SMALLEST_REQUESTS[kind]
    more = UNTRACED if traces else None
    status, text = loopback.post(f"{url}{path}", {"model": name, **body}, api_key, timeout, more)
    return None if status == 200 else f"{path} answers {status}: {' '.join(text.split())[:LONGEST_ANSWER]}"
