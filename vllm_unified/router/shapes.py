"""Clients' shapes of one request, made into the engine's; and what a model needs that clients do not know of."""

import json
from typing import Any

import msgspec

from vllm_unified.router import body as bodies
from vllm_unified.router.problems import RequestError
from vllm_unified.router.routes import Route
from vllm_unified.settings import Model

RERANK = frozenset({"/rerank", "/v1/rerank", "/v2/rerank"})
# https://github.com/deepseek-ai/DeepSeek-OCR: without them it repeats itself; 128821 and 128822 are <td> and </td>.
DEEPSEEK_OCR: dict[str, Any] = {"temperature": 0.0, "skip_special_tokens": False}
DEEPSEEK_OCR_XARGS = {"ngram_size": 30, "window_size": 90, "whitelist_token_ids": [128821, 128822]}


class Answer:
    """An answer that is kept until it is whole, and then told in the client's shape."""

    def __init__(self) -> None:
        self.head: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []

    def take(self, data: bytes) -> None:
        self._parts.append(data)

    def body(self) -> bytes:
        document = json.loads(b"".join(self._parts))
        return json.dumps(self.told(document), ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )

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
    """Jina and Cohere: the texts come back only when they are asked for."""

    def told(self, document: Any) -> Any:
        for each in document["results"]:
            each.pop("document", None)
        return document


class _RerankFields(msgspec.Struct):
    texts: Any = msgspec.UNSET
    documents: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    return_documents: Any = None


_rerank_fields = msgspec.json.Decoder(_RerankFields)


def adapted(route: Route, body: bytes, *, deepseek_ocr: bool) -> tuple[bytes, Answer | None]:
    """The body for the engine, and what its answer has to become; None for as it is. Raises RequestError 400."""
    if route.path in RERANK:
        return _rerank(body)
    if deepseek_ocr and route.path == "/v1/chat/completions":
        return with_defaults(body), None
    return body, None


def _rerank(body: bytes) -> tuple[bytes, Answer | None]:
    fields = _rerank_fields.decode(body)
    if fields.texts is not msgspec.UNSET and fields.documents is msgspec.UNSET:
        return _from_tei(bodies.document_in(body))
    answer = _WithoutDocuments() if fields.return_documents is False else None
    documents = fields.documents
    if isinstance(documents, msgspec.Raw) and bytes(documents)[:200].lstrip(b"[ \t\r\n").startswith(b"{"):
        given = bodies.json_of(bytes(documents))
        if isinstance(given, list) and all(isinstance(each, dict) and _is_text(each) for each in given):
            body = bodies.with_fields(body, {"documents": [each["text"] for each in given]})
    return body, answer


def _is_text(document: dict[str, Any]) -> bool:
    """`{"text": …}`, as Jina and Cohere take it; pictures are left to the engine."""
    return isinstance(document.get("text"), str) and "image" not in document


def _from_tei(document: dict[str, Any]) -> tuple[bytes, Answer]:
    texts = document.pop("texts")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(400, "texts must be a list of strings", code="invalid_type", param="texts")
    raw_scores, truncate = document.pop("raw_scores", False), document.pop("truncate", False)
    document.pop("truncation_direction", None)
    answer = _TeiRanks(texts if document.pop("return_text", False) is True else None)
    document["documents"] = texts
    if raw_scores is True:
        document["use_activation"] = False
    if truncate is True:
        document["truncate_prompt_tokens"] = -1
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass"), answer


def is_deepseek_ocr(model: Model) -> bool:
    processors = str(model.engine_args.get("logits-processors", ""))
    words = f"{model.name} {model.path} {model.repo or ''}".lower()
    return model.type == "ocr" and ("deepseek_ocr" in processors or "deepseek-ocr" in words)


def with_defaults(body: bytes) -> bytes:
    """DeepSeek-OCR's parameters, where the client gave none."""
    document = bodies.document_in(body)
    given = document.get("vllm_xargs")
    xargs = {**DEEPSEEK_OCR_XARGS, **(given if isinstance(given, dict) else {})}
    said = {name: value for name, value in document.items() if value is not None}
    filled = {**DEEPSEEK_OCR, **said, "vllm_xargs": xargs}
    return json.dumps(filled, ensure_ascii=False).encode("utf-8", "surrogatepass")
