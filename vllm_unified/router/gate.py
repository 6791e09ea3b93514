"""How many requests a model takes at a time, who waits, and how long."""

import asyncio
import heapq
import math

from vllm_unified.router.problems import RequestError

LONGEST_RETRY_AFTER = 60
# How much the newest request weighs in the mean duration that Retry-After is computed from.
WEIGHT_OF_NEWEST = 0.1


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
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._came = 0
        self._gone = 0  # waiting still in the heap, though they left

    @property
    def queued(self) -> int:
        return len(self._waiting) - self._gone

    def change(self, limit: int | None, max_queue: int, queue_timeout: float) -> None:
        self.limit, self.max_queue, self.queue_timeout = limit, max_queue, queue_timeout
        self._let_in()

    def try_enter(self) -> bool:
        """Take a slot when one is free and nobody waits for it."""
        if self.limit is not None and (self.active >= self.limit or self.queued):
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
        try:
            async with asyncio.timeout(self.queue_timeout):  # wait_for of Python 3.11 may lose a cancellation
                await slot
        except TimeoutError:
            if slot.done() and not slot.cancelled():  # it came in the same moment
                return
            self._gone += 1
            message = f"{who} is busy: no slot was free for {self.queue_timeout:g} s; come back later"
            raise RequestError(503, message, code="queue_timeout", headers=self._retry_after()) from None
        except asyncio.CancelledError:
            # The slot may have come in the same moment as the client left.
            if slot.done() and not slot.cancelled():
                self._free()
            else:
                self._gone += 1
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
            if slot.done():
                self._gone -= 1
                continue
            self.active += 1
            slot.set_result(None)

    def _retry_after(self) -> dict[str, str]:
        """When the queue as it is now will have been served, at the pace of the last requests."""
        seconds = (self.queued + 1) * self.mean_seconds / max(1, self.limit or 1)
        return {"retry-after": str(max(1, min(LONGEST_RETRY_AFTER, math.ceil(seconds))))}
