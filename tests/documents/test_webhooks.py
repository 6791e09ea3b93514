"""What is told when a job ends: to whom, signed how, and how often."""

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from tests.conftest import free_port
from tests.documents.web import ALLOWED, CLOSED, OPEN, Answer, Host, Names, good, head, header, says, serving
from vllm_unified.documents import webhooks
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.webhooks import Outcome

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
BODY = json.dumps({"task_id": "x", "status": "succeeded", "name": "年报.pdf"}).encode()
HOME = Names({"client.example": [[OPEN]]})


async def delivered(host: Host, headers: dict[str, str] | None = None, **others: Any) -> Outcome:
    headers = webhooks.headers("msg_1", BODY, SECRET, 1_767_225_600) if headers is None else headers
    url = f"http://client.example:{host.port}/hook?a=b"
    return await webhooks.deliver(url, BODY, headers, **{"allowed": ALLOWED, "resolve": HOME, **others})


def outcome_of(answer: Answer, **others: Any) -> Outcome:
    async def story() -> Outcome:
        async with serving(answer) as host:
            return await delivered(host, **others)

    return asyncio.run(story())


def test_a_message_comes_whole_and_signed() -> None:
    async def story() -> None:
        async with serving(says(good(b"thanks"))) as host:
            assert await delivered(host) == Outcome("delivered")
            (request,) = host.requests
            start, body = request.partition(b"\r\n")[0], request.partition(b"\r\n\r\n")[2]
            assert start == b"POST /hook?a=b HTTP/1.1"
            assert body == BODY
            assert header(request, "content-type") == "application/json"
            assert header(request, "host") == f"client.example:{host.port}"
            # As a receiver checks it.
            message_id, timestamp = header(request, "webhook-id"), header(request, "webhook-timestamp")
            assert (message_id, timestamp) == ("msg_1", "1767225600")
            signed = f"{message_id}.{timestamp}.".encode() + body
            mac = hmac.new(bytes(range(32)), signed, hashlib.sha256).digest()
            assert header(request, "webhook-signature") == "v1," + base64.b64encode(mac).decode()

    asyncio.run(story())


def test_the_vector_of_the_standards_own_libraries() -> None:
    """The vector that its libraries in every language are tested with."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = webhooks.headers("msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', secret, 1614265330)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_without_a_secret_there_is_no_signature() -> None:
    headers = webhooks.headers("msg_1", BODY, "", 1)
    assert headers == {"content-type": "application/json", "webhook-id": "msg_1", "webhook-timestamp": "1"}


ENDLESS = itertools.repeat(b"x" * 65536)


async def for_ever(request: bytes) -> AsyncIterator[bytes]:
    yield head("200 OK")
    for piece in ENDLESS:
        yield piece


async def silent(request: bytes) -> AsyncIterator[bytes]:
    await asyncio.sleep(60)
    yield b""


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (says(good(b"")), "delivered"),
        (says(head("202 Accepted", "content-length: 0")), "delivered"),
        (says(head("204 No Content")), "delivered"),
        (says(head("200 OK", "content-encoding: gzip", "content-length: 3") + b"bad"), "delivered"),
        (for_ever, "delivered"),
        (says(head("301 Moved", "location: /", "content-length: 0")), "failed"),
        (says(head("400 Bad", "content-length: 0")), "failed"),
        (says(head("404 Not Found", "content-length: 0")), "failed"),
        (says(head("429 Too Many", "content-length: 0")), "failed"),
        (says(head("500 Oh", "content-length: 0")), "failed"),
        (says(head("410 Gone", "content-length: 0")), "gone"),
        (says(b"no HTTP at all\r\n"), "failed"),
        (says(), "failed"),
    ],
)
def test_what_an_answer_means(answer: Answer, state: str) -> None:
    outcome = outcome_of(answer)
    assert outcome.state == state
    assert bool(outcome.reason) == (state != "delivered")


def test_a_receiver_that_says_nothing() -> None:
    assert outcome_of(silent, seconds=0.3) == Outcome("failed", "no answer within 0.3 seconds")


def test_nobody_there() -> None:
    assert asyncio.run(delivered(Host(free_port()))).state == "failed"


def test_no_redirect_is_followed() -> None:
    async def story() -> None:
        async with serving(says(good(b"SECRET"))) as other:
            redirect = says(
                head("307 Elsewhere", f"location: http://client.example:{other.port}/", "content-length: 0")
            )
            async with serving(redirect) as host:
                assert await delivered(host) == Outcome("failed", "answered with status 307")
            assert other.requests == []

    asyncio.run(story())


def test_an_address_that_changed_since_the_job_was_accepted() -> None:
    async def story() -> None:
        names = Names({"client.example": [[OPEN], [CLOSED]]})
        async with serving(says(good(b"")), CLOSED) as victim:
            url = f"http://client.example:{victim.port}/hook"
            await webhooks.check(url, SECRET, allowed=ALLOWED, resolve=names)
            outcome = await webhooks.deliver(url, BODY, {}, allowed=ALLOWED, resolve=names)
            assert outcome.state == "failed"
            assert "administrator can allow it" in outcome.reason
            assert victim.requests == []

    asyncio.run(story())


async def hanging(host: str, port: int) -> Sequence[str]:
    await asyncio.sleep(60)
    return []


@pytest.mark.parametrize(
    ("url", "secret", "status"),
    [
        ("http://client.example/hook", SECRET, None),
        ("http://client.example/hook", "", None),
        ("https://client.example:8443/", "whsec_" + base64.b64encode(b"s" * 64).decode(), None),
        ("file:///etc/passwd", "", 400),
        ("http://user:password@client.example/", "", 400),
        ("http://127.0.0.1:8001/", "", 403),
        ("http://[::1]/", "", 403),
        ("http://client.example:25/", "", 403),
        ("http://unknown.example/", "", 400),
        ("http://client.example/", "whsec_", 400),
        ("http://client.example/", "secret", 400),
        ("http://client.example/", SECRET.removeprefix("whsec_"), 400),
        ("http://client.example/", "whsec_" + base64.b64encode(b"s" * 23).decode(), 400),
        ("http://client.example/", "whsec_" + base64.b64encode(b"s" * 65).decode(), 400),
        ("http://client.example/", "whsec_!!!!" + SECRET, 400),
        ("http://client.example/", "whsec_密密密密密密密密密密密密", 400),
    ],
)
def test_before_a_job_is_accepted(url: str, secret: str, status: int | None) -> None:
    check = webhooks.check(url, secret, allowed=ALLOWED, resolve=HOME)
    if status is None:
        asyncio.run(check)
        return
    with pytest.raises(DocumentError, match=r"^webhook: The ") as caught:
        asyncio.run(check)
    assert caught.value.status == status


def test_a_look_up_that_hangs_does_not_hold_a_job_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "LOOK_UP_SECONDS", 0.1)
    with pytest.raises(DocumentError) as caught:
        asyncio.run(webhooks.check("http://client.example/", "", allowed=ALLOWED, resolve=hanging))
    assert caught.value.status == 400


def test_when_a_message_is_sent_again() -> None:
    middle = [webhooks.next_attempt(attempts, lambda low, high: (low + high) / 2) for attempts in range(1, 9)]
    assert middle == [10, 30, 90, 270, 810, 2430, None, None]
    assert 0.75 < sum(filter(None, middle)) / 3600 < 1.25
    waits = {webhooks.next_attempt(1) for _ in range(50)}
    assert len(waits) > 1
    assert all(wait is not None and 8 <= wait <= 12 for wait in waits)
