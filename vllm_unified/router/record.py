"""What is known of one request to a model when it is over; metrics, usage and the access log are made of it."""

from typing import Literal

Owner = Literal["", "client", "router", "engine"]


class Record:
    """Times are time.monotonic() seconds; sizes are bytes.

    `status`: 0 when the client left before an answer began. `error`: whose error it was, "" for none; a stream
    that broke off has the status 200 and an error. `model` and `upstream`: "" when none was found.
    """

    __slots__ = (
        "asked",
        "bytes_in",
        "bytes_out",
        "completion_tokens",
        "ended",
        "error",
        "first_byte",
        "key",
        "model",
        "path",
        "peer",
        "prompt_tokens",
        "queued",
        "request_id",
        "started",
        "status",
        "stream",
        "tries",
        "upstream",
    )

    def __init__(self, request_id: str, path: str, key: str, peer: str, started: float, bytes_in: int) -> None:
        self.request_id = request_id
        self.path = path  # a route's, so there are few
        self.key = key  # the key's name
        self.peer = peer  # the client's address
        self.model = ""  # the model's key
        self.asked = ""  # the name that the client sent
        self.upstream = ""
        self.status = 0
        self.error: Owner = ""
        self.stream = False
        self.tries = 0
        self.started = started
        self.queued = 0.0  # seconds
        self.first_byte: float | None = None
        self.ended = 0.0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.bytes_in = bytes_in
        self.bytes_out = 0
