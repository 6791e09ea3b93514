"""What a client of the document service can be told that went wrong."""

import contextlib
import errno
from collections.abc import Iterator, Mapping

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FULL_DISK = "the disk is full that documents are kept on, or its quota is used up"


class DocumentError(Exception):
    """Answered with `status` in OpenAI's shape of an error. The message says what was wrong, where, and what to do.

    A job that meets one after it was accepted fails with its message; a page that does is listed with it.
    """

    def __init__(self, status: int, message: str, *, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


def full_disk(then: str) -> DocumentError:
    """`then`: what to do when there is space again."""
    message = f"{FULL_DISK}; free some space in data/documents, or lower documents.keep_gib, and then {then}"
    return DocumentError(507, message, code="no_space")


@contextlib.contextmanager
def on_disk(then: str = "send it again") -> Iterator[None]:
    """Around what writes files; as a decorator, too. Raises DocumentError 507 where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise full_disk(then) from error
        raise
