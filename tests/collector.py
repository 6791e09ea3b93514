"""A collector of OpenTelemetry in this process: takes OTLP over HTTP with Protobuf, and keeps what it was sent."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.conftest import eventually

SERVER, INTERNAL = trace_pb2.Span.SPAN_KIND_SERVER, trace_pb2.Span.SPAN_KIND_INTERNAL


@dataclass(frozen=True)
class Span:
    """Ids in hex, as traceparent has them; `parent` is "" of one that begins its trace. Times in seconds."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    kind: int
    failed: bool
    began: float
    ended: float
    attributes: dict[str, Any]
    events: list[tuple[str, float, dict[str, Any]]]


class Collector:
    """`behave(status, seconds)`: how it answers from now on, and after how long."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.exports: list[tuple[str, dict[str, str]]] = []  # path and headers of each
        self.behave()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.collector = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "Collector":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def behave(self, status: int = 200, seconds: float = 0.0) -> None:
        self.status, self.seconds = status, seconds

    def found(self, is_wanted: Callable[[Span], bool], count: int = 1) -> list[Span]:
        """As soon as there are that many, in the order of their beginnings."""
        eventually(lambda: len(self._which(is_wanted)) >= count)
        spans = self._which(is_wanted)
        assert len(spans) == count, spans
        return spans

    def one(self, name: str, **attributes: Any) -> Span:
        """`attributes`: a dot is written as two underscores."""
        wanted = {each.replace("__", "."): value for each, value in attributes.items()}
        return self.found(lambda span: span.name == name and wanted.items() <= span.attributes.items())[0]

    def _which(self, is_wanted: Callable[[Span], bool]) -> list[Span]:
        return sorted((span for span in list(self.spans) if is_wanted(span)), key=lambda span: span.began)

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        self.exports.append((path, headers))
        if self.status != 200:
            return
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = str(_values(of_resource.resource.attributes)["service.name"])
            for of_scope in of_resource.scope_spans:
                self.spans += [_span(service, each) for each in of_scope.spans]


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        collector: Collector = self.server.collector  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers["content-length"]))
        time.sleep(collector.seconds)
        collector.take(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        self.send_response(collector.status)
        self.send_header("content-length", "0")
        self.end_headers()


def _span(service: str, span: trace_pb2.Span) -> Span:
    return Span(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        span.start_time_unix_nano * 1e-9,
        span.end_time_unix_nano * 1e-9,
        _values(span.attributes),
        [(each.name, each.time_unix_nano * 1e-9, _values(each.attributes)) for each in span.events],
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
