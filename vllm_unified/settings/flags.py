"""The flags of vLLM's server: which exist, how a value of each is written, which ones are ours to set."""

import difflib
import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

# Rendered from other fields or from the deployment itself; saying them twice could only contradict.
OWNED = {
    "model": "path",
    "host": "VLLM_ENGINE_HOST",
    "port": "port",
    "uds": "port",
    "api-key": "VLLM_API_KEY",
    "served-model-name": "name and served_model_names",
    "runner": "type",
    "hf-token": "HF_TOKEN in .env",
    "data-parallel-size": "tensor_parallel_size",
    "shutdown-timeout": "system.drain_timeout",
    "config": "engine_args",
    "help": "engine_args",
    "headless": "engine_args",
    "ssl-keyfile": "a proxy in front of the router",
    "ssl-certfile": "a proxy in front of the router",
}
# They write prompts and answers into the log, some of them only where its level is DEBUG.
TELLING = ("enable-log-requests", "enable-log-outputs", "enable-log-deltas")


@functools.cache
def known() -> dict[str, str]:
    """Flag without dashes → `boolean` (has a --no- form), `switch`, `list` or `value`.

    Source: the parser of the vLLM version that we pin; scripts/list_vllm_flags.py writes the file.
    """
    text = files("vllm_unified.settings").joinpath("vllm_flags.json").read_text(encoding="utf-8")
    flags: dict[str, str] = json.loads(text)
    return flags


def normalised(values: Mapping[str, Any], own_fields: set[str]) -> dict[str, Any]:
    """Flags under vLLM's own spelling (`max_num_seqs` → `max-num-seqs`).

    Raises ValueError with every flag that vLLM does not have, that the deployment sets itself, that is a
    field of the model already, or whose value can't be that flag's.
    """
    result: dict[str, Any] = {}
    wrong = []
    for written, value in values.items():
        flag = str(written).removeprefix("--").replace("_", "-")
        if flag.replace("-", "_") in own_fields:
            wrong.append(f'"{written}" is a field of the model; write it beside engine_args, not in it')
        elif flag in result:
            wrong.append(f'"{written}" is written twice')
        else:
            wrong += _wrong_with(flag, str(written), value)
        result[flag] = value
    if wrong:
        raise ValueError("; ".join(wrong))
    return result


def _wrong_with(flag: str, written: str, value: Any) -> list[str]:
    stem = flag.partition(".")[0]  # --compilation-config.level sets one key of a JSON flag
    if stem in OWNED:
        return [f'"{written}" is set by the deployment; use {OWNED[stem]}']
    if stem not in known():
        near = difflib.get_close_matches(flag, known(), n=1)
        hint = f'; did you mean "{near[0]}"?' if near else "; see `vllm serve --help=all`"
        return [f'vLLM\'s server has no flag "{written}"{hint}']
    if value is None or stem != flag:
        return []
    if stem in TELLING and value is True:
        return [f'"{written}" writes what users ask into the log; router.access_log tells of each request without it']
    kind = known()[flag]
    if kind in ("boolean", "switch") and not isinstance(value, bool):
        return [f'"{written}" is a switch: true or false, not {json.dumps(value)}']
    if kind in ("list", "value") and isinstance(value, bool):
        return [f'"{written}" needs a value, not {json.dumps(value)}']
    return []


def arguments(values: Mapping[str, Any]) -> list[str]:
    """The same as items of an argument list; nothing is quoted, nothing passes through a shell."""
    result: list[str] = []
    for flag, value in values.items():
        if value is None:
            continue
        if value is True:
            result.append(f"--{flag}")
        elif value is False:
            if known().get(flag) == "boolean":
                result.append(f"--no-{flag}")
        elif isinstance(value, list) and known().get(flag) == "list":
            result += [f"--{flag}", *(_text(item) for item in value)]
        else:
            text = _text(value)
            # argparse takes a lone value that begins with a dash for a flag
            result += [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]
    return result


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
