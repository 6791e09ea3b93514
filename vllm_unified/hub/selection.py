"""Which files of a repository vLLM needs."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from vllm_unified.hub.manifest import CONFIGS, File

# Configuration, tokenizers, code and templates; of documents the licence and the card, which travel with the weights.
SUFFIXES = (".json", ".py", ".jinja", ".jinja2", ".txt", ".model", ".tiktoken", ".vocab", ".spm", ".bpe")
DOCUMENTS = ("license", "licence", "notice", "readme", "use_policy", "usage_policy")
# The same weights in several formats: the first format that is there is taken. .pt goes with .bin, for bge-m3 keeps
# small layers of its own in it.
WEIGHTS = ((".safetensors",), (".bin", ".pt"), (".pth",))
# Of training, or exports for other engines.
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "events.out")
OTHER_ENGINES = ("onnx", "openvino", "coreml", "tflite", "tf", "flax", "original", "gguf", "metal")


def needed(files: Sequence[File]) -> list[File]:
    """Empty where there is nothing that vLLM loads: no configuration, or no weights."""
    candidates = [file for file in files if not _is_for_others(PurePosixPath(file.path))]
    weights: list[File] = []
    for suffixes in WEIGHTS:
        weights = weights or [file for file in candidates if _is_weight(PurePosixPath(file.path), suffixes)]
    if not weights or not any(file.path in CONFIGS for file in files):
        return []
    return [*(file for file in candidates if _is_beside_weights(PurePosixPath(file.path))), *weights]


def _is_for_others(path: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in path.parts) or any(
        part.lower() in OTHER_ENGINES for part in path.parts[:-1]
    )


def _is_weight(path: PurePosixPath, suffixes: Sequence[str]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.lower().startswith(NOT_WEIGHTS)


def _is_beside_weights(path: PurePosixPath) -> bool:
    return path.suffix.lower() in SUFFIXES or path.name.lower().startswith(DOCUMENTS)
