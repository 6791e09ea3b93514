"""The router's own metrics, for Prometheus. Counting is ours, as every request comes by; the text is the library's."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_unified import __version__
from vllm_unified.router.record import Owner, Record
from vllm_unified.router.registry import Registry, Served
from vllm_unified.router.replica import Replica

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds. A cached prompt answers in milliseconds, a long answer takes minutes.
WAIT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DURATION_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
OWNERS: tuple[Owner, ...] = ("client", "router", "engine")
KINDS = ("prompt", "completion")
BREAKER_STATES = {"closed": 0, "half_open": 1, "open": 2}

Labels = tuple[str, ...]


class _Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def buckets(self) -> Iterator[tuple[str, float]]:
        """Upper bound, and how many were not above it."""
        below = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            yield bound, below


class _Use:
    """What requests that are alike have used."""

    __slots__ = ("completion_tokens", "prompt_tokens", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def tokens(self) -> Iterator[tuple[str, int]]:
        return zip(KINDS, (self.prompt_tokens, self.completion_tokens), strict=True)


class _Alike(_Use):
    """The requests of one model, path, status, owner of the error, and of one kind: streamed or not."""

    __slots__ = ("duration", "first_byte", "queue", "retries")

    def __init__(self, duration: _Histogram, first_byte: _Histogram, queue: _Histogram) -> None:
        super().__init__()
        self.retries = 0
        self.duration = duration
        self.first_byte = first_byte
        self.queue = queue


class Metrics(Collector):
    """`note` takes in what is over, `text` tells it together with how things stand."""

    def __init__(self, registry: Registry, connections: Callable[[], int]) -> None:
        """`connections`: how many clients are connected now."""
        self._registry = registry
        self._connections = connections
        self._requests: dict[tuple[str, str, int, Owner, bool], _Alike] = {}
        self._keys: dict[str, _Use] = {}
        self._duration: dict[Labels, _Histogram] = {}
        self._first_byte: dict[Labels, _Histogram] = {}
        self._queue: dict[Labels, _Histogram] = {}
        self._exposed = CollectorRegistry(auto_describe=False)
        self._exposed.register(self)
        ProcessCollector(registry=self._exposed)

    def note(self, record: Record) -> None:
        """Called for every request when it is over, so it costs about a microsecond.

        Latencies are of the requests that reached a server: refusals come quickly, and would flatter it.
        """
        kind = (record.model, record.path, record.status, record.error, record.stream)
        alike = self._requests.get(kind) or self._first_of(kind)
        alike.requests += 1
        alike.prompt_tokens += record.prompt_tokens
        alike.completion_tokens += record.completion_tokens
        if record.tries > 1:
            alike.retries += record.tries - 1
        if record.upstream:
            alike.duration.observe(record.duration_us * 1e-6)
            alike.queue.observe(record.queued_us * 1e-6)
            if record.first_byte_us is not None:
                alike.first_byte.observe(record.first_byte_us * 1e-6)
        elif record.queued_us:
            alike.queue.observe(record.queued_us * 1e-6)
        key = record.key
        if key:
            use = self._keys.get(key) or self._keys.setdefault(key, _Use())
            use.requests += 1
            use.prompt_tokens += record.prompt_tokens
            use.completion_tokens += record.completion_tokens

    def text(self) -> bytes:
        """Of the type CONTENT_TYPE."""
        return generate_latest(self._exposed)

    def collect(self) -> Iterable[Metric]:
        yield from self._counters()
        yield from self._histograms()
        yield from self._gauges()

    def _first_of(self, kind: tuple[str, str, int, Owner, bool]) -> _Alike:
        model, _, _, _, stream = kind
        alike = self._requests[kind] = _Alike(
            self._duration.setdefault((model,), _Histogram(DURATION_BOUNDS)),
            self._first_byte.setdefault((model, _flag(stream)), _Histogram(WAIT_BOUNDS)),
            self._queue.setdefault((model,), _Histogram(WAIT_BOUNDS)),
        )
        return alike

    def _counters(self) -> Iterator[Metric]:
        # What is configured begins at 0: Prometheus takes no notice of a step from nothing to 1.
        models = [served.model.key for served in self._registry.served]
        requests: Counter[Labels] = Counter()
        errors: Counter[Labels] = Counter(dict.fromkeys(((model, owner) for model in models for owner in OWNERS), 0))
        retries: Counter[Labels] = Counter(dict.fromkeys(((model,) for model in models), 0))
        tokens: Counter[Labels] = Counter(dict.fromkeys(((model, kind) for model in models for kind in KINDS), 0))
        for (model, path, status, error, stream), alike in self._requests.items():
            requests[model, path, _code(status), _flag(stream)] += alike.requests
            if error:
                errors[model, error] += alike.requests
            if model:
                retries[model,] += alike.retries
                for kind, count in alike.tokens():
                    tokens[model, kind] += count
        by_key: dict[Labels, int] = {(key,): use.requests for key, use in self._keys.items()}
        tokens_by_key: dict[Labels, int] = {
            (key, kind): count for key, use in self._keys.items() for kind, count in use.tokens()
        }
        yield _counter("requests", "Requests that are over", ("model", "path", "code", "stream"), requests)
        yield _counter("errors", "Requests that failed, by whose error it was", ("model", "owner"), errors)
        yield _counter("retries", "Tries beyond a request's first", ("model",), retries)
        yield _counter("tokens", "Tokens, as the servers count them", ("model", "kind"), tokens)
        yield _counter("key_requests", "Requests of an API key", ("key",), by_key)
        yield _counter("key_tokens", "Tokens of an API key", ("key", "kind"), tokens_by_key)

    def _histograms(self) -> Iterator[Metric]:
        duration = "From request to end of answer, of requests that reached a server"
        first_byte = "From request to first byte of answer, of requests that reached a server"
        yield _histogram("request_duration", duration, ("model",), self._duration)
        yield _histogram("time_to_first_byte", first_byte, ("model", "stream"), self._first_byte)
        yield _histogram("queue", "Waiting for a slot, or for the model to be ready", ("model",), self._queue)

    def _gauges(self) -> Iterator[Metric]:
        now = time.monotonic()
        models: dict[Labels, Served] = {(served.model.key,): served for served in self._registry.served}
        replicas: dict[Labels, Replica] = {
            (*labels, each.name): each for labels, served in models.items() for each in served.replicas
        }
        in_flight = {labels: served.gate.active for labels, served in models.items()}
        queued = {labels: served.gate.queued for labels, served in models.items()}
        waiting = {labels: served.waiting for labels, served in models.items()}
        ready = {labels: served.ready for labels, served in models.items()}
        up = {labels: each.ready for labels, each in replicas.items()}
        sent = {labels: each.in_flight for labels, each in replicas.items()}
        breakers = {labels: BREAKER_STATES[each.breaker.state(now)] for labels, each in replicas.items()}
        yield _gauge("in_flight", "Requests that were let in", ("model",), in_flight)
        yield _gauge("queued", "Requests that wait for a slot", ("model",), queued)
        yield _gauge("waiting", "Requests that wait for the model to be ready", ("model",), waiting)
        yield _gauge("model_ready", "1 when it takes requests", ("model",), ready)
        yield _gauge("replica_up", "1 when its last health check was good", ("model", "replica"), up)
        yield _gauge("replica_in_flight", "Requests that it works on", ("model", "replica"), sent)
        yield _gauge("breaker_state", "0 closed, 1 half open, 2 open", ("model", "replica"), breakers)
        yield _gauge("connections", "Connections of clients", (), {(): self._connections()})
        yield _gauge("build_info", "1; the version is the label", ("version",), {(__version__,): 1})


def _counter(name: str, text: str, labels: Sequence[str], series: Mapping[Labels, float]) -> Metric:
    family = CounterMetricFamily(f"vllm_unified_{name}", text, labels=labels)
    for values, value in series.items():
        family.add_metric(values, value)
    return family


def _gauge(name: str, text: str, labels: Sequence[str], series: Mapping[Labels, float]) -> Metric:
    family = GaugeMetricFamily(f"vllm_unified_{name}", text, labels=labels)
    for values, value in series.items():
        family.add_metric(values, value)
    return family


def _histogram(name: str, text: str, labels: Sequence[str], series: Mapping[Labels, _Histogram]) -> Metric:
    family = HistogramMetricFamily(f"vllm_unified_{name}_seconds", text, labels=labels)
    for values, histogram in series.items():
        family.add_metric(values, list(histogram.buckets()), histogram.total)
    return family


def _code(status: int) -> str:
    return f"{status // 100}xx" if status else "left"


def _flag(value: bool) -> str:
    return "true" if value else "false"
