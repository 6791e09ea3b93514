"""What a model asks of the memory of a device. The figures follow vLLM 0.32's own start-up check and profiling."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from vllm_unified.devices import GIB, Device
from vllm_unified.settings import Model, Settings
from vllm_unified.settings.schema import KV_CACHE_FLAG

VLLM_DEFAULT_SHARE = 0.92
# vLLM looks at the free memory after it made its CUDA context and NCCL's buffers, so these come on top of the share.
CONTEXT_BYTES = 1 * GIB
# CUDA graphs are estimated and kept inside the share (since 0.21), unless there is no profiling, as with a KV cache
# of a given size or none at all, or the estimate is switched off.
GRAPH_BYTES = 1 * GIB
ESTIMATE_VARIABLE = "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"
CPU_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"  # in GiB
# What a forward pass of the largest batch holds, where no share bounds it.
WORKING_BYTES = 1 * GIB
# A server with less KV cache than this serves hardly anybody.
LEAST_CACHE_BYTES = 1 * GIB
# Measured: API server, EngineCore and worker of a CPU engine hold 0.6-0.7 GiB each before any weights.
CPU_ENGINE_BYTES = 2 * GIB
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
# Architectures that have no KV cache: those of vLLM's registry whose attention is encoder-only, and the names under
# which GTE's "new" models come.
ENCODER_ONLY = re.compile(
    r"^(HF_ColBERT|ColBERT(ModernBert|JinaRoberta)Model|NewModel|NewForSequenceClassification"
    r"|(Bert|Roberta|XLMRoberta|ModernBert|NomicBert|GteNew|Gte|BgeM3Embedding|BertSpladeSparseEmbedding)"
    r"(Model|For(MaskedLM|SequenceClassification|TokenClassification)))$"
)


@dataclass(frozen=True)
class Need:
    """Of one device, in bytes. `margin`: what comes on top of the share.

    `cache`: KV cache and working memory; below zero where the weights are larger than the share.
    """

    weights: int
    cache: int
    margin: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.margin


@dataclass(frozen=True)
class Needs:
    """Of each of the devices, in their order. `share`: for the command line; None leaves it to vLLM."""

    each: tuple[Need, ...]
    share: float | None


def needs(settings: Settings, model: Model, devices: Sequence[Device]) -> Needs:
    """What the ranks of a model ask of `devices`, one each."""
    weights = math.ceil(weight_bytes(settings, model) / model.devices_needed)
    smallest = min(device.total_bytes for device in devices)
    margin = _margin(settings, model, devices[0])
    counted = _counted_cache(settings, model, devices[0])
    if counted is not None:
        each = tuple(Need(weights, counted, margin) for _ in devices)
        return Needs(each, _share_to_check(model, weights + counted, devices))
    asked = _asked_share(model, smallest)
    if model.memory_gib is None and model.gpu_memory_utilization is None and devices[0].kind == "cuda":
        asked = min(asked, Fraction(smallest - margin, smallest))  # of a small card vLLM's default leaves too little
    shares = (math.ceil(asked * device.total_bytes) for device in devices)
    is_default = model.memory_gib is None and asked == Fraction(share(model))
    written = model.gpu_memory_utilization if is_default else _written(asked)
    return Needs(tuple(Need(weights, size - weights, margin) for size in shares), written)


def is_bound_by_share(settings: Settings, model: Model, device: Device) -> bool:
    """Not those with a KV cache of a given size, nor those that have none: vLLM fills no share for them."""
    return _counted_cache(settings, model, device) is None


def _counted_cache(settings: Settings, model: Model, device: Device) -> int | None:
    """KV cache and working memory where they do not follow from a share."""
    cache = own_cache_bytes(settings, model)
    if device.kind == "cpu":
        return _cpu_cache_bytes(settings, model) if cache is None else cache
    if cache is None and weight_bytes(settings, model) and is_encoder_only(settings, model):
        cache = 0
    return None if cache is None else cache + WORKING_BYTES


def _share_to_check(model: Model, size: int, devices: Sequence[Device]) -> float | None:
    """vLLM wants its share free at the start even where it does not take it: so no more than is counted."""
    if devices[0].kind == "cpu":  # there it looks only at the size of the KV cache
        return model.gpu_memory_utilization
    counted = _written(Fraction(size, max(device.total_bytes for device in devices)))
    return min(counted, model.gpu_memory_utilization or counted)


def _asked_share(model: Model, smallest: int) -> Fraction:
    """As a fraction: a share of memory_gib of a card gives back memory_gib to the byte."""
    if model.memory_gib is not None:
        return Fraction(int(model.memory_gib * GIB), smallest)
    return Fraction(share(model))


def _written(asked: Fraction) -> float:
    """Rounded down, so that it is never more than was planned, and within what vLLM takes."""
    return min(1.0, max(1, math.floor(asked * 10_000)) / 10_000)


def _margin(settings: Settings, model: Model, device: Device) -> int:
    if device.kind == "cpu":
        return CPU_ENGINE_BYTES
    eager = {**settings.engine_args, **model.engine_args}.get("enforce-eager")
    estimated = {**settings.engine_env, **model.env}.get(ESTIMATE_VARIABLE, "1") != "0"
    inside = eager or (estimated and is_bound_by_share(settings, model, device))
    return CONTEXT_BYTES if inside else CONTEXT_BYTES + GRAPH_BYTES


def least_bytes(settings: Settings, model: Model) -> int:
    """The smallest share of a device, in bytes, that the model could do with: its weights and a little cache."""
    return math.ceil(weight_bytes(settings, model) / model.devices_needed) + LEAST_CACHE_BYTES


def share(model: Model) -> float:
    return model.gpu_memory_utilization or VLLM_DEFAULT_SHARE


def own_cache_bytes(settings: Settings, model: Model) -> int | None:
    """The size that the KV cache is given, None where it takes what the share leaves."""
    if model.kv_cache_memory_gib is not None:
        return int(model.kv_cache_memory_gib * GIB)
    given = model.engine_args.get(KV_CACHE_FLAG, settings.engine_args.get(KV_CACHE_FLAG))
    return None if given is None else parse_bytes(str(given))


def _cpu_cache_bytes(settings: Settings, model: Model) -> int | None:
    given = {**settings.engine_env, **model.env}.get(CPU_CACHE_VARIABLE)
    return parse_bytes(f"{given}G") if given else None


def is_encoder_only(settings: Settings, model: Model) -> bool:
    """Such a model takes its weights and working memory, whatever its share says."""
    config = _config_of(settings, model)
    names = config.get("architectures")
    if model.type not in ("embedding", "rerank") or not isinstance(names, list):
        return False
    return config.get("is_causal") is False or any(ENCODER_ONLY.match(str(name)) for name in names)


def weight_bytes(settings: Settings, model: Model) -> int:
    """What the weights take in memory, as far as their files tell; 0 while they are not there."""
    return math.ceil(_file_bytes(settings.folder(model)) * _scale(settings, model))


def _file_bytes(folder: Path) -> int:
    """A folder may hold the same weights several times: those that the index lists, or else one format, count."""
    for index in folder.glob("*.safetensors.index.json"):
        listed = _json(index).get("weight_map")
        if isinstance(listed, dict):
            return _sizes(folder / str(name) for name in set(listed.values()))
    for pattern in WEIGHT_FILES:
        files = list(folder.glob(pattern))
        own = [file for file in files if not file.name.startswith("consolidated")]  # Mistral's second copy
        if size := _sizes(own or files):
            return size
    return 0


def _sizes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())  # not a broken link


def _scale(settings: Settings, model: Model) -> float:
    """Memory of the weights ÷ size of their files: vLLM loads 32-bit weights as 16-bit ones unless it is told else."""
    config = _config_of(settings, model)
    if config.get("quantization_config"):
        return 1.0
    wide = str(config.get("torch_dtype", config.get("dtype"))) == "float32"
    scale = 0.5 if wide else 1.0
    if model.dtype in ("float", "float32"):
        scale *= 2
    if {**settings.engine_args, **model.engine_args}.get("quantization"):  # while it loads; fp8 or smaller
        scale /= 2
    return scale


def _config_of(settings: Settings, model: Model) -> dict[str, Any]:
    return _json(settings.folder(model) / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def parse_bytes(text: str) -> int:
    """`1000`, `25.6k` (thousands) and `1G` (powers of 1024), as vLLM reads sizes; 0 for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", text)
    if not match:
        return 0
    unit = match[2]
    base = 1024 if unit.isupper() else 1000
    return int(float(match[1]) * base ** (" kmgt".index(unit.lower() or " ")))
