"""Documents and pages in a real SQLite file."""

import contextlib
import logging
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.conftest import CHECKOUT
from vllm_unified.documents.joining import Joint
from vllm_unified.documents.options import Options
from vllm_unified.documents.page import Block, Page
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.store import MOST_STARTS, VERSION, State, Store, StoreError, Upload, _next_pages
from vllm_unified.errors import UserError

ID = "0123456789abcdef0123456789abcde0"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "documents.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened = Store(path)
    yield opened
    opened.close()


def upload(number: int = 0, **fields: Any) -> Upload:
    values = {"name": "invoice.pdf", "kind": "pdf", "key": "alice", "options": Options(), "size": 1000}
    return Upload(**{"id": ID[:-4] + f"{number:04x}", **values, **fields})


def queued(store: Store, pages: int = 3, number: int = 0, now: float = 10.0, **fields: Any) -> str:
    """A document of so many pages."""
    document = store.accept(upload(number, **fields), now).id
    assert store.inspected(document, range(1, pages + 1), now)
    return document


def read(store: Store, document: str, *numbers: int, reason: str = "", now: float = 20.0) -> None:
    for number in numbers:
        page = Page(number=number, markdown=f"page {number}", reason=reason)
        assert store.page_done(document, number, page, now)


def finished(store: Store, number: int, at: float, size: int = 1000, outcome: Any = "succeeded") -> str:
    document = queued(store, 1, number)
    store.start_pages({document: 1}, at)
    read(store, document, 1)
    assert store.finish(document, outcome, at, size=size)
    return document


def test_a_document_from_its_upload_to_its_end(store: Store, path: Path) -> None:
    options = Options(mode="find", find_term="合计 ‘total’", pages="1-3", formats=("markdown", "docx"))
    document = queued(store, 3, options=options, name="発票 '; DROP TABLE pages; --.pdf", now=10.5)
    accepted = store.get(document)
    assert (accepted.state, accepted.pages, accepted.queued_at, accepted.started_at) == ("queued", 3, 10.5, None)
    assert (accepted.name, accepted.options) == ("発票 '; DROP TABLE pages; --.pdf", options)

    assert store.start_pages({document: 2}, 11.0) == [(document, 1), (document, 2)]
    assert store.start_pages({document: 2}, 12.0) == [(document, 3)]
    assert store.start_pages({document: 2}, 13.0) == []
    read(store, document, 3, 1)
    read(store, document, 2, reason="it loops", now=21.0)
    running = store.get(document)
    assert (running.state, running.started_at, running.done, running.failed) == ("running", 11.0, 2, 1)
    assert running.updated_at == 21.0

    assert store.finish(document, "succeeded", 30.0, size=5000)
    ended = store.get(document)
    assert (ended.state, ended.finished_at, ended.size, ended.error) == ("succeeded", 30.0, 5000, "")
    assert ended.is_finished
    store.close()
    assert Store(path).get(document) == ended


def test_a_page_comes_back_as_it_was(store: Store) -> None:
    document = queued(store, 12)
    store.start_pages({document: 12}, 11.0)
    pages = [
        Page(
            number=number,
            markdown="| 表 |\n",
            blocks=(Block(label="table", boxes=((1, 2, 3, 4),)),),
            reason="" if number % 5 else "truncated",
            rotation=90,
        )
        for number in range(1, 13)
    ]
    for page in reversed(pages):
        store.page_done(document, page.number, page, 12.0)
    assert store.results(document) == pages
    assert store.results(document, after=3, most=2) == pages[3:5]
    assert store.failures(document) == [(5, "truncated"), (10, "truncated")]


def test_only_the_chosen_pages_are_read_under_their_own_numbers(store: Store) -> None:
    document = store.accept(upload(), 10.0).id
    store.inspected(document, [2, 7, 9], 10.0)
    assert store.get(document).pages == 3
    assert store.start_pages({document: 5}, 11.0) == [(document, 2), (document, 7), (document, 9)]


def test_pages_of_several_documents_start_at_once(store: Store) -> None:
    first, second = queued(store, 2), queued(store, 2, 1)
    assert store.start_pages({second: 1, first: 2}, 11.0) == [(second, 1), (first, 1), (first, 2)]


class TestWhatIsTooLate:
    """A page that comes back, and a document that is inspected or ends, after it was cancelled or deleted."""

    @pytest.fixture(params=["cancelled", "deleted"])
    def gone(self, store: Store, request: pytest.FixtureRequest) -> str:
        document = queued(store, 2)
        store.start_pages({document: 1}, 11.0)
        if request.param == "deleted":
            assert store.delete(document)
            assert not store.delete(document)
        else:
            assert store.cancel(document, 12.0)
        return document

    def test_changes_nothing(self, store: Store, gone: str) -> None:
        assert not store.page_done(gone, 1, Page(number=1), 13.0)
        assert not store.give_back(gone, 1)
        assert not store.inspected(gone, range(1, 3), 13.0)
        assert not store.finish(gone, "succeeded", 13.0)
        assert not store.cancel(gone, 13.0)
        assert store.start_pages({gone: 5}, 13.0) == []
        assert store.results(gone) == []

    def test_nor_does_a_second_inspection(self, store: Store) -> None:
        document = queued(store, 2)
        assert not store.inspected(document, range(1, 5), 11.0)
        assert store.get(document).pages == 2


def test_seams_are_asked_about_where_both_pages_were_read(store: Store) -> None:
    document = queued(store, 6)
    queued(store, 3, 1)
    store.start_pages({document: 6}, 20.0)
    read(store, document, 1, 2, 4, 5)
    read(store, document, 3, reason="it is empty")
    assert store.seams(document) == [1, 4]
    assert store.keep_joints(document, 1, [Joint(3, 0), Joint(4, 1, "<table></table>")], 21.0)
    assert store.keep_joints(document, 4, None, 22.0)
    assert (store.seams(document), store.get(document).updated_at) == ([], 22.0)
    read(store, document, 6)
    assert store.seams(document) == [5]
    assert store.keep_joints(document, 5, [], 23.0)
    assert store.joints(document, 1) == [Joint(3, 0), Joint(4, 1, "<table></table>")]
    assert [store.joints(document, number) for number in (2, 4, 5)] == [None, None, []]

    store.finish(document, "succeeded", 24.0)
    assert not store.keep_joints(document, 2, [], 25.0)
    store.retry_failed(document, "", 26.0)
    store.start_pages({document: 1}, 27.0)
    read(store, document, 3)
    # Those of the page that was read now, and that of which no answer was had.
    assert store.seams(document) == [2, 3, 4]
    store.delete(document)
    assert store.joints(document, 1) is None


@pytest.mark.parametrize("verb", ["get", "retry"])
def test_an_unknown_document_is_404(store: Store, verb: str) -> None:
    with pytest.raises(DocumentError, match="there is no document") as raised:
        store.get("../etc") if verb == "get" else store.retry_failed("../etc", "", 10.0)
    assert (raised.value.status, raised.value.code) == (404, "document_not_found")


class TestIdempotencyKey:
    def test_the_same_request_is_the_same_document(self, store: Store) -> None:
        first = store.accept(upload(1, idempotency_key="a", request_sha256="one"), 10.0)
        again = upload(2, idempotency_key="a", request_sha256="one")
        assert store.sent_before(again) == first
        assert store.accept(again, 11.0) == first
        assert store.ids() == {first.id}

    def test_another_request_is_a_conflict(self, store: Store) -> None:
        store.accept(upload(1, idempotency_key="a", request_sha256="one"), 10.0)
        with pytest.raises(DocumentError, match="used for another request") as raised:
            store.accept(upload(2, idempotency_key="a", request_sha256="two"), 11.0)
        assert raised.value.status == 409

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"idempotency_key": "a"}, {"idempotency_key": "a", "key": "bob"}),
            ({"idempotency_key": "a"}, {"idempotency_key": "b"}),
            ({"idempotency_key": ""}, {"idempotency_key": ""}),
        ],
    )
    def test_it_is_unique_for_its_api_key(self, store: Store, one: dict[str, str], other: dict[str, str]) -> None:
        store.accept(upload(1, **one), 10.0)
        store.accept(upload(2, **other), 11.0)
        assert len(store.ids()) == 2


class TestPassword:
    SECRET = "correct horse battery staple"

    @pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
    def test_is_gone_from_the_disk_at_the_end(self, store: Store, path: Path, end: str) -> None:
        document = queued(store, 1, options=Options(password=self.SECRET, dpi=200))
        assert self.is_on_disk(path)
        store.cancel(document, 12.0) if end == "cancelled" else store.finish(document, "succeeded", 12.0)
        assert store.get(document).options == Options(dpi=200)
        assert not self.is_on_disk(path)

    def test_is_given_again_with_a_retry(self, store: Store) -> None:
        document = queued(store, 1, options=Options(password=self.SECRET, dpi=200))
        store.finish(document, "failed", 12.0, error="the password is wrong")
        again = store.retry_failed(document, "another", 13.0)
        assert (again.options, again.error) == (Options(password="another", dpi=200), "")

    def test_is_for_the_owner_alone(self, store: Store, path: Path) -> None:
        queued(store, 1)
        files = list(path.parent.glob("documents.db*"))
        assert len(files) == 3
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}

    def is_on_disk(self, path: Path) -> bool:
        return any(self.SECRET.encode() in file.read_bytes() for file in path.parent.iterdir())


def test_nothing_is_left_on_the_disk_of_what_was_deleted(store: Store, path: Path) -> None:
    document = queued(store, 20, name="the secret.pdf")
    store.start_pages({document: 20}, 11.0)
    for number in range(1, 21):
        store.page_done(document, number, Page(number=number, markdown="the secret " * 1000), 12.0)
    store.delete(document)
    assert not any(b"the secret" in file.read_bytes() for file in path.parent.iterdir())


class TestRetry:
    def test_of_the_failed_pages_alone(self, store: Store) -> None:
        document = queued(store, 4)
        store.start_pages({document: 4}, 11.0)
        read(store, document, 1, 3)
        read(store, document, 2, 4, reason="truncated")
        store.finish(document, "succeeded", 30.0)
        again = store.retry_failed(document, "", 40.0)
        assert (again.state, again.queued_at, again.started_at, again.finished_at) == ("queued", 40.0, None, None)
        assert (again.done, again.failed) == (2, 0)
        assert [page.number for page in store.results(document)] == [1, 3]
        assert store.start_pages({document: 9}, 41.0) == [(document, 2), (document, 4)]

    def test_of_what_a_cancellation_left(self, store: Store) -> None:
        document = queued(store, 3)
        store.start_pages({document: 2}, 11.0)
        read(store, document, 1)
        store.cancel(document, 12.0)
        store.retry_failed(document, "", 13.0)
        assert store.start_pages({document: 9}, 14.0) == [(document, 2), (document, 3)]

    def test_of_the_inspection(self, store: Store) -> None:
        document = store.accept(upload(), 10.0).id
        store.finish(document, "failed", 11.0, error="it is encrypted")
        assert store.retry_failed(document, "secret", 12.0).pages is None
        assert store.inspected(document, range(1, 3), 13.0)

    def test_not_while_it_goes_on(self, store: Store) -> None:
        document = queued(store, 1)
        with pytest.raises(DocumentError, match="is queued; wait for its end") as raised:
            store.retry_failed(document, "", 11.0)
        assert raised.value.status == 409

    def test_not_where_nothing_failed(self, store: Store) -> None:
        with pytest.raises(DocumentError, match="has no failed pages") as raised:
            store.retry_failed(finished(store, 0, 12.0), "", 13.0)
        assert raised.value.status == 409


class TestResume:
    def test_what_was_running_is_queued_again(self, store: Store) -> None:
        done, running, waiting = finished(store, 0, 11.0), queued(store, 4, 1), queued(store, 2, 2)
        store.start_pages({running: 3}, 12.0)
        read(store, running, 2)
        resumed = store.resume(90.0)
        assert [(each.id, each.state, each.pages, each.done) for each in resumed] == [
            (running, "queued", 4, 1),
            (waiting, "queued", 2, 0),
        ]
        assert resumed[0].started_at == 12.0
        assert store.start_pages({running: 9}, 13.0) == [(running, 1), (running, 3), (running, 4)]
        assert store.get(done).state == "succeeded"

    def test_a_page_that_ends_the_service_again_and_again_fails(
        self, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        document = queued(store, 2)
        for _ in range(MOST_STARTS):
            assert store.failures(document) == []
            store.start_pages({document: 1}, 11.0)
            store.resume(90.0)
        [(number, reason)] = store.failures(document)
        assert number == 1
        assert reason.startswith("the service ended 5 times")
        assert reason in caplog.text
        assert store.start_pages({document: 9}, 12.0) == [(document, 2)]
        assert [page.source for page in store.results(document)] == ["nothing"]

    @pytest.mark.parametrize("stage", ["inspection", "products"])
    def test_so_does_a_document(self, store: Store, stage: str) -> None:
        document = store.accept(upload(), 10.0).id if stage == "inspection" else queued(store)
        for _ in range(MOST_STARTS):
            assert [each.id for each in store.resume(90.0)] == [document]
            store.attempt(document)
        [ended] = store.resume(90.0)
        assert store.resume(90.5) == []
        assert ended == store.get(document)
        assert (ended.state, ended.finished_at, ended.error[:25]) == ("failed", 90.0, "the service ended 5 times")
        store.retry_failed(document, "", 91.0)
        assert [each.id for each in store.resume(92.0)] == [document]

    @pytest.mark.parametrize("by", ["its end", "an inspection that went well", "a stop", "a joint"])
    def test_a_document_that_was_survived_is_not_blamed(self, store: Store, by: str) -> None:
        document = store.accept(upload(), 10.0).id
        for _ in range(MOST_STARTS - 1):
            store.attempt(document)
        if by == "its end":
            store.attempt_ended(document)
        elif by == "a stop":
            store.give_all_back()
        elif by == "a joint":
            store.keep_joints(document, 1, [], 11.0)
        else:
            store.inspected(document, [1], 11.0)
        for _ in range(MOST_STARTS - 1):
            store.attempt(document)
        assert [each.id for each in store.resume(90.0)] == [document]

    @pytest.mark.parametrize("by", ["page", "stop"])
    def test_a_page_that_was_given_back_is_not_blamed(self, store: Store, by: str) -> None:
        document = queued(store, 1)
        for _ in range(MOST_STARTS + 1):
            assert store.start_pages({document: 1}, 11.0) == [(document, 1)]
            store.give_back(document, 1) if by == "page" else store.give_all_back()
            store.resume(90.0)
        assert store.failures(document) == []


class TestRetention:
    @pytest.fixture
    def kept(self, store: Store) -> list[str]:
        """Finished at 100, 200, 300, of 1,000 bytes each; and two that go on, of 1,000 each."""
        queued(store, 1, 8)
        store.start_pages({queued(store, 1, 9): 1}, 50.0)
        return [finished(store, number, at) for number, at in enumerate((100.0, 200.0, 300.0))]

    @pytest.mark.parametrize(
        ("before", "total", "gone"),
        [
            (0, 5000, []),
            (100, 5000, []),
            (101, 5000, [0]),
            (1000, 5000, [0, 1, 2]),
            (0, 4999, [0]),
            (0, 3000, [0, 1]),
            (0, 0, [0, 1, 2]),
            (201, 4000, [0, 1]),
        ],
    )
    def test_by_age_and_by_size(
        self, store: Store, kept: list[str], before: float, total: int, gone: list[int]
    ) -> None:
        assert store.expired(before, total) == [kept[n] for n in gone]

    def test_goes_by_the_end_not_by_the_arrival(self, store: Store) -> None:
        late, early = finished(store, 0, 300.0), finished(store, 1, 100.0)
        assert store.expired(0, 1000) == [early]
        assert store.delete(early)
        assert store.ids() == {late}
        assert store.expired(0, 1000) == []


class TestList:
    @pytest.fixture
    def filled(self, store: Store) -> Store:
        for number in range(5):
            queued(store, 1, number, key="alice" if number % 2 else "bob")
        store.cancel(upload(4).id, 11.0)
        return store

    @pytest.mark.parametrize(
        ("wanted", "found"),
        [
            ({}, [4, 3, 2, 1, 0]),
            ({"key": "alice"}, [3, 1]),
            ({"key": "bob", "state": "queued"}, [2, 0]),
            ({"state": "cancelled"}, [4]),
            ({"key": "nobody"}, []),
            ({"most": 2}, [4, 3]),
            ({"most": 2, "after": upload(3).id}, [2, 1]),
            ({"after": upload(0).id}, []),
            ({"after": "unknown"}, []),
        ],
    )
    def test_the_newest_first(self, filled: Store, wanted: dict[str, Any], found: list[int]) -> None:
        assert [each.id for each in filled.documents(**wanted)] == [upload(number).id for number in found]

    @pytest.mark.parametrize(("key", "count"), [(None, (4, 1)), ("bob", (2, 1)), ("alice", (2, 0))])
    def test_counts(self, filled: Store, key: str | None, count: tuple[int, int]) -> None:
        counts: dict[State, int] = filled.counts(key)
        assert (counts["queued"], counts["cancelled"], counts["running"]) == (*count, 0)


def test_since_when_the_oldest_document_waits(store: Store) -> None:
    assert store.oldest_queued() is None
    first, second = queued(store, 1, 1, now=10.0), queued(store, 1, 2, now=20.0)
    assert store.oldest_queued() == 10.0
    store.start_pages({first: 1}, 30.0)
    assert store.oldest_queued() == 20.0
    store.cancel(second, 40.0)
    assert store.oldest_queued() is None


class TestWebhook:
    @pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
    def test_is_due_at_the_end_and_until_it_arrived(self, store: Store, end: Any) -> None:
        document = queued(store, 1, webhook_url="https://example.com/done", webhook_secret="s3cret")
        queued(store, 1, 1)
        assert store.webhooks_due(99.0) == []
        store.cancel(document, 12.0) if end == "cancelled" else store.finish(document, end, 12.0)
        assert store.webhooks_due(11.9) == []
        [webhook] = store.webhooks_due(12.0)
        assert (webhook.url, webhook.secret, webhook.attempts) == ("https://example.com/done", "s3cret", 0)
        assert (webhook.document.id, webhook.document.state) == (document, end)
        store.webhook_tried(document, 20.0)
        assert store.webhooks_due(19.0) == []
        assert [each.attempts for each in store.webhooks_due(20.0)] == [1]
        store.webhook_tried(document, None)
        assert store.webhooks_due(99.0) == []

    def test_is_due_again_after_a_retry(self, store: Store) -> None:
        document = queued(store, 1, webhook_url="https://example.com/done")
        store.finish(document, "failed", 12.0)
        store.retry_failed(document, "", 13.0)
        assert store.webhooks_due(99.0) == []
        store.finish(document, "failed", 14.0)
        assert len(store.webhooks_due(99.0)) == 1


def test_what_was_accepted_survives_sigkill(path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from vllm_unified.documents.options import Options
from vllm_unified.documents.store import Store, Upload
store = Store(Path({str(path)!r}))
upload = Upload(id={ID!r}, name="a.pdf", kind="pdf", key="alice", options=Options(), size=1)
print(store.accept(upload, 10.0).id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout.strip() == ID
    assert Store(path).get(ID).state == "queued"


class TestDamage:
    @pytest.mark.parametrize("damage", ["not a database", "a torn page", "half of it"])
    def test_is_set_aside_and_the_service_starts(
        self, path: Path, caplog: pytest.LogCaptureFixture, damage: str
    ) -> None:
        store = Store(path)
        for number in range(20):
            queued(store, 100, number)
        store.close()
        content = path.read_bytes()
        path.write_bytes(
            {
                "not a database": b"never was one" * 1000,
                "a torn page": content[:8192] + b"\xff" * 4096 + content[12288:],
                "half of it": content[: len(content) // 8192 * 4096],
            }[damage]
        )
        damaged = path.read_bytes()
        with caplog.at_level(logging.ERROR):
            store = Store(path)
        assert store.resume(90.0) == []
        queued(store)
        store.close()
        [aside] = path.parent.glob("documents.db.broken-*Z")
        assert aside.read_bytes() == damaged
        assert f"moved to {aside.name}, a new one begins" in caplog.text

    def test_a_newer_version_is_left_alone(self, path: Path) -> None:
        Store(path).close()
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (VERSION,)
            connection.execute(f"PRAGMA user_version = {VERSION + 1}")
        connection.close()
        with pytest.raises(UserError, match="made by a newer version"):
            Store(path)
        assert [file.name for file in path.parent.glob("*broken*")] == []

    def test_an_older_version_is_brought_along(self, path: Path) -> None:
        with contextlib.closing(Store(path)) as older:
            document = queued(older)
        with sqlite3.connect(path) as connection:
            connection.execute("ALTER TABLE documents DROP COLUMN traceparent")
            connection.execute("PRAGMA user_version = 1")
        connection.close()
        with contextlib.closing(Store(path)) as store:
            assert (store.get(document).traceparent, store.get(document).pages) == ("", 3)
            assert store.accept(upload(1, traceparent="00-1-2-01"), 11.0).traceparent == "00-1-2-01"
        Store(path).close()

    def test_a_full_disk_is_a_507_and_works_again(self, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        document = queued(store)
        with store._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1")
        with pytest.raises(StoreError, match="full") as raised:
            store.accept(upload(1, name="n" * 100_000), 11.0)
        assert (raised.value.status, raised.value.code) == (507, "no_space")
        assert "full" in caplog.text
        with store._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 100000")
        store.accept(upload(1, name="n" * 100_000), 11.0)
        assert store.ids() == {document, upload(1).id}


def test_the_next_page_is_found_as_fast_among_ten_thousand(store: Store) -> None:
    few, many = queued(store, 200, 0), queued(store, 10_000, 1)
    done = [(many, number) for number in range(1, 9801)]
    assert store.start_pages({many: 9800}, 11.0) == done

    def seconds(document: str) -> float:
        begun = time.process_time()
        for _ in range(200):
            assert len(store.start_pages({document: 1}, 12.0)) == 1
        return time.process_time() - begun

    assert seconds(many) < 10 * seconds(few)


def test_the_choice_of_the_next_page_uses_its_index(store: Store) -> None:
    query = _next_pages(queued(store, 3), 1).compile(store._engine, compile_kwargs={"literal_binds": True})
    with store._engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}").all()
    assert [row[3] for row in plan] == ["SEARCH pages USING COVERING INDEX pages_by_state (document=? AND state=?)"]


@pytest.mark.parametrize(("is_durable", "synchronous"), [(True, 2), (False, 1)])
def test_what_is_accepted_is_synced_to_the_disk(store: Store, is_durable: bool, synchronous: int) -> None:
    for _ in range(2):
        with store._transaction(durable=is_durable) as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == synchronous
        with store._transaction() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 1


def test_the_tables_are_those_of_this_version(store: Store) -> None:
    """Who changes a column changes VERSION, and brings the older file along."""
    with store._engine.connect() as connection:
        columns = {
            table: [row[1] for row in connection.exec_driver_sql(f"PRAGMA table_info({table})")]
            for table in ("documents", "pages", "joints")
        }
    assert VERSION == 2
    assert len(columns["documents"]) == 22
    assert columns["pages"] == ["document", "number", "state", "attempts", "result", "reason"]
    assert columns["joints"] == ["document", "page", "result"]
    assert set(msgspec.structs.asdict(upload())) < set(columns["documents"])
