"""The models as documents: OpenAI's list of models, with what each can do."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_unified.router.keys import Key
from vllm_unified.router.problems import RequestError
from vllm_unified.router.registry import LONGEST_ECHO, Registry, Served
from vllm_unified.router.replica import Replica
from vllm_unified.settings import Kind, Settings

OUTPUTS: dict[Kind, str] = {"chat": "text", "ocr": "text", "embedding": "embedding", "rerank": "score"}
# The first words of a problem; of several replicas the one counts that is the nearest to being ready.
STATES = ("starting", "waiting", "failed", "draining", "stopping", "stopped")
UNAVAILABLE = "unavailable"

# Where the settings of the language model stand in a config.json that describes several models.
LANGUAGE_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len", "n_ctx")
WIDTH_FIELDS = ("hidden_size", "d_model", "n_embd", "dim")
VISION_FIELDS = (
    *("vision_config", "visual", "vision_tower", "mm_vision_tower", "vit_config", "visual_tokenizer_config"),
    *("img_processor", "vision_encoder", "vq_config"),
)
VISION_ARCHITECTURES = ("FuyuForCausalLM", "MolmoForCausalLM", "Phi4MMForCausalLM", "Florence2ForConditionalGeneration")
AUDIO_FIELDS = ("audio_config", "audio_processor")


def model_list(registry: Registry, key: Key, settings: Settings, started: int) -> dict[str, Any]:
    """An entry for every name and alias that `key` may use. `started`: the router's start, seconds since 1970."""
    entries = [_entry(name, served, settings, started) for served in registry.of(key) for name in served.model.names]
    return {"object": "list", "data": entries}


def model_entry(name: str, registry: Registry, key: Key, settings: Settings, started: int) -> dict[str, Any]:
    """Raises RequestError: 404 for a name that is not served, 403 for one that is not `key`'s."""
    served = registry.by_name(name)
    if served is None:
        message = f'no model "{name[:LONGEST_ECHO]}"; GET /v1/models lists those served here'
        raise RequestError(404, message, code="model_not_found", param="model")
    if not served.open_to(key):
        raise RequestError(403, f'this API key may not use "{name}"', code="model_not_allowed", param="model")
    return _entry(name, served, settings, started)


def _entry(name: str, served: Served, settings: Settings, started: int) -> dict[str, Any]:
    model = served.model
    weights = _Weights(settings.folder(model)) if model.served_here else None
    context_length = _context_length(served, weights)
    return {
        "id": name,
        "object": "model",
        "created": started,
        "owned_by": "vllm-unified",
        "root": model.name,
        "parent": None,
        "max_model_len": context_length,
        "aliases": list(model.served_model_names),
        "type": model.type,
        "state": _state(served),
        "capabilities": {
            "kind": model.type,
            "modalities": {"input": _inputs(model.type, weights), "output": [OUTPUTS[model.type]]},
            "context_length": context_length,
            "dimensions": weights.dimensions if weights and model.type == "embedding" else None,
        },
    }


def _state(served: Served) -> str:
    """One word: `ready`, `drained`, one of STATES, or `unavailable`."""
    if served.ready:
        return "ready"
    if served.drained:
        return "drained"
    return min(map(_word, served.replicas), key=(*STATES, UNAVAILABLE).index)


def _word(replica: Replica) -> str:
    first = (replica.problem or "").partition(" ")[0].rstrip(",;:")
    return first if first in STATES else UNAVAILABLE


def _context_length(served: Served, weights: "_Weights | None") -> int | None:
    """Tokens: as the servers say, else as the settings say, else as the weights say."""
    # A request may come to any of the replicas.
    said = [replica.context_length for replica in served.replicas if replica.context_length]
    return min(said, default=None) or served.model.max_model_len or (weights.context_length if weights else None)


def _inputs(kind: Kind, weights: "_Weights | None") -> list[str] | None:
    if kind == "ocr":
        return ["text", "image"]
    return weights.inputs if weights else None


class _Weights:
    """What a folder with weights says of itself. None where it says nothing, or nothing that can be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Mistral's own format has params.json in place of config.json.
        config = _json(folder / "config.json") or _json(folder / "params.json")
        self._config: dict[str, Any] = config if isinstance(config, dict) else {}

    @property
    def context_length(self) -> int | None:
        for config in _parts(self._config):
            length = _number(config, CONTEXT_FIELDS)
            if length and "roberta" in str(config.get("model_type")):
                # Its positions begin behind that of the padding.
                return length - (_number(config, ("pad_token_id",)) or 0) - 1
            if length:
                return length
        return None

    @property
    def dimensions(self) -> int | None:
        """Of its vectors: those of the last dense layer of sentence-transformers, else the model's own."""
        modules = _json(self._folder / "modules.json")
        for module in reversed(modules if isinstance(modules, list) else []):
            if isinstance(module, dict) and str(module.get("type")).endswith(".Dense"):
                dense = _json(self._folder / str(module.get("path")) / "config.json")
                return _number(dense, ("out_features",)) if isinstance(dense, dict) else None
        return next(filter(None, (_number(config, WIDTH_FIELDS) for config in _parts(self._config))), None)

    @property
    def inputs(self) -> list[str] | None:
        if not self._config:
            return None
        named = self._config.get("architectures")
        architectures = [str(name) for name in named] if isinstance(named, list) else []
        if any(name.startswith("Whisper") for name in architectures):
            return ["audio"]
        fields = {name for config in _parts(self._config) for name, value in config.items() if value}
        sees = not fields.isdisjoint(VISION_FIELDS) or not set(architectures).isdisjoint(VISION_ARCHITECTURES)
        hears = not fields.isdisjoint(AUDIO_FIELDS)
        return ["text", *(["image"] if sees else []), *(["audio"] if hears else [])]


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration itself, and those of the language models in it."""
    yield config
    for name in LANGUAGE_PARTS:
        if isinstance(part := config.get(name), dict):
            yield from _parts(part)


def _number(config: dict[str, Any], fields: tuple[str, ...]) -> int | None:
    values = (config.get(field) for field in fields)
    return next((value for value in values if type(value) is int and value > 0), None)


def _json(path: Path) -> Any:
    """None for a file that is not there or not JSON."""
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, RecursionError):
        return None


@functools.lru_cache(maxsize=256)
def _parsed(path: Path, _changed: int) -> Any:
    return json.loads(path.read_bytes())
