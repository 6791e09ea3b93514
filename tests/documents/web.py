"""The web as a client's URL meets it: hosts that answer any bytes, and names whose addresses change."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_unified.documents.fetching import AddressRule

# Linux has all of 127.0.0.0/8: here a client's URL may lead, and 127.0.0.1 is what it must not reach.
OPEN = "127.0.0.2"
OPEN_TOO = "127.0.0.3"
CLOSED = "127.0.0.1"
ALLOWED = AddressRule(networks=("127.0.0.2/31",))

Answer = Callable[[bytes], AsyncIterator[bytes]]


@dataclass
class Host:
    port: int
    requests: list[bytes] = field(default_factory=list)


@contextlib.asynccontextmanager
async def serving(
    answer: Answer, address: str = OPEN, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Host]:
    """A host that answers each request with those pieces, and closes."""

    talks: set[asyncio.Task[None] | None] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            try:
                await converse(reader, writer)
            finally:
                writer.close()
                await writer.wait_closed()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request = head + await reader.readexactly(int(header(head, "content-length") or 0))
        host.requests.append(request)
        async for piece in answer(request):
            writer.write(piece)
            await writer.drain()

    server = await asyncio.start_server(talk, address, port, ssl=tls)
    host = Host(server.sockets[0].getsockname()[1])
    try:
        async with server:
            yield host
    finally:
        for task in filter(None, talks):
            task.cancel()
        await asyncio.gather(*filter(None, talks), return_exceptions=True)


def says(*pieces: bytes) -> Answer:
    async def answer(request: bytes) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return answer


def good(body: bytes, *headers: str) -> bytes:
    return head("200 OK", f"content-length: {len(body)}", *headers) + body


def head(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


def header(request: bytes, name: str) -> str | None:
    for line in request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    return None


class Names:
    """Each name's answers, one at each look-up; the last stays."""

    def __init__(self, answers: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._answers: dict[str, Iterator[Sequence[str]]] = {name: iter(each) for name, each in answers.items()}
        self._latest: dict[str, Sequence[str]] = {}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self._answers:
            raise OSError("no such name")
        self._latest[host] = next(self._answers[host], self._latest.get(host, ()))
        return self._latest[host]
