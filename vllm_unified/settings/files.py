"""Reading a file so that what is wrong with its text comes with file, line and remedy."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from vllm_unified.errors import ConfigError, Problem


def read_json(path: Path, shown: str, option: str = "--config") -> Any:
    """`option`: names another file on the command line."""
    text = _text(path, shown, option)
    try:
        document = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_such_constant)
    except json.JSONDecodeError as error:
        hint = " (JSON allows no comma before a closing bracket)" if _trailing_comma(text, error.pos) else ""
        raise _problem(shown, f"line {error.lineno}, column {error.colno}", f"{error.msg}{hint}") from None
    except _RepeatedKeyError as error:
        raise _problem(shown, "", f'the key "{error}" stands twice in one object; rename or remove one') from None
    except RecursionError:
        raise _problem(shown, "", "nested too deep") from None
    except ValueError as error:
        raise _problem(shown, "", f"cannot be read as JSON: {error}") from None
    if "\\u0000" in text:
        raise _problem(shown, "", "holds the character \\u0000, which no command line can carry; remove it")
    return document


# Ten thousand keys: 0.6 s in place of 10 s, where PyYAML was built with libyaml.
FASTEST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path, shown: str) -> Any:
    try:
        return _yaml(_text(path, shown, "--config"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise _problem(shown, place, str(error.problem)) from None
    except RecursionError:
        raise _problem(shown, "", "nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise _problem(shown, "", f"cannot be read as YAML: {error}") from None


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, FASTEST_LOADER)  # noqa: S506 - both are safe ones
    except yaml.YAMLError:
        return yaml.safe_load(text)  # which says in better words what is wrong


class _RepeatedKeyError(Exception):
    pass


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise _RepeatedKeyError(repeated[0])
    return dict(pairs)


def _no_such_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _trailing_comma(text: str, position: int) -> bool:
    return text[position : position + 1] in ("}", "]", ",") and text[:position].rstrip().endswith(",")


def _text(path: Path, shown: str, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise _problem(shown, "", f"no such file; name another with {option} FILE") from None
    except UnicodeDecodeError as error:
        raise _problem(shown, f"byte {error.start}", "not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise _problem(shown, "", error.strerror or str(error)) from None


def _problem(file: str, place: str, message: str) -> ConfigError:
    return ConfigError([Problem(file, place, message)])
