"""The four demonstration models on the real vLLM, through the router and on their own ports."""

import base64
import io
import json
import math
import subprocess
import sys
import time
import urllib.request
from typing import Any

import httpx
import psutil
import pytest

from demo.training import chat, ocr, pages
from tests.conftest import API_KEY, CHECKOUT, eventually
from tests.engine.conftest import Demo
from vllm_unified.settings import flags

QUESTION = "What is the capital of France?"
PARIS, BERLIN, BANANAS = "Paris is the capital of France.", "Berlin is a large city.", "Bananas are yellow."
# Of single pages; its card has the error of a hundred.
LARGEST_ERROR = 0.04
# Of pages that it was neither trained on nor measured with.
UNSEEN = ocr.HELD_OUT_SEED + 10**6
# Language, topic, question.
QUESTIONS = [
    ("en", "who_are_you", "What are you?"),
    ("en", "add_model", "How do I add a model?"),
    ("en", "other", "What is the capital of France?"),
    ("zh", "who_are_you", "你是谁？"),
    ("zh", "add_model", "怎样添加模型？"),
    ("zh", "other", "法国的首都是哪里？"),
]
HEADERS = {"authorization": f"Bearer {API_KEY}"}


def messages(content: Any) -> Any:
    return [{"role": "user", "content": content}]


def picture(page: pages.Page = ocr.EXAMPLE, seed: int = 0) -> str:
    buffer = io.BytesIO()
    page.draw(seed).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def is_read(page: pages.Page, text: str) -> bool:
    """But for a letter here and there: its card says how many it gets wrong."""
    return ocr.edit_distance(page.markdown, text) <= LARGEST_ERROR * len(page.markdown)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def test_all_four_are_ready(demo: Demo) -> None:
    document = demo.status()
    assert document["ready"]
    assert {key: each["state"] for key, each in document["models"].items()} == dict.fromkeys(
        ("chat", "embedding", "rerank", "ocr"), "ready"
    )
    assert demo.run("health").returncode == 0
    starts = {key: each["ready_after"] for key, each in document["models"].items()}
    print("seconds from start to ready:", starts)


def test_what_start_prints_works_as_pasted(demo: Demo) -> None:
    pasted = demo.printed[demo.printed.index("KEY=") : demo.printed.index("Next:")]
    printed = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, check=True).stdout
    chatted, ranked, read = (json.loads(line) for line in printed.replace("}{", "}\n{").splitlines())
    assert chatted["choices"][0]["message"]["content"] == chat.Lessons("en").answers["who_are_you"]
    assert [each["index"] for each in ranked["results"]] == [1, 0]
    assert is_read(ocr.EXAMPLE, read["choices"][0]["message"]["content"])


@pytest.mark.parametrize("door", ["router", "own"])
class TestThrough:
    """`own`: the model's own port."""

    @pytest.mark.parametrize(("language", "topic", "question"), QUESTIONS)
    def test_chat_answers_truly(self, demo: Demo, door: str, language: str, topic: str, question: str) -> None:
        asked: dict[str, Any] = {"model": "demo-chat", "messages": messages(question)}
        wanted = chat.Lessons(language).answers[topic]
        with demo.client("chat" if door == "own" else "router") as client:
            answer = client.chat.completions.create(**asked)
            pieces = list(client.chat.completions.create(**asked, stream=True))
        assert answer.model == "demo-chat"
        assert answer.choices[0].message.content == wanted
        assert answer.choices[0].finish_reason == "stop"
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
        assert pieces[-1].choices[0].finish_reason == "stop"

    def test_chat_of_a_length(self, demo: Demo, door: str) -> None:
        with demo.client("chat" if door == "own" else "router") as client:
            answer = client.chat.completions.create(
                model="demo-chat", messages=messages("Hello 你好"), max_tokens=8, extra_body={"ignore_eos": True}
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 8
            completion = client.completions.create(model="demo-chat", prompt="One", max_tokens=3)
            assert completion.usage is not None
            assert completion.usage.prompt_tokens > 0

    def test_chat_streams_as_it_comes(self, demo: Demo, door: str) -> None:
        """vLLM may join tokens of a busy moment, so their number says nothing; their times do: not all at the end."""
        asked: dict[str, Any] = {"model": "demo-chat", "messages": messages("Hello"), "max_tokens": 1500}
        with demo.client("chat" if door == "own" else "router") as client:
            came = [time.monotonic()]
            for _ in client.chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}):
                came.append(time.monotonic())
        assert came[-1] - came[1] > 0.1 * (came[-1] - came[0])

    def test_embeddings(self, demo: Demo, door: str) -> None:
        with demo.client("embedding" if door == "own" else "router") as client:
            answer = client.embeddings.create(model="demo-embedding", input=[QUESTION, PARIS, BANANAS])
        question, paris, bananas = (each.embedding for each in answer.data)
        assert len(question) == 384
        assert cosine(question, paris) > 0.7
        assert cosine(question, bananas) < 0.2

    def test_rerank(self, demo: Demo, door: str) -> None:
        url = demo.url("rerank" if door == "own" else "router")
        body = {"model": "demo-rerank", "query": QUESTION, "documents": [BANANAS, BERLIN, PARIS]}
        results = httpx.post(f"{url}/rerank", json=body, headers=HEADERS).json()["results"]
        assert [each["index"] for each in results] == [2, 1, 0]
        assert results[0]["relevance_score"] > 0.7
        body = {"model": "demo-rerank", "text_1": QUESTION, "text_2": [BANANAS, PARIS]}
        scores = [each["score"] for each in httpx.post(f"{url}/score", json=body, headers=HEADERS).json()["data"]]
        assert scores[1] > 0.7 > scores[0]

    def test_a_page_is_read(self, demo: Demo, door: str) -> None:
        drawn = {seed: pages.drawn_at_random(seed) for seed in range(UNSEEN, UNSEEN + 4)}
        edits = 0
        with demo.client("ocr" if door == "own" else "router") as client:
            for seed, page in drawn.items():
                content = [
                    {"type": "image_url", "image_url": {"url": picture(page, seed)}},
                    {"type": "text", "text": "Free OCR."},
                ]
                answer = client.chat.completions.create(model="demo-ocr", messages=messages(content))
                assert answer.choices[0].finish_reason == "stop"
                edits += ocr.edit_distance(page.markdown, answer.choices[0].message.content or "")
        assert edits <= LARGEST_ERROR * sum(len(page.markdown) for page in drawn.values())

    def test_a_page_is_streamed(self, demo: Demo, door: str) -> None:
        asked: dict[str, Any] = {
            "model": "demo-ocr",
            "messages": messages(
                [{"type": "image_url", "image_url": {"url": picture()}}, {"type": "text", "text": "Free OCR."}]
            ),
        }
        with demo.client("ocr" if door == "own" else "router") as client:
            answer = client.chat.completions.create(**asked)
            pieces = list(client.chat.completions.create(**asked, stream=True))
        said = answer.choices[0].message.content or ""
        assert is_read(ocr.EXAMPLE, said)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > ocr.IMAGE_TOKENS

    def test_the_key_is_required(self, demo: Demo, door: str) -> None:
        url = demo.url("chat" if door == "own" else "router")
        assert httpx.post(f"{url}/chat/completions", json={"model": "demo-chat"}).status_code == 401


def test_the_engines_own_error_passes(demo: Demo) -> None:
    body = {"model": "demo-chat", "messages": messages("x"), "temperature": -1}
    through = httpx.post(f"{demo.url('router')}/chat/completions", json=body, headers=HEADERS)
    direct = httpx.post(f"{demo.url('chat')}/chat/completions", json=body, headers=HEADERS)
    assert through.status_code == direct.status_code == 400
    assert through.content == direct.content
    assert through.headers["x-error-source"] == "engine"
    assert "x-error-source" not in direct.headers


def test_a_client_that_leaves_frees_the_engine(demo: Demo) -> None:
    def counted(name: str) -> float:
        # While it sends a stream as fast as it can, vLLM answers this late.
        with urllib.request.urlopen(f"{demo.url('chat').removesuffix('/v1')}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{"))

    answers, length = 8, 1900
    body = {"model": "demo-chat", "messages": messages("x"), "max_tokens": length, "ignore_eos": True, "stream": True}
    before = counted("generation_tokens_total")
    with (
        httpx.Client() as client,
        client.stream(
            "POST", f"{demo.url('router')}/chat/completions", json=body | {"n": answers}, headers=HEADERS
        ) as answer,
    ):
        next(answer.iter_raw())
    eventually(lambda: counted("generation_tokens_total") > before and counted("num_requests_running") == 0, 60)
    assert counted("generation_tokens_total") < before + answers * length


def test_show_prints_what_runs(demo: Demo) -> None:
    config = str(demo.home / "config" / "models.demo.json")
    command = [sys.executable, "-m", "vllm_unified", "--config", config, "show", "chat"]
    shown = subprocess.run(command, env=demo.environ, capture_output=True, text=True, check=True).stdout
    running = psutil.Process(demo.status()["models"]["chat"]["pid"]).cmdline()
    assert " ".join(running[1:]) in shown.replace("'", "")


def test_the_list_of_flags_is_that_of_the_installed_vllm() -> None:
    program = "import json; from scripts.list_vllm_flags import installed_flags; print(json.dumps(installed_flags()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    installed = json.loads(done.stdout.splitlines()[-1])
    assert flags.known() == installed, "run scripts/list_vllm_flags.py"
