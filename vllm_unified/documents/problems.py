"""What a client of the document service can be told that went wrong."""

from collections.abc import Mapping


class DocumentError(Exception):
    """Answered with `status` in OpenAI's shape of an error. The message says what was wrong, where, and what to do.

    A job that meets one after it was accepted fails with its message; a page that does is listed with it.
    """

    def __init__(self, status: int, message: str, *, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
