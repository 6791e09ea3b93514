"""Who is let in, in which order, and that no slot is ever lost."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_unified.router.gate import LONGEST_RETRY_AFTER, Gate
from vllm_unified.router.problems import RequestError

TURNS = 8  # of the event loop, in which everything that was begun comes to rest


def run(test: Coroutine[Any, Any, None]) -> None:
    async def within_seconds() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(within_seconds())


async def come_to_rest() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


class Queue:
    """Requests at a gate; `let_in` has their names in the order in which they got a slot."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.let_in: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str, priority: int = 0) -> None:
        for name in names:
            self.tasks[name] = asyncio.create_task(self._enter(name, priority))
            await come_to_rest()

    async def _enter(self, name: str, priority: int) -> None:
        await self.gate.enter(priority, "it")
        self.let_in.append(name)

    async def refusal_of(self, name: str) -> RequestError:
        with pytest.raises(RequestError) as caught:
            await self.tasks[name]
        return caught.value

    @property
    def counts(self) -> tuple[int, int]:
        return self.gate.active, self.gate.queued


def test_without_a_limit_all_are_let_in() -> None:
    async def test() -> None:
        queue = Queue(Gate(None, 0, 1))
        await queue.come(*"abcdefgh")
        assert queue.counts == (8, 0)
        assert queue.gate.try_enter()

    run(test())


def test_the_highest_priority_first_then_who_came_first() -> None:
    async def test() -> None:
        queue = Queue(Gate(1, 10, 60))
        await queue.come("first")
        await queue.come("low 1", "low 2", priority=-1)
        await queue.come("usual 1", "usual 2")
        await queue.come("high 1", "high 2", priority=5)
        await queue.come("usual 3")
        assert queue.counts == (1, 7)
        for _ in range(8):
            queue.gate.leave(1)
            await come_to_rest()
        expected = ["first", "high 1", "high 2", "usual 1", "usual 2", "usual 3", "low 1", "low 2"]
        assert queue.let_in == expected
        assert queue.counts == (0, 0)

    run(test())


def test_a_full_queue_refuses_at_once() -> None:
    async def test() -> None:
        queue = Queue(Gate(2, 1, 60))
        await queue.come("a", "b", "c", "d")
        refusal = await queue.refusal_of("d")
        assert (refusal.status, refusal.code) == (429, "queue_full")
        assert refusal.headers == {"retry-after": "1"}
        assert str(refusal) == "it is busy: 2 requests run and 1 wait; come back later"
        assert queue.counts == (2, 1)
        queue.gate.leave(1)
        await come_to_rest()
        await queue.come("e")
        assert queue.let_in == ["a", "b", "c"]
        assert queue.counts == (2, 1)

    run(test())


def test_no_queue_at_all() -> None:
    async def test() -> None:
        queue = Queue(Gate(1, 0, 60))
        await queue.come("a", "b")
        assert (await queue.refusal_of("b")).status == 429
        queue.gate.leave(1)
        await queue.come("c")
        assert queue.let_in == ["a", "c"]

    run(test())


def test_who_waits_too_long_is_refused_and_leaves_no_trace() -> None:
    async def test() -> None:
        queue = Queue(Gate(1, 5, 0.05))
        await queue.come("a", "b", "c")
        refusals = [await queue.refusal_of(name) for name in "bc"]
        assert [(each.status, each.code) for each in refusals] == [(503, "queue_timeout")] * 2
        assert all(each.headers["retry-after"] for each in refusals)
        assert str(refusals[0]) == "it is busy: no slot was free for 0.05 s; come back later"
        assert queue.counts == (1, 0)
        queue.gate.leave(1)
        assert queue.counts == (0, 0)
        await queue.come("d")
        assert queue.let_in == ["a", "d"]

    run(test())


@pytest.mark.parametrize(
    ("limit", "waiting", "seconds", "expected"),
    [
        (1, 0, 1, "1"),  # of a gate that nothing is known of yet
        (1, 0, 20, "20"),
        (1, 1, 20, "40"),
        (4, 3, 20, "20"),
        (1, 10, 1000, str(LONGEST_RETRY_AFTER)),
        (8, 0, 0.001, "1"),
    ],
)
def test_when_to_come_back(limit: int, waiting: int, seconds: float, expected: str) -> None:
    """At the pace of the last requests, as long as the queue takes."""

    async def test() -> None:
        gate = Gate(limit, waiting, 60)
        for _ in range(200):
            assert gate.try_enter()
            gate.leave(seconds)
        queue = Queue(gate)
        names = [str(number) for number in range(limit + waiting)]
        await queue.come(*names, "one too many")
        assert (await queue.refusal_of("one too many")).headers == {"retry-after": expected}

    run(test())


def test_a_limit_that_is_raised_lets_waiting_ones_in() -> None:
    async def test() -> None:
        queue = Queue(Gate(1, 10, 60))
        await queue.come(*"abcde")
        queue.gate.change(3, 10, 60)
        await come_to_rest()
        assert queue.let_in == ["a", "b", "c"]
        assert queue.counts == (3, 2)
        queue.gate.change(None, 10, 60)
        await come_to_rest()
        assert queue.let_in == ["a", "b", "c", "d", "e"]
        assert queue.counts == (5, 0)

    run(test())


def test_a_limit_that_is_lowered_waits_for_those_inside() -> None:
    async def test() -> None:
        queue = Queue(Gate(None, 10, 60))
        await queue.come(*"abc")
        queue.gate.change(1, 10, 60)
        await queue.come("d")
        for inside in (2, 1):
            queue.gate.leave(1)
            await come_to_rest()
            assert queue.counts == (inside, 1)
        queue.gate.leave(1)
        await come_to_rest()
        assert queue.let_in == ["a", "b", "c", "d"]
        assert queue.counts == (1, 0)

    run(test())


def test_a_queue_that_is_made_shorter_keeps_those_in_it() -> None:
    async def test() -> None:
        queue = Queue(Gate(1, 10, 60))
        await queue.come(*"abc")
        queue.gate.change(1, 1, 60)
        await queue.come("d")
        assert (await queue.refusal_of("d")).status == 429
        for _ in range(2):
            queue.gate.leave(1)
            await come_to_rest()
        assert queue.let_in == ["a", "b", "c"]

    run(test())


def test_a_client_that_leaves_as_its_slot_comes() -> None:
    async def test() -> None:
        queue = Queue(Gate(1, 10, 60))
        await queue.come(*"abc")
        queue.gate.leave(1)  # b has the slot, and does not know it yet
        queue.tasks["b"].cancel()
        await come_to_rest()
        assert queue.tasks["b"].cancelled()
        assert queue.let_in == ["a", "c"]
        assert queue.counts == (1, 0)

    run(test())


def test_a_slot_that_comes_as_its_client_leaves() -> None:
    async def test() -> None:
        queue = Queue(Gate(1, 10, 60))
        await queue.come(*"ab")
        queue.tasks["b"].cancel()
        queue.gate.leave(1)
        assert queue.gate.try_enter(), "the slot is nobody's"
        await come_to_rest()
        assert queue.counts == (1, 0)

    run(test())


def test_many_who_left_are_not_kept_in_mind() -> None:
    """A server that hangs holds its slots; clients come and go meanwhile."""

    async def test() -> None:
        queue = Queue(Gate(1, 10, 60))
        await queue.come("a", "stays")
        for number in range(500):
            await queue.come(str(number))
            queue.tasks.pop(str(number)).cancel()
            await come_to_rest()
        assert queue.counts == (1, 1)
        assert len(queue.gate._waiting) < 50
        queue.gate.leave(1)
        await come_to_rest()
        assert queue.let_in == ["a", "stays"]

    run(test())


class AnyOrder(RuleBasedStateMachine):
    """Clients come, leave and are served in any order, also in one turn of the event loop, on a clock of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.loop = asyncio.new_event_loop()
        self.loop.time = lambda: self.now  # type: ignore[method-assign]
        self.inside: list[int] = []
        self.waiting: dict[int, asyncio.Task[None]] = {}
        self.at_rest: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())  # who waited, who was inside
        self.left: list[asyncio.Task[None]] = []
        self.rank: dict[int, tuple[int, int]] = {}
        self.came = 0
        self.gate = Gate(None, 0, 10)
        self.most: int | None = None

    @initialize(limit=st.none() | st.integers(1, 3), max_queue=st.integers(0, 5))
    def begin(self, limit: int | None, max_queue: int) -> None:
        self.gate = Gate(limit, max_queue, 10)
        self.most = limit  # that may be inside: those who were when the limit was lowered go on

    async def _wait(self, number: int) -> None:
        try:
            await self.gate.enter(-self.rank[number][0], "it")
        except RequestError:
            return
        finally:
            del self.waiting[number]
        self.inside.append(number)

    @rule(priority=st.integers(-2, 2))
    def come(self, priority: int) -> None:
        """As a request does: at once where it can, else in a task."""
        self.came += 1
        self.rank[self.came] = (-priority, self.came)
        if self.gate.try_enter():
            self.inside.append(self.came)
        else:
            self.waiting[self.came] = self.loop.create_task(self._wait(self.came))

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.inside))
        self.inside.remove(number)
        self.gate.leave(1)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def go_while_waiting(self, data: st.DataObject) -> None:
        task = self.waiting[data.draw(st.sampled_from(sorted(self.waiting)))]
        task.cancel()
        self.left.append(task)

    @rule(limit=st.none() | st.integers(1, 3), max_queue=st.integers(0, 5))
    def change(self, limit: int | None, max_queue: int) -> None:
        self.gate.change(limit, max_queue, 10)
        self.most = None if limit is None else max(self.gate.active, limit)

    @rule(seconds=st.sampled_from([4.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def one_turn(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))

    @rule()
    def rest(self) -> None:
        waited, were_inside = self.at_rest
        self.loop.run_until_complete(come_to_rest())
        # Who left before its task began has nothing to give back.
        self.waiting = {number: task for number, task in self.waiting.items() if not task.done()}
        self.at_rest = frozenset(self.waiting), frozenset(self.inside)
        assert self.gate.active == len(self.inside)
        assert self.gate.queued == len(self.waiting)
        if self.waiting:
            assert self.gate.limit is not None
            assert self.gate.active >= self.gate.limit, "a slot is free, and somebody waits"
        for number in set(self.inside) - were_inside:
            passed = [other for other in waited & set(self.waiting) if self.rank[other] < self.rank[number]]
            assert not passed, "somebody went before those who had to go first"

    @invariant()
    def no_more_than_the_limit(self) -> None:
        if self.most is not None and self.gate.limit is not None:
            assert self.gate.active <= self.most
            self.most = max(self.gate.active, self.gate.limit)

    @invariant()
    def whoever_left_holds_nothing(self) -> None:
        assert all(task.cancelled() or not task.done() for task in self.left)

    def teardown(self) -> None:
        try:
            self.rest()
            while self.inside:
                self.inside.pop()
                self.gate.leave(1)
                self.rest()
            assert (self.gate.active, self.gate.queued) == (0, 0)
        finally:
            for task in self.waiting.values():
                task.cancel()
            self.loop.run_until_complete(come_to_rest())
            self.loop.close()


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
