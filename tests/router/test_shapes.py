"""What clients send, what the engine gets, and what they get back."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import API_KEY
from tests.router.conftest import Deployment
from vllm_unified.router.problems import RequestError
from vllm_unified.router.routes import BY_PATH, ROUTES
from vllm_unified.router.shapes import RERANK, adapted, is_deepseek_ocr, prompts_of
from vllm_unified.settings import Model

RANKING = {
    "id": "score-1",
    "model": "m",
    "usage": {"prompt_tokens": 9, "total_tokens": 9},
    "results": [
        {"index": 1, "document": {"text": "b", "multi_modal": None}, "relevance_score": 0.9},
        {"index": 0, "document": {"text": "a", "multi_modal": None}, "relevance_score": -0.1},
    ],
}
PICTURE = {"type": "image_url", "image_url": {"url": "https://x.example/1.png"}}
XARGS = {"ngram_size": 30, "window_size": 90, "whitelist_token_ids": [128821, 128822]}


def sent(path: str, body: Any, **of_model: Any) -> Any:
    return json.loads(adapted(BY_PATH[path.encode()], json.dumps(body).encode(), **of_model)[0])


def answered(body: Any, answer: bytes, path: str = "/rerank") -> bytes:
    """What the client gets for `answer`, which comes in two pieces."""
    told = adapted(BY_PATH[path.encode()], json.dumps(body).encode())[1]
    if told is None:
        return answer
    told.take(answer[:7])
    told.take(answer[7:])
    return told.body()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Jina: strings or objects, also among one another
        ({"query": "q", "documents": [{"text": "a"}, {"text": "b"}]}, {"query": "q", "documents": ["a", "b"]}),
        ({"query": "q", "documents": ["{", {"text": "b"}]}, {"query": "q", "documents": ["{", "b"]}),
        ({"query": {"text": "q"}, "documents": ["a"]}, {"query": "q", "documents": ["a"]}),
        (
            {"query": "q", "documents": [{"image": "https://x.example/1.png"}]},
            {"query": "q", "documents": [{"content": [PICTURE]}]},
        ),
        (
            {"query": "q", "documents": [{"image": "aGk=", "text": "a"}]},
            {
                "query": "q",
                "documents": [
                    {
                        "content": [
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
                            {"type": "text", "text": "a"},
                        ]
                    }
                ],
            },
        ),
        # vLLM's own
        (
            {"query": "q", "documents": [{"content": [PICTURE]}], "top_n": 2},
            {"query": "q", "documents": [{"content": [PICTURE]}], "top_n": 2},
        ),
        # null is "not said", which vLLM takes for a wrong number
        (
            {"query": "q", "documents": ["a"], "top_n": None, "model": "m"},
            {"query": "q", "documents": ["a"], "model": "m"},
        ),
        ({"query": "q", "documents": ["a"], "texts": None}, {"query": "q", "documents": ["a"]}),
        # Cohere's first API
        (
            {"query": "q", "documents": [{"title": "t", "n": 5, "text": "x"}], "rank_fields": ["n", "title", "no"]},
            {"query": "q", "documents": ["n: 5\ntitle: t"]},
        ),
        (
            {"query": "q", "documents": [{"title": "t"}], "rank_fields": ["x"]},
            {"query": "q", "documents": [{"title": "t"}]},
        ),
        # what is wrong stays so, for the engine to refuse
        ({"query": "q", "documents": [{"text": 5}]}, {"query": "q", "documents": [{"text": 5}]}),
        ({"query": 5, "documents": {"text": "a"}}, {"query": 5, "documents": {"text": "a"}}),
        ({"documents": [{}]}, {"documents": [{}]}),
        # TEI
        ({"query": "q", "texts": ["a", "b"]}, {"query": "q", "documents": ["a", "b"]}),
        ({"query": "q", "texts": ["a"], "documents": None}, {"query": "q", "documents": ["a"]}),
        (
            {"query": "q", "texts": ["a"], "raw_scores": True},
            {"query": "q", "documents": ["a"], "use_activation": False},
        ),
        (
            {"query": "q", "texts": ["a"], "raw_scores": False, "return_text": False, "truncate": False},
            {"query": "q", "documents": ["a"]},
        ),
        (
            {"query": "q", "texts": ["a"], "truncate": True, "truncation_direction": "Left"},
            {"query": "q", "documents": ["a"], "truncate_prompt_tokens": -1, "truncation_side": "left"},
        ),
        (
            {"query": "q", "texts": ["a"], "truncate": True},
            {"query": "q", "documents": ["a"], "truncate_prompt_tokens": -1, "truncation_side": "right"},
        ),
    ],
)
@pytest.mark.parametrize("path", sorted(RERANK))
def test_a_ranking_is_asked_for_in_the_engines_words(path: str, given: Any, expected: Any) -> None:
    assert sent(path, given) == expected


def test_what_needs_no_change_goes_on_byte_for_byte() -> None:
    body = b'{ "query":"q" ,"documents" : ["a","\\u4e2d"], "top_n":1}'
    assert adapted(BY_PATH[b"/v1/rerank"], body) == (body, None)
    assert adapted(BY_PATH[b"/v1/score"], b'{"texts": []}') == (b'{"texts": []}', None)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"query": "q", "texts": ["a", "b"]}, [{"index": 1, "score": 0.9}, {"index": 0, "score": -0.1}]),
        (
            {"query": "q", "texts": ["中", "b"], "return_text": True},
            [{"index": 1, "score": 0.9, "text": "b"}, {"index": 0, "score": -0.1, "text": "中"}],
        ),
        (
            {"query": "q", "documents": ["a", "b"], "return_documents": False},
            {
                **RANKING,
                "results": [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": -0.1}],
            },
        ),
        ({"query": "q", "documents": ["a", "b"], "return_documents": True}, RANKING),
        ({"query": "q", "documents": ["a", "b"]}, RANKING),
    ],
)
def test_a_ranking_is_told_in_the_clients_words(asked: Any, expected: Any) -> None:
    assert json.loads(answered(asked, json.dumps(RANKING).encode())) == expected


@pytest.mark.parametrize("texts", [5, "a", {"a": 1}, [5], ["a", None], [["a"]]])
def test_texts_that_are_none(texts: Any) -> None:
    with pytest.raises(RequestError) as caught:
        sent("/rerank", {"query": "q", "texts": texts})
    assert (caught.value.status, caught.value.param) == (400, "texts")


MALFORMED = [
    b'{"query": "q", "texts": 5}',
    b'{"query": "q", "texts": ["a"], "top_n": ' + b"1" * 5000 + b"}",
    b'{"query": "q", "documents": [{"text": "a"}], "x": ' + b"1" * 5000 + b"}",
    b'{"query": "q", "texts": ["\\ud800"]}',
    b'{"query": "q", "documents": [{"text": "\\ud800"}]}',
    b'{"query": "q", "texts": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
    b'{"query": "q", "documents": [{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
    b'{"query": "q", "texts": ["a"], "top_n": NaN}',
    b'{"query": "q", "texts": ["\xff"]}',
    b'["texts"]',
    b"",
]


def test_malformed_bodies_are_the_clients_fault(deployment: Deployment) -> None:
    deployment.start({"rerank": {"type": "rerank"}, "embedding": {"type": "embedding"}})
    with deployment.client() as client:
        for path in (*sorted(RERANK), "/v2/embed"):
            for body in MALFORMED[0 if path in RERANK else 3 :]:
                answer = client.post(path, content=body)
                assert answer.status_code == 400, (path, body[:60], answer.text)
                assert answer.headers["x-error-source"] == "router"
        assert deployment.seen("rerank")["requests"] == deployment.seen("embedding")["requests"] == []
        # An engine that answers something else than a ranking.
        answer = client.post("/rerank", json={"query": "q", "texts": ["a"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_error")


def test_every_path_names_a_model_in_its_body_or_does_without(deployment: Deployment) -> None:
    """Each forwarded path reaches the only model of its first kind."""
    deployment.start({kind: {"type": kind} for kind in ("chat", "embedding", "rerank", "ocr")})
    with deployment.client() as client:
        for route in ROUTES:
            if not route.multipart:
                answer = client.post(route.path, json={"documents": ["a"]})
                assert (answer.json()["path"], answer.json()["model"]) == (route.path, route.kinds[0])


@pytest.mark.parametrize(
    ("prompts", "given", "expected"),
    [
        ([], "search_query", None),
        (["query", "document"], "search_query", "query"),
        (["query", "document"], "search_document", "document"),
        (["query", "passage"], "search_document", "passage"),
        (["search_query", "query"], "search_query", "search_query"),
        (["query"], "clustering", None),
        (["clustering"], "clustering", "clustering"),
        (["query"], 5, None),
        (None, "search_query", "search_query"),
    ],
)
def test_the_kind_of_text_that_coheres_clients_say(prompts: list[str] | None, given: Any, expected: str | None) -> None:
    body = {"texts": ["a"], "input_type": given}
    assert sent("/v2/embed", body, prompts=prompts).get("input_type") == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"config_sentence_transformers.json": '{"prompts": {"query": "q: ", "document": ""}}'}, {"query", "document"}),
        ({"config_sentence_transformers.json": '{"prompts": {}}'}, set()),
        ({"config.json": '{"task_instructions": {"a": "b"}}'}, {"a"}),
        ({"config.json": "[]", "config_sentence_transformers.json": "not JSON"}, set()),
    ],
)
def test_the_prompts_of_a_model(tmp_path: Path, files: dict[str, str], expected: set[str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert prompts_of(tmp_path) == expected


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"temperature": 0.0, "skip_special_tokens": False, "vllm_xargs": XARGS}),
        ({"temperature": None}, {"temperature": 0.0, "skip_special_tokens": False, "vllm_xargs": XARGS}),
        (
            {"temperature": 0.5, "skip_special_tokens": True, "vllm_xargs": {"window_size": 40}},
            {"temperature": 0.5, "skip_special_tokens": True, "vllm_xargs": {**XARGS, "window_size": 40}},
        ),
        ({"vllm_xargs": "no object"}, {"temperature": 0.0, "skip_special_tokens": False, "vllm_xargs": "no object"}),
    ],
)
def test_what_deepseek_ocr_needs(path: str, given: Any, expected: Any) -> None:
    assert sent(path, given, deepseek_ocr=True) == expected
    assert sent(path, given) == given


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"type": "ocr", "name": "DeepSeek-OCR"}, True),
        ({"type": "ocr", "name": "ocr", "repo": "deepseek-ai/DeepSeek-OCR-2"}, True),
        (
            {
                "type": "ocr",
                "name": "ocr",
                "engine_args": {
                    "logits-processors": "vllm.model_executor.models.deepseek_ocr:NGramPerReqLogitsProcessor"
                },
            },
            True,
        ),
        ({"type": "ocr", "name": "OCRFlux-3B"}, False),
        ({"type": "chat", "name": "DeepSeek-OCR"}, False),
    ],
)
def test_which_model_is_deepseek_ocr(fields: Any, expected: bool) -> None:
    assert is_deepseek_ocr(Model(key="m", number=0, **fields)) is expected


def test_cohere_embeddings_are_booked(deployment: Deployment) -> None:
    """They tell their tokens under another name."""
    answer = {"id": "embd-1", "embeddings": {}, "meta": {"billed_units": {"input_tokens": 7}}}
    deployment.start({"embedding": {"type": "embedding", "fake": {"answer": answer}}})
    with deployment.client() as client:
        assert client.post("/v2/embed", json={"texts": ["a"]}).json() == answer
        booked = client.get("/usage").json()["data"]
    assert [(each["model"], each["prompt_tokens"]) for each in booked] == [("embedding", 7)]


def test_tokens_that_were_in_a_cache_are_booked_too(deployment: Deployment) -> None:
    """Anthropic's `input_tokens` are the others alone."""
    usage = {"input_tokens": 3, "cache_read_input_tokens": 16, "output_tokens": 4}
    deployment.start({"chat": {"type": "chat", "fake": {"answer": {"type": "message", "usage": usage}}}})
    with httpx.Client(base_url=deployment.url, headers={"x-api-key": API_KEY}) as client:
        client.post("/v1/messages", json={"messages": []})
        booked = client.get("/usage").json()["data"]
    assert [(each["prompt_tokens"], each["completion_tokens"]) for each in booked] == [(19, 4)]
