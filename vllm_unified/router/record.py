"""What is known of one request to a model, or of one for the document service, when it is over; metrics, usage and
the access log are made of it.
"""

from typing import Literal

import msgspec

Owner = Literal["", "client", "router", "engine", "documents"]


class Record(msgspec.Struct, gc=False):
    """The access log's line, in its order. Durations are whole microseconds, sizes bytes.

    `time`: its end, UTC. `path`: a route's, so there are few; "" for another. `model`: the model's key, ""
    when none was found; `asked`: the name that the client sent. `status`: 0 when the client left before an answer
    began. `error`: whose error it was, "" for none; a stream that broke off has the status 200 and an error.
    `first_byte_us`: from its coming to the first byte of an engine's answer, None when none came.
    """

    time: str
    id: str
    peer: str
    key: str
    path: str
    model: str = ""
    asked: str = ""
    upstream: str = ""
    status: int = 0
    error: Owner = ""
    stream: bool = False
    tries: int = 0
    queued_us: int = 0
    first_byte_us: int | None = None
    duration_us: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    # What every line of a log has: vllm_unified.logs.
    level: str = "info"
    source: str = "router"
