"""How much of something was used in the last minute."""

SECONDS = 60


class Window:
    """Sums over the last 60 slots of one second, the running one among them.

    `now` is time.monotonic() or any other clock in seconds that never goes back. What is added counts until the
    sixtieth second after its own begins.
    """

    __slots__ = ("_second", "_slots", "_total")

    def __init__(self) -> None:
        self._slots = [0] * SECONDS
        self._second = 0
        self._total = 0

    def add(self, n: int, now: float) -> None:
        second = int(now)
        if second != self._second:
            self._move_to(second)
        self._slots[second % SECONDS] += n
        self._total += n

    def total(self, now: float) -> int:
        second = int(now)
        if second != self._second:
            self._move_to(second)
        return self._total

    def peek(self, now: float) -> int:
        """The total, from any thread: nothing is changed by it."""
        gone = int(now) - self._second
        if gone >= SECONDS:
            return 0
        return self._total - sum(self._slots[(self._second + 1 + passed) % SECONDS] for passed in range(gone))

    def seconds_until_below(self, limit: int, now: float) -> float:
        """How long until the total is less than `limit`, which is 1 at least, if nothing more is added."""
        left = self.total(now)
        if left < limit:
            return 0.0
        for second in range(self._second - SECONDS + 1, self._second + 1):
            left -= self._slots[second % SECONDS]
            if left < limit:
                return second + SECONDS - now
        raise ValueError(f"limit {limit}: nothing is below it; use 1 or more")

    def _move_to(self, second: int) -> None:
        for gone in range(max(self._second, second - SECONDS) + 1, second + 1):
            slot = gone % SECONDS
            self._total -= self._slots[slot]
            self._slots[slot] = 0
        self._second = second
