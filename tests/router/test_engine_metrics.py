"""The engines' metrics as one text, read back by Prometheus' own parser."""

import asyncio
from collections import Counter

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Project
from vllm_unified.router.engine_metrics import merged, of_engine, router_address, sd_document
from vllm_unified.router.problems import RequestError
from vllm_unified.router.registry import Registry
from vllm_unified.router.replica import Replica

# What a vLLM 0.32 server answers, shortened.
VLLM = r"""# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 13193.0
python_gc_objects_collected_total{generation="1"} 1402.0
# HELP process_resident_memory_bytes Resident memory size in bytes.
# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes 2.123804672e+09
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="MODEL"} 3.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="MODEL"} 1.234e+06
# HELP vllm:prompt_tokens_created Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0",model_name="MODEL"} 1.7952834e+09
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",note="a \"quoted\", model=\\ {braces}",engine="0"} 1.0
# HELP vllm:time_to_first_token_seconds Histogram of time to first token in seconds.
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="MODEL"} 0.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="MODEL"} 4.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="MODEL"} 6.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="MODEL"} 6.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="MODEL"} 1.5
# HELP http_request_size_bytes Content length of incoming requests by handler.
# TYPE http_request_size_bytes summary
http_request_size_bytes_count{handler="/v1/chat/completions"} 6.0
http_request_size_bytes_sum{handler="/v1/chat/completions"} 980.0
"""

Answer = tuple[int, bytes] | Exception


def text_of(model: str) -> bytes:
    return VLLM.replace("MODEL", model).encode()


@pytest.fixture
def registry(project: Project) -> Registry:
    project.write(
        {
            "chat": {"name": "Qwen", "type": "chat", "endpoints": ["http://gpu-2:8000"], "path": "models/chat"},
            "vectors": {"name": "bge", "type": "embedding", "port": 9002},
            "far": {"name": "large", "type": "chat", "endpoints": ["http://gpu-3:8000"]},
        }
    )
    return Registry(project.load())


def text_from(registry: Registry, answers: dict[str, Answer]) -> str:
    """`answers`: what the engine of a key says."""

    async def fetch(replica: Replica, path: str, seconds: float) -> tuple[int, bytes]:
        assert (path, seconds) == ("/metrics", 5.0)
        await asyncio.sleep(0)
        answer = answers[replica.name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return asyncio.run(merged(registry, fetch)).decode()


def families(text: str) -> dict[str, Metric]:
    """Each of them once, as Prometheus wants it."""
    found = list(text_string_to_metric_families(text))
    names = Counter(family.name for family in found)
    assert max(names.values()) == 1, names
    return {family.name: family for family in found}


def values(family: Metric, *labels: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(sample.labels.get(label, "-") for label in labels)): sample.value for sample in family.samples
    }


def test_every_sample_of_every_engine_is_there_under_its_model(registry: Registry) -> None:
    text = text_from(registry, {"chat": (200, text_of("Qwen")), "vectors": (200, text_of("bge"))})
    found = families(text)
    assert values(found["vllm:num_requests_running"], "model", "replica", "model_name", "engine") == {
        ("vllm:num_requests_running", "chat", "chat", "Qwen", "0"): 3,
        ("vllm:num_requests_running", "vectors", "vectors", "bge", "0"): 3,
    }
    one_engine = [sample for family in families(VLLM).values() for sample in family.samples]
    both = [
        sample for name, family in found.items() for sample in family.samples if not name.startswith("vllm_unified")
    ]
    assert len(both) == 2 * len(one_engine)
    assert Counter((sample.name, sample.value) for sample in both) == Counter(
        (sample.name, sample.value) for sample in one_engine * 2
    )
    assert text.count("# TYPE ") == text.count("# HELP ") == VLLM.count("# TYPE ") + 1


def test_types_and_help_stay(registry: Registry) -> None:
    found = families(text_from(registry, {"chat": (200, text_of("Qwen")), "vectors": (200, text_of("bge"))}))
    for name, family in families(VLLM).items():
        assert (found[name].type, found[name].documentation) == (family.type, family.documentation)
    assert found["vllm:time_to_first_token_seconds"].type == "histogram"
    buckets = values(found["vllm:time_to_first_token_seconds"], "model", "le")
    assert buckets["vllm:time_to_first_token_seconds_bucket", "vectors", "0.1"] == 4


def test_escaped_labels_stay(registry: Registry) -> None:
    text = text_from(registry, {"chat": (200, text_of(r"C:\\dir \"x\"")), "vectors": (404, b"")})
    found = families(text)
    (info,) = found["vllm:cache_config_info"].samples
    assert info.labels["note"] == 'a "quoted", model=\\ {braces}'
    assert set(info.labels) == {"model", "replica", "block_size", "cache_dtype", "note", "engine"}
    (running,) = found["vllm:num_requests_running"].samples
    assert running.labels["model_name"] == r'C:\dir "x"'


@pytest.mark.parametrize(
    "broken",
    [
        (500, b"vllm:num_requests_running 1.0"),
        (200, b"\xff\xfe\x00"),
        OSError("refused"),
        TimeoutError(),
        ValueError("?"),
    ],
)
def test_a_broken_engine_costs_only_its_own_metrics(registry: Registry, broken: Answer) -> None:
    found = families(text_from(registry, {"chat": broken, "vectors": (200, text_of("bge"))}))
    up = values(found["vllm_unified_engine_scrape_up"], "model", "replica")
    name = "vllm_unified_engine_scrape_up"
    assert up == {(name, "chat", "chat"): float(broken == (200, b"\xff\xfe\x00")), (name, "vectors", "vectors"): 1}
    told = {sample.labels["model"] for sample in found["vllm:num_requests_running"].samples}
    assert told == {"vectors"}


@pytest.mark.parametrize(
    "rubbish",
    [
        "<html><body>hello</body></html>",
        "vllm:a{",
        'vllm:a{x="1} 2',
        'vllm:a{x="1"} two',
        'vllm:a{x="1"}',
        "vllm:a{x=1} 1",
        "vllm:a 1 2 3",
        "vllm-a 1",
        "# TYPE vllm:a",
        "# TYPE vllm:a something",
        "# EOF",
        "\x00\x01 1",
        "a{" + 'x="1",' * 20_000 + "} 1x",
        'a{x="' + r"\"" * 20_000,
        "a" + " " * 20_000,
    ],
)
def test_rubbish_is_left_out(registry: Registry, rubbish: str) -> None:
    whole = text_of("Qwen").decode()
    lines = f"{rubbish}\n{whole}{rubbish}\n".encode()
    spoilt = text_from(registry, {"chat": (200, lines), "vectors": (404, b"")})
    assert spoilt == text_from(registry, {"chat": (200, whole.encode()), "vectors": (404, b"")})


@pytest.mark.parametrize(
    ("line", "labels", "value"),
    [
        ("a 1", {}, 1),
        ("a{} 1", {}, 1),
        ('a{x="1",} 1e-3 1795283400000', {"x": "1"}, 0.001),
        ('a { x = "1" , y="2" }  +Inf', {"x": "1", "y": "2"}, float("inf")),
        ('a{model="own",replica="b"} 2', {"exported_model": "own", "exported_replica": "b"}, 2),
    ],
)
def test_unusual_but_valid_lines(registry: Registry, line: str, labels: dict[str, str], value: float) -> None:
    found = families(text_from(registry, {"chat": (200, line.encode()), "vectors": (404, b"")}))
    (sample,) = found["a"].samples
    assert (sample.labels, sample.value) == ({"model": "chat", "replica": "chat", **labels}, value)


def test_an_engine_that_is_slow_does_not_hold_the_others(registry: Registry) -> None:
    async def fetch(replica: Replica, _path: str, _seconds: float) -> tuple[int, bytes]:
        if replica.name == "chat":
            await asyncio.Event().wait()
        return 200, b"a 1\n"

    found = families(asyncio.run(merged(registry, fetch, 0.05)).decode())
    assert [sample.labels["model"] for sample in found["a"].samples] == ["vectors"]


def test_one_engines_own_text(registry: Registry) -> None:
    async def fetch(replica: Replica, path: str, _seconds: float) -> tuple[int, bytes]:
        assert (replica.name, path) == ("vectors", "/metrics")
        return 200, b"\xff as it came"

    assert asyncio.run(of_engine(registry, "vectors", fetch)) == b"\xff as it came"


@pytest.mark.parametrize("answer", [(500, b"vllm:a 1"), OSError("refused"), TimeoutError()])
def test_an_engine_that_does_not_tell_its_metrics(registry: Registry, answer: Answer) -> None:
    async def fetch(_replica: Replica, _path: str, _seconds: float) -> tuple[int, bytes]:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(RequestError) as caught:
        asyncio.run(of_engine(registry, "chat", fetch))
    assert (caught.value.status, str(caught.value)) == (503, 'the engine "chat" does not tell its metrics')


@pytest.mark.parametrize("key", ["far", "router", "Qwen", "../chat", "", "x" * 1000])
def test_metrics_of_what_is_no_engine_here(registry: Registry, key: str) -> None:
    async def fetch(_replica: Replica, _path: str, _seconds: float) -> tuple[int, bytes]:
        raise AssertionError("nothing is asked")

    with pytest.raises(RequestError) as caught:
        asyncio.run(of_engine(registry, key, fetch))
    assert caught.value.status == 404
    assert len(str(caught.value)) < 200


def test_service_discovery_leads_everywhere_through_the_router(registry: Registry) -> None:
    expected = [
        {"type": "router", "__metrics_path__": "/metrics"},
        {"model": "chat", "type": "chat", "__metrics_path__": "/metrics/engines/chat"},
        {"model": "vectors", "type": "embedding", "__metrics_path__": "/metrics/engines/vectors"},
    ]
    found = sd_document(registry, "gpu-1:8000", documents=False)
    assert found == [{"targets": ["gpu-1:8000"], "labels": labels} for labels in expected]
    with_documents = sd_document(registry, "gpu-1:8000", documents=True)
    service = {"targets": ["gpu-1:8000"], "labels": {"type": "documents", "__metrics_path__": "/metrics/documents"}}
    assert [each for each in with_documents if each not in found] == [service]


@pytest.mark.parametrize(
    ("asked", "address"),
    [
        ("vllm-unified:8000", "vllm-unified:8000"),
        ("10.0.0.1:8000", "10.0.0.1:8000"),
        ("[fe80::1]:8000", "[fe80::1]:8000"),
        ("router.example", "router.example"),
        ("", "127.0.0.1:8000"),
        ("evil/path:1", "127.0.0.1:8000"),
        ("user@host", "127.0.0.1:8000"),
        ("host:123456", "127.0.0.1:8000"),
        ("host:", "127.0.0.1:8000"),
        ('a"b', "127.0.0.1:8000"),
        ("h\u00f6st:80", "127.0.0.1:8000"),
    ],
)
def test_the_routers_address_is_the_one_that_was_asked(asked: str, address: str) -> None:
    assert router_address(asked, "http://127.0.0.1:8000") == address
