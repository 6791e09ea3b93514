"""What the router traces, as a collector gets it and as engines hear of it."""

import json
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.collector import SERVER, Collector, Span
from tests.conftest import Project, eventually
from tests.router.conftest import Deployment
from tests.router.test_operating import make_key

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "a secret question"}]}
PATH = "/v1/chat/completions"
NAME = f"POST {PATH}"


def trace(deployment: Deployment, url: str, **variables: str) -> None:
    """From its start on. In batches of 50 ms, where the default is 5 s."""
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "50", **variables}
    (deployment.project.home / ".env").write_text("".join(f"{name}={value}\n" for name, value in given.items()))


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def site(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("site")
    (home / "config").mkdir()
    site = Deployment(Project(home))
    trace(site, f"{collector.url}/", OTEL_EXPORTER_OTLP_HEADERS="x-tenant=tests")
    try:
        a, b = site.remote("a"), site.remote("b")
        site.start(
            {
                "chat": {"name": "a-chat-model", "aliases": ["chat"], "type": "chat", "endpoints": [a]},
                "pair": {"type": "chat", "balancing": "sticky", "endpoints": [a, b]},
                "vectors": {"type": "embedding", "endpoints": [b]},
            }
        )
        yield site
    finally:
        site.stop()


@pytest.fixture
def client(site: Deployment, collector: Collector) -> Iterator[httpx.Client]:
    for name in "ab":
        site.behave(name)
    with site.client() as client:
        client.get("/live")
        collector.spans.clear()
        yield client


def heard(site: Deployment, key: str) -> list[dict[str, str]]:
    """The headers of the requests that an engine got."""
    return [{name.lower(): value for name, value in each["headers"].items()} for each in site.seen(key)["requests"]]


def only(collector: Collector) -> Span:
    (span,) = collector.found(lambda span: True)
    return span


def test_a_request_is_a_span(site: Deployment, client: httpx.Client, collector: Collector) -> None:
    site.behave("a", golden="right")
    began = time.time()
    answer = client.post(PATH, json=CHAT, headers={"x-request-id": "mine-1"})
    assert answer.status_code == 200
    span = only(collector)
    assert (span.service, span.name, span.kind, span.parent, span.failed) == (
        "vllm-unified-router",
        NAME,
        SERVER,
        "",
        False,
    )
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "chat",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 2,
        "vllm_unified.model": "chat",
        "vllm_unified.replica": site.name("a"),
        "vllm_unified.tries": 1,
        "vllm_unified.queue_seconds": 0.0,
        "vllm_unified.request_id": "mine-1",
    }
    assert began - 0.1 < span.began < span.ended < time.time() + 0.1
    (headers,) = heard(site, "a")
    assert headers["traceparent"] == f"00-{span.trace}-{span.id}-01"
    path, sent = collector.exports[-1]
    assert (path, sent["content-type"], sent["x-tenant"]) == ("/v1/traces", "application/x-protobuf", "tests")


def test_the_clients_trace_is_continued(site: Deployment, client: httpx.Client, collector: Collector) -> None:
    theirs = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}
    client.post("/v1/embeddings", json={"model": "vectors", "input": "x"}, headers=theirs).raise_for_status()
    span = only(collector)
    assert (span.trace, span.parent) == (TRACE, SPAN)
    assert span.attributes["gen_ai.operation.name"] == "embeddings"
    (headers,) = heard(site, "b")
    assert headers["traceparent"] == f"00-{TRACE}-{span.id}-01"
    assert headers["tracestate"] == "vendor=1"


@pytest.mark.parametrize(
    "hostile", ["", "x", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01" * 500]
)
def test_a_header_that_is_not_valid_begins_a_trace(
    site: Deployment, client: httpx.Client, collector: Collector, hostile: str
) -> None:
    client.post(PATH, json=CHAT, headers={"traceparent": hostile, "tracestate": "vendor=1"}).raise_for_status()
    span = only(collector)
    assert (span.trace != TRACE, span.parent) == (True, "")
    (headers,) = heard(site, "a")
    assert headers["traceparent"] == f"00-{span.trace}-{span.id}-01"
    assert "tracestate" not in headers


def test_what_the_client_does_not_sample_is_not_sent(
    site: Deployment, client: httpx.Client, collector: Collector
) -> None:
    client.post(PATH, json=CHAT, headers={"traceparent": f"00-{TRACE}-{SPAN}-00"}).raise_for_status()
    client.post(PATH, json=CHAT).raise_for_status()
    assert only(collector).trace != TRACE
    first, _ = heard(site, "a")
    assert first["traceparent"].startswith(f"00-{TRACE}-")
    assert first["traceparent"].endswith("-00")
    assert SPAN not in first["traceparent"]


def test_a_stream(site: Deployment, client: httpx.Client, collector: Collector) -> None:
    site.behave("a", golden="right")
    began = time.monotonic()
    client.post(PATH, json={**CHAT, "stream": True}).raise_for_status()
    seconds = time.monotonic() - began
    attributes = only(collector).attributes
    assert attributes["gen_ai.request.stream"] is True
    assert 0 < attributes["gen_ai.response.time_to_first_chunk"] < seconds
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (5, 5)


def test_a_stream_that_breaks_off(site: Deployment, client: httpx.Client, collector: Collector) -> None:
    site.behave("a", break_stream=2)
    client.post(PATH, json={**CHAT, "stream": True})
    span = only(collector)
    assert span.failed
    wanted = {"http.response.status_code": 200, "vllm_unified.error": "engine", "error.type": "broken_off"}
    assert wanted.items() <= span.attributes.items()


def test_a_retry_is_seen(site: Deployment, client: httpx.Client, collector: Collector) -> None:
    """The other replica is asked in the name of the same span."""
    sessions = ({"x-session-id": str(number)} for number in range(100))
    first = next(each for each in sessions if _served_by(client, each) == site.name("a"))
    site.behave("a", refuse=503)
    site.behave("b")
    client.post(PATH, json={**CHAT, "model": "pair"}, headers={**first, "x-request-id": "retried"}).raise_for_status()
    span = collector.one(NAME, vllm_unified__request_id="retried")
    assert (span.attributes["vllm_unified.tries"], span.attributes["vllm_unified.replica"]) == (2, site.name("b"))
    ((name, at, about),) = span.events
    assert (name, about) == (
        "failed try",
        {"vllm_unified.replica": site.name("a"), "error.type": "engine_error"},
    )
    assert span.began <= at <= span.ended
    assert not span.failed
    for key in "ab":
        (headers,) = heard(site, key)
        assert headers["traceparent"] == f"00-{span.trace}-{span.id}-01"


def _served_by(client: httpx.Client, session: dict[str, str]) -> str:
    return client.post(PATH, json={**CHAT, "model": "pair"}, headers=session).headers["x-served-by"]


def test_an_error_of_the_engine(site: Deployment, client: httpx.Client, collector: Collector) -> None:
    site.behave("a", refuse=500)
    assert client.post(PATH, json=CHAT).status_code == 500
    span = only(collector)
    assert span.failed
    wanted = {"http.response.status_code": 500, "vllm_unified.error": "engine", "error.type": "500"}
    assert wanted.items() <= span.attributes.items()


def test_a_client_that_leaves(site: Deployment, client: httpx.Client, collector: Collector) -> None:
    site.behave("a", hang=True)
    site.begin(PATH, CHAT).close()
    span = only(collector)
    assert (span.attributes["vllm_unified.error"], span.failed) == ("client", False)
    assert "http.response.status_code" not in span.attributes


def test_refused_requests(site: Deployment, client: httpx.Client, collector: Collector) -> None:
    """A span each, and none of what is not forwarded."""
    limited = make_key(site, "limited", requests_per_minute=1)
    with site.client(limited) as one_a_minute:
        eventually(lambda: one_a_minute.post(PATH, json=CHAT).status_code == 200)
        collector.found(lambda span: span.attributes["http.response.status_code"] == 200)
        collector.spans.clear()
        site.behave("a")
        assert one_a_minute.post(PATH, json=CHAT).status_code == 429
    with site.client(None) as stranger:
        assert stranger.post(PATH, json=CHAT).status_code == 401
    assert client.post(PATH, json={**CHAT, "model": "none-such"}).status_code == 404
    assert client.post("/none/such", json={}).status_code == 404
    assert [client.get(path).status_code for path in ("/health", "/metrics", "/v1/models")] == [200, 200, 200]
    spans = collector.found(lambda span: True, 3)
    assert [span.attributes["http.response.status_code"] for span in spans] == [429, 401, 404]
    assert {(span.name, span.attributes["vllm_unified.error"], span.failed) for span in spans} == {
        (NAME, "client", False)
    }
    assert heard(site, "a") == []


def test_no_text_and_no_secret_is_in_a_span(site: Deployment, client: httpx.Client, collector: Collector) -> None:
    site.behave("a", answer={"choices": [{"message": {"content": "a secret answer"}}]})
    client.post(PATH, json=CHAT, params={"q": "a secret query"}).raise_for_status()
    assert "secret" not in str(only(collector))
    assert "sk-" not in str(collector.spans)


@pytest.mark.parametrize(
    ("status", "seconds", "reason"), [(500, 0.0, "500"), (503, 0.0, "retrying"), (200, 60.0, "timeout")]
)
def test_a_collector_that_fails_holds_nobody(deployment: Deployment, status: int, seconds: float, reason: str) -> None:
    """It is said once, spans beyond the queue are lost, and the router ends as ever."""
    with Collector() as collector:
        collector.behave(status, seconds)
        trace(deployment, collector.url, OTEL_BSP_MAX_QUEUE_SIZE="8", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="4")
        with (deployment.project.home / ".env").open("a") as file:
            file.write("OTEL_EXPORTER_OTLP_TIMEOUT=2\n")
        deployment.start({"chat": {"type": "chat"}})
        with deployment.client() as client:
            assert {client.post(PATH, json=CHAT).status_code for _ in range(100)} == {200}
            eventually(lambda: _complaints(deployment))
            assert {client.post(PATH, json=CHAT).status_code for _ in range(100)} == {200}
            (said,) = _complaints(deployment)
            assert collector.url in said
            assert reason in said
            if status != 200:  # it comes back
                collector.behave()
                eventually(lambda: client.post(PATH, json=CHAT).status_code == 200 and collector.spans)
                eventually(lambda: "takes them again" in deployment.log.read_text())
        began = time.monotonic()
        deployment.stop()
        assert time.monotonic() - began < 15
        assert len(_complaints(deployment)) == 1
        assert "Traceback" not in deployment.log.read_text()


def _complaints(deployment: Deployment) -> list[str]:
    """All that is said of it: OpenTelemetry itself is silent."""
    lines = [json.loads(line) for line in deployment.log.read_text().splitlines() if line.startswith("{")]
    return [line["message"] for line in lines if line["level"] in ("warning", "error") and "message" in line]


def test_a_share_of_the_requests(deployment: Deployment) -> None:
    """By OpenTelemetry's own variables."""
    with Collector() as collector:
        share = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}
        trace(deployment, collector.url, **share)
        deployment.start({"chat": {"type": "chat"}})
        with deployment.client() as client:
            client.post(PATH, json=CHAT).raise_for_status()
            client.post(PATH, json=CHAT, headers={"traceparent": f"00-{TRACE}-{SPAN}-01"}).raise_for_status()
        assert only(collector).trace == TRACE
        assert [each["traceparent"][-2:] for each in heard(deployment, "chat")] == ["00", "01"]


def test_off_by_default(deployment: Deployment) -> None:
    """A client's headers go on as they came."""
    deployment.start({"chat": {"type": "chat"}})
    theirs = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}
    with deployment.client() as client:
        client.post(PATH, json=CHAT, headers=theirs).raise_for_status()
    (headers,) = heard(deployment, "chat")
    assert theirs.items() <= headers.items()
