"""That the benchmark of the gateways measures what it says; how fast they are is not a test's business."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.router import programs, requests
from benchmarks.router.gateways import answers
from benchmarks.router.measures import Clients
from benchmarks.router.programs import Programs
from tests.conftest import API_KEY, CHECKOUT

pytestmark = pytest.mark.skipif(programs.compiler() is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def compiled() -> Iterator[Programs]:
    with programs.compiled() as found:
        yield found


@pytest.fixture
def port(compiled: Programs, tmp_path: Path) -> Iterator[int]:
    """Where the engine listens."""
    (port,) = programs.free_ports(1)
    command = [str(compiled.engine), str(port)]
    with programs.serving(command, {}, tmp_path / "log", lambda: answers(port, requests.chat(API_KEY))):
        yield port


@pytest.fixture
def clients(compiled: Programs, port: int) -> Clients:
    return Clients(compiled.load, port)


def counted(seen: dict[str, Any]) -> tuple[int, int]:
    return seen["complete"], seen["errors"]


def test_every_answer_is_counted(clients: Clients) -> None:
    wire = [requests.chat(API_KEY), requests.image(API_KEY, 3_000_000)]
    assert counted(clients.run(wire, connections=4, waves=3, each=5, seconds=20)) == (60, 0)


def test_answers_within_the_time_are_counted(clients: Clients) -> None:
    complete, errors = counted(clients.run([requests.chat(API_KEY)], connections=4, warm_up=0.1, seconds=0.2))
    assert complete > 0
    assert errors == 0


def test_streams_are_paced_and_counted(clients: Clients) -> None:
    wire = [requests.stream(API_KEY, 6, 20)]
    seen = clients.run(wire, connections=20, waves=2, each=1, seconds=20, marks=6, end="[DONE]")
    assert counted(seen) == (40, 0)
    assert seen["whole_ms"]["median"] - seen["first_ms"]["median"] >= 80


@pytest.mark.parametrize(("marks", "end"), [(5, "[DONE]"), (7, "[DONE]"), (6, "}")])
def test_an_answer_that_is_not_whole_is_an_error(clients: Clients, marks: int, end: str) -> None:
    wire = [requests.stream(API_KEY, 6, 1)]
    seen = clients.run(wire, connections=2, each=1, seconds=20, marks=marks, end=end)
    assert counted(seen) == (0, 2)


def test_an_answer_that_does_not_come_in_time_is_an_error(clients: Clients) -> None:
    wire = [requests.stream(API_KEY, 2, 60_000)]
    assert counted(clients.run(wire, connections=3, each=1, seconds=0.3, marks=2, end="[DONE]")) == (0, 3)


def test_a_gateway_that_is_not_there_is_an_error(compiled: Programs) -> None:
    clients = Clients(compiled.load, *programs.free_ports(1))
    assert counted(clients.run([requests.chat(API_KEY)], connections=2, each=3, seconds=5)) == (0, 6)


def test_the_engine_reads_a_body_in_chunks_and_in_pieces(port: int) -> None:
    pieces = [
        b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-",
        b"Encoding: chunked\r\n\r\n8\r\n",
        b'{"stream',
        b"\r\n1",
    ]
    pieces += [
        b'8;x=y\r\n":true,"max_tokens":2}\r',
        b"\n0\r\n",
        b"trailer: yes\r\n",
        b"\r\nGET /health HTTP/1.1\r\n\r\n",
    ]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while not answer.endswith(b"content-type: text/plain\r\n\r\n"):
            answer += connection.recv(65536) or pytest.fail(f"it ended after {answer!r}")
    assert answer.count(b"@word") == 2
    assert b"data: [DONE]\n\n\r\n0\r\n\r\nHTTP/1.1 200 OK" in answer


def test_ours_is_measured_without_an_error(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.router",
        "--quick",
        "--rounds",
        "1",
        "--only",
        "ours",
        "--json",
        str(found),
    ]
    printed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0, printed.stderr
    (figures,) = json.loads(found.read_text())["rounds"]
    assert figures["ours"]["errors"] == 0
    assert figures["ours"]["requests_per_second"] > 0
    assert figures["ours"]["mib_of_many_streams"] > 0
    assert "| ours |" in printed.stdout
