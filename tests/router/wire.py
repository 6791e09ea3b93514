"""Both ends of the router as bare sockets: a client that sends any bytes, and an engine that answers any."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.conftest import API_KEY

AUTHORIZED = f"authorization: Bearer {API_KEY}\r\n".encode()


class CutError(Exception):
    """The connection ended within an answer, or before it."""


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""

    def __getitem__(self, name: str) -> str:
        (value,) = self.all(name)
        return value

    def all(self, name: str) -> list[str]:
        return [value for each, value in self.headers if each == name]

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection. Answers are read strictly: a byte too few raises CutError, one too many is the next answer's."""

    def __init__(self, port: int, seconds: float = 20, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), seconds, (source, 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *pieces: bytes) -> None:
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(0.002)  # so that they don't arrive as one
            self.socket.sendall(piece)

    def post(self, path: str, document: Any, *headers: str) -> Answer:
        self.send(post(path, document, *headers))
        return self.answer()

    def get(self, path: str, *headers: str) -> Answer:
        self.send(request("GET", path, *headers))
        return self.answer()

    def answer(self, method: str = "POST") -> Answer:
        head = self._until(b"\r\n\r\n")
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        fields = (line.partition(": ") for line in lines)
        answer = Answer(int(status), [(name.lower(), value) for name, _, value in fields])
        if method == "HEAD" or answer.status < 200 or answer.status in (204, 304):
            return answer
        lengths, codings = answer.all("content-length"), answer.all("transfer-encoding")
        assert len(lengths) + len(codings) < 2, "two lengths"
        if codings:
            assert codings == ["chunked"]
            answer.body = b"".join(self._chunks())
        elif lengths:
            answer.body = self._exactly(int(lengths[0]))
        else:
            answer.body = self.rest()
        return answer

    def rest(self) -> bytes:
        """All that comes until the other side closes."""
        with contextlib.suppress(CutError):
            while True:
                self._more()
        rest, self._rest = self._rest, b""
        return rest

    def is_ended(self) -> bool:
        """Whether the other side closes, and says nothing more before."""
        return self.rest() == b""

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._until(b"\r\n"), 16):
            yield self._exactly(size)
            assert self._exactly(2) == b"\r\n"
        assert self._exactly(2) == b"\r\n"

    def _until(self, end: bytes) -> bytes:
        while end not in self._rest:
            self._more()
        found, _, self._rest = self._rest.partition(end)
        return found + end

    def _exactly(self, size: int) -> bytes:
        parts, have = [self._rest], len(self._rest)
        self._rest = b""
        while have < size:
            self._more()
            parts.append(self._rest)
            have += len(self._rest)
            self._rest = b""
        whole = b"".join(parts)
        self._rest = whole[size:]
        return whole[:size]

    def _more(self) -> None:
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionError as error:
            raise CutError(str(error)) from None
        if not data:
            raise CutError("closed")
        self._rest += data


def request(method: str, path: str, *headers: str, body: bytes = b"", version: str = "HTTP/1.1") -> bytes:
    """With the key, and with a content-length where there is a body."""
    lines = [f"{method} {path} {version}", "host: router", *headers]
    length = f"content-length: {len(body)}\r\n".encode() if body else b""
    return "\r\n".join(lines).encode("latin-1") + b"\r\n" + AUTHORIZED + length + b"\r\n" + body


def post(path: str, document: Any, *headers: str) -> bytes:
    return request("POST", path, *headers, body=json.dumps(document).encode())


def chunked(pieces: Iterable[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


@dataclass
class Engine:
    """Answers GET with 200, and POST as `behave` says, which writes to the socket what it likes.

    Its connection is kept when `behave` returns, and closed when it raises OSError. `gone`: how many of the
    router's connections ended.
    """

    port: int
    behave: Callable[[socket.socket, bytes, bytes], None]
    requests: list[tuple[bytes, bytes]] = field(default_factory=list)
    gone: int = 0
    connections: list[socket.socket] = field(default_factory=list)
    host: str = "127.0.0.1"

    def __enter__(self) -> "Engine":
        self._listening = socket.create_server((self.host, self.port), backlog=512)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        rest = b""
        with connection, contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                while b"\r\n\r\n" not in rest:
                    rest += received(connection)
                head, _, rest = rest.partition(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                    continue
                size = int(
                    next(line[16:] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: "))
                )
                while len(rest) < size and b"x-answer-early" not in head:
                    rest += received(connection)
                body, rest = rest[:size], rest[size:]
                self.requests.append((head, body))
                self.behave(connection, head, body)
        self.gone += 1


def received(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 20)
    if not data:
        raise ConnectionError("closed")
    return data


def wait_until_gone(connection: socket.socket, *_: bytes) -> None:
    """Behaviour of an engine that never answers."""
    while True:
        received(connection)
