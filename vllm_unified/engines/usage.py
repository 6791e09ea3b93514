"""What an engine takes and does at this moment, asked from outside its keeper."""

import contextlib
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from vllm_unified.devices import held_on_gpus
from vllm_unified.engines.progress import read_counters
from vllm_unified.settings import Settings
from vllm_unified.state import EngineState, Phase

COUNTERS_SECONDS = 2.0


@dataclass(frozen=True)
class Usage:
    """Bytes that its processes hold of the machine's memory and of GPUs. None where it can't be told."""

    memory_bytes: int | None = None
    gpu_bytes: int | None = None
    requests: int | None = None


def usage_of_all(settings: Settings, states: Sequence[EngineState]) -> dict[str, Usage]:
    """By key; all engines are asked at the same time, and one that hangs costs two seconds."""
    urls = {model.key: settings.engine_url(model) for model in settings.engines}
    with ThreadPoolExecutor(max_workers=max(1, len(states))) as pool:
        found = pool.map(lambda each: _usage(each, urls[each.key]), states)
        return {each.key: usage for each, usage in zip(states, found, strict=True)}


def _usage(state: EngineState, url: str) -> Usage:
    if state.engine is None:
        return Usage()
    group = _group(state.engine.pid)
    serves = state.phase in (Phase.READY, Phase.DRAINING)
    return Usage(_memory_of(group), held_on_gpus(group), _requests(url) if serves else None)


def _group(leader: int) -> set[int]:
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == leader:
                found.add(pid)
    return found


def _memory_of(pids: Collection[int]) -> int | None:
    """Pages that the processes share count once (PSS)."""
    sizes = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            sizes.append(int(psutil.Process(pid).memory_full_info().pss))
    return sum(sizes) or None


def _requests(url: str) -> int | None:
    try:
        counters = read_counters(url, COUNTERS_SECONDS)
    except OSError:
        return None
    return counters.requests if counters else None
