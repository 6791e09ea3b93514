"""Usage in a real SQLite file: nothing is lost, nothing is counted twice, whatever happens to the disk."""

import asyncio
import csv
import io
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from tests.conftest import CHECKOUT
from vllm_unified.router import usage as module
from vllm_unified.router.problems import RequestError
from vllm_unified.router.usage import FIELDS, Usage, add_usage, recorded_tokens, usage_csv, usage_document

LONG_AGO, FAR = date(2000, 1, 1), date(9999, 12, 31)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "usage.db"


@pytest.fixture
def usage(path: Path) -> Iterator[Usage]:
    opened = Usage(path)
    yield opened
    opened.close()


def note(usage: Usage, key: str = "alice", model: str = "chat", tokens: tuple[int, int] = (10, 5)) -> None:
    usage.note(key, model, error=False, prompt_tokens=tokens[0], completion_tokens=tokens[1], seconds=0.25)


def requests(usage: Usage) -> int:
    return sum(row["requests"] for row in usage.rows(LONG_AGO, FAR))


def at(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    moment = datetime.fromisoformat(f"{day}T12:00:00+00:00")
    monkeypatch.setattr(time, "time", moment.timestamp)


def test_a_row_for_each_day_key_and_model(usage: Usage, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "2026-11-29")
    note(usage)
    usage.note("alice", "chat", error=True, prompt_tokens=1, completion_tokens=0, seconds=0.5)
    note(usage, model="ocr")
    usage.flush()
    note(usage, "bob")
    at(monkeypatch, "2026-11-30")
    note(usage, "bob")
    found = usage.rows(LONG_AGO, FAR)
    assert [tuple(row) for row in found] == [FIELDS] * 4
    assert [tuple(row.values()) for row in found] == [
        ("2026-11-29", "alice", "chat", 2, 1, 11, 5, 16, 0.75),
        ("2026-11-29", "alice", "ocr", 1, 0, 10, 5, 15, 0.25),
        ("2026-11-29", "bob", "chat", 1, 0, 10, 5, 15, 0.25),
        ("2026-11-30", "bob", "chat", 1, 0, 10, 5, 15, 0.25),
    ]
    usage.flush()
    assert usage.rows(LONG_AGO, FAR) == found
    usage.close()
    assert Usage(path).rows(LONG_AGO, FAR) == found


@pytest.mark.parametrize("flushed", [True, False])
@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        ({}, 4),
        ({"since": date(2026, 11, 30)}, 2),
        ({"until": date(2026, 11, 29)}, 2),
        ({"since": date(2026, 11, 29), "until": date(2026, 11, 30)}, 4),
        ({"key": "alice"}, 2),
        ({"key": "alice", "model": "ocr"}, 0),
        ({"model": "ocr"}, 2),
        ({"key": "nobody"}, 0),
    ],
)
def test_rows_are_chosen_alike_in_memory_and_on_disk(
    usage: Usage, monkeypatch: pytest.MonkeyPatch, flushed: bool, wanted: dict[str, Any], count: int
) -> None:
    for day in ("2026-11-29", "2026-11-30"):
        at(monkeypatch, day)
        note(usage)
        note(usage, "bob", "ocr")
    if flushed:
        usage.flush()
    assert len(usage.rows(**{"since": LONG_AGO, "until": FAR, **wanted})) == count


def test_tokens_since(usage: Usage, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for day, tokens in (("2026-10-31", 1000), ("2026-11-01", 100), ("2026-11-29", 10)):
        at(monkeypatch, day)
        note(usage, tokens=(tokens, 0))
        note(usage, model="ocr", tokens=(0, tokens))
        usage.flush()
    note(usage, "bob", tokens=(3, 4))
    assert usage.tokens_since(date(2026, 11, 1)) == {"alice": 220, "bob": 7}
    assert usage.tokens_since(date(2026, 11, 29)) == {"alice": 20, "bob": 7}
    assert recorded_tokens(path, date(2026, 11, 1)) == {"alice": 220}
    assert recorded_tokens(path.with_name("none.db"), date(2026, 11, 1)) == {}
    assert not path.with_name("none.db").exists()
    path.with_name("begun.db").touch()  # by a router that has just begun
    assert recorded_tokens(path.with_name("begun.db"), date(2026, 11, 1)) == {}


def test_exact_while_another_thread_flushes(usage: Usage) -> None:
    done = threading.Event()

    def flush_for_ever() -> None:
        while not done.is_set():
            usage.flush()

    flushing = threading.Thread(target=flush_for_ever)
    flushing.start()
    try:
        for count in range(1, 501):
            note(usage, f"key-{count % 7}")
            assert requests(usage) == count
    finally:
        done.set()
        flushing.join()
    assert requests(usage) == 500


def test_it_is_written_each_second(path: Path) -> None:
    async def story() -> None:
        usage = Usage(path)
        running = asyncio.create_task(usage.run())
        note(usage)
        deadline = time.monotonic() + 20
        while not recorded_tokens(path, LONG_AGO):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        note(usage)
        running.cancel()
        usage.close()

    asyncio.run(story())
    assert recorded_tokens(path, LONG_AGO) == {"alice": 30}


def test_a_locked_database_loses_nothing_and_is_said_once(
    usage: Usage, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(module, "LOCKED_SECONDS", 0.05)
    note(usage)
    usage.flush()
    stranger = sqlite3.connect(path)
    stranger.execute("BEGIN IMMEDIATE")
    for _ in range(3):
        note(usage)
        usage.flush()
    assert requests(usage) == 4
    assert caplog.text.count("database is locked; usage is kept in memory") == 1
    stranger.close()
    usage.flush()
    assert requests(usage) == 4
    assert recorded_tokens(path, LONG_AGO) == {"alice": 60}
    assert caplog.text.count("written again") == 1


def test_a_folder_that_cannot_be_made(usage: Usage, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.write_text("a file in its place")
    note(usage)
    usage.flush()
    assert usage.tokens_since(LONG_AGO) == {"alice": 15}
    assert "usage is kept in memory" in caplog.text
    path.parent.unlink()
    usage.flush()
    assert recorded_tokens(path, LONG_AGO) == {"alice": 15}


@pytest.mark.parametrize("intact", [0, 1024], ids=["no database at all", "broken behind its first page's header"])
def test_a_broken_file_is_moved_aside(path: Path, intact: int, caplog: pytest.LogCaptureFixture) -> None:
    before = Usage(path)
    for number in range(2000):
        note(before, f"key-{number}")
    before.close()
    content = path.read_bytes()
    broken = content[:intact] + b"nonsense" * ((len(content) - intact) // 8)
    path.write_bytes(broken)
    usage = Usage(path)
    note(usage)
    usage.flush()
    assert usage.rows(LONG_AGO, FAR)[0]["key"] == "alice"
    assert requests(usage) == 1
    usage.close()
    (aside,) = path.parent.glob("usage.db.broken-*Z")
    assert aside.read_bytes() == broken
    assert f"moved to {aside.name}, a new one begins" in caplog.text


def test_the_log_of_a_broken_file_is_moved_with_it(path: Path) -> None:
    """Another process has the file open, so its log stays; what stands there must not reach the new file."""
    other = Usage(path)
    for number in range(2000):
        note(other, f"key-{number}")
    other.flush()
    checkpointing = sqlite3.connect(path)
    checkpointing.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    checkpointing.close()
    note(other, "key-1000")
    other.flush()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"nonsense" * ((path.stat().st_size - 4096) // 8))
    usage = Usage(path)
    note(usage)
    assert [row["key"] for row in usage.rows(LONG_AGO, FAR)] == ["alice"]
    usage.close()
    assert len(list(path.parent.glob("usage.db.broken-*-wal"))) == 1
    assert recorded_tokens(path, LONG_AGO) == {"alice": 15}
    other.close()


WRITER = """
import sys
from pathlib import Path
from vllm_unified.router.usage import Usage
usage = Usage(Path(sys.argv[1]))
count = 0
while True:
    for _ in range(100):
        usage.note(f"key-{count % 37}", "chat", error=False, prompt_tokens=1, completion_tokens=1, seconds=0.1)
        count += 1
    usage.flush()
    print(count, flush=True)
"""


def test_a_kill_in_the_middle_loses_nothing_that_was_flushed(path: Path) -> None:
    last = 0
    for wait in (0.05, 0.21, 0.33):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline()
        time.sleep(wait)
        os.kill(writer.pid, signal.SIGKILL)
        said = writer.stdout.read().split()
        writer.stdout.close()
        writer.wait()
        flushed = last + int(said[-1] if said else 100)
        usage = Usage(path)
        last = requests(usage)
        usage.close()
        assert flushed <= last <= flushed + 100  # the last one may have been written and not said
    assert list(path.parent.glob("*.broken-*")) == []
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_note_is_cheap(usage: Usage) -> None:
    """An order of magnitude above what it costs, so that a busy machine does not matter."""
    fastest = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(1000):
            note(usage)
        fastest = min(fastest, time.perf_counter() - begin)
    assert fastest / 1000 < 10e-6


# GET /usage


@dataclass
class Caller:
    name: str
    admin: bool


@pytest.fixture
def app(usage: Usage, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    for day in ("2026-10-31", "2026-11-01", "2026-11-30"):
        at(monkeypatch, day)
        note(usage)
        note(usage, "bob", "ocr")
    usage.flush()
    app = FastAPI()

    @app.middleware("http")
    async def name_the_caller(request: Request, call_next: Any) -> Response:
        name = request.headers["x-caller"]
        request.state.key = Caller(name, name == "root")
        answer: Response = await call_next(request)
        return answer

    @app.exception_handler(RequestError)
    async def answer(_request: Request, error: RequestError) -> Response:
        return error.response()

    add_usage(app, usage)
    return app


def get(app: FastAPI, caller: str = "root", accept: str = "*/*", **query: str) -> httpx.Response:
    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            return await client.get("/usage", params=query, headers={"x-caller": caller, "accept": accept})

    return asyncio.run(answer())


def test_usage_of_this_month(app: FastAPI) -> None:
    answer = get(app, "alice")
    numbers = {"requests": 1, "errors": 0, "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    row = {"key": "alice", "model": "chat", **numbers, "seconds": 0.25}
    assert answer.json() == {
        "from": "2026-11-01",
        "to": "2026-11-30",
        "data": [{"day": "2026-11-01", **row}, {"day": "2026-11-30", **row}],
        "total": {**{name: 2 * n for name, n in numbers.items()}, "seconds": 0.5},
    }


@pytest.mark.parametrize(
    ("caller", "query", "count"),
    [
        ("root", {}, 4),
        ("root", {"from": "2026-10-01"}, 6),
        ("root", {"from": "2026-10-01", "to": "2026-10-31"}, 2),
        ("root", {"key": "bob"}, 2),
        ("root", {"key": "bob", "model": "chat"}, 0),
        ("bob", {"from": "2026-10-01"}, 3),
        ("bob", {"key": "bob"}, 2),
        ("carol", {}, 0),
    ],
)
def test_who_sees_what(app: FastAPI, caller: str, query: dict[str, str], count: int) -> None:
    rows = get(app, caller, **query).json()["data"]
    assert len(rows) == count
    assert caller == "root" or {row["key"] for row in rows} <= {caller}


@pytest.mark.parametrize(("accept", "query"), [("*/*", {"format": "csv"}), ("text/csv", {})])
def test_csv(app: FastAPI, accept: str, query: dict[str, str]) -> None:
    answer = get(app, accept=accept, **query)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    head, *rows = csv.reader(io.StringIO(answer.text))
    assert tuple(head) == FIELDS
    assert rows[0] == ["2026-11-01", "alice", "chat", "1", "0", "10", "5", "15", "0.25"]
    assert len(rows) == 4
    assert get(app, accept=accept, format="json").json()["total"]["requests"] == 4


@pytest.mark.parametrize(
    ("caller", "query", "status", "param", "message"),
    [
        ("root", {"from": "yesterday"}, 400, "from", 'from: "yesterday" is no date; write it as 2026-12-31'),
        ("root", {"to": "2026-02-30"}, 400, "to", 'to: "2026-02-30" is no date; write it as 2026-12-31'),
        ("root", {"from": "2027-01-01"}, 400, "from", "from: 2027-01-01 is after 2026-11-30; swap from and to"),
        ("root", {"format": "xml"}, 400, "format", 'format: "xml": choose json or csv'),
        (
            "bob",
            {"key": "alice"},
            403,
            "key",
            'the key "bob" sees its own usage only; leave `key` out, or ask with an admin key',
        ),
    ],
)
def test_bad_requests(app: FastAPI, caller: str, query: dict[str, str], status: int, param: str, message: str) -> None:
    answer = get(app, caller, **query)
    assert answer.status_code == status
    assert (answer.json()["error"]["param"], answer.json()["error"]["message"]) == (param, message)


def test_an_unreadable_database_is_said(app: FastAPI, usage: Usage, path: Path) -> None:
    usage.close()
    path.rename(path.with_name("elsewhere"))
    path.mkdir()
    answer = get(app)
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "usage can't be read: unable to open database file"


def test_nothing_yet() -> None:
    today = datetime.now(UTC).date()
    document = usage_document([], today - timedelta(days=1), today)
    assert document["data"] == []
    assert set(document["total"].values()) == {0}
    assert usage_csv([]) == ",".join(FIELDS) + "\r\n"
