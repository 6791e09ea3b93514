"""Who used what: requests and tokens of each key and model by day (UTC), in SQLite; memory never holds the only copy
for longer than a second."""

import asyncio
import csv
import io
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import quote

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse

from vllm_unified.router.problems import RequestError

if TYPE_CHECKING:
    from vllm_unified.router.keys import Key

FLUSH_SECONDS = 1.0
# How long a write waits for another process that has the database locked.
LOCKED_SECONDS = 5.0
BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
COUNTS = ("requests", "errors", "prompt_tokens", "completion_tokens", "seconds")
FIELDS = ("day", "key", "model", "requests", "errors", "prompt_tokens", "completion_tokens", "total_tokens", "seconds")

SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL,
    key TEXT NOT NULL,
    model TEXT NOT NULL,
    requests INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    seconds REAL NOT NULL,
    PRIMARY KEY (day, key, model)
) WITHOUT ROWID
"""
ADD = f"""
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (day, key, model) DO UPDATE SET {", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTS)}
"""  # noqa: S608
TOKENS_SINCE = "SELECT key, SUM(prompt_tokens + completion_tokens) FROM usage WHERE day >= ? GROUP BY key"
ROWS = f"""
SELECT day, key, model, {", ".join(COUNTS)} FROM usage
WHERE day BETWEEN :since AND :until AND (:key IS NULL OR key = :key) AND (:model IS NULL OR model = :model)
"""  # noqa: S608

Place = tuple[str, str, str]  # day, key, model
Found = TypeVar("Found")

FILE = "data/usage.db"  # in the project's folder

log = logging.getLogger(__name__)


class Usage:
    """Counts in memory, and adds them to the database each second. Every method may be called from any thread.

    What could not be written stays in memory and is tried again with the next flush.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._disk = threading.Lock()  # held for as long as the disk takes
        self._memory = threading.Lock()  # held for microseconds; after _disk where both are
        self._counted: dict[Place, list[float]] = {}
        self._unwritten: dict[Place, list[float]] = {}  # being written, or to be tried again
        self._fails = False
        self._midnight = 0.0
        self._day = ""

    def note(
        self, key: str, model: str, *, error: bool, prompt_tokens: int, completion_tokens: int, seconds: float
    ) -> None:
        """One request that has ended; `seconds`: from its coming to its end."""
        now = time.time()
        with self._memory:
            if now >= self._midnight:
                self._begin_day(now)
            counts = self._counted.get((self._day, key, model))
            if counts is None:
                counts = self._counted[self._day, key, model] = [0, 0, 0, 0, 0.0]
            counts[0] += 1
            counts[1] += error
            counts[2] += prompt_tokens
            counts[3] += completion_tokens
            counts[4] += seconds

    async def run(self) -> None:
        """Flush each second. After its end `close` writes the rest."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """Write what was counted. A failure is logged once, until it works again."""
        with self._disk:
            with self._memory:
                _add(self._unwritten, self._counted)
                self._counted = {}
            if not self._unwritten:
                return
            values = [(*place, *counts) for place, counts in self._unwritten.items()]
            try:
                self._on_disk(lambda connection: _write(connection, values))
            except (sqlite3.Error, OSError) as error:
                if not self._fails:
                    log.error("%s: %s; usage is kept in memory and tried again each second", self._path, error)
                self._fails = True
                return
            if self._fails:
                log.warning("%s: written again", self._path)
            self._fails = False
            with self._memory:
                self._unwritten = {}

    def close(self) -> None:
        """Write the rest."""
        self.flush()
        with self._disk:
            self._disconnect()

    def tokens_since(self, day: date) -> dict[str, int]:
        """Tokens of each key from that day (UTC) on; what is in memory alone when the database can't be read."""
        with self._disk:
            try:
                tokens = self._on_disk(lambda connection: _tokens_since(connection, day))
            except (sqlite3.Error, OSError) as error:
                log.error("%s: %s; limits of days and months count from now", self._path, error)
                tokens = {}
            for (of, key, _), counts in self._in_memory().items():
                if of >= day.isoformat():
                    tokens[key] = tokens.get(key, 0) + int(counts[2] + counts[3])
        return tokens

    def rows(self, since: date, until: date, key: str | None = None, model: str | None = None) -> list[dict[str, Any]]:
        """The days from `since` to `until`, both included, with what is not written yet; in the order of FIELDS.

        Raises sqlite3.Error or OSError when the database can't be read.
        """
        first, last = since.isoformat(), until.isoformat()
        wanted = {"since": first, "until": last, "key": key, "model": model}
        with self._disk:
            found = self._on_disk(lambda connection: connection.execute(ROWS, wanted).fetchall())
            unwritten = self._in_memory()
        counted: dict[Place, list[float]] = {(row[0], row[1], row[2]): list(row[3:]) for row in found}
        of_these = {
            place: counts
            for place, counts in unwritten.items()
            if first <= place[0] <= last and key in (None, place[1]) and model in (None, place[2])
        }
        _add(counted, of_these)
        return [_row(place, counted[place]) for place in sorted(counted)]

    def _in_memory(self) -> dict[Place, list[float]]:
        with self._memory:
            found: dict[Place, list[float]] = {}
            _add(found, self._unwritten)
            _add(found, self._counted)
        return found

    def _begin_day(self, now: float) -> None:
        day = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        self._day = day.date().isoformat()
        self._midnight = (day + timedelta(days=1)).timestamp()

    def _on_disk(self, work: Callable[[sqlite3.Connection], Found]) -> Found:
        """Work with the database; with a new one when the file turns out to be broken."""
        try:
            return work(self._connect())
        except sqlite3.Error as error:
            self._disconnect()  # the next one may find the disk in a better state
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in BROKEN:
                raise
            self._move_aside(error)
            return work(self._connect())

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self._path, timeout=LOCKED_SECONDS, check_same_thread=False)
            # NORMAL: a kill loses nothing that was committed; a power cut may lose the last seconds, never the file
            self._connection.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; {SCHEMA}")
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _move_aside(self, error: sqlite3.Error) -> None:
        aside = f"{self._path.name}.broken-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        log.error("%s: %s; moved to %s, a new one begins", self._path, error, aside)
        for suffix in ("", "-wal", "-shm"):  # the new file must not meet the old one's log
            part = self._path.with_name(f"{self._path.name}{suffix}")
            if part.exists():
                part.rename(self._path.with_name(f"{aside}{suffix}"))


def today() -> date:
    """Of UTC, as everywhere here."""
    return datetime.fromtimestamp(time.time(), UTC).date()


def recorded_tokens(path: Path, day: date) -> dict[str, int]:
    """The same as `Usage.tokens_since`, for a process beside the router: as of its last flush, and nothing is written.

    Raises sqlite3.Error when the database can't be read.
    """
    if not path.exists():
        return {}
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=LOCKED_SECONDS)
    try:
        is_made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'usage'").fetchone()
        return _tokens_since(connection, day) if is_made else {}
    finally:
        connection.close()


def _tokens_since(connection: sqlite3.Connection, day: date) -> dict[str, int]:
    return dict(connection.execute(TOKENS_SINCE, (day.isoformat(),)).fetchall())


def _write(connection: sqlite3.Connection, values: Sequence[tuple[object, ...]]) -> None:
    with connection:
        connection.executemany(ADD, values)


def _add(into: dict[Place, list[float]], more: Mapping[Place, list[float]]) -> None:
    for place, counts in more.items():
        before = into.get(place)
        into[place] = list(counts) if before is None else [a + b for a, b in zip(before, counts, strict=True)]


def _row(place: Place, counts: Sequence[float]) -> dict[str, Any]:
    row = dict(zip(("day", "key", "model"), place, strict=True)) | dict(zip(COUNTS, counts, strict=True))
    row |= {"total_tokens": counts[2] + counts[3], "seconds": round(counts[4], 3)}
    return {field: row[field] for field in FIELDS}


def usage_document(rows: Sequence[Mapping[str, Any]], since: date, until: date) -> dict[str, Any]:
    numbers = FIELDS[3:]
    total = {field: sum(row[field] for row in rows) for field in numbers}
    total["seconds"] = round(total["seconds"], 3)
    return {"from": since.isoformat(), "to": until.isoformat(), "data": list(rows), "total": total}


def usage_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line a row, under a line with the names of FIELDS."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def add_usage(app: FastAPI, usage: Usage) -> None:
    """GET /usage. The calling Key stands in `request.state.key`; a RequestError is the application's to answer."""

    @app.get("/usage", responses={200: {"content": {"text/csv": {}}}})
    def usage_of_keys(
        request: Request,
        from_: Annotated[str | None, Query(alias="from")] = None,
        to: str | None = None,
        key: str | None = None,
        model: str | None = None,
        format: str | None = None,
    ) -> Response:
        since = _date("from", from_, today().replace(day=1))
        until = _date("to", to, today())
        if since > until:
            raise _bad("from", f"{since} is after {until}; swap from and to")
        is_csv = _is_csv(format, request.headers.get("accept", ""))
        rows = _read(usage, since, until, _visible(request.state.key, key), model)
        if is_csv:
            return Response(usage_csv(rows), media_type="text/csv")
        return JSONResponse(usage_document(rows, since, until))


def _date(name: str, given: str | None, default: date) -> date:
    try:
        return default if given is None else date.fromisoformat(given)
    except ValueError:
        raise _bad(name, f'"{given}" is no date; write it as 2026-12-31') from None


def _is_csv(given: str | None, accept: str) -> bool:
    if given is None:
        return "text/csv" in accept
    if given not in ("json", "csv"):
        raise _bad("format", f'"{given}": choose json or csv')
    return given == "csv"


def _visible(caller: "Key", wanted: str | None) -> str | None:
    """The key whose rows are shown; None: all."""
    if caller.admin:
        return wanted
    if wanted not in (None, caller.name):
        message = f'the key "{caller.name}" sees its own usage only; leave `key` out, or ask with an admin key'
        raise RequestError(403, message, code="permission_denied", param="key")
    return caller.name


def _read(usage: Usage, since: date, until: date, key: str | None, model: str | None) -> list[dict[str, Any]]:
    try:
        return usage.rows(since, until, key, model)
    except (sqlite3.Error, OSError) as error:
        log.error("usage can't be read: %s", error)
        raise RequestError(503, f"usage can't be read: {error}", code="usage_unreadable") from None


def _bad(name: str, message: str) -> RequestError:
    return RequestError(400, f"{name}: {message}", code="invalid_value", param=name)
