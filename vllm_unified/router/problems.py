"""The shapes of an error that the router itself answers. An engine's own error passes through as it is."""

import json
from collections.abc import Mapping
from typing import Literal

from starlette.responses import Response

Shape = Literal["openai", "anthropic", "responses"]
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class RequestError(Exception):
    """Answered as OpenAI's error object, or Anthropic's, with `x-error-source: router`."""

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
        self.shape: Shape = "openai"

    @property
    def owner(self) -> Literal["client", "router", "engine"]:
        if self.code == "engine_error":
            return "engine"
        return "client" if self.status < 500 and self.code != "queue_full" else "router"

    def body(self) -> bytes:
        return _json({"type": "error", "error": self._anthropic} if self.shape == "anthropic" else self._openai)

    def event(self) -> bytes:
        """As the last event of a stream that broke off."""
        if self.shape == "anthropic":
            return b"event: error\ndata: %b\n\n" % self.body()
        if self.shape == "responses":
            error = {"type": "error", "code": self.code, "message": str(self), "param": self.param}
            return b"event: error\ndata: %b\n\n" % _json(error)
        return b"data: %b\n\n" % self.body()

    @property
    def _openai(self) -> dict[str, object]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def _anthropic(self) -> dict[str, str]:
        fallback = "api_error" if self.status >= 500 else "invalid_request_error"
        return {"type": ANTHROPIC_TYPES.get(self.status, fallback), "message": str(self)}

    def wire_headers(self) -> list[tuple[bytes, bytes]]:
        given = {**self.headers, "x-error-source": "router", "content-type": "application/json"}
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]

    def response(self) -> Response:
        headers = {**self.headers, "x-error-source": "router"}
        return Response(self.body(), self.status, headers, media_type="application/json")


def _json(document: object) -> bytes:
    # ASCII: a client's text may hold half of a surrogate pair, which UTF-8 cannot carry.
    return json.dumps(document).encode("ascii")


def failure() -> RequestError:
    return RequestError(500, "the router failed; its log says why", code="internal_error")


def too_large(limit: int) -> RequestError:
    """`limit`: bytes."""
    message = f"the body is larger than {limit >> 20} MiB (router.max_body_mib)"
    return RequestError(413, message, code="request_too_large")


def upload_too_large(limit: int) -> RequestError:
    """`limit`: bytes."""
    message = f"the upload is larger than {limit >> 20} MiB (documents.max_upload_mib)"
    return RequestError(413, message, code="request_too_large")


def not_ready(message: str, retry_after: int) -> RequestError:
    return RequestError(503, message, code="model_not_ready", headers={"retry-after": str(retry_after)})
