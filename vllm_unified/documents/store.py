"""Documents and their pages in SQLite: what was accepted is not lost, and a page that was read stays read."""

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    ScalarSelect,
    Select,
    StaticPool,
    Table,
    Text,
    and_,
    create_engine,
    delete,
    event,
    exc,
    func,
    insert,
    select,
    update,
)

from vllm_unified.documents.joining import Joint
from vllm_unified.documents.options import Options
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import DocumentError
from vllm_unified.errors import UserError

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Outcome = Literal["succeeded", "failed"]
STATES: tuple[State, ...] = get_args(State)
UNFINISHED: tuple[State, ...] = ("queued", "running")
FINISHED: tuple[State, ...] = ("succeeded", "failed", "cancelled")

VERSION = 2  # of the tables, in PRAGMA user_version
LOCKED_MS = 5000  # how long a statement waits for another process that has the database locked
BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# What was under way as often as this when the service was killed is held to be what killed it.
MOST_STARTS = 5
KILLER_PAGE = f"the service ended {MOST_STARTS} times while it read this page; it is not tried again by itself"
KILLER = f"the service ended {MOST_STARTS} times while it worked on this document; it is not tried again by itself"

METADATA = MetaData()
DOCUMENTS = Table(
    "documents",
    METADATA,
    Column("arrival", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("options", Text, nullable=False),
    Column("size", Integer, nullable=False),
    Column("state", Text, nullable=False, index=True),
    Column("queued_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float, index=True),
    Column("updated_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),  # at what is under way: inspection or products
    Column("pages", Integer),
    Column("error", Text, nullable=False, server_default=""),
    Column("idempotency_key", Text, nullable=False),
    Column("request_sha256", Text, nullable=False),
    Column("webhook_url", Text, nullable=False),
    Column("webhook_secret", Text, nullable=False),
    Column("webhook_attempts", Integer, nullable=False, server_default="0"),
    Column("webhook_at", Float, index=True),
    Column("traceparent", Text, nullable=False, server_default=""),  # of the request that queued it
)
Index(
    "documents_by_idempotency_key",
    DOCUMENTS.c.key,
    DOCUMENTS.c.idempotency_key,
    unique=True,
    sqlite_where=DOCUMENTS.c.idempotency_key != "",
)
PAGES = Table(
    "pages",
    METADATA,
    Column("document", Text, ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False),  # queued, running, done, failed, cancelled
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("result", LargeBinary),
    Column("reason", Text, nullable=False, server_default=""),
)
Index("pages_by_state", PAGES.c.document, PAGES.c.state, PAGES.c.number)
JOINTS = Table(
    "joints",
    METADATA,
    Column("document", Text, ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True),
    Column("page", Integer, primary_key=True, autoincrement=False),  # the first of the two
    Column("result", LargeBinary),  # NULL: there is no answer
)

log = logging.getLogger(__name__)


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """A document as it came. `id`: a UUID. `key`: the name of the API key that sent it. `size` in bytes.

    `request_sha256` is of everything that the client asked for; it is compared where `idempotency_key` is not "".
    `traceparent`: of the request that brought it, "" when nothing is traced.
    """

    id: str
    name: str
    kind: str
    key: str
    options: Options
    size: int
    idempotency_key: str = ""
    request_sha256: str = ""
    webhook_url: str = ""
    webhook_secret: str = ""
    traceparent: str = ""


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """As stored. Times are unix seconds. `pages`: how many are to be read, None until it was inspected; `done` of
    them were read, `failed` were given up. `size`: bytes of the upload, and of the products when it has finished.
    """

    id: str
    name: str
    kind: str
    key: str
    options: Options
    size: int
    state: State
    queued_at: float
    started_at: float | None
    finished_at: float | None
    updated_at: float
    pages: int | None
    done: int
    failed: int
    error: str
    webhook_url: str
    traceparent: str = ""

    @property
    def is_finished(self) -> bool:
        return self.state in FINISHED


class Webhook(msgspec.Struct, frozen=True):
    """What is to be told, and to whom. `attempts`: how often it was tried in vain."""

    document: Document
    url: str
    secret: str
    attempts: int


class StoreError(DocumentError):
    """The database can't be read or written now: 503, or 507 on a full disk."""


class Store:
    """Every method may be called from any thread, takes milliseconds, and raises StoreError when the disk fails.

    A damaged file is set aside and a new one begun. Raises UserError for a file of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._engine = _open(path)

    def close(self) -> None:
        with self._lock:
            self._engine.dispose()

    def accept(self, upload: Upload, now: float) -> Document:
        """Store it as queued; on the disk, whatever happens to the machine, when this returns.

        The document that was sent before with the same idempotency key is returned in its place: its `id` differs.
        Raises DocumentError 409 when that one was another request.
        """
        with self._transaction(durable=True) as connection:
            earlier = _sent_before(connection, upload)
            if earlier is not None:
                return earlier
            values = msgspec.structs.asdict(upload) | {"options": _encoded(upload.options)}
            connection.execute(insert(DOCUMENTS).values(**values, state="queued", queued_at=now, updated_at=now))
            return _existing(connection, upload.id)

    def sent_before(self, upload: Upload) -> Document | None:
        """As `accept`, but nothing is stored."""
        with self._transaction() as connection:
            return _sent_before(connection, upload)

    def attempt(self, document: str) -> None:
        """Its inspection, or the making of its products, begins."""
        with self._transaction() as connection:
            begun = update(DOCUMENTS).where(_of(document))
            connection.execute(begun.values(attempts=DOCUMENTS.c.attempts + 1))

    def attempt_ended(self, document: str) -> None:
        """However it ended: the service has survived it."""
        with self._transaction() as connection:
            connection.execute(update(DOCUMENTS).where(_of(document)).values(attempts=0))

    def inspected(self, document: str, numbers: "range | list[int]", now: float) -> bool:
        """Its pages are known: a row each, queued. False when nothing is to be done: it was cancelled or deleted."""
        with self._transaction() as connection:
            is_waiting = _of(document) & DOCUMENTS.c.state.in_(UNFINISHED) & DOCUMENTS.c.pages.is_(None)
            changed = update(DOCUMENTS).where(is_waiting).values(pages=len(numbers), attempts=0, updated_at=now)
            if not connection.execute(changed).rowcount:
                return False
            rows = [{"document": document, "number": number, "state": "queued"} for number in numbers]
            connection.execute(insert(PAGES), rows)
            return True

    def start_pages(self, wanted: Mapping[str, int], now: float) -> list[tuple[str, int]]:
        """The next queued pages of each document, at most as many as wanted, are running from now on."""
        started = []
        with self._transaction() as connection:
            for document, count in wanted.items():
                numbers = connection.scalars(
                    update(PAGES)
                    .where(PAGES.c.document == document, PAGES.c.number.in_(_next_pages(document, count)))
                    .values(state="running", attempts=PAGES.c.attempts + 1)
                    .returning(PAGES.c.number)
                )
                started += [(document, number) for number in sorted(numbers)]
                connection.execute(
                    update(DOCUMENTS)
                    .where(_of(document), DOCUMENTS.c.state == "queued")
                    .values(state="running", started_at=func.coalesce(DOCUMENTS.c.started_at, now), updated_at=now)
                )
        return started

    def page_done(self, document: str, number: int, page: Page, now: float) -> bool:
        """Keep what came of a running page: failed where it has a reason. False when it was cancelled or deleted."""
        values = {
            "state": "failed" if page.reason else "done",
            "result": msgspec.msgpack.encode(page),
            "reason": page.reason,
        }
        with self._transaction() as connection:
            running = (PAGES.c.document == document, PAGES.c.number == number, PAGES.c.state == "running")
            if not connection.execute(update(PAGES).where(*running).values(**values)).rowcount:
                return False
            connection.execute(update(DOCUMENTS).where(_of(document)).values(updated_at=now))
            return True

    def seams(self, document: str) -> list[int]:
        """The pages that were read, as was the one after, of which `keep_joints` has kept nothing yet."""
        following = PAGES.alias()
        is_next = and_(following.c.document == PAGES.c.document, following.c.number == PAGES.c.number + 1)
        were_read = (PAGES.c.document == document, PAGES.c.state == "done", following.c.state == "done")
        known = select(JOINTS.c.page).where(JOINTS.c.document == document)
        wanted = select(PAGES.c.number).join(following, is_next).where(*were_read, PAGES.c.number.not_in(known))
        with self._transaction() as connection:
            return list(connection.scalars(wanted.order_by(PAGES.c.number)))

    def keep_joints(self, document: str, page: int, joints: Sequence[Joint] | None, now: float) -> bool:
        """Those of this page and the next; None: there is no answer. False when it was cancelled or deleted."""
        result = None if joints is None else msgspec.msgpack.encode(joints)
        is_unfinished = (_of(document), DOCUMENTS.c.state.in_(UNFINISHED))
        with self._transaction() as connection:
            # The service has survived it, whatever attempts there were.
            changed = update(DOCUMENTS).where(*is_unfinished).values(updated_at=now, attempts=0)
            if not connection.execute(changed).rowcount:
                return False
            kept = insert(JOINTS).prefix_with("OR REPLACE")
            connection.execute(kept.values(document=document, page=page, result=result))
            return True

    def joints(self, document: str, page: int) -> list[Joint] | None:
        """Of this page and the next; None where there is no answer."""
        wanted = select(JOINTS.c.result).where(JOINTS.c.document == document, JOINTS.c.page == page)
        with self._transaction() as connection:
            result = connection.scalar(wanted)
        return None if result is None else msgspec.msgpack.decode(result, type=list[Joint])

    def give_back(self, document: str, number: int) -> bool:
        """A page that was started is queued again, as if it had not been; False when it is not running."""
        with self._transaction() as connection:
            running = (PAGES.c.document == document, PAGES.c.number == number, PAGES.c.state == "running")
            return bool(connection.execute(_given_back().where(*running)).rowcount)

    def give_all_back(self) -> None:
        """At a graceful stop."""
        with self._transaction() as connection:
            connection.execute(_given_back().where(PAGES.c.document.in_(_unfinished_ids())))
            connection.execute(update(DOCUMENTS).where(DOCUMENTS.c.attempts > 0).values(attempts=0))

    def finish(self, document: str, outcome: Outcome, now: float, *, size: int = 0, error: str = "") -> bool:
        """It has its products, `size` bytes with the upload, or else an error. False when it was not unfinished."""
        values: dict[str, object] = {"error": error} | ({"size": size} if size else {})
        return self._end(document, outcome, now, values)

    def cancel(self, document: str, now: float) -> bool:
        """No more of its pages are read; those that were read stay. False when it was not unfinished."""
        return self._end(document, "cancelled", now, {})

    def retry_failed(self, document: str, password: str, now: float, traceparent: str = "") -> Document:
        """Queue it again with those of its pages that were not read; the others are not read again.

        `password`: of the file, where it needs one: it was forgotten when the document had finished.
        Raises DocumentError 404, and 409 when the document has not finished or has no failed pages.
        """
        with self._transaction(durable=True) as connection:
            before = _existing(connection, document)
            _check_can_retry(before)
            unread = (PAGES.c.document == document, PAGES.c.state.in_(("failed", "cancelled")))
            again = {"state": "queued", "attempts": 0, "result": None, "reason": ""}
            connection.execute(update(PAGES).where(*unread).values(**again))
            connection.execute(delete(JOINTS).where(JOINTS.c.document == document, JOINTS.c.result.is_(None)))
            options = msgspec.structs.replace(before.options, password=password)
            connection.execute(
                update(DOCUMENTS)
                .where(_of(document))
                .values(state="queued", queued_at=now, started_at=None, finished_at=None, updated_at=now)
                .values(options=_encoded(options), error="", webhook_attempts=0, webhook_at=None)
                .values(traceparent=traceparent)
            )
            return _existing(connection, document)

    def delete(self, document: str) -> bool:
        """With its pages, of which nothing is left on the disk; False when there is none.

        Its files are the caller's to delete, afterwards.
        """
        with self._transaction() as connection:
            was_there = bool(connection.execute(delete(DOCUMENTS).where(_of(document))).rowcount)
        self._empty_log()
        return was_there

    def get(self, document: str) -> Document:
        """Raises DocumentError 404."""
        with self._transaction() as connection:
            return _existing(connection, document)

    def documents(
        self, key: str | None = None, state: State | None = None, after: str = "", most: int = 50
    ) -> list[Document]:
        """The newest first, those of one key or of all; `after`: the id that the last list ended with."""
        wanted = _all_documents().order_by(DOCUMENTS.c.arrival.desc()).limit(most)
        if key is not None:
            wanted = wanted.where(DOCUMENTS.c.key == key)
        if state is not None:
            wanted = wanted.where(DOCUMENTS.c.state == state)
        if after:
            arrival = select(DOCUMENTS.c.arrival).where(_of(after)).scalar_subquery()
            wanted = wanted.where(DOCUMENTS.c.arrival < arrival)
        with self._transaction() as connection:
            return [_document(row) for row in connection.execute(wanted)]

    def counts(self, key: str | None = None) -> dict[State, int]:
        """Documents in each state."""
        counted = select(DOCUMENTS.c.state, func.count()).group_by(DOCUMENTS.c.state)
        if key is not None:
            counted = counted.where(DOCUMENTS.c.key == key)
        with self._transaction() as connection:
            found = {state: count for state, count in connection.execute(counted)}
        return {state: found.get(state, 0) for state in STATES}

    def oldest_queued(self) -> float | None:
        """Since when the document waits that has waited longest for its first page, unix seconds; None: none waits."""
        with self._transaction() as connection:
            found: float | None = connection.scalar(
                select(func.min(DOCUMENTS.c.queued_at)).where(DOCUMENTS.c.state == "queued")
            )
            return found

    def size(self) -> int:
        """Bytes of all documents' files together."""
        with self._transaction() as connection:
            return connection.scalar(select(func.sum(DOCUMENTS.c.size))) or 0

    def ids(self) -> set[str]:
        """Of all documents, to tell which folders belong to none."""
        with self._transaction() as connection:
            return set(connection.scalars(select(DOCUMENTS.c.id)))

    def results(self, document: str, after: int = 0, most: int = 100) -> list[Page]:
        """Pages that were dealt with, in their order: the first `most` of those with a higher number than `after`."""
        wanted = (
            select(PAGES.c.result)
            .where(PAGES.c.document == document, PAGES.c.number > after, PAGES.c.result.is_not(None))
            .order_by(PAGES.c.number)
            .limit(most)
        )
        with self._transaction() as connection:
            found = connection.scalars(wanted).all()
        return [msgspec.msgpack.decode(result, type=Page) for result in found]

    def failures(self, document: str) -> list[tuple[int, str]]:
        """Pages that failed, with the reason."""
        failed = (PAGES.c.document == document, PAGES.c.state == "failed")
        wanted = select(PAGES.c.number, PAGES.c.reason).where(*failed).order_by(PAGES.c.number)
        with self._transaction() as connection:
            return [(number, reason) for number, reason in connection.execute(wanted)]

    def resume(self, now: float) -> list[Document]:
        """At the start, before all else: what was running is queued again.

        A page, or a document, that was begun MOST_STARTS times and never ended has failed. Returned are the documents
        that did so now, then the unfinished ones, oldest first.
        """
        failed_now = []
        for document in self._killers():
            log.error("document %s: %s", document, KILLER)
            self.finish(document, "failed", now, error=KILLER)
            failed_now.append(self.get(document))
        running = PAGES.c.document.in_(_unfinished_ids()) & (PAGES.c.state == "running")
        with self._transaction() as connection:
            killers = select(PAGES.c.document, PAGES.c.number).where(running, PAGES.c.attempts >= MOST_STARTS)
            for document, number in connection.execute(killers).all():
                log.error("document %s, page %d: %s", document, number, KILLER_PAGE)
                result = msgspec.msgpack.encode(Page(number=number, source="nothing", reason=KILLER_PAGE))
                failed = update(PAGES).where(PAGES.c.document == document, PAGES.c.number == number)
                connection.execute(failed.values(state="failed", result=result, reason=KILLER_PAGE))
            connection.execute(update(PAGES).where(running).values(state="queued"))
            connection.execute(update(DOCUMENTS).where(DOCUMENTS.c.state == "running").values(state="queued"))
            unfinished = _all_documents().where(DOCUMENTS.c.state.in_(UNFINISHED)).order_by(DOCUMENTS.c.arrival)
            return [*failed_now, *(_document(row) for row in connection.execute(unfinished))]

    def expired(self, before: float, total_bytes: int) -> list[str]:
        """Documents that finished before that time, and the oldest finished until the sizes of all others together
        are at most `total_bytes`."""
        finished = select(DOCUMENTS.c.id, DOCUMENTS.c.size, DOCUMENTS.c.finished_at)
        finished = finished.where(DOCUMENTS.c.finished_at.is_not(None)).order_by(DOCUMENTS.c.finished_at)
        with self._transaction() as connection:
            total = connection.scalar(select(func.sum(DOCUMENTS.c.size))) or 0
            gone = []
            for document, size, finished_at in connection.execute(finished):
                if finished_at >= before and total <= total_bytes:
                    break
                gone.append(document)
                total -= size
        return gone

    def webhooks_due(self, now: float, most: int = 10) -> list[Webhook]:
        due = _all_documents(DOCUMENTS.c.webhook_secret, DOCUMENTS.c.webhook_attempts)
        due = due.where(DOCUMENTS.c.webhook_at <= now).order_by(DOCUMENTS.c.webhook_at).limit(most)
        with self._transaction() as connection:
            return [
                Webhook(_document(row), row.webhook_url, row.webhook_secret, row.webhook_attempts)
                for row in connection.execute(due)
            ]

    def webhook_tried(self, document: str, next_at: float | None) -> None:
        """`next_at`: when it is tried again; None: it arrived, or is given up."""
        tried = {"webhook_attempts": DOCUMENTS.c.webhook_attempts + 1, "webhook_at": next_at}
        with self._transaction() as connection:
            connection.execute(update(DOCUMENTS).where(_of(document)).values(**tried))

    def _killers(self) -> list[str]:
        begun = (DOCUMENTS.c.state.in_(UNFINISHED), DOCUMENTS.c.attempts >= MOST_STARTS)
        with self._transaction() as connection:
            return list(connection.scalars(select(DOCUMENTS.c.id).where(*begun)))

    def _end(self, document: str, state: State, now: float, values: dict[str, object]) -> bool:
        with self._transaction() as connection:
            row = _row(connection, document)
            if row is None or row.state in FINISHED:
                return False
            before = _document(row)
            options = msgspec.structs.replace(before.options, password="")
            values |= {"state": state, "finished_at": now, "updated_at": now, "attempts": 0}
            values["options"] = _encoded(options)
            if before.webhook_url:
                values["webhook_at"] = now
            connection.execute(update(DOCUMENTS).where(_of(document)).values(**values))
            unread = (PAGES.c.document == document, PAGES.c.state.in_(("queued", "running")))
            connection.execute(update(PAGES).where(*unread).values(state="cancelled"))
        if before.options.password:
            self._empty_log()
        return True

    def _empty_log(self) -> None:
        """The write-ahead log still has what was overwritten in the tables."""
        with self._lock, contextlib.closing(self._engine.raw_connection()) as connection:
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[Connection]:
        engine = self._engine.execution_options(durable=durable)
        try:
            with self._lock, engine.begin() as connection:
                yield connection
        except exc.DBAPIError as error:
            log.error("%s: %s", self._path, error.orig)
            message = f"the store of documents can't be used now: {error.orig}; try again later"
            is_full = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
            status, code = (507, "no_space") if is_full else (503, "store_unavailable")
            raise StoreError(status, message, code=code, headers={"retry-after": "5"}) from error


def _open(path: Path) -> Engine:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _engine(path)
    except exc.DBAPIError as error:
        if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF not in BROKEN:
            raise UserError(f"{path}: {error.orig}") from None
        _set_aside(path, str(error.orig))
    except _DamagedError as error:
        _set_aside(path, str(error))
    return _engine(path)


class _DamagedError(Exception):
    """SQLite's own check found it."""


def _engine(path: Path) -> Engine:
    # Passwords of files stand in it for as long as their job goes on; SQLite gives its other files the same mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    # One connection, behind the store's lock. Its errors are logged, and would have what is stored in them.
    engine = create_engine(
        "sqlite://",
        creator=lambda: _connection(path),
        poolclass=StaticPool,
        query_cache_size=200,
        hide_parameters=True,
    )
    event.listen(engine, "begin", _begin)
    try:
        with engine.begin() as connection:
            _bring_along(connection, _check(connection, path))
            METADATA.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        engine.dispose()
        raise
    return engine


def _connection(path: Path) -> sqlite3.Connection:
    # isolation_level None: the module would begin transactions by itself, and too late
    # (https://docs.sqlalchemy.org/en/21/dialects/sqlite.html#pysqlite-serializable).
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        # secure_delete: what is deleted, and the password of a job that has finished, is gone from the file.
        connection.executescript(
            f"PRAGMA busy_timeout = {LOCKED_MS}; PRAGMA journal_mode = WAL;"
            "PRAGMA foreign_keys = ON; PRAGMA secure_delete = ON"
        )
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _begin(connection: Connection) -> None:
    # NORMAL: a kill loses nothing that was committed, a power cut may lose the last seconds: a few pages are read
    # again. FULL: not even a power cut, for what a client was told that it is accepted.
    is_durable = connection.get_execution_options().get("durable", False)
    connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _check(connection: Connection, path: Path) -> int:
    """Of which version it is; 0 of a new file."""
    version: int = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if version > VERSION:
        raise UserError(f"{path}: made by a newer version of vllm-unified; use that one, or move the file away")
    found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
    if found != "ok":
        raise _DamagedError(found)
    return version


def _bring_along(connection: Connection, version: int) -> None:
    """What a file of an older version lacks."""
    if version == 1:
        connection.exec_driver_sql("ALTER TABLE documents ADD COLUMN traceparent TEXT NOT NULL DEFAULT ''")


def _set_aside(path: Path, reason: str) -> None:
    aside = f"{path.name}.broken-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    log.error("%s: %s; moved to %s, a new one begins: the documents in it are lost", path, reason, aside)
    for suffix in ("", "-wal", "-shm"):  # the new file must not meet the old one's log
        part = path.with_name(f"{path.name}{suffix}")
        if part.exists():
            part.rename(path.with_name(f"{aside}{suffix}"))


def _of(document: str) -> Any:
    return DOCUMENTS.c.id == document


def _next_pages(document: str, count: int) -> Select[int]:
    queued = (PAGES.c.document == document, PAGES.c.state == "queued")
    return select(PAGES.c.number).where(*queued).order_by(PAGES.c.number).limit(count)


def _unfinished_ids() -> Select[str]:
    """Where running pages are looked for: the index has them by document, and finished ones have none."""
    return select(DOCUMENTS.c.id).where(DOCUMENTS.c.state.in_(UNFINISHED))


def _given_back() -> Any:
    running = PAGES.c.state == "running"
    return update(PAGES).where(running).values(state="queued", attempts=PAGES.c.attempts - 1)


def _counted(state: str) -> ScalarSelect[int]:
    of_it = (PAGES.c.document == DOCUMENTS.c.id, PAGES.c.state == state)
    return select(func.count()).select_from(PAGES).where(*of_it).correlate(DOCUMENTS).scalar_subquery()


def _all_documents(*more: Column[Any]) -> Any:
    columns = [DOCUMENTS.c[name] for name in Document.__struct_fields__ if name not in ("done", "failed")]
    return select(*columns, *more, _counted("done").label("done"), _counted("failed").label("failed"))


def _row(connection: Connection, document: str) -> Row[Any] | None:
    return connection.execute(_all_documents().where(_of(document))).one_or_none()


def _existing(connection: Connection, document: str) -> Document:
    row = _row(connection, document)
    if row is None:
        message = (
            f'there is no document "{document[:64]}"; it may have been deleted, or kept for its time and no longer'
        )
        raise DocumentError(404, message, code="document_not_found")
    return _document(row)


def _document(row: Row[Any]) -> Document:
    values = {name: row._mapping[name] for name in Document.__struct_fields__}
    return Document(**values | {"options": msgspec.json.decode(row.options, type=Options)})


def _encoded(options: Options) -> str:
    return msgspec.json.encode(options).decode()


def _sent_before(connection: Connection, upload: Upload) -> Document | None:
    if not upload.idempotency_key:
        return None
    same = (DOCUMENTS.c.key == upload.key, DOCUMENTS.c.idempotency_key == upload.idempotency_key)
    found = connection.execute(select(DOCUMENTS.c.id, DOCUMENTS.c.request_sha256).where(*same)).one_or_none()
    if found is None:
        return None
    if found.request_sha256 != upload.request_sha256:
        message = (
            f'the idempotency key "{upload.idempotency_key[:64]}" was used for another request, which became the '
            f"document {found.id}; use a new one"
        )
        raise DocumentError(409, message, code="idempotency_conflict")
    return _existing(connection, found.id)


def _check_can_retry(document: Document) -> None:
    if not document.is_finished:
        message = f"document {document.id} is {document.state}; wait for its end, or cancel it, before you retry it"
        raise DocumentError(409, message, code="document_not_finished")
    if document.state == "succeeded" and not document.failed:
        raise DocumentError(409, f"document {document.id} has no failed pages", code="nothing_to_retry")
