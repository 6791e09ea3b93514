"""Clients' shapes of one request, made into the engine's; and what a model needs that clients do not know of."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from vllm_unified.router import body as bodies
from vllm_unified.router.problems import RequestError
from vllm_unified.router.routes import Route
from vllm_unified.settings import Model

EMBED = "/v2/embed"
RERANK = frozenset({"/rerank", "/v1/rerank", "/v2/rerank"})
ADAPTED = RERANK | {EMBED}  # and what DeepSeek-OCR is asked
# https://github.com/deepseek-ai/DeepSeek-OCR: without them it repeats itself; 128821 and 128822 are <td> and </td>.
DEEPSEEK_OCR: dict[str, Any] = {"temperature": 0.0, "skip_special_tokens": False}
DEEPSEEK_OCR_XARGS = {"ngram_size": 30, "window_size": 90, "whitelist_token_ids": [128821, 128822]}
# What Cohere's clients must say, and what models call it.
INPUT_TYPES = {"search_query": ("query",), "search_document": ("document", "passage")}
DEEPSEEK_OCR_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})


class Answer:
    """An answer that is kept until it is whole, and then told in the client's shape."""

    def __init__(self) -> None:
        self.head: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []

    def take(self, data: bytes) -> None:
        self._parts.append(data)

    def body(self) -> bytes:
        """Raises ValueError, LookupError, TypeError, AttributeError or RecursionError for an answer that is none."""
        return bodies.dumped(self.told(json.loads(b"".join(self._parts))))

    def told(self, document: Any) -> Any:
        raise NotImplementedError


class _TeiRanks(Answer):
    """Text Embeddings Inference: a list of {"index", "score", "text"?}."""

    def __init__(self, texts: list[str] | None) -> None:
        super().__init__()
        self.texts = texts

    def told(self, document: Any) -> Any:
        ranks = [{"index": each["index"], "score": each["relevance_score"]} for each in document["results"]]
        if self.texts is not None:
            ranks = [{**rank, "text": self.texts[rank["index"]]} for rank in ranks]
        return ranks


class _WithoutDocuments(Answer):
    """Jina and Cohere: `return_documents` false."""

    def told(self, document: Any) -> Any:
        for each in document["results"]:
            each.pop("document", None)
        return document


class _RerankFields(msgspec.Struct):
    """Only looked at: most requests go on as they came."""

    query: msgspec.Raw = msgspec.Raw(b"")
    documents: msgspec.Raw = msgspec.Raw(b"")
    texts: msgspec.Raw = msgspec.Raw(b"")
    return_documents: msgspec.Raw = msgspec.Raw(b"")


_rerank_fields = msgspec.json.Decoder(_RerankFields)


def adapted(
    route: Route, body: bytes, *, deepseek_ocr: bool = False, prompts: Collection[str] | None = None
) -> tuple[bytes, Answer | None]:
    """The body for the engine, and what its answer has to become; None for as it is. Raises RequestError 400.

    `prompts`: as in `prompts_of`; None where nothing is known of the model.
    """
    if route.path in RERANK:
        return _rerank(body)
    if route.path == EMBED and prompts is not None:
        return _with_input_type_of(prompts, body), None
    if deepseek_ocr and route.path in DEEPSEEK_OCR_PATHS:
        return with_defaults(body), None
    return body, None


def _rerank(body: bytes) -> tuple[bytes, Answer | None]:
    fields = _rerank_fields.decode(body)
    query, documents, texts = bytes(fields.query), bytes(fields.documents), bytes(fields.texts)
    if texts not in (b"", b"null") and documents in (b"", b"null"):
        return _from_tei(bodies.document_in(body))
    answer = _WithoutDocuments() if bytes(fields.return_documents) == b"false" else None
    if b"null" in body or b"{" in documents or query.startswith(b"{"):
        body = bodies.dumped(_from_jina_or_cohere(bodies.document_in(body)))
    return body, answer


def _from_tei(document: dict[str, Any]) -> tuple[bytes, Answer]:
    """https://huggingface.github.io/text-embeddings-inference, `POST /rerank`."""
    texts = document.pop("texts")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(400, "texts must be a list of strings", code="invalid_type", param="texts")
    raw_scores, truncate = document.pop("raw_scores", None), document.pop("truncate", None)
    side = document.pop("truncation_direction", None)
    answer = _TeiRanks(texts if document.pop("return_text", None) is True else None)
    document = {**_said(document), "documents": texts}
    if raw_scores is True:
        document["use_activation"] = False
    if truncate is True:
        document["truncate_prompt_tokens"] = -1
        document["truncation_side"] = "left" if str(side).lower() == "left" else "right"
    return bodies.dumped(document), answer


def _from_jina_or_cohere(document: dict[str, Any]) -> dict[str, Any]:
    """Documents as objects, and fields that are null, which vLLM does not take for ones that are not there."""
    document = _said(document)
    names = document.pop("rank_fields", None)
    if "query" in document:
        document["query"] = _scored(document["query"], None)
    if isinstance(documents := document.get("documents"), list):
        document["documents"] = [_scored(each, names) for each in documents]
    return document


def _scored(given: Any, names: Any) -> Any:
    """A query or a document in vLLM's shape: a text, or `{"content": [parts]}` with pictures.

    `names`: Cohere's `rank_fields`, those of the document's fields that are to be read, in that order.
    """
    if not isinstance(given, dict) or "content" in given:
        return given
    if isinstance(names, list):
        lines = [f"{name}: {given[name]}" for name in names if isinstance(name, str) and name in given]
        return "\n".join(lines) or given
    text, image = given.get("text"), given.get("image")
    if isinstance(image, str):
        words = [{"type": "text", "text": text}] if isinstance(text, str) else []
        return {"content": [{"type": "image_url", "image_url": {"url": _address(image)}}, *words]}
    return text if isinstance(text, str) else given


def _address(image: str) -> str:
    """Jina's clients send an address, or base64 alone."""
    return image if image.startswith(("http://", "https://", "data:")) else f"data:image/png;base64,{image}"


def prompts_of(folder: Path) -> frozenset[str]:
    """The names of the prompts that an embedding model wants before its texts, as vLLM finds them."""
    places = (("config.json", "task_instructions"), ("config_sentence_transformers.json", "prompts"))
    for name, field in places:
        try:
            found = json.loads((folder / name).read_bytes())[field]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if isinstance(found, dict) and found:
            return frozenset(found)
    return frozenset()


def _with_input_type_of(prompts: Collection[str], body: bytes) -> bytes:
    """Cohere's clients always say an `input_type`; vLLM refuses one that the model has no prompt for."""
    document = bodies.document_in(body)
    given = document.pop("input_type", None)
    names = (given, *INPUT_TYPES.get(given, ())) if isinstance(given, str) else ()
    known = next((name for name in names if name in prompts), None)
    return bodies.dumped({**document, "input_type": known} if known else document)


def is_deepseek_ocr(model: Model) -> bool:
    processors = str(model.engine_args.get("logits-processors", ""))
    words = f"{model.name} {model.path} {model.repo or ''}".lower()
    return model.type == "ocr" and ("deepseek_ocr" in processors or "deepseek-ocr" in words)


def with_defaults(body: bytes) -> bytes:
    """DeepSeek-OCR's parameters, where the client gave none."""
    said = _said(bodies.document_in(body))
    given = said.get("vllm_xargs", {})
    xargs = {**DEEPSEEK_OCR_XARGS, **given} if isinstance(given, dict) else given
    return bodies.dumped({**DEEPSEEK_OCR, **said, "vllm_xargs": xargs})


def _said(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if value is not None}
