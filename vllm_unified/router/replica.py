"""One server that a model's requests may go to: its address, its connections, what is known of its health."""

import asyncio
import math
import random
import ssl
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vllm_unified.router.outbox import Outbox
from vllm_unified.settings.schema import Endpoint
from vllm_unified.state import EngineState

if TYPE_CHECKING:
    from vllm_unified.router.upstream import UpstreamConnection

CONNECT_SECONDS = 5.0
# vLLM closes an idle connection after 5 s; ours goes first, so that none is written to as it closes.
IDLE_SECONDS = 4.0
FAILURES_THAT_OPEN = 5
SHORTEST_OPEN_SECONDS = 1.0
LONGEST_OPEN_SECONDS = 30.0
TRIAL_SECONDS = 5.0
# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of OpenSSL
FOR_ANOTHER_HOST = (62, 64)


class Breaker:
    """Keeps requests away from a server that fails one after the other.

    Closed, all pass. After five failures in a row it is open, and none passes, for 1 s, then twice as long each
    time up to 30 s. Then one request is let through (half open): its success closes the breaker again. A generation
    may take minutes until it says anything, so the next one is let through after 5 s.
    """

    def __init__(self) -> None:
        self.failures = 0
        self.open_until = 0.0
        self.open_seconds = 0.0
        self.trial_until = 0.0

    def state(self, now: float) -> str:
        """`closed`, `open` or `half_open`."""
        if self.failures < FAILURES_THAT_OPEN:
            return "closed"
        return "open" if now < self.open_until else "half_open"

    def passes(self, now: float) -> bool:
        return self.failures < FAILURES_THAT_OPEN or now >= max(self.open_until, self.trial_until)

    def begin(self, now: float) -> None:
        """A request is on its way."""
        if self.failures >= FAILURES_THAT_OPEN:
            self.trial_until = now + TRIAL_SECONDS

    def succeed(self) -> None:
        if self.failures:
            self.failures = 0
            self.open_seconds = self.open_until = self.trial_until = 0.0

    def fail(self, now: float) -> None:
        self.failures += 1
        if self.failures < FAILURES_THAT_OPEN or now < self.open_until:  # open already, as it was on its way
            return
        self.trial_until = 0.0
        self.open_seconds = min(LONGEST_OPEN_SECONDS, max(SHORTEST_OPEN_SECONDS, self.open_seconds * 2))
        # Not all routers of a site come back to it in the same moment.
        self.open_until = now + self.open_seconds * random.uniform(0.8, 1.2)  # noqa: S311

    def forget(self) -> None:
        """Nothing is known of the request that was let through: its client left."""
        self.trial_until = 0.0


class Replica:
    """`error`: why it is not ready, in words for everyone; None when it is. `reason`: what its log says, for those
    with a key. `closed`: its keeper says that nothing may be sent to it. `ready_at`: when it is likely to be ready
    (time.monotonic() seconds), by its last start; None where nobody knows. `engine`: what is known of its engine, None
    where no keeper has had it yet.
    """

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        model: str,
        *,
        local: bool,
        ca: Path | None = None,
        outbox: Outbox | None = None,
    ) -> None:
        """`name`: the model's key for its own engine, else host:port. `model`: the name that the server knows."""
        self.name = name
        self.endpoint = endpoint
        self.model = model
        self.local = local
        self.closed: str | None = None
        self.error: str | None = "not looked at yet"
        self.reason: str | None = None
        self.ready_at: float | None = None
        self.engine: EngineState | None = None
        self.retired = False  # no longer in the settings: its connections are not kept
        self.in_flight = 0
        self.breaker = Breaker()
        self.context_length: int | None = None  # tokens, as the server itself says
        self.outbox = outbox or Outbox()
        self.idle: list[UpstreamConnection] = []
        parts = urlsplit(endpoint.url)
        self.host = parts.hostname or ""
        self.tls = ssl.create_default_context(cafile=ca) if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.tls else 80)
        key = f"authorization: Bearer {endpoint.api_key}\r\n" if endpoint.api_key else ""
        self.path = parts.path.encode("ascii")
        self.fixed_headers = f"host: {parts.netloc}\r\n{key}".encode("ascii")

    @property
    def problem(self) -> str | None:
        return self.closed or self.error

    @property
    def ready(self) -> bool:
        return self.problem is None

    def takes(self, now: float) -> bool:
        """Whether a request may be sent to it."""
        return self.closed is None and self.breaker.passes(now)

    def opens_at(self, now: float) -> float | None:
        """When requests are likely to be let through again; None where nobody knows."""
        if self.closed is None and not self.breaker.passes(now):
            return max(self.breaker.open_until, self.breaker.trial_until)
        return self.ready_at

    def take(self, now: float) -> "UpstreamConnection | None":
        """A connection that is open and idle, the one used last."""
        idle = self.idle
        while idle:
            connection = idle.pop()
            if now - connection.idle_since < IDLE_SECONDS and connection.is_open:
                return connection
            connection.close()
        return None

    async def connect(self) -> "UpstreamConnection":
        """Raises OSError (TimeoutError and ssl.SSLError are such)."""
        from vllm_unified.router.upstream import UpstreamConnection

        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: UpstreamConnection(self), self.host, self.port, ssl=self.tls
                )
        except UnicodeError:  # as of "gpu..2", which no name server is asked for
            raise OSError(f'"{self.host}" is no name of a host') from None
        if not connection.is_open:  # already not any more
            raise ConnectionResetError("it closed the connection")
        return connection

    def tls_problem(self, error: OSError) -> str | None:
        """In words for everyone; None where `error` is of something else."""
        if isinstance(error, ssl.SSLCertVerificationError):
            if error.verify_code in FOR_ANOTHER_HOST:
                return f"its certificate is not for {self.host}; use a name that it is for in `url`"
            return f"its certificate is not trusted: {error.verify_message}; name its authority in `ca`"
        if isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return "it does not speak TLS; use http in `url`"
        return None

    def retire(self) -> None:
        self.retired = True
        self.close_idle()

    def close_idle(self, before: float = math.inf) -> None:
        """Close the connections that are idle since `before`."""
        for connection in [each for each in self.idle if each.idle_since < before]:
            self.idle.remove(connection)
            connection.close()
