"""GET from this machine's own servers."""

import http.client
import urllib.error
import urllib.request

# The environment's http_proxy is for the world outside; asked for 127.0.0.1 it answers for itself.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, timeout: float) -> tuple[int, str]:
    """Status and body, whatever the status is. Raises OSError when there is no answer."""
    try:
        with _opener.open(url, timeout=timeout) as answer:
            return int(answer.status), answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode("utf-8", "replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: {error or type(error).__name__}") from None
