"""The router goes and comes back behind Nginx; in Docker with another address."""

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import API_KEY, CHECKOUT, Project, eventually, free_port
from tests.nginx.conftest import Nginx, write_nginx
from tests.router.conftest import Deployment
from tests.router.wire import Client, Engine, post

SECRET = "secret-of-a-client"
CHAT = "/v1/chat/completions"


def test_clients_see_clear_answers_while_the_router_restarts(deployment: Deployment) -> None:
    deployment.start({"chat": {"type": "chat"}}, nginx={"requests_per_second": 0})
    answers: list[httpx.Response] = []
    over = threading.Event()

    def ask() -> None:
        with nginx.client() as client:
            while not over.is_set():
                answers.append(client.post(CHAT, json={"model": "chat"}))
                time.sleep(0.005)

    with Nginx(deployment.project) as nginx:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        router = deployment.processes["router"]
        eventually(lambda: answers)
        router.send_signal(signal.SIGTERM)
        router.wait(20)
        with nginx.client() as client:
            down = client.post(CHAT, json={"model": "chat"}, headers={"x-request-id": "while-down"})
            page = client.get("/docs", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
            upload = client.post("/v1/embeddings", content=bytes(20 << 20))
        with deployment.log.open("ab") as log:
            environ = {"VLLM_UNIFIED_HOME": str(deployment.project.home), "VLLM_API_KEY": API_KEY}
            command = [sys.executable, "-m", "vllm_unified", "router"]
            deployment.processes["router"] = subprocess.Popen(
                command, env=environ, cwd=CHECKOUT, stdout=log, stderr=log
            )
        with nginx.client() as client:
            eventually(lambda: client.post(CHAT, json={"model": "chat"}).status_code == 200, 60)
        over.set()
        for thread in threads:
            thread.join()
        (line,) = eventually(lambda: [line for line in nginx.lines if line["id"] == "while-down"])

    assert (down.status_code, down.json()["error"]["code"], down.headers["retry-after"]) == (
        503,
        "router_not_ready",
        "5",
    )
    assert (down.headers["x-error-source"], down.headers["x-request-id"]) == ("nginx", "while-down")
    assert (line["status"], line["level"], line["upstream_status"]) == (503, "error", "502")
    assert (page.status_code, page.headers["content-type"]) == (503, "text/html")
    assert page.text == (CHECKOUT / "config" / "maintenance.html").read_text()
    assert upload.json() == down.json()
    assert {answer.status_code for answer in answers} == {200, 503}
    unclear = [answer for answer in answers if answer.status_code == 503 and "retry-after" not in answer.headers]
    assert unclear == []


@pytest.mark.parametrize("answer", [None, "", f"{SECRET}\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"])
def test_what_is_sent_is_not_in_its_output(project: Project, answer: str | None) -> None:
    """Where the router refuses the connection, hangs up, answers rubbish, or breaks off."""

    def hang_up(connection: socket.socket, *_: object) -> None:
        connection.sendall((answer or "").encode())
        raise OSError

    port = free_port()
    project.write({"chat": {"name": "chat", "type": "chat"}}, router={"port": port})
    asked = post(f"{CHAT}?api_key={SECRET}", {}, f"x-token: {SECRET}", "x-request-id: sent", "connection: close")
    with contextlib.nullcontext() if answer is None else Engine(port, hang_up), Nginx(project) as nginx:
        with Client(nginx.port) as client:
            client.send(asked)
            client.rest()
        eventually(lambda: [line for line in nginx.lines if line["id"] == "sent"])
    assert SECRET not in nginx.log.read_text()


class Names:
    """A DNS server that says `address` for every name, or that there is none."""

    def __init__(self) -> None:
        self.address: str | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]

    def __enter__(self) -> "Names":
        threading.Thread(target=self._answer, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                asked, client = self._socket.recvfrom(512)
                question = asked[12 : asked.index(b"\0", 12) + 5]
                flags, count = (0x8180, 1) if self.address else (0x8183, 0)
                answer = asked[:2] + struct.pack(">5H", flags, 1, count, 0, 0) + question
                if self.address:
                    answer += struct.pack(">3HIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton(self.address)
                self._socket.sendto(answer, client)


@contextlib.contextmanager
def in_docker(project: Project, names: Names, router: int) -> Iterator[Nginx]:
    """What the container of Nginx would run, with another DNS server and another folder for what it writes."""
    nginx = Nginx(project)
    project.write({"chat": {"name": "chat", "type": "chat"}}, router={"port": router})
    conf = write_nginx(project, VLLM_NGINX_PORT=str(nginx.port), VLLM_UNIFIED_RUNTIME="docker")
    text = conf.read_text().replace("resolver 127.0.0.11 ", f"resolver 127.0.0.1:{names.port} ")
    text = text.replace("/tmp/nginx", str(project.home / "run" / "nginx"))
    conf.write_text(text if os.geteuid() else f"user root;\n{text}")
    nginx.start(conf)
    try:
        yield nginx
    finally:
        nginx.stop()


def test_the_router_comes_back_at_another_address(project: Project) -> None:
    port = free_port()

    def answer_of(nginx: Nginx) -> str:
        answer = httpx.post(f"{nginx.url}/v1/x", json={}, timeout=20)
        assert answer.status_code in (200, 503)
        return answer.text if answer.status_code == 200 else answer.json()["error"]["code"]

    def says(word: bytes, host: str) -> Engine:
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(word), word)
        return Engine(port, lambda connection, *_: connection.sendall(head), host=host)

    with Names() as names, in_docker(project, names, port) as nginx:
        assert answer_of(nginx) == "router_not_ready"  # no such name, and it runs all the same
        with says(b"first", "127.0.0.1") as first:
            names.address = "127.0.0.1"
            eventually(lambda: answer_of(nginx) == "first")
            (head, _) = first.requests[-1]
            assert re.search(rb"(?i)\r\nx-forwarded-for: 127\.0\.0\.1\r\n", head)
            assert re.search(rb"(?i)\r\nconnection: close(\r\n|$)", head)
        assert answer_of(nginx) == "router_not_ready"
        with says(b"second", "127.0.0.2"):
            names.address = "127.0.0.2"
            eventually(lambda: answer_of(nginx) == "second")
