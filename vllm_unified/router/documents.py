"""The document service's paths, and a request to one of them: passed on as it comes, answered as it is answered.

Neither an upload nor a download is ever here as a whole: who takes slower holds back who sends.
"""

import asyncio
import logging
import time

from vllm_unified.router.forward import NOT_ANSWERED, NOT_FORWARDED, Forwarding, named_by_connection
from vllm_unified.router.keys import Key
from vllm_unified.router.problems import RequestError, failure
from vllm_unified.router.proxies import is_loopback
from vllm_unified.router.record import Owner, Record
from vllm_unified.router.registry import RETRY_AFTER_SECONDS
from vllm_unified.router.replica import CONNECT_SECONDS, Replica
from vllm_unified.router.server import ClientConnection, Headers, Request
from vllm_unified.router.upstream import UploadConnection, fetch
from vllm_unified.settings.schema import Endpoint

ASK_SECONDS = 5.0
# What a form has beside its files: text, headers, boundaries.
FORM_MIB = 8

# A request with the service's own token, which it checks itself.
INFER = b"/internal/infer"
EXACT = {
    path.encode("ascii"): path
    for path in (
        "/api/ocr/image",
        "/api/ocr/pdf",
        "/api/ocr",
        "/api/process-pdf",
        "/api/tasks",
        "/convert/file",
        "/convert/url",
        "/v1/ocr",
        "/internal/infer",
    )
}
OF_A_TASK = {
    b"": "/api/tasks/{id}",
    b"download": "/api/tasks/{id}/download/{path}",
    b"events": "/api/tasks/{id}/events",
    b"cancel": "/api/tasks/{id}/cancel",
    b"retry": "/api/tasks/{id}/retry",
}
FURTHER = "/api/{path}"

NAME = "documents"
TOKEN = b"x-internal-token"
OF_A_PROXY = frozenset({b"x-forwarded-for", b"forwarded", b"x-real-ip"})
# What the service is told by us alone. The coding of an answer is between it and the client.
NOT_PASSED_ON = NOT_FORWARDED - {b"accept-encoding"} | {b"x-api-key-name", b"x-api-key-admin"}

log = logging.getLogger(__name__)


def pattern_of(path: bytes) -> str | None:
    """What logs and metrics call a path of the service, one of a few; None for one that is not the service's."""
    if path in EXACT:
        return EXACT[path]
    if not path.startswith(b"/api/"):
        return None
    if not path.startswith(b"/api/tasks/"):
        return FURTHER
    part = path.removeprefix(b"/api/tasks/").partition(b"/")[2].partition(b"/")[0]
    return OF_A_TASK.get(part, FURTHER)


def is_from_here(request: Request) -> bool:
    """Whether it comes from this machine itself, and not through a proxy that runs on it."""
    return OF_A_PROXY.isdisjoint(request.fields) and is_loopback(request.peer)


class Documents:
    """The service, and what all requests to it share."""

    def __init__(self, forwarding: Forwarding, url: str, api_key: str) -> None:
        """`api_key`: the deployment's own, by which the service knows the router."""
        self.forwarding = forwarding
        endpoint = Endpoint.model_construct(url=url, api_key=api_key, timeout=0.0, weight=1)
        self.replica = Replica(NAME, endpoint, "", local=True)
        # A connection that is used again may end as a request begins on it, and an upload can't be sent twice.
        self.replica.retire()

    async def connect(self) -> UploadConnection:
        """Raises OSError."""
        replica = self.replica
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: UploadConnection(replica), replica.host, replica.port
            )
        if not connection.is_open:
            raise ConnectionResetError("it closed the connection")
        return connection

    async def ask(self, path: str) -> bytes:
        """What the service tells of itself. Raises RequestError 503."""
        try:
            status, body = await fetch(self.replica, path, ASK_SECONDS)
        except OSError:
            raise _not_ready("does not answer on its port") from None
        if status != 200:
            raise _not_ready(f"answered with the status {status}")
        return body

    def require_model(self, key: Key) -> None:
        """Raises RequestError 403 when `key` may not use the model that reads documents."""
        readers = [served for served in self.forwarding.registry.served if served.model.type == "ocr"]
        if not key.may_use([handle for served in readers for handle in served.handles]):
            names = ", ".join(f'"{served.model.name}"' for served in readers) or "a model of the type ocr"
            message = f"this API key may not use {names}, which reads documents"
            raise RequestError(403, message, code="model_not_allowed")


class DocumentExchange:
    """From the head of a request to the last byte of its answer. An `Upload` of the client's connection, an
    `Uploader` of the service's.
    """

    def __init__(self, documents: Documents, request: Request, client: ClientConnection) -> None:
        self._documents = documents
        self._request = request
        self._client = client
        self._keep_alive = request.keep_alive
        request.keep_alive = False  # until the body is whole
        self._request_id = documents.forwarding.id_of(request)
        self._came_chunked = b"transfer-encoding" in request.fields
        self._early: list[bytes] = []  # of the body, before there was a connection
        self._is_whole = False
        self._connection: UploadConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._paused = False  # by a client that is slower than the service
        self._begun = False
        self._chunked = False
        self._over = False
        self._record = Record(
            "",
            self._request_id.decode("ascii"),
            request.peer,
            request.key.name if request.key else "",
            pattern_of(request.path) or "",
        )
        spans = documents.forwarding.spans
        self._span = None if spans is None else spans.begin(request)

    def start(self) -> None:
        """What is handed in counts as a request of its key; to look after it does not."""
        key = self._request.key
        if key is not None and self._request.method == "POST":
            try:
                key.submit(self._request.started)
            except RequestError as error:
                self._refuse(error)
                return
        self._client.pause_reading()
        self._task = asyncio.get_running_loop().create_task(self._connect())
        self._task.add_done_callback(self._look_at_end)

    def _look_at_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s %s", self._request.method, self._record.path, exc_info=error)
            if not self._over:
                self._refuse(failure())

    # --- towards the service ---

    async def _connect(self) -> None:
        try:
            connection = await self._documents.connect()
        except OSError as error:
            log.warning("the document service can't be reached: %s", error)
            self._refuse(_not_ready("does not answer on its port"))
            return
        self._connection = connection
        if self._paused:
            connection.pause_reading()
        connection.begin(self, self._head())
        self._client.resume_reading()
        for data in self._early:
            connection.upload(data)
        self._early.clear()
        if self._is_whole:
            self._end_body(connection)
        else:
            self._client.ask_for_body()

    def _head(self) -> bytes:
        request = self._request
        dropped = NOT_PASSED_ON
        if request.path != INFER:
            dropped = dropped | {TOKEN}
        if b"connection" in request.fields:
            dropped = dropped | named_by_connection(request.headers)
        query = b"?" + request.query if request.query else b""
        key = request.key
        lines = [
            b"%b %b%b HTTP/1.1\r\n" % (request.method.encode("ascii"), request.target, query),
            self._documents.replica.fixed_headers,
            b"x-request-id: %b\r\n" % self._request_id,
            b"x-forwarded-for: %b\r\n" % request.peer.encode("ascii"),
            b"x-api-key-admin: %d\r\n" % (key is not None and key.admin),
        ]
        if key is not None:
            lines.append(b"x-api-key-name: %b\r\n" % key.name.encode())
        if self._came_chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif b"content-length" in request.fields:
            lines.append(b"content-length: %d\r\n" % request.length)
        if self._span is not None:
            dropped = dropped | self._span.replaced
            lines.append(self._span.line)
        lines += [b"%b: %b\r\n" % (name, value) for name, value in request.headers if name not in dropped]
        return b"".join((*lines, b"\r\n"))

    def body_came(self, data: bytes) -> None:
        if self._over or not data:
            return
        self._record.bytes_in += len(data)
        if self._came_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._connection is None:
            self._early.append(data)
        else:
            self._connection.upload(data)

    def body_ended(self) -> None:
        self._is_whole = True
        if self._over:
            return
        if not self._begun:
            self._request.keep_alive = self._keep_alive
        self._client.resume_reading()  # or else nothing tells that it left
        if self._connection is not None:
            self._end_body(self._connection)

    def _end_body(self, connection: UploadConnection) -> None:
        if self._came_chunked:
            connection.upload(b"0\r\n\r\n")

    def body_lost(self, error: RequestError) -> None:
        if self._begun:
            self._break_off("client")
        else:
            self._refuse(error)

    def pause_upload(self) -> None:
        if not self._is_whole:
            self._client.pause_reading()

    def resume_upload(self) -> None:
        self._client.resume_reading()

    # --- the answer, as it comes ---

    def answer_began(self, status: int, headers: Headers, *, length: int | None) -> None:
        if not 200 <= status < 600:
            self._refuse(_not_ready(f"answered with the status {status}"))
            return
        request, record = self._request, self._record
        self._begun = True
        record.status = status
        record.first_byte_us = self._microseconds()
        if status >= 400:
            record.error = "client" if status < 500 else "documents"
        fields = dict(headers)
        record.stream = fields.get(b"content-type", b"").startswith(b"text/event-stream")
        dropped = NOT_ANSWERED
        if b"connection" in fields:
            dropped = dropped | named_by_connection(headers)
        lines = b"x-request-id: %b\r\nx-served-by: documents\r\n" % self._request_id
        if status >= 400:
            lines += b"x-error-source: documents\r\n"
        if length is not None:
            lines += b"content-length: %d\r\n" % length
        elif request.version == "1.0":
            request.keep_alive = False
        elif status not in (204, 304) and request.method != "HEAD":
            self._chunked = True
            lines += b"transfer-encoding: chunked\r\n"
        self._client.write(self._client.head(status, headers, dropped, lines))
        if request.method == "HEAD":  # no body follows, whatever its length is
            self.answer_ended()

    def answer_came(self, data: bytes) -> None:
        self._record.bytes_out += len(data)
        self._client.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        self._client.flush()  # one turn of the event loop may bring several MiB

    def answer_ended(self) -> None:
        if self._chunked:
            self._client.write(b"0\r\n\r\n")
        self._finish()
        self._client.done()

    def answer_lost(self, why: str, *, rubbish: bool) -> None:
        if self._begun:
            self._break_off("documents")
        elif rubbish:
            self._refuse(_not_ready(f"answered something that is not HTTP: {why}"))
        else:
            self._refuse(_not_ready("closed the connection before it answered"))

    def pause(self) -> None:
        self._paused = True
        if self._connection is not None:
            self._connection.pause_reading()

    def resume(self) -> None:
        self._paused = False
        if self._connection is not None:
            self._connection.resume_reading()

    # --- the ends ---

    def client_left(self) -> None:
        if not self._over:
            self._record.error = "client"
            self._finish()

    def _refuse(self, error: RequestError) -> None:
        """The router's own answer, where none has begun."""
        if self._over:
            return
        self._record.status, self._record.error = error.status, error.owner
        self._finish()
        headers = [*error.wire_headers(), (b"x-request-id", self._request_id)]
        self._client.answer(error.status, headers, error.body())

    def _break_off(self, owner: Owner) -> None:
        """An answer that is not whole must not look whole."""
        self._record.error = owner
        self._finish()
        self._client.abort()

    def _finish(self) -> None:
        """Leave the service, which notices where it was in the middle of something."""
        self._over = True
        task, connection = self._task, self._connection
        self._task = self._connection = None
        if connection is not None:
            connection.close()
        elif task is not None and task is not asyncio.current_task():
            task.cancel()
        self._record.duration_us = self._microseconds()
        self._documents.forwarding.note(self._record)
        if self._span is not None:
            self._span.end(self._record)

    def _microseconds(self) -> int:
        return int((time.monotonic() - self._request.started) * 1e6)


def _not_ready(what: str) -> RequestError:
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)}
    return RequestError(503, f"the document service {what}; try again", code="documents_not_ready", headers=headers)
