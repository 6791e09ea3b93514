"""A URL that a client chose, fetched into a file: from the public internet alone, whatever it says or leads to.

A name is looked up here, every address it has is checked, and the connection goes to an address that was checked, so
that a DNS server which answers twice gains nothing. httpcore is used without httpx' client, since only httpcore lets
its connections be made by somebody else.
"""

import asyncio
import contextlib
import functools
import hashlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from email.message import Message
from email.utils import collapse_rfc2231_value
from ipaddress import IPv4Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from socket import SOCK_STREAM
from urllib.parse import urljoin

import anyio
import httpcore
import httpx

from vllm_unified.documents.problems import DocumentError

LONGEST_URL = 8192  # those that storage services sign have 3,000 characters
LONGEST_NAME = 255
REDIRECTS = 5
# A host may have an address that nobody answers at, as IPv6 where the way there is broken.
CONNECT_SECONDS = 5.0
ADDRESSES_TRIED = 4
ASKED_FOR = (("Accept", "*/*"), ("Accept-Encoding", "identity"))

# Of RFC 4291; outside stand loopback, link-local, site-local, unique local and multicast addresses, and those with an
# IPv4 address within: mapped, compatible, NAT64.
PUBLIC_IPV6 = IPv6Network("2000::/3")
# IANA's special-purpose registries, whether "globally reachable" or not: nobody keeps documents in any of them.
SPECIAL = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT, and Alibaba's metadata
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's metadata, at an address that is otherwise public
        "169.254.0.0/16",  # link-local, and the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "2001::/23",  # Teredo, benchmarks, ORCHID
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


@dataclass(frozen=True)
class AddressRule:
    """Where a client's URL may lead: the public internet, and what an administrator adds to it.

    `networks` as "10.1.0.0/16" (and "64:ff9b::/96" where a machine reaches IPv4 through NAT64). `hosts`: exact names
    that may have any address, for those whose DNS is the administrator's own. Raises ValueError for no network.
    """

    networks: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for network in self.networks:
            ip_network(network)

    def allows(self, host: str, address: str) -> bool:
        if host in {name.lower().removesuffix(".") for name in self.hosts}:
            return True
        found = ip_address(address)
        if any(found in ip_network(network) for network in self.networks):
            return True
        public = isinstance(found, IPv4Address) or found in PUBLIC_IPV6
        return public and not any(found in network for network in SPECIAL)


@dataclass(frozen=True)
class Fetched:
    """`name` and `media_type` are what the server says, "" where it says nothing; only the bytes say what a file is."""

    path: Path
    name: str
    size: int
    sha256: str
    media_type: str
    final_url: str


async def look_up(host: str, port: int) -> list[str]:
    """The addresses that this machine knows for a name. Raises OSError when there is none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


async def fetch(
    url: str,
    folder: Path,
    *,
    max_bytes: int,
    seconds: float,
    allowed: AddressRule,
    resolve: Resolve = look_up,
    tls: ssl.SSLContext | None = None,
) -> Fetched:
    """What stands at `url`, as `folder`/input, in `seconds` from the first look-up to the last byte.

    Nothing is left behind where it fails. Raises DocumentError: 400 for what is no URL, 403 for one that leads where
    it may not, 413 above `max_bytes`, 502 where no file comes back, 504 above `seconds`. None says what is there.
    """
    ask = functools.partial(request, "GET", headers=ASKED_FOR, allowed=allowed, resolve=resolve, tls=tls)
    try:
        async with asyncio.timeout(seconds):
            return await _follow(parse(url), folder, max_bytes, ask)
    except TimeoutError:
        message = f"The URL's file did not come whole within {seconds:g} seconds."
        raise DocumentError(504, message, code="url_timeout") from None


def parse(url: str) -> httpx.URL:
    """The URL as it will be asked for. Raises DocumentError 400, or 403 for a port that is not fetched from.

    A host is a name or an address in its usual form: 127.1, 0x7f.1 and 2130706433 are refused, wherever they lead.
    Ports are 80, 443 and those from 1024, since below stand servers of other protocols, as SSH and SMTP.
    """
    if len(url) > LONGEST_URL:
        raise _invalid(f"The URL has more than {LONGEST_URL} characters.")
    if not url.isprintable() or "\\" in url:
        raise _invalid("The URL has a control character or a backslash in it; percent-encode it.")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise _invalid("That is no URL; write it as https://host/path.") from None
    if parsed.scheme not in ("http", "https"):
        raise _invalid("The URL has to begin with http:// or https://.")
    if parsed.userinfo:
        raise _invalid("The URL has a user name or a password in it; these are not sent.")
    host = parsed.raw_host.decode().removesuffix(".")
    if not _is_host(host):
        raise _invalid("The URL has no valid host; write a name, or an address as 192.0.2.1 or [2001:db8::1].")
    port = parsed.port
    if port is not None and port not in (80, 443) and not 1024 <= port <= 65535:
        raise _refused("The URL's port is not one of 80, 443 and 1024 to 65535.")
    return parsed.copy_with(host=host, fragment=None)


def _is_host(host: str) -> bool:
    if ":" in host:
        return "%" not in host  # an IPv6 address by now; a zone names an interface of this machine
    labels = host.split(".")
    if labels[-1][:1].isdecimal():
        with contextlib.suppress(ValueError):
            return str(IPv4Address(host)) == host
        return False
    return len(host) <= 253 and all(
        0 < len(label) <= 63 and label.isascii() and label.replace("-", "").replace("_", "").isalnum()
        for label in labels
    )


async def check(url: str, *, allowed: AddressRule, resolve: Resolve = look_up) -> None:
    """Whether `url` may be asked now. Raises DocumentError 400, 403 or 502 as `fetch` does, before it connects."""
    parsed = parse(url)
    await checked_addresses(parsed.raw_host.decode(), parsed.port or 443, allowed, resolve)


async def checked_addresses(host: str, port: int, allowed: AddressRule, resolve: Resolve) -> list[str]:
    """All addresses of a host. Raises DocumentError 403 when one of them is not allowed, 502 when there is none."""
    try:
        addresses = [str(ip_address(host))]
    except ValueError:
        try:
            addresses = list(dict.fromkeys(await resolve(host, port)))
        except (OSError, UnicodeError):
            addresses = []
    if not addresses:
        raise _failed("The URL's host was not found.")
    if not all(allowed.allows(host, address) for address in addresses):
        raise _refused("The URL leads to a host that is not fetched from; an administrator can allow it.")
    return addresses


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connections to checked addresses only. httpcore keeps the name, for TLS to verify and for `Host`."""

    def __init__(self, allowed: AddressRule, resolve: Resolve) -> None:
        self._allowed = allowed
        self._resolve = resolve
        self._network = httpcore.AnyIOBackend()
        self._streams: list[httpcore.AsyncNetworkStream] = []

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  (httpcore's own)
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError()
        for address in (await checked_addresses(host, port, self._allowed, self._resolve))[:ADDRESSES_TRIED]:
            try:
                stream = await self._network.connect_tcp(address, port, CONNECT_SECONDS, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                self._streams.append(stream)
                return stream
        raise failure

    async def aclose(self) -> None:
        """httpcore leaves a connection open when it is cancelled in the middle of a TLS handshake."""
        for stream in self._streams:
            await stream.aclose()


@functools.cache
def known_authorities() -> ssl.SSLContext:
    """Those of the operating system, or of the file that the variable SSL_CERT_FILE names."""
    return ssl.create_default_context()


@contextlib.asynccontextmanager
async def request(
    method: str,
    url: httpx.URL,
    *,
    headers: Iterable[tuple[str, str]],
    content: bytes | None = None,
    allowed: AddressRule,
    resolve: Resolve,
    tls: ssl.SSLContext | None,
) -> AsyncIterator[httpcore.Response]:
    """One request over a connection of its own, to an address that was checked; no redirects, cookies or proxies.

    The body of the answer comes as its reader asks for it, undecoded. Whoever calls sets the time limit; httpcore
    limits the headers, to 100 KiB. Raises DocumentError 403 and 502, for what happens within the `with` too.
    """
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    always = [("Host", url.netloc.decode()), ("User-Agent", "vllm-unified"), ("Connection", "close")]
    network = CheckedNetwork(allowed, resolve)
    pool = httpcore.AsyncConnectionPool(tls or known_authorities(), network_backend=network)
    try:
        async with (
            contextlib.aclosing(network),
            pool,
            pool.stream(method, target, headers=[*always, *headers], content=content) as response,
        ):
            yield response
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in error.args):
            raise _failed("The certificate of the URL's host is not trusted, or not for that host.") from None
        raise _failed("The URL's host did not answer, or not in HTTP, or not to the end.") from None


Ask = Callable[..., contextlib.AbstractAsyncContextManager[httpcore.Response]]


async def _follow(url: httpx.URL, folder: Path, max_bytes: int, ask: Ask) -> Fetched:
    for _ in range(REDIRECTS + 1):
        async with ask(url) as response:
            if response.status not in (301, 302, 303, 307, 308):
                return await _keep(response, url, folder, max_bytes)
            url = _next(url, httpx.Headers(response.headers).get("location", ""))
    raise _failed(f"The URL redirects more than {REDIRECTS} times.")


def _next(url: httpx.URL, location: str) -> httpx.URL:
    try:
        target = parse(urljoin(str(url), location))
    except ValueError:
        raise _failed("The URL redirects to what is no URL.") from None
    except DocumentError as error:
        raise DocumentError(error.status, f"The URL redirects to another one. {error}", code=error.code) from None
    if url.scheme == "https" and target.scheme != "https":
        raise _refused("The URL redirects from https to http, which is not followed; ask for where it leads.")
    return target


async def _keep(response: httpcore.Response, url: httpx.URL, folder: Path, max_bytes: int) -> Fetched:
    if response.status != 200:
        raise _failed(f"The URL's host answered with status {response.status}.")
    headers = httpx.Headers(response.headers)
    if headers.get("content-encoding", "").lower() not in ("", "identity"):
        raise _failed("The URL's host answered in a compressed form that it was not asked for.")
    if int(headers.get("content-length", 0)) > max_bytes:
        raise _too_large(max_bytes)
    path = folder / "input"
    size, sha256 = await _write(response, path, max_bytes)
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    return Fetched(path, _name(headers, url), size, sha256, media_type, str(url))


async def _write(response: httpcore.Response, path: Path, max_bytes: int) -> tuple[int, str]:
    """Size and SHA-256 of the body, which stands at `path` when all of it is there."""
    size, digest = 0, hashlib.sha256()
    part = anyio.Path(path.with_suffix(".part"))
    try:
        async with await part.open("wb") as file:
            async for piece in response.aiter_stream():
                size += len(piece)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                digest.update(piece)
                # Not gathered: a body of a million small pieces lets others have the event loop after each.
                await file.write(piece)
        await part.rename(path)
    except BaseException:
        path.with_suffix(".part").unlink(missing_ok=True)
        raise
    return size, digest.hexdigest()


def _name(headers: httpx.Headers, url: httpx.URL) -> str:
    """The last part of the name that the server gives, or else of the URL's path; to be cleaned as an upload's is."""
    disposition = Message()
    # Its parser takes quadratic time. It puts filename*= behind filename=, which is the lesser one.
    disposition["content-disposition"] = headers.get("content-disposition", "")[:1024]
    parameters = disposition.get_params([], "content-disposition")
    given = [collapse_rfc2231_value(value) for key, value in parameters if key.lower() == "filename"]
    name = next(filter(None, reversed(given)), url.path)
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(filter(str.isprintable, last))[:LONGEST_NAME]


def _invalid(message: str) -> DocumentError:
    return DocumentError(400, message, code="url_invalid")


def _refused(message: str) -> DocumentError:
    return DocumentError(403, message, code="url_not_allowed")


def _failed(message: str) -> DocumentError:
    return DocumentError(502, message, code="url_not_fetched")


def _too_large(max_bytes: int) -> DocumentError:
    message = f"The URL's file is larger than {max_bytes} bytes, the most that is taken."
    return DocumentError(413, message, code="file_too_large")
