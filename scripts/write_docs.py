"""Write what is said of settings in other places than the settings: the JSON schema and the README's tables.

.venv/bin/python scripts/write_docs.py
"""

import json
import re
from pathlib import Path

from vllm_unified.settings.environment import OWN_VARIABLES, PORT_VARIABLE, Environment
from vllm_unified.settings.keys import KeyEntry
from vllm_unified.settings.schema import (
    DocumentsSettings,
    Endpoint,
    ModelEntry,
    ModelsFile,
    NginxSettings,
    RouterSettings,
    SystemSettings,
)

CHECKOUT = Path(__file__).parents[1]
OLDER_NAMES = {"served_model_names": "aliases", "gpus": "cuda_device"}
# nginx' and Prometheus' and Grafana's are not in models.json: they have a default of their own.
OWN_PORTS = [str(field.alias) for field in Environment.model_fields.values() if isinstance(field.default, int)]
PORTS = [name for name in OWN_VARIABLES if PORT_VARIABLE.match(name) and name not in OWN_PORTS]


def schema() -> str:
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **ModelsFile.model_json_schema()}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def readme(text: str) -> str:
    """The text with the tables that follow `<!-- fields -->` and its like made anew."""
    fields = [
        (f"`{name}`{f' (or `{OLDER_NAMES[name]}`)' if name in OLDER_NAMES else ''}", str(field.description))
        for name, field in ModelEntry.model_fields.items()
    ]
    endpoint_fields = [(f"`{name}`", str(field.description)) for name, field in Endpoint.model_fields.items()]
    sections = [
        (f"`{section}.{name}`", f"{field.description}{_shown(field.default)}")
        for section, holder in (
            ("router", RouterSettings),
            ("system", SystemSettings),
            ("documents", DocumentsSettings),
            ("nginx", NginxSettings),
        )
        for name, field in holder.model_fields.items()
    ]
    variables = [
        (f"`{field.alias}`", str(field.description))
        for field in Environment.model_fields.values()
        if str(field.alias) not in PORTS
    ]
    names = " ".join(f"`{name}`" for name in PORTS)
    variables.append((names, "ports, in place of those of models.json; `VLLM_KEY_PORT` works for any model's key"))
    keys = [(f"`{name}`", str(field.description)) for name, field in KeyEntry.model_fields.items()]
    for mark, head, rows in (
        ("fields", "field", fields),
        ("endpoints", "field", endpoint_fields),
        ("sections", "field", sections),
        ("variables", "variable", variables),
        ("keys", "field", keys),
    ):
        table = "\n".join([f"| {head} | what it says |", "|---|---|", *(f"| {name} | {said} |" for name, said in rows)])
        before, begin, rest = text.partition(f"<!-- {mark} -->\n\n")
        old = re.match(r"(\|.*\n)*", rest)
        text = before + begin + table + "\n" + rest[old.end() if old else 0 :]
    return text


def _shown(default: bool | float | list[str] | None) -> str:
    """Nothing where the description says it."""
    if default is None:
        return ""
    if isinstance(default, bool):
        said = str(default).lower()
    elif isinstance(default, list):
        said = ", ".join(default) or "none"
    else:
        said = f"{default:g}"
    return f" (default {said})"


def main() -> None:
    (CHECKOUT / "config" / "models.schema.json").write_text(schema(), encoding="utf-8")
    path = CHECKOUT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
    print("wrote config/models.schema.json and the tables of README.md")


if __name__ == "__main__":
    main()
