"""Questions to the running supervisord, over its socket in run/."""

import contextlib
import http.client
import xmlrpc.client
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport


def programs(run: Path) -> dict[str, dict[str, Any]] | None:
    """Name → supervisord's own process info (`statename`, `pid`, `start` …); None when it is not running."""
    socket = run / "supervisor.sock"
    if not socket.exists():
        return None
    with contextlib.closing(SupervisorTransport(None, None, f"unix://{socket}")) as transport:
        # The URL is a formality: the transport speaks to the socket.
        proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport)
        try:
            answer: Any = proxy.supervisor.getAllProcessInfo()
        except (OSError, xmlrpc.client.Error, http.client.HTTPException):
            return None
    return {info["name"]: info for info in answer}
