"""What the charts ask of vLLM, asked of a real Prometheus that scraped the real one at work."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.conftest import eventually
from tests.engine.conftest import HEADERS, Demo
from tests.monitoring.conftest import prometheus
from vllm_unified.monitoring.charts import DASHBOARDS, Query
from vllm_unified.monitoring.prometheus import Prometheus, Span
from vllm_unified.settings import load

QUERIES = [
    query
    for dashboard in DASHBOARDS
    for chart in dashboard.charts()
    for query in chart.queries
    if "vllm:" in query.expr
]


@pytest.fixture(scope="module")
def asked(demo: Demo) -> Iterator[Prometheus]:
    settings = load(demo.home / "config" / "models.demo.json", demo.home, demo.environ)
    with prometheus(settings) as url:

        def is_told() -> bool:
            """Rates want answers between two scrapes."""
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda _: ask(demo), range(4)))
            return counted(url) > 40

        eventually(is_told, 120)
        now = time.time()
        with Prometheus(url, Span(now - 120, now)) as prometheus_of_demo:
            yield prometheus_of_demo


def ask(demo: Demo) -> None:
    body = {"model": "demo-chat", "prompt": "What are you?", "max_tokens": 30}
    httpx.post(f"{demo.url('router')}/completions", json=body, headers=HEADERS, timeout=60).raise_for_status()


def counted(url: str) -> float:
    query = 'sum(increase(vllm:generation_tokens_total{model="chat"}[1m]))'
    found = httpx.get(f"{url}/api/v1/query", params={"query": query}).json()["data"]["result"]
    return float(found[0]["value"][1]) if found else 0


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.legend}: {query.expr}"[:60])
def test_vllm_tells_what_the_charts_show(asked: Prometheus, query: Query) -> None:
    found = asked.now(query, "chat")
    assert any(math.isfinite(value) for series in found for value in series.values)
