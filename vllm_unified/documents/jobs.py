"""Whose page is read next: fair over keys and documents, durable, within one limit of pages in flight."""

import asyncio
import contextlib
import functools
import logging
import math
import time
from bisect import bisect_left, insort
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, TypeVar

import msgspec

from vllm_unified.documents.joining import Joint
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.store import Document, Outcome, State, Store, StoreError, Upload
from vllm_unified.tracing import current

LOOK_SECONDS = 0.25  # how often the limit is asked when nothing else happens
STORE_RETRY_SECONDS = 1.0
STOP_SECONDS = 5.0  # how long a cancelled task may take to end
INSPECTIONS = 2
FINISHES = 2
# Questions about the page breaks of a document, one after the other, without an answer: it does not wait for more.
MOST_UNANSWERED = 8
PACE_SECONDS = 180
PLACES_SECONDS = 1.0  # how old the estimate of the order may be
CHANGES = 16  # that a subscriber may be behind before it is given the newest alone
# Answers of the OCR model's server that say nothing of the page: the key's limit is reached; the engine is away.
KEY_MUST_WAIT, ALL_MUST_WAIT = 429, 503
PAUSE_SECONDS, LONGEST_PAUSE = 5.0, 60.0  # the first where the answer has no Retry-After
RETRY_AFTER, LONGEST_RETRY_AFTER = 30, 600  # seconds; the first where the pace is not known yet
FAULT = "the service failed at this page; its log says how"

Stage = Literal["inspect", "read", "finish"]
P = ParamSpec("P")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Work(Protocol):
    """What is done with a document. Each may be cancelled at any moment, and done again after that.

    A DocumentError 429 (the key's limits) or 503 (the engine is away) is none of the document's: the same is tried
    again after its Retry-After. Any other exception of `read` fails the page, of `inspect` or `finish` the document;
    of `seams` or `join` it leaves the page breaks to our own rules.
    """

    async def inspect(self, document: Document) -> Sequence[int]:
        """The numbers of the pages to read, at least one, in their order: range(1, 11) is all of ten."""

    async def read(self, document: Document, number: int) -> Page:
        """What came of it; one with a `reason` has failed."""

    async def seams(self, document: Document) -> Sequence[int]:
        """When all pages are dealt with: those after which the model is to be asked what goes on in the next page."""

    async def join(self, document: Document, number: int) -> Sequence[Joint] | None:
        """What goes on from page `number` in the next; None: it was not asked."""

    async def finish(self, document: Document) -> int:
        """Write the products, atomically; the bytes of all files of the document. Once, but for a kill meanwhile."""


class Room(msgspec.Struct, frozen=True):
    """How much may wait: documents that have not finished, and their pages that were not dealt with."""

    documents: int = 1000
    pages: int = 100_000
    documents_per_key: int = 500
    pages_per_key: int = 50_000


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A document now. Times are unix seconds; `duration_ms` from its start to its end, or until now.

    `position`: how many documents are expected to have all their pages read before this one; None once finished.
    `pages` is None until it was inspected. `percent` is 100 only when it has succeeded. `pages_per_minute` and
    `seconds_left` (None: not known) are estimates from the last minutes.
    """

    id: str
    name: str
    kind: str
    key: str
    state: State
    position: int | None
    pages: int | None
    done: int
    failed: int
    percent: int
    pages_per_minute: float
    seconds_left: float | None
    queued_at: float
    started_at: float | None
    finished_at: float | None
    updated_at: float
    duration_ms: int | None
    error: str

    @property
    def is_finished(self) -> bool:
        return self.finished_at is not None


class Turns:
    """Whose turn it is: the keys one after the other, and of a key its documents, one turn each time."""

    def __init__(self) -> None:
        # Key → document → turns that it still wants; both in the order of their next turn.
        self._keys: OrderedDict[str, OrderedDict[str, int]] = OrderedDict()

    def add(self, key: str, document: str, turns: int = 1) -> None:
        """Behind all others, unless it waits already."""
        documents = self._keys.setdefault(key, OrderedDict())
        documents[document] = documents.get(document, 0) + turns

    def remove(self, key: str, document: str) -> None:
        documents = self._keys.get(key, OrderedDict())
        documents.pop(document, None)
        if not documents:
            self._keys.pop(key, None)

    def take(self, most: int, paused: Collection[str] = ()) -> list[str]:
        """The documents of the next turns, at most `most`; the keys that are paused keep their places."""
        taken: list[str] = []
        while len(taken) < most:
            key = next((key for key in self._keys if key not in paused), None)
            if key is None:
                break
            taken.append(self._take_from(key))
        return taken

    def __iter__(self) -> Iterator[str]:
        return (document for documents in self._keys.values() for document in documents)

    def _take_from(self, key: str) -> str:
        documents = self._keys[key]
        self._keys.move_to_end(key)
        document = next(iter(documents))
        documents.move_to_end(document)
        documents[document] -= 1
        if not documents[document]:
            self.remove(key, document)
        return document


class Load(NamedTuple):
    """Documents that have not finished; their pages that were not dealt with, those in flight among them."""

    documents: int
    pages: int
    in_flight: int
    pages_per_minute: float


class Place(NamedTuple):
    """`ahead`: documents that end before this one; `pages`: how many of all documents are read until its last is."""

    ahead: int
    pages: int


def places(left: Mapping[str, Mapping[str, int]]) -> dict[str, Place]:
    """Of every document, where nothing else comes and each page takes as long as another.

    `left`: key → document → pages that are not read, both in the order of their next turn.
    """
    rounds = sorted(
        (turn, nth, document)
        for nth, documents in enumerate(left.values())
        for document, turn in zip(documents, _last_turns(list(documents.values())), strict=True)
    )
    totals = sorted(sum(documents.values()) for documents in left.values())
    sums = [0, *accumulate(totals)]
    found = {}
    for ahead, (turn, _, document) in enumerate(rounds):
        ended = bisect_left(totals, turn)  # keys that have nothing left by then
        found[document] = Place(ahead, sums[ended] + turn * (len(totals) - ended))
    return found


def _last_turns(left: Sequence[int]) -> list[int]:
    """Which turn of its key is the last one of each document, counted from 1.

    Until then each other document has had as many turns as this one wants, or as it wants itself; one less where it
    comes after this one.
    """
    ordered = sorted(left)
    sums = [0, *accumulate(ordered)]
    after: list[int] = []  # sorted
    turns = []
    for mine in reversed(left):
        smaller = bisect_left(ordered, mine)
        as_many_after = len(after) - bisect_left(after, mine)
        turns.append(sums[smaller] + mine * (len(ordered) - smaller) - as_many_after)
        insort(after, mine)
    return turns[::-1]


class Pace:
    """Pages a minute, over the last PACE_SECONDS or since it began. `now`: a clock that never goes back."""

    def __init__(self) -> None:
        self._begun = 0.0
        self._counts: deque[tuple[int, int]] = deque()  # second, pages

    def begin(self, now: float) -> None:
        """A page is begun; what came before a longer pause counts no more."""
        self._forget(now)
        if not self._counts:
            self._begun = now

    def add(self, now: float) -> None:
        second = int(now)
        count = self._counts.pop()[1] if self._counts and self._counts[-1][0] == second else 0
        self._counts.append((second, count + 1))

    def per_minute(self, now: float) -> float:
        self._forget(now)
        seconds = max(1.0, min(PACE_SECONDS, now - self._begun))
        return 60 * sum(count for _, count in self._counts) / seconds

    def _forget(self, now: float) -> None:
        while self._counts and self._counts[0][0] <= now - PACE_SECONDS:
            self._counts.popleft()


class _Active:
    """A document that has not finished."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.tasks: set[asyncio.Task[None]] = set()
        self.pace = Pace()
        self.seams: deque[int] = deque()  # that are to be asked about
        self.unjoined = 0  # those, and what is being asked
        self.unanswered = 0  # questions about seams, in a row
        self.is_ending = False

    @property
    def left(self) -> int:
        """Pages that were not dealt with; 1 where nobody knows yet."""
        document = self.document
        return 1 if document.pages is None else document.pages - document.done - document.failed

    def change(self, **fields: Any) -> None:
        self.document = msgspec.structs.replace(self.document, **fields)


class Jobs:
    """Between `start` and `stop` it works on what the store has. All methods belong to one event loop.

    `limit()`: how many pages may be in flight; asked before each start, 0 is a pause. `note(page)`: told of each page
    when what came of it is stored; `ended(document)`: of each that has finished. `clock` is unix time.
    """

    def __init__(
        self,
        store: Store,
        work: Work,
        limit: Callable[[], int],
        *,
        room: Room = Room(),  # noqa: B008 - frozen
        note: Callable[[Page], None] = lambda page: None,
        ended: Callable[[Document], None] = lambda document: None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._work = work
        self._limit = limit
        self._room = room
        self._note = note
        self._note_end = ended
        self._clock = clock
        self._monotonic = monotonic
        # One thread, so that what was asked first is stored first.
        self._disk = ThreadPoolExecutor(1, "documents-store")
        self._active: dict[str, _Active] = {}
        self._turns: dict[Stage, Turns] = {"inspect": Turns(), "read": Turns(), "finish": Turns()}
        self._in_flight: Counter[Stage] = Counter()
        self._paused: dict[str | None, float] = {}  # a key, or None: all → until then
        self._pace = Pace()
        self._places: dict[str, Place] = {}
        self._placed_at = -math.inf
        self._accepting = asyncio.Lock()
        self._woken = asyncio.Event()
        self._subscribers: dict[str, set[asyncio.Queue[Status]]] = {}
        self._promised: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Go on with what the last run left."""
        for document in await self._ask(self._store.resume, self._clock()):
            if document.is_finished:
                self._note_end(document)
            else:
                self._add(document)
        self._loop = asyncio.create_task(self._run(), name="documents")

    async def stop(self) -> None:
        """Give up what is in flight; the next start does it again."""
        if self._promised:
            await asyncio.wait(list(self._promised), timeout=STOP_SECONDS)
        loops = [] if self._loop is None else [self._loop]
        await _end([*loops, *self._promised, *(task for active in self._active.values() for task in active.tasks)])
        try:
            await self._ask(self._store.give_all_back)
        except StoreError:
            log.warning("the pages in flight could not be given back; the next start finds them")
        await asyncio.to_thread(self._disk.shutdown)

    async def accept(self, upload: Upload) -> Document:
        """Queue it; it is stored when this returns.

        The document that was sent before with the same idempotency key is returned in its place: its `id` differs.
        Raises DocumentError 409 when that one was another request, 429 when too much waits, 503 when the disk fails.
        """
        return await self._promise(self._accept(upload))

    def load(self) -> Load:
        """Of all keys."""
        left = sum(active.left for active in self._active.values())
        pace = round(self._pace.per_minute(self._monotonic()), 1)
        return Load(len(self._active), left, self._in_flight["read"], pace)

    def check_room(self, key: str) -> None:
        """Before an upload is read. Raises DocumentError 429 with x-queue-position and retry-after."""
        everybody = list(self._active.values())
        of_key = [active for active in everybody if active.document.key == key]
        room = self._room
        _check_room("your key has", of_key, room.documents_per_key, room.pages_per_key, self._seconds_for)
        _check_room("there are", everybody, room.documents, room.pages, self._seconds_for)

    async def status(self, document: str) -> Status:
        """Raises DocumentError 404."""
        active = self._active.get(document)
        if active is not None:
            return self._status(active)
        return _status(await self._ask(self._store.get, document))

    async def wait(self, document: str, seconds: float) -> Status:
        """Its status when it has finished, or after that time. Raises DocumentError 404."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), contextlib.aclosing(self.events(document)) as events:
                async for status in events:
                    if status.is_finished:
                        return status
        return await self.status(document)

    async def events(self, document: str) -> AsyncGenerator[Status, None]:
        """Its status now and after each change, until it has finished. Raises DocumentError 404.

        Who takes them more slowly than they come misses some, never the newest.
        """
        changes: asyncio.Queue[Status] = asyncio.Queue(CHANGES)
        self._subscribers.setdefault(document, set()).add(changes)
        try:
            status = await self.status(document)
            yield status
            while not status.is_finished:
                status = await changes.get()
                yield status
        finally:
            self._subscribers[document].discard(changes)
            if not self._subscribers[document]:
                del self._subscribers[document]

    async def cancel(self, document: str) -> Status:
        """Stop its pages, those in flight too; what was read stays.

        Raises DocumentError 404, 409 when it has finished.
        """
        return await self._promise(self._cancel(document))

    async def retry_failed(self, document: str, password: str = "") -> Status:
        """Read its failed pages again, and those that a cancellation left unread; or inspect or finish it again.

        `password`: of the file, where it needs one: it was forgotten when the document had finished.
        Raises DocumentError 404, 409 when there is nothing to retry, 429 when too much waits.
        """
        return await self._promise(self._retry_failed(document, password))

    async def delete(self, document: str) -> None:
        """Cancelled before, where it has not finished. Its files are the caller's to delete then.

        Raises DocumentError 404.
        """
        await self._promise(self._delete(document))

    # What clients ask for

    async def _promise(self, verb: Coroutine[Any, Any, Result]) -> Result:
        """It goes on to its end even where who asked for it leaves: memory and store must say the same."""
        task = asyncio.create_task(verb)
        self._promised.add(task)
        task.add_done_callback(self._promised.discard)
        return await asyncio.shield(task)

    async def _accept(self, upload: Upload) -> Document:
        async with self._accepting:
            earlier = await self._ask(self._store.sent_before, upload)
            if earlier is not None:
                return earlier
            self.check_room(upload.key)
            document = await self._ask(self._store.accept, upload, self._clock())
            self._add(document)
            return document

    async def _retry_failed(self, document: str, password: str) -> Status:
        async with self._accepting:
            self.check_room((await self._ask(self._store.get, document)).key)
            queued = await self._ask(self._store.retry_failed, document, password, self._clock(), current())
            return self._status(self._add(queued))

    async def _cancel(self, document: str) -> Status:
        async with self._accepting:  # no retry begins it anew meanwhile
            await self._give_up(document)
            was_unfinished = await self._insist(self._store.cancel, document, self._clock())
            status = await self._ended(document)
        if not was_unfinished:
            message = f"document {document} is {status.state}; there is nothing to cancel"
            raise DocumentError(409, message, code="document_finished")
        return status

    async def _delete(self, document: str) -> None:
        async with self._accepting:
            await self._give_up(document)
            await self._insist(self._store.cancel, document, self._clock())
            await self._ended(document)
            await self._insist(self._store.delete, document)

    async def _give_up(self, document: str) -> None:
        active = self._active.get(document)
        if active is None:
            return
        active.is_ending = True
        for turns in self._turns.values():
            turns.remove(active.document.key, document)
        await _end(active.tasks)

    async def _ended(self, document: str) -> Status:
        """Its end is stored, and nothing was awaited since: a retry that is stored next adds it anew.

        A cancellation may come while an end is stored, or after it: who finds the document active notes its end.
        """
        active = self._active.pop(document, None)
        self._placed_at = -math.inf
        ended = await self._insist(self._store.get, document)
        if active is not None:
            self._note_end(ended)
        status = _status(ended)
        self._tell(status)
        return status

    # What is started

    def _add(self, document: Document) -> _Active:
        active = self._active[document.id] = _Active(document)
        stage: Stage = "inspect" if document.pages is None else "read" if active.left else "finish"
        self._turns[stage].add(document.key, document.id, active.left if stage == "read" else 1)
        self._placed_at = -math.inf
        self._publish(active)
        self._woken.set()
        return active

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                self._start("inspect", INSPECTIONS, self._inspect)
                await self._start_pages()
                self._start("finish", FINISHES, self._finish)
            except StoreError:  # the store has logged it
                await asyncio.sleep(STORE_RETRY_SECONDS)
            except Exception:
                log.exception("the queue of documents stumbled; it goes on")
                await asyncio.sleep(STORE_RETRY_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._woken.wait()

    def _start(self, stage: Stage, limit: int, do: Callable[[_Active], Coroutine[Any, Any, None]]) -> None:
        for document in self._take(stage, limit):
            active = self._active[document]
            self._spawn(stage, active, do(active))

    async def _start_pages(self) -> None:
        chosen = self._start_joins(self._take("read", self._limit()))
        if not chosen:
            return
        try:
            started = await self._ask(self._store.start_pages, Counter(chosen), self._clock())
        except StoreError:
            for document in chosen:
                self._wait_again("read", document)
            raise
        for document, number in started:
            active = self._active.get(document)
            if active is not None and not active.is_ending:
                self._spawn("read", active, self._read(active, number))

    def _start_joins(self, chosen: list[str]) -> list[str]:
        """A document whose pages are all dealt with has its turns for its seams. The others are left."""
        pages = []
        for document in chosen:
            active = self._active[document]
            if active.seams:
                self._spawn("read", active, self._join(active, active.seams.popleft()))
            else:
                pages.append(document)
        return pages

    def _take(self, stage: Stage, limit: int) -> list[str]:
        now = self._monotonic()
        self._paused = {who: until for who, until in self._paused.items() if until > now}
        if None in self._paused:
            return []
        paused = {key for key in self._paused if key is not None}
        return self._turns[stage].take(limit - self._in_flight[stage], paused)

    def _wait_again(self, stage: Stage, document: str) -> None:
        active = self._active.get(document)
        if active is not None and not active.is_ending:
            self._turns[stage].add(active.document.key, document)

    def _spawn(self, stage: Stage, active: _Active, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        active.tasks.add(task)
        self._in_flight[stage] += 1

        def ended(task: asyncio.Task[None]) -> None:
            active.tasks.discard(task)
            self._in_flight[stage] -= 1
            self._woken.set()
            if not task.cancelled() and task.exception() is not None:
                log.error("document %s: %s ended badly", active.document.id, stage, exc_info=task.exception())

        task.add_done_callback(ended)

    # What is done

    async def _inspect(self, active: _Active) -> None:
        found = await self._attempt("inspect", active, self._work.inspect)
        if found is None:
            return
        numbers = sorted(set(found))
        if not numbers:
            await self._finished(active, "failed", error="the document has no pages")
        elif await self._insist(self._store.inspected, active.document.id, numbers, self._clock()):
            active.change(pages=len(numbers), updated_at=self._clock())
            self._turns["read"].add(active.document.key, active.document.id, len(numbers))
            self._placed_at = -math.inf
            self._publish(active)

    async def _read(self, active: _Active, number: int) -> None:
        self._begin_page(active)
        page = await self._page(active, number)
        document = active.document.id
        if active.is_ending:
            return
        if page is None:
            if await self._insist(self._store.give_back, document, number):
                self._wait_again("read", document)
        else:
            await self._keep(active, number, page)

    def _begin_page(self, active: _Active) -> None:
        for pace in (active.pace, self._pace):
            pace.begin(self._monotonic())
        if active.document.state == "queued":
            started_at = active.document.started_at or self._clock()
            active.change(state="running", started_at=started_at, updated_at=self._clock())
            self._publish(active)

    async def _page(self, active: _Active, number: int) -> Page | None:
        """None: not now."""
        try:
            return await _whole(self._work.read(active.document, number))
        except DocumentError as error:
            if self._pause(error, active.document.key):
                return None
            return _given_up(number, str(error))
        except Exception:
            log.exception("document %s, page %d", active.document.id, number)
            return _given_up(number, FAULT)

    async def _keep(self, active: _Active, number: int, page: Page) -> None:
        document = active.document.id
        try:
            is_kept = await self._insist(self._store.page_done, document, number, page, self._clock())
        except (TypeError, ValueError, OverflowError):  # no UTF-8, or no plain numbers
            log.exception("document %s, page %d can't be stored", document, number)
            page = _given_up(number, FAULT)
            is_kept = await self._insist(self._store.page_done, document, number, page, self._clock())
        if is_kept:
            self._count(active, page)

    def _count(self, active: _Active, page: Page) -> None:
        self._note(page)
        now = self._monotonic()
        active.pace.add(now)
        self._pace.add(now)
        counted = active.document.failed + 1 if page.reason else active.document.done + 1
        active.change(**{"failed" if page.reason else "done": counted}, updated_at=self._clock())
        if not active.left and not active.is_ending:
            self._turns["finish"].add(active.document.key, active.document.id)
        self._publish(active)

    async def _join(self, active: _Active, number: int) -> None:
        document, joints = active.document, None
        try:
            joints = await _whole(self._work.join(document, number))
            active.unanswered = 0
        except Exception as error:
            if self._pause(error, document.key):
                await self._insist(self._store.attempt_ended, document.id)
                active.seams.appendleft(number)
                self._wait_again("read", document.id)
                return
            is_ours = not isinstance(error, DocumentError)
            log.warning("document %s, from page %d to the next: %s", document.id, number, error, exc_info=is_ours)
            self._count_unanswered(active)
        if await self._insist(self._store.keep_joints, document.id, number, joints, self._clock()):
            active.unjoined -= 1
            if not active.unjoined and not active.is_ending:
                self._turns["finish"].add(document.key, document.id)

    def _count_unanswered(self, active: _Active) -> None:
        active.unanswered += 1
        if active.unanswered >= MOST_UNANSWERED:
            log.warning("document %s: nothing more is asked about its page breaks", active.document.id)
            self._turns["read"].remove(active.document.key, active.document.id)
            active.unjoined -= len(active.seams)
            active.seams.clear()

    async def _finish(self, active: _Active) -> None:
        seams = await self._seams(active)
        if seams is None:
            return
        if seams:
            await self._insist(self._store.attempt, active.document.id)
            active.seams, active.unjoined = deque(seams), len(seams)
            self._turns["read"].add(active.document.key, active.document.id, len(seams))
            return
        size = await self._attempt("finish", active, self._work.finish)
        if size is not None:
            await self._finished(active, "succeeded", size=size)

    async def _seams(self, active: _Active) -> Sequence[int] | None:
        """None: not now."""
        if active.unanswered >= MOST_UNANSWERED:
            return ()
        try:
            return await _whole(self._work.seams(active.document))
        except Exception as error:
            if self._pause(error, active.document.key):
                self._wait_again("finish", active.document.id)
                return None
            log.exception("document %s: its seams", active.document.id)
            return ()

    async def _attempt(
        self, stage: Stage, active: _Active, work: Callable[[Document], Awaitable[Result]]
    ) -> Result | None:
        """None: not now, or the document has failed."""
        await self._insist(self._store.attempt, active.document.id)
        try:
            return await _whole(work(active.document))
        except DocumentError as error:
            if self._pause(error, active.document.key):
                await self._insist(self._store.attempt_ended, active.document.id)
                self._wait_again(stage, active.document.id)
                return None
            message = str(error)
        except Exception:
            log.exception("document %s: %s", active.document.id, stage)
            message = f"the service could not {stage} the document; its log says why"
        await self._finished(active, "failed", error=message)
        return None

    async def _finished(self, active: _Active, outcome: Outcome, *, size: int = 0, error: str = "") -> None:
        document = active.document.id
        error = error.encode(errors="replace").decode()  # it may quote what is no UTF-8
        if await self._insist(self._store.finish, document, outcome, self._clock(), size=size, error=error):
            await self._ended(document)

    def _pause(self, error: Exception, key: str) -> bool:
        """Whether the error is none of the document's: its key, or all, wait for a while."""
        if not isinstance(error, DocumentError) or error.status not in (KEY_MUST_WAIT, ALL_MUST_WAIT):
            return False
        seconds = _retry_after(error.headers.get("retry-after", ""))
        who = key if error.status == KEY_MUST_WAIT else None
        self._paused[who] = max(self._paused.get(who, 0.0), self._monotonic() + seconds)
        return True

    # What is told

    def _status(self, active: _Active) -> Status:
        place = self._place(active.document.id)
        pace = self._pace.per_minute(self._monotonic())
        return msgspec.structs.replace(
            _status(active.document, self._clock()),
            position=place.ahead,
            pages_per_minute=round(active.pace.per_minute(self._monotonic()), 1),
            seconds_left=round(60 * place.pages / pace, 1) if pace and active.document.pages is not None else None,
        )

    def _place(self, document: str) -> Place:
        now = self._monotonic()
        if now - self._placed_at > PLACES_SECONDS:
            self._places, self._placed_at = places(self._left()), now
        return self._places[document]

    def _left(self) -> dict[str, dict[str, int]]:
        """Those first whose last pages are in flight."""
        waiting = [*self._turns["read"], *self._turns["inspect"]]
        left: dict[str, dict[str, int]] = {}
        in_flight = self._active.keys() - set(waiting)
        for document in [*(document for document in self._active if document in in_flight), *waiting]:
            active = self._active[document]
            left.setdefault(active.document.key, {})[document] = active.left
        return left

    def _seconds_for(self, pages: int) -> int:
        """Until as many are read, of whichever document."""
        pace = self._pace.per_minute(self._monotonic())
        seconds = math.ceil(60 * pages / pace) if pace else RETRY_AFTER
        return max(1, min(LONGEST_RETRY_AFTER, seconds))

    def _publish(self, active: _Active) -> None:
        if active.document.id in self._subscribers and not active.is_ending:
            self._tell(self._status(active))

    def _tell(self, status: Status) -> None:
        for changes in self._subscribers.get(status.id, ()):
            if changes.full():
                while not changes.empty():
                    changes.get_nowait()
            changes.put_nowait(status)

    # The store, off the event loop

    async def _ask(self, verb: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        question = functools.partial(verb, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._disk, question)

    async def _insist(self, verb: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """For what must not get lost: again and again until the disk takes it."""
        while True:
            try:
                return await self._ask(verb, *args, **kwargs)
            except StoreError:
                await asyncio.sleep(STORE_RETRY_SECONDS)


def _check_room(
    who: str, waiting: Sequence[_Active], documents: int, pages: int, seconds_for: Callable[[int], int]
) -> None:
    left = sum(active.left for active in waiting)
    if len(waiting) < documents and left < pages:
        return
    message = f"{who} {len(waiting)} documents with {left} pages waiting; come back later, or cancel some of them"
    # Until a page, or a document of middling length, has gone.
    too_many = left - pages + 1 if left >= pages else math.ceil(left / max(1, len(waiting)))
    headers = {"x-queue-position": str(len(waiting)), "retry-after": str(seconds_for(too_many))}
    raise DocumentError(429, message, code="queue_full", headers=headers)


async def _whole(work: Awaitable[Result]) -> Result:
    """What comes of it. That something it waits for was cancelled, as in a pool that broke, is an error like others."""
    try:
        return await work
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("what it waited for was cancelled") from error


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    ending = list(tasks)
    for task in ending:
        task.cancel()
    if ending:
        await asyncio.wait(ending, timeout=STOP_SECONDS)


def _status(document: Document, now: float | None = None) -> Status:
    """As far as the document itself tells; `now`: while it goes on."""
    until = now if document.finished_at is None else document.finished_at
    duration = None if document.started_at is None or until is None else until - document.started_at
    return Status(
        id=document.id,
        name=document.name,
        kind=document.kind,
        key=document.key,
        state=document.state,
        position=None,
        pages=document.pages,
        done=document.done,
        failed=document.failed,
        percent=_percent(document),
        pages_per_minute=0.0,
        seconds_left=None,
        queued_at=document.queued_at,
        started_at=document.started_at,
        finished_at=document.finished_at,
        updated_at=document.updated_at,
        duration_ms=None if duration is None else max(0, round(duration * 1000)),
        error=document.error,
    )


def _given_up(number: int, reason: str) -> Page:
    return Page(number=number, source="nothing", reason=reason)


def _percent(document: Document) -> int:
    if document.state == "succeeded":
        return 100
    return min(99, 100 * (document.done + document.failed) // document.pages) if document.pages else 0


def _retry_after(header: str) -> float:
    """Of an answer: seconds as digits; PAUSE_SECONDS for anything else."""
    seconds = float(header) if header.isascii() and header.isdigit() else PAUSE_SECONDS
    return min(LONGEST_PAUSE, max(1.0, seconds))
