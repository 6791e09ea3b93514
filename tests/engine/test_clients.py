"""The clients that people use, as they are, through the router to the real vLLM."""

import base64
import contextlib
import importlib.util
import json
import math
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import cohere
import httpx
import openai
import pytest

from tests.conftest import API_KEY, CHECKOUT, eventually
from tests.engine.conftest import Demo
from tests.engine.test_demo import BANANAS, BERLIN, PARIS, QUESTION, cosine, messages, picture
from vllm_unified.router.routes import ROUTES

TEXTS = [BANANAS, BERLIN, PARIS]
HEADERS = {"authorization": f"Bearer {API_KEY}"}
# Both values have an end, so that a model that does not know what it is asked for comes to it.
SCHEMA = {
    "type": "object",
    "properties": {"ready": {"type": "boolean"}, "colour": {"enum": ["red", "blue"]}},
    "required": ["ready", "colour"],
    "additionalProperties": False,
}
# No model of the demonstration knows tools, and greedily it would write spaces for ever, as their grammar allows.
SAMPLED: Any = {"temperature": 1, "seed": 1}
TOOL: Any = {
    "type": "function",
    "function": {"name": "paint", "description": "Paint it.", "parameters": SCHEMA, "strict": True},
}
HELLO: Any = {"model": "demo-chat", "messages": messages("Hello 你好")}
LONG: Any = {"extra_body": {"ignore_eos": True}}


def base(demo: Demo) -> str:
    return demo.url("router").removesuffix("/v1")


@pytest.fixture
def client(demo: Demo) -> Iterator[openai.OpenAI]:
    with demo.client("router") as client:
        yield client


@pytest.fixture
def plain(demo: Demo) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base(demo), headers=HEADERS, timeout=60) as client:
        yield client


@pytest.fixture
def claude(demo: Demo) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=base(demo), api_key=API_KEY, max_retries=0) as client:
        yield client


@contextlib.contextmanager
def booked(demo: Demo, key: str) -> Iterator[list[tuple[int, int]]]:
    """The body puts the prompt and completion tokens of its answers into the list; usage must grow by their sums."""

    def counts() -> tuple[int, int]:
        rows = httpx.get(f"{base(demo)}/usage", headers=HEADERS).json()["data"]
        own = [row for row in rows if row["model"] == key]
        return sum(row["prompt_tokens"] for row in own), sum(row["completion_tokens"] for row in own)

    said: list[tuple[int, int]] = []
    before = counts()
    yield said
    assert said
    expected = [begin + sum(each) for begin, each in zip(before, zip(*said, strict=True), strict=True)]
    assert min(sum(each) for each in said) > 0
    eventually(lambda: list(counts()) == expected, 3)


def is_of_schema(text: str) -> bool:
    document = json.loads(text)
    return set(document) == {"ready", "colour"} and document["colour"] in ("red", "blue")


class TestOpenAI:
    def test_chat_and_its_tokens(self, demo: Demo, client: openai.OpenAI) -> None:
        with booked(demo, "chat") as tokens:
            answer = client.chat.completions.create(**HELLO, max_tokens=5, **LONG)
            assert answer.usage
            assert answer.usage.completion_tokens == 5
            tokens.append((answer.usage.prompt_tokens, answer.usage.completion_tokens))

    def test_a_stream_shows_its_tokens_to_who_asks(self, demo: Demo, client: openai.OpenAI) -> None:
        with booked(demo, "chat") as tokens:
            asked = list(
                client.chat.completions.create(
                    **HELLO, max_tokens=7, stream=True, stream_options={"include_usage": True}, **LONG
                )
            )
            usage = asked[-1].usage
            assert usage
            assert (asked[-1].choices, usage.completion_tokens) == ([], 7)
            tokens.append((usage.prompt_tokens, usage.completion_tokens))
            ways: Any = ({}, {"stream_options": {"include_usage": False}})
            for options in ways:
                silent = list(client.chat.completions.create(**HELLO, max_tokens=7, stream=True, **options, **LONG))
                assert all(each.usage is None and each.choices for each in silent)
                assert silent[-1].choices[0].finish_reason == "length"
                tokens.append((usage.prompt_tokens, 7))
            body = {**HELLO, "max_tokens": 7, "stream": True, "ignore_eos": True}
            body["stream_options"] = {"continuous_usage_stats": True}
            assert "usage" not in httpx.post(f"{demo.url('router')}/chat/completions", json=body, headers=HEADERS).text
            tokens.append((usage.prompt_tokens, 7))

    def test_several_answers_and_their_likelihoods(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            **HELLO, max_tokens=3, n=2, temperature=1, logprobs=True, top_logprobs=2, **LONG
        )
        assert [each.index for each in answer.choices] == [0, 1]
        for choice in answer.choices:
            assert choice.logprobs
            assert choice.logprobs.content
            assert [len(each.top_logprobs) for each in choice.logprobs.content] == [2, 2, 2]
        assert answer.usage
        assert answer.usage.completion_tokens == 6

    def test_an_answer_of_a_schema(self, client: openai.OpenAI) -> None:
        shape: Any = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True}}
        answer = client.chat.completions.create(**HELLO, max_tokens=600, response_format=shape, seed=1)
        assert is_of_schema(answer.choices[0].message.content or "")

    def test_tools(self, client: openai.OpenAI) -> None:
        named: Any = {"type": "function", "function": {"name": "paint"}}
        for choice in (named, "required"):
            answer = client.chat.completions.create(
                **HELLO, max_tokens=600, tools=[TOOL], tool_choice=choice, **SAMPLED
            )
            calls: Any = answer.choices[0].message.tool_calls
            assert calls
            assert calls[0].function.name == "paint"
            assert is_of_schema(calls[0].function.arguments)
        pieces = client.chat.completions.create(
            **HELLO, max_tokens=600, tools=[TOOL], tool_choice=named, stream=True, **SAMPLED
        )
        arguments = [
            call.function.arguments or ""
            for piece in pieces
            for call in piece.choices[0].delta.tool_calls or []
            if call.function
        ]
        assert len(arguments) > 1
        assert is_of_schema("".join(arguments))
        assert client.chat.completions.create(**HELLO, max_tokens=2, tools=[TOOL]).usage

    def test_completions(self, demo: Demo, client: openai.OpenAI) -> None:
        with booked(demo, "chat") as tokens:
            answer = client.completions.create(model="demo-chat", prompt=["One", "Two"], max_tokens=3, **LONG)
            assert [each.index for each in answer.choices] == [0, 1]
            assert answer.usage
            tokens.append((answer.usage.prompt_tokens, answer.usage.completion_tokens))
            pieces = list(client.completions.create(model="demo-chat", prompt="One", max_tokens=4, stream=True, **LONG))
            assert all(each.choices and each.usage is None for each in pieces)
            counted = client.completions.create(model="demo-chat", prompt="One", max_tokens=4, **LONG).usage
            assert counted
            tokens += [(counted.prompt_tokens, 4)] * 2

    def test_embeddings(self, demo: Demo, client: openai.OpenAI) -> None:
        with booked(demo, "embedding") as tokens:
            floats = client.embeddings.create(model="demo-embedding", input=TEXTS, encoding_format="float")
            default = client.embeddings.create(model="demo-embedding", input=TEXTS)  # the client asks for base64
            for answer in (floats, default):
                assert [each.index for each in answer.data] == [0, 1, 2]
                tokens.append((answer.usage.prompt_tokens, 0))
            for one, other in zip(floats.data, default.data, strict=True):
                assert cosine(one.embedding, other.embedding) > 0.99999
            body = {"model": "demo-embedding", "input": PARIS, "encoding_format": "base64"}
            raw = httpx.post(f"{demo.url('router')}/embeddings", json=body, headers=HEADERS).json()
            tokens.append((raw["usage"]["prompt_tokens"], 0))
        packed = base64.b64decode(raw["data"][0]["embedding"])
        assert cosine(list(struct.unpack("<384f", packed)), floats.data[2].embedding) > 0.99999

    def test_responses(self, demo: Demo, client: openai.OpenAI) -> None:
        with booked(demo, "chat") as tokens:
            asked: Any = {
                "model": "demo-chat",
                "input": "Hello",
                "max_output_tokens": 6,
                "extra_body": {"ignore_eos": True},
            }
            answer = client.responses.create(**asked)
            assert answer.usage
            assert answer.usage.output_tokens == 6
            tokens.append((answer.usage.input_tokens, answer.usage.output_tokens))
            events = list(client.responses.create(**asked, stream=True))
            assert events[0].type == "response.created"
            last = events[-1]
            assert last.type in ("response.completed", "response.incomplete")
            assert last.response.usage
            assert last.response.usage.output_tokens == 6
            tokens.append((last.response.usage.input_tokens, last.response.usage.output_tokens))

    def test_an_image_to_the_ocr_model(self, demo: Demo, client: openai.OpenAI) -> None:
        content = [{"type": "image_url", "image_url": {"url": picture()}}, {"type": "text", "text": "Read this."}]
        with booked(demo, "ocr") as tokens:
            answer = client.chat.completions.create(model="demo-ocr", messages=messages(content), max_tokens=4, **LONG)
            assert answer.usage
            assert answer.usage.prompt_tokens > 1024
            tokens.append((answer.usage.prompt_tokens, answer.usage.completion_tokens))

    def test_models(self, client: openai.OpenAI) -> None:
        assert {each.id for each in client.models.list()} == {"demo-chat", "demo-embedding", "demo-rerank", "demo-ocr"}
        assert client.models.retrieve("demo-ocr").id == "demo-ocr"

    def test_errors_are_of_the_clients_classes(self, demo: Demo, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="served here: demo-chat"):
            client.chat.completions.create(model="none", messages=messages("x"))
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("none")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(**HELLO, temperature=-1)
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.chat.completions.create(model="demo-chat", messages=messages("word " * 5000))
        with pytest.raises(openai.BadRequestError, match="is a model for chat"):
            client.embeddings.create(model="demo-chat", input="x")
        with pytest.raises(openai.BadRequestError, match="Matryoshka"):
            client.embeddings.create(model="demo-embedding", input="x", dimensions=8)
        with openai.OpenAI(base_url=demo.url("router"), api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                stranger.chat.completions.create(**HELLO)
            with pytest.raises(openai.AuthenticationError):
                stranger.models.list()


class TestAnthropic:
    def test_messages_and_their_tokens(self, demo: Demo, claude: anthropic.Anthropic) -> None:
        asked: Any = {**HELLO, "max_tokens": 6}
        with booked(demo, "chat") as tokens:
            answer = claude.messages.create(**asked, extra_body={"ignore_eos": True})
            assert (answer.type, answer.role, answer.model) == ("message", "assistant", "demo-chat")
            tokens.append((answer.usage.input_tokens, answer.usage.output_tokens))
            with claude.messages.stream(**asked) as stream:
                events = [event.type for event in stream]
                whole = stream.get_final_message()
            assert events[0] == "message_start"
            assert events[-1] == "message_stop"
            tokens.append((whole.usage.input_tokens, whole.usage.output_tokens))
        counted = claude.messages.count_tokens(**HELLO)
        assert counted.input_tokens == answer.usage.input_tokens == whole.usage.input_tokens

    def test_tools(self, claude: anthropic.Anthropic) -> None:
        tool: Any = {"name": "paint", "input_schema": SCHEMA, "strict": True}
        answer = claude.messages.create(
            **HELLO,
            max_tokens=600,
            tools=[tool],
            tool_choice={"type": "tool", "name": "paint"},
            extra_body=SAMPLED,
        )
        (use,) = (each for each in answer.content if each.type == "tool_use")
        assert use.name == "paint"

    def test_errors_are_of_the_clients_classes(self, demo: Demo, claude: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError) as caught:
            claude.messages.create(model="none", max_tokens=1, messages=messages("x"))
        body: Any = caught.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
        with pytest.raises(anthropic.BadRequestError):
            claude.messages.create(model="demo-chat", max_tokens=1, messages=messages("word " * 5000))
        with anthropic.Anthropic(base_url=base(demo), api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(anthropic.AuthenticationError):
                stranger.messages.create(**HELLO, max_tokens=1)
            with pytest.raises(anthropic.AuthenticationError):
                stranger.messages.count_tokens(**HELLO)


class TestCohere:
    def test_second_client(self, demo: Demo) -> None:
        with cohere.ClientV2(api_key=API_KEY, base_url=base(demo)) as client:
            self._second(client)
        stranger = cohere.ClientV2(api_key="wrong", base_url=base(demo))
        with stranger, pytest.raises(cohere.UnauthorizedError):
            stranger.rerank(model="demo-rerank", query=QUESTION, documents=TEXTS)

    def _second(self, client: cohere.ClientV2) -> None:
        answer = client.rerank(model="demo-rerank", query=QUESTION, documents=TEXTS, top_n=2, max_tokens_per_doc=100)
        assert [each.index for each in answer.results] == [2, 1]
        assert answer.results[0].relevance_score > 0.7
        embedded = client.embed(
            model="demo-embedding", texts=[QUESTION, *TEXTS], input_type="search_document", embedding_types=["float"]
        )
        question, bananas, _, paris = embedded.embeddings.float_ or []
        assert cosine(question, paris) > 0.7 > cosine(question, bananas)
        with pytest.raises(cohere.NotFoundError):
            client.rerank(model="none", query=QUESTION, documents=TEXTS)

    def test_first_client(self, demo: Demo) -> None:
        with cohere.Client(api_key=API_KEY, base_url=base(demo)) as client:
            self._first(client)

    def _first(self, client: cohere.Client) -> None:
        asked: Any = {"model": "demo-rerank", "query": QUESTION}
        answer = client.rerank(**asked, documents=[{"text": text} for text in TEXTS], return_documents=True)
        assert [each.index for each in answer.results] == [2, 1, 0]
        assert [each.document.text for each in answer.results if each.document] == TEXTS[::-1]
        bare = client.rerank(**asked, documents=TEXTS, return_documents=False)
        assert [(each.index, each.document) for each in bare.results] == [(2, None), (1, None), (0, None)]
        fields = [{"title": text, "body": "of no matter"} for text in TEXTS]
        assert client.rerank(**asked, documents=fields, rank_fields=["title"], top_n=1).results[0].index == 2


class TestLangChain:
    def test_chat(self, demo: Demo) -> None:
        from langchain_openai import ChatOpenAI

        chat = ChatOpenAI(model="demo-chat", base_url=demo.url("router"), api_key=API_KEY, max_tokens=600, seed=1)  # type: ignore[call-arg, arg-type]
        with contextlib.closing(chat.root_client):
            self._chat(chat)

    def _chat(self, chat: Any) -> None:
        answer = chat.invoke("Hello", max_tokens=5, extra_body={"ignore_eos": True})
        assert answer.usage_metadata
        assert answer.usage_metadata["output_tokens"] == 5
        pieces = list(chat.stream("Hello", max_tokens=5, extra_body={"ignore_eos": True}, stream_usage=True))
        counted = [each.usage_metadata["output_tokens"] for each in pieces if each.usage_metadata]
        assert counted == [5]
        (call,) = chat.bind_tools([TOOL], tool_choice="paint", strict=True).invoke("Hello").tool_calls
        assert (call["name"], set(call["args"])) == ("paint", {"ready", "colour"})

    @pytest.mark.parametrize(
        "options",
        [
            {"check_embedding_ctx_length": False},
            # The model's own tokenizer; the default one is OpenAI's, from the internet.
            {
                "check_embedding_ctx_length": True,
                "tiktoken_enabled": False,
                "tiktoken_model_name": str(CHECKOUT / "models" / "demo" / "minilm"),
            },
        ],
    )
    def test_embeddings(self, demo: Demo, options: dict[str, Any]) -> None:
        from langchain_openai import OpenAIEmbeddings

        embeddings = OpenAIEmbeddings(
            model="demo-embedding",
            base_url=demo.url("router"),
            api_key=API_KEY,  # type: ignore[arg-type]
            **options,
        )
        with contextlib.closing(embeddings.client._client):
            question = embeddings.embed_query(QUESTION)
            bananas, _, paris = embeddings.embed_documents(TEXTS)
        assert len(question) == 384
        assert cosine(question, paris) > 0.7 > cosine(question, bananas)


def test_llama_index(demo: Demo) -> None:
    python = CHECKOUT / ".venv" / "llama-index" / "bin" / "python"
    command = [
        str(python),
        "-W",
        "ignore",
        str(Path(__file__).with_name("llama_index_clients.py")),
        base(demo),
        API_KEY,
    ]
    environ = {**os.environ, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["chat"] == 5
    assert found["stream"] >= 2
    assert cosine(found["one"], found["batch"][2]) > 0.7 > cosine(found["one"], found["batch"][0])
    assert [text for text, _ in found["jina"]] == [PARIS, BERLIN]
    assert found["cohere"] == found["jina"] == found["tei"]


class TestRankings:
    def test_jina(self, demo: Demo, plain: httpx.Client) -> None:
        body = {"model": "demo-rerank", "query": QUESTION, "documents": [{"text": text} for text in TEXTS], "top_n": 2}
        with booked(demo, "rerank") as tokens:
            answer = plain.post("/v1/rerank", json=body).json()
            tokens.append((answer["usage"]["total_tokens"], 0))
        assert [(each["index"], each["document"]["text"]) for each in answer["results"]] == [(2, PARIS), (1, BERLIN)]
        bare = plain.post("/v1/rerank", json={**body, "return_documents": False, "top_n": None}).json()
        assert [set(each) for each in bare["results"]] == [{"index", "relevance_score"}] * 3

    def test_tei(self, demo: Demo, plain: httpx.Client) -> None:
        body = {"query": QUESTION, "texts": TEXTS, "raw_scores": False, "truncate": True, "return_text": True}
        with booked(demo, "rerank") as tokens:
            answer = plain.post("/rerank", json=body).json()
            own = plain.post("/rerank", json={"query": QUESTION, "documents": TEXTS}).json()
            tokens += [(own["usage"]["prompt_tokens"], 0)] * 2
        assert answer == [
            {"index": each["index"], "score": each["relevance_score"], "text": each["document"]["text"]}
            for each in own["results"]
        ]
        long = {"query": QUESTION, "texts": ["word " * 2000]}
        refused = plain.post("/rerank", json=long)
        assert (refused.status_code, refused.headers["x-error-source"]) == (400, "engine")
        for side in ("Left", "Right"):
            cut = plain.post("/rerank", json={**long, "truncate": True, "truncation_direction": side})
            assert [set(each) for each in cut.json()] == [{"index", "score"}]

    def test_scores(self, demo: Demo, plain: httpx.Client) -> None:
        with booked(demo, "rerank") as tokens:
            for path, names in (("/score", ("text_1", "text_2")), ("/v1/score", ("queries", "documents"))):
                answer = plain.post(path, json=dict(zip(names, (QUESTION, TEXTS), strict=True))).json()
                assert [each["index"] for each in answer["data"]] == [0, 1, 2]
                assert answer["data"][2]["score"] > 0.7
                tokens.append((answer["usage"]["prompt_tokens"], 0))

    def test_errors_of_the_engine_pass(self, demo: Demo, plain: httpx.Client) -> None:
        body = {"model": "demo-rerank", "query": QUESTION, "documents": []}
        direct = httpx.post(f"{demo.url('rerank')}/rerank", json=body, headers=HEADERS)
        through = plain.post("/v1/rerank", json=body)
        assert (through.status_code, through.content) == (400, direct.content)


class TestRest:
    @pytest.mark.parametrize("key", ["chat", "ocr", "embedding", "rerank"])
    def test_tokens(self, plain: httpx.Client, key: str) -> None:
        model = {"model": f"demo-{key}"}
        found = plain.post("/tokenize", json={**model, "prompt": "hello"}).json()
        assert found["count"] == len(found["tokens"])
        assert "hello" in plain.post("/detokenize", json={**model, "tokens": found["tokens"]}).json()["prompt"]

    def test_pooling_is_the_embedding(self, plain: httpx.Client) -> None:
        pooled = plain.post("/pooling", json={"input": PARIS}).json()["data"][0]["data"]
        (embedded,) = plain.post("/v2/embed", json={"texts": [PARIS]}).json()["embeddings"]["float"]
        assert cosine(pooled, embedded) > 0.99999
        assert math.isclose(math.hypot(*embedded), 1, abs_tol=0.01)

    def test_what_the_models_cannot(self, plain: httpx.Client) -> None:
        """Neither classifies nor hears; vLLM then has no such path."""
        classified = plain.post("/classify", json={"input": PARIS})
        heard = plain.post("/v1/audio/transcriptions", data={"model": "demo-chat"}, files={"file": ("a.wav", b"RIFF")})
        for answer in (classified, heard):
            assert (answer.status_code, answer.headers["x-error-source"]) == (404, "engine")

    def test_every_path_is_one_of_vllm(self) -> None:
        spec = importlib.util.find_spec("vllm")
        assert spec
        assert spec.origin
        sources = (Path(spec.origin).parent / "entrypoints").rglob("*.py")
        paths = {path for file in sources for path in re.findall(r'router\.post\(\s*"([^"]+)"', file.read_text())}
        assert {route.path for route in ROUTES} <= paths

    def test_one_request_id_twice_at_a_time(self, plain: httpx.Client) -> None:
        """A client may repeat itself; vLLM makes its own names of requests from it."""
        with contextlib.ExitStack() as stack:
            body = {**HELLO, "max_tokens": 200, "stream": True, "ignore_eos": True}
            headers = {"x-request-id": "one-and-the-same"}
            streams = [
                stack.enter_context(plain.stream("POST", "/v1/chat/completions", json=body, headers=headers))
                for _ in range(3)
            ]
            answers = ["".join(stream.iter_text()) for stream in streams]
        assert [answer.count('"finish_reason":"length"') for answer in answers] == [1, 1, 1]
        assert all(stream.headers["x-request-id"] == "one-and-the-same" for stream in streams)


def test_what_knowflows_scripts_call(demo: Demo) -> None:
    """With curl, as its documents have it."""
    url = base(demo)

    def curl(path: str, body: Any = None) -> Any:
        posted = ["-X", "POST", "-H", "Content-Type: application/json", "-d", json.dumps(body)] if body else []
        command = ["curl", "-sS", "--noproxy", "*", *posted, "-H", f"Authorization: Bearer {API_KEY}", f"{url}{path}"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    health = curl("/health")
    assert health["status"] == "healthy"
    assert health["services"]["chat"] == {"status": "healthy", "port": demo.ports["chat"], "model": "demo-chat"}
    assert {each["type"] for each in curl("/models")["data"]} == {"chat", "embedding", "rerank", "ocr"}
    info = curl("/system/info")
    assert set(info) == {"gpu_info", "processes", "config"}
    assert info["processes"]["chat"]["pid"] == demo.pid("chat")
    # Old scripts name no model where there is but one of its kind.
    asked = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}
    assert curl("/v1/chat/completions", asked)["model"] == "demo-chat"
    assert len(curl("/v1/embeddings", {"input": "测试文本"})["data"][0]["embedding"]) == 384
    assert curl("/v1/rerank", {"query": QUESTION, "documents": TEXTS})["results"][0]["index"] == 2


def test_the_demonstration_passes_its_selftest(demo: Demo) -> None:
    done = demo.run("selftest", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["passed"]) == (0, True), document
    open_ones = {each["check"] for each in document["checks"] if each["passed"] is None}
    assert open_ones <= {"related is nearer, Chinese", "the answer comes first, Chinese"}
    assert "✗" not in demo.run("selftest").stdout
