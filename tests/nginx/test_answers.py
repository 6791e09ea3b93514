"""What Nginx answers by itself, what it lets through to whom, and what it writes down."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.conftest import Project, eventually, free_port
from tests.nginx.conftest import Nginx
from tests.router.conftest import Deployment
from tests.router.wire import AUTHORIZED, Answer, Client, Engine, post, request
from vllm_unified.logs.files import read

MIB = 1 << 20
CHAT = "/v1/chat/completions"


def sent(nginx: Nginx, *pieces: bytes) -> Answer:
    with Client(nginx.port) as client:
        client.send(*pieces)
        return client.answer()


def get(target: str, *headers: str) -> bytes:
    return request("GET", target, *headers)


def code_of(answer: Answer) -> str:
    """Of an error in OpenAI's shape."""
    assert answer["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


@pytest.mark.parametrize(
    ("target", "status", "source"),
    [
        ("/metrics", 403, "nginx"),
        ("/metrics/engines/chat", 403, "nginx"),
        ("/metrics/", 403, "nginx"),
        ("/sd", 403, "nginx"),
        ("/admin/reload", 403, "nginx"),
        ("/internal/infer", 403, "nginx"),
        ("/internal", 403, "nginx"),
        ("//metrics", 403, "nginx"),
        ("/./metrics", 403, "nginx"),
        ("/v1/../metrics", 403, "nginx"),
        ("/v1/%2e%2e/metrics", 403, "nginx"),
        ("/v1/%2E%2E%2Fmetrics", 403, "nginx"),
        ("/%6detrics", 403, "nginx"),
        ("/metrics%2fengines", 403, "nginx"),
        ("/metrics?x=/../v1", 403, "nginx"),
        ("http://else.example/metrics", 403, "nginx"),
        ("http://else.example//metrics", 403, "nginx"),
        ("/metrics/../v1/models", 400, "nginx"),
        ("/metrics/%2e%2e/v1/models", 400, "nginx"),
        ("/internal/..%2fv1/models", 400, "nginx"),
        ("/api/x/..", 400, "nginx"),
        ("/../metrics", 400, "nginx"),
        ("/metrics%00", 400, "nginx"),
        ("/.nginx/429", 404, "nginx"),
        ("/.nginx/503.page", 404, "nginx"),
        ("/.nginx/x", 404, "nginx"),
        ("/Metrics", 404, "router"),
        ("/metricsx", 404, "router"),
        ("/%256detrics", 404, "router"),
        ("/v1/models/a..b", 404, "router"),
        ("/v1/models/a%2Fb", 404, "router"),
        ("/v1/models?x=/../y", 200, ""),
        ("http://else.example/v1/models", 200, ""),
        ("/live", 200, ""),
        ("/docs", 200, ""),
        ("/usage", 200, ""),
    ],
)
def test_what_is_for_outside(nginx: Nginx, target: str, status: int, source: str) -> None:
    """With the deployment's own key, which may see everything."""
    answer = sent(nginx, get(target))
    assert (answer.status, "".join(answer.all("x-error-source"))) == (status, source)
    if source:
        assert code_of(answer)
        assert answer["x-request-id"]


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request"),  # no host
        (b"rubbish\r\n\r\n", 400, "bad_request"),
        (get("/v1/models", "content-length: 1", "content-length: 2"), 400, "bad_request"),
        (post(CHAT, {}, "transfer-encoding: chunked"), 400, "bad_request"),
        (get("/v1/models", "transfer-encoding: gzip, chunked"), 501, "not_implemented"),
        (get("/v1/models", "host: second"), 400, "bad_request"),
        (get("/" + "x" * 17_000), 414, "uri_too_long"),
        (get("/v1/models", "x-long: " + "x" * 17_000), 431, "headers_too_large"),
        (request("TRACE", "/v1/models"), 405, "bad_request"),
        (
            get("/v1/models").replace(AUTHORIZED, AUTHORIZED + b"content-length: 999999999\r\n"),
            413,
            "request_too_large",
        ),
        (b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n", 400, "bad_request"),
    ],
)
def test_what_is_refused_before_the_router(nginx: Nginx, text: bytes, status: int, code: str) -> None:
    answer = sent(nginx, text)
    assert (answer.status, code_of(answer)) == (status, code)
    assert answer["x-error-source"] == "nginx"
    assert answer["server"] == "nginx"  # without its version


def test_an_answer_of_an_engine_passes_as_it_is(site: Deployment, nginx: Nginx) -> None:
    """Its errors too; and what it says to Nginx is not obeyed."""
    head = b"HTTP/1.1 502 Bad\r\nx-accel-redirect: /.nginx/429\r\nx-accel-limit-rate: 1\r\ncontent-length: 2\r\n\r\n{}"
    with Engine(site.ports["raw"], lambda connection, *_: connection.sendall(head)):
        answer = sent(nginx, post(CHAT, {"model": "raw"}))
    assert (answer.status, answer["x-error-source"]) == (502, "engine")


def test_who_the_client_is(site: Deployment, nginx: Nginx) -> None:
    """Its address, whatever it says; and one name for its request in both logs."""
    lies = ("x-forwarded-for: 9.9.9.9", "x_forwarded_for: 9.9.9.9", "x-real-ip: 9.9.9.9", "forwarded: for=9.9.9.9")
    for address, name in (("127.0.0.1", "mine-1"), ("127.0.0.9", "mine-2")):
        with Client(nginx.port, source=address) as client:
            client.send(post(f"{CHAT}?secret=1", {"model": "chat"}, *lies, f"x-request-id: {name}"))
            assert client.answer()["x-request-id"] == name
        (ours,) = eventually(partial(lines_with, name, lambda: router_lines(site)))
        assert (ours["peer"], ours["path"], ours["status"]) == (address, CHAT, 200)
        (its,) = eventually(partial(lines_with, name, lambda: nginx.lines))
        assert (its["peer"], its["path"], its["status"], its["level"]) == (address, CHAT, 200, "info")
    headers = {key.lower() for key in site.seen("chat")["requests"][-1]["headers"]}
    assert headers.isdisjoint({"x-forwarded-for", "x_forwarded_for", "x-real-ip", "forwarded"})


def lines_with(name: str, lines: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [line for line in lines() if line.get("id") == name]


def router_lines(site: Deployment) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in site.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if "peer" in line]


def test_a_line_of_the_log(nginx: Nginx) -> None:
    answer = sent(nginx, get('/v1/models/"x"?key=sk-secret', "x-request-id: not one\x7f"))
    (line,) = eventually(lambda: [line for line in nginx.lines if line["id"] == answer["x-request-id"]])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", line.pop("time"))
    assert re.fullmatch("[0-9a-f]{32}", line.pop("id"))
    assert (line.pop("duration_us") >= 0, line.pop("bytes_in") > 50, line.pop("bytes_out") > 50) == (True, True, True)
    assert line == {
        "level": "info",
        "source": "nginx",
        "peer": "127.0.0.1",
        "method": "GET",
        "path": '/v1/models/"x"',
        "status": 404,
        "upstream_status": "404",
        "tls": "",
    }
    assert "sk-secret" not in nginx.log.read_text()


@pytest.mark.parametrize(("zone", "offset"), [("CST-8", "+08:00"), ("EST5", "-05:00"), ("UTC0", "+00:00")])
def test_times_are_right_in_any_zone(project: Project, monkeypatch: pytest.MonkeyPatch, zone: str, offset: str) -> None:
    """Written as POSIX does, which needs no database of zones."""
    monkeypatch.setenv("TZ", zone)
    project.write({"chat": {"name": "chat", "type": "chat"}}, router={"port": free_port()})
    before = time.time()
    with Nginx(project) as nginx, nginx.client() as client:
        assert client.get("/v1/models").status_code == 503
        (line,) = eventually(lambda: [raw for raw in nginx.log.read_text().splitlines() if "/v1/models" in raw])
    assert json.loads(line)["time"].endswith(offset)
    assert before - 1 <= read("nginx.log", line).time <= time.time() + 1


def test_too_many_requests_of_one_address(deployment: Deployment) -> None:
    """Before their keys are looked at; other addresses go on."""
    deployment.start({"chat": {"type": "chat"}}, nginx={"requests_per_second": 1, "burst": 4})
    with Nginx(deployment.project) as nginx:
        with nginx.client("sk-wrong") as client:
            answers = [client.get("/v1/models") for _ in range(40)]
        assert Counter(answer.status_code for answer in answers)[401] >= 5
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert {answer.status_code for answer in answers} == {401, 429}
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert {answer.json()["error"]["code"] for answer in refused} == {"rate_limit_exceeded"}
        with Client(nginx.port, source="127.0.0.9") as other:
            assert other.get("/v1/models").status == 200
        assert len(router_lines(deployment)) <= 40 - len(refused)


def test_what_a_browser_shows(nginx: Nginx) -> None:
    with nginx.client(None) as client:
        page = client.get("/docs", headers={"accept": "text/html"})
        script = client.get("/docs/swagger-ui-bundle.js", headers={"accept-encoding": "gzip"})
    assert page.headers["content-type"].startswith("text/html")
    assert script.headers["content-encoding"] == "gzip"
