"""What goes on beside the requests, again and again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


async def regularly(work: Callable[[], Awaitable[None] | None], interval: Callable[[], float]) -> None:
    """For ever, with pauses of `interval()` seconds. A failure is logged, and does not end it."""
    while True:
        try:
            going_on = work()
            if going_on is not None:
                await going_on
        except Exception:
            log.exception("what is done regularly failed; it is tried again")
        await asyncio.sleep(interval())
