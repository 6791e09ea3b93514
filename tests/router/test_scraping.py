"""What Prometheus asks of a real router: with its own key, and whatever clients have sent."""

import random
import string

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import API_KEY
from tests.router.conftest import Deployment
from vllm_unified.settings.keys import metrics_key

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
KEY = metrics_key(API_KEY)
READ = ("/sd", "/metrics", "/metrics/engines", "/metrics/engines/chat")


@pytest.fixture(scope="module")
def router(lasting: Deployment) -> Deployment:
    if not lasting.processes:
        lasting.start({"chat": {"type": "chat"}, "away": {"type": "chat", "fake": None}})
    return lasting


def series(router: Deployment) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    with router.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    return {(sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples}


@pytest.mark.parametrize("path", READ)
def test_the_metrics_key_opens_what_prometheus_reads(router: Deployment, path: str) -> None:
    with router.client(KEY) as client:
        assert client.get(path).status_code == 200
    with httpx.Client(base_url=router.url, auth=("any", KEY)) as client:
        assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/models"),
        ("GET", "/usage"),
        ("GET", "/system/info"),
        ("GET", "/sd/"),
        ("GET", "/metricsx"),
        ("GET", "//metrics"),
        ("GET", "/api/tasks"),
        ("POST", "/api/ocr"),
        ("POST", "/admin/reload"),
        ("POST", "/admin/models/chat/stop"),
        ("GET", "/sd/../usage"),
        ("GET", "/metrics%2f..%2fusage"),
        ("POST", "/metrics/../admin/reload"),
    ],
)
def test_the_metrics_key_opens_nothing_else(router: Deployment, method: str, path: str) -> None:
    body = {**CHAT, "model": "chat"} if method == "POST" else None
    with router.client(KEY) as client:
        # As it stands: httpx would tidy the path up.
        answer = client.request(method, httpx.URL(f"{router.url}/").copy_with(raw_path=path.encode()), json=body)
    assert answer.status_code in (401, 404), answer.text
    assert answer.status_code == 401 or path.startswith("/metrics")  # where there is nothing below it
    assert not router.seen("chat")["requests"]


def test_a_wrong_key_and_none(router: Deployment) -> None:
    for key in (None, KEY[:-1], KEY + "0", KEY.upper(), "metrics"):
        with router.client(key) as client:
            assert {client.get(path).status_code for path in READ} == {401}


def test_where_prometheus_finds_everything(router: Deployment) -> None:
    with router.client(KEY) as client:
        groups = client.get("/sd", headers={"host": "vllm-unified:8000"}).json()
        for group in groups:
            (address,), path = group["targets"], group["labels"]["__metrics_path__"]
            assert address == "vllm-unified:8000"
            status = client.get(path).status_code
            assert status == (503 if group["labels"].get("model") == "away" else 200), path
    assert [group["labels"].get("model", group["labels"]["type"]) for group in groups] == ["router", "chat", "away"]


def test_an_engines_text_comes_as_it_is(router: Deployment) -> None:
    with router.client(KEY) as client:
        through = client.get("/metrics/engines/chat")
    assert through.text == httpx.get(f"http://127.0.0.1:{router.ports['chat']}/metrics").text
    assert through.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_clients_make_no_series_by_what_they_send(router: Deployment) -> None:
    """Of each kind of request one first: its series stay, and no others come."""
    dice = random.Random(7)

    def word() -> str:
        return "".join(dice.choices(string.ascii_letters + "é✓\"'{}=,", k=12))

    def send(client: httpx.Client, what: str) -> None:
        for stream in (False, True):
            client.post("/v1/chat/completions", json={**CHAT, "model": what, "stream": stream})
        client.get(f"/{what}")
        client.post(f"/v1/{what}", json=CHAT)
        client.get(f"/v1/models/{what}")
        client.get(f"/api/{what}")
        client.get(f"/api/tasks/{what}/{what}")
        client.get(f"/metrics/engines/{what}")
        client.request("BREW", f"/{what}")
        httpx.get(f"{router.url}/{what}", headers={"authorization": f"Bearer {what.encode().hex()}", "x-api-key": "n"})

    with router.client() as client:
        client.post("/v1/chat/completions", json={**CHAT, "model": "chat"})
        send(client, word())
        before = series(router)
        for _ in range(30):
            send(client, word())
    assert series(router) == before
