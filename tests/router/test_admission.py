"""How many requests a model takes at a time, who waits, and when a slot is free again."""

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest

from tests.conftest import Project, eventually
from tests.router.conftest import Deployment

PATH = "/v1/chat/completions"
GAUGES = ("in_flight", "queued", "waiting")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Every test has a model of its own; the server `a` behind them is the same. `late` starts when a test says so."""
    home = tmp_path_factory.mktemp("site")
    (home / "config").mkdir()
    site = Deployment(Project(home))
    try:
        endpoints = {"endpoints": [site.remote("a")]}
        models: dict[str, dict[str, Any]] = {
            "two": {"max_concurrent": 2, "max_queue": 1},
            "short": {"max_concurrent": 1, "queue_timeout": 0.3},
            "one": {"max_concurrent": 1},
            "left": {"max_concurrent": 1},
            "ends": {"max_concurrent": 1},
            "crowd": {"max_concurrent": 1},
            "raised": {"max_concurrent": 1},
        }
        starting: dict[str, dict[str, Any]] = {
            "late": {"wait_for_ready": 60, "max_queue": 2},
            "never": {"wait_for_ready": 0.3},
        }
        site.start(
            {
                **{name: {"type": "chat", **endpoints, **fields} for name, fields in models.items()},
                **{name: {"type": "chat", "fake": None, **fields} for name, fields in starting.items()},
            },
        )
        yield site
    finally:
        site.stop()


@pytest.fixture
def client(site: Deployment) -> Iterator[httpx.Client]:
    site.behave("a")
    with site.client() as client:
        yield client


def ask(client: httpx.Client, model: str, **body: Any) -> httpx.Response:
    return client.post(PATH, json={"model": model, **body})


def begin(site: Deployment, model: str, **body: Any) -> socket.socket:
    return site.begin(PATH, {"model": model, **body})


def gauges(client: httpx.Client, model: str) -> tuple[int, ...]:
    """in_flight, queued, waiting."""
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    return tuple(int(float(lines[f'vllm_unified_{name}{{model="{model}"}}'])) for name in GAUGES)


def become(client: httpx.Client, model: str, *expected: int) -> None:
    eventually(lambda: gauges(client, model) == expected)


def has_seen(site: Deployment, number: int) -> bool:
    return len(site.seen("a")["requests"]) == number


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["x-error-source"] == "router"
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_the_third_waits_and_the_fourth_is_refused(site: Deployment, client: httpx.Client) -> None:
    site.behave("a", hang=True)
    with begin(site, "two") as first, begin(site, "two") as second:
        become(client, "two", 2, 0, 0)
        with begin(site, "two") as third:
            become(client, "two", 2, 1, 0)
            assert has_seen(site, 2)
            answer = ask(client, "two")
            assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            first.close()  # it leaves, and the third takes its place
            become(client, "two", 2, 0, 0)
            eventually(partial(has_seen, site, 3))
            with begin(site, "two"):
                become(client, "two", 2, 1, 0)
            become(client, "two", 2, 0, 0)  # it left while it waited
            third.close()
            second.close()
            become(client, "two", 0, 0, 0)
    assert has_seen(site, 3)


def test_who_waits_too_long_is_refused(site: Deployment, client: httpx.Client) -> None:
    site.behave("a", hang=True)
    with begin(site, "short"):
        become(client, "short", 1, 0, 0)
        answer = ask(client, "short")
        assert (answer.status_code, error_of(answer)["code"]) == (503, "queue_timeout")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert gauges(client, "short") == (1, 0, 0)
    become(client, "short", 0, 0, 0)
    assert has_seen(site, 1)
    site.behave("a")
    assert ask(client, "short").status_code == 200


def test_a_stream_holds_its_slot_to_its_end(site: Deployment, client: httpx.Client) -> None:
    site.behave("a", chunk_seconds=0.3)
    with ThreadPoolExecutor(1) as pool, client.stream("POST", PATH, json={"model": "one", "stream": True}) as stream:
        text = stream.iter_text()
        next(text)
        waiting = pool.submit(ask, client, "one")
        become(client, "one", 1, 1, 0)
        assert "".join(text).endswith("data: [DONE]\n\n")
        assert waiting.result().status_code == 200
    first, second = site.seen("a")["requests"]
    assert second["at"] - first["at"] >= 5 * 0.3


def test_who_leaves_a_stream_gives_its_slot_back(site: Deployment, client: httpx.Client) -> None:
    site.behave("a", chunk_seconds=0.2, hang_stream=3)
    with ThreadPoolExecutor(1) as pool, begin(site, "left", stream=True) as stream:
        assert stream.recv(1000).startswith(b"HTTP/1.1 200")
        waiting = pool.submit(ask, client, "left")
        become(client, "left", 1, 1, 0)
        stream.close()
        assert waiting.result().status_code == 200
    become(client, "left", 0, 0, 0)


@pytest.mark.parametrize(
    ("behaviour", "stream"),
    [
        ({}, False),
        ({}, True),
        ({"refuse": 400}, False),
        ({"refuse": 500}, True),
        ({"refuse": 429, "refuse_times": 2}, False),
        ({"refuse": 503, "retry_after": "60"}, False),
        ({"hang_up": True}, False),
        ({"break_stream": 0}, True),
        ({"break_stream": 2}, True),
    ],
    ids=str,
)
def test_every_end_gives_the_slot_back(
    site: Deployment, client: httpx.Client, behaviour: dict[str, Any], stream: bool
) -> None:
    site.behave("a", **behaviour)
    with contextlib.suppress(httpx.RemoteProtocolError):
        ask(client, "ends", stream=stream)
    become(client, "ends", 0, 0, 0)
    site.behave("a")
    eventually(lambda: ask(client, "ends").status_code == 200)  # the breaker may be open


def test_a_crowd_that_comes_and_goes_leaves_nothing_behind(site: Deployment, client: httpx.Client) -> None:
    site.behave("a", busy_seconds=0.005)
    dice = random.Random(7)

    def visit(seconds: float) -> None:
        with begin(site, "crowd", stream=seconds < 0.02) as connection:
            connection.settimeout(seconds)
            with contextlib.suppress(TimeoutError):
                connection.recv(1000)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(visit, [dice.uniform(0.001, 0.1) for _ in range(300)]))
    become(client, "crowd", 0, 0, 0)
    assert ask(client, "crowd").status_code == 200


def test_a_limit_that_is_raised_lets_waiting_ones_in(site: Deployment, client: httpx.Client) -> None:
    site.behave("a", hang=True)
    with begin(site, "raised"), begin(site, "raised"), begin(site, "raised"):
        become(client, "raised", 1, 2, 0)
        for limit, expected in ((2, (2, 1, 0)), (None, (3, 0, 0)), (1, (3, 0, 0))):
            document = json.loads(site.project.file.read_text())
            document["models"]["raised"]["max_concurrent"] = limit
            site.project.file.write_text(json.dumps(document))
            client.post("/admin/reload").raise_for_status()
            become(client, "raised", *expected)
        with begin(site, "raised"):
            become(client, "raised", 3, 1, 0)
    become(client, "raised", 0, 0, 0)


# --- a model that is starting ---


def test_a_request_waits_for_a_model_that_is_starting(site: Deployment, client: httpx.Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, client, "late")
        become(client, "late", 0, 0, 1)
        with begin(site, "late"):
            become(client, "late", 0, 0, 2)
            answer = ask(client, "late")  # as many wait as may
            assert (answer.status_code, error_of(answer)["code"]) == (503, "model_not_ready")
            assert answer.headers["retry-after"]
        become(client, "late", 0, 0, 1)  # the second left
        site.start_engine("late", {})
        assert waiting.result().status_code == 200
    become(client, "late", 0, 0, 0)
    assert len(site.seen("late")["requests"]) == 1


def test_a_request_waits_no_longer_than_it_may(site: Deployment, client: httpx.Client) -> None:
    began = time.monotonic()
    answer = ask(client, "never")
    assert time.monotonic() - began >= 0.3
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_not_ready")
    assert '"never" is not ready' in error_of(answer)["message"]
    assert answer.headers["retry-after"] == "5"
    become(client, "never", 0, 0, 0)
