"""One request to one engine and its answer back, as it comes.

Plain ASGI under FastAPI's routing: an answer passes through chunk by chunk, and a client that leaves ends
the engine's work.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_unified.router.health import is_ending
from vllm_unified.router.problems import RequestError, not_ready
from vllm_unified.router.registry import Registry, Upstream
from vllm_unified.router.routes import Route

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5
CONNECT_SECONDS = 5.0
# What is read and thrown away of a body over the limit, so that the client comes to read the answer.
DISCARDED_BODIES = 8
# RFC 9110, 7.6.1: these speak of one connection. `host` and `content-length` are written anew.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"authorization", b"expect"}


class Forwarder:
    """Makes the ASGI application of each route."""

    def __init__(self, registry: Registry, api_key: str, max_body_bytes: int, run: Path) -> None:
        self.registry = registry
        self.run = run
        self.authorization = f"Bearer {api_key}"
        self.max_body_bytes = max_body_bytes
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        # vLLM closes an idle connection after 5 s; ours goes first, so none is written to as it closes.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
        )

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("not open")
        return self._session

    def application(self, route: Route) -> ASGIApp:
        return _Application(self, route)


class _Application:
    """A class, because Starlette takes a plain function for an endpoint of its own kind."""

    def __init__(self, forwarder: Forwarder, route: Route) -> None:
        self.forwarder = forwarder
        self.route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self.forwarder.max_body_bytes)
            upstream = self.forwarder.registry.choose(model_in(body), self.route)
            exchange = _Exchange(self.forwarder, upstream, scope, send)
            await _until_client_leaves(exchange.run(body), receive)
        except RequestError as error:
            await error.response()(scope, receive, send)
        except _ClientLeft:
            pass


class _Exchange:
    """One request and its answer."""

    def __init__(self, forwarder: Forwarder, upstream: Upstream, scope: Scope, send: Send) -> None:
        self.forwarder = forwarder
        self.upstream = upstream
        self.scope = scope
        self.send = send

    async def run(self, body: bytes) -> None:
        """Raises RequestError only while nothing was sent to the client."""
        if self.upstream.closed:
            raise self._not_ready()
        request = self.forwarder.session.post(self._url(), data=body, headers=self._headers(), allow_redirects=False)
        try:
            answer = await request
        except (aiohttp.ClientConnectorError, TimeoutError):  # the only time limit is on connecting
            raise self._not_ready() from None
        except aiohttp.ClientError as error:
            log.warning("%s: %s", self.upstream.model.key, error or type(error).__name__)
            if isinstance(
                error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError
            ):  # it ended; its keeper sees it
                raise self._not_ready("it closed the connection before it answered") from None
            raise self._engine_error("answered something that is not HTTP") from None
        async with answer:
            if not 200 <= answer.status < 600:
                raise self._engine_error(f"answered with the status {answer.status}")
            if answer.status >= 500 and await is_ending(self.upstream, self.forwarder.session, self.forwarder.run):
                # What was in an engine when its core died is answered with 500.
                raise self._not_ready("it failed while it answered")
            await self._pass_on(answer)

    def _not_ready(self, what: str | None = None) -> RequestError:
        words = (what or self.upstream.problem or "it does not answer on its port", self.upstream.reason)
        why = ": ".join(word for word in words if word)
        return not_ready(f'"{self.upstream.model.name}" is not ready: {why}', RETRY_AFTER_SECONDS)

    def _engine_error(self, what: str) -> RequestError:
        return RequestError(502, f'"{self.upstream.model.name}" {what}', code="engine_error")

    async def _pass_on(self, answer: aiohttp.ClientResponse) -> None:
        await self.send({"type": "http.response.start", "status": answer.status, "headers": _answer_headers(answer)})
        try:
            async for chunk in answer.content.iter_any():
                await self.send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("%s broke off its answer: %s", self.upstream.model.key, error or type(error).__name__)
            if not answer.content_type.startswith("text/event-stream"):
                raise  # uvicorn cuts the connection: an incomplete answer must not look complete
            event = b"data: " + self._engine_error("broke off its answer").body() + b"\n\n"
            await self.send({"type": "http.response.body", "body": event, "more_body": True})
        await self.send({"type": "http.response.body", "body": b""})

    def _url(self) -> str:
        query = self.scope["query_string"].decode("latin-1")
        return f"{self.upstream.url}{self.scope['path']}{'?' + query if query else ''}"

    def _headers(self) -> list[tuple[str, str]]:
        dropped = NOT_FORWARDED | _named_by_connection(self.scope["headers"])
        sent = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self.scope["headers"]
            if name not in dropped
        ]
        return [*sent, ("authorization", self.forwarder.authorization)]


def _answer_headers(answer: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    # uvicorn writes a date of its own
    dropped = HOP_BY_HOP | {b"date"} | _named_by_connection(answer.raw_headers)
    return [(name, value) for name, value in answer.raw_headers if name.lower() not in dropped]


def _named_by_connection(headers: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """`Connection: close, x-mine` says that x-mine speaks of this connection alone."""
    values = [value for name, value in headers if name.lower() == b"connection"]
    return {word.strip().lower() for value in values for word in value.split(b",")}


class _ClientLeft(Exception):
    pass


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises RequestError 413 for one over `limit` bytes, without keeping it in memory."""
    chunks: list[bytes] = []
    size = 0
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    too_large = declared.isdigit() and int(declared) > limit
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeft
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        too_large = too_large or size > limit
        if too_large:
            chunks.clear()
        else:
            chunks.append(chunk)
        if not message.get("more_body", False) or size > limit * DISCARDED_BODIES:
            break
    if too_large:
        message_text = f"the body is larger than {limit >> 20} MiB (router.max_body_mib)"
        raise RequestError(413, message_text, code="request_too_large")
    return b"".join(chunks)


def model_in(body: bytes) -> Any:
    """`model` of a JSON object, None where there is none. Raises RequestError 400 for anything else."""
    try:
        document = json.loads(body.decode("utf-8"))  # of bytes it would guess the encoding
    except UnicodeDecodeError:
        raise RequestError(400, "the body is not UTF-8", code="invalid_encoding") from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deep", code="invalid_json") from None
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise RequestError(400, "the body must be a JSON object", code="invalid_json")
    return document.get("model")


async def _until_client_leaves(work: Any, receive: Receive) -> None:
    """Run `work`; cancel it, and with it the engine's request, when the client closes its connection."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _ClientLeft
        await working
    finally:
        for task in (working, leaving):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await working


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
