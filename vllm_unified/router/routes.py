"""The paths that are forwarded to engines, as data."""

from dataclasses import dataclass

from vllm_unified.settings import Kind


@dataclass(frozen=True)
class Route:
    """`kinds`: the models that can answer; a request without `model` goes to the only one of the first kind."""

    path: str
    kinds: tuple[Kind, ...]


ROUTES = (
    Route("/v1/chat/completions", ("chat", "ocr")),
    Route("/v1/completions", ("chat", "ocr")),
    Route("/v1/embeddings", ("embedding",)),
    Route("/v1/rerank", ("rerank", "embedding")),
    Route("/v1/score", ("rerank", "embedding")),
)
