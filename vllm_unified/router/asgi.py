"""Requests that an ASGI application answers: one `Work` each."""

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Message

from vllm_unified.router.problems import failure
from vllm_unified.router.server import ClientConnection, Headers, Request

log = logging.getLogger(__name__)


class AsgiWork:
    """One request that an ASGI application answers."""

    def __init__(self, app: ASGIApp, request: Request, client: ClientConnection) -> None:
        self._app = app
        self._request = request
        self._client = client
        self._left = asyncio.Event()
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._body_read = False
        self._status = 0
        self._headers: Headers = []
        self._chunked = False
        self._begun = False
        self._ended = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    def client_left(self) -> None:
        self._left.set()
        self._may_write.set()

    def pause(self) -> None:
        self._may_write.clear()

    def resume(self) -> None:
        self._may_write.set()

    async def _run(self) -> None:
        try:
            await self._app(self._scope(), self._receive, self._send)
        except Exception:
            log.exception("%s %s", self._request.method, self._request.path)
        if not self._ended and not self._left.is_set():
            if self._begun:
                self._client.abort()
            else:
                error = failure()
                self._client.answer(error.status, error.wire_headers(), error.body())

    def _scope(self) -> dict[str, Any]:
        request = self._request
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": request.version,
            # FastAPI answers HEAD nowhere; _send leaves out the body.
            "method": "GET" if request.method == "HEAD" else request.method,
            "scheme": "http",
            "path": request.path.decode("utf-8", "replace"),
            "raw_path": request.target,
            "query_string": request.query,
            "root_path": "",
            "headers": request.headers,
            "client": (request.peer, 0),
            "server": None,
            "state": {"key": request.key},
        }

    async def _receive(self) -> Message:
        if not self._body_read:
            self._body_read = True
            return {"type": "http.request", "body": self._request.body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._left.is_set() or self._ended:
            return
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = [(name.lower(), value) for name, value in message.get("headers", [])]
            return
        await self._may_write.wait()
        body, more = message.get("body", b""), message.get("more_body", False)
        silent = self._request.method == "HEAD"
        if not self._begun:
            self._begun = True
            if not any(name == b"content-length" for name, _ in self._headers):
                if more and self._request.version == "1.0":
                    self._request.keep_alive = False
                elif more:
                    self._chunked = True
                    self._headers.append((b"transfer-encoding", b"chunked"))
                elif self._status not in (204, 304):
                    self._headers.append((b"content-length", str(len(body)).encode()))
            self._client.write(self._client.head(self._status, self._headers))
        if body and not silent:
            self._client.write(b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body)
        if not more:
            self._ended = True
            if self._chunked and not silent:
                self._client.write(b"0\r\n\r\n")
            self._client.done()
