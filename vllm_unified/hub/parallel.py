"""The same work on many things at once, in threads: reading, hashing and writing files leaves Python's lock alone."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

TICK = 0.2


class Stopped(Exception):
    """The work was given up, because other work failed."""


def in_parallel(
    work: Callable[[Item, threading.Event], Result],
    items: Sequence[Item],
    threads: int,
    tick: Callable[[], None],
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, as they come; `tick` is called several times a second meanwhile.

    `work` looks at the event now and then, and raises Stopped when it is set. The first error of `work` is raised here
    when all threads have ended; Ctrl-C waits for none of them, so that it ends a read that hangs too.
    """
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Item, Result | BaseException]] = queue.SimpleQueue()
    stop = threading.Event()
    for item in items:
        waiting.put(item)

    def worker() -> None:
        while not stop.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((item, work(item, stop)))
            except BaseException as error:
                done.put((item, error))

    running = [threading.Thread(target=worker, daemon=True) for _ in range(min(threads, len(items)))]
    for thread in running:
        thread.start()
    left = len(items)
    try:
        while left:
            tick()
            try:
                item, result = done.get(timeout=TICK)
            except queue.Empty:
                continue
            left -= 1
            if isinstance(result, BaseException):
                stop.set()
                for thread in running:
                    thread.join()
                raise result
            yield item, result
        tick()
    finally:
        stop.set()
