"""Looks at every engine each `health_check_interval`."""

import asyncio
import logging
from pathlib import Path

import aiohttp

from vllm_unified import state
from vllm_unified.router.registry import Registry, Upstream
from vllm_unified.state import Phase

LOOK_SECONDS = 5.0
# Of an engine that refuses connections, where the name of its keeper's phase would not say it.
REFUSES = {Phase.BACKOFF: "failed, tried again soon", Phase.READY: "it does not answer on its port"}

log = logging.getLogger(__name__)


async def watch(registry: Registry, session: aiohttp.ClientSession, run: Path, interval: float) -> None:
    while True:
        try:
            await look(registry, session, run)
        except Exception:  # an end of the watch would freeze what is known of every engine
            log.exception("looking at the engines failed")
        await asyncio.sleep(interval)


async def look(registry: Registry, session: aiohttp.ClientSession, run: Path) -> None:
    found = await asyncio.gather(*(_look_at(upstream, session, run) for upstream in registry.upstreams))
    for upstream, (error, reason) in zip(registry.upstreams, found, strict=True):
        upstream.error, upstream.reason = error, reason


async def _look_at(upstream: Upstream, session: aiohttp.ClientSession, run: Path) -> tuple[str | None, str | None]:
    """What is wrong, in words for everyone, and what the engine's log says of it; both None when it is ready."""
    try:
        async with session.get(f"{upstream.url}/health", timeout=aiohttp.ClientTimeout(total=LOOK_SECONDS)) as answer:
            await answer.read()  # or the connection could not be used again
            return (None if answer.status == 200 else f"its health check answers {answer.status}"), None
    except aiohttp.ClientConnectorError:
        known = state.read(run, upstream.model.key)
        return REFUSES.get(known.phase, str(known.phase)), known.reason
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"its health check fails: {error or type(error).__name__}", None
