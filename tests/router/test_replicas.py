"""Several servers behind one model: who takes a request, and what happens when one of them fails."""

import concurrent.futures
import contextlib
import json
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import API_KEY, CHECKOUT, Project, eventually, free_port
from tests.router.conftest import Deployment, is_alive
from vllm_unified.router.body import with_fields
from vllm_unified.router.replica import FAILURES_THAT_OPEN, LONGEST_OPEN_SECONDS, TRIAL_SECONDS, Breaker

PATH = "/v1/chat/completions"
PREFIX = "/tenants/7"
STATES = {0: "closed", 1: "half_open", 2: "open"}


# --- the breaker, on a clock of the test's ---


def opened(breaker: Breaker, now: float) -> None:
    for _ in range(FAILURES_THAT_OPEN):
        breaker.begin(now)
        breaker.fail(now)


def open_for(breaker: Breaker, now: float) -> float:
    """Seconds, to a tenth, until a request passes."""
    tenths = next(n for n in range(1, 1000) if breaker.passes(now + n / 10))
    return tenths / 10


def test_a_breaker_opens_after_failures_in_a_row() -> None:
    breaker = Breaker()
    for _ in range(3):
        for _ in range(FAILURES_THAT_OPEN - 1):
            breaker.begin(0)
            breaker.fail(0)
            assert (breaker.state(0), breaker.passes(0)) == ("closed", True)
        breaker.succeed()
    opened(breaker, 0)
    assert (breaker.state(0), breaker.passes(0)) == ("open", False)


def test_a_breaker_stays_open_twice_as_long_each_time() -> None:
    breaker, now, seconds = Breaker(), 100.0, []
    opened(breaker, now)
    for _ in range(7):
        seconds.append(open_for(breaker, now))
        now += LONGEST_OPEN_SECONDS * 1.2
        assert breaker.state(now) == "half_open"
        breaker.begin(now)
        breaker.fail(now)
        assert breaker.state(now) == "open"
    for found, meant in zip(seconds, (1, 2, 4, 8, 16, 30, 30), strict=True):
        assert meant * 0.8 <= found <= meant * 1.2 + 0.1
    breaker.begin(now := now + 100)
    breaker.succeed()
    opened(breaker, now)
    assert open_for(breaker, now) <= 1.3


def test_many_failures_at_once_open_a_breaker_once() -> None:
    """Those that were on their way when it opened say nothing new."""
    breaker = Breaker()
    for _ in range(50):
        breaker.begin(0)
    for number in range(50):
        breaker.fail(number / 1000)
    assert open_for(breaker, 0) <= 1.3


def test_a_half_open_breaker_lets_one_through() -> None:
    breaker, later = Breaker(), 2.0
    opened(breaker, 0)
    assert breaker.passes(later)
    breaker.begin(later)
    assert (breaker.state(later), breaker.passes(later)) == ("half_open", False)
    breaker.succeed()
    assert (breaker.state(later), breaker.passes(later)) == ("closed", True)


def test_a_half_open_breaker_whose_request_says_nothing_lets_the_next_one_through() -> None:
    breaker, later = Breaker(), 2.0
    opened(breaker, 0)
    breaker.begin(later)
    breaker.forget()
    assert (breaker.state(later), breaker.passes(later)) == ("half_open", True)


def test_a_long_answer_keeps_a_half_open_breaker_from_nobody() -> None:
    """A generation takes minutes; a server that is well again must not stand idle for it."""
    breaker, later = Breaker(), 2.0
    opened(breaker, 0)
    breaker.begin(later)
    assert not breaker.passes(later + TRIAL_SECONDS - 0.1)
    assert breaker.passes(later + TRIAL_SECONDS)
    breaker.begin(later + TRIAL_SECONDS)
    assert not breaker.passes(later + TRIAL_SECONDS)


# --- a router with models that other servers serve ---


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Every test has a model of its own; the servers `a`, `b` and `c` behind them are the same."""
    home = tmp_path_factory.mktemp("site")
    (home / "config").mkdir()
    (home / ".env").write_text("KEY_OF_THERE=sk-by-name\n")
    site = Deployment(Project(home))
    try:
        a, b, c = (site.remote(name) for name in "abc")
        literal, named = site.remote("literal", key="sk-literal"), site.remote("named", key="sk-by-name")
        models: dict[str, dict[str, Any]] = {
            "least": {"endpoints": [a, b]},
            "weighted": {"endpoints": [{"url": a, "weight": 3}, b]},
            "robin": {
                "balancing": "round_robin",
                "endpoints": [a, {"url": b, "weight": 2}, {"url": c, "weight": 3}],
            },
            "sticky": {"balancing": "sticky", "endpoints": [a, b, c]},
            "leaving": {"balancing": "sticky", "endpoints": [a, b, c]},
            "pair": {"balancing": "sticky", "endpoints": [a, b]},
            "one": {"endpoints": [a]},
            "breaking": {"endpoints": [a]},
            "impatient": {"balancing": "sticky", "endpoints": [{"url": a, "timeout": 1}, b]},
            "literal": {"endpoints": [{"url": literal, "api_key": "sk-literal"}]},
            "named": {"endpoints": [{"url": named, "api_key": "$KEY_OF_THERE"}]},
            "renamed": {"aliases": ["also-renamed"], "endpoints": [{"url": a, "model": "org/there"}]},
            "ranks": {"type": "rerank", "endpoints": [a]},
            "prefixed": {"endpoints": [f"{a}{PREFIX}/v1"]},
        }
        site.start({name: {"type": "chat", **fields} for name, fields in models.items()}, health_check_interval=3600)
        yield site
    finally:
        site.stop()


@pytest.fixture
def client(site: Deployment) -> Iterator[httpx.Client]:
    for name in "abc":
        if name not in site.processes:
            site.start_engine(name, {"key": ""})
            eventually(partial(can_be_told, site, name))
        site.behave(name)
    with site.client() as client:
        yield client


def can_be_told(site: Deployment, name: str) -> bool:
    try:
        site.behave(name)
    except httpx.TransportError:
        return False
    return True


def ask(client: httpx.Client, model: str, session: str | None = None, **body: Any) -> httpx.Response:
    headers = {"x-session-id": session} if session else {}
    return client.post(PATH, json={"model": model, **body}, headers=headers)


def served_by(site: Deployment, answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return next(key for key in site.ports if site.name(key) == answer.headers["x-served-by"])


def requests_at(site: Deployment, *keys: str) -> list[int]:
    return [len(site.seen(key)["requests"]) for key in keys]


def have_come(site: Deployment, number: int) -> bool:
    return sum(requests_at(site, "a", "b")) == number


def session_at(site: Deployment, client: httpx.Client, model: str, key: str) -> str:
    """A session that `key` serves, which it has just done well; what the servers saw is forgotten."""
    sessions = (str(number) for number in range(100))
    found = next(each for each in sessions if served_by(site, ask(client, model, each)) == key)
    for name in "abc":
        site.behave(name)
    return found


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["x-error-source"] == "router"
    error: dict[str, Any] = answer.json()["error"]
    return error


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(f"{name}{{") and all(f'{label}="{value}"' in line for label, value in labels.items()):
            return float(line.rpartition(" ")[2])
    return 0


def at_once(number: int, client: httpx.Client, model: str) -> list[httpx.Response]:
    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda _: ask(client, model), range(number)))


# --- who takes it ---


def test_the_faster_one_takes_more(site: Deployment, client: httpx.Client) -> None:
    site.behave("a", busy_seconds=1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: ask(client, "least").is_success, range(40)))
    slow, fast = requests_at(site, "a", "b")
    assert 0 < slow < fast


def test_the_load_is_shared_by_weight(site: Deployment, client: httpx.Client) -> None:
    def in_flight() -> float:
        return metric(client, "vllm_unified_replica_in_flight", model="weighted", replica=site.name("a"))

    site.behave("a", hang=True)
    site.behave("b", hang=True)
    with contextlib.ExitStack() as stack:
        for number in range(8):
            stack.enter_context(site.begin(PATH, {"model": "weighted"}))
            eventually(partial(have_come, site, number + 1))
        assert requests_at(site, "a", "b") == [6, 2]
        assert in_flight() == 6
    eventually(lambda: in_flight() == 0)
    assert [site.seen(key)["cancelled"] for key in "ab"] == [6, 2]


def test_turns_are_exact_by_weight(site: Deployment, client: httpx.Client) -> None:
    for rounds in (1, 2, 3):
        for _ in range(6):
            ask(client, "robin").raise_for_status()
        assert requests_at(site, "a", "b", "c") == [rounds, 2 * rounds, 3 * rounds]


def test_one_that_refuses_is_asked_no_more_than_in_its_turn(site: Deployment, client: httpx.Client) -> None:
    site.behave("a", refuse=429, retry_after="60")
    for _ in range(24):
        ask(client, "robin").raise_for_status()
    tried, *_ = requests_at(site, "a", "b", "c")
    assert tried == 4
    assert sum(requests_at(site, "b", "c")) == 24


def test_a_session_stays_where_it_is(site: Deployment, client: httpx.Client) -> None:
    sessions = [f"session-{number}" for number in range(30)]
    before = {each: served_by(site, ask(client, "leaving", each)) for each in sessions}
    assert set(before.values()) == {"a", "b", "c"}
    assert {each: served_by(site, ask(client, "leaving", each)) for each in sessions} == before
    assert {each: served_by(site, ask(client, "leaving", user=each)) for each in sessions} == before
    assert served_by(site, ask(client, "leaving", sessions[0], user=sessions[1])) == before[sessions[0]]
    site.stop_engine("b")
    after = {each: served_by(site, ask(client, "leaving", each)) for each in sessions}
    assert all(after[each] == before[each] for each in sessions if before[each] != "b")
    assert {after[each] for each in sessions if before[each] == "b"} == {"a", "c"}


def test_a_form_has_a_session_too(site: Deployment, client: httpx.Client) -> None:
    sessions = [str(number) for number in range(12)]
    expected = {each: served_by(site, ask(client, "sticky", each)) for each in sessions}
    for session in sessions:
        answer = client.post(
            "/v1/audio/transcriptions",
            data={"model": "sticky"},
            files={"file": ("a.wav", b"RIFF")},
            headers={"x-session-id": session},
        )
        assert answer.headers["x-served-by"] == site.name(expected[session])


@pytest.mark.parametrize("body", [{}, {"user": ""}, {"user": 7}, {"user": None}])
def test_without_a_session_the_load_is_shared(site: Deployment, client: httpx.Client, body: dict[str, Any]) -> None:
    assert {served_by(site, ask(client, "sticky", **body)) for _ in range(6)} == {"a", "b", "c"}


# --- a server that fails ---

BIG = {"text": "é漢" * 1_000_000}  # 5 MB


@pytest.mark.parametrize(
    "behaviour", [*({"refuse": status} for status in (408, 429, 502, 503, 504)), {"hang_up": True}], ids=str
)
def test_another_one_answers(site: Deployment, client: httpx.Client, behaviour: dict[str, Any]) -> None:
    session = session_at(site, client, "pair", "a")
    site.behave("a", **behaviour)
    headers = {"x-session-id": session, "x-request-id": "one-and-the-same", "x-mine": "1", "user-agent": "me"}
    body = {"model": "pair", "messages": [], **(BIG if behaviour == {"refuse": 503} else {})}
    answer = client.post(f"{PATH}?q=1", json=body, headers=headers)
    assert served_by(site, answer) == "b"
    assert answer.json()["echo"] == body
    # A connection that was idle may have ended by itself: that is no try, and a new one is made first.
    assert requests_at(site, "a", "b") == [2 if "hang_up" in behaviour else 1, 1]
    first, second = site.seen("a")["requests"][-1], site.seen("b")["requests"][-1]
    assert second["path"] == first["path"] == f"{PATH}?q=1"
    assert second["bytes"] == first["bytes"]
    assert {**second["headers"], "Host": ""} == {**first["headers"], "Host": ""} | {"host": second["headers"]["host"]}
    assert answer.headers["x-request-id"] == second["headers"]["x-request-id"] == "one-and-the-same"
    assert (second["headers"]["x-mine"], second["headers"]["user-agent"]) == ("1", "me")


def test_one_that_is_gone_is_passed_over(site: Deployment, client: httpx.Client) -> None:
    session = session_at(site, client, "pair", "a")
    before = metric(client, "vllm_unified_retries_total", model="pair")
    site.stop_engine("a")
    assert served_by(site, ask(client, "pair", session)) == "b"
    assert metric(client, "vllm_unified_retries_total", model="pair") == before + 1


def test_the_last_answer_is_passed_on(site: Deployment, client: httpx.Client) -> None:
    session = session_at(site, client, "pair", "a")
    site.behave("a", refuse=503)
    site.behave("b", refuse=502)
    answer = ask(client, "pair", session)
    assert answer.status_code in (502, 503)
    assert answer.headers["x-error-source"] == "engine"
    assert answer.json() == {"error": {"message": "fake engine: refused"}}
    seen = {key: [each["at"] for each in site.seen(key)["requests"]] for key in "ab"}
    assert sum(map(len, seen.values())) == 4
    assert sorted([*seen["a"], *seen["b"]])[:2] == [seen["a"][0], seen["b"][0]], "the second try goes elsewhere"


def test_an_error_of_the_requests_own_is_not_tried_again(site: Deployment, client: httpx.Client) -> None:
    session = session_at(site, client, "pair", "a")
    for status in (400, 401, 404, 422, 500, 501):
        site.behave("a", refuse=status)
        answer = ask(client, "pair", session)
        assert (answer.status_code, answer.headers["x-error-source"]) == (status, "engine")
        assert requests_at(site, "a", "b") == [1, 0]


def test_a_stream_that_began_is_not_tried_again(site: Deployment, client: httpx.Client) -> None:
    session = session_at(site, client, "pair", "a")
    site.behave("a", break_stream=2)
    answer = ask(client, "pair", session, stream=True)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert [json.loads(event)["choices"][0]["delta"]["content"] for event in events[:-1]] == ["One ", "word "]
    assert json.loads(events[-1])["error"]["code"] == "engine_error"
    assert requests_at(site, "a", "b") == [1, 0]


def test_a_pause_that_is_asked_for_is_made(site: Deployment, client: httpx.Client) -> None:
    site.behave("a", refuse=429, retry_after="1", refuse_times=6)
    assert [answer.status_code for answer in at_once(6, client, "one")] == [200] * 6
    tries: dict[str, list[float]] = {}
    for each in site.seen("a")["requests"]:
        tries.setdefault(each["headers"]["x-request-id"], []).append(each["at"])
    assert len(tries) == 6
    for first, second in tries.values():
        assert second - first >= 1


def test_a_long_pause_is_left_to_the_client(site: Deployment, client: httpx.Client) -> None:
    site.behave("a", refuse=503, retry_after="30")
    answer = ask(client, "one")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    assert requests_at(site, "a") == [1]
    site.behave("a")
    session = session_at(site, client, "pair", "a")
    site.behave("a", refuse=503, retry_after="30")
    assert served_by(site, ask(client, "pair", session)) == "b"


def test_a_silent_one_is_given_up(site: Deployment, client: httpx.Client) -> None:
    session = session_at(site, client, "impatient", "a")
    site.behave("a", hang=True)
    assert served_by(site, ask(client, "impatient", session)) == "b"
    eventually(lambda: site.seen("a")["cancelled"] == 1)


def test_a_breaker_keeps_requests_away(site: Deployment, client: httpx.Client) -> None:
    def state() -> str:
        replica = site.name("a")
        return STATES[int(metric(client, "vllm_unified_breaker_state", model="breaking", replica=replica))]

    assert state() == "closed"
    site.behave("a", refuse=503)
    assert ask(client, "breaking").headers["x-error-source"] == "engine"
    assert state() == "closed"
    answer = ask(client, "breaking")
    assert state() == "open"
    assert requests_at(site, "a") == [FAILURES_THAT_OPEN]
    answer = ask(client, "breaking")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_not_ready")
    assert "its last requests failed" in error_of(answer)["message"]
    assert answer.headers["retry-after"]
    assert requests_at(site, "a") == [FAILURES_THAT_OPEN]
    assert state() == "open"

    site.behave("a", busy_seconds=1)
    eventually(lambda: state() == "half_open")
    assert sorted(answer.status_code for answer in at_once(4, client, "breaking")) == [200, 503, 503, 503]
    assert requests_at(site, "a") == [1]
    assert state() == "closed"
    assert [answer.status_code for answer in at_once(3, client, "breaking")] == [200] * 3


# --- keys, names, addresses ---


def test_the_key_of_an_endpoint_and_no_other_goes_there(site: Deployment, client: httpx.Client) -> None:
    for model, key in {"literal": "sk-literal", "named": "sk-by-name"}.items():
        headers = {"x-api-key": API_KEY, "cookie": f"key={API_KEY}", "proxy-authorization": API_KEY}
        assert client.post(PATH, json={"model": model}, headers=headers).status_code == 200
        (request,) = site.seen(model)["requests"]
        assert request["headers"]["authorization"] == f"Bearer {key}"
        assert site.seen(model)["looks"]["/v1/models"]["authorization"] == f"Bearer {key}"
        assert API_KEY not in json.dumps(site.seen(model))


def test_where_no_key_is_wanted_none_is_sent(site: Deployment, client: httpx.Client) -> None:
    ask(client, "one").raise_for_status()
    (request,) = site.seen("a")["requests"]
    assert "authorization" not in {name.lower() for name in request["headers"]}
    assert API_KEY not in json.dumps(request)


@pytest.mark.parametrize("name", ["renamed", "also-renamed"])
def test_a_model_with_another_name_there(site: Deployment, client: httpx.Client, name: str) -> None:
    body = {"messages": [{"role": "user", "content": "é漢\u2028\x00"}], "seed": 2**63, "x": 1e-300}
    answer = client.post(PATH, json={**body, "model": name})
    assert answer.json()["echo"] == {**body, "model": "org/there"}


def test_a_large_body_with_another_name(site: Deployment, client: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "also-renamed", "text": "é漢" * 2_000_000, "list": list(range(100_000))}
    answer = ask(client, **body)
    assert answer.json()["echo"] == {**body, "model": "org/there"}
    assert answer.headers["x-served-by"] == site.name("a")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a"}', b'{"model":"b"}'),
        (b' { "x" : [1, 2.50, 1e999] , "model" : "a" } ', b'{"x":[1, 2.50, 1e999],"model":"b"}'),
        (b'{"model":"a","x":' + b"1" * 5000 + b"}", b'{"model":"b","x":' + b"1" * 5000 + b"}"),
        (b'{"model":"a","x":0.10000000000000000555}', b'{"model":"b","x":0.10000000000000000555}'),
        (b'{"model":"a","x":"\\ud83d\\ude00\\u00e9"}', b'{"model":"b","x":"\\ud83d\\ude00\\u00e9"}'),
        (b'{"model":"a","x":"\\ud800"}', b'{"model":"b","x":"\xed\xa0\x80"}'),  # half a pair
        (b'{"model":"a","x":{"model":"a"},"model":"a"}', b'{"model":"b","x":{"model":"a"}}'),
    ],
)  # fmt: skip
def test_all_but_the_name_stays_as_it_was_written(body: bytes, expected: bytes) -> None:
    assert with_fields(body, {"model": "b"}) == expected


def test_what_cannot_be_read_here_is_answered(site: Deployment, client: httpx.Client) -> None:
    """Python's own reader of JSON gives up at integers of 4300 digits."""
    digits = b"1" * 5000
    body = b'{"model":"renamed","x":%b}' % digits
    for _ in range(2):  # over a new connection and over one that is idle
        assert client.post(PATH, content=body).status_code == 200
    assert [each["bytes"] for each in site.seen("a")["requests"]] == [len(body) - len("renamed") + len("org/there")] * 2
    answer = client.post("/rerank", content=b'{"model":"ranks","query":"q","texts":["a"],"x":%b}' % digits)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")
    assert metric(client, "vllm_unified_in_flight", model="ranks") == 0


def test_an_address_with_a_path(site: Deployment, client: httpx.Client) -> None:
    ask(client, "prefixed").raise_for_status()
    assert [each["path"] for each in site.seen("a")["requests"]] == [f"{PREFIX}{PATH}"]


# --- a router that tries once ---


def test_no_second_try(deployment: Deployment) -> None:
    a, b, gone = deployment.remote("a"), deployment.remote("b"), deployment.remote("gone", behind=False)
    one = {"type": "chat", "endpoints": [{"url": a, "timeout": 1}]}
    deployment.start(
        {
            "both": {"type": "chat", "balancing": "round_robin", "endpoints": [a, b]},
            "one": one,
            "gone": {"type": "chat", "endpoints": [gone]},
        },
        retries=0,
    )
    with deployment.client() as client:
        for key in "ab":
            deployment.behave(key, refuse=503)
        assert {ask(client, "both").status_code for _ in range(2)} == {503}
        assert requests_at(deployment, "a", "b") == [1, 1]

        answer = ask(client, "gone")
        assert answer.status_code == 502
        assert f"is served by {deployment.name('gone')}, which can't be reached" in error_of(answer)["message"]
        assert deployment.service(client, "gone")["error"] == "it does not answer on its port"

        deployment.behave("a", hang=True)
        answer = ask(client, "one")
        assert (answer.status_code, error_of(answer)["code"]) == (504, "engine_error")
        assert "was silent for 1 s" in error_of(answer)["message"]
        eventually(lambda: deployment.seen("a")["cancelled"] == 1)

        deployment.behave("a", hang_stream=2)
        events = ask(client, "one", stream=True).text.split("\n\n")
        assert "was silent for 1 s" in json.loads(events[2].removeprefix("data: "))["error"]["message"]
        eventually(lambda: deployment.seen("a")["cancelled"] == 1)

        deployment.behave("a", chunk_seconds=0, pad=3_000_000)
        with client.stream("POST", PATH, json={"model": "one", "stream": True}) as slowly:
            text = slowly.iter_text()
            begin = next(text)
            time.sleep(3)  # the client is slow, not the server
            assert (begin + "".join(text)).endswith("data: [DONE]\n\n")


# --- servers that do not speak as they should ---


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that answers everything with these bytes and closes the connection; its address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if answer:
                self.request.recv(1 << 16)
                self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
ODD: dict[str, tuple[bytes, str]] = {
    "closing": (b"", "which closed the connection before it answered"),
    "babbling": (b"\x16\x03\x01\r\n\r\n", "answered something that is not HTTP"),
    "broken-off": (JSON_HEAD + b"content-length: 99\r\n\r\n", "broke off its answer: it closed the connection"),
    "interim": (b"HTTP/1.1 199 Early\r\ncontent-length: 2\r\n\r\nno", "closed the connection before it answered"),
    "beyond": (b"HTTP/1.1 600 What\r\ncontent-length: 0\r\n\r\n", "answered with the status 600"),
}


def test_servers_that_do_not_speak_as_they_should(deployment: Deployment) -> None:
    sized = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99\r\n\r\ndata: 1\n\n"
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(answering(answer)) for name, (answer, _) in ODD.items()}
        urls["sized"] = stack.enter_context(answering(sized))
        models = {name: {"type": "chat", "endpoints": [url]} for name, url in urls.items()}
        deployment.start(models, retries=0, health_check_interval=3600)
        client = stack.enter_context(deployment.client())
        for name, (_, words) in ODD.items():
            answer = ask(client, name)
            assert (answer.status_code, error_of(answer)["code"]) == (502, "engine_error"), name
            assert words in error_of(answer)["message"]
        for _ in range(2):  # the second over the same connection: the first ended where it said
            events = ask(client, "sized", stream=True).text.split("\n\n")
            assert events[0] == "data: 1"
            assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "engine_error"
        assert all(metric(client, "vllm_unified_in_flight", model=name) == 0 for name in urls)


# --- https ---


def test_https_with_an_authority_of_ones_own(deployment: Deployment, certificates: Path) -> None:
    tls = [str(certificates / "server.pem"), str(certificates / "server.key")]
    url, plain = deployment.remote("a", tls=tls), deployment.remote("plain")
    ca, other = str(certificates / "ca.pem"), str(certificates / "other-ca.pem")
    endpoints: dict[str, Any] = {
        "good": {"url": url, "ca": ca},
        "unknown": url,
        "wrong": {"url": url, "ca": other},
        "misnamed": {"url": url.replace("127.0.0.1", "localhost"), "ca": ca},
        "plain": {"url": plain.replace("http:", "https:"), "ca": ca},
    }
    deployment.start({name: {"type": "chat", "endpoints": [each]} for name, each in endpoints.items()}, retries=1)
    with deployment.client() as client:
        big = "x" * 3_000_000
        assert [ask(client, "good", text=big).json()["echo"]["text"] == big for _ in range(3)] == [True] * 3
        assert ask(client, "good", stream=True).text.endswith("data: [DONE]\n\n")
        said = {
            "unknown": "its certificate is not trusted: unable to get local issuer certificate; name its authority",
            "wrong": "its certificate is not trusted: unable to get local issuer certificate; name its authority",
            "misnamed": "its certificate is not for localhost",
            "plain": "it does not speak TLS",
        }
        for name, words in said.items():
            assert words in deployment.service(client, name)["error"]
            answer = ask(client, name)
            assert answer.status_code == 502
            assert words in error_of(answer)["message"]
        assert deployment.service(client, "good")["status"] == "healthy"


# --- beside an engine of its own, and without any ---


def test_an_endpoint_serves_on_when_the_engine_ends(deployment: Deployment) -> None:
    a = deployment.remote("a")
    chat = {"type": "chat", "path": "models/chat", "balancing": "round_robin", "endpoints": [a]}
    deployment.start({"chat": chat}, health_check_interval=1)
    with deployment.client() as client:
        both = {"chat", deployment.name("a")}
        assert {ask(client, "chat").headers["x-served-by"] for _ in range(2)} == both
        (local, *_), (remote, *_) = deployment.seen("chat")["requests"], deployment.seen("a")["requests"]
        assert local["headers"]["authorization"] == f"Bearer {API_KEY}"
        assert "authorization" not in remote["headers"]
        deployment.stop_engine("chat")
        served = Counter(ask(client, "chat").headers["x-served-by"] for _ in range(10))
        assert served == {deployment.name("a"): 10}
        assert client.get("/ready").status_code == 200
        deployment.start_engine("chat", {})
        eventually(lambda: ask(client, "chat").headers["x-served-by"] == "chat")


def test_a_file_with_remote_models_alone(deployment: Deployment, project: Project, tmp_path: Path) -> None:
    a, port = deployment.remote("a"), free_port()
    file = tmp_path / "elsewhere.json"
    models = {"chat": {"name": "chat", "type": "chat", "endpoints": [f"{a}/v1/"]}}
    file.write_text(json.dumps({"models": models, "router": {"port": port}}))
    (project.home / ".env").write_text(f"VLLM_API_KEY={API_KEY}\n")
    command = [sys.executable, "-m", "vllm_unified", "--config", str(file), "router"]
    with deployment.log.open("ab") as log:
        deployment.processes["router"] = subprocess.Popen(
            command, env={"VLLM_UNIFIED_HOME": str(project.home)}, cwd=CHECKOUT, stdout=log, stderr=log
        )
    deployment.ports["router"] = port
    with deployment.client() as client:
        eventually(lambda: is_alive(client), 60)
        eventually(lambda: client.get("/ready").status_code == 200)
        assert served_by(deployment, ask(client, "chat")) == "a"
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["chat"]


def test_metrics_name_every_replica(site: Deployment, client: httpx.Client) -> None:
    found = re.findall(r'replica_up{model="robin",replica="([^"]+)"} 1.0', client.get("/metrics").text)
    assert found == [site.name(key) for key in "abc"]
