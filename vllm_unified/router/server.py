"""The listening side: HTTP/1.1 from a client's socket to a `Request`, and an answer back.

Ours because every byte of every answer passes here. What is not forwarded to a model goes to an ASGI application.
"""

import asyncio
import collections
import contextlib
import http
import logging
import socket
import time
from collections.abc import Container, Iterable
from email.utils import formatdate
from typing import Protocol, cast
from urllib.parse import unquote_to_bytes

import httptools

from vllm_unified.router.keys import Key
from vllm_unified.router.outbox import Outbox, Sender
from vllm_unified.router.problems import RequestError, failure, too_large, upload_too_large
from vllm_unified.router.regularly import regularly

HEAD_SECONDS = 30.0
BODY_SECONDS = 60.0
SLOWEST_BODY = 64 * 1024  # bytes a second, beyond BODY_SECONDS
IDLE_SECONDS = 75.0
# A client that takes nothing of its answer for so long is gone.
STALLED_SECONDS = 120.0
# After an answer that came before the request's end, what still comes is thrown away for so long.
LINGERING_SECONDS = 10.0
DISCARDED_BODIES = 8  # of the largest size
LONGEST_HEAD = 64 * 1024
LONGEST_TARGET = 16 * 1024
# What a client may send ahead of the answer to its last request.
LONGEST_PIPELINE = 256 * 1024
NOT_WHOLE = 1 << 62  # `came_at` of a request that is answered while its body comes
# A refused request with no more than this to come is read to its end, and its connection used again.
SMALL_BODY = 256 * 1024
BACKLOG = 1024
TICK_SECONDS = 1.0

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
Headers = list[tuple[bytes, bytes]]
log = logging.getLogger(__name__)


class Request:
    """`path` is percent-decoded, `target` as it came without the query. `headers`: names in lower case."""

    def __init__(self, method: str, target: bytes, version: str, headers: Headers, peer: str, *, keep_alive: bool):
        self.method = method
        path, _, self.query = target.partition(b"?")
        if not path.startswith(b"/"):  # http://host/path, as a proxy is asked
            path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
        self.target = path
        self.path = unquote_to_bytes(path) if b"%" in path else path
        self.version = version
        self.headers = headers
        self.fields = dict(headers)
        self.peer = peer
        self.keep_alive = keep_alive
        self.body = b""
        self.came_at = 0  # bytes that had come on its connection when it was whole
        self.key: Key | None = None
        self.refusal: RequestError | None = None
        self.longest_upload: int | None = None  # bytes; where it is set, the body is an `Upload`'s
        self.length = int(self.fields.get(b"content-length", b"0"))  # of the body, 0 where it is not said
        self.started = time.monotonic()


class Work(Protocol):
    """What answers one request on a connection."""

    def client_left(self) -> None: ...

    def pause(self) -> None:
        """The client takes its answer slower than it comes."""

    def resume(self) -> None: ...


class Upload(Work, Protocol):
    """What answers a request whose body it takes as it comes. It holds the client back with `pause_reading`."""

    def body_came(self, data: bytes) -> None: ...

    def body_ended(self) -> None:
        """It is whole."""

    def body_lost(self, error: RequestError) -> None:
        """The rest of it is not wanted, or does not come; `error` is the answer where none has begun."""


class Handler(Protocol):
    """What the server is for."""

    max_body_bytes: int

    def admit(self, request: Request) -> None:
        """Called when the head is there, before the body. Raises RequestError; may set `request.key` and
        `request.longest_upload`.
        """

    def handle(self, request: Request, client: "ClientConnection") -> Work:
        """Start to answer. It may be over when this returns."""

    def handle_upload(self, request: Request, client: "ClientConnection") -> Upload:
        """The same at the head of a request with `longest_upload`. The connection must not stay open behind an
        answer that began before the body was whole.
        """

    def refused(self, request: Request, error: RequestError) -> None:
        """The server answered it by itself; `handle` is not called."""

    def cors_headers(self, request: Request) -> bytes:
        """Lines of the head of every answer to a request with an Origin."""


class ClientConnection(Sender, asyncio.Protocol):
    """One client's connection: one request is answered at a time, in the order in which they came."""

    def __init__(self, server: "Server") -> None:
        super().__init__(server.outbox)
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self.peer = ""
        self.deadline = 0.0
        self._in_head = False
        self._in_trailers = False
        self._heads = 0  # that began; trailers count as one
        self._received_before = 0  # the newest piece
        self._head_after = 0  # so many bytes, or some more: its first piece
        self._head_size = 0  # of the pieces in which the last one neither began nor ended
        self._target = b""
        self._headers: Headers = []
        self._reading: Request | None = None  # its body is still to come
        self._body: list[bytes] = []
        self._body_size = 0
        self._unparsed = 0  # of the body
        self._collecting = True
        self._upload: Upload | None = None  # takes the body that is still to come
        self._is_held_back = False  # by that
        self._lingering = False
        self._thrown_away = 0
        self._may_throw_away = LONGEST_HEAD
        self._pipeline: collections.deque[Request] = collections.deque()
        self._received = 0
        self._paused = False
        self._request: Request | None = None  # being answered
        self._work: Work | None = None

    # --- the answer ---

    @property
    def request(self) -> Request:
        if self._request is None:
            raise RuntimeError("nothing is being answered")
        return self._request

    @property
    def is_gone(self) -> bool:
        return not self.is_open

    def head(
        self, status: int, headers: Iterable[tuple[bytes, bytes]], without: Container[bytes] = (), more: bytes = b""
    ) -> bytes:
        """The head of an answer to the current request: `headers` but those named in `without`, and whole lines."""
        request, server = self.request, self._server
        lines = [server.openings.get(status) or server.opening(status), more]
        for name, value in headers:
            if name not in without:
                lines += (name, b": ", value, b"\r\n")
        if b"origin" in request.fields:
            lines.append(server.handler.cors_headers(request))
        if not request.keep_alive:
            lines.append(b"connection: close\r\n")
        elif request.version == "1.0":
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole answer at once."""
        head = self.head(status, [*headers, (b"content-length", str(len(body)).encode())])
        self.write(head if self.request.method == "HEAD" else head + body)
        self.done()

    def done(self) -> None:
        """The answer was written whole."""
        request, self._request, self._work = self._request, None, None
        if self._transport is None or request is None:
            return
        if not request.keep_alive or self._server.is_closing:
            self._pipeline.clear()
            if self._reading is None:
                self.deadline = time.monotonic() + STALLED_SECONDS
                self.close_when_sent()
            else:
                self._linger()
        elif self._pipeline:
            self._start_next()
        elif self._reading is not None:
            self._await_body(self._reading)
        else:
            self.deadline = time.monotonic() + (HEAD_SECONDS if self._in_head else IDLE_SECONDS)

    def abort(self) -> None:
        """Cut the connection: an answer that is not whole must not look whole."""
        self.cut()

    def ask_for_body(self) -> None:
        """Of the request that is being answered, where the client waits for that."""
        if _waits_to_be_asked(self.request):
            self.write(CONTINUE)

    def pause_reading(self) -> None:
        """Take no more of a body until `resume_reading`; a client that leaves meanwhile is noticed then."""
        if self._transport is not None and not self._transport.is_closing():
            self._is_held_back = True
            self._transport.pause_reading()
            self._expect_body()

    def resume_reading(self) -> None:
        if self._is_held_back and self._transport is not None and not self._transport.is_closing():
            self._is_held_back = False
            self._transport.resume_reading()
            self._expect_body()

    def close_if_idle(self) -> None:
        if self._request is None and self._reading is None and not self._pipeline and self._transport is not None:
            self.close_when_sent()

    def expire(self) -> None:
        """`deadline` has passed."""
        self.deadline = 0.0
        waiting = self._request is not None or self._pipeline
        if self._upload is not None and not self._paused:
            self._refuse(_not_taken() if self._is_held_back else _silent())
        elif not waiting and not self._lingering and (self._reading is not None or self._in_head):
            seconds = HEAD_SECONDS if self._in_head else BODY_SECONDS
            self._refuse(RequestError(408, f"the request did not come within {seconds:g} s", code="request_timeout"))
        else:
            self.abort()

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        name = transport.get_extra_info("peername")
        self.peer = name[0] if isinstance(name, tuple) else ""
        self.deadline = time.monotonic() + HEAD_SECONDS
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.forget(self)
        self._pipeline.clear()
        self._upload = None
        work, self._work = self._work, None
        if work is not None:
            work.client_left()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            self._thrown_away += len(data)
            if self._thrown_away > self._may_throw_away:
                self.abort()
            return
        self._received_before = self._received
        self._received += len(data)
        oldest = self._request or (self._pipeline[0] if self._pipeline else None)
        if oldest is not None and self._received - oldest.came_at > LONGEST_PIPELINE:
            self.abort()
            return
        if self._unparsed:
            data = self._take_unparsed(data)
        heads = self._heads
        while data:
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                if self._parser.get_method() == b"CONNECT":
                    self._refuse(RequestError(405, "this is not a proxy", code="bad_request"))
                    return
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError as error:
                if not self._lingering and not self.is_gone:
                    what = str(error.__context__ or error)
                    self._refuse(RequestError(400, f"not a request of HTTP/1.1: {what}", code="bad_request"))
                return
        self._stop_parsing()
        if (self._in_head or self._in_trailers) and self._heads == heads:
            self._head_size += len(data)
            if self._head_size > LONGEST_HEAD:
                self._refuse(_head_too_large())

    def _stop_parsing(self) -> None:
        """The rest of a large body of a known length needs no parser, and is not copied by one."""
        reading = self._reading
        if reading is not None and not self._lingering and not self._unparsed:
            left = reading.length - self._body_size
            if left > SMALL_BODY and not self._in_head:
                self._unparsed = left

    def _take_unparsed(self, data: bytes) -> bytes:
        """What of `data` is behind the body."""
        if len(data) < self._unparsed:
            self._unparsed -= len(data)
            self.on_body(data)
            return b""
        body, data = data[: self._unparsed], data[self._unparsed :]
        self._unparsed = 0
        self._parser = httptools.HttpRequestParser(self)  # the old one waits for the body
        self.on_body(body)
        self.on_message_complete()
        return data

    def eof_received(self) -> bool | None:
        return None  # half closed is closed, as it is for most servers: nothing else tells that a client left

    def pause_writing(self) -> None:
        self._paused = True
        self.deadline = time.monotonic() + STALLED_SECONDS
        if self._work is not None:
            self._work.pause()

    def resume_writing(self) -> None:
        self._paused = False
        self.deadline = 0.0 if self._request is not None else time.monotonic() + IDLE_SECONDS
        self._expect_body()
        if self._work is not None:
            self._work.resume()
        elif self._request is None and self._pipeline:
            self._start_next()

    # --- called by the parser ---

    def on_message_begin(self) -> None:
        self._in_head = True
        self._heads += 1
        self._head_size = 0
        self._head_after = self._received_before
        self._target = b""
        self._headers = []
        if self._request is None:
            self.deadline = time.monotonic() + HEAD_SECONDS

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are nobody's
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        parser = self._parser
        if parser.should_upgrade():  # its body is not read: see _head_without_upgrade
            return
        request = Request(
            parser.get_method().decode("ascii"),
            self._target,
            parser.get_http_version(),
            self._headers,
            self.peer,
            keep_alive=parser.should_keep_alive() and not self._server.is_closing,
        )
        self._reading = request
        self._body = []
        self._body_size = 0
        self._collecting = True
        try:
            self._check(request)
            self._server.handler.admit(request)
            if request.length > self._server.handler.max_body_bytes and request.longest_upload is None:
                raise too_large(self._server.handler.max_body_bytes)
        except RequestError as refusal:
            request.refusal = refusal
            self._collecting = False
        if self._request is None:
            self._await_body(request)

    def _await_body(self, request: Request) -> None:
        """Ask for it, give it its time, or say at once that the request is refused."""
        if request.longest_upload is not None and request.refusal is None:
            if not self._pipeline and not self._lingering:
                self._start_upload(request, request.longest_upload)
            return
        to_come = request.length
        chunked = b"transfer-encoding" in request.fields
        waits = _waits_to_be_asked(request)
        if request.refusal is not None and (chunked or to_come > SMALL_BODY or waits):
            self._refuse(request.refusal)
        elif to_come or chunked:
            longest = self._server.handler.max_body_bytes if chunked else to_come
            self.deadline = time.monotonic() + BODY_SECONDS + longest / SLOWEST_BODY
            if waits:
                self.write(CONTINUE)

    def _expect_body(self) -> None:
        """Its next piece, if it is an upload's; who takes nothing of the answer has a deadline already."""
        if self._upload is not None and not self._paused:
            self.deadline = time.monotonic() + (STALLED_SECONDS if self._is_held_back else BODY_SECONDS)

    def _check(self, request: Request) -> None:
        if len(self._target) > LONGEST_TARGET:
            raise RequestError(414, f"the path is longer than {LONGEST_TARGET >> 10} KiB", code="uri_too_long")
        if self._received - self._head_after > LONGEST_HEAD:  # or else it cannot be so large
            size = len(self._target) + sum(len(name) + len(value) + 4 for name, value in self._headers)
            if size > LONGEST_HEAD:
                raise _head_too_large()
        if request.version != "1.1" and request.version != "1.0":
            raise RequestError(505, "speak HTTP/1.1", code="http_version_not_supported")

    def on_chunk_header(self) -> None:
        self._in_trailers = True  # unless a body follows
        self._heads += 1
        self._head_size = 0

    def on_body(self, data: bytes) -> None:
        self._in_trailers = False
        self._body_size += len(data)
        if not self._collecting:
            if self._upload is not None:
                self._pass_on(data, self._upload)
            return
        if self._body_size > self._server.handler.max_body_bytes:
            self._body.clear()
            self._collecting = False
            if self._reading is not None:
                self._reading.refusal = too_large(self._server.handler.max_body_bytes)
                if self._request is None:
                    self._refuse(self._reading.refusal)
            return
        self._body.append(data)

    def _pass_on(self, data: bytes, upload: Upload) -> None:
        longest = self.request.longest_upload or 0
        if self._body_size > longest:
            self._refuse(upload_too_large(longest))
        else:
            self._expect_body()
            upload.body_came(data)

    def on_message_complete(self) -> None:
        request, self._reading = self._reading, None
        self._in_trailers = False
        if request is None or self._lingering:
            return
        request.came_at = self._received
        if self._body:
            request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body = []
        if self._request is None and not self._pipeline and not self._paused:
            self._request = request
            self._start(request)
        elif self._request is request:
            self._end_upload()
        else:
            self._pipeline.append(request)

    # --- inside ---

    def _start_upload(self, request: Request, longest: int) -> None:
        """Its work begins with its head, and takes the body; some of it may have come while another was answered."""
        if request.length > longest:
            self._refuse(upload_too_large(longest))
            return
        self._request = request
        request.came_at = NOT_WHOLE
        self._may_throw_away = longest
        self._collecting = False
        came, self._body = self._body, []
        try:
            upload = self._server.handler.handle_upload(request, self)
        except Exception:
            log.exception("%s %s", request.method, request.path)
            request.keep_alive = False
            self._answer_error(failure())
            return
        if self._request is not request:  # it is answered already
            return
        self._work = self._upload = upload
        if self._paused:
            upload.pause()
        self._expect_body()
        for data in came:
            upload.body_came(data)

    def _end_upload(self) -> None:
        upload, self._upload = self._upload, None
        if not self._paused:
            self.deadline = 0.0
        if upload is not None:
            upload.body_ended()

    def _start(self, request: Request) -> None:
        if self._transport is None:
            return
        self.deadline = 0.0
        if request.refusal is not None:
            self._answer_error(request.refusal)
            return
        try:
            work = self._server.handler.handle(request, self)
        except Exception:  # it would pass through the parser, and be called the client's
            log.exception("%s %s", request.method, request.path)
            self._answer_error(failure())
            return
        if self._request is request:  # else it is answered already
            self._work = work

    def _start_next(self) -> None:
        """The oldest of those that wait, unless the client does not take what it got already."""
        if not self._paused:
            self._request = self._pipeline.popleft()
            # Not from here: an answer that is there at once would call us again, once for each in the queue.
            asyncio.get_running_loop().call_soon(self._start, self._request)

    def _refuse(self, error: RequestError) -> None:
        """Answer a request that has not come whole, and take no further one."""
        if self._upload is not None:
            upload, self._upload = self._upload, None
            upload.body_lost(error)
            return
        if self._reading is not None:
            self._may_throw_away = DISCARDED_BODIES * self._server.handler.max_body_bytes
        refused = self._reading or Request("GET", b"/", "1.1", [], self.peer, keep_alive=False)
        refused.keep_alive = False
        self._reading = refused
        if self._request is not None or self._pipeline:  # earlier ones, whose answers go first
            refused.refusal = error
            self._pipeline.append(refused)
            self._lingering = True
            return
        self._request = refused
        self._answer_error(error)

    def _head_without_upgrade(self) -> bytes:
        """The head that was just read, to be read again. Java's client asks for HTTP/2 with its first request, and
        takes an answer in HTTP/1.1; httptools passes over the body of a request that asks so.
        """
        lines = [self._parser.get_method(), b" ", self._target, b" HTTP/1.1\r\n"]
        for name, value in self._headers:
            if name != b"upgrade":
                lines += (name, b": ", value, b"\r\n")
        return b"".join((*lines, b"\r\n"))

    def _answer_error(self, error: RequestError) -> None:
        self._server.handler.refused(self.request, error)
        self.answer(error.status, error.wire_headers(), error.body())

    def _linger(self) -> None:
        """A client that still sends would not read an answer before a closed connection."""
        self._lingering = True
        self._reading = self._upload = None
        self._body = []
        self.resume_reading()
        self.deadline = time.monotonic() + LINGERING_SECONDS
        self.flush()
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()


def _waits_to_be_asked(request: Request) -> bool:
    return request.fields.get(b"expect", b"").lower() == b"100-continue" and request.version != "1.0"


def _silent() -> RequestError:
    return RequestError(408, f"nothing of the body came for {BODY_SECONDS:g} s", code="request_timeout")


def _not_taken() -> RequestError:
    message = f"nothing of the body was taken for {STALLED_SECONDS:g} s; the service that it is for hangs"
    return RequestError(504, message, code="upload_timeout")


def _head_too_large() -> RequestError:
    return RequestError(431, f"the headers are larger than {LONGEST_HEAD >> 10} KiB", code="headers_too_large")


class Server:
    """Listens, and looks each second for what takes too long."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.outbox = Outbox()
        self.connections: set[ClientConnection] = set()
        self.is_closing = False
        self.openings: dict[int, bytes] = {}  # by status, of this second
        self._empty = asyncio.Event()  # of connections, once it is closing
        self._listening: asyncio.Server | None = None
        self._ticking: asyncio.Task[None] | None = None

    async def listen(self, host: str, port: int) -> None:
        """Raises OSError when the port is taken."""
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A client whose machine vanished is noticed; accepted sockets inherit it.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
            listening.bind((host, port))
        except OSError:
            listening.close()
            raise
        self._listening = await loop.create_server(lambda: ClientConnection(self), sock=listening, backlog=BACKLOG)
        self._ticking = loop.create_task(regularly(lambda: self._tick(time.monotonic()), lambda: TICK_SECONDS))

    async def close(self, seconds: float) -> None:
        """Take no new connection, and let what is being answered end within `seconds`."""
        self.is_closing = True
        if self._listening is not None:
            self._listening.close()
        for connection in list(self.connections):
            connection.close_if_idle()
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), seconds)
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)
        if self._ticking is not None:
            self._ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticking

    def opening(self, status: int) -> bytes:
        """The first lines of an answer: its status and the date."""
        date = formatdate(usegmt=True)
        made = f"HTTP/1.1 {status} {PHRASES.get(status, 'Unknown')}\r\ndate: {date}\r\n".encode("ascii")
        self.openings[status] = made
        return made

    def forget(self, connection: ClientConnection) -> None:
        self.connections.discard(connection)
        if self.is_closing and not self.connections:
            self._empty.set()

    def _tick(self, now: float) -> None:
        self.openings.clear()
        for connection in list(self.connections):
            if connection.deadline and connection.deadline < now:
                connection.expire()
