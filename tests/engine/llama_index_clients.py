"""LlamaIndex's clients against a router; what they got, as JSON. In a virtual environment of its own: LlamaIndex and
vLLM want different versions of transformers.

    python llama_index_clients.py http://127.0.0.1:8000 KEY
"""

import json
import sys
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

TEXTS = ["Bananas are yellow.", "Berlin is a large city.", "Paris is the capital of France."]
QUESTION = "What is the capital of France?"


def main(url: str, key: str) -> None:
    chat = OpenAILike(
        model="demo-chat", api_base=f"{url}/v1", api_key=key, is_chat_model=True, max_tokens=5, context_window=2048
    )
    embedding = OpenAILikeEmbedding(model_name="demo-embedding", api_base=f"{url}/v1", api_key=key)
    messages = [ChatMessage(role="user", content="Hello")]
    found = {
        "chat": chat.chat(messages, extra_body={"ignore_eos": True}).raw.usage.completion_tokens,
        "stream": len(list(chat.stream_chat(messages, extra_body={"ignore_eos": True}))),
        "one": embedding.get_query_embedding(QUESTION),
        "batch": embedding.get_text_embedding_batch(TEXTS),
        "jina": ranked(JinaRerank(top_n=2, model="demo-rerank", base_url=f"{url}/v1", api_key=key)),
        "cohere": ranked(CohereRerank(top_n=2, model="demo-rerank", base_url=url, api_key=key)),
        "tei": ranked(TextEmbeddingInference(top_n=2, base_url=url, auth_token=f"Bearer {key}")),
    }
    print(json.dumps(found))


def ranked(reranker: Any) -> list[tuple[str, float]]:
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    return [(each.text, each.score) for each in reranker.postprocess_nodes(nodes, query_str=QUESTION)]


if __name__ == "__main__":
    main(*sys.argv[1:])
