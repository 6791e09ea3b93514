"""Requests as the openai client writes them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL = "bench"
QUESTION = "Answer in one short sentence, without explanation: what is the capital of France, and since when? " * 2


@dataclass(frozen=True)
class Request:
    path: str
    headers: Mapping[str, str]
    body: bytes

    def on_the_wire(self, port: int) -> bytes:
        headers = {"host": f"127.0.0.1:{port}", **self.headers, "content-length": str(len(self.body))}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


def chat(key: str, model: str = MODEL) -> Request:
    return _chat(key, {"messages": [{"role": "user", "content": QUESTION}], "model": model, "max_tokens": 64})


def stream(key: str, events: int, interval_ms: int) -> Request:
    """The engine reads the number of events in `max_tokens` and their distance in `seed`."""
    return _chat(
        key,
        {
            "messages": [{"role": "user", "content": QUESTION}],
            "model": MODEL,
            "max_tokens": events,
            "seed": interval_ms,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    )


def image(key: str, size: int) -> Request:
    """A body of `size` bytes; `model` stands after the image."""
    around = len(_with_image(key, "").body)
    return _with_image(key, "iVBORw0K" * ((size - around) // 8))


def _with_image(key: str, encoded: str) -> Request:
    image_url = {"url": f"data:image/png;base64,{encoded}"}
    content = [{"type": "text", "text": "Read it."}, {"type": "image_url", "image_url": image_url}]
    return _chat(key, {"messages": [{"role": "user", "content": content}], "model": MODEL, "max_tokens": 64})


def _chat(key: str, fields: dict[str, Any]) -> Request:
    headers = {
        "authorization": f"Bearer {key}",
        "accept": "application/json",
        "content-type": "application/json",
        "user-agent": "OpenAI/Python 2.8.0",
    }
    return Request("/v1/chat/completions", headers, json.dumps(fields, separators=(",", ":")).encode())
