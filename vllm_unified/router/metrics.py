"""The router's own metrics, for Prometheus. Counting is ours, as every request comes by; so are the lines of the keys,
of which there may be tens of thousands. The rest of the text is the library's.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from vllm_unified import __version__
from vllm_unified.router.families import PREFIX, Histogram, Labels, counter, gauge, histogram
from vllm_unified.router.keys import Key
from vllm_unified.router.record import Owner, Record
from vllm_unified.router.registry import Registry, Served
from vllm_unified.router.replica import Replica
from vllm_unified.state import EngineState, Phase

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds. A cached prompt answers in milliseconds, a long answer takes minutes.
WAIT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DURATION_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
OWNERS: tuple[Owner, ...] = ("client", "router", "engine")
KINDS = ("prompt", "completion")
BREAKER_STATES = {"closed": 0, "half_open": 1, "open": 2}


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

    def __init__(self, duration: Histogram, first_byte: Histogram, queue: Histogram) -> None:
        super().__init__()
        self.retries = 0
        self.duration = duration
        self.first_byte = first_byte
        self.queue = queue


class Metrics(Collector):
    """`note` takes in what is over, `text` tells it together with how things stand."""

    def __init__(
        self,
        registry: Registry,
        keys_of: Callable[[], Iterable[Key]],
        connections: Callable[[], int],
        dropped: Callable[[], int],
        *others: Collector,
    ) -> None:
        """`keys_of`: all keys. `connections`: how many clients are connected now. `dropped`: lines of the access log
        that were lost. `others`: what else is told.
        """
        self._registry = registry
        self._keys_of = keys_of
        self._connections = connections
        self._dropped = dropped
        self._requests: dict[tuple[str, str, int, Owner, bool], _Alike] = {}
        self._keys: dict[str, _Use] = {}
        self._duration: dict[Labels, Histogram] = {}
        self._first_byte: dict[Labels, Histogram] = {}
        self._queue: dict[Labels, Histogram] = {}
        self._exposed = CollectorRegistry(auto_describe=False)
        for each in (self, *others):
            self._exposed.register(each)
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
        """Of the type CONTENT_TYPE. From a thread: it takes milliseconds, and requests go on meanwhile."""
        return generate_latest(self._exposed) + "".join(self._lines_of_keys()).encode()

    def collect(self) -> Iterable[Metric]:
        yield from self._counters()
        yield from self._histograms()
        yield from self._gauges()

    def _first_of(self, kind: tuple[str, str, int, Owner, bool]) -> _Alike:
        model, _, _, _, stream = kind
        alike = self._requests[kind] = _Alike(
            self._duration.setdefault((model,), Histogram(DURATION_BOUNDS)),
            self._first_byte.setdefault((model, _flag(stream)), Histogram(WAIT_BOUNDS)),
            self._queue.setdefault((model,), Histogram(WAIT_BOUNDS)),
        )
        return alike

    def _counters(self) -> Iterator[Metric]:
        # What is configured begins at 0: Prometheus takes no notice of a step from nothing to 1.
        models = [served.model.key for served in self._registry.served]
        requests: Counter[Labels] = Counter()
        errors: Counter[Labels] = Counter(dict.fromkeys(((model, owner) for model in models for owner in OWNERS), 0))
        retries: Counter[Labels] = Counter(dict.fromkeys(((model,) for model in models), 0))
        tokens: Counter[Labels] = Counter(dict.fromkeys(((model, kind) for model in models for kind in KINDS), 0))
        for (model, path, status, error, stream), alike in list(self._requests.items()):
            requests[model, path, _code(status), _flag(stream)] += alike.requests
            if error:
                errors[model, error] += alike.requests
            if model:
                retries[model,] += alike.retries
                for kind, count in alike.tokens():
                    tokens[model, kind] += count
        yield counter("requests", "Requests that are over", ("model", "path", "code", "stream"), requests)
        yield counter("errors", "Requests that failed, by whose error it was", ("model", "owner"), errors)
        yield counter("retries", "Tries beyond a request's first", ("model",), retries)
        yield counter("tokens", "Tokens, as the servers count them", ("model", "kind"), tokens)
        yield counter("access_log_dropped", "Lines of the access log that were lost", (), {(): self._dropped()})

    def _histograms(self) -> Iterator[Metric]:
        duration = "From request to end of answer, of requests that reached a server"
        first_byte = "From request to first byte of answer, of requests that reached a server"
        yield histogram("request_duration", duration, ("model",), dict(self._duration))
        yield histogram("time_to_first_byte", first_byte, ("model", "stream"), dict(self._first_byte))
        yield histogram("queue", "Waiting for a slot, or for the model to be ready", ("model",), dict(self._queue))

    def _gauges(self) -> Iterator[Metric]:
        now = time.monotonic()
        models: dict[Labels, Served] = {(served.model.key,): served for served in self._registry.served}
        replicas: dict[Labels, Replica] = {
            (*labels, each.name): each for labels, served in models.items() for each in served.replicas
        }
        in_flight = {labels: served.gate.active for labels, served in models.items()}
        queued = {labels: served.gate.queued for labels, served in models.items()}
        waiting = {labels: served.waiting for labels, served in models.items()}
        # Without a limit all are let in, and wait in the engine's own queue.
        limited = {each: served for each, served in models.items() if served.gate.limit is not None or not served.ready}
        wait = {labels: served.wait_seconds(now) for labels, served in limited.items()}
        ready = {labels: served.ready for labels, served in models.items()}
        drained = {labels: served.drained for labels, served in models.items()}
        up = {labels: each.ready for labels, each in replicas.items()}
        sent = {labels: each.in_flight for labels, each in replicas.items()}
        breakers = {labels: BREAKER_STATES[each.breaker.state(now)] for labels, each in replicas.items()}
        yield gauge("in_flight", "Requests that were let in", ("model",), in_flight)
        yield gauge("queued", "Requests that wait for a slot", ("model",), queued)
        yield gauge("waiting", "Requests that wait for the model to be ready", ("model",), waiting)
        yield gauge("estimated_wait_seconds", "What a request that comes now is likely to wait", ("model",), wait)
        yield gauge("model_ready", "1 when it takes requests", ("model",), ready)
        yield gauge("model_drained", "1 when an operator has taken it out of service", ("model",), drained)
        yield gauge("replica_up", "1 when its last health check was good", ("model", "replica"), up)
        yield gauge("replica_in_flight", "Requests that it works on", ("model", "replica"), sent)
        yield gauge("breaker_state", "0 closed, 1 half open, 2 open", ("model", "replica"), breakers)
        yield gauge("connections", "Connections of clients", (), {(): self._connections()})
        yield gauge("build_info", "1; the version is the label", ("version",), {(__version__,): 1})
        # The loop may replace each of them meanwhile.
        yield from _engines({(each.name,): said for each in replicas.values() if (said := each.engine)})

    def _lines_of_keys(self) -> Iterator[str]:
        """No name of a key has a character that would have to be escaped."""
        used = list(self._keys.items())
        yield from _head("key_requests_total", "counter", "Requests of an API key")
        yield from (f'{PREFIX}key_requests_total{{key="{key}"}} {use.requests}\n' for key, use in used)
        yield from _head("key_tokens_total", "counter", "Tokens of an API key")
        yield from (
            f'{PREFIX}key_tokens_total{{key="{key}",kind="prompt"}} {use.prompt_tokens}\n'
            f'{PREFIX}key_tokens_total{{key="{key}",kind="completion"}} {use.completion_tokens}\n'
            for key, use in used
        )
        now, wall = time.monotonic(), time.time()
        yield from _head("key_limit_used_ratio", "gauge", "Share of a limit of an API key that is used, 1 at the limit")
        yield from (
            f'{PREFIX}key_limit_used_ratio{{key="{key.name}",limit="{limit}"}} {ratio:.4g}\n'
            for key in self._keys_of()
            for limit, ratio in key.used_ratios(now, wall)
        )


def _engines(states: dict[Labels, EngineState]) -> Iterator[Metric]:
    """As their keepers tell it."""
    phases = {(*labels, phase): said.phase is phase for labels, said in states.items() for phase in Phase}
    restarts = {labels: said.restarts for labels, said in states.items()}
    hangs = {labels: said.hangs for labels, said in states.items()}
    starts = {labels: said.ready_after for labels, said in states.items() if said.ready_after is not None}
    downtimes = {labels: said.down_for for labels, said in states.items() if said.down_for is not None}
    yield gauge("engine_phase", "1 for the phase that the engine is in", ("model", "phase"), phases)
    yield counter("engine_restarts", "Restarts by its keeper, or of it", ("model",), restarts)
    yield counter("engine_hangs", "Restarts because it made no progress", ("model",), hangs)
    yield gauge("engine_start_seconds", "From start to ready, of the last start", ("model",), starts)
    yield gauge("engine_downtime_seconds", "From not ready to ready, of the last restart", ("model",), downtimes)


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {PREFIX}{name} {text}\n", f"# TYPE {PREFIX}{name} {kind}\n"


def _code(status: int) -> str:
    return f"{status // 100}xx" if status else "left"


def _flag(value: bool) -> str:
    return "true" if value else "false"
