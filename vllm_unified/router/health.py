"""What is known of every replica: a keeper's word at once, a look of our own each `health_check_interval`, and
what requests met (the breaker).
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from vllm_unified import state
from vllm_unified.router.regularly import regularly
from vllm_unified.router.replica import IDLE_SECONDS, Replica
from vllm_unified.router.upstream import fetch
from vllm_unified.state import EngineState, Phase

LOOK_SECONDS = 5.0
STATE_SECONDS = 0.25
# Where the name of a keeper's phase would not say it.
NOT_READY = {
    Phase.WAITING: "waiting for its device",
    Phase.BACKOFF: "failed, tried again soon",
    Phase.DRAINING: "stopping",
}
Replicas = Callable[[], Iterable[Replica]]


async def watch(replicas: Replicas, run: Path, interval: Callable[[], float]) -> None:
    """For ever. `replicas` and `interval` (seconds) are asked each time: a reload may change them."""

    def hear_all() -> None:
        before = time.monotonic() - IDLE_SECONDS
        for replica in replicas():
            replica.close_idle(before)
            if replica.local:
                hear_keeper(replica, run)

    looking = regularly(lambda: look(replicas(), run), interval)
    await asyncio.gather(looking, regularly(hear_all, lambda: STATE_SECONDS))


def hear_keeper(replica: Replica, run: Path) -> None:
    """A keeper closes its engine to us before it stops it, and opens it when it answered a first request.

    An engine whose keeper was killed is told to end by that, and answers nonsense until it has.
    """
    was_closed = replica.closed is not None
    said = state.read_as_written(run, replica.name)
    replica.ready_at = _ready_at(said) if said else None
    replica.engine = said
    if said is None or said.phase is Phase.STOPPED:
        replica.closed = None
        if said and said.reason:  # nobody stopped it: its keeper can't run, and is tried again
            replica.engine = replace(said, phase=Phase.BACKOFF)
    elif not said.is_kept:
        replica.engine = replace(said, phase=Phase.BACKOFF, engine=None)
        replica.closed, replica.reason = "its keeper is gone, it is about to be restarted", None
    elif said.phase is not Phase.READY:
        replica.closed, replica.reason = NOT_READY.get(said.phase, str(said.phase)), said.reason
    else:
        replica.closed = None
        if was_closed:
            replica.error = replica.reason = None
            replica.breaker.succeed()


def _ready_at(said: EngineState) -> float | None:
    """By the time that its last start took."""
    begins = {Phase.STARTING: said.since, Phase.BACKOFF: said.retry_at}.get(said.phase)
    return begins + said.ready_after if begins is not None and said.ready_after is not None else None


async def is_ending(replica: Replica, run: Path) -> bool:
    """Whether an engine that answered with an error is about to be restarted."""
    hear_keeper(replica, run)
    if replica.closed:
        return True
    error, _ = await _look_at(replica, run)
    return error is not None


async def look(replicas: Iterable[Replica], run: Path) -> None:
    await asyncio.gather(*(_look(replica, run) for replica in replicas if not replica.closed))


async def _look(replica: Replica, run: Path) -> None:
    error, reason = await _look_at(replica, run)
    if not replica.closed:  # meanwhile; its keeper knows better
        replica.error, replica.reason = error, reason
    if error is None and replica.context_length is None:
        replica.context_length = await _context_length(replica)


async def _look_at(replica: Replica, run: Path) -> tuple[str | None, str | None]:
    """What is wrong, in words for everyone, and what the engine's log says of it; both None when it is ready."""
    try:
        status, _ = await fetch(replica, "/health" if replica.local else "/v1/models", LOOK_SECONDS)
    except OSError as error:
        return _unreachable(replica, run, error)
    if status == 200 or (not replica.local and status in (404, 405)):  # no list of models, but it is there
        return None, None
    if status in (401, 403):
        return f"it refuses the key of its endpoint ({status})", None
    return f"its health check answers {status}", None


def _unreachable(replica: Replica, run: Path, error: OSError) -> tuple[str, str | None]:
    if problem := replica.tls_problem(error):
        return problem, None
    if isinstance(error, TimeoutError):
        return f"it did not answer its health check within {LOOK_SECONDS:g} s", None
    if isinstance(error, ConnectionRefusedError):
        if not replica.local:
            return "it does not answer on its port", None
        known = state.read(run, replica.name)
        return "stopped" if known.phase is Phase.STOPPED else "it does not answer on its port", known.reason
    return f"its health check fails: {error or type(error).__name__}", None


async def _context_length(replica: Replica) -> int | None:
    """In tokens, as vLLM tells it beside each model's name; None where it is not told."""
    try:
        status, body = await fetch(replica, "/v1/models", LOOK_SECONDS)
        models = json.loads(body)["data"] if status == 200 else []
        found = [each.get("max_model_len") for each in models if each.get("id") == replica.model]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return found[0] if found and isinstance(found[0], int) else None
