"""What is counted, read back by Prometheus' own parser."""

import asyncio
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Project
from vllm_unified import __version__
from vllm_unified.router.keys import Key
from vllm_unified.router.metrics import Metrics
from vllm_unified.router.record import Owner, Record
from vllm_unified.router.registry import Registry
from vllm_unified.settings.keys import KeyEntry, hash_of
from vllm_unified.state import EngineState, Phase

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def registry(project: Project) -> Registry:
    project.write(
        {
            "chat": {"name": "Qwen", "type": "chat", "max_concurrent": 1},
            "vectors": {"name": "bge", "type": "embedding", "endpoints": ["http://gpu-2:8000", "http://gpu-3:8000"]},
        }
    )
    return Registry(project.load())


@pytest.fixture
def keys() -> list[Key]:
    return []


@pytest.fixture
def metrics(registry: Registry, keys: list[Key]) -> Metrics:
    return Metrics(registry, lambda: keys, connections=lambda: 7, dropped=lambda: 3)


def record(
    *,
    model: str = "chat",
    status: int = 200,
    error: Owner = "",
    stream: bool = False,
    upstream: str = "chat",
    tries: int = 1,
    queued: float = 0.0,
    first_byte: float | None = 0.2,
    seconds: float = 3.0,
    tokens: tuple[int, int] = (0, 0),
    key: str = "team",
) -> Record:
    """`first_byte` and `seconds` are from the start on."""
    return Record(
        "",
        "id-1",
        "127.0.0.1",
        key,
        "/v1/chat/completions",
        model=model,
        status=status,
        error=error,
        stream=stream,
        upstream=upstream,
        tries=tries,
        queued_us=int(queued * 1e6),
        first_byte_us=None if first_byte is None else int(first_byte * 1e6),
        duration_us=int(seconds * 1e6),
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
    )


def samples(metrics: Metrics) -> Samples:
    return {
        (sample.name.removeprefix("vllm_unified_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


@pytest.mark.parametrize(
    ("status", "code"), [(200, "2xx"), (307, "3xx"), (404, "4xx"), (429, "4xx"), (503, "5xx"), (0, "left")]
)
def test_requests_are_counted_by_model_path_and_outcome(metrics: Metrics, status: int, code: str) -> None:
    metrics.note(record(status=status))
    metrics.note(record(status=status))
    metrics.note(record(status=status, stream=True))
    path = "/v1/chat/completions"
    assert value(metrics, "requests_total", model="chat", path=path, code=code, stream="false") == 2
    assert value(metrics, "requests_total", model="chat", path=path, code=code, stream="true") == 1


def test_statuses_of_one_class_are_one_series(metrics: Metrics) -> None:
    for status in (400, 404, 429):
        metrics.note(record(status=status, error="client"))
    path = "/v1/chat/completions"
    assert value(metrics, "requests_total", model="chat", path=path, code="4xx", stream="false") == 3
    assert value(metrics, "errors_total", model="chat", owner="client") == 3


def test_an_error_is_its_owners_also_in_a_stream_that_began(metrics: Metrics) -> None:
    metrics.note(record(status=200, error="engine", stream=True))
    metrics.note(record(status=404, error="client", model="", upstream="", first_byte=None))
    found = {
        owner: value(metrics, "errors_total", model="chat", owner=owner) for owner in ("client", "router", "engine")
    }
    assert found == {"client": 0, "router": 0, "engine": 1}
    assert value(metrics, "errors_total", model="", owner="client") == 1


def test_tokens_retries_and_keys(metrics: Metrics) -> None:
    metrics.note(record(tokens=(10, 4), tries=3))
    metrics.note(record(tokens=(1, 2), key="other"))
    metrics.note(record(tokens=(5, 0), model="vectors", upstream="gpu-2:8000"))
    metrics.note(record(key="", status=401, error="client", model="", upstream="", tries=0))
    assert value(metrics, "tokens_total", model="chat", kind="prompt") == 11
    assert value(metrics, "tokens_total", model="chat", kind="completion") == 6
    assert value(metrics, "tokens_total", model="vectors", kind="prompt") == 5
    assert value(metrics, "retries_total", model="chat") == 2
    assert value(metrics, "retries_total", model="vectors") == 0
    assert value(metrics, "key_requests_total", key="team") == 2
    assert value(metrics, "key_tokens_total", key="team", kind="prompt") == 15
    assert value(metrics, "key_tokens_total", key="other", kind="completion") == 2
    assert value(metrics, "key_requests_total", key="") is None


@pytest.mark.parametrize(
    ("seconds", "bound", "below"),
    [
        (0.005, "0.01", 1),
        (0.25, "0.25", 1),
        (0.2501, "0.25", 0),
        (599.9, "600.0", 1),
        (601, "600.0", 0),
        (9e4, "+Inf", 1),
    ],
)
def test_a_bucket_holds_what_is_not_above_its_bound(metrics: Metrics, seconds: float, bound: str, below: int) -> None:
    metrics.note(record(seconds=seconds, first_byte=None))
    assert value(metrics, "request_duration_seconds_bucket", model="chat", le=bound) == below
    assert value(metrics, "request_duration_seconds_count", model="chat") == 1
    assert value(metrics, "request_duration_seconds_sum", model="chat") == pytest.approx(seconds)


def test_first_bytes_are_apart_for_streams_and_whole_answers(metrics: Metrics) -> None:
    metrics.note(record(stream=True, first_byte=0.02))
    metrics.note(record(stream=True, first_byte=0.4))
    metrics.note(record(first_byte=3.0))
    assert value(metrics, "time_to_first_byte_seconds_bucket", model="chat", stream="true", le="0.025") == 1
    assert value(metrics, "time_to_first_byte_seconds_count", model="chat", stream="true") == 2
    assert value(metrics, "time_to_first_byte_seconds_sum", model="chat", stream="false") == pytest.approx(3.0)


def test_refusals_do_not_flatter_the_latencies(metrics: Metrics) -> None:
    metrics.note(record())
    metrics.note(record(status=429, error="client", upstream="", first_byte=0.0, seconds=0.001))
    metrics.note(record(status=503, error="router", upstream="", first_byte=None, queued=60.0, seconds=60.0))
    assert value(metrics, "request_duration_seconds_count", model="chat") == 1
    assert value(metrics, "time_to_first_byte_seconds_count", model="chat", stream="false") == 1
    assert value(metrics, "queue_seconds_count", model="chat") == 2
    assert value(metrics, "queue_seconds_sum", model="chat") == pytest.approx(60.0)


async def _let_in_two(registry: Registry, metrics: Metrics) -> tuple[float | None, float | None]:
    gate = registry.served[0].gate
    assert gate.try_enter()
    second = asyncio.create_task(gate.enter(0, "chat"))
    await asyncio.sleep(0)
    found = value(metrics, "in_flight", model="chat"), value(metrics, "queued", model="chat")
    gate.leave(0.1)
    await second
    return found


def test_gauges_tell_how_things_stand(metrics: Metrics, registry: Registry) -> None:
    assert asyncio.run(_let_in_two(registry, metrics)) == (1, 1)
    chat, vectors = registry.served
    chat.replicas[0].error = None
    chat.waiting = 2
    one, two = vectors.replicas
    one.in_flight = 5
    for _ in range(5):
        two.breaker.fail(0.0)  # so long ago that it lets a request through
    found = samples(metrics)
    told = {
        (name, *sorted(dict(labels).values())): number
        for (name, labels), number in found.items()
        if name in ("waiting", "model_ready", "replica_up", "replica_in_flight", "breaker_state")
    }
    assert told == {
        ("waiting", "chat"): 2,
        ("waiting", "vectors"): 0,
        ("model_ready", "chat"): 1,
        ("model_ready", "vectors"): 0,
        ("replica_up", "chat", "chat"): 1,
        ("replica_up", "gpu-2:8000", "vectors"): 0,
        ("replica_up", "gpu-3:8000", "vectors"): 0,
        ("replica_in_flight", "chat", "chat"): 0,
        ("replica_in_flight", "gpu-2:8000", "vectors"): 5,
        ("replica_in_flight", "gpu-3:8000", "vectors"): 0,
        ("breaker_state", "chat", "chat"): 0,
        ("breaker_state", "gpu-2:8000", "vectors"): 0,
        ("breaker_state", "gpu-3:8000", "vectors"): 1,
    }
    assert value(metrics, "connections") == 7
    assert value(metrics, "access_log_dropped_total") == 3
    assert value(metrics, "build_info", version=__version__) == 1
    assert (value(metrics, "process_resident_memory_bytes") or 0) > 1 << 20


def test_what_a_request_would_wait_is_what_retry_after_says(metrics: Metrics, registry: Registry) -> None:
    chat, vectors = registry.served
    chat.replicas[0].error = None
    assert value(metrics, "estimated_wait_seconds", model="chat") == 0
    chat.gate.try_enter()
    chat.gate.mean_seconds, chat.gate.queued = 4.0, 2
    assert value(metrics, "estimated_wait_seconds", model="chat") == 12  # three that take 4 s, one after the other
    chat.replicas[0].closed, chat.replicas[0].ready_at = "starting", time.monotonic() + 100
    assert value(metrics, "estimated_wait_seconds", model="chat") == pytest.approx(100, abs=5)
    assert value(metrics, "estimated_wait_seconds", model="vectors") == 5  # nobody knows
    vectors.replicas[0].error = None
    assert value(metrics, "estimated_wait_seconds", model="vectors") is None, "it has no limit, and its engine a queue"


def test_shares_of_limits(metrics: Metrics, keys: list[Key]) -> None:
    limits: dict[str, Any] = {
        "requests_per_minute": 4,
        "tokens_per_minute": 1000,
        "max_concurrent": 2,
        "tokens_per_day": 400,
    }
    month: dict[str, Any] = {"tokens_per_month": 10_000}
    keys += [Key(KeyEntry(name=name, hash=hash_of(name), **fields)) for name, fields in (("a", limits), ("b", month))]
    keys.append(Key(KeyEntry(name="free", hash=hash_of("free"))))
    for key in keys:
        key.enter(time.monotonic())
        key.leave(100, time.monotonic())
        key.enter(time.monotonic())
    found = {
        (dict(labels)["key"], dict(labels)["limit"]): share
        for (name, labels), share in samples(metrics).items()
        if name == "key_limit_used_ratio"
    }
    assert found == {
        ("a", "requests_per_minute"): 0.5,
        ("a", "tokens_per_minute"): 0.1,
        ("a", "max_concurrent"): 0.5,
        ("a", "tokens_per_day"): 0.25,
        ("b", "tokens_per_month"): 0.01,
    }


def test_a_share_of_a_day_ends_with_it() -> None:
    key = Key(KeyEntry(name="a", hash=hash_of("a"), tokens_per_day=100, tokens_per_month=200, tokens_per_minute=100))
    key.enter(1000.0)
    key.leave(50, 1000.0)
    today, now = dict(key.used_ratios(1000.0, time.time())), time.time()
    assert today == {"tokens_per_minute": 0.5, "tokens_per_day": 0.5, "tokens_per_month": 0.25}
    later = dict(key.used_ratios(1061.0, now + 40 * 86400))
    assert later == {"tokens_per_minute": 0, "tokens_per_day": 0, "tokens_per_month": 0}
    assert dict(key.used_ratios(1000.0, now)) == today  # asking changes nothing


def test_engines_as_their_keepers_tell_them(metrics: Metrics, registry: Registry) -> None:
    said = EngineState("chat", Phase.BACKOFF, since=0.0, restarts=3, hangs=1, ready_after=20.5, down_for=31.0)
    registry.served[0].replicas[0].engine = said
    phases = {
        dict(labels)["phase"]: number for (name, labels), number in samples(metrics).items() if name == "engine_phase"
    }
    assert phases == {phase: float(phase == "backoff") for phase in Phase}
    told = ("restarts_total", "hangs_total", "start_seconds", "downtime_seconds")
    assert [value(metrics, f"engine_{name}", model="chat") for name in told] == [3, 1, 20.5, 31]
    registry.served[0].replicas[0].engine = EngineState("chat", Phase.STARTING, since=0.0)
    assert [value(metrics, f"engine_{name}", model="chat") for name in told] == [0, 0, None, None]


def test_a_model_that_is_gone_keeps_its_counters_and_no_gauges(
    metrics: Metrics, registry: Registry, project: Project
) -> None:
    metrics.note(record())
    project.write({"vectors": {"name": "bge", "type": "embedding", "endpoints": ["http://gpu-2:8000"]}})
    registry.apply(project.load())
    of_chat = {name for name, labels in samples(metrics) if ("model", "chat") in labels}
    assert "requests_total" in of_chat
    assert of_chat.isdisjoint({"in_flight", "queued", "waiting", "model_ready", "replica_up", "breaker_state"})
    assert value(metrics, "replica_up", model="vectors", replica="gpu-3:8000") is None


def test_each_family_has_its_help_and_its_unit(metrics: Metrics) -> None:
    metrics.note(record())
    for family in text_string_to_metric_families(metrics.text().decode()):
        assert family.documentation, family.name
        assert family.type != "unknown", family.name
        assert family.type != "histogram" or family.name.endswith("_seconds")
