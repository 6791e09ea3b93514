"""Whose page is read next, and that no page is read twice or lost, whenever the service is killed."""

import asyncio
import contextlib
import functools
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT
from vllm_unified.documents import jobs as module
from vllm_unified.documents.jobs import (
    CHANGES,
    FAULT,
    MOST_UNANSWERED,
    PACE_SECONDS,
    Jobs,
    Pace,
    Place,
    Room,
    Status,
    Turns,
    places,
)
from vllm_unified.documents.joining import Joint
from vllm_unified.documents.options import Options
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.store import MOST_STARTS, Document, Store, StoreError, Upload

# Key → document → pages, in the order in which they came.
Waiting = dict[str, dict[str, int]]


def turns_of(waiting: Waiting) -> Turns:
    turns = Turns()
    for key, documents in waiting.items():
        for document, pages in documents.items():
            turns.add(key, document, pages)
    return turns


class TestFairOrder:
    @pytest.mark.parametrize(
        ("waiting", "order"),
        [
            ({}, ""),
            ({"alice": {"a": 3}}, "aaa"),
            ({"alice": {"a": 4, "b": 1}}, "abaaa"),
            ({"alice": {"a": 3, "b": 2, "c": 1}}, "abcaba"),
            ({"alice": {"a": 3}, "bob": {"x": 2}}, "axaxa"),
            ({"alice": {"a": 2, "b": 2}, "bob": {"x": 4}}, "axbxaxbx"),
            ({"alice": {"a": 1, "b": 1, "c": 1}, "bob": {"x": 1}}, "axbc"),
            ({"alice": {"a": 9}, "bob": {"x": 1, "y": 2}, "carol": {"p": 1}}, "axpayayaaaaaa"),
        ],
    )
    def test_keys_take_turns_and_so_do_their_documents(self, waiting: Waiting, order: str) -> None:
        assert "".join(turns_of(waiting).take(99)) == order
        one_by_one = turns_of(waiting)
        assert "".join(itertools.chain(*(one_by_one.take(1) for _ in range(99)))) == order

    def test_two_pages_do_not_wait_for_three_thousand(self) -> None:
        turns = turns_of({"alice": {"long": 3000}})
        turns.take(100)
        turns.add("alice", "short", 2)
        turns.add("bob", "other", 2)
        assert turns.take(8) == ["long", "other", "short", "other", "long", "short", "long", "long"]

    def test_a_thousand_documents_of_one_key_do_not_hold_up_another(self) -> None:
        turns = turns_of({"alice": {f"a{n}": 5 for n in range(1000)}})
        turns.add("bob", "x", 2)
        assert "x" in turns.take(2)
        assert "x" in turns.take(2)

    @pytest.mark.parametrize(
        ("paused", "most", "order"),
        [({"bob"}, 9, "aba"), ({"alice"}, 9, "xx"), ({"alice", "bob"}, 9, ""), ((), 0, ""), ((), -3, "")],
    )
    def test_who_is_paused_keeps_its_turns(self, paused: Any, most: int, order: str) -> None:
        waiting = {"alice": {"a": 2, "b": 1}, "bob": {"x": 2}}
        turns = turns_of(waiting)
        assert "".join(turns.take(most, paused)) == order
        assert len(turns.take(99)) == 5 - len(order)

    def test_one_that_left_has_no_more_turns(self) -> None:
        turns = turns_of({"alice": {"a": 2, "b": 2}, "bob": {"x": 1}})
        turns.remove("alice", "a")
        turns.remove("bob", "x")
        turns.remove("nobody", "at all")
        assert list(turns) == ["b"]
        assert turns.take(9) == ["b", "b"]


class TestPlaces:
    @pytest.mark.parametrize("seed", range(20))
    def test_are_those_in_which_the_documents_end(self, seed: int) -> None:
        dice = random.Random(seed)
        names = (f"{number:03}" for number in itertools.count())
        waiting = {
            f"key {nth}": {next(names): dice.randint(1, 12) for _ in range(dice.randint(1, 6))}
            for nth in range(dice.randint(1, 5))
        }
        order = turns_of(waiting).take(10_000)
        last = {document: nth for nth, document in enumerate(order, 1)}
        found = places(waiting)
        assert sorted(last, key=lambda each: last[each]) == sorted(found, key=lambda each: found[each].ahead)
        for document, place in found.items():
            assert last[document] <= place.pages < last[document] + len(waiting)

    def test_of_documents_without_pages_left_are_the_first(self) -> None:
        assert places({"alice": {"a": 5, "b": 0}}) == {"b": Place(0, 0), "a": Place(1, 5)}

    def test_of_a_thousand_documents_take_no_time(self) -> None:
        def seconds(documents: int) -> float:
            waiting = {"alice": {f"{n}": 1 + n * 7919 % 3000 for n in range(documents)}}
            begun = time.process_time()
            places(waiting)
            return time.process_time() - begun

        seconds(500)
        assert seconds(8000) < 16 * 16 * max(seconds(500), 1e-3) / 4


class TestPace:
    def test_is_of_the_last_minutes(self) -> None:
        pace = Pace()
        pace.begin(1000.0)
        for second in range(1000, 1060):
            pace.add(second + 0.5)
            pace.add(second + 0.6)
        assert pace.per_minute(1060.0) == 120
        assert pace.per_minute(1000.0 + PACE_SECONDS) == pytest.approx(120 * 60 / PACE_SECONDS, rel=0.03)
        assert pace.per_minute(1060.0 + PACE_SECONDS) == 0

    def test_begins_anew_after_a_pause(self) -> None:
        pace = Pace()
        pace.begin(0.0)
        pace.add(1.0)
        pace.begin(10_000.0)
        pace.add(10_006.0)
        assert pace.per_minute(10_006.0) == 10

    def test_of_nothing_is_nothing(self) -> None:
        assert Pace().per_minute(5.0) == 0


class Scans:
    """The work: documents of as many pages as their names say; a page ends when `may_go`, as its `answers` say."""

    def __init__(self) -> None:
        self.inspected: list[str] = []
        self.seen: list[tuple[str, int]] = []
        self.given_up: list[tuple[str, int]] = []
        self.seams_of: dict[str, list[int]] = {}
        self.joined: list[tuple[str, int]] = []
        self.finished: list[str] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.may_go = asyncio.Event()
        self.may_go.set()
        # What comes of the next calls, in place of success.
        self.answers: dict[str, deque[Exception | Page]] = {}

    def answer(self, what: str, *answers: Exception | Page) -> None:
        self.answers.setdefault(what, deque()).extend(answers)

    async def inspect(self, document: Document) -> Sequence[int]:
        self.inspected.append(document.name)
        self._raise("inspect " + document.name)
        return range(1, int(document.name.split()[1]) + 1)

    async def read(self, document: Document, number: int) -> Page:
        self.seen.append((document.name, number))
        await self._wait(document, number)
        return self._raise(f"{document.name}:{number}") or Page(number=number, markdown="read")

    async def seams(self, document: Document) -> Sequence[int]:
        self._raise("seams " + document.name)
        asked = {number for name, number in self.joined if name == document.name}
        return [number for number in self.seams_of.get(document.name, []) if number not in asked]

    async def join(self, document: Document, number: int) -> Sequence[Joint] | None:
        self.joined.append((document.name, number))
        await self._wait(document, number)
        self._raise(f"{document.name}+{number}")
        return [Joint(number, 0)]

    async def finish(self, document: Document) -> int:
        self._raise("finish " + document.name)
        self.finished.append(document.name)
        return 4321

    async def _wait(self, document: Document, number: int) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.in_flight, self.most_in_flight)
        try:
            await asyncio.sleep(0)
            await self.may_go.wait()
        except asyncio.CancelledError:
            self.given_up.append((document.name, number))
            raise
        finally:
            self.in_flight -= 1

    def _raise(self, what: str) -> Page | None:
        answer = self.answers[what].popleft() if self.answers.get(what) else None
        if isinstance(answer, Exception):
            raise answer
        return answer


class Service:
    """Jobs over a store in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = Scans()
        self.limit = 4
        self.room = Room()
        self.now = 0.0  # of the monotonic clock
        self.sent = 0
        self.ended: list[tuple[str, str]] = []  # document, state
        self.store: Store
        self.jobs: Jobs

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Jobs]:
        self.store = Store(self.folder / "documents.db")
        clock = (lambda: self.now) if self.now else time.monotonic
        self.jobs = Jobs(
            self.store,
            self.work,
            lambda: self.limit,
            room=self.room,
            ended=lambda document: self.ended.append((document.id, document.state)),
            monotonic=clock,
        )
        await self.jobs.start()
        try:
            yield self.jobs
        finally:
            await self.jobs.stop()
            self.store.close()

    def upload(self, name: str, key: str = "alice", **fields: Any) -> Upload:
        self.sent += 1
        values = {"kind": "pdf", "options": Options(), "size": 10, **fields}
        return Upload(id=f"{self.sent:032x}", name=name, key=key, **values)

    async def accept(self, name: str, key: str = "alice", **fields: Any) -> str:
        return (await self.jobs.accept(self.upload(name, key, **fields))).id

    async def done(self, document: str) -> Status:
        status = await self.jobs.wait(document, 20)
        assert status.is_finished
        return status

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - whatever it is about
                await asyncio.sleep(0.005)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


def in_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        async def within_seconds() -> None:
            async with asyncio.timeout(60):
                await test(*args, **fixtures)

        asyncio.run(within_seconds())

    return run


@in_a_loop
async def test_a_document_from_its_upload_to_its_end(service: Service) -> None:
    async with service.running() as jobs:
        document = await service.accept("a 10", options=Options(password="secret"))
        status = await service.done(document)
        assert (status.state, status.pages, status.done, status.failed) == ("succeeded", 10, 10, 0)
        assert (status.percent, status.position, status.seconds_left) == (100, None, None)
        assert status.started_at is not None
        assert status.finished_at is not None
        assert status.queued_at <= status.started_at <= status.finished_at
        assert status.duration_ms == round((status.finished_at - status.started_at) * 1000)
        assert sorted(service.work.seen) == [("a 10", number) for number in range(1, 11)]
        assert (service.work.inspected, service.work.finished) == (["a 10"], ["a 10"])
        stored = service.store.get(document)
        assert (stored.size, stored.options.password) == (4321, "")
        assert [page.number for page in service.store.results(document)] == list(range(1, 11))
        assert jobs.load()[:3] == (0, 0, 0)


@in_a_loop
async def test_the_limit_moves(service: Service) -> None:
    service.work.may_go.clear()
    service.limit = 0
    async with service.running() as jobs:
        document = await service.accept("a 50")
        await service.until(lambda: service.work.inspected == ["a 50"])
        await asyncio.sleep(0.05)
        assert service.work.in_flight == 0
        service.limit = 3
        await service.until(lambda: service.work.in_flight == 3)
        service.limit = 7
        await service.until(lambda: service.work.in_flight == 7)
        service.limit = 1
        assert jobs.load().in_flight == 7
        service.work.may_go.set()
        await service.until(lambda: service.work.in_flight <= 1)
        service.work.most_in_flight = 0
        await service.done(document)
        assert service.work.most_in_flight == 1


@in_a_loop
async def test_a_short_document_overtakes_a_long_one(service: Service) -> None:
    service.limit = 2
    async with service.running():
        long = await service.accept("long 150")
        await service.until(lambda: len(service.work.seen) > 20)
        short, other = await service.accept("short 2"), await service.accept("other 3", "bob")
        before = len(service.work.seen)
        await service.done(short)
        await service.done(other)
        assert len(service.work.seen) - before < 100
        await service.done(long)
        assert Counter(service.work.seen).most_common(1)[0][1] == 1


class TestFailure:
    @in_a_loop
    async def test_of_pages_fails_no_document(self, service: Service, caplog: pytest.LogCaptureFixture) -> None:
        service.work.answer("a 4:1", DocumentError(400, "this page is 200 inches wide", code="page_too_large"))
        service.work.answer("a 4:2", RuntimeError("/secret/path"))
        service.work.answer("a 4:3", Page(number=3, source="text_layer", reason="it repeats itself"))
        async with service.running():
            document = await service.accept("a 4")
            status = await service.done(document)
            assert (status.state, status.done, status.failed, status.error) == ("succeeded", 1, 3, "")
            assert service.store.failures(document) == [
                (1, "this page is 200 inches wide"),
                (2, FAULT),
                (3, "it repeats itself"),
            ]
            assert [page.source for page in service.store.results(document)] == [
                "nothing",
                "nothing",
                "text_layer",
                "model",
            ]
        assert "/secret/path" in caplog.text

    @pytest.mark.parametrize(
        ("what", "error", "message"),
        [
            ("inspect", DocumentError(422, "the file is encrypted", code="x"), "the file is encrypted"),
            ("inspect", ValueError("boom"), "the service could not inspect the document; its log says why"),
            ("finish", DocumentError(500, "no room on the disk", code="x"), "no room on the disk"),
            ("finish", OSError("boom"), "the service could not finish the document; its log says why"),
        ],
    )
    @in_a_loop
    async def test_of_the_inspection_or_the_products_fails_it(
        self, service: Service, what: str, error: Exception, message: str
    ) -> None:
        service.work.answer(f"{what} a 2", error)
        async with service.running() as jobs:
            document = await service.accept("a 2")
            other = await service.accept("b 2")
            status = await service.done(document)
            assert (status.state, status.error) == ("failed", message)
            assert (await service.done(other)).state == "succeeded"
            await jobs.retry_failed(document)
            assert (await service.done(document)).state == "succeeded"
        assert Counter(service.work.seen)["a 2", 1] == 1

    @pytest.mark.parametrize("odd", [{"markdown": "half a \ud83d"}, {"seconds": object()}, {"width": 1 << 80}])
    @in_a_loop
    async def test_of_a_page_that_cant_be_stored(self, service: Service, odd: dict[str, Any]) -> None:
        service.work.answer("a 2:1", Page(number=1, **odd))
        service.work.answer("a 2:2", DocumentError(400, "half a \ud83d", code="x"))
        service.work.answer("finish a 2", DocumentError(400, "half a \ud83d", code="x"))
        async with service.running():
            document = await service.accept("a 2")
            status = await service.done(document)
            assert (status.state, status.failed, status.error) == ("failed", 2, "half a ?")
            assert {reason for _, reason in service.store.failures(document)} == {FAULT}

    @in_a_loop
    async def test_that_kills_the_service_again_and_again(self, service: Service) -> None:
        store = Store(service.folder / "documents.db")
        killer = store.accept(service.upload("b 2"), 10.0).id
        for _ in range(MOST_STARTS):
            store.attempt(killer)
        store.close()
        async with service.running():
            assert (await service.done(killer)).state == "failed"
            other = await service.accept("c 2")
            assert (await service.done(other)).state == "succeeded"
        assert service.ended == [(killer, "failed"), (other, "succeeded")]
        assert service.work.inspected == ["c 2"]

    @in_a_loop
    async def test_of_a_document_without_pages(self, service: Service) -> None:
        async with service.running():
            status = await service.done(await service.accept("a 0"))
            assert (status.state, status.error) == ("failed", "the document has no pages")

    @in_a_loop
    async def test_that_something_was_cancelled_is_one_like_others(self, service: Service) -> None:
        async def read(document: Document, number: int) -> Page:
            broken: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
            broken.cancel()
            return await broken

        service.work.read = read  # type: ignore[method-assign]
        async with service.running():
            status = await service.done(await service.accept("a 2"))
            assert (status.state, status.failed) == ("succeeded", 2)


class TestNotNow:
    """What the OCR model's server refuses for now is none of the page's."""

    @pytest.mark.parametrize("what", ["inspect a 2", "a 2:1", "finish a 2"])
    @pytest.mark.parametrize("status", [429, 503])
    @in_a_loop
    async def test_it_is_tried_again(self, service: Service, what: str, status: int) -> None:
        service.now = 100.0
        service.work.answer(what, DocumentError(status, "later", code="x", headers={"retry-after": "20"}))
        async with service.running():
            document = await service.accept("a 2")
            await service.until(lambda: not service.work.answers[what])
            service.now = 119.0
            await asyncio.sleep(0.3)
            assert not (await service.jobs.status(document)).is_finished
            service.now = 121.0
            ended = await service.done(document)
            assert (ended.state, ended.done, ended.failed) == ("succeeded", 2, 0)

    @pytest.mark.parametrize(("status", "is_held_up"), [(429, False), (503, True)])
    @in_a_loop
    async def test_a_key_at_its_limit_holds_up_no_other(self, service: Service, status: int, is_held_up: bool) -> None:
        service.now = 100.0
        service.limit = 1
        service.work.answer("a 2:1", DocumentError(status, "later", code="x"))
        async with service.running() as jobs:
            held = await service.accept("a 2")
            await service.until(lambda: not service.work.answers["a 2:1"])
            other = await service.accept("b 2", "bob")
            assert (await jobs.wait(other, 0.5)).is_finished is not is_held_up
            assert (await jobs.status(held)).done == 0

    @pytest.mark.parametrize(
        ("header", "seconds"), [("", 5), ("7", 7), ("0", 1), ("86400", 60), ("Wed, 21 Oct", 5), ("-1", 5), ("nan", 5)]
    )
    def test_how_long(self, header: str, seconds: float) -> None:
        assert module._retry_after(header) == seconds


class TestCancel:
    @in_a_loop
    async def test_stops_what_is_in_flight_and_what_waits(self, service: Service) -> None:
        service.work.may_go.clear()
        async with service.running() as jobs:
            document = await service.accept("a 9", options=Options(password="secret"))
            await service.until(lambda: service.work.in_flight == 4)
            status = await jobs.cancel(document)
            assert (status.state, status.done) == ("cancelled", 0)
            assert sorted(service.work.given_up) == [("a 9", number) for number in range(1, 5)]
            assert service.store.get(document).options.password == ""
            service.work.may_go.set()
            other = await service.done(await service.accept("b 2"))
            assert other.state == "succeeded"
            assert len(service.work.seen) == 4 + 2
            assert "a 9" not in service.work.finished

    @in_a_loop
    async def test_keeps_what_was_seenfor_a_retry(self, service: Service) -> None:
        service.limit = 1
        async with service.running() as jobs:
            document = await service.accept("a 50")
            await service.until(lambda: len(service.work.seen) >= 5)
            cancelled = await jobs.cancel(document)
            assert 3 <= cancelled.done < 50
            assert (await jobs.retry_failed(document)).state == "queued"
            assert (await service.done(document)).done == 50
            assert len(service.work.seen) <= 51

    @pytest.mark.parametrize("limit", [0, 4])
    @in_a_loop
    async def test_before_its_turn(self, service: Service, limit: int) -> None:
        service.limit = limit
        async with service.running() as jobs:
            document = await service.accept("a 3")
            assert (await jobs.cancel(document)).state == "cancelled"
            with pytest.raises(DocumentError, match="is cancelled; there is nothing to cancel") as raised:
                await jobs.cancel(document)
            assert raised.value.status == 409

    @in_a_loop
    async def test_goes_on_when_who_asked_has_left(self, service: Service) -> None:
        service.work.may_go.clear()
        async with service.running() as jobs:
            document = await service.accept("a 3")
            await service.until(lambda: service.work.in_flight == 3)
            asking = asyncio.create_task(jobs.cancel(document))
            await asyncio.sleep(0)
            asking.cancel()
            assert (await service.done(document)).state == "cancelled"

    @pytest.mark.parametrize("verb", ["cancel", "delete"])
    @in_a_loop
    async def test_while_the_end_is_stored(self, service: Service, verb: str) -> None:
        """It comes too late, and the end that was stored is noted nevertheless, once."""
        is_stored, may_return = threading.Event(), threading.Event()
        async with service.running() as jobs:
            finish = service.store.finish

            def slowly(*given: Any, **more: Any) -> bool:
                ended = finish(*given, **more)
                is_stored.set()
                may_return.wait(20)
                return ended

            service.store.finish = slowly  # type: ignore[method-assign]
            document = await service.accept("a 1")
            await service.until(is_stored.is_set)
            asking = asyncio.create_task(getattr(jobs, verb)(document))
            await service.until(lambda: not jobs._active[document].tasks)
            may_return.set()
            late = pytest.raises(DocumentError, match="is succeeded; there is nothing to cancel")
            with late if verb == "cancel" else contextlib.nullcontext():
                await asking
        assert service.ended == [(document, "succeeded")]

    @in_a_loop
    async def test_is_noted_once(self, service: Service) -> None:
        service.limit = 0
        async with service.running() as jobs:
            document = await service.accept("a 1")
            await jobs.cancel(document)
            await jobs.delete(document)
        assert service.ended == [(document, "cancelled")]

    @pytest.mark.parametrize("verb", ["status", "cancel", "delete", "retry_failed"])
    @in_a_loop
    async def test_of_an_unknown_document(self, service: Service, verb: str) -> None:
        async with service.running() as jobs:
            with pytest.raises(DocumentError) as raised:
                await getattr(jobs, verb)("f" * 32)
            assert raised.value.status == 404

    @pytest.mark.parametrize("when", ["running", "finished"])
    @in_a_loop
    async def test_delete(self, service: Service, when: str) -> None:
        if when == "running":
            service.work.may_go.clear()
        async with service.running() as jobs:
            document = await service.accept("a 3")
            if when == "running":
                await service.until(lambda: service.work.in_flight == 3)
            else:
                await service.done(document)
            await jobs.delete(document)
            assert service.store.ids() == set()
            assert service.work.in_flight == 0
            with pytest.raises(DocumentError, match="there is no document"):
                await jobs.status(document)


@in_a_loop
async def test_a_retry_reads_the_failed_pages_alone(service: Service) -> None:
    for number in (2, 5):
        service.work.answer(f"a 6:{number}", Page(number=number, reason="truncated"))
    async with service.running() as jobs:
        document = await service.accept("a 6")
        assert (await service.done(document)).failed == 2
        service.work.seen.clear()
        again = await jobs.retry_failed(document)
        assert (again.state, again.done, again.percent) == ("queued", 4, 66)
        assert (await service.done(document)).failed == 0
        assert sorted(service.work.seen) == [("a 6", 2), ("a 6", 5)]
        assert service.work.finished == ["a 6", "a 6"]
        with pytest.raises(DocumentError, match="has no failed pages"):
            await jobs.retry_failed(document)


@in_a_loop
async def test_the_same_request_is_one_document(service: Service) -> None:
    service.room = Room(documents=1)
    same = {"idempotency_key": "a", "request_sha256": "one"}
    service.work.may_go.clear()
    async with service.running() as jobs:
        accepted = await asyncio.gather(*(service.accept("a 3", **same) for _ in range(5)))
        assert len(set(accepted)) == 1
        with pytest.raises(DocumentError) as raised:
            await service.accept("a 3", **same | {"request_sha256": "two"})
        assert raised.value.status == 409
        service.work.may_go.set()
        await service.done(accepted[0])
        assert await service.accept("a 3", **same) == accepted[0]
        assert (await jobs.status(accepted[0])).state == "succeeded"
        assert service.work.inspected == ["a 3"]


class TestRoom:
    @pytest.mark.parametrize(
        ("room", "message"),
        [
            (Room(documents=3), "there are 3 documents with 30 pages waiting"),
            (Room(documents_per_key=2), "your key has 2 documents with 20 pages waiting"),
            (Room(pages=30), "there are 3 documents with 30 pages waiting"),
            (Room(pages_per_key=20), "your key has 2 documents with 20 pages waiting"),
        ],
    )
    @in_a_loop
    async def test_too_much_waits(self, service: Service, room: Room, message: str) -> None:
        service.room = room
        service.limit = 0
        async with service.running() as jobs:
            for name, key in (("a 10", "alice"), ("b 10", "alice"), ("c 10", "bob")):
                await service.accept(name, key)
            await service.until(lambda: jobs.load().pages == 30)
            with pytest.raises(DocumentError, match=message) as raised:
                await service.accept("d 1")
            assert (raised.value.status, raised.value.code) == (429, "queue_full")
            assert raised.value.headers == {"x-queue-position": message.split()[-6], "retry-after": "30"}
            if message.startswith("your key"):
                await service.accept("d 1", "bob")
            service.limit = 4
            for document in service.store.ids():
                await service.done(document)
            assert (await service.done(await service.accept("d 1"))).state == "succeeded"

    @in_a_loop
    async def test_is_asked_for_a_retry_too(self, service: Service) -> None:
        service.room = Room(documents=1)
        service.work.answer("finish a 1", DocumentError(500, "no", code="x"))
        async with service.running() as jobs:
            document = await service.accept("a 1")
            await service.done(document)
            service.limit = 0
            await service.accept("b 1")
            with pytest.raises(DocumentError, match="1 documents with 1 pages waiting"):
                await jobs.retry_failed(document)

    @in_a_loop
    async def test_retry_after_goes_by_the_pace(self, service: Service) -> None:
        service.room = Room(pages=10)
        service.now = 100.0
        service.limit = 1
        service.work.may_go.clear()
        async with service.running() as jobs:
            await service.accept("a 30")
            await service.until(lambda: service.work.in_flight == 1)
            service.now = 120.0
            service.limit = 0
            service.work.may_go.set()
            await service.until(lambda: jobs.load().pages == 29)
            with pytest.raises(DocumentError) as raised:
                jobs.check_room("alice")
            # 20 pages until fewer than 10 wait, at 3 a minute.
            assert raised.value.headers["retry-after"] == "400"


class TestSeams:
    @in_a_loop
    async def test_are_asked_about_when_all_pages_are_read(self, service: Service) -> None:
        service.work.seams_of["a 4"] = [1, 2, 3]
        async with service.running() as jobs:
            document = await service.accept("a 4")
            assert (await service.done(document)).state == "succeeded"
            assert service.work.joined == [("a 4", 1), ("a 4", 2), ("a 4", 3)]
            assert (len(service.work.seen), service.work.finished) == (4, ["a 4"])
            assert [service.store.joints(document, number) for number in (1, 3, 4)] == [
                [Joint(1, 0)],
                [Joint(3, 0)],
                None,
            ]
            assert jobs.load()[:3] == (0, 0, 0)

    @in_a_loop
    async def test_have_the_turns_of_pages_within_their_limit(self, service: Service) -> None:
        service.limit = 2
        service.work.seams_of["joined 2"] = list(range(1, 150))
        async with service.running():
            joined = await service.accept("joined 2")
            await service.until(lambda: len(service.work.joined) > 4)
            before = len(service.work.joined)
            await service.done(await service.accept("short 2"))
            assert len(service.work.joined) - before < 100
            other = await service.accept("other 200", "bob")
            await service.done(joined)
            assert len(service.work.joined) == 149
            # One of its pages for each seam.
            assert sum(name == "other 200" for name, _ in service.work.seen) < 190
            await service.done(other)
            assert service.work.most_in_flight == 2

    @pytest.mark.parametrize(
        ("what", "error", "known"),
        [
            ("a 3+1", RuntimeError("boom"), [None, [Joint(2, 0)]]),
            ("a 3+1", DocumentError(400, "no such profile", code="x"), [None, [Joint(2, 0)]]),
            ("seams a 3", RuntimeError("boom"), [[Joint(1, 0)], [Joint(2, 0)]]),
        ],
    )
    @in_a_loop
    async def test_fail_no_document(self, service: Service, what: str, error: Exception, known: list[Any]) -> None:
        service.work.seams_of["a 3"] = [1, 2]
        service.work.answer(what, error)
        async with service.running():
            document = await service.accept("a 3")
            status = await service.done(document)
            assert (status.state, status.done, status.error) == ("succeeded", 3, "")
            asked = bool(service.work.joined)
            assert [service.store.joints(document, number) for number in (1, 2)] == (known if asked else [None, None])
            assert asked == (what != "seams a 3")

    @pytest.mark.parametrize("answered", [0, 3, 12])
    @in_a_loop
    async def test_are_asked_about_no_more_where_nobody_answers(self, service: Service, answered: int) -> None:
        service.work.seams_of["a 2"] = list(range(1, 100))
        for number in range(answered + 1, 100):
            service.work.answer(f"a 2+{number}", DocumentError(502, "no such path", code="engine_error"))
        async with service.running() as jobs:
            document = await service.accept("a 2")
            assert (await service.done(document)).state == "succeeded"
            asked = len(service.work.joined)
            assert answered + MOST_UNANSWERED <= asked <= answered + MOST_UNANSWERED + 2 * service.limit
            assert service.store.joints(document, answered) == ([Joint(answered, 0)] if answered else None)
            assert jobs.load()[:3] == (0, 0, 0)

    @in_a_loop
    async def test_are_all_asked_about_where_some_are_not_answered(self, service: Service) -> None:
        service.limit = 1
        service.work.seams_of["a 2"] = list(range(1, 31))
        for number in range(1, 31):
            if number % MOST_UNANSWERED:
                service.work.answer(f"a 2+{number}", DocumentError(502, "no such path", code="engine_error"))
        async with service.running():
            assert (await service.done(await service.accept("a 2"))).state == "succeeded"
            assert len(service.work.joined) == 30

    @pytest.mark.parametrize("what", ["a 3+1", "seams a 3"])
    @pytest.mark.parametrize("status", [429, 503])
    @in_a_loop
    async def test_wait_for_the_engine(self, service: Service, what: str, status: int) -> None:
        service.work.seams_of["a 3"] = [1, 2]
        service.work.answer(what, DocumentError(status, "later", code="x", headers={"retry-after": "1"}))
        async with service.running():
            document = await service.accept("a 3")
            assert (await service.done(document)).state == "succeeded"
            assert {number for _, number in service.work.joined} == {1, 2}
            assert [service.store.joints(document, number) for number in (1, 2)] == [[Joint(1, 0)], [Joint(2, 0)]]

    @in_a_loop
    async def test_end_with_a_cancellation(self, service: Service) -> None:
        service.work.seams_of["a 2"] = list(range(1, 1000))
        async with service.running() as jobs:
            document = await service.accept("a 2")
            await service.until(lambda: bool(service.work.joined))
            service.work.may_go.clear()
            await service.until(lambda: service.work.in_flight == 4)
            assert (await jobs.cancel(document)).state == "cancelled"
            assert service.work.in_flight == 0
            assert jobs.load()[:3] == (0, 0, 0)


class TestStatus:
    @in_a_loop
    async def test_says_how_far_it_is(self, service: Service) -> None:
        service.now = 1000.0
        service.limit = 0
        service.work.may_go.clear()
        async with service.running() as jobs:
            long, short = await service.accept("long 30"), await service.accept("short 4", "bob")
            await service.until(lambda: jobs.load().pages == 34)
            service.limit = 2
            await service.until(lambda: service.work.in_flight == 2)
            service.now = 1010.0
            service.limit = 0
            service.work.may_go.set()
            await service.until(lambda: jobs.load().pages == 32)
            status = await jobs.status(long)
            assert (status.state, status.pages, status.done, status.percent) == ("running", 30, 1, 3)
            assert (status.position, (await jobs.status(short)).position) == (1, 0)
            # 32 pages are left, and 2 in 10 seconds were read.
            assert status.pages_per_minute == 6
            assert status.seconds_left == 160
            # Three of its own and three of the other's.
            assert (await jobs.status(short)).seconds_left == 30
            assert status.duration_ms is not None
            assert status.finished_at is None

    @in_a_loop
    async def test_of_one_that_waits(self, service: Service) -> None:
        service.limit = 0
        async with service.running() as jobs:
            documents = [await service.accept(f"{name} {pages}") for name, pages in (("a", 5), ("b", 2), ("c", 9))]
            await service.until(lambda: jobs.load().pages == 16)
            statuses = [await jobs.status(document) for document in documents]
            assert [status.state for status in statuses] == ["queued"] * 3
            assert [status.position for status in statuses] == [1, 0, 2]
            assert {(status.percent, status.seconds_left, status.duration_ms) for status in statuses} == {
                (0, None, None)
            }

    @in_a_loop
    async def test_is_waited_for(self, service: Service) -> None:
        service.limit = 0
        async with service.running() as jobs:
            document = await service.accept("a 2")
            assert not (await jobs.wait(document, 0)).is_finished
            assert not (await jobs.wait(document, 0.02)).is_finished
            waiting = [asyncio.create_task(jobs.wait(document, 20)) for _ in range(3)]
            await asyncio.sleep(0.02)
            service.limit = 1
            assert [(await task).state for task in waiting] == ["succeeded"] * 3
            assert (await jobs.wait(document, 0)).state == "succeeded"
            assert jobs._subscribers == {}


class TestEvents:
    @in_a_loop
    async def test_tell_each_change(self, service: Service) -> None:
        service.limit = 0
        async with service.running() as jobs:
            document = await service.accept("a 5")
            events = jobs.events(document)
            first = await anext(events)
            service.limit = 1
            seen = [first] + [status async for status in events]
            assert [status.done for status in seen] == sorted(status.done for status in seen)
            assert {status.done for status in seen} == set(range(6))
            assert [state for state, _ in itertools.groupby(status.state for status in seen)] == [
                "queued",
                "running",
                "succeeded",
            ]
            assert [status.state async for status in jobs.events(document)] == ["succeeded"]
            assert jobs._subscribers == {}

    @in_a_loop
    async def test_who_is_slow_gets_the_newest(self, service: Service) -> None:
        service.limit = 0
        async with service.running() as jobs:
            document = await service.accept("a 200")
            slow = jobs.events(document)
            await anext(slow)
            service.limit = 8
            await service.done(document)
            rest = [status async for status in slow]
            assert len(rest) <= CHANGES
            assert rest[-1].state == "succeeded"

    @in_a_loop
    async def test_who_leaves_is_forgotten(self, service: Service) -> None:
        service.limit = 0
        async with service.running() as jobs:
            document = await service.accept("a 5")

            async def follow() -> None:
                async with contextlib.aclosing(jobs.events(document)) as events:
                    async for _ in events:
                        pass

            followers = [asyncio.create_task(follow()) for _ in range(3)]
            await asyncio.sleep(0.02)
            for follower in followers:
                follower.cancel()
            await asyncio.wait(followers)
            assert jobs._subscribers == {}

    @in_a_loop
    async def test_end_with_a_cancellation(self, service: Service) -> None:
        service.limit = 0
        async with service.running() as jobs:
            document = await service.accept("a 5")
            events = jobs.events(document)
            await anext(events)
            await jobs.delete(document)
            assert [status.state async for status in events][-1] == "cancelled"

    @in_a_loop
    async def test_of_an_unknown_document(self, service: Service) -> None:
        async with service.running() as jobs:
            with pytest.raises(DocumentError, match="there is no document"):
                await anext(jobs.events("f" * 32))
            assert jobs._subscribers == {}


class TestStop:
    @in_a_loop
    async def test_gives_up_what_is_in_flight_and_goes_on_with_it(self, service: Service) -> None:
        service.work.may_go.clear()
        async with service.running() as jobs:
            document = await service.accept("a 6")
            waiting = await service.accept("b 2", "bob")
            await service.until(lambda: service.work.in_flight == 4 and jobs.load().pages == 8)
        assert len(service.work.given_up) == 4
        service.work.may_go.set()
        async with service.running() as jobs:
            assert (await service.done(document)).done == 6
            assert (await service.done(waiting)).done == 2
            assert jobs.load()[:3] == (0, 0, 0)
        assert service.work.inspected == ["a 6", "b 2"]

    @in_a_loop
    async def test_between_the_last_page_and_the_products(self, service: Service) -> None:
        service.work.answer("finish a 2", DocumentError(503, "later", code="x", headers={"retry-after": "60"}))
        async with service.running() as jobs:
            document = await service.accept("a 2")
            await service.until(lambda: jobs.load().pages == 0)
            await service.until(lambda: not service.work.answers["finish a 2"])
        async with service.running():
            assert (await service.done(document)).state == "succeeded"
        assert len(service.work.seen) == 2


@in_a_loop
async def test_a_disk_that_fails_loses_no_page(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STORE_RETRY_SECONDS", 0.01)
    async with service.running() as jobs:
        document = await service.accept("a 30")
        await service.until(lambda: len(service.work.seen) > 8)
        connection = service.store._engine.raw_connection()
        connection.cursor().execute("PRAGMA query_only = ON")
        seen = len(service.work.seen)
        await asyncio.sleep(0.2)
        assert len(service.work.seen) - seen <= 2 * service.limit
        with pytest.raises(StoreError, match="try again later"):
            await service.accept("b 1")
        connection.cursor().execute("PRAGMA query_only = OFF")
        connection.close()
        assert (await service.done(document)).done == 30
        assert Counter(service.work.seen).most_common(1)[0][1] == 1
        assert jobs.load().documents == 0


# A service of its own, to be killed

KILLS = 4
LIMIT = 4
SENT = {"long 200": "alice", "middling 40": "alice", "short 3": "bob"}


class LoggedScans:
    """The work of the child: each page that is read, and each document that is finished, is a line."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.log = (folder / "log").open("a", buffering=1, encoding="utf-8")
        self.store = store

    async def inspect(self, document: Document) -> Sequence[int]:
        return range(1, int(document.name.split()[1]) + 1)

    async def read(self, document: Document, number: int) -> Page:
        self.log.write(json.dumps(["read", document.id, number]) + "\n")
        await asyncio.sleep(0.005)
        return Page(number=number, markdown=f"page {number} of {document.name}")

    async def seams(self, document: Document) -> Sequence[int]:
        return self.store.seams(document.id)

    async def join(self, document: Document, number: int) -> Sequence[Joint] | None:
        self.log.write(json.dumps(["join", document.id, number]) + "\n")
        await asyncio.sleep(0.005)
        return [] if number % 2 else None

    async def finish(self, document: Document) -> int:
        pages = self.store.results(document.id, most=1000)
        self.log.write(json.dumps(["finish", document.id, len(pages)]) + "\n")
        return 1


async def serve(folder: Path) -> None:
    store = Store(folder / "documents.db")
    jobs = Jobs(store, LoggedScans(folder, store), lambda: LIMIT)
    await jobs.start()
    for nth, (name, key) in enumerate(SENT.items()):
        upload = Upload(
            id=f"{nth:032x}", name=name, kind="pdf", key=key, options=Options(), size=1, idempotency_key=name
        )
        await jobs.accept(upload)
    for nth in range(len(SENT)):
        await jobs.wait(f"{nth:032x}", 60)
    await jobs.stop()
    store.close()


def child(folder: Path) -> None:
    asyncio.run(serve(folder))


def lines(folder: Path) -> list[tuple[str, str, int]]:
    """What the child did, of which document, and which page; of a document that it finished, how many."""
    log = folder / "log"
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def pages_read(done: list[tuple[str, str, int]]) -> set[tuple[str, int]]:
    return {(document, number) for what, document, number in done if what == "read"}


@contextlib.contextmanager
def started(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    script = f"from pathlib import Path; from tests.documents.test_jobs import child; child(Path({str(folder)!r}))"
    with subprocess.Popen([sys.executable, "-c", script], cwd=CHECKOUT) as process:
        yield process
        process.kill()


def run_to_the_end(folder: Path) -> None:
    with started(folder) as process:
        assert process.wait(60) == 0


def run_and_kill(folder: Path, lines_until: int, seconds: float) -> None:
    """So many lines on, and a moment later."""
    goal = len(lines(folder)) + lines_until
    with started(folder) as process:
        deadline = time.monotonic() + 60
        while len(lines(folder)) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(seconds)
        process.kill()


def committed(folder: Path) -> set[tuple[str, int]]:
    store = Store(folder / "documents.db")
    try:
        return {(document, page.number) for document in store.ids() for page in store.results(document, most=1000)}
    finally:
        store.close()


def test_killed_at_any_moment_it_goes_on_and_reads_no_page_twice(tmp_path: Path) -> None:
    dice = random.Random()
    documents = {f"{nth:032x}": int(name.split()[1]) for nth, name in enumerate(SENT)}
    for _ in range(KILLS):
        done, before = committed(tmp_path), len(lines(tmp_path))
        # Each run gets some pages done, and is killed at a moment that is another one each time.
        run_and_kill(tmp_path, dice.randint(12, 25), dice.random() * 0.02)
        assert not pages_read(lines(tmp_path)[before:]) & done
    done, before = committed(tmp_path), len(lines(tmp_path))
    assert 0 < len(done) < sum(documents.values())
    run_to_the_end(tmp_path)
    every = lines(tmp_path)
    assert not pages_read(every[before:]) & done
    assert pages_read(every) == {(each, number) for each, pages in documents.items() for number in range(1, pages + 1)}
    # Those that a kill caught in flight were read again; nothing else was.
    assert sum(what == "read" for what, *_ in every) <= sum(documents.values()) + KILLS * LIMIT
    # An answer that was stored is not asked for again, be it one or not.
    seams = [(document, number) for what, document, number in every if what == "join"]
    assert set(seams) == {(each, number) for each, pages in documents.items() for number in range(1, pages)}
    assert len(seams) <= len(set(seams)) + KILLS * LIMIT
    finishes = [(document, pages) for what, document, pages in every if what == "finish"]
    assert dict(finishes) == documents
    # Once, but for a kill between the products and their row.
    assert len(finishes) <= len(documents) + KILLS
    assert finishes.count(("0" * 32, 200)) == 1
    run_to_the_end(tmp_path)
    assert lines(tmp_path) == every
