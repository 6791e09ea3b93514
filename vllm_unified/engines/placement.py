"""Which model runs on which devices, and whether it fits: computed before anything starts."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_unified.devices import GIB, Device
from vllm_unified.errors import ConfigError, Problem
from vllm_unified.settings import Model, Settings

VLLM_DEFAULT_SHARE = 0.92
# Measured: API server, EngineCore and worker of a CPU engine hold 0.6-0.7 GiB each before any weights.
CPU_ENGINE_BYTES = 2 * GIB
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.pt")


@dataclass(frozen=True)
class Placed:
    """A model on its devices. `bytes_each`: what it asks of each of them."""

    model: Model
    devices: tuple[Device, ...]
    bytes_each: int


@dataclass(frozen=True)
class Plan:
    """In the order of models.json."""

    devices: tuple[Device, ...]
    placed: tuple[Placed, ...]

    def of(self, key: str) -> Placed:
        return next(placed for placed in self.placed if placed.model.key == key)

    def on(self, device: Device) -> list[Placed]:
        return [placed for placed in self.placed if device in placed.devices]

    def asked_of(self, device: Device) -> int:
        return sum(placed.bytes_each for placed in self.on(device))


def plan(settings: Settings, devices: Sequence[Device]) -> Plan:
    """Raises ConfigError when a model's devices do not exist or can't hold what is asked of them."""
    placed, problems = _place(settings, devices)
    result = Plan(tuple(devices), tuple(placed))
    if not problems:
        problems = [*_overfull(settings, result), *_too_small(settings, result)]
    if problems:
        raise ConfigError(problems)
    return result


def _place(settings: Settings, devices: Sequence[Device]) -> tuple[list[Placed], list[Problem]]:
    problems = []
    taken = {device.index: 0 for device in devices}
    chosen: dict[str, Placed] = {}
    # Those with a place of their own first, then the large ones, which find room only while there is much.
    order = sorted(settings.models, key=lambda model: (model.gpus is None, -model.devices_needed * _share(model)))
    for model in order:
        missing = _missing_devices(settings, model, devices)
        if missing:
            problems.append(missing)
            continue
        wanted = model.gpus if model.gpus is not None and devices[0].kind == "cuda" else None
        if wanted is None:
            by_room = sorted(devices, key=lambda device: (taken[device.index] - device.total_bytes, device.index))
            wanted = sorted(device.index for device in by_room[: model.devices_needed])
        on = tuple(devices[index] for index in wanted)
        placed = Placed(model, on, max(bytes_asked(settings, model, device) for device in on))
        for device in on:
            taken[device.index] += placed.bytes_each
        chosen[model.key] = placed
    return [chosen[model.key] for model in settings.models if model.key in chosen], problems


def _missing_devices(settings: Settings, model: Model, devices: Sequence[Device]) -> Problem | None:
    place = f"models.{model.key}"
    count = len(devices) if devices[0].kind == "cuda" else 0
    if model.devices_needed > max(count, 1):
        have = f"{count} GPU{'s' if count > 1 else ''}" if count else "no NVIDIA GPU"
        message = (
            f"needs {model.devices_needed} GPUs (tensor_parallel_size {model.tensor_parallel_size} × "
            f"pipeline_parallel_size {model.pipeline_parallel_size}), this machine has {have}"
        )
        return Problem(settings.shown_file, place, message)
    if model.gpus and count and max(model.gpus) >= count:
        message = f"there is no GPU {max(model.gpus)}; this machine has {count}, numbered from 0"
        return Problem(settings.shown_file, f"{place}.gpus", message)
    return None


def _overfull(settings: Settings, result: Plan) -> list[Problem]:
    problems = []
    for device in result.devices:
        asked = result.asked_of(device)
        if asked <= device.total_bytes:
            continue
        shares = " + ".join(f"{placed.model.key} {_gib(placed.bytes_each)}" for placed in result.on(device))
        remedy = (
            "lower gpu_memory_utilization, or move a model with gpus"
            if device.kind == "cuda"
            else 'disable a model ("enabled": false), or lower its kv-cache-memory-bytes'
        )
        message = f"{device.label} has {_gib(device.total_bytes)} GiB, asked for {_gib(asked)} ({shares}); {remedy}"
        problems.append(Problem(settings.shown_file, "models", message))
    return problems


def _too_small(settings: Settings, result: Plan) -> list[Problem]:
    problems = []
    for placed in result.placed:
        weights = weight_bytes(settings, placed.model) / len(placed.devices)
        if placed.devices[0].kind == "cuda" and weights > placed.bytes_each:
            message = (
                f"its weights take {_gib(weights)} GiB of each device, its share is {_gib(placed.bytes_each)}; "
                "raise gpu_memory_utilization, use more GPUs or a smaller model"
            )
            problems.append(Problem(settings.shown_file, f"models.{placed.model.key}", message))
    return problems


def bytes_asked(settings: Settings, model: Model, device: Device) -> int:
    """What a model takes of one device: its share of a GPU; on the CPU its processes, weights and KV cache."""
    if device.kind == "cuda":
        return math.ceil(_share(model) * device.total_bytes)
    cache = model.engine_args.get("kv-cache-memory-bytes", settings.engine_args.get("kv-cache-memory-bytes"))
    cache_bytes = int(_share(model) * device.total_bytes) if cache is None else parse_bytes(str(cache))
    return CPU_ENGINE_BYTES + weight_bytes(settings, model) + cache_bytes


def weight_bytes(settings: Settings, model: Model) -> int:
    """Size of the weights on disk, 0 while they are not there."""
    folder = settings.folder(model)
    for pattern in WEIGHT_FILES:  # a folder may hold the same weights in several formats; vLLM reads the first
        size = sum(file.stat().st_size for file in folder.glob(pattern) if file.exists())  # not a broken link
        if size:
            return size
    return 0


def parse_bytes(text: str) -> int:
    """`1000`, `25.6k` (thousands) and `1G` (powers of 1024), as vLLM reads sizes; 0 for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", text)
    if not match:
        return 0
    unit = match[2]
    base = 1024 if unit.isupper() else 1000
    return int(float(match[1]) * base ** (" kmgt".index(unit.lower() or " ")))


def _share(model: Model) -> float:
    return model.gpu_memory_utilization or VLLM_DEFAULT_SHARE


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
