"""What pydantic finds wrong with a file, in words for who wrote it."""

import difflib
import json
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from vllm_unified.settings.schema import DeviceEntry, Endpoint, ModelEntry, RouterSettings, SystemSettings


def place(detail: ErrorDetails) -> str:
    """Where it stands in the file, as models.chat.port."""
    parts = list(detail["loc"])
    if detail["type"] in ("extra_forbidden", "missing") or "[key]" in parts:
        parts = [part for part in parts[:-1] if part != "[key]"]
    # the branches of a union are pydantic's own words
    kept = [str(part) for part in parts if not isinstance(part, str) or "[" not in part]
    return ".".join(kept)


def message(detail: ErrorDetails, kind: type[BaseModel], *, secret: bool = False) -> str:
    """What is wrong there. `secret`: without the value that was given."""
    if detail["loc"][-1:] == ("api_key",) and detail["type"] != "extra_forbidden":
        return "use printable ASCII without spaces; it travels in an HTTP header"
    given = "" if secret else f"{_quoted(detail['input'])}: "
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(str(detail["loc"][-1]), _fields_at(kind, detail["loc"][:-1]))
        case "missing":
            return f'"{detail["loc"][-1]}" is missing'
        case "value_error":
            return str(detail["ctx"]["error"])
        case "string_pattern_mismatch" if detail["loc"][-1] == "[key]" or "models" in detail["loc"]:
            return f"{given}use letters, digits and _ - {'' if '[key]' in detail['loc'] else '. : / @ + '}only"
        case "string_pattern_mismatch" if "cors_origins" in detail["loc"]:
            return f"{given}use https://HOST without a path, or * for any"
        case "literal_error":
            return f"{given}choose one of {detail['ctx']['expected']}"
        case "too_short":
            return "at least one is needed"
        case "model_type":
            return f"{given}should be an object in braces"
        case _:
            return f"{given}{detail['msg'].removeprefix('Input ')}"


def _unknown_key(key: str, fields: list[str]) -> str:
    near = difflib.get_close_matches(key, fields, n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(fields)}"
    return f'nothing reads "{key}"; {hint}'


def _fields_at(kind: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    inside: dict[str, type[BaseModel]] = {"models": ModelEntry, "router": RouterSettings, "system": SystemSettings}
    inside |= {"devices": DeviceEntry, "endpoints": Endpoint}
    named = [inside[str(part)] for part in place[::2] if part in inside]
    holder = named[-1] if named else kind
    return list(holder.model_fields)


def _quoted(value: Any) -> str:
    text = json.dumps(_without_keys(value), ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _without_keys(value: Any) -> Any:
    """As it may be shown: with no key of an endpoint in it."""
    if isinstance(value, dict):
        return {name: "…" if name == "api_key" else _without_keys(inner) for name, inner in value.items()}
    return [_without_keys(inner) for inner in value] if isinstance(value, list) else value
