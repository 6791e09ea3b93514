"""The paths that are forwarded, as data."""

from dataclasses import dataclass
from typing import Literal

from vllm_unified.settings import Kind

GENERATING: tuple[Kind, ...] = ("chat", "ocr")
POOLING: tuple[Kind, ...] = ("embedding", "rerank")
SCORING: tuple[Kind, ...] = ("rerank", "embedding")
ALL: tuple[Kind, ...] = ("chat", "ocr", "embedding", "rerank")


@dataclass(frozen=True)
class Route:
    """`kinds`: the models that can answer; a request without `model` goes to the only one of the first kind.

    `usage_on_request`: its streams tell their tokens only when asked with `stream_options`. `errors`: the shape
    of an error event in its streams.
    """

    path: str
    kinds: tuple[Kind, ...]
    summary: str
    multipart: bool = False
    usage_on_request: bool = False
    errors: Literal["openai", "anthropic", "responses"] = "openai"


ROUTES = (
    Route("/v1/chat/completions", GENERATING, "Chat, also with images", usage_on_request=True),
    Route("/v1/completions", GENERATING, "Completion of a text", usage_on_request=True),
    Route("/v1/responses", GENERATING, "OpenAI's Responses", errors="responses"),
    Route("/v1/messages", GENERATING, "Anthropic's Messages", errors="anthropic"),
    Route("/v1/messages/count_tokens", GENERATING, "Anthropic's count of a message's tokens", errors="anthropic"),
    Route("/v1/embeddings", ("embedding",), "Embeddings of texts"),
    Route("/v2/embed", ("embedding",), "Embeddings of texts, as Cohere has it"),
    Route("/pooling", POOLING, "A pooling model's raw output"),
    Route("/classify", SCORING, "Classification of texts"),
    Route("/score", SCORING, "Scores of pairs of texts"),
    Route("/v1/score", SCORING, "Scores of pairs of texts"),
    Route("/rerank", SCORING, "Documents in the order of their relevance; also with `texts`, as TEI has it"),
    Route("/v1/rerank", SCORING, "Documents in the order of their relevance, as Jina has it"),
    Route("/v2/rerank", SCORING, "Documents in the order of their relevance, as Cohere has it"),
    Route("/tokenize", ALL, "A text's tokens"),
    Route("/detokenize", ALL, "The text of tokens"),
    Route("/v1/audio/transcriptions", ("chat",), "Speech as text", multipart=True),
    Route("/v1/audio/translations", ("chat",), "Speech as English text", multipart=True),
)
BY_PATH = {route.path.encode("ascii"): route for route in ROUTES}
