"""One connection to a server that answers: requests out, answers in, as they come."""

import asyncio
import time
from typing import Protocol, cast

import httptools

from vllm_unified.router.outbox import Sender
from vllm_unified.router.replica import Replica

LONGEST_HEAD = 64 * 1024
WITHOUT_BODY = frozenset({204, 304})  # whatever their heads say
Headers = list[tuple[bytes, bytes]]


class Receiver(Protocol):
    """Who waits for the answer. Nothing is called any more after `ended` or `lost`, or after `connection.close()`."""

    def answer_began(self, status: int, headers: Headers, *, length: int | None) -> None:
        """`headers`: names in lower case. `length`: of the body in bytes; None when only its end shows it."""

    def answer_came(self, data: bytes) -> None: ...

    def answer_ended(self) -> None: ...

    def answer_lost(self, why: str, *, rubbish: bool) -> None:
        """The connection ended before the answer did, or what came is not HTTP (`rubbish`)."""


class UpstreamConnection(Sender, asyncio.Protocol):
    """Used by one receiver at a time; between two of them it waits in its replica's `idle`."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica.outbox)
        self.replica = replica
        self.used = 0  # answers that came whole
        self.idle_since = 0.0
        self._receiver: Receiver | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: Headers = []
        self._head_size = 0
        self._until_close = False  # the end of the connection is the end of the body
        self._skipped = False  # an interim answer, as 100 Continue
        self._ended = False
        self._reusable = False
        self._paused = False

    def send(self, receiver: Receiver, head: bytes, body: bytes) -> None:
        self._receiver = receiver
        self._ended = self._until_close = False
        self._head_size = 0
        self.write(head)
        self.write(body)

    def close(self) -> None:
        """End it at once; the server notices, and drops what it was doing."""
        self._receiver = None
        self.cut()

    def pause_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:  # nothing was asked
            self.close()
            return
        if self._head_size >= 0:
            self._head_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._reusable = False  # what stands behind a whole answer is nobody's
            if not self._ended:
                self._lose(str(error.__context__ or error), rubbish=True)
        if self._head_size > LONGEST_HEAD:
            self._lose(f"headers of more than {LONGEST_HEAD >> 10} KiB", rubbish=True)
        if self._ended and self._receiver is receiver:
            self._end(receiver)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        receiver = self._receiver
        if receiver is None:
            if self in self.replica.idle:
                self.replica.idle.remove(self)
        elif self._until_close and exc is None:
            self._receiver = None
            receiver.answer_ended()
        else:
            self._lose(str(exc) if exc else "it closed the connection", rubbish=False)

    # --- called by the parser ---

    def on_message_begin(self) -> None:
        if self._ended:  # a second answer to one request
            raise ValueError("more than one answer")
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._skipped = 100 <= status < 200 and status != 101
        if self._skipped:
            return
        self._head_size = -1
        if status in WITHOUT_BODY:
            self._ended, self._reusable = True, False
            if self._receiver is not None:
                self._receiver.answer_began(status, self._headers, length=None)
            return
        fields = dict(self._headers)
        declared = fields.get(b"content-length")
        length = None if declared is None else int(declared)
        self._until_close = length is None and b"transfer-encoding" not in fields
        if self._receiver is not None:
            self._receiver.answer_began(status, self._headers, length=length)

    def on_body(self, data: bytes) -> None:
        if self._receiver is not None and not self._ended and not self._skipped:
            self._receiver.answer_came(data)

    def on_message_complete(self) -> None:
        if not self._skipped:
            self._ended = True
            self._reusable = self._parser.should_keep_alive()

    # --- the two ends of an answer ---

    def _end(self, receiver: Receiver) -> None:
        self._receiver = None
        self.used += 1
        transport = self._transport
        if transport is not None and not transport.is_closing():
            # What a server does with the rest of a request that it answered already, nobody knows.
            if self._reusable and not self.replica.retired and not transport.get_write_buffer_size():
                self.idle_since = time.monotonic()
                if self._paused:
                    self.resume_reading()
                self.replica.idle.append(self)
            else:
                transport.close()
        receiver.answer_ended()

    def _lose(self, why: str, *, rubbish: bool) -> None:
        receiver = self._receiver
        self.close()
        if receiver is not None:
            receiver.answer_lost(why, rubbish=rubbish)


class Uploader(Receiver, Protocol):
    """Who also has the body of the request, and sends it in pieces."""

    def pause_upload(self) -> None:
        """The server takes it slower than it comes."""

    def resume_upload(self) -> None: ...


class UploadConnection(UpstreamConnection):
    """A connection for one request whose body is sent as it comes."""

    _uploader: Uploader | None = None

    def begin(self, uploader: Uploader, head: bytes) -> None:
        """The body follows with `upload`."""
        self._uploader = uploader
        self.send(uploader, head, b"")

    def upload(self, data: bytes) -> None:
        """Sent at once: one turn of the event loop may bring several MiB, and the uploader must hear of it."""
        self.write(data)
        self.flush()

    def pause_writing(self) -> None:
        if self._uploader is not None and self._receiver is not None:
            self._uploader.pause_upload()

    def resume_writing(self) -> None:
        if self._uploader is not None and self._receiver is not None:
            self._uploader.resume_upload()


class _Whole:
    """An answer of the router's own question, kept until it is whole."""

    def __init__(self, limit: int) -> None:
        self.done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._limit = limit
        self._status = 0
        self._body = bytearray()

    def answer_began(self, status: int, headers: Headers, *, length: int | None) -> None:
        self._status = status

    def answer_came(self, data: bytes) -> None:
        if len(self._body) <= self._limit:
            self._body += data

    def answer_ended(self) -> None:
        if self.done.done():
            return
        if len(self._body) > self._limit:
            self.done.set_exception(ConnectionError(f"it answered with more than {self._limit >> 20} MiB"))
        else:
            self.done.set_result((self._status, bytes(self._body)))

    def answer_lost(self, why: str, *, rubbish: bool) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"not HTTP: {why}" if rubbish else why))


async def fetch(replica: Replica, path: str, seconds: float, limit: int = 32 << 20) -> tuple[int, bytes]:
    """Status and body of a GET with the replica's key. Raises OSError, and TimeoutError, which is one."""
    async with asyncio.timeout(seconds):
        for _ in range(2):
            connection = replica.take(time.monotonic()) or await replica.connect()
            was_used = connection.used > 0
            whole = _Whole(limit)
            head = b"GET %b%b HTTP/1.1\r\n%b\r\n" % (replica.path, path.encode("ascii"), replica.fixed_headers)
            connection.send(whole, head, b"")
            try:
                return await whole.done
            except ConnectionError:
                if not was_used:
                    raise
            except asyncio.CancelledError:
                connection.close()
                raise
    raise ConnectionError("it closes every connection")
