"""A line of a log, as it is written: one object of JSON.

`time` (ISO 8601, UTC, milliseconds), `level` (debug, info, warning, error, critical), `source` (router, documents,
keeper, engine), `model` (its key, where it is of one), `message`, and `exception`, a whole traceback. The access log's
lines are those of `router.record.Record`.

Keepers write them too and live for months, so nothing is imported here that takes memory.
"""

import json
import logging
import os
import sys
import threading
import time
from datetime import UTC, datetime
from io import TextIOWrapper
from typing import NoReturn

ENCODER = json.JSONEncoder(ensure_ascii=False)


def line(
    level: str,
    source: str,
    message: str,
    *,
    model: str | None = None,
    exception: str | None = None,
    at: float | None = None,
) -> str:
    """Without its end. What is None is left out. `at`: seconds since 1970, default now."""
    moment = datetime.fromtimestamp(time.time() if at is None else at, UTC)
    fields = {
        "time": f"{moment.replace(tzinfo=None).isoformat(timespec='milliseconds')}Z",
        "level": level,
        "source": source,
        "model": model,
        "message": message,
        "exception": exception,
    }
    return ENCODER.encode({name: value for name, value in fields.items() if value is not None})


class JsonFormatter(logging.Formatter):
    """For the handlers of a whole process."""

    def __init__(self, source: str, model: str | None = None) -> None:
        super().__init__()
        self._source = source
        self._model = model

    def format(self, record: logging.LogRecord) -> str:
        exception = self.formatException(record.exc_info) if record.exc_info else None
        return line(
            record.levelname.lower(),
            self._source,
            record.getMessage(),
            model=self._model,
            exception=exception,
            at=record.created,
        )


def write_json(source: str, model: str | None = None) -> None:
    """From now on what this process says on standard error is lines of JSON: loggers, warnings, what nobody caught."""
    # Half of a surrogate pair, which UTF-8 cannot carry, is written as \udc80, which is JSON too.
    if isinstance(sys.stderr, TextIOWrapper):
        sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(source, model))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    log = logging.getLogger(__name__)
    sys.excepthook = lambda *uncaught: log.critical("ended by what nobody caught", exc_info=uncaught)
    threading.excepthook = lambda args: log.error(
        "the thread %s was ended by what nobody caught",
        args.thread.name if args.thread else "",
        exc_info=(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback),
    )


def under_supervisord() -> bool:
    return bool(os.environ.get("SUPERVISOR_ENABLED"))


def end(reason: str) -> NoReturn:
    """Exit with 1, and say why: as a line of the log, and to a person who started it by hand as text."""
    if not under_supervisord():
        sys.exit(reason)
    logging.getLogger(__name__).critical("%s", reason)
    sys.exit(1)
