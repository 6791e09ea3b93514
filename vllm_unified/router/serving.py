"""The router as a whole: who is let in, what is forwarded, what goes to the FastAPI application, and its life."""

import asyncio
import base64
import binascii
import contextlib
import ctypes
import logging
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator

from starlette.responses import Response
from starlette.types import ASGIApp

from vllm_unified.errors import UserError
from vllm_unified.router import documents, health, usage
from vllm_unified.router.access_log import AccessLog
from vllm_unified.router.asgi import AsgiWork
from vllm_unified.router.docs import DOCS_PATHS
from vllm_unified.router.documents import DocumentExchange, Documents
from vllm_unified.router.forward import Exchange, Forwarding
from vllm_unified.router.keys import KeyRing
from vllm_unified.router.machine import Machine
from vllm_unified.router.metrics import Metrics
from vllm_unified.router.problems import RequestError
from vllm_unified.router.proxies import FORWARDED_FOR, TrustedProxies
from vllm_unified.router.record import Record
from vllm_unified.router.registry import Registry
from vllm_unified.router.regularly import regularly
from vllm_unified.router.replica import Replica
from vllm_unified.router.routes import BY_PATH
from vllm_unified.router.server import ClientConnection, Request, Server, Upload, Work
from vllm_unified.router.usage import Usage
from vllm_unified.settings import Settings
from vllm_unified.tracing import tracer_of

HEALTH_PATHS = frozenset({"/live", "/ready", "/health"})
# The documentation is read by browsers, which have no key; it shows nothing of this deployment but model names.
OPEN_PATHS = frozenset(path.encode("ascii") for path in HEALTH_PATHS | DOCS_PATHS)
TICK_SECONDS = 1.0
SETTLE_SECONDS = 0.2
FLUSH_SECONDS = 0.5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PREFLIGHT_SECONDS = b"600"

log = logging.getLogger(__name__)


class Router:
    """A `Handler` of the server. `app` is set once it is made, since it shows what is here."""

    def __init__(self, settings: Settings) -> None:
        """Raises UserError when there is no API key."""
        self.settings = settings
        self.registry = Registry(settings)
        self.usage = Usage(settings.home / usage.FILE)
        self.keys = KeyRing(settings.require_api_key(), settings.home, self.usage)
        self.max_body_bytes = settings.router.max_body_mib << 20
        self.forwarding = Forwarding(self.registry, settings.run, settings.router.retries, self.max_body_bytes)
        self.max_upload_bytes = (settings.documents.max_upload_mib + documents.FORM_MIB) << 20
        self.documents = Documents(self.forwarding, settings.documents_url, settings.require_api_key())
        self.app: ASGIApp | None = None
        self.proxies = TrustedProxies(settings.router.trusted_proxies)
        self.server = Server(self)
        self.access_log = AccessLog(sys.stdout.buffer)
        self.metrics = Metrics(
            self.registry,
            lambda: self.keys.keys,
            lambda: len(self.server.connections),
            lambda: self.access_log.dropped,
            Machine(lambda: self.settings, lambda: list(self.replicas())),
        )
        self._take_notes()

    def apply(self, settings: Settings) -> None:
        """Go on with other settings; nothing that is in flight notices."""
        self.forwarding.settle()
        self.settings = settings
        self.registry.apply(settings)
        self.max_body_bytes = self.forwarding.max_body_bytes = settings.router.max_body_mib << 20
        self.forwarding.retries = settings.router.retries
        self.proxies = TrustedProxies(settings.router.trusted_proxies)
        self._take_notes()

    def _take_notes(self) -> None:
        logged = [self.access_log.note] if self.settings.router.access_log else []
        self.forwarding.notes = [self.metrics.note, self._note_usage, *logged]

    def replicas(self) -> Iterator[Replica]:
        for served in self.registry.served:
            yield from served.replicas

    # --- a request, from its head on ---

    def admit(self, request: Request) -> None:
        if FORWARDED_FOR in request.fields:
            request.peer = self.proxies.client_of(request.peer, request.fields[FORWARDED_FOR])
        path = request.path
        if path in OPEN_PATHS or _is_preflight(request):
            return
        if path not in BY_PATH and documents.pattern_of(path) is not None:
            self._admit_to_documents(request)
            return
        if path == b"/sd" or path == b"/metrics" or path.startswith(b"/metrics/"):
            request.key = self.keys.authenticate_scraper(_token(request))
            return
        key = request.key = self.keys.authenticate(_token(request))
        if key is self.keys.deployment and b"x-on-behalf-of" in request.fields and path in BY_PATH:
            request.key = self.keys.on_behalf_of(request.fields[b"x-on-behalf-of"].decode("utf-8", "replace"))

    def _admit_to_documents(self, request: Request) -> None:
        is_infer = request.path == documents.INFER
        if is_infer and not documents.is_from_here(request):
            raise RequestError(403, "/internal/infer is for this machine alone", code="permission_denied")
        if not (is_infer and documents.TOKEN in request.fields):
            request.key = self.keys.authenticate(_token(request))
            self.documents.require_model(request.key)
        request.longest_upload = self.max_upload_bytes

    def handle(self, request: Request, client: ClientConnection) -> Work:
        route = BY_PATH.get(request.path)
        if route is not None and request.key is not None and request.method == "POST":
            exchange = Exchange(self.forwarding, request, client, route, request.key)
            try:
                exchange.start()
            except Exception:
                exchange.give_up()
                raise
            return exchange
        if request.longest_upload is not None:
            upload = self.handle_upload(request, client)
            upload.body_came(request.body)
            upload.body_ended()
            return upload
        if self.app is None:
            raise RuntimeError("no application")
        if _is_preflight(request):
            return AsgiWork(Response(status_code=204), request, client)
        self.forwarding.settle()  # it may show what was noted
        return AsgiWork(self.app, request, client)

    def handle_upload(self, request: Request, client: ClientConnection) -> Upload:
        exchange = DocumentExchange(self.documents, request, client)
        exchange.start()
        return exchange

    def refused(self, request: Request, error: RequestError) -> None:
        route = BY_PATH.get(request.path)
        error.shape = route.errors if route else "openai"
        key = request.key.name if request.key else ""
        request_id = self.forwarding.id_of(request).decode("ascii")
        error.headers["x-request-id"] = request_id
        record = Record("", request_id, request.peer, key, _name_of(request.path))
        record.status, record.error = error.status, error.owner
        record.duration_us = int((time.monotonic() - request.started) * 1e6)
        self.forwarding.note(record)
        spans = self.forwarding.spans
        if spans is not None and record.path:
            spans.begin(request).end(record)

    def cors_headers(self, request: Request) -> bytes:
        """What lets a web page of an allowed origin read the answer."""
        origin = request.fields[b"origin"]
        allowed = self.settings.router.cors_origins
        if not allowed:
            return b""
        if "*" not in allowed and origin.decode("latin-1") not in allowed:
            return b"vary: origin\r\n"
        lines = [b"access-control-allow-origin: ", origin, b"\r\nvary: origin\r\n"]
        if _is_preflight(request):
            deletes = documents.pattern_of(request.path) is not None
            methods = b"GET, POST, DELETE, OPTIONS" if deletes else b"GET, POST, OPTIONS"
            asked = request.fields.get(b"access-control-request-headers", b"authorization, content-type")
            lines += [b"access-control-allow-methods: ", methods, b"\r\naccess-control-allow-headers: ", asked]
            lines += [b"\r\naccess-control-max-age: ", PREFLIGHT_SECONDS, b"\r\n"]
        else:
            lines.append(b"access-control-expose-headers: x-request-id, x-error-source, x-served-by, retry-after\r\n")
        return b"".join(lines)

    def _note_usage(self, record: Record) -> None:
        if record.model:
            self.usage.note(
                record.key,
                record.model,
                error=bool(record.error),
                prompt_tokens=record.prompt_tokens,
                completion_tokens=record.completion_tokens,
                seconds=record.duration_us * 1e-6,
            )

    # --- its life ---

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What goes on beside the requests."""
        tracer = tracer_of(self.settings, "router")
        if tracer is not None:
            from vllm_unified.router.spans import Spans  # OpenTelemetry, of which nothing is needed without it

            self.forwarding.spans = Spans(tracer)
        tasks = [
            asyncio.create_task(work)
            for work in (
                health.watch(self.replicas, self.settings.run, lambda: self.settings.router.health_check_interval),
                self.keys.watch(),
                self.usage.run(),
                regularly(lambda: self.forwarding.tick(time.monotonic()), lambda: TICK_SECONDS),
                regularly(self.forwarding.settle, lambda: SETTLE_SECONDS),
                regularly(self.access_log.flush, lambda: FLUSH_SECONDS),
            )
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for replica in self.replicas():
                replica.close_idle()
            self.forwarding.settle()
            self.usage.close()
            self.access_log.close()
            if tracer is not None:
                tracer.close()

    async def serve(self) -> None:
        """Until SIGTERM or SIGINT; then what is being answered ends within `system.drain_timeout`."""
        host, port = self.settings.environment.router_host, self.settings.router.port
        ending = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ending.set)
        async with self.running():
            try:
                await self.server.listen(host, port)
            except OSError as error:
                raise UserError(f"router.port: {host}:{port}: {error.strerror or error}") from None
            log.info("listening on %s:%s", host, port)
            await ending.wait()
            await self.server.close(self.settings.system.drain_timeout)


def run(router: Router) -> None:
    """Raises UserError when it cannot listen."""
    import uvloop

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:  # each request in flight holds two files
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _keep_memory()
    uvloop.run(router.serve())


def _keep_memory() -> None:
    """glibc gives the memory of each large body back, and the kernel clears it anew for the next one, which takes half
    of the time of a request of 20 MB. Up to 128 MiB that were used once are kept.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 128 << 20)


def _name_of(path: bytes) -> str:
    """What logs and metrics call it, one of a few; "" for another."""
    route = BY_PATH.get(path)
    return route.path if route else documents.pattern_of(path) or ""


def _token(request: Request) -> bytes | None:
    scheme, _, given = request.fields.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and given:
        return given.strip()
    if scheme.lower() == b"basic" and given:  # http://any:KEY@host, where a script can be given nothing but an address
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    return request.fields.get(b"x-api-key")  # as Anthropic's clients send it


def _is_preflight(request: Request) -> bool:
    return request.method == "OPTIONS" and b"access-control-request-method" in request.fields
