"""The one shape of an error that the router itself answers. An engine's own error passes through as it is."""

import json
from collections.abc import Mapping

from starlette.responses import Response


class RequestError(Exception):
    """Answered as OpenAI's error object, with `x-error-source: router`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        # ASCII: a client's text may hold half of a surrogate pair, which UTF-8 cannot carry.
        return json.dumps({"error": error}).encode("ascii")

    def response(self) -> Response:
        headers = {**self.headers, "x-error-source": "router"}
        return Response(self.body(), self.status, headers, media_type="application/json")


def not_ready(message: str, retry_after: int) -> RequestError:
    return RequestError(503, message, code="model_not_ready", headers={"retry-after": str(retry_after)})
