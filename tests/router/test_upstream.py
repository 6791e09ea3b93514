"""Engines that misbehave: what their clients get, and what the next client gets."""

import contextlib
import gzip
import itertools
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import eventually
from tests.router.conftest import Deployment
from tests.router.wire import Answer, Client, CutError, Engine, chunked, post, received, wait_until_gone

CHAT = "/v1/chat/completions"
Behaviour = Callable[[socket.socket, bytes, bytes], None]
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
STREAM = OK + b"content-type: text/event-stream\r\n"


def echo(connection: socket.socket, head: bytes, body: bytes) -> None:
    """As a good engine: the number of the request comes back."""
    connection.sendall(whole(b'{"n": %d}' % json.loads(body)["n"]))


def whole(body: bytes, *headers: bytes) -> bytes:
    lines = [OK, *(header + b"\r\n" for header in headers), b"content-length: %d\r\n\r\n" % len(body), body]
    return b"".join(lines)


def says(*pieces: bytes, closes: bool = False, resets: bool = False) -> Behaviour:
    """Those pieces, whatever it was asked."""

    def behave(connection: socket.socket, head: bytes, body: bytes) -> None:
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(0.01)
            connection.sendall(piece)
        if resets:
            time.sleep(0.05)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if closes or resets:
            raise ConnectionError

    return behave


@pytest.fixture(scope="module")
def running(lasting: Deployment) -> Iterator[Engine]:
    models: dict[str, dict[str, Any]] = {
        "raw": {"type": "chat", "fake": None},
        "ranks": {"type": "rerank", "fake": None},
    }
    lasting.start(models, retries=1)
    with Engine(lasting.ports["raw"], echo) as engine:
        yield engine


@pytest.fixture
def engine(running: Engine) -> Iterator[Engine]:
    """Good again after each test, and no longer thought of as broken."""
    running.requests.clear()
    yield running
    running.behave = echo


@pytest.fixture
def client(lasting: Deployment, engine: Engine) -> Iterator[Client]:
    with Client(lasting.ports["router"]) as client:
        yield client


def ask(client: Client, number: int = 0, path: str = CHAT, **fields: Any) -> Answer:
    return client.post(path, {"model": "raw", "n": number, **fields})


def assert_good(client: Client, engine: Engine, count: int = 3) -> None:
    """Whoever comes next gets his own answers, over the same connection."""
    engine.behave = echo
    for number in range(count):
        assert ask(client, number).json() == {"n": number}


# --- before the client got anything ---

LONG = b"x: " + b"y" * 1000 + b"\r\n"


@pytest.mark.parametrize(
    ("behave", "status"),
    [
        (says(closes=True), 503),
        (says(resets=True), 503),
        (says(b"HTTP/1.1 200 OK\r\ncontent-le", closes=True), 503),
        (says(b"HTTP/1.1 100 Continue\r\n\r\n", closes=True), 503),
        (says(b"hello, I am no HTTP server\r\n"), 502),
        (says(b"\x15\x03\x01\x00\x02\x02\x46"), 502),
        (says(OK + b"content-length: x\r\n\r\n{}"), 502),
        (says(OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}x"), 502),
        (says(OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"), 502),
        (says(OK + b"x: a\r\n b\r\ncontent-length: 2\r\n\r\n{}"), 502),
        (says(OK + b"x: a\0b\r\ncontent-length: 2\r\n\r\n{}"), 502),
        (says(OK + b"x: " + b"y" * 300_000 + b"\r\ncontent-length: 2\r\n\r\n"), 502),
        (says(OK, *[LONG * 20] * 10), 502),
        (says(*[b"HTTP/1.1 100 Continue\r\n\r\n" * 1000] * 10), 502),
        (says(b"HTTP/1.1 999 What\r\ncontent-length: 2\r\n\r\n{}"), 502),
        (says(b"HTTP/1.1 600 What\r\ncontent-length: 2\r\n\r\n{}"), 502),
        (says(b"HTTP/1.1 000 What\r\ncontent-length: 2\r\n\r\n{}"), 502),
        (says(b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n\0\0\0"), 502),
        (says(CHUNKED + b"zz\r\n"), 502),
        (says(OK + b"content-length: 10\r\n\r\n", closes=True), 502),
        (says(CHUNKED, closes=True), 502),
    ],
)
def test_an_answer_that_never_began(client: Client, engine: Engine, behave: Behaviour, status: int) -> None:
    engine.behave = behave
    answer = ask(client)
    assert (answer.status, answer["x-error-source"]) == (status, "router")
    assert answer.json()["error"]["code"] == {502: "engine_error", 503: "model_not_ready"}[status]
    assert_good(client, engine)


# --- in the middle ---


@pytest.mark.parametrize(
    "behave",
    [
        says(whole(b"x" * 100)[:-1], closes=True),
        says(whole(b"x" * 100)[:-1], resets=True),
        says(whole(b"x" * 1_000_000)[:-1], closes=True),
        says(whole(gzip.compress(b"x" * 100), b"content-encoding: gzip")[:-1], closes=True),
        says(whole(b'{"usage": {"prompt_tokens": 1}}', b"content-type: application/json")[:-1], closes=True),
        says(CHUNKED + b"5\r\nhello\r\n", closes=True),
        says(CHUNKED + b"5\r\nhello\r\n0\r\n", closes=True),
        says(CHUNKED + b"5\r\nhello\r\n", b"zz\r\n"),
        says(CHUNKED + b"5\r\nhello", b"XX0\r\n\r\n"),
        says(OK + b"\r\nhello", resets=True),
    ],
)
def test_an_answer_that_broke_never_looks_whole(lasting: Deployment, engine: Engine, behave: Behaviour) -> None:
    engine.behave = behave
    with Client(lasting.ports["router"]) as client, pytest.raises(CutError):
        ask(client)
    with Client(lasting.ports["router"]) as client:
        assert_good(client, engine)


EVENT = b'data: {"choices": [{"delta": {"content": "hi"}}]}\n\n'
ENDINGS = {
    "chunked": says(STREAM + b"transfer-encoding: chunked\r\n\r\n" + chunked([EVENT])[:-5], closes=True),
    "in an event": says(
        STREAM + b"transfer-encoding: chunked\r\n\r\n" + chunked([EVENT, b"data: {"])[:-5], closes=True
    ),
    "length": says(STREAM + b"content-length: 1000\r\n\r\n" + EVENT, closes=True),
    "reset": says(STREAM + b"\r\n" + EVENT, resets=True),
    "rubbish": says(STREAM + b"transfer-encoding: chunked\r\n\r\n" + chunked([EVENT])[:-5], b"rubbish\r\n"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses"])
def test_a_stream_that_broke_says_so(client: Client, engine: Engine, path: str, ending: str) -> None:
    engine.behave = ENDINGS[ending]
    answer = ask(client, path=path, stream=True)
    assert answer.status == 200
    assert answer.body.startswith(EVENT)
    assert answer.body.endswith(b"\n\n")
    name, data = last_event(answer.body)
    if path == "/v1/messages":
        assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")
        assert "broke off" in data["error"]["message"]
    elif path == "/v1/responses":
        assert (name, data["type"], data["code"]) == ("error", "error", "engine_error")
        assert "broke off" in data["message"]
    else:
        assert (name, data["error"]["code"]) == ("", "engine_error")
    assert_good(client, engine)


def last_event(stream: bytes) -> tuple[str, Any]:
    """Name and data of the last event, as a reader of server-sent events takes it."""
    name, data = "", ""
    for line in stream.rstrip(b"\n").rpartition(b"\n\n")[2].decode().splitlines():
        field, _, value = line.partition(": ")
        name, data = (value, data) if field == "event" else (name, data + value)
    return name, json.loads(data)


# --- more than was asked for ---

ONE, TWO = whole(b'{"n": 1}'), whole(b'{"n": "of nobody"}')


@pytest.mark.parametrize(
    "behave",
    [
        says(ONE + TWO),
        says(ONE, TWO),
        says(ONE + TWO[:5], TWO[5:]),
        says(ONE + b"rubbish"),
        says(ONE + b"\r\n\r\n", TWO),
        says(ONE[:-3], ONE[-3:] + TWO),
        says(OK + b"content-length: 8\r\n\r\n" + b'{"n": 1}' + b"longer than it said"),
        says(CHUNKED + chunked([b'{"n": 1}']) + TWO),
        says(OK + b"connection: close\r\ncontent-length: 8\r\n\r\n" + b'{"n": 1}' + TWO),
        says(b"HTTP/1.1 100 Continue\r\n\r\n" + ONE + b"HTTP/1.1 100 Continue\r\n\r\n" + TWO),
    ],
)
def test_what_stands_behind_an_answer_reaches_nobody(client: Client, engine: Engine, behave: Behaviour) -> None:
    for _ in range(3):
        engine.behave = behave
        assert ask(client).json() == {"n": 1}
        time.sleep(0.03)  # the second piece comes while the connection is idle
        assert_good(client, engine, 1)
    assert_good(client, engine)


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
@pytest.mark.parametrize("rest", [b"\r\n", b"content-length: 5\r\n\r\nhello", b"content-length: 5\r\n\r\n"])
@pytest.mark.parametrize("at_once", [True, False])
def test_answers_without_a_body_have_none(
    client: Client, engine: Engine, status: bytes, rest: bytes, at_once: bool
) -> None:
    text = b"HTTP/1.1 " + status + b"\r\n" + rest
    engine.behave = says(text) if at_once else says(text[:-5], text[-5:])
    for _ in range(2):
        answer = ask(client)
        assert answer.status == int(status[:3])
        assert answer.all("content-length") == answer.all("transfer-encoding") == []
    assert_good(client, engine)


# --- odd, and good ---


@pytest.mark.parametrize(
    ("behave", "body"),
    [
        (says(b"HTTP/1.1 100 Continue\r\n\r\n" + whole(b"{}")), b"{}"),
        (says(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", whole(b"{}")), b"{}"),
        (says(whole(b"")), b""),
        (says(OK + b"\r\n", closes=True), b""),
        (says(OK + b"\r\nall until", b" the end", closes=True), b"all until the end"),
        (says(b"HTTP/1.0 200 OK\r\n\r\nold", closes=True), b"old"),
        (says(b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nold", closes=True), b"old"),
        (says(OK + b"connection: close\r\n\r\nlast", closes=True), b"last"),
        (says(CHUNKED + chunked([b"a", b"bc"])[:-2] + b"x-trailer: 1\r\n\r\n"), b"abc"),
        (says(CHUNKED + b"3;name=value\r\nabc\r\n0\r\n\r\n"), b"abc"),
        (says(whole(gzip.compress(b"packed", mtime=0), b"content-encoding: gzip")), gzip.compress(b"packed", mtime=0)),
        (says(*(bytes([byte]) for byte in whole(b"dripping"))), b"dripping"),
        (says(OK.replace(b"OK", "Straße".encode("latin-1")) + b"content-length: 0\r\n\r\n"), b""),
        (says(b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n"), b""),
    ],
)
def test_odd_answers_arrive(client: Client, engine: Engine, behave: Behaviour, body: bytes) -> None:
    engine.behave = behave
    for _ in range(2):
        answer = ask(client)
        assert (answer.status, answer.body) == (200, body)
        assert answer.all("x-trailer") == answer.all("link") == []
    assert len(engine.requests) == 2
    assert_good(client, engine)


def test_an_answer_before_the_whole_request(client: Client, engine: Engine) -> None:
    """The engine reads the rest of it afterwards, or in the middle of the next request."""

    def answer_early(connection: socket.socket, head: bytes, body: bytes) -> None:
        connection.sendall(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\n{}")
        time.sleep(0.1)
        size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]) - len(body)
        while size > 0:
            size -= len(received(connection))

    engine.behave = answer_early
    answer = client.post(CHAT, {"model": "raw", "n": 1, "x": "y" * 20_000_000}, "x-answer-early: 1")
    assert (answer.status, answer["x-error-source"]) == (413, "engine")
    assert_good(client, engine)


def test_a_connection_that_ended_while_it_was_idle_costs_nothing(
    lasting: Deployment, client: Client, engine: Engine
) -> None:
    """Each of the engine's connections takes one request, and ends without an answer at the second."""
    seen: set[socket.socket] = set()

    def answer_once(connection: socket.socket, head: bytes, body: bytes) -> None:
        if connection in seen:
            raise ConnectionError
        seen.add(connection)
        echo(connection, head, body)

    before = metric(lasting, "retries_total", "raw")
    engine.behave = answer_once
    for number in range(10):
        assert ask(client, number).json() == {"n": number}
    assert len(engine.requests) > 10
    assert metric(lasting, "retries_total", "raw") == before
    engine.behave = says(ONE, closes=True)  # and at once
    for _ in range(30):
        assert ask(client).json() == {"n": 1}
    assert metric(lasting, "retries_total", "raw") == before


def metric(deployment: Deployment, name: str, model: str) -> float:
    with deployment.client() as client:
        lines = client.get("/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith(f'vllm_unified_{name}{{model="{model}"'))
    return float(line.rpartition(" ")[2])


def test_a_client_that_leaves_while_the_engine_is_silent(lasting: Deployment, engine: Engine) -> None:
    engine.behave = wait_until_gone
    with Client(lasting.ports["router"]) as client:
        client.send(post(CHAT, {"model": "raw", "n": 1}))
        eventually(lambda: engine.requests)
        gone = engine.gone
    eventually(lambda: engine.gone == gone + 1)
    assert metric(lasting, "in_flight", "raw") == 0


@pytest.mark.parametrize(
    "body",
    [
        b"rubbish",
        b"[]",
        b"{}",
        b'{"results": [{}]}',
        b'{"results": [{"index": 9, "relevance_score": 1}]}',
        b"",
        b"[" * 9999,
    ],
)
@pytest.mark.parametrize("coding", [b"", b"content-encoding: gzip"])
def test_a_ranking_that_is_none(lasting: Deployment, client: Client, body: bytes, coding: bytes) -> None:
    """It has to be told in the client's shape, and cannot be."""
    headers = [b"content-type: application/json", *([coding] if coding else [])]
    asked = {"model": "ranks", "query": "x", "texts": ["a"], "return_text": True}
    with Engine(lasting.ports["ranks"], says(whole(gzip.compress(body) if coding else body, *headers))):
        answer = client.post("/rerank", asked)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_error")
    assert metric(lasting, "in_flight", "ranks") == metric(lasting, "replica_in_flight", "ranks") == 0


# --- pieces ---

USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n'
DONE = b"data: [DONE]\n\n"
# The engine's answer, and the body that the client gets.
ANSWERS = {
    "length": (whole(b'{"a": "\xc3\xa9"}' * 50, b"content-type: application/json"), b'{"a": "\xc3\xa9"}' * 50),
    "chunked": (CHUNKED + chunked([b"a" * 10, b"b", b"\r\n0\r\n\r\n"]), b"a" * 10 + b"b\r\n0\r\n\r\n"),
    "stream": (
        STREAM + b"transfer-encoding: chunked\r\n\r\n" + chunked([EVENT, EVENT[:9], EVENT[9:] + USAGE, DONE]),
        EVENT + EVENT + DONE,
    ),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_answer_in_any_pieces(client: Client, engine: Engine, data: st.DataObject) -> None:
    text, body = ANSWERS[data.draw(st.sampled_from(sorted(ANSWERS)))]
    places = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=6)))
    engine.behave = says(*(text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])))
    assert ask(client, stream=True).body == body


def test_tokens_of_a_stream_are_counted_though_they_are_hidden(
    lasting: Deployment, client: Client, engine: Engine
) -> None:
    before = tokens(lasting)
    engine.behave = says(ANSWERS["stream"][0])
    assert USAGE not in ask(client, stream=True).body
    assert USAGE in ask(client, stream=True, stream_options={"include_usage": True}).body
    assert tokens(lasting) == (before[0] + 6, before[1] + 8)


def tokens(deployment: Deployment) -> tuple[float, ...]:
    with deployment.client() as client, contextlib.suppress(ValueError):
        lines = client.get("/metrics").text.splitlines()
    start = 'vllm_unified_tokens_total{kind="%s",model="raw"}'
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    other = 'vllm_unified_tokens_total{model="raw",kind="%s"}'
    return tuple(found.get(start % kind, found.get(other % kind, -1)) for kind in ("prompt", "completion"))
