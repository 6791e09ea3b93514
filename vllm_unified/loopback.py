"""Requests to this machine's own servers; a proxy that the environment names is for the world outside."""

import http.client
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit


def get(url: str, timeout: float) -> tuple[int, str]:
    """Status and body, whatever the status is. Raises OSError when there is no answer."""
    return _request("GET", url, timeout)


def post(
    url: str, document: Any, api_key: str, timeout: float, more: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """The same for a JSON document. `more`: headers."""
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json", **(more or {})}
    return _request("POST", url, timeout, json.dumps(document).encode(), headers)


def _request(
    method: str, url: str, timeout: float, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
    try:
        connection.request(method, parts.path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: {error or type(error).__name__}") from None
    finally:
        connection.close()
