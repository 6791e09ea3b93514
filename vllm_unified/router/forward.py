"""One request to a model: whose it is, which replica takes it, its answer back as it comes, and what it cost."""

import asyncio
import itertools
import json
import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_unified.router import body as bodies
from vllm_unified.router import shapes
from vllm_unified.router.health import is_ending
from vllm_unified.router.keys import Key
from vllm_unified.router.problems import RequestError, not_ready
from vllm_unified.router.record import Record
from vllm_unified.router.registry import LONGEST_ECHO, Registry, Served
from vllm_unified.router.replica import Replica
from vllm_unified.router.routes import Route
from vllm_unified.router.server import ClientConnection, Headers, Request
from vllm_unified.router.tokens import AnswerTokens, StreamTokens
from vllm_unified.router.upstream import UpstreamConnection

if TYPE_CHECKING:
    from vllm_unified.router.spans import RequestSpan, Spans

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.05
PAUSE_GROWTH = 1.5
LONGEST_PAUSE_SECONDS = 2.0
# Answers that say "not now" or "not I", and cost the server nothing.
RETRIED = frozenset({408, 429, 502, 503, 504})
# Proxies cut a stream that is silent for 60 to 120 s.
KEEP_ALIVE_SECONDS = 15.0
LOOK_FOR_READY_SECONDS = 0.1
MOST_UNNOTED = 100
REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")
# RFC 9110, 7.6.1: these speak of one connection.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade http2-settings".split()
)
# What the router says itself, what is meant for it alone, and what would keep it from reading the answer.
NOT_FORWARDED = HOP_BY_HOP | frozenset(
    b"host content-length authorization x-api-key expect accept-encoding x-request-id cookie origin forwarded "
    b"x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip x-on-behalf-of".split()
)
NOT_ANSWERED = HOP_BY_HOP | frozenset(
    b"date content-length x-request-id x-served-by x-error-source access-control-allow-origin "
    b"access-control-allow-credentials access-control-allow-methods access-control-allow-headers "
    b"access-control-expose-headers access-control-max-age set-cookie".split()
)


class Forwarding:
    """What all exchanges share. `notes` are told of every one that is over. `spans`: None when tracing is off."""

    def __init__(self, registry: Registry, run: Path, retries: int, max_body_bytes: int) -> None:
        self.registry = registry
        self.run = run
        self.retries = retries
        self.max_body_bytes = max_body_bytes
        self.exchanges: set[Exchange] = set()
        self.notes: list[Callable[[Record], None]] = []
        self.spans: Spans | None = None
        self._unnoted: list[Record] = []
        self._millisecond = 0
        self._time = ""  # of that millisecond
        self._prefix = secrets.token_hex(5).encode("ascii")
        self._numbers = itertools.count(1)

    def id_of(self, request: Request) -> bytes:
        """The client's own where it sent one that can be shown, else a new one."""
        given = request.fields.get(b"x-request-id")
        if given and REQUEST_ID.fullmatch(given):
            return given
        return b"%s-%x" % (self._prefix, next(self._numbers))

    def note(self, record: Record) -> None:
        """It is over. Many are told together, which takes half the time."""
        millisecond = int(time.time() * 1000)
        if millisecond != self._millisecond:
            second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(millisecond // 1000))
            self._millisecond, self._time = millisecond, f"{second}.{millisecond % 1000:03}Z"
        record.time = self._time
        self._unnoted.append(record)
        if len(self._unnoted) >= MOST_UNNOTED:
            self.settle()

    def settle(self) -> None:
        """Tell `notes` of all that are over; before anything that was noted is shown."""
        records, self._unnoted = self._unnoted, []
        for note in self.notes:
            for record in records:
                note(record)

    def tick(self, now: float) -> None:
        """Once a second: silent streams are kept alive, silent servers given up."""
        for exchange in list(self.exchanges):
            exchange.tick(now)


class Exchange:
    """From the whole request to the last byte of its answer. A `Work` of the client's connection, a `Receiver` of
    the server's.

    The way of nearly all requests, from a free slot over an idle connection, makes no task and waits for nothing.
    """

    # What most of them never change, so that making one is cheap.
    _served: Served | None = None
    _asked: Any = None  # the name of the model in the body
    _form: bodies.FormField | None = None
    _session: bytes | None = None
    _hide_usage = False
    _forwarded = b""  # headers, as they go to the server
    _adapted: shapes.Answer | None = None
    _span: "RequestSpan | None" = None
    _entered = False  # the key
    _gated = False
    _replica: Replica | None = None
    _connection: UpstreamConnection | None = None
    _tried: frozenset[Replica] = frozenset()
    _stale = False  # a connection ended as this was sent over it
    _last_error: RequestError | None = None
    _task: asyncio.Task[None] | None = None
    _held: list[bytes] | None = None
    _head: bytes | None = None  # of the answer, until its first byte goes with it
    _chunked = False
    _stream: StreamTokens | None = None
    _answer: AnswerTokens | None = None
    _kept_alive = 0.0
    _paused = False  # by a client that is slower than the server
    _over = False

    def __init__(self, forwarding: Forwarding, request: Request, client: ClientConnection, route: Route, key: Key):
        self._forwarding = forwarding
        self.request = request
        self.client = client
        self._route = route
        self._key = key
        self.request_id = forwarding.id_of(request)
        self._body = request.body
        self._last_data = request.started
        self.record = Record(
            "",
            self.request_id.decode("ascii"),
            request.peer,
            key.name,
            route.path,
            bytes_in=len(request.body),
        )
        if forwarding.spans is not None:
            self._span = forwarding.spans.begin(request)

    # --- towards the server ---

    def start(self) -> None:
        """Everything up to the first try, without waiting where nothing has to be waited for."""
        try:
            served = self._prepare()
            self._key.enter(self.request.started)
        except RequestError as error:
            self._refuse(error)
            return
        self._entered = True
        self._forwarding.exchanges.add(self)
        self._served = served
        if served.model.wait_for_ready and not served.ready:
            self._later(self._enter_when_ready(served))
        elif served.gate.try_enter():
            self._gated = True
            self._try()
        else:
            self._later(self._enter(served))

    def _prepare(self) -> Served:
        """Read the request. Raises RequestError 400, 403, 404, 413, 415."""
        request, route = self.request, self._route
        encoding = request.fields.get(b"content-encoding")
        if encoding and encoding.lower() != b"identity":
            self._body = bodies.decompressed(self._body, encoding, self._forwarding.max_body_bytes)
        if route.multipart:
            self._form = bodies.FormField(self._body, request.fields.get(b"content-type", b""), "model")
            self._asked = self._form.value
            served = self._forwarding.registry.choose(self._asked, route, self._key)
            self._session = request.fields.get(b"x-session-id")
        else:
            asked = bodies.asked_in(self._body)
            self._asked = None if asked.model is msgspec.UNSET else asked.model
            served = self._forwarding.registry.choose(self._asked, route, self._key)
            if self._asked is None:
                self._name_the_model(asked, served.model.name)
            self.record.stream = asked.stream is True
            if route.usage_on_request and asked.stream is True:
                self._ask_for_usage(asked)
            if route.path in shapes.ADAPTED or served.deepseek_ocr:
                self._body, self._adapted = shapes.adapted(
                    route, self._body, deepseek_ocr=served.deepseek_ocr, prompts=served.prompts
                )
            if served.model.balancing == "sticky":
                self._session = _session(request, asked)
        self.record.model = served.model.key
        self.record.asked = self._asked[:LONGEST_ECHO] if self._asked else ""
        return served

    def _name_the_model(self, asked: bodies.Asked, name: str) -> None:
        if asked.model is msgspec.UNSET:
            self._body = bodies.with_new_field(self._body, b'"model":' + json.dumps(name).encode("ascii"))
        else:
            self._body = bodies.with_fields(self._body, {"model": name})
        self._asked = name

    def _ask_for_usage(self, asked: bodies.Asked) -> None:
        """The tokens of a stream are known only when they are asked for; the client does not see what it did not."""
        options = asked.stream_options
        if options is msgspec.UNSET:
            self._body = bodies.with_new_field(self._body, b'"stream_options":{"include_usage":true}')
            self._hide_usage = True
        elif options is None or (isinstance(options, dict) and not options.get("include_usage")):
            # Without `include_usage` an engine does not look at the rest, and with it the client would see it.
            others = {name: value for name, value in (options or {}).items() if name != "continuous_usage_stats"}
            self._body = bodies.with_fields(self._body, {"stream_options": {**others, "include_usage": True}})
            self._hide_usage = True

    async def _enter_when_ready(self, served: Served) -> None:
        deadline = time.monotonic() + served.model.wait_for_ready
        if served.waiting >= served.model.max_queue:
            self._refuse(self._not_ready())
            return
        served.waiting += 1
        try:
            while not served.ready and time.monotonic() < deadline:  # noqa: ASYNC110 - a keeper's word is a file
                await asyncio.sleep(LOOK_FOR_READY_SECONDS)
        finally:
            served.waiting -= 1
        await self._enter(served)

    async def _enter(self, served: Served) -> None:
        try:
            await served.gate.enter(self._key.priority, f'"{served.model.name}"')
        except RequestError as error:
            self._refuse(error)
            return
        self._gated = True
        self.record.queued_us = self._microseconds(time.monotonic())
        self._try()

    def _try(self) -> None:
        served, now = self._served, time.monotonic()
        if served is None:
            raise RuntimeError("no model")
        replica = None if served.drained else served.pick(now, self._tried, self._session)
        if replica is None:
            self._refuse(self._last_error or self._not_ready(served.problem or "its last requests failed"))
            return
        self._replica = replica
        replica.in_flight += 1
        replica.breaker.begin(now)
        self.record.tries += 1
        self.record.upstream = replica.name
        self._last_data = now
        connection = replica.take(now)
        if connection is None:
            self._later(self._connect(replica))
        else:
            self._send(connection, replica)

    async def _connect(self, replica: Replica) -> None:
        try:
            connection = await replica.connect()
        except OSError as error:
            self._failed(self._unreachable(error))
            return
        self._send(connection, replica)

    def _send(self, connection: UpstreamConnection, replica: Replica) -> None:
        try:
            body = self._body_for(replica)
        except RequestError as error:
            connection.close()
            self._release_replica()
            replica.breaker.forget()
            self._refuse(error)
            return
        if not self._forwarded:
            self._forwarded = self._forwarded_headers()
        request = self.request
        query = b"?" + request.query if request.query else b""
        head = b"POST %b%b%b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % (
            replica.path,
            request.target,
            query,
            replica.fixed_headers,
            self._forwarded,
            len(body),
        )
        self._connection = connection
        connection.send(self, head, body)

    def _body_for(self, replica: Replica) -> bytes:
        if self._asked == replica.model:
            return self._body
        if self._form is not None:
            return self._form.replaced(replica.model)
        return bodies.with_fields(self._body, {"model": replica.model})

    def _forwarded_headers(self) -> bytes:
        headers = self.request.headers
        dropped = NOT_FORWARDED
        if b"connection" in self.request.fields:
            dropped = dropped | named_by_connection(headers)
        if self._body is not self.request.body:
            dropped = dropped | {b"content-encoding"}
        lines = [b"x-request-id: ", self.request_id, b"\r\n"]
        if self._span is not None:
            dropped = dropped | self._span.replaced
            lines.append(self._span.line)
        for name, value in headers:
            if name not in dropped:
                lines += (name, b": ", value, b"\r\n")
        return b"".join(lines)

    def _microseconds(self, now: float) -> int:
        """Since the request came."""
        return int((now - self.request.started) * 1e6)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._look_at_end)

    def _look_at_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s %s", self.request.method, self._route.path, exc_info=error)
            if not self._over:
                self.give_up()
                self.client.abort()

    # --- when it fails ---

    def _failed(self, error: RequestError, *, broken: bool = True, pause: float | None = None) -> None:
        """No byte of an answer went to the client: try again, elsewhere first, or say why not."""
        replica = self._release_replica()
        if replica is None or self._over:
            return
        now = time.monotonic()
        if broken:
            replica.breaker.fail(now)
        else:
            replica.breaker.forget()
        self._tried = self._tried | {replica}
        self._last_error = error
        if self._span is not None:
            self._span.failed_try(self._microseconds(now), replica.name, error.code)
        if not self._may_retry:
            self._refuse(error)
        elif self._served is not None and self._served.has_untried(now, self._tried):
            self._try()
        else:
            growing = FIRST_PAUSE_SECONDS * PAUSE_GROWTH ** (self.record.tries - 1)
            seconds = min(pause if pause is not None else growing, LONGEST_PAUSE_SECONDS)
            least = 0.8 if pause is None else 1.0  # of a pause that was asked for
            self._later(self._try_after(seconds * random.uniform(least, 1.2)))  # noqa: S311

    @property
    def _may_retry(self) -> bool:
        return self.record.tries <= self._forwarding.retries

    async def _try_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._try()

    def _release_replica(self) -> Replica | None:
        """Not in flight there any more."""
        replica, self._replica = self._replica, None
        self._connection = None
        if replica is not None:
            replica.in_flight -= 1
        return replica

    def _unreachable(self, error: OSError) -> RequestError:
        replica = self._replica
        if replica is None or replica.local:
            return self._not_ready()
        why = (
            "did not accept a connection in time"
            if isinstance(error, TimeoutError)
            else f"can't be reached: {replica.tls_problem(error) or error}"
        )
        return self._engine_error(f"is served by {replica.name}, which {why}")

    def _not_ready(self, what: str | None = None) -> RequestError:
        served = self._served
        if served is None:
            raise RuntimeError("no model")
        words = (what or served.problem or "it does not answer on its port", served.reason)
        why = ": ".join(word for word in words if word)
        return not_ready(f'"{served.model.name}" is not ready: {why}', served.retry_after(time.monotonic()))

    def _engine_error(self, what: str) -> RequestError:
        name = self._served.model.name if self._served else ""
        return RequestError(502, f'"{name}" {what}', code="engine_error")

    def _refuse(self, error: RequestError) -> None:
        """The router's own answer."""
        self.record.status = error.status
        self.record.error = error.owner
        error.shape = self._route.errors
        headers = [*error.wire_headers(), (b"x-request-id", self.request_id)]
        client = self.client
        self._finish()
        client.answer(error.status, headers, error.body())

    # --- the answer, as it comes ---

    def answer_began(self, status: int, headers: Headers, *, length: int | None) -> None:
        replica = self._replica
        if replica is None or self._connection is None:
            return
        now = self._last_data = time.monotonic()
        if not 200 <= status < 600:
            self._drop_connection()
            self._failed(self._engine_error(f"answered with the status {status}"))
            return
        if status in RETRIED and self._worth_a_retry(status, headers, now):
            self._drop_connection()
            pause = _retry_after(headers)
            self._failed(self._engine_error(f"answered with {status}"), broken=status not in (408, 429), pause=pause)
            return
        if status >= 500 and replica.local:
            # What was in an engine when its core died is answered with 500: is it dying?
            self._held = []
            self._later(self._judge(replica, status, headers, length))
            return
        _learn(replica, status, now)
        self._begin(status, headers, length)

    def _worth_a_retry(self, status: int, headers: Headers, now: float) -> bool:
        if not self._may_retry:
            return False
        wait = _retry_after(headers)
        if wait is None or wait <= LONGEST_PAUSE_SECONDS or self._served is None or self._replica is None:
            return True
        return self._served.has_untried(now, self._tried | {self._replica})

    async def _judge(self, replica: Replica, status: int, headers: Headers, length: int | None) -> None:
        if await is_ending(replica, self._forwarding.run):
            self._drop_connection()
            self._failed(self._not_ready("it failed while it answered"))
            return
        _learn(replica, status, time.monotonic())
        held, self._held = self._held or [], None
        ended = self._connection is None
        self._begin(status, headers, length)
        for data in held:
            self.answer_came(data)
        if ended:
            self.answer_ended()

    def _begin(self, status: int, headers: Headers, length: int | None) -> None:
        """Compose the head; it goes out with the first byte of the body."""
        record = self.record
        record.status = status
        record.first_byte_us = self._microseconds(self._last_data)
        if status >= 400:
            record.error = "client" if status < 500 else "engine"
        fields = dict(headers)
        kind = fields.get(b"content-type", b"")
        dropped = NOT_ANSWERED
        if b"connection" in fields:
            dropped = dropped | named_by_connection(headers)
        lines = b"x-request-id: %b\r\nx-served-by: %b\r\n" % (self.request_id, record.upstream.encode())
        if status >= 400:
            lines += b"x-error-source: engine\r\n"
            self._adapted = None
        elif kind.startswith(b"text/event-stream"):
            self._stream = StreamTokens(hide=self._hide_usage)
            length = None  # of ours there may be less or more: hidden events, comments, an error at the end
        elif kind.startswith(b"application/json"):
            self._answer = AnswerTokens()
        if self._adapted is not None:
            ours = [(b"x-request-id", self.request_id), (b"x-served-by", record.upstream.encode())]
            self._adapted.head = [*ours, *(each for each in headers if each[0] not in dropped)]
            return
        if length is not None:
            lines += b"content-length: %d\r\n" % length
        elif self.request.version == "1.0":
            self.request.keep_alive = False
        elif status not in (204, 304):
            self._chunked = True
            lines += b"transfer-encoding: chunked\r\n"
        self._head = self.client.head(status, headers, dropped, lines)

    def answer_came(self, data: bytes) -> None:
        self._last_data = time.monotonic()
        stream = self._stream
        if stream is not None:  # most of all calls
            data = stream.take(data)
            if data:
                self._write(data)
            return
        if self._held is not None:
            self._held.append(data)
            return
        if self._answer is not None:
            self._answer.take(data)
        if self._adapted is not None:
            self._adapted.take(data)
        else:
            self._write(data)

    def _write(self, data: bytes) -> None:
        self.record.bytes_out += len(data)
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head is not None:
            data = self._head + data
            self._head = None
        self.client.write(data)

    def answer_ended(self) -> None:
        if self._held is not None:
            self._connection = None  # what was held goes out when it was judged
            return
        record, client, stream = self.record, self.client, self._stream
        if stream is not None:
            if rest := stream.end():
                self._write(rest)
            self._count(stream)
        elif self._answer is not None:
            record.prompt_tokens, record.completion_tokens = self._answer.counts()
        if self._adapted is not None:
            adapted = self._adapted
            try:
                body = adapted.body()
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                self._break_off(f"answered something that is no ranking: {error!r}")
                return
            self._release_replica()
            self._finish()
            client.answer(record.status, adapted.head, body)
            return
        last = b"0\r\n\r\n" if self._chunked else b""
        if self._head is not None:
            last, self._head = self._head + last, None
        if last:
            client.write(last)
        self._release_replica()
        self._finish()
        client.done()

    def answer_lost(self, why: str, *, rubbish: bool) -> None:
        connection, held = self._connection, self._held
        replica = self._replica
        if replica is None:
            return
        if self.record.first_byte_us is None and held is None:
            if connection is not None and connection.used and not rubbish and not self._stale:
                # Idle connections end while a request is on its way to them; that says nothing of the server.
                self._stale = True
                self._connection = None
                self._later(self._connect(replica))
                return
            self._failed(self._lost(replica, why, rubbish=rubbish))
            return
        if held is not None:  # its 500 was being judged; whoever ends like this is ending
            self._held = None
            if self._task is not None:
                self._task.cancel()
            self._failed(self._lost(replica, why, rubbish=rubbish))
            return
        replica.breaker.fail(time.monotonic())
        self._break_off(f"broke off its answer: {why}")

    def _lost(self, replica: Replica, why: str, *, rubbish: bool) -> RequestError:
        if rubbish:
            return self._engine_error(f"answered something that is not HTTP: {why}")
        if replica.local:  # it ended; its keeper sees it
            return self._not_ready("it closed the connection before it answered")
        return self._engine_error(f"is served by {replica.name}, which closed the connection before it answered")

    def _break_off(self, what: str) -> None:
        """An answer that began can't be taken back: a stream says what happened, anything else is cut."""
        client, stream = self.client, self._stream
        self.record.error = "engine"
        error = self._engine_error(what)
        error.shape = self._route.errors
        if stream is not None:
            before = stream.broken_off()
            self._count(stream)
            self._write(before + error.event())
            if self._chunked:
                client.write(b"0\r\n\r\n")
        unsent = stream is None and (self._adapted is not None or self._head is not None)
        if unsent:
            self.record.status = error.status
        self._release_replica()
        self._finish()
        if stream is not None:
            client.done()
        elif unsent:
            client.answer(error.status, [*error.wire_headers(), (b"x-request-id", self.request_id)], error.body())
        else:
            client.abort()

    def tick(self, now: float) -> None:
        replica = self._replica
        if replica is None:
            return
        silent = now - self._last_data
        limit = replica.endpoint.timeout
        if limit and silent > limit and self._connection is not None and not self._paused:
            self._drop_connection()
            if self.record.first_byte_us is None:
                message = f"is served by {replica.name}, which was silent for {limit:g} s"
                error = self._engine_error(message)
                error.status = 504
                self._failed(error)
            else:
                self._break_off(f"was silent for {limit:g} s")
        elif now - max(self._last_data, self._kept_alive) > KEEP_ALIVE_SECONDS:
            if self._stream is not None and self._stream.at_border:
                self._write(b": keep-alive\n\n")
            self._kept_alive = now

    # --- the ends ---

    def client_left(self) -> None:
        if self._over:
            return
        if self._task is not None:
            self._task.cancel()
        self._drop_connection()
        replica = self._release_replica()
        if replica is not None:
            replica.breaker.forget()
        self.record.error = "client"
        if self._stream is not None:
            self._count(self._stream)
        self._finish()

    def give_up(self) -> None:
        """After an error of our own; nothing may stay taken."""
        self._drop_connection()
        replica = self._release_replica()
        if replica is not None:
            replica.breaker.forget()
        self.record.status, self.record.error = 500, "router"
        self._finish()

    def pause(self) -> None:
        self._paused = True
        if self._connection is not None:
            self._connection.pause_reading()

    def resume(self) -> None:
        self._paused = False
        self._last_data = time.monotonic()
        if self._connection is not None:
            self._connection.resume_reading()

    def _count(self, stream: StreamTokens) -> None:
        self.record.prompt_tokens, self.record.completion_tokens = stream.counts

    def _drop_connection(self) -> None:
        """The server notices, and ends what it was doing for us."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _finish(self) -> None:
        """Give back what was taken, once, and say what it was."""
        if self._over:
            return
        self._over = True
        self._forwarding.exchanges.discard(self)
        record, now = self.record, time.monotonic()
        seconds = now - self.request.started
        record.duration_us = int(seconds * 1e6)
        if self._gated and self._served is not None:
            self._served.gate.leave(seconds - record.queued_us * 1e-6)
        if self._entered:
            self._key.leave(record.prompt_tokens + record.completion_tokens, now)
        self._forwarding.note(record)
        if self._span is not None:
            self._span.end(record)


def _learn(replica: Replica, status: int, now: float) -> None:
    """A 500 may be the request's fault, and tells nothing of the server."""
    if status < 500:
        replica.breaker.succeed()
    elif status in RETRIED:
        replica.breaker.fail(now)
    else:
        replica.breaker.forget()


def named_by_connection(headers: Headers) -> frozenset[bytes]:
    """`Connection: close, x-mine` says that x-mine speaks of this connection alone."""
    values = [value for name, value in headers if name == b"connection"]
    if not values or values == [b"keep-alive"] or values == [b"close"]:
        return frozenset()
    return frozenset(word.strip().lower() for value in values for word in value.split(b","))


def _retry_after(headers: Headers) -> float | None:
    """Seconds; None when it does not say, or says a date."""
    value = next((value for name, value in headers if name == b"retry-after"), b"")
    return float(value) if value.isdigit() else None


def _session(request: Request, asked: bodies.Asked) -> bytes | None:
    given = request.fields.get(b"x-session-id")
    if given:
        return given
    return asked.user.encode() if isinstance(asked.user, str) else None
