"""Questions to the running supervisord, over its socket in run/."""

import contextlib
import http.client
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport


@contextlib.contextmanager
def connected(run: Path) -> Iterator[Any]:
    """supervisord's own functions, which raise xmlrpc.client.Fault where it refuses; OSError when it is not there."""
    with contextlib.closing(SupervisorTransport(None, None, f"unix://{run / 'supervisor.sock'}")) as transport:
        # The URL is a formality: the transport speaks to the socket.
        proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport)
        try:
            yield proxy.supervisor
        except (xmlrpc.client.ProtocolError, http.client.HTTPException) as error:
            raise ConnectionError(f"{run / 'supervisor.sock'}: {error}") from None


def programs(run: Path) -> dict[str, dict[str, Any]] | None:
    """Name → supervisord's own process info (`statename`, `pid`, `start` …); None when it is not running."""
    try:
        with connected(run) as supervisor:
            answer = supervisor.getAllProcessInfo()
    except (OSError, xmlrpc.client.Error):
        return None
    return {info["name"]: info for info in answer}
