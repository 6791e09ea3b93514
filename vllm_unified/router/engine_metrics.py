"""The metrics of the engines of this machine, and where Prometheus finds them by itself."""

import asyncio
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from vllm_unified.router.problems import RequestError, not_ready
from vllm_unified.router.registry import LONGEST_ECHO, RETRY_AFTER_SECONDS, Registry
from vllm_unified.router.replica import Replica

SECONDS = 5.0
UP = "vllm_unified_engine_scrape_up"
# The text format: https://prometheus.io/docs/instrumenting/exposition_formats/
# Possessive (`*+`), so that no line, however broken, takes much longer than its length.
_NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*+"
_SPACE = "[ \t]*+"
_LABEL = rf'[a-zA-Z_][a-zA-Z0-9_]*+{_SPACE}={_SPACE}"[^"\\]*+(?:\\.[^"\\]*+)*+"{_SPACE}'
_LABELS = rf"\{{{_SPACE}((?:{_LABEL}(?:,{_SPACE}|(?=\}})))*+)\}}"
_NUMBER = r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++|[iI]nf|NaN)(?:[eE][+-]?[0-9]++)?"
_TYPES = "counter|gauge|histogram|summary|untyped"
_COMMENT = re.compile(rf"# (HELP|TYPE(?= \S++ (?:{_TYPES})$)) ({_NAME}) (.*)")
_SAMPLE = re.compile(rf"({_NAME}){_SPACE}(?:{_LABELS})?{_SPACE}({_NUMBER}(?:[ \t]++-?[0-9]++)?){_SPACE}")
_OURS = re.compile(r"(^|,)\s*(model|replica)(?=\s*=\s*\")")
_HOST = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?", re.ASCII)
_PARTS = {"histogram": ("_bucket", "_count", "_sum"), "summary": ("_count", "_sum")}

# Replica, path, seconds → status and body.
Fetch = Callable[[Replica, str, float], Awaitable[tuple[int, bytes]]]


class _Family:
    """The lines of one metric."""

    def __init__(self) -> None:
        self.comments: dict[str, str] = {}  # the first HELP and the first TYPE that came
        self.samples: list[str] = []


async def merged(registry: Registry, fetch: Fetch, seconds: float = SECONDS) -> bytes:
    """Every sample of every local engine, with the labels `model` (its key) and `replica` before its own.

    Prometheus wants all lines of a metric together, so those of the engines are put in one place. An engine that
    does not answer within `seconds` has `vllm_unified_engine_scrape_up` 0 and nothing else.
    """
    local = [(served.model.key, each) for served in registry.served for each in served.replicas if each.local]
    texts = await asyncio.gather(*(_text_of(replica, fetch, seconds) for _, replica in local))
    families: defaultdict[str, _Family] = defaultdict(_Family)
    families[UP].comments = {"HELP": "1 when the engine told its metrics", "TYPE": "gauge"}
    for (key, replica), text in zip(local, texts, strict=True):
        labels = f'model="{_escaped(key)}",replica="{_escaped(replica.name)}"'
        families[UP].samples.append(f"{UP}{{{labels}}} {int(text is not None)}")
        _take(families, text or "", labels)
        await asyncio.sleep(0)  # some milliseconds each; requests go on in between
    return "".join(f"{line}\n" for line in _lines(families)).encode()


async def of_engine(registry: Registry, key: str, fetch: Fetch) -> bytes:
    """The engine's own text. Raises RequestError: 404 where none has that key, 503 when it does not answer."""
    served = registry.by_key(key)
    replica = next((each for each in served.replicas if each.local), None) if served else None
    if replica is None:
        raise RequestError(404, f'no engine here has the key "{key[:LONGEST_ECHO]}"', code="model_not_found")
    text = await _answer_of(replica, fetch, SECONDS)
    if text is None:
        raise not_ready(f'the engine "{key}" does not tell its metrics', RETRY_AFTER_SECONDS)
    return text


def sd_document(registry: Registry, address: str, *, documents: bool) -> list[dict[str, Any]]:
    """What Prometheus' `http_sd_configs` reads. `address`: the router's, host:port. `documents`: their service runs.

    Everything is scraped through the router, since the engines and the service may listen for this machine alone.
    """
    engines = [
        _target(address, f"/metrics/engines/{served.model.key}", model=served.model.key, type=served.model.type)
        for served in registry.served
        if any(replica.local for replica in served.replicas)
    ]
    service = [_target(address, "/metrics/documents", type="documents")] if documents else []
    return [_target(address, "/metrics", type="router"), *service, *engines]


def router_address(asked: str, own: str) -> str:
    """host:port at which who asked finds the router: `asked`, the Host of its request, where that is one; else of
    `own`, the router's URL.
    """
    return asked if _HOST.fullmatch(asked) else own.partition("://")[2]


def _target(address: str, path: str, **labels: str) -> dict[str, Any]:
    return {"targets": [address], "labels": {**labels, "__metrics_path__": path}}


async def _text_of(replica: Replica, fetch: Fetch, seconds: float) -> str | None:
    text = await _answer_of(replica, fetch, seconds)
    return None if text is None else text.decode("utf-8", "replace")


async def _answer_of(replica: Replica, fetch: Fetch, seconds: float) -> bytes | None:
    """None where there is none in time."""
    try:
        async with asyncio.timeout(seconds):
            status, body = await fetch(replica, "/metrics", seconds)
    except Exception:  # whatever is wrong with one engine, the others are told
        return None
    return body if status == 200 else None


def _take(families: defaultdict[str, _Family], text: str, labels: str) -> None:
    """Put the lines of one engine where they belong. What is no line of the format is left out."""
    types: dict[str, str] = {}
    for line in text.split("\n"):
        if comment := _COMMENT.fullmatch(line):
            word, name, said = comment.groups()
            families[name].comments.setdefault(word, said)
            if word == "TYPE":
                types[name] = said
        elif sample := _SAMPLE.fullmatch(line):
            name, own, value = sample.groups()
            own = _OURS.sub(r"\1exported_\2", own or "")
            joined = f"{labels},{own}" if own else labels
            families[_family_of(name, types)].samples.append(f"{name}{{{joined}}} {value}")


def _family_of(sample: str, types: dict[str, str]) -> str:
    """A histogram's samples have other names than itself."""
    if sample in types:
        return sample
    name, _, part = sample.rpartition("_")
    return name if f"_{part}" in _PARTS.get(types.get(name, ""), ()) else sample


def _lines(families: dict[str, _Family]) -> Iterable[str]:
    for name, family in families.items():
        if family.samples:
            yield from (f"# {word} {name} {said}" for word, said in sorted(family.comments.items()))
            yield from family.samples


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
