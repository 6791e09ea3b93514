"""What is known of every engine: its keeper's word at once, and its own health check each `health_check_interval`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from vllm_unified import state
from vllm_unified.router.registry import Registry, Upstream
from vllm_unified.state import Phase

LOOK_SECONDS = 5.0
STATE_SECONDS = 0.25
# Where the name of a keeper's phase would not say it.
NOT_READY = {
    Phase.WAITING: "waiting for its device",
    Phase.BACKOFF: "failed, tried again soon",
    Phase.DRAINING: "stopping",
}

log = logging.getLogger(__name__)


async def watch(registry: Registry, session: aiohttp.ClientSession, run: Path, interval: float) -> None:
    async def look_at_all() -> None:
        await look(registry, session, run)

    async def hear_all() -> None:
        for upstream in registry.upstreams:
            hear_keeper(upstream, run)

    await asyncio.gather(_for_ever(look_at_all, interval), _for_ever(hear_all, STATE_SECONDS))


async def _for_ever(work: Callable[[], Awaitable[None]], interval: float) -> None:
    while True:
        try:
            await work()
        except Exception:  # an end of the watch would freeze what is known of every engine
            log.exception("looking at the engines failed")
        await asyncio.sleep(interval)


def hear_keeper(upstream: Upstream, run: Path) -> None:
    """A keeper closes its engine to us before it stops it, and opens it when it answered a first request.

    An engine whose keeper was killed is told to end by that, and answers nonsense until it has.
    """
    was_closed = upstream.closed is not None
    said = state.read_as_written(run, upstream.model.key)
    if said is None or said.phase is Phase.STOPPED:
        upstream.closed = None
    elif not said.is_kept:
        upstream.closed, upstream.reason = "its keeper is gone, it is about to be restarted", None
    elif said.phase is not Phase.READY:
        upstream.closed, upstream.reason = NOT_READY.get(said.phase, str(said.phase)), said.reason
    else:
        upstream.closed = None
        if was_closed:
            upstream.error = upstream.reason = None


async def is_ending(upstream: Upstream, session: aiohttp.ClientSession, run: Path) -> bool:
    """Whether an engine that answered with an error is about to be restarted."""
    hear_keeper(upstream, run)
    if upstream.closed:
        return True
    error, _ = await _look_at(upstream, session, run)
    return error is not None


async def look(registry: Registry, session: aiohttp.ClientSession, run: Path) -> None:
    upstreams = [upstream for upstream in registry.upstreams if not upstream.closed]
    found = await asyncio.gather(*(_look_at(upstream, session, run) for upstream in upstreams))
    for upstream, (error, reason) in zip(upstreams, found, strict=True):
        if not upstream.closed:  # meanwhile; its keeper knows better
            upstream.error, upstream.reason = error, reason


async def _look_at(upstream: Upstream, session: aiohttp.ClientSession, run: Path) -> tuple[str | None, str | None]:
    """What is wrong, in words for everyone, and what the engine's log says of it; both None when it is ready."""
    try:
        async with session.get(f"{upstream.url}/health", timeout=aiohttp.ClientTimeout(total=LOOK_SECONDS)) as answer:
            await answer.read()  # or the connection could not be used again
            return (None if answer.status == 200 else f"its health check answers {answer.status}"), None
    except aiohttp.ClientConnectorError:
        known = state.read(run, upstream.model.key)
        return "stopped" if known.phase is Phase.STOPPED else "it does not answer on its port", known.reason
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"its health check fails: {error or type(error).__name__}", None
