"""URLs that clients chose, against hosts that mean harm."""

import asyncio
import contextlib
import functools
import hashlib
import itertools
import ssl
import subprocess
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import free_port
from tests.documents.web import (
    ALLOWED,
    CLOSED,
    OPEN,
    OPEN_TOO,
    Answer,
    Names,
    good,
    head,
    header,
    says,
    serving,
)
from vllm_unified.documents.fetching import AddressRule, Fetched, check, fetch, look_up, parse
from vllm_unified.documents.problems import DocumentError

PDF = b"%PDF-1.7 " + bytes(range(256)) * 300
HOME = Names({"files.example": [[OPEN]]})


def fetched(url: str, folder: Path, **others: Any) -> Coroutine[Any, Any, Fetched]:
    options: dict[str, Any] = {"max_bytes": 1_000_000, "seconds": 20, "allowed": ALLOWED, "resolve": HOME}
    return fetch(url, folder, **options | others)


def refusal(run: Coroutine[Any, Any, Any]) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        asyncio.run(run)
    return caught.value


def left_in(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir()]


async def served(answer: Answer, folder: Path, path: str = "/a.pdf", **others: Any) -> Fetched:
    async with serving(answer) as host:
        return await fetched(f"http://files.example:{host.port}{path}", folder, **others)


def test_a_file_is_fetched(tmp_path: Path) -> None:
    async def story() -> None:
        answer = says(good(PDF, "Content-Type: Application/PDF; charset=binary"))
        async with serving(answer) as host:
            authority = f"files.example:{host.port}"
            found = await fetched(f"HTTP://Files.Example.:{host.port}/年报%202025.pdf?key=a%20b#page=2", tmp_path)
            assert found == Fetched(
                tmp_path / "input",
                "年报 2025.pdf",
                len(PDF),
                hashlib.sha256(PDF).hexdigest(),
                "application/pdf",
                f"http://{authority}/%E5%B9%B4%E6%8A%A5%202025.pdf?key=a%20b",
            )
            assert found.path.read_bytes() == PDF
            assert left_in(tmp_path) == ["input"]
            (request,) = host.requests
            assert request.startswith(b"GET /%E5%B9%B4%E6%8A%A5%202025.pdf?key=a%20b HTTP/1.1\r\n")
            said = {name: header(request, name) for name in ("host", "accept-encoding", "cookie", "authorization")}
            assert said == {"host": authority, "accept-encoding": "identity", "cookie": None, "authorization": None}

    asyncio.run(story())


def test_a_second_fetch_takes_the_place_of_the_first(tmp_path: Path) -> None:
    for body in (b"first", b"second"):
        assert asyncio.run(served(says(good(body)), tmp_path)).path.read_bytes() == body


# --- where a URL may lead ---

PUBLIC = "93.184.216.34"
DNS = {
    "public.example": [PUBLIC],
    "six.example": ["2606:2800:220:1::1"],
    "two.example": [PUBLIC, "2606:2800:220:1::1"],
    "under_score.example": [PUBLIC],
    "xn--bcher-kva.example": [PUBLIC],
    "a" * 63 + ".example": [PUBLIC],
    "localhost": ["127.0.0.1", "::1"],
    "localtest.example": ["127.0.0.1"],
    "split.example": [PUBLIC, "10.0.0.1"],
    "mapped.example": ["::ffff:10.0.0.1"],
    "zone.example": ["fe80::1%eth0"],
    "empty.example": [],
    "metadata.google.internal": ["169.254.169.254"],
    "files.corp": ["10.1.2.3"],
}

URLS: list[tuple[str, int | None]] = [
    ("https://public.example/a.pdf", None),
    ("http://public.example", None),
    ("HTTPS://PUBLIC.EXAMPLE./a.pdf", None),
    ("https://public.example:443/", None),
    ("http://public.example:80/", None),
    ("http://public.example:443/", None),
    ("https://public.example:8443/", None),
    ("https://public.example:1024/", None),
    ("https://public.example:65535/", None),
    ("https://six.example/", None),
    ("https://two.example/", None),
    ("https://under_score.example/", None),
    ("https://bücher.example/", None),
    ("https://" + "a" * 63 + ".example/", None),
    ("https://public.example/a@b:c", None),
    ("https://public.example/a b.pdf", None),
    ("https://public.example/#http://127.0.0.1/", None),
    ("https://8.8.8.8/", None),
    ("https://[2606:2800:220:1::1]/", None),
    ("https://[2606:2800:220:1::1]:8443/", None),
    # The only networks that an administrator added.
    ("https://10.1.0.1/", None),
    ("https://files.corp/", None),
    ("https://[fd00:1::7]/", None),
    # Schemes, and what is no URL.
    ("", 400),
    ("a.pdf", 400),
    ("//public.example/a.pdf", 400),
    ("/etc/passwd", 400),
    ("file:///etc/passwd", 400),
    ("file://public.example/etc/passwd", 400),
    ("ftp://public.example/", 400),
    ("gopher://public.example/", 400),
    ("data:text/plain,hello", 400),
    ("dict://public.example:11211/", 400),
    ("jar:https://public.example!/", 400),
    ("javascript:alert(1)", 400),
    ("http:public.example", 400),
    ("http://", 400),
    ("http:///etc/passwd", 400),
    ("http://?", 400),
    ("https://user@public.example/", 400),
    ("https://user:password@public.example/", 400),
    ("https://public.example@127.0.0.1/", 400),
    ("https://127.0.0.1\\@public.example/", 400),
    ("https://public.example\\@127.0.0.1/", 400),
    ("https://public.example/\r\nHost: localhost", 400),
    ("https://public.example/\x00", 400),
    ("https://public.example\t/", 400),
    (" https://public.example/", 400),
    ("https://public example/", 400),
    ("https://public.example%2f@127.0.0.1/", 400),
    ("https://%6cocalhost/", 400),
    ("https://public\u200b.example/", 400),
    ("https://public\ud800.example/", 400),
    ("https://a..example/", 400),
    ("https://.example/", 400),
    ("https://" + "a" * 64 + ".example/", 400),
    ("https://" + "a." * 127 + "example/", 400),
    ("https://public.example/" + "a" * 8192, 400),
    ("https://[::1/", 400),
    ("https://[::g]/", 400),
    ("https://[fe80::1%25eth0]/", 400),
    ("https://[fe80::1%eth0]/", 400),
    ("https://[v1.x]/", 400),
    ("https://*.example/", 400),
    # Ports.
    ("https://public.example:0/", 403),
    ("https://public.example:22/", 403),
    ("http://public.example:25/", 403),
    ("https://public.example:1023/", 403),
    ("https://public.example:65536/", 403),
    ("https://public.example:-443/", 403),
    ("https://public.example:https/", 400),
    # IPv4 in the forms that inet_aton takes.
    ("http://127.1/", 400),
    ("http://127.0.1/", 400),
    ("http://2130706433/", 400),
    ("http://017700000001/", 400),
    ("http://0x7f000001/", 400),
    ("http://0x7f.0x0.0x0.0x1/", 400),
    ("http://0177.0.0.1/", 400),
    ("http://127.0.0.01/", 400),
    ("http://127.0.0.0x1/", 400),
    ("http://127.0.0.1.1/", 400),
    ("http://256.0.0.1/", 400),
    ("http://134744072/", 400),
    ("http://１２７.０.０.１/", 400),
    ("http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", 400),
    # IPv4.
    ("http://0.0.0.0/", 403),
    ("http://0.1.2.3/", 403),
    ("http://10.0.0.1/", 403),
    ("http://10.2.0.0/", 403),
    ("http://100.64.0.1/", 403),
    ("http://100.100.100.200/", 403),
    ("http://100.127.255.255/", 403),
    ("http://127.0.0.1:8001/", 403),
    ("http://127.0.0.1./", 403),
    ("http://127.255.255.254/", 403),
    ("http://168.63.129.16/", 403),
    ("http://169.254.169.254/latest/meta-data/", 403),
    ("http://172.16.0.1/", 403),
    ("http://172.31.255.255/", 403),
    ("http://172.32.0.1/", None),
    ("http://192.0.0.192/", 403),
    ("http://192.0.2.1/", 403),
    ("http://192.88.99.1/", 403),
    ("http://192.168.1.1/", 403),
    ("http://198.18.0.1/", 403),
    ("http://198.19.255.255/", 403),
    ("http://198.51.100.1/", 403),
    ("http://203.0.113.1/", 403),
    ("http://224.0.0.1/", 403),
    ("http://239.255.255.255/", 403),
    ("http://240.0.0.1/", 403),
    ("http://255.255.255.255/", 403),
    # IPv6.
    ("http://[::]/", 403),
    ("http://[::1]:8001/", 403),
    ("http://[0:0:0:0:0:0:0:1]/", 403),
    ("http://[::127.0.0.1]/", 403),
    ("http://[::ffff:127.0.0.1]/", 403),
    ("http://[::ffff:7f00:1]/", 403),
    ("http://[::ffff:8.8.8.8]/", 403),
    ("http://[::ffff:10.1.0.1]/", 403),
    ("http://[::ffff:0:7f00:1]/", 403),
    ("http://[64:ff9b::7f00:1]/", 403),
    ("http://[64:ff9b::a9fe:a9fe]/", 403),
    ("http://[64:ff9b:1::7f00:1]/", 403),
    ("http://[100::1]/", 403),
    ("http://[2001::1]/", 403),
    ("http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/", 403),
    ("http://[2001:2::1]/", 403),
    ("http://[2001:10::1]/", 403),
    ("http://[2001:20::1]/", 403),
    ("http://[2001:db8::1]/", 403),
    ("http://[2002:7f00:1::1]/", 403),
    ("http://[2002:0808:0808::1]/", 403),
    ("http://[3fff::1]/", 403),
    ("http://[5f00::1]/", 403),
    ("http://[fc00::1]/", 403),
    ("http://[fd00:2::1]/", 403),
    ("http://[fd00:ec2::254]/", 403),
    ("http://[fe80::1]/", 403),
    ("http://[fec0::1]/", 403),
    ("http://[ff02::1]/", 403),
    # Names.
    ("http://localhost:8000/", 403),
    ("http://LOCALHOST./", 403),
    ("http://localtest.example/", 403),
    ("http://split.example/", 403),
    ("http://mapped.example/", 403),
    ("http://zone.example/", 403),
    ("http://metadata.google.internal/", 403),
    ("http://empty.example/", 502),
    ("http://unknown.example/", 502),
]

RULE = AddressRule(networks=("10.1.0.0/16", "fd00:1::/32"))


async def as_of_dns(host: str, port: int) -> Sequence[str]:
    if host not in DNS:
        raise OSError("no such name")
    return DNS[host]


@pytest.mark.parametrize(("url", "status"), URLS, ids=[repr(url)[:60] for url, _ in URLS])
def test_where_a_url_may_lead(url: str, status: int | None, tmp_path: Path) -> None:
    if status is None:
        asyncio.run(check(url, allowed=RULE, resolve=as_of_dns))
        return
    assert refusal(check(url, allowed=RULE, resolve=as_of_dns)).status == status
    assert refusal(fetched(url, tmp_path, allowed=RULE, resolve=as_of_dns)).status == status
    assert left_in(tmp_path) == []


@given(st.one_of(st.text(), st.builds("http://{}/{}".format, st.text(), st.text())))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    with contextlib.suppress(DocumentError):
        parsed = parse(text)
        assert parse(str(parsed)) == parsed


def test_a_name_is_allowed_with_any_address(tmp_path: Path) -> None:
    rule = AddressRule(hosts=("Files.Corp.",))
    asyncio.run(check("http://files.corp/", allowed=rule, resolve=as_of_dns))
    for url in ("http://localhost/", "http://x.files.corp/", "http://10.1.2.3/"):
        assert refusal(fetched(url, tmp_path, allowed=rule, resolve=as_of_dns)).status in (403, 502)


def test_a_network_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"10\.1\.0\.0/33"):
        AddressRule(networks=("10.1.0.0/33",))


def test_the_machines_own_names() -> None:
    assert CLOSED in asyncio.run(look_up("localhost", 80))
    assert refusal(check("http://localhost/", allowed=AddressRule())).status == 403
    assert refusal(check("http://no-such-host.invalid/", allowed=AddressRule())).status == 502


# --- DNS that changes its answer, redirects ---


def test_a_name_that_changes_its_address(tmp_path: Path) -> None:
    async def story() -> None:
        names = Names({"rebinding.example": [[OPEN], [CLOSED]]})
        async with serving(says(good(b"public"))) as host, serving(says(good(b"SECRET")), CLOSED, host.port) as victim:
            url = f"http://rebinding.example:{host.port}/"
            found = await fetched(url, tmp_path, resolve=names)
            assert (found.path.read_bytes(), names.asked) == (b"public", ["rebinding.example"])
            with pytest.raises(DocumentError) as caught:
                await fetched(url, tmp_path, resolve=names)
            assert caught.value.status == 403
            assert victim.requests == []

    asyncio.run(story())


def test_a_name_that_changes_its_address_between_redirects(tmp_path: Path) -> None:
    async def story() -> None:
        names = Names({"rebinding.example": [[OPEN], [CLOSED]]})
        redirect = head("302 Found", "location: /again", "content-length: 0")
        async with serving(says(redirect)) as host, serving(says(good(b"SECRET")), CLOSED, host.port) as victim:
            with pytest.raises(DocumentError) as caught:
                await fetched(f"http://rebinding.example:{host.port}/", tmp_path, resolve=names)
            assert caught.value.status == 403
            assert (len(host.requests), victim.requests) == (1, [])

    asyncio.run(story())


@pytest.mark.parametrize(
    ("location", "status"),
    [
        ("http://127.0.0.1:{port}/secret", 403),
        ("//127.0.0.1:{port}/secret", 403),
        ("http://[::ffff:127.0.0.1]:{port}/secret", 403),
        ("http://localtest.example:{port}/secret", 403),
        ("http://169.254.169.254/latest/meta-data/", 403),
        ("http://files.example:22/", 403),
        ("http://2130706433:{port}/secret", 400),
        ("http://user:password@files.example:{port}/", 400),
        ("file:///etc/passwd", 400),
        ("ftp://files.example/", 400),
        ("http://[::1/", 502),
        ("http://unknown.example/", 502),
    ],
)
def test_a_redirect_to_where_it_may_not_lead(location: str, status: int, tmp_path: Path) -> None:
    async def story() -> DocumentError:
        port = free_port()
        redirect = head("302 Found", f"location: {location.format(port=port)}", "content-length: 0")
        names = Names({"files.example": [[OPEN]], "localtest.example": [[CLOSED]]})
        async with serving(says(redirect), port=port), serving(says(good(b"SECRET")), CLOSED, port) as victim:
            with pytest.raises(DocumentError) as caught:
                await fetched(f"http://files.example:{port}/", tmp_path, resolve=names)
            assert victim.requests == []
        return caught.value

    error = asyncio.run(story())
    assert error.status == status
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(("redirects", "whole"), [(1, True), (5, True), (6, False)])
def test_redirects_are_followed_five_times(status: int, redirects: int, whole: bool, tmp_path: Path) -> None:
    steps = itertools.count(1)

    async def answer(request: bytes) -> AsyncIterator[bytes]:
        step = next(steps)
        if step > redirects:
            yield good(b"here")
        else:
            yield head(f"{status} Elsewhere", f"location: ../{step}.pdf?x", "set-cookie: a=b", "content-length: 0")

    async def story() -> Fetched:
        async with serving(answer) as host:
            try:
                return await fetched(f"http://files.example:{host.port}/a/b", tmp_path)
            finally:
                assert all(header(request, "cookie") is None for request in host.requests)
                assert len(host.requests) == min(redirects, 5) + 1

    if whole:
        found = asyncio.run(story())
        assert found.name == f"{redirects}.pdf"
        assert found.final_url.endswith(f"/{redirects}.pdf?x")
    else:
        assert refusal(story()).status == 502


def test_another_address_where_the_first_does_not_answer(tmp_path: Path) -> None:
    names = Names({"files.example": [[OPEN_TOO, OPEN]]})
    assert asyncio.run(served(says(good(PDF)), tmp_path, resolve=names)).size == len(PDF)


def test_nobody_there(tmp_path: Path) -> None:
    assert refusal(fetched(f"http://files.example:{free_port()}/", tmp_path)).status == 502


def test_no_proxy_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    assert asyncio.run(served(says(good(PDF)), tmp_path)).size == len(PDF)


# --- hosts that answer badly ---

CHUNKED = head("200 OK", "transfer-encoding: chunked")


def repeating(first: bytes, piece: bytes, pause: float = 0.0) -> Answer:
    async def answer(request: bytes) -> AsyncIterator[bytes]:
        yield first
        while True:
            yield piece
            await asyncio.sleep(pause)

    return answer


BAD_ANSWERS: dict[str, tuple[Answer, int]] = {
    "an endless body": (repeating(head("200 OK"), b"x" * 65536), 413),
    "endless chunks": (repeating(CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"), 413),
    "a length above the limit": (repeating(head("200 OK", "content-length: 1000001"), b"", 0.1), 413),
    "a length of twenty digits": (says(head("200 OK", "content-length: " + "9" * 20)), 413),
    "a length of 5000 digits": (says(head("200 OK", "content-length: " + "9" * 5000)), 502),
    "a length that is none": (says(head("200 OK", "content-length: -1")), 502),
    "two lengths": (says(head("200 OK", "content-length: 1", "content-length: 2") + b"xx"), 502),
    "endless headers": (repeating(head("200 OK")[:-2], b"x: " + b"y" * 1000 + b"\r\n"), 502),
    "one endless header": (repeating(head("200 OK")[:-2] + b"x: ", b"y" * 1000), 502),
    "an endless status line": (repeating(b"HTTP/1.1 200 ", b"y" * 1000), 502),
    "an endless chunk header": (repeating(CHUNKED + b"1;", b"y" * 1000), 502),
    "no answer": (says(), 502),
    "not HTTP": (says(b"SSH-2.0-OpenSSH_9.6\r\n"), 502),
    "half a head": (says(b"HTTP/1.1 200 OK\r\ncontent-le"), 502),
    "half a body": (says(head("200 OK", "content-length: 10") + b"half"), 502),
    "half of the chunks": (says(CHUNKED + b"4\r\nhalf\r\n"), 502),
    "a chunk that is none": (says(CHUNKED + b"zz\r\nhalf\r\n"), 502),
    "compressed": (says(good(b"\x1f\x8b", "content-encoding: gzip")), 502),
    "compressed twice": (says(good(b"\x1f\x8b", "content-encoding: identity, gzip")), 502),
    "204": (says(head("204 No Content")), 502),
    "206": (says(head("206 Partial Content", "content-length: 2") + b"hi"), 502),
    "101": (says(head("101 Switching Protocols", "connection: upgrade", "upgrade: x")), 502),
    "304": (says(head("304 Not Modified")), 502),
    "404": (says(head("404 SECRET", "content-length: 6") + b"SECRET"), 502),
    "500": (says(head("500 SECRET", "content-length: 6") + b"SECRET"), 502),
    "302 to nowhere": (repeating(head("302 Found", "content-length: 0"), b""), 502),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_bad_answer(name: str, tmp_path: Path) -> None:
    answer, status = BAD_ANSWERS[name]
    error = refusal(served(answer, tmp_path))
    assert error.status == status
    assert all(hidden not in str(error) for hidden in ("SECRET", "127.0.0", "OpenSSH"))
    assert left_in(tmp_path) == []


SLOW: dict[str, Answer] = {
    "silence": repeating(b"", b"", 0.05),
    "headers a byte at a time": repeating(head("200 OK")[:-2] + b"x: ", b"y", 0.02),
    "a body a byte at a time": repeating(head("200 OK"), b"y", 0.02),
    "interim answers": repeating(b"", head("100 Continue"), 0.02),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_answer(name: str, tmp_path: Path) -> None:
    assert refusal(served(SLOW[name], tmp_path, seconds=0.5)).status == 504
    assert left_in(tmp_path) == []


def test_a_slow_look_up(tmp_path: Path) -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return []

    assert refusal(fetched("http://files.example/", tmp_path, resolve=never, seconds=0.2)).status == 504


@pytest.mark.parametrize(("size", "taken"), [(0, True), (1000, True), (1001, False)])
@pytest.mark.parametrize("chunked", [True, False])
def test_the_limit_to_the_byte(size: int, taken: bool, chunked: bool, tmp_path: Path) -> None:
    chunks = CHUNKED + b"".join(b"1\r\nx\r\n" for _ in range(size)) + b"0\r\n\r\n"
    run = functools.partial(served, says(chunks if chunked else good(b"x" * size)), tmp_path, max_bytes=1000)
    if taken:
        assert asyncio.run(run()).path.read_bytes() == b"x" * size
    else:
        assert refusal(run()).status == 413


def test_a_fetch_that_is_cancelled(tmp_path: Path) -> None:
    async def story() -> None:
        underway = asyncio.Event()

        async def answer(request: bytes) -> AsyncIterator[bytes]:
            yield head("200 OK", "content-length: 10") + b"half"
            await asyncio.sleep(0.1)
            underway.set()
            await asyncio.sleep(60)

        task = asyncio.create_task(served(answer, tmp_path))
        await underway.wait()
        assert left_in(tmp_path) == ["input.part"]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left_in(tmp_path) == []

    asyncio.run(story())


@pytest.mark.parametrize(
    ("path", "disposition", "name"),
    [
        ("/", None, ""),
        ("/a/", None, ""),
        ("/a/b.pdf?c.pdf", None, "b.pdf"),
        ("/a%2Fb.pdf", None, "b.pdf"),
        ("/..%2F..%2Fetc%2Fpasswd", None, "passwd"),
        ("/a%00b%0Ac.pdf", None, "abc.pdf"),
        ("/" + "n" * 4096 + ".pdf", None, "n" * 255),
        ("/a", "attachment", "a"),
        ("/a", 'attachment; filename="b c.pdf"', "b c.pdf"),
        ("/a", "attachment; filename*=UTF-8''%E5%B9%B4.pdf; filename=x.pdf", "年.pdf"),
        ("/a", 'attachment; filename="年.pdf"', "年.pdf"),
        ("/a", 'attachment; filename="../../etc/passwd"', "passwd"),
        ("/a", r'attachment; filename="C:\\dir\\b.pdf"', "b.pdf"),
        ("/a", "attachment; filename*=no-such-charset''b%FF.pdf", "bÿ.pdf"),
        ("/a", "attachment; filename*", "a"),
        ("/a", 'attachment; filename="' + ';"' * 40_000, None),
    ],
)
def test_the_name_of_a_file(path: str, disposition: str | None, name: str | None, tmp_path: Path) -> None:
    headers = [] if disposition is None else [f"content-disposition: {disposition}"]
    found = asyncio.run(served(says(good(PDF, *headers)), tmp_path, path)).name
    assert len(found) <= 255
    assert name is None or found == name


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """certificate.pem for files.example, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    name = ("-subj", "/CN=files.example", "-addext", "subjectAltName=DNS:files.example")
    files = ("-keyout", "key.pem", "-out", "certificate.pem")
    subprocess.run(["openssl", *new, *name, *files], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate / "certificate.pem", certificate / "key.pem")
    return context


@pytest.fixture
def client_tls(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate / "certificate.pem")


def test_tls_is_with_the_name(tmp_path: Path, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    names: list[str | None] = []
    server_tls.sni_callback = lambda _, name, __: names.append(name)
    resolve = Names({"files.example": [[OPEN]], "other.example": [[OPEN]]})

    async def ask(host: str, trusted: ssl.SSLContext | None) -> Fetched:
        async with serving(says(good(PDF)), tls=server_tls) as server:
            return await fetched(f"https://{host}:{server.port}/", tmp_path, resolve=resolve, tls=trusted)

    assert asyncio.run(ask("files.example", client_tls)).size == len(PDF)
    for host, trusted in (("other.example", client_tls), (OPEN, client_tls), ("files.example", None)):
        error = refusal(ask(host, trusted))
        assert (error.status, "certificate" in str(error)) == (502, True)
    assert names == ["files.example", "other.example", None, "files.example"]


def test_https_does_not_become_http(tmp_path: Path, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    async def story() -> None:
        async with serving(says(good(PDF))) as plain:
            redirect = says(head("302 Found", f"location: http://files.example:{plain.port}/", "content-length: 0"))
            async with serving(redirect, tls=server_tls) as secure:
                try:
                    await fetched(f"https://files.example:{secure.port}/", tmp_path, tls=client_tls)
                finally:
                    assert plain.requests == []

    assert refusal(story()).status == 403


def test_a_handshake_that_nobody_answers_leaves_no_connection(tmp_path: Path) -> None:
    async def story() -> None:
        closed = asyncio.Event()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            closed.set()
            writer.close()

        async with await asyncio.start_server(talk, OPEN, 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(DocumentError) as caught:
                await fetched(f"https://files.example:{port}/", tmp_path, seconds=0.3)
            assert caught.value.status == 504
            async with asyncio.timeout(10):
                await closed.wait()

    asyncio.run(story())


def test_https_to_a_host_without_tls(tmp_path: Path) -> None:
    async def story() -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(head("400 Bad Request"))
            writer.close()

        async with await asyncio.start_server(talk, OPEN, 0) as server:
            await fetched(f"https://files.example:{server.sockets[0].getsockname()[1]}/", tmp_path)

    assert refusal(story()).status == 502
