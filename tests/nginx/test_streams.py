"""What passes through Nginx passes as it comes: events of a stream, pieces of an upload, through a reload too."""

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.conftest import API_KEY, eventually
from tests.nginx.conftest import Nginx
from tests.router.conftest import Deployment
from tests.router.test_documents import Service
from tests.router.wire import Client, Engine, wait_until_gone

MIB = 1 << 20
CHAT = "/v1/chat/completions"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
# VLLM_UNIFIED_IDLE_SECONDS=600 .venv/bin/pytest tests/nginx -k idle  takes ten minutes for each of its two.
IDLE_SECONDS = float(os.environ.get("VLLM_UNIFIED_IDLE_SECONDS", "2"))


def event(word: str) -> bytes:
    document = {
        "id": "1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "raw",
        "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}],
    }
    data = b"data: %b\n\n" % json.dumps(document).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Speaker:
    """Behaviour of an engine that says the next word when the client has got the one before, and not earlier."""

    def __init__(self, words: int) -> None:
        self.words = words
        self.said = 0
        self.heard = threading.Semaphore(0)

    def __call__(self, connection: socket.socket, _head: bytes, _body: bytes) -> None:
        connection.sendall(HEAD)
        for number in range(self.words):
            self.said += 1
            connection.sendall(event(f"{number} "))
            if not self.heard.acquire(timeout=20):
                raise ConnectionError("the client did not get the word")
        connection.sendall(DONE)


def openai_client(nginx: Nginx) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{nginx.url}/v1", api_key=API_KEY, max_retries=0, http_client=nginx.client(None))


def words_of(client: openai.OpenAI) -> Iterator[str]:
    stream = client.chat.completions.create(
        model="raw", stream=True, messages=[{"role": "user", "content": "count"}], timeout=20
    )
    for chunk in stream:
        yield chunk.choices[0].delta.content or ""


def test_each_token_is_there_before_the_next_one_is_said(site: Deployment, nginx: Nginx) -> None:
    """Nothing waits for more to come, on any of the ways: a word that is held back stops the engine."""
    speaker = Speaker(50)
    with Engine(site.ports["raw"], speaker), openai_client(nginx) as client:
        for number, word in enumerate(words_of(client)):
            assert word == f"{number} "
            assert speaker.said == number + 1
            speaker.heard.release()
    assert speaker.said == 50


def test_a_stream_is_not_compressed_and_json_is(site: Deployment, nginx: Nginx) -> None:
    with nginx.client() as client:
        for stream in (True, False):
            body = {"model": "chat", "stream": stream, "text": "x" * 5000}
            answer = client.post(CHAT, json=body, headers={"accept-encoding": "gzip"})
            assert answer.headers.get("content-encoding") == (None if stream else "gzip")
        assert answer.json()["echo"]["text"] == "x" * 5000
        assert "vary" in answer.headers


def test_who_leaves_ends_the_engines_work(site: Deployment, nginx: Nginx) -> None:
    with Engine(site.ports["raw"], wait_until_gone) as engine:
        with Client(nginx.port) as client:
            client.send(
                b"POST %b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: 15\r\n\r\n"
                % (CHAT.encode(), API_KEY.encode()),
                b'{"model":"raw"}',
            )
            eventually(lambda: engine.requests)
        eventually(lambda: engine.gone)


@pytest.mark.parametrize("stream", [True, False])
def test_an_idle_request_is_waited_for(site: Deployment, nginx: Nginx, stream: bool) -> None:
    silence = threading.Event()

    def answer(connection: socket.socket, *_: bytes) -> None:
        if stream:
            connection.sendall(HEAD + event("first"))
        silence.wait(IDLE_SECONDS)
        if stream:
            connection.sendall(event("last") + DONE)
        else:
            connection.sendall(b'HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"ok"')

    with Engine(site.ports["raw"], answer), nginx.client() as client:
        said = client.post(CHAT, json={"model": "raw", "stream": stream}, timeout=IDLE_SECONDS + 60)
    assert said.status_code == 200
    assert said.text.endswith("data: [DONE]\n\n") if stream else said.json() == "ok"


def test_a_reload_breaks_no_stream(site: Deployment, nginx: Nginx) -> None:
    speakers = [Speaker(6) for _ in range(8)]
    waiting = iter(speakers)
    at_half = threading.Barrier(len(speakers) + 1, timeout=20)
    go_on = threading.Event()

    def listen(number: int) -> list[str]:
        heard = []
        with openai_client(nginx) as client:
            for word in words_of(client):
                heard.append(word)
                if len(heard) == 3:
                    at_half.wait()
                    go_on.wait(20)
                for speaker in speakers:
                    speaker.heard.release()
        return heard

    with (
        Engine(site.ports["raw"], lambda *request: next(waiting)(*request)),
        ThreadPoolExecutor(len(speakers)) as threads,
    ):
        heard = [threads.submit(listen, number) for number in range(len(speakers))]
        at_half.wait()
        old = nginx.workers
        nginx.reload()
        assert set(old) & set(nginx.workers)  # they still have the streams
        with nginx.client() as client:
            assert client.get("/live").status_code == 200
        go_on.set()
        assert [each.result() for each in heard] == [[f"{number} " for number in range(6)]] * len(speakers)
    eventually(lambda: not set(old) & set(nginx.workers))


def test_an_upload_is_passed_on_as_it_comes(site: Deployment, nginx: Nginx) -> None:
    """100 MB, of which Nginx never has more than a few buffers: neither in memory nor in a file."""
    half = bytes(50 * MIB)
    digest = hashlib.sha256(half + half).hexdigest()
    with Service(site.ports["documents"]) as service, nginx.client() as client:

        def pieces() -> Iterator[bytes]:
            yield half
            eventually(lambda: service.received > 48 * MIB)
            assert list((nginx.project.home / "run" / "nginx").iterdir()) == []
            yield half

        answer = client.post("/convert/file", content=pieces(), headers={"content-length": str(100 * MIB)})
        assert answer.json() == {"size": 100 * MIB, "sha256": digest}
        answer = client.post("/convert/file", content=iter([half, half]))  # chunked
        assert answer.json() == {"size": 100 * MIB, "sha256": digest}


@pytest.mark.parametrize("key", ["sk-wrong", API_KEY])
def test_a_refusal_in_the_middle_of_an_upload_is_read(site: Deployment, nginx: Nginx, key: str) -> None:
    """With a wrong key, or larger than the service takes: the router's words, not those of a broken connection."""
    size = (140 if key == API_KEY else 100) * MIB
    with nginx.client(key) as client:
        for _ in range(3):
            answer = client.post("/convert/file", content=bytes(size))
            assert answer.headers["x-error-source"] == "router"
            assert answer.status_code == (413 if key == API_KEY else 401)


def test_a_download_waits_for_a_slow_client(site: Deployment, nginx: Nginx) -> None:
    with (
        Service(site.ports["documents"]) as service,
        nginx.client() as client,
        client.stream("GET", "/api/tasks/1/download/result.zip") as answer,
    ):
        pieces = answer.iter_bytes(MIB)
        assert next(pieces) == bytes(MIB)
        eventually(lambda: service.sent > 0)
        assert service.sent < 100 * MIB
        assert sum(map(len, pieces)) == 199 * MIB
