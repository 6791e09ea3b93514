"""How many requests a model takes at a time, who waits, and how long."""

import asyncio
import heapq
import math

from vllm_unified.router.problems import RequestError

LONGEST_RETRY_AFTER = 60
# How much the newest request weighs in the mean duration that Retry-After is computed from.
WEIGHT_OF_NEWEST = 0.1
SWEPT_FROM = 16


class Gate:
    """`limit` requests at a time, None for as many as come; at most `max_queue` wait for `queue_timeout` seconds.

    Of those who wait the highest priority goes first, then who came first.
    """

    def __init__(self, limit: int | None, max_queue: int, queue_timeout: float) -> None:
        self.limit = limit
        self.max_queue = max_queue
        self.queue_timeout = queue_timeout
        self.active = 0
        self.mean_seconds = 1.0
        self.queued = 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap, with some in it that left
        self._came = 0

    def change(self, limit: int | None, max_queue: int, queue_timeout: float) -> None:
        self.limit, self.max_queue, self.queue_timeout = limit, max_queue, queue_timeout
        self._let_in()

    def try_enter(self) -> bool:
        """Take a slot when one is free. Nobody waits for that one: it would have been let in as it became free."""
        if self.limit is not None and self.active >= self.limit:
            return False
        self.active += 1
        return True

    async def enter(self, priority: int, who: str) -> None:
        """Wait for a slot. Raises RequestError 429 when the queue is full, 503 after `queue_timeout`."""
        if self.try_enter():
            return
        if self.queued >= self.max_queue:
            message = f"{who} is busy: {self.active} requests run and {self.queued} wait; come back later"
            raise RequestError(429, message, code="queue_full", headers=self._retry_after())
        self._came += 1
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-priority, self._came, slot))
        self.queued += 1
        try:
            # Not asyncio.wait_for: before Python 3.12 it swallows a cancellation that comes together with the slot.
            async with asyncio.timeout(self.queue_timeout):
                await slot
        except TimeoutError:
            if _was_given(slot):  # in the same moment
                return
            self._forget_one()
            message = f"{who} is busy: no slot was free for {self.queue_timeout:g} s; come back later"
            raise RequestError(503, message, code="queue_timeout", headers=self._retry_after()) from None
        except asyncio.CancelledError:
            if _was_given(slot):  # in the same moment as the client left
                self._free()
            else:
                self._forget_one()
            raise

    def leave(self, seconds: float) -> None:
        """Free the slot of a request that took `seconds`."""
        self.mean_seconds += (seconds - self.mean_seconds) * WEIGHT_OF_NEWEST
        self._free()

    def _free(self) -> None:
        self.active -= 1
        if self._waiting:
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting and (self.limit is None or self.active < self.limit):
            slot = heapq.heappop(self._waiting)[2]
            if not slot.done():
                self.queued -= 1
                self.active += 1
                slot.set_result(None)

    def _forget_one(self) -> None:
        """One left the queue; the heap is swept when most of it is of such."""
        self.queued -= 1
        if len(self._waiting) > 2 * self.queued + SWEPT_FROM:
            self._waiting = [each for each in self._waiting if not each[2].done()]
            heapq.heapify(self._waiting)

    @property
    def wait_seconds(self) -> float:
        """What a request that comes now waits for its slot, at the pace of the last ones; 0 when one is free."""
        if self.limit is None or self.active < self.limit:
            return 0.0
        return (self.queued + 1) * self.mean_seconds / self.limit

    def _retry_after(self) -> dict[str, str]:
        return {"retry-after": str(max(1, min(LONGEST_RETRY_AFTER, math.ceil(self.wait_seconds))))}


def _was_given(slot: asyncio.Future[None]) -> bool:
    return slot.done() and not slot.cancelled()
