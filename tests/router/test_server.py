"""The listening side, byte by byte: what comes over a socket that no client library would send, or not so."""

import asyncio
import contextlib
import functools
import gzip
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import API_KEY, CHECKOUT, eventually, listening
from tests.router.conftest import Deployment
from tests.router.wire import AUTHORIZED, Client, CutError, Engine, chunked, post, request
from vllm_unified.router import server as server_module
from vllm_unified.router.problems import RequestError
from vllm_unified.router.server import ClientConnection, Request, Server, Upload, Work

CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"
ORIGIN = "https://app.example"
MIB = 1 << 20
packed = functools.partial(gzip.compress, mtime=0)  # the name of a test is the same at all times


@pytest.fixture(scope="module")
def router(lasting: Deployment) -> Deployment:
    models: dict[str, dict[str, Any]] = {
        "embedding": {"type": "embedding"},
        "hangs": {"type": "chat", "fake": {"hang": True}},
        "trickles": {"type": "chat", "fake": {"chunk_seconds": 0.1}},
        "raw": {"type": "chat", "fake": None},
    }
    lasting.start(models, max_body_mib=1, cors_origins=[ORIGIN])
    return lasting


@pytest.fixture
def client(router: Deployment) -> Iterator[Client]:
    with Client(router.ports["router"]) as client:
        yield client


def code(answer: Any) -> str:
    assert answer["x-error-source"] == "router"
    found: str = answer.json()["error"]["code"]
    return found


def embed(number: int, *headers: str) -> bytes:
    return post(EMBED, {"n": number}, *headers)


def number_in(answer: Any) -> int:
    assert answer.status == 200, answer
    number: int = answer.json()["echo"]["n"]
    return number


# --- pieces ---


@st.composite
def cut(draw: st.DrawFn, text: bytes) -> list[bytes]:
    places = sorted(draw(st.sets(st.integers(1, len(text) - 1), max_size=5)))
    return [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_request_in_any_pieces(client: Client, data: st.DataObject) -> None:
    body = json.dumps({"n": 7, "text": "é漢" * data.draw(st.sampled_from([1, 50, 30_000]))}).encode()
    if data.draw(st.booleans()):
        pieces = data.draw(cut(body))
        text = request("POST", EMBED, "transfer-encoding: chunked") + chunked(pieces)
    else:
        text = request("POST", EMBED, body=body)
    client.send(*data.draw(cut(text)))
    assert client.answer().json()["echo"] == {**json.loads(body), "model": "embedding"}


def test_a_large_body_right_behind_the_second_half_of_its_head(client: Client) -> None:
    text = post(EMBED, {"n": 1, "x": "y" * 900_000})
    client.send(text[:30], text[30:])
    assert number_in(client.answer()) == 1
    pieces = [b"x" * 200_000] * 4
    text = request("POST", EMBED, "transfer-encoding: chunked") + chunked([b'{"n": 2, "x": "', *pieces, b'"}'])
    client.send(*(text[start : start + 100_000] for start in range(0, len(text), 100_000)))
    assert number_in(client.answer()) == 2


def test_a_byte_at_a_time(client: Client) -> None:
    text = request("POST", EMBED, "transfer-encoding: chunked") + b'8\r\n{"n": 5}\r\n0\r\nx-trailer: 1\r\n\r\n'
    client.send(*(text[place : place + 1] for place in range(len(text))))
    assert number_in(client.answer()) == 5


# --- pipelining ---


@pytest.mark.parametrize("count", [2, 200])
def test_pipelined_requests_are_answered_in_their_order(client: Client, count: int) -> None:
    client.send(b"".join(embed(number) + request("GET", f"/nowhere/{number}") for number in range(count)))
    for number in range(count):
        assert number_in(client.answer()) == number
        assert f"/nowhere/{number}:" in client.answer().json()["error"]["message"]


def test_a_refused_request_between_good_ones(client: Client) -> None:
    large = request("POST", EMBED, body=b"x" * 200_000).replace(AUTHORIZED, b"")
    client.send(embed(1) + large + embed(2) + post(EMBED, {"model": "none"}) + embed(3))
    assert number_in(client.answer()) == 1
    assert client.answer().status == 401
    assert number_in(client.answer()) == 2
    assert client.answer().status == 404
    assert number_in(client.answer()) == 3


def test_rubbish_behind_good_requests_is_answered_last(client: Client) -> None:
    client.send(embed(1) + embed(2) + b"rubbish\r\n\r\n")
    assert number_in(client.answer()) == 1
    assert number_in(client.answer()) == 2
    assert client.answer().status == 400
    assert client.is_ended()


def test_a_gone_client_that_had_pipelined_cancels_its_request(router: Deployment) -> None:
    before, unseen = router.seen("hangs")["cancelled"], len(router.seen("embedding")["requests"])
    with Client(router.ports["router"]) as client:
        client.send(post(CHAT, {"model": "hangs"}) + embed(1) * 3)
        eventually(lambda: in_flight(router, "hangs") == 1)
    eventually(lambda: router.seen("hangs")["cancelled"] == before + 1)
    assert len(router.seen("embedding")["requests"]) == unseen
    assert in_flight(router, "hangs") == 0


def in_flight(router: Deployment, model: str) -> int:
    with router.client() as client:
        text = client.get("/metrics").text
    (line,) = (line for line in text.splitlines() if line.startswith(f'vllm_unified_in_flight{{model="{model}"}}'))
    return int(float(line.rpartition(" ")[2]))


def test_who_sends_too_much_ahead_is_cut(router: Deployment, client: Client) -> None:
    before = router.seen("hangs")["cancelled"]
    client.send(post(CHAT, {"model": "hangs"}))
    with contextlib.suppress(OSError):
        for _ in range(20):
            client.send(embed(1, "x-filler: " + "x" * 50_000))
            time.sleep(0.01)
    assert client.is_ended()
    eventually(lambda: router.seen("hangs")["cancelled"] == before + 1)


def test_pipelining_without_end_is_not_too_much_ahead(client: Client) -> None:
    """More than 256 KiB altogether, never much ahead, and never nothing."""
    one = embed(1, "x-filler: " + "x" * 20_000)
    client.send(one * 3)
    for _ in range(40):
        client.send(one)
        assert number_in(client.answer()) == 1
    for _ in range(3):
        assert number_in(client.answer()) == 1


# --- half closed, old, other methods ---


def test_half_closed_is_gone(router: Deployment, client: Client) -> None:
    before = router.seen("trickles")["cancelled"]
    client.send(post(CHAT, {"model": "trickles", "stream": True}))
    assert client.socket.recv(5) == b"HTTP/"
    client.socket.shutdown(socket.SHUT_WR)
    assert b"[DONE]" not in client.rest()
    eventually(lambda: router.seen("trickles")["cancelled"] == before + 1)


def test_an_old_client_is_closed_unless_it_asks_otherwise(router: Deployment) -> None:
    with Client(router.ports["router"]) as client:
        client.send(request("POST", EMBED, body=b'{"n":1}', version="HTTP/1.0"))
        answer = client.answer()
        assert (number_in(answer), answer["connection"]) == (1, "close")
        assert client.is_ended()
    with Client(router.ports["router"]) as client:
        for number in range(3):
            client.send(request("POST", EMBED, "connection: keep-alive", body=b'{"n":%d}' % number, version="HTTP/1.0"))
            answer = client.answer()
            assert (number_in(answer), answer["connection"]) == (number, "keep-alive")


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_a_stream_to_an_old_client_ends_with_its_connection(client: Client, connection: str) -> None:
    body = b'{"model": "trickles", "stream": true}'
    client.send(request("POST", CHAT, f"connection: {connection}", body=body, version="HTTP/1.0"))
    answer = client.answer()
    assert (answer.all("transfer-encoding"), answer["connection"]) == ([], "close")
    assert answer.body.startswith(b"data: {")
    assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/live", 200),
        ("HEAD", "/live", 200),
        ("HEAD", "/v1/models", 200),
        ("HEAD", "/docs", 200),
        ("HEAD", "/nowhere", 404),
        ("HEAD", EMBED, 405),
        ("GET", EMBED, 405),
        ("DELETE", EMBED, 405),
        ("PUT", EMBED, 405),
        ("OPTIONS", EMBED, 405),
        ("OPTIONS", "*", 404),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/live", 405),
        ("POST", "/live", 405),
        ("POST", "/nowhere", 404),
        ("PATCH", "/admin/reload", 405),
    ],
)
def test_methods(client: Client, method: str, path: str, status: int) -> None:
    client.send(request(method, path))
    answer = client.answer(method)
    assert answer.status == status
    if status == 405:
        assert answer.all("allow")
    assert number_in(client.post(EMBED, {"n": 1})) == 1  # nothing of the answer is left over


# --- Expect, Upgrade, targets ---


def test_the_body_is_asked_for(client: Client) -> None:
    head, body = embed(3, "expect: 100-continue").split(b"\r\n\r\n")
    client.send(head + b"\r\n\r\n")
    assert client.answer().status == 100
    client.send(body)
    assert number_in(client.answer()) == 3


def test_the_body_of_a_pipelined_request_is_asked_for(client: Client) -> None:
    head, body = embed(3, "expect: 100-continue").split(b"\r\n\r\n")
    client.send(embed(2) + head + b"\r\n\r\n")
    assert number_in(client.answer()) == 2
    assert client.answer().status == 100
    client.send(body)
    assert number_in(client.answer()) == 3


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_a_body_that_would_be_refused_is_not_asked_for(client: Client, version: str) -> None:
    length = f"content-length: {2 * MIB}"
    client.send(request("POST", EMBED, "expect: 100-continue", length, version=version))
    answer = client.answer()
    assert (answer.status, code(answer), answer["connection"]) == (413, "request_too_large", "close")


def test_a_stranger_is_not_asked_for_a_body(client: Client) -> None:
    head = request("POST", EMBED, "expect: 100-continue", "content-length: 10").replace(AUTHORIZED, b"")
    client.send(head)
    assert client.answer().status == 401
    assert client.is_ended()


UPGRADE = (
    "connection: Upgrade, HTTP2-Settings",
    "http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    "upgrade: h2c",
)


def test_java_asks_for_http2_and_is_answered_in_http1(router: Deployment, client: Client) -> None:
    """As java.net.http.HttpClient sends its first request, which may have a body."""
    client.send(request("GET", "/live", *UPGRADE))
    assert client.answer().json() == {"status": "alive"}
    client.send(embed(1, *UPGRADE) + embed(2))
    assert number_in(client.answer()) == 1
    assert number_in(client.answer()) == 2
    client.send(request("POST", EMBED, "transfer-encoding: chunked", *UPGRADE), chunked([b'{"n"', b":3}"]))
    assert number_in(client.answer()) == 3
    for piece in (embed(4, *UPGRADE), embed(5)):
        client.send(*(piece[start : start + 40] for start in range(0, len(piece), 40)))
    assert [number_in(client.answer()) for _ in range(2)] == [4, 5]
    headers = {name.lower() for name in router.seen("embedding")["requests"][-2]["headers"]}
    assert headers.isdisjoint({"upgrade", "http2-settings", "connection"})


def test_it_is_not_a_proxy(client: Client) -> None:
    client.send(b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\nrubbish")
    assert client.answer().status == 405
    assert client.is_ended()


@pytest.mark.parametrize(
    ("target", "forwarded"),
    [
        (EMBED, EMBED),
        (f"http://other:1{EMBED}?a=b", f"{EMBED}?a=b"),
        (f"https://other{EMBED}", EMBED),
        ("/v1/%65mbeddings", "/v1/%65mbeddings"),
        ("/v1%2Fembeddings?", "/v1%2Fembeddings"),
    ],
)
def test_targets_of_one_path(client: Client, target: str, forwarded: str) -> None:
    answer = client.post(target, {"n": 1})
    assert number_in(answer) == 1
    assert answer.json()["path"] == forwarded


# --- what is not HTTP/1.1 ---

POST = b"POST /v1/embeddings HTTP/1.1\r\n" + AUTHORIZED


@pytest.mark.parametrize(
    "text",
    [
        POST + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}",
        POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        POST + b"content-length: 2, 2\r\n\r\n{}",
        POST + b"content-length: -2\r\n\r\n{}",
        POST + b"content-length: +2\r\n\r\n{}",
        POST + b"content-length: 2x\r\n\r\n{}",
        POST + b"content-length: \r\n\r\n{}",
        POST + b"content-length : 2\r\n\r\n{}",
        POST + b"content-length: 99999999999999999999999\r\n\r\n{}",
        POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        POST + b"transfer-encoding: identity\r\n\r\n{}",
        POST + b"transfer-encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked, identity\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\n2\n{}\n0\n\n",
        POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n",
        POST + b"x: a\r\n b\r\ncontent-length: 2\r\n\r\n{}",
        POST + b"x: a\0b\r\ncontent-length: 2\r\n\r\n{}",
        POST + b"x: a\rcontent-length: 2\r\n\r\n{}",
        POST + b"x y: 1\r\ncontent-length: 2\r\n\r\n{}",
        POST + b": 1\r\ncontent-length: 2\r\n\r\n{}",
        POST.replace(b"\r\n", b"\n") + b"content-length: 2\n\n{}",
        b"POST /v1/embeddings\0 HTTP/1.1\r\n\r\n",
        b"POST  HTTP/1.1\r\n\r\n",
        b"SHOUT /live HTTP/1.1\r\n\r\n",
        b"GET /live HTTP/1.2\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0" * 100,
    ],
)
def test_what_is_not_http_is_refused_and_closed(router: Deployment, text: bytes) -> None:
    before = len(router.seen("embedding")["requests"])
    with Client(router.ports["router"]) as client:
        client.send(text)
        answer = client.answer()
        assert (answer.status, code(answer), answer["connection"]) == (400, "bad_request", "close")
        assert client.is_ended()
    assert len(router.seen("embedding")["requests"]) == before


@pytest.mark.parametrize("text", [b"GET /live HTTP/2.0\r\n\r\n", b"GET /live\r\n\r\n"])
def test_another_version_is_refused(client: Client, text: bytes) -> None:
    client.send(text)
    assert client.answer().status == 505
    assert client.is_ended()


def test_nothing_behind_a_last_request_is_answered(client: Client) -> None:
    client.send(embed(1, "connection: close") + embed(2))
    assert number_in(client.answer()) == 1
    assert client.is_ended()


# --- too large ---


def test_a_long_target(client: Client) -> None:
    client.send(request("GET", "/live?" + "x" * 20_000))
    assert client.answer("GET").status == 414
    client.send(request("GET", "/live?" + "x" * 10_000))
    assert client.answer("GET").status == 200


@pytest.mark.parametrize("size", [70_000, 5 * MIB])
@pytest.mark.parametrize("header", ["x: {}", "{}: x"])
def test_a_large_head(client: Client, size: int, header: str) -> None:
    with contextlib.suppress(OSError):
        client.send(request("GET", "/live", header.format("x" * size)))
    answer = client.answer("GET")
    assert (answer.status, code(answer)) == (431, "headers_too_large")


def test_many_small_headers(client: Client) -> None:
    client.send(request("GET", "/live", *["a: b"] * 2_000))
    assert client.answer("GET").status == 200
    client.send(request("GET", "/live", *["a: b"] * 20_000))
    assert client.answer("GET").status == 431


def test_trailers_are_no_headers(router: Deployment, client: Client) -> None:
    trailers = b"x-request-id: of-a-trailer\r\nx-trailer: 1\r\n\r\n"
    client.send(request("POST", EMBED, "transfer-encoding: chunked") + b'7\r\n{"n":1}\r\n0\r\n' + trailers)
    answer = client.answer()
    assert number_in(answer) == 1
    assert answer["x-request-id"] != "of-a-trailer"
    headers = {name.lower() for name in router.seen("embedding")["requests"][-1]["headers"]}
    assert "x-trailer" not in headers


def test_endless_trailers(client: Client) -> None:
    client.send(request("POST", EMBED, "transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\n")
    with contextlib.suppress(OSError):
        for _ in range(20):
            client.send(b"x-trailer: " + b"x" * 50_000 + b"\r\n", b"")
    assert client.answer().status == 431


def test_a_connection_is_read_on_after_errors(client: Client) -> None:
    for number in range(3):
        assert client.post(EMBED, {"model": "none"}).status == 404
        assert client.get("/nowhere").status == 404
        client.send(post(EMBED, {}).replace(AUTHORIZED, b""))
        assert client.answer().status == 401
        client.send(request("POST", EMBED, body=b"{"))
        assert client.answer().status == 400
        assert number_in(client.post(EMBED, {"n": number})) == number


@pytest.mark.parametrize("length", [True, False])
def test_who_sends_too_much_can_read_why(client: Client, length: bool) -> None:
    """Closing at once would reset the connection, and the answer would be lost with what was not read."""
    body = b"x" * (4 * MIB)
    text = request("POST", EMBED, body=body)
    if not length:
        text = request("POST", EMBED, "transfer-encoding: chunked") + chunked([body[:50_000]] * 80)
    client.send(text)
    answer = client.answer()
    assert (answer.status, code(answer)) == (413, "request_too_large")
    assert client.is_ended()


# --- too slow: a server of this process, whose patience is short ---


class Tiny:
    """Answers every request with its body, and an upload with its size."""

    max_body_bytes = MIB

    def admit(self, request: Request) -> None:
        if request.path.startswith(b"/upload"):
            request.longest_upload = 2 * MIB

    def handle(self, request: Request, client: ClientConnection) -> Work:
        if request.path == b"/fails":
            raise ZeroDivisionError
        client.answer(200, [], request.body)
        return Nothing()

    def handle_upload(self, request: Request, client: ClientConnection) -> Upload:
        if request.path == b"/upload/fails":
            raise ZeroDivisionError
        if request.path == b"/upload/hangs":
            client.pause_reading()
        return Sized(client)

    def refused(self, request: Request, error: RequestError) -> None:
        pass

    def cors_headers(self, request: Request) -> bytes:
        return b""


class Nothing:
    def client_left(self) -> None:
        pass

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass


class Sized(Nothing):
    def __init__(self, client: ClientConnection) -> None:
        self.client = client
        self.size = 0

    def body_came(self, data: bytes) -> None:
        self.size += len(data)

    def body_ended(self) -> None:
        self.client.answer(200, [], b"%d" % self.size)

    def body_lost(self, error: RequestError) -> None:
        self.client.request.keep_alive = False
        self.client.answer(error.status, error.wire_headers(), error.body())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server that waits half a second for anything."""
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "IDLE_SECONDS", "STALLED_SECONDS", "LINGERING_SECONDS"):
        monkeypatch.setattr(server_module, name, 0.5)
    monkeypatch.setattr(server_module, "SLOWEST_BODY", 100 * MIB)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(Tiny())
    asyncio.run_coroutine_threadsafe(server.listen("127.0.0.1", 0), loop).result(10)
    assert server._listening is not None
    yield server._listening.sockets[0].getsockname()[1]
    asyncio.run_coroutine_threadsafe(server.close(1), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("begin", [b"", embed(1)], ids=["first", "second"])
@pytest.mark.parametrize(
    "text",
    [
        b"GET /li",
        b"GET / HTTP/1.1\r\nx: ",
        embed(1)[:-1],
        request("POST", "/", "transfer-encoding: chunked") + b"2\r\n{",
    ],
)
def test_a_slow_request_is_told_so(impatient: int, begin: bytes, text: bytes) -> None:
    with Client(impatient) as client:
        client.send(begin + text)
        if begin:
            assert client.answer().status == 200
        answer = client.answer()
        assert (answer.status, code(answer)) == (408, "request_timeout")
        assert client.is_ended()


def test_a_drip_does_not_extend_the_time(impatient: int) -> None:
    with Client(impatient) as client, pytest.raises(ConnectionError):
        client.send(b"GET / HTTP/1.1\r\n", *[b"x: y\r\n"] * 5000)


def test_who_says_nothing_is_closed_without_a_word(impatient: int) -> None:
    with Client(impatient) as client:
        assert client.is_ended()
    with Client(impatient) as client:
        assert client.post("/", 1).body == b"1"
        assert client.is_ended()
    with Client(impatient) as client:
        client.send(b"\r\n\r\n")
        assert client.is_ended()


def test_who_takes_nothing_is_cut(impatient: int) -> None:
    with Client(impatient) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):
            for _ in range(100):
                client.send(request("POST", "/", body=b"x" * (MIB - 1)))
        time.sleep(2)
        assert len(client.rest()) < 50 * MIB


def test_a_handler_that_fails_is_not_the_clients_fault(impatient: int) -> None:
    with Client(impatient) as client:
        for _ in range(2):
            answer = client.get("/fails")
            assert (answer.status, code(answer)) == (500, "internal_error")
        assert client.post("/", 1).body == b"1"


def test_an_upload_may_take_longer_than_any_silence_in_it(impatient: int) -> None:
    begun = time.monotonic()
    with Client(impatient) as client:
        client.send(request("POST", "/upload", "content-length: 40000"))
        for _ in range(40):
            client.send(b"x" * 1000)
            time.sleep(0.05)
        assert client.answer().body == b"40000"
        assert time.monotonic() - begun > 1.5  # three times what is waited for
        assert client.post("/", 1).body == b"1"


@pytest.mark.parametrize("head", ["content-length: 40000", "transfer-encoding: chunked"])
def test_an_upload_that_falls_silent_is_told_so(impatient: int, head: str) -> None:
    with Client(impatient) as client:
        client.send(request("POST", "/upload", head) + b"3e8\r\n" + b"x" * 1000)
        answer = client.answer()
        assert (answer.status, code(answer)) == (408, "request_timeout")
        assert client.is_ended()


def test_an_upload_that_nobody_takes_is_told_so(impatient: int) -> None:
    with Client(impatient) as client:
        client.send(request("POST", "/upload/hangs", body=b"x" * MIB))
        answer = client.answer()
        assert (answer.status, code(answer)) == (504, "upload_timeout")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (request("POST", "/upload", "content-length: 2097153"), 413),
        (request("POST", "/upload", "transfer-encoding: chunked") + chunked([b"x" * 300_000] * 8), 413),
        (request("POST", "/upload", "transfer-encoding: chunked") + b"2\r\nxx\r\nno size\r\n", 400),
        (request("POST", "/upload/fails", "content-length: 7") + b"x", 500),
    ],
)
def test_an_upload_that_is_refused(impatient: int, text: bytes, status: int) -> None:
    with Client(impatient) as client:
        client.send(text)
        answer = client.answer()
        assert (answer.status, answer["connection"]) == (status, "close")
        assert client.is_ended()


def test_uploads_between_other_requests(impatient: int) -> None:
    """They wait for their turn, whole or in part."""
    texts = (request("POST", "/", body=b"1"), request("POST", "/upload", body=b"x" * 70_000))
    with Client(impatient) as client:
        client.send(b"".join(texts * 2), *texts)
        for _ in range(3):
            assert [client.answer().body for _ in texts] == [b"1", b"70000"]


class Written(asyncio.Transport):
    """A transport to which pieces can be given as they are, which a socket may join or split."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.data += data

    def is_closing(self) -> bool:
        return False


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_what_stands_before_a_head_in_its_piece_is_no_part_of_it(size: int) -> None:
    transport = Written()

    async def come() -> None:
        connection = ClientConnection(Server(Tiny()))
        connection.connection_made(transport)
        first, second = request("POST", "/", body=b"x" * size), embed(2)
        for piece in (first[:500], first[500:] + second[:9], second[9:20], second[20:]):
            connection.data_received(piece)
            await asyncio.sleep(0)

    asyncio.run(come())
    assert transport.data.count(b"HTTP/1.1 200 OK") == 2
    assert transport.data.endswith(b'{"n": 2}')


# --- who reads slowly ---


def test_a_stream_waits_for_its_reader(router: Deployment) -> None:
    """200 MB from the engine, none of which is read at first."""
    piece, count = bytes(range(256)) * 4096, 200
    sent = 0

    def answer_all(connection: socket.socket, head: bytes, body: bytes) -> None:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(piece) * count))
        for _ in range(count):
            connection.sendall(piece)
            sent += 1

    process = psutil.Process(router.processes["router"].pid)
    with Engine(router.ports["raw"], answer_all), Client(router.ports["router"]) as client:
        before = process.memory_info().rss
        client.send(post(CHAT, {"model": "raw"}))
        eventually(lambda: sent)
        time.sleep(1)
        assert sent < 50
        assert process.memory_info().rss - before < 20 * MIB
        assert client.answer().body == piece * count


def test_pipelined_requests_wait_for_their_reader(router: Deployment) -> None:
    """Each answer is small; 1,000 of them that nobody reads are not."""

    def answer(connection: socket.socket, head: bytes, body: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 200000\r\n\r\n" + b"x" * 200_000)

    process = psutil.Process(router.processes["router"].pid)
    with Engine(router.ports["raw"], answer) as engine, Client(router.ports["router"]) as client:
        before = process.memory_info().rss
        client.send(post(CHAT, {"model": "raw"}) * 1_000)
        eventually(lambda: engine.requests)
        time.sleep(1)
        assert len(engine.requests) < 200
        assert process.memory_info().rss - before < 40 * MIB
        for _ in range(1_000):
            assert len(client.answer().body) == 200_000


# --- bodies ---


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("gzip", packed(b'{"n": 1}')),
        ("x-gzip", packed(b'{"n": 1}')),
        ("GZIP", packed(b'{"n": 1}')),
        ("deflate", zlib.compress(b'{"n": 1}')),
        ("identity", b'{"n": 1}'),
    ],
)
def test_a_compressed_body(router: Deployment, client: Client, name: str, body: bytes) -> None:
    client.send(request("POST", EMBED, f"content-encoding: {name}", body=body))
    assert number_in(client.answer()) == 1
    headers = {name.lower(): value for name, value in router.seen("embedding")["requests"][-1]["headers"].items()}
    assert headers.get("content-encoding") in (None, "identity")
    assert headers["content-length"] == str(len('{"n": 1,"model":"embedding"}'))


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("gzip", packed(b" " * (2 * MIB)), 413),
        ("deflate", zlib.compress(b" " * (2 * MIB)), 413),
        ("gzip", packed(b'{"n": 1}')[:-9], 400),
        ("gzip", packed(b'{"n": 1}')[:-1], 400),
        ("gzip", packed(b'{"n": 1}') + b"x", 400),
        ("gzip", b'{"n": 1}', 400),
        ("gzip", b"", 400),
        ("br", b"\x8b\x03\x80{}\x03", 415),
        ("gzip, gzip", packed(packed(b"{}")), 415),
    ],
)
def test_a_compressed_body_that_is_refused(client: Client, name: str, body: bytes, status: int) -> None:
    client.send(
        request("POST", EMBED, f"content-encoding: {name}", "content-length: 0" if not body else "x: y", body=body)
    )
    answer = client.answer()
    assert answer.status == status
    assert answer["x-error-source"] == "router"
    assert number_in(client.post(EMBED, {"n": 1})) == 1


@pytest.mark.parametrize("inner", ["1" * 5_000, "[" * 995 + "]" * 995])
@pytest.mark.parametrize("path", [EMBED, "/v1/rerank"])
def test_json_that_only_one_of_two_parsers_takes(router: Deployment, client: Client, inner: str, path: str) -> None:
    """The router must answer, whichever it is, and free the place that the request had."""
    body = f'{{"model": null, "n": 1, "query": "x", "documents": [{{"text": {inner}}}], "x": {inner}}}'
    client.send(request("POST", path, body=body.encode()))
    # An integer that needs no reading passes as it is.
    assert client.answer().status == (200 if path == EMBED and inner.isdigit() else 400)
    assert in_flight(router, "embedding") == 0
    assert number_in(client.post(EMBED, {"n": 1})) == 1


# --- headers ---


@pytest.mark.parametrize("path", ["/live", EMBED, "/v1/models", "/nowhere"])
def test_a_web_page_of_a_configured_origin(client: Client, path: str) -> None:
    client.send(request("GET", path, f"origin: {ORIGIN}"))
    answer = client.answer()
    assert answer["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer["access-control-expose-headers"]
    client.send(request("GET", path, "origin: https://evil.example"))
    answer = client.answer()
    assert answer.all("access-control-allow-origin") == []
    assert answer["vary"] == "origin"


@pytest.mark.parametrize(
    "text",
    [
        post(EMBED, {"n": 1}),
        post(EMBED, {"n": 1}).replace(AUTHORIZED, b""),
        post(EMBED, {"model": "none"}),
        request("POST", EMBED, body=b"x" * (2 * MIB)),
        request("GET", "/live?" + "x" * 20_000),
        post(CHAT, {"model": "trickles", "stream": True}),
    ],
)
def test_a_web_page_reads_errors_and_streams_too(client: Client, text: bytes) -> None:
    client.send(text.replace(b"host: router", b"host: router\r\norigin: " + ORIGIN.encode()))
    assert client.answer()["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize("path", [EMBED, "/v1/models", "/nowhere"])
def test_a_browser_asks_first_and_has_no_key(client: Client, path: str) -> None:
    asked = ("access-control-request-method: POST", "access-control-request-headers: authorization, x-stainless-os")
    for origin, allowed in ((ORIGIN, [ORIGIN]), ("https://evil.example", [])):
        client.send(request("OPTIONS", path, f"origin: {origin}", *asked).replace(AUTHORIZED, b""))
        answer = client.answer()
        assert answer.status == 204
        assert answer.all("content-length") == []
        assert answer.all("access-control-allow-origin") == allowed
        assert answer.all("access-control-allow-headers") == ["authorization, x-stainless-os"] * len(allowed)
        assert answer.all("access-control-allow-methods") == ["GET, POST, OPTIONS"] * len(allowed)
    client.send(request("OPTIONS", path, f"origin: {ORIGIN}").replace(AUTHORIZED, b""))
    assert client.answer().status == 401


def test_any_web_page_where_that_is_configured(deployment: Deployment) -> None:
    deployment.start({"embedding": {"type": "embedding"}}, cors_origins=["*"])
    with Client(deployment.ports["router"]) as client:
        for origin in ("https://a.example", "null"):
            client.send(embed(1, f"origin: {origin}"))
            assert client.answer()["access-control-allow-origin"] == origin
        client.send(embed(1))
        assert client.answer().all("access-control-allow-origin") == []


@pytest.mark.parametrize(
    ("given_id", "kept"),
    [
        ("a1-B.2_c:3", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("a;b", False),
        ("é", False),
        ("", False),
    ],
)
def test_the_request_id(router: Deployment, client: Client, given_id: str, kept: bool) -> None:
    answer = client.post(EMBED, {"n": 1}, f"x-request-id: {given_id}")
    sent = router.seen("embedding")["requests"][-1]["headers"]["x-request-id"]
    assert answer["x-request-id"] == sent
    assert (sent == given_id) is kept
    other = client.post(EMBED, {"n": 1}, f"x-request-id: {given_id}")["x-request-id"]
    assert (other == sent) is kept
    assert client.post(EMBED, {"model": "none"}, "x-request-id: mine")["x-request-id"] == "mine"


def test_headers_of_one_connection_stay_there(router: Deployment, client: Client) -> None:
    head = b""

    def answer(connection: socket.socket, asked: bytes, body: bytes) -> None:
        nonlocal head
        head = asked
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nconnection: x-theirs, Keep-Alive\r\nkeep-alive: timeout=5\r\nx-theirs: 1\r\n"
            b"proxy-authenticate: Basic\r\ntrailer: x\r\nupgrade: h2c\r\nserver: uvicorn\r\nset-cookie: a=b\r\n"
            b"access-control-allow-origin: *\r\nx-request-id: theirs\r\nx-served-by: them\r\nx-error-source: router\r\n"
            b"date: Thu, 01 Jan 1970 00:00:00 GMT\r\nx-ours: 2\r\ncontent-length: 2\r\n\r\n{}"
        )

    with Engine(router.ports["raw"], answer):
        ours = ("connection: keep-alive, X-Mine", "x-mine: 1", "keep-alive: timeout=5", "te: trailers", "trailer: x")
        more = (
            "proxy-authorization: Basic x",
            "proxy-connection: keep-alive",
            "cookie: a=b",
            "x-forwarded-for: 1.2.3.4",
        )
        last = (
            "accept-encoding: gzip",
            "x-api-key: secret",
            "x-yours: 2",
            "accept: x/y",
            "origin: https://evil.example",
        )
        came = client.post(CHAT, {"model": "raw"}, *ours, *more, *last)
    names = {line.partition(b":")[0] for line in head.split(b"\r\n")[1:]}
    assert names == {b"host", b"authorization", b"x-request-id", b"x-yours", b"accept", b"content-length"}
    assert head.count(b"authorization: Bearer " + API_KEY.encode()) == 1
    dropped = {"connection", "keep-alive", "x-theirs", "proxy-authenticate", "trailer", "upgrade", "set-cookie"}
    assert dropped.isdisjoint(name for name, _ in came.headers)
    assert came.all("access-control-allow-origin") == came.all("x-error-source") == []
    assert (came["server"], came["x-ours"], came["x-served-by"]) == ("uvicorn", "2", "raw")
    assert came["x-request-id"] != "theirs"
    assert "1970" not in came["date"]


def test_anthropics_clients(client: Client) -> None:
    """Their key's header, and their shape of an error, whoever refuses."""
    body = json.dumps({"model": "trickles", "stream": True}).encode()
    key = b"X-Api-Key: " + API_KEY.encode() + b"\r\n"
    client.send(request("POST", "/v1/messages", body=body).replace(AUTHORIZED, key))
    assert client.answer().status == 200
    refused = {
        401: request("POST", "/v1/messages", body=body).replace(AUTHORIZED, b"x-api-key: wrong\r\n"),
        404: post("/v1/messages", {"model": "none"}),
        400: request("POST", "/v1/messages", body=b"{"),
        415: request("POST", "/v1/messages", "content-encoding: br", body=b"{"),
        413: request("POST", "/v1/messages", body=b"x" * (2 * MIB)),
    }
    kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
    for status, text in refused.items():
        client.send(text)
        answer = client.answer()
        assert answer.status == status
        document = answer.json()
        assert set(document) == {"type", "error"}
        assert (document["type"], document["error"]["type"]) == ("error", kinds.get(status, "invalid_request_error"))


# --- the end ---


def test_it_ends_when_its_answers_have(deployment: Deployment) -> None:
    deployment.start({"chat": {"type": "chat", "fake": {"chunk_seconds": 0.15}}})
    port, process = deployment.ports["router"], deployment.processes["router"]
    with Client(port) as idle, Client(port) as busy, Client(port) as late:
        assert idle.get("/live").status == 200
        busy.send(post(CHAT, {"model": "chat", "stream": True}))
        assert busy.socket.recv(5) == b"HTTP/"
        head, body = post(CHAT, {"model": "chat"}).split(b"\r\n\r\n")
        late.send(head + b"\r\n\r\n")
        late.send(b"", body[:1])
        os.kill(process.pid, signal.SIGTERM)
        assert idle.is_ended()
        assert process.poll() is None
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        late.send(body[1:])
        answer = late.answer()
        assert (answer.status, late.is_ended()) == (200, True)
        assert busy.rest().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert process.wait(10) == 0


def test_an_answer_that_takes_too_long_is_cut(deployment: Deployment) -> None:
    deployment.start({"chat": {"type": "chat", "fake": {"chunk_seconds": 1}}})
    process = deployment.processes["router"]
    with Client(deployment.ports["router"]) as client:
        client.send(post(CHAT, {"model": "chat", "stream": True}))
        assert client.socket.recv(5) == b"HTTP/"
        os.kill(process.pid, signal.SIGTERM)
        assert not client.rest().endswith(b"0\r\n\r\n")
    assert process.wait(10) == 0
    eventually(lambda: deployment.seen("chat")["cancelled"] == 1)


def test_a_taken_port_is_one_line(deployment: Deployment) -> None:
    deployment.start({"chat": {"type": "chat", "fake": None}})
    process, port = deployment.processes["router"], deployment.ports["router"]
    process.terminate()
    assert process.wait(10) == 0
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(deployment.project.home), "VLLM_API_KEY": API_KEY}
    with listening(port):
        ended = subprocess.run(
            [sys.executable, "-m", "vllm_unified", "router"], env=environ, cwd=CHECKOUT, capture_output=True, timeout=60
        )
    assert ended.returncode == 1
    (line,) = ended.stderr.decode().splitlines()
    assert f"router.port: 0.0.0.0:{port}: " in line or f"router.port: 127.0.0.1:{port}: " in line


def test_a_cut_answer_is_noticed_by_this_files_client(router: Deployment) -> None:
    """What the tests above rely on."""
    ours, theirs = socket.socketpair()
    with Client(router.ports["router"]) as client, theirs:
        client.socket.close()
        client.socket = ours
        theirs.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab")
        theirs.close()
        with pytest.raises(CutError):
            client.answer()
