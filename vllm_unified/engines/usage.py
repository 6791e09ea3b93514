"""What an engine takes and does at this moment, asked from outside its keeper."""

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from vllm_unified.engines.progress import read_counters
from vllm_unified.settings import Settings
from vllm_unified.state import EngineState, Phase

COUNTERS_SECONDS = 2.0


@dataclass(frozen=True)
class Usage:
    """`memory_bytes`: the machine's memory that its processes hold. None where it can't be told."""

    memory_bytes: int | None = None
    requests: int | None = None


def usage_of_all(settings: Settings, states: Sequence[EngineState]) -> dict[str, Usage]:
    """By key; all engines are asked at the same time, and one that hangs costs two seconds."""
    urls = {model.key: settings.engine_url(model) for model in settings.models}
    with ThreadPoolExecutor(max_workers=max(1, len(states))) as pool:
        found = pool.map(lambda each: _usage(each, urls[each.key]), states)
        return {each.key: usage for each, usage in zip(states, found, strict=True)}


def _usage(state: EngineState, url: str) -> Usage:
    if state.engine is None:
        return Usage()
    serves = state.phase in (Phase.READY, Phase.DRAINING)
    return Usage(_memory_of_group(state.engine.pid), _requests(url) if serves else None)


def _memory_of_group(group: int) -> int | None:
    """Pages that its processes share count once (PSS)."""
    sizes = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(pid) == group:
                sizes.append(int(psutil.Process(pid).memory_full_info().pss))
    return sum(sizes) or None


def _requests(url: str) -> int | None:
    try:
        counters = read_counters(url, COUNTERS_SECONDS)
    except OSError:
        return None
    return counters.requests if counters else None
