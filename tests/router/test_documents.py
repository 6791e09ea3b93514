"""The document service's paths: its requests and answers pass through the router, and neither stays there."""

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from tests.conftest import API_KEY, eventually, free_port
from tests.router.conftest import Deployment, is_listening
from tests.router.wire import AUTHORIZED, Client, CutError, chunked, post, request
from vllm_unified.router.documents import FORM_MIB, is_from_here, pattern_of
from vllm_unified.router.server import Request
from vllm_unified.settings.keys import add_key, hash_of

MIB = 1 << 20
LONGEST_MIB = 320
CHAT = "/v1/chat/completions"
KEYS: dict[str, dict[str, Any]] = {
    "alice": {"models": ["reader"]},
    "bob": {"models": ["talker"]},
    "carol": {"requests_per_minute": 2, "max_concurrent": 1},
    "dave": {"max_concurrent": 1},
    "erin": {"expires": "2020-01-01"},
    "frank": {"models": ["reader"], "tokens_per_day": 10},
    "grace": {"tokens_per_day": 10},
}


class Service:
    """What the document service is to the router: uvicorn, and an application that does what its path says."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[dict[str, Any]] = []
        self.received = 0  # bytes of bodies
        self.sent = 0
        self.incomplete = 0  # requests that ended before they were whole
        self.left = 0  # clients that did not wait for the end of the answer
        self.go = threading.Event()
        config = uvicorn.Config(
            self.answer, port=port, interface="asgi3", log_level="critical", ws="none", lifespan="off", http="httptools"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> "Service":
        self._thread.start()
        eventually(lambda: is_listening(self.port))
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        seen = {**scope, "headers": [(name.decode(), value.decode()) for name, value in scope["headers"]]}
        self.requests.append(seen)
        await getattr(self, "do_" + scope["path"].rpartition("/")[2].replace(".", "_"), self.echo)(seen, receive, send)

    async def echo(self, seen: dict[str, Any], receive: Any, send: Any) -> None:
        digest, size, more = hashlib.sha256(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.incomplete += 1
                return
            body, more = message.get("body", b""), message.get("more_body", False)
            size += len(body)
            self.received += len(body)
            digest.update(body)
        await respond(send, 200, {"size": size, "sha256": digest.hexdigest()})

    async def do_metrics(self, seen: dict[str, Any], receive: Any, send: Any) -> None:
        text = b"vllm_unified_documents_pages_waiting 7\n"
        await begin(send, [(b"content-length", b"%d" % len(text))])
        await send({"type": "http.response.body", "body": text})

    async def do_openapi_json(self, seen: dict[str, Any], receive: Any, send: Any) -> None:
        paths = {"/v1/ocr": {"post": {"responses": {"200": {"description": "of the service"}}}}, "/metrics": {}}
        await respond(send, 200, {"paths": paths, "components": {"schemas": {"Asked": {}, "Error": {}}}})

    async def do_slow(self, seen: dict[str, Any], receive: Any, send: Any) -> None:
        while not self.go.is_set():  # noqa: ASYNC110 - of another thread
            await asyncio.sleep(0.01)
        await self.echo(seen, receive, send)

    async def do_refuses(self, seen: dict[str, Any], receive: Any, send: Any) -> None:
        await respond(send, 413, {"why": "too many pages"})

    async def do_fails(self, seen: dict[str, Any], receive: Any, send: Any) -> None:
        await respond(send, 500, {"why": "a defect"})

    async def do_breaks(self, seen: dict[str, Any], receive: Any, send: Any) -> None:
        await begin(send, [(b"content-length", b"10")])
        await send({"type": "http.response.body", "body": b"12345", "more_body": True})
        raise ConnectionError

    async def do_events(self, seen: dict[str, Any], receive: Any, send: Any) -> None:
        await begin(send, [(b"content-type", b"text/event-stream")])
        number = 0
        leaving = asyncio.create_task(wait_until_left(receive))
        while not leaving.done():
            if number == 0 or self.go.is_set():
                number += 1
                await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
                self.go.clear()
            await asyncio.sleep(0.01)
        self.left += 1

    async def do_result_zip(self, seen: dict[str, Any], receive: Any, send: Any) -> None:
        piece = bytes(MIB)
        await begin(send, [(b"content-length", b"%d" % (200 * MIB)), (b"etag", b'"x"')])
        for number in range(200):
            await send({"type": "http.response.body", "body": piece, "more_body": number < 199})
            self.sent += MIB


async def begin(send: Any, headers: list[tuple[bytes, bytes]], status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def respond(send: Any, status: int, document: Any) -> None:
    body = json.dumps(document).encode()
    await begin(send, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))], status)
    await send({"type": "http.response.body", "body": body})


async def wait_until_left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@pytest.fixture(scope="module")
def router(lasting: Deployment) -> Deployment:
    lasting.ports["documents"] = free_port()
    for name, fields in KEYS.items():
        add_key(lasting.project.home, {"name": name, "hash": hash_of(f"sk-{name}"), **fields})
    lasting.start(
        {
            "reader": {"type": "ocr", "fake": {"golden": "right"}},
            "talker": {"type": "chat"},
            "hangs": {"type": "chat", "fake": {"hang": True}},
        },
        documents={"port": lasting.ports["documents"], "max_upload_mib": LONGEST_MIB - FORM_MIB},
        max_body_mib=1,
        cors_origins=["*"],
    )
    return lasting


@pytest.fixture
def service(router: Deployment) -> Iterator[Service]:
    with Service(router.ports["documents"]) as service:
        yield service


@pytest.fixture
def client(router: Deployment) -> Iterator[Client]:
    with Client(router.ports["router"]) as client:
        yield client


def sent_by(name: str, text: bytes) -> bytes:
    return text.replace(API_KEY.encode(), f"sk-{name}".encode())


def headers_of(seen: dict[str, Any], name: str) -> list[str]:
    return [value for each, value in seen["headers"] if each == name]


def rss(router: Deployment) -> int:
    return psutil.Process(router.processes["router"].pid).memory_info().rss


def log_of(router: Deployment, request_id: str) -> dict[str, Any]:
    def line() -> dict[str, Any] | None:
        lines = router.log.read_text().splitlines()
        return next((json.loads(each) for each in lines if f'"id":"{request_id}"' in each), None)

    found: dict[str, Any] = eventually(line)
    return found


# --- paths ---


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("/api/ocr/image", "/api/ocr/image"),
        ("/api/tasks", "/api/tasks"),
        ("/api/tasks/4f1c", "/api/tasks/{id}"),
        ("/api/tasks/4f1c/events", "/api/tasks/{id}/events"),
        ("/api/tasks/4f1c/download/images/page-1-img-1.jpg", "/api/tasks/{id}/download/{path}"),
        ("/api/tasks/4f1c/anything", "/api/{path}"),
        ("/api/anything", "/api/{path}"),
        ("/v1/ocr", "/v1/ocr"),
        ("/convert/url", "/convert/url"),
        ("/internal/infer", "/internal/infer"),
        ("/api", None),
        ("/v1/ocr/", None),
        ("/convert/other", None),
        ("/internal/other", None),
        (CHAT, None),
    ],
)
def test_a_path_has_one_of_a_few_names(path: str, pattern: str | None) -> None:
    assert pattern_of(path.encode()) == pattern


@pytest.mark.parametrize(
    ("peer", "headers", "is_here"),
    [
        ("127.0.0.1", [], True),
        ("127.8.8.8", [], True),
        ("::1", [], True),
        ("::ffff:127.0.0.1", [], True),
        ("10.0.0.1", [], False),
        ("::ffff:10.0.0.1", [], False),
        ("", [], False),
        ("127.0.0.1", [(b"x-forwarded-for", b"127.0.0.1")], False),
    ],
)
def test_who_is_on_this_machine(peer: str, headers: list[tuple[bytes, bytes]], is_here: bool) -> None:
    assert is_from_here(Request("POST", b"/internal/infer", "1.1", headers, peer, keep_alive=True)) is is_here


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/tasks?limit=3"),
        ("DELETE", "/api/tasks/7%2e"),
        ("PUT", "/api/anything"),
        ("POST", "/convert/file"),
        ("POST", "/v1/ocr"),
    ],
)
def test_a_request_passes_as_it_is(service: Service, client: Client, method: str, path: str) -> None:
    client.send(request(method, path, "accept-encoding: gzip", "idempotency-key: 7", body=b"{}" * (method != "GET")))
    answer = client.answer()
    assert (answer.status, answer["x-served-by"]) == (200, "documents")
    (seen,) = service.requests
    query = b"?" + seen["query_string"] if seen["query_string"] else b""
    assert (seen["method"], (seen["raw_path"] + query).decode()) == (method, path)
    assert headers_of(seen, "accept-encoding") == ["gzip"]
    assert headers_of(seen, "idempotency-key") == ["7"]
    assert client.get("/api/tasks").status == 200  # over the same connection


def test_the_routers_documentation_has_the_services_paths(service: Service, client: Client) -> None:
    document = json.loads(client.get("/openapi.json").body)
    assert document["paths"]["/v1/ocr"]["post"]["responses"] == {"200": {"description": "of the service"}}
    assert document["paths"]["/metrics"]["get"]  # the router's own
    assert document["components"]["schemas"].keys() >= {"Asked", "Error", "AnthropicError"}
    assert document["components"]["schemas"]["Error"]
    assert service.requests[0]["path"] == "/openapi.json"


def test_the_services_metrics_are_for_admins(service: Service, client: Client) -> None:
    answer = client.get("/metrics/documents")
    assert (answer.status, answer.body) == (200, b"vllm_unified_documents_pages_waiting 7\n")
    targets = [each["labels"] for each in json.loads(client.get("/sd").body)]
    assert {"type": "documents", "__metrics_path__": "/metrics/documents"} in targets
    client.send(sent_by("alice", request("GET", "/metrics/documents")))
    assert client.answer().status == 403


def test_a_service_that_is_away_takes_nothing_with_it(router: Deployment, client: Client) -> None:
    document = json.loads(client.get("/openapi.json").body)
    assert "/v1/chat/completions" in document["paths"]
    assert "/v1/ocr" not in document["paths"]
    answer = client.get("/metrics/documents")
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "documents_not_ready")


def test_head_has_no_body(service: Service, client: Client) -> None:
    client.send(request("HEAD", "/api/tasks/7"))
    answer = client.answer("HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer["content-length"]) > 0
    assert client.get("/api/tasks").status == 200


def test_a_page_of_another_origin_may_delete(client: Client) -> None:
    asked = ("origin: https://app.example", "access-control-request-method: DELETE")
    client.send(request("OPTIONS", "/api/tasks/7", *asked).replace(AUTHORIZED, b""))
    assert "DELETE" in client.answer()["access-control-allow-methods"]


# --- uploads ---


def test_a_large_upload_is_never_here_as_a_whole(router: Deployment, service: Service, client: Client) -> None:
    piece, count = bytes(4 * MIB), 75
    before, most = rss(router), 0
    client.send(request("POST", "/api/ocr/pdf", f"content-length: {count * len(piece)}"))
    for _ in range(count):
        client.send(piece)
        most = max(most, rss(router))
    answer = client.answer()
    assert answer.json() == {"size": 300 * MIB, "sha256": hashlib.sha256(bytes(300 * MIB)).hexdigest()}
    assert most - before < 40 * MIB


def test_a_slow_service_holds_its_client_back(router: Deployment, service: Service, client: Client) -> None:
    before = rss(router)
    client.send(request("POST", "/api/slow", f"content-length: {200 * MIB}"))
    client.socket.settimeout(1)
    sent, piece = 0, bytes(MIB)
    with contextlib.suppress(TimeoutError):
        while sent < 200 * MIB:
            sent += client.socket.send(piece)
    assert sent < 60 * MIB  # in the buffers of four sockets
    assert rss(router) - before < 20 * MIB
    client.socket.settimeout(20)
    service.go.set()
    while sent < 200 * MIB:
        sent += client.socket.send(piece[: 200 * MIB - sent])
    assert client.answer().json()["size"] == 200 * MIB
    assert client.get("/api/tasks").status == 200


def test_pieces_are_passed_on_as_they_come(service: Service, client: Client) -> None:
    client.send(request("POST", "/api/ocr/pdf", "content-length: 10") + b"12345")
    eventually(lambda: service.received == 5)
    client.send(b"67890")
    assert client.answer().json()["size"] == 10


@pytest.mark.parametrize("size", [0, 5, 400_000])
def test_a_chunked_upload(service: Service, client: Client, size: int) -> None:
    pieces = [b"x" * size, b"y" * 3]
    client.send(request("POST", "/api/ocr/pdf", "transfer-encoding: chunked"), chunked(pieces))
    assert client.answer().json()["sha256"] == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert headers_of(service.requests[0], "transfer-encoding") == ["chunked"]
    assert client.get("/api/tasks").status == 200


def test_an_upload_a_byte_at_a_time(service: Service, client: Client) -> None:
    text = request("POST", "/api/ocr/pdf", "transfer-encoding: chunked") + b"3\r\n123\r\n0\r\nx-trailer: 1\r\n\r\n"
    client.send(*(text[place : place + 1] for place in range(len(text))))
    assert client.answer().json()["size"] == 3
    assert client.get("/api/tasks").status == 200


def test_a_chunk_that_is_none_is_the_clients_fault(service: Service, client: Client) -> None:
    client.send(request("POST", "/api/ocr/pdf", "transfer-encoding: chunked") + b"5\r\n12345\r\n")
    eventually(lambda: service.received == 5)
    client.send(b"none\r\n")
    answer = client.answer()
    assert (answer.status, answer["x-error-source"]) == (400, "router")
    eventually(lambda: service.incomplete == 1)


@pytest.mark.parametrize("leaves", ["closes", "resets"])
def test_a_client_that_leaves_half_way(router: Deployment, service: Service, leaves: str) -> None:
    head = request("POST", "/api/ocr/pdf", "content-length: 5000000", f"x-request-id: {leaves}")
    with Client(router.ports["router"]) as client:
        client.send(head + bytes(100_000))
        eventually(lambda: service.received == 100_000)
        if leaves == "resets":
            client.socket.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER of no seconds
    eventually(lambda: service.incomplete == 1)
    line = log_of(router, leaves)
    assert (line["status"], line["error"], line["bytes_in"]) == (0, "client", 100_000)


def test_nothing_stays_of_clients_that_vanish(router: Deployment, service: Service) -> None:
    """In every moment of an upload, and of its answer."""
    process = psutil.Process(router.processes["router"].pid)
    before = process.num_fds()
    upload = request("POST", "/api/ocr/pdf", f"content-length: {MIB}") + bytes(MIB)
    texts = [upload[:size] for size in (50, len(upload) - MIB, 1000, 500_000, len(upload))]
    texts += [upload.replace(b"/api/ocr/pdf", b"/api/slow"), request("GET", "/api/tasks/7/events")]
    texts += [request("GET", "/api/tasks/7/download/result.zip")]
    for text in texts * 4:
        with Client(router.ports["router"]) as client:
            client.send(text)
            time.sleep(0.01)
    service.go.set()
    eventually(lambda: process.num_fds() <= before)
    with Client(router.ports["router"]) as client:
        assert client.get("/api/tasks").status == 200


def test_it_is_asked_for_when_the_service_is_there(service: Service, client: Client) -> None:
    client.send(request("POST", "/api/ocr/pdf", "expect: 100-continue", "content-length: 3"))
    assert client.answer().status == 100
    client.send(b"123")
    assert client.answer().json()["size"] == 3
    assert headers_of(service.requests[0], "expect") == []


@pytest.mark.parametrize("status", [401, 413, 503])
def test_it_is_not_asked_for_when_it_is_refused(client: Client, status: int) -> None:
    length = (LONGEST_MIB << 20) + (1 if status == 413 else 0)
    text = request("POST", "/api/ocr/pdf", "expect: 100-continue", f"content-length: {length}")
    client.send(text.replace(AUTHORIZED, b"") if status == 401 else text)
    answer = client.answer()
    assert (answer.status, answer["x-error-source"]) == (status, "router")
    if status == 413:
        assert "larger than 320 MiB (documents.max_upload_mib)" in answer.json()["error"]["message"]


def test_an_answer_before_the_end_of_the_upload(service: Service, client: Client) -> None:
    client.send(request("POST", "/api/refuses", f"content-length: {100 * MIB}"))
    with contextlib.suppress(OSError):
        for _ in range(100):  # as most clients, it looks for an answer when it has sent all
            client.send(bytes(MIB))
    answer = client.answer()
    assert (answer.status, answer.json()) == (413, {"why": "too many pages"})
    assert (answer["x-error-source"], answer["connection"]) == ("documents", "close")


def test_a_chunked_upload_without_an_end(service: Service, client: Client) -> None:
    client.send(request("POST", "/api/ocr/pdf", "transfer-encoding: chunked"))
    piece = bytes(MIB)
    with contextlib.suppress(OSError):
        for _ in range(LONGEST_MIB + 20):
            client.send(b"%x\r\n%b\r\n" % (MIB, piece))
    assert client.answer().status == 413
    eventually(lambda: service.incomplete == 1)


# --- answers ---


def test_an_event_passes_at_once(router: Deployment, service: Service) -> None:
    with Client(router.ports["router"]) as client:
        client.send(request("GET", "/api/tasks/7/events"))
        assert b"content-type: text/event-stream" in client._until(b"\r\n\r\n")
        for number in (1, 2, 3):
            assert client._until(b"\n\n\r\n") == b"9\r\ndata: %d\n\n\r\n" % number
            service.go.set()
    eventually(lambda: service.left == 1)


def test_a_large_download_waits_for_its_reader(router: Deployment, service: Service, client: Client) -> None:
    before = rss(router)
    client.send(request("GET", "/api/tasks/7/download/result.zip"))
    eventually(lambda: service.sent)
    time.sleep(0.5)
    assert service.sent < 60 * MIB
    most, rest = rss(router), 200 * MIB
    head = client._until(b"\r\n\r\n").decode()
    assert f"content-length: {rest}\r\n" in head
    assert 'etag: "x"\r\n' in head
    while rest:
        rest -= len(client._exactly(min(rest, 4 * MIB)))
        most = max(most, rss(router))
    assert most - before < 40 * MIB
    assert client.get("/api/tasks").status == 200


def test_an_error_of_the_service_says_so(router: Deployment, service: Service, client: Client) -> None:
    answer = client.get("/api/fails", "x-request-id: defect")
    assert (answer.status, answer["x-error-source"], answer.json()) == (500, "documents", {"why": "a defect"})
    assert log_of(router, "defect")["error"] == "documents"


def test_an_answer_that_breaks_off_does_not_look_whole(service: Service, client: Client) -> None:
    with pytest.raises(CutError):
        client.get("/api/breaks")


def test_without_the_service(router: Deployment, client: Client) -> None:
    for _ in range(2):
        answer = client.get("/api/tasks")
        assert (answer.status, answer["x-error-source"], answer["retry-after"]) == (503, "router", "5")
        message = "the document service does not answer on its port; try again"
        assert answer.json()["error"] == {
            "message": message,
            "type": "server_error",
            "param": None,
            "code": "documents_not_ready",
        }
    client.send(request("POST", "/api/ocr/pdf", body=bytes(MIB)))
    assert client.answer().status == 503
    with router.client() as http:
        assert http.get("/health").status_code == 200


# --- keys ---


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        (None, 401, "no API key"),
        ("nobody", 401, "wrong API key"),
        ("erin", 401, "API key expired on 2020-01-01"),
        ("bob", 403, 'this API key may not use "reader", which reads documents'),
        ("alice", 200, ""),
        ("dave", 200, ""),
    ],
)
def test_who_is_let_in(service: Service, client: Client, name: str | None, status: int, message: str) -> None:
    text = request("POST", "/api/ocr/image", body=b"x" * 1000)
    client.send(sent_by(name, text) if name else text.replace(AUTHORIZED, b""))
    answer = client.answer()
    assert answer.status == status
    if message:
        assert message in answer.json()["error"]["message"]
        assert service.requests == []
    else:
        assert headers_of(service.requests[0], "x-api-key-name") == [name]


def test_what_the_service_is_told(service: Service, client: Client) -> None:
    """Whatever the client says of itself."""
    lies = ("X-Api-Key-Name: deployment", "x-api-key-name: root", "x-api-key-admin: 1", "x-forwarded-for: 9.9.9.9")
    more = ("x-api-key: sk-other", "x-internal-token: guess", "x-on-behalf-of: bob", "connection: x-mine", "x-mine: 1")
    client.send(sent_by("alice", request("GET", "/api/tasks", "x-request-id: mine", *lies, *more)))
    assert client.answer()["x-request-id"] == "mine"
    (seen,) = service.requests
    told = {
        "x-api-key-name": ["alice"],
        "x-api-key-admin": ["0"],
        "x-forwarded-for": ["9.9.9.9"],  # it comes from this machine, where a proxy may be
        "x-request-id": ["mine"],
        "authorization": [f"Bearer {API_KEY}"],
        "x-api-key": [],
        "x-internal-token": [],
        "x-on-behalf-of": [],
        "x-mine": [],
    }
    assert {name: headers_of(seen, name) for name in told} == told
    client.get("/api/tasks")
    assert headers_of(service.requests[1], "x-api-key-name") == ["deployment"]
    assert headers_of(service.requests[1], "x-api-key-admin") == ["1"]


def test_the_services_own_token_is_a_key_for_its_own_path(service: Service, client: Client) -> None:
    def status(path: str, *headers: str) -> int:
        client.send(request("POST", path, *headers, body=b"{}").replace(AUTHORIZED, b""))
        return client.answer().status

    token = "x-internal-token: t"
    assert status("/internal/infer", token) == 200
    (seen,) = service.requests
    assert headers_of(seen, "x-internal-token") == ["t"]
    assert (headers_of(seen, "x-api-key-name"), headers_of(seen, "x-api-key-admin")) == ([], ["0"])
    assert status("/internal/infer") == 401
    assert status("/api/ocr/image", token) == 401
    assert status("/internal/infer", token, "x-forwarded-for: 10.0.0.1") == 403
    assert len(service.requests) == 1


def test_a_document_is_one_request_and_a_look_at_it_none(service: Service, client: Client) -> None:
    submit = sent_by("carol", request("POST", "/api/ocr/pdf", body=b"x"))
    look = sent_by("carol", request("GET", "/api/tasks/7"))
    statuses = []
    for text in (look, submit, look, submit, look, look):
        client.send(text)
        statuses.append(client.answer().status)
    assert statuses == [200] * 6
    client.send(submit)
    answer = client.answer()
    assert answer.status == 429
    assert int(answer["retry-after"]) > 0
    assert "requests_per_minute" in answer.json()["error"]["message"]


def test_a_document_takes_no_place_from_its_pages(router: Deployment, service: Service, client: Client) -> None:
    """Of a key that may have one request at a time."""
    document = sent_by("dave", request("POST", "/api/ocr/pdf", body=b"x"))
    client.send(document.replace(b"/api/ocr/pdf", b"/api/slow"))
    eventually(lambda: service.requests)
    assert on_behalf(router, "dave").status_code == 200
    with Client(router.ports["router"]) as page:
        page.send(post(CHAT, {"model": "hangs"}, "x-on-behalf-of: dave"))
        eventually(lambda: router.seen("hangs")["requests"])
        answer = on_behalf(router, "dave")
        assert answer.status_code == 429
        assert "max_concurrent" in answer.json()["error"]["message"]
        with Client(router.ports["router"]) as second:
            second.send(document)
            assert second.answer().status == 200
    service.go.set()
    assert client.answer().status == 200


# --- on behalf of a key ---


def on_behalf(router: Deployment, name: str, key: str = API_KEY, model: str = "reader") -> httpx.Response:
    with router.client(key) as http:
        return http.post(CHAT, json={"model": model, "stream": True}, headers={"x-on-behalf-of": name})


def used(router: Deployment, key: str) -> int:
    """Requests, today."""
    with router.client() as http:
        day = datetime.now(UTC).date()
        rows = http.get("/usage", params={"key": key, "from": str(day - timedelta(1)), "to": str(day)}).json()["data"]
    return sum(row["requests"] for row in rows)


def test_pages_are_charged_to_the_key_that_sent_the_document(router: Deployment) -> None:
    before = used(router, "frank"), used(router, "deployment")
    assert on_behalf(router, "frank").status_code == 200
    assert (used(router, "frank"), used(router, "deployment")) == (before[0] + 1, before[1])
    answer = on_behalf(router, "frank")  # the first one used all ten tokens
    assert answer.status_code == 429
    assert 'the key "frank" may use 10 tokens a day' in answer.json()["error"]["message"]
    assert on_behalf(router, "deployment").status_code == 200
    assert used(router, "deployment") == before[1] + 1
    seen = router.seen("reader")["requests"][-1]["headers"]
    assert "x-on-behalf-of" not in {name.lower() for name in seen}


@pytest.mark.parametrize(
    ("name", "model", "status", "message"),
    [
        ("bob", "reader", 403, 'may not use "reader"'),
        ("nobody", "reader", 401, 'x-on-behalf-of: there is no key "nobody"'),
        ("", "reader", 401, 'x-on-behalf-of: there is no key ""'),
        ("erin", "reader", 401, "API key expired"),
    ],
)
def test_on_behalf_of_whom_it_does_not_pass(
    router: Deployment, name: str, model: str, status: int, message: str
) -> None:
    answer = on_behalf(router, name, model=model)
    assert (answer.status_code, answer.headers["x-error-source"]) == (status, "router")
    assert message in answer.json()["error"]["message"]


def test_only_the_deployments_own_key_speaks_for_others(router: Deployment) -> None:
    before = used(router, "grace"), used(router, "alice")
    assert on_behalf(router, "grace", key="sk-alice").status_code == 200
    assert (used(router, "grace"), used(router, "alice")) == (before[0], before[1] + 1)
    seen = router.seen("reader")["requests"][-1]["headers"]
    assert "x-on-behalf-of" not in {name.lower() for name in seen}


# --- what is known of it afterwards ---


def test_a_line_and_a_count(router: Deployment, service: Service, client: Client) -> None:
    client.send(sent_by("alice", request("POST", "/api/ocr/pdf", "x-request-id: noted", body=b"x" * 50)))
    assert client.answer().status == 200
    line = log_of(router, "noted")
    assert (line["key"], line["path"], line["status"], line["bytes_in"]) == ("alice", "/api/ocr/pdf", 200, 50)
    client.get("/api/tasks/0815/download/a/b")
    with router.client() as http:
        text = http.get("/metrics").text
    assert 'path="/api/tasks/{id}/download/{path}"' in text
    assert "0815" not in text
