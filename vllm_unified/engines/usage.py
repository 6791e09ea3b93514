"""What an engine takes and does at this moment, asked from outside its keeper."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vllm_unified.devices import held_on_gpus
from vllm_unified.engines.progress import read_counters
from vllm_unified.held import gpu_memory_of, memory_of, processes_of
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
    group = processes_of([state.engine.pid])[state.engine.pid]
    serves = state.phase in (Phase.READY, Phase.DRAINING)
    return Usage(memory_of(group), gpu_memory_of(group, held_on_gpus()), _requests(url) if serves else None)


def _requests(url: str) -> int | None:
    try:
        counters = read_counters(url, COUNTERS_SECONDS)
    except OSError:
        return None
    return counters.requests if counters else None
