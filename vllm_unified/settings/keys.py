"""config/keys.yaml: the API keys beside the deployment's own one. Reading it, and editing it as a person would."""

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import textwrap
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from vllm_unified.errors import ConfigError, Problem
from vllm_unified.settings import files, findings
from vllm_unified.settings.schema import Name

FILE = "config/keys.yaml"
DEPLOYMENT = "deployment"


def _moment(value: Any, of_day: time) -> Any:
    """A date, a datetime, or either as text → datetime with a time zone; UTC where none is said."""
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value) if len(value) <= 10 else datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f'"{value}" is no date; write it as 2026-12-31 or 2026-12-31T18:00:00Z') from None
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    return datetime.combine(value, of_day, UTC) if isinstance(value, date) else value


Limit = Annotated[int, Field(ge=1)]
Until = Annotated[datetime, BeforeValidator(lambda value: _moment(value, time.max))]
Since = Annotated[datetime, BeforeValidator(lambda value: _moment(value, time.min))]


class KeyEntry(BaseModel):
    """One entry of `keys`. A limit that is not set does not hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(description="who the key is for, as usage and metrics name it")
    hash: str = Field(description="sha256: and the SHA-256 of the key's value; `keys create` writes it")
    models: Annotated[list[Name], Field(min_length=1)] | None = Field(
        default=None, description="the models that it may use, by key, name or alias (default: all)"
    )
    requests_per_minute: Limit | None = Field(default=None, description="requests within 60 seconds")
    tokens_per_minute: Limit | None = Field(
        default=None, description="tokens within 60 seconds; a request is let in while fewer were used"
    )
    max_concurrent: Limit | None = Field(default=None, description="requests at the same time")
    tokens_per_day: Limit | None = Field(default=None, description="tokens in a day, UTC")
    tokens_per_month: Limit | None = Field(default=None, description="tokens in a calendar month, UTC")
    expires: Until | None = Field(default=None, description="last day (UTC) or moment at which it works")
    priority: int = Field(
        default=0, description="of the requests that wait for a model the highest goes first (default 0)"
    )
    admin: bool = Field(default=False, description="true: it sees the usage of every key")
    created: Since | None = Field(default=None, description="when it was made; `keys list --json` shows it")

    @field_validator("name")
    @classmethod
    def _free_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w.@-]{0,63}", value):
            raise ValueError(f'"{value}": use up to 64 letters, digits and _ . @ -, a letter or digit first')
        if value.lower() == DEPLOYMENT:
            raise ValueError(f'"{value}" is the name of the key in .env; choose another')
        return value

    @field_validator("hash")
    @classmethod
    def _digest(cls, value: str) -> str:
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", value):  # not quoted: it may be the key itself
            raise ValueError("should be sha256: and 64 digits 0-9 a-f, as `vllm-unified keys create NAME` writes it")
        return value

    @property
    def digest(self) -> bytes:
        """32 bytes."""
        return bytes.fromhex(self.hash.removeprefix("sha256:"))


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    keys: list[KeyEntry] = []

    @field_validator("keys", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return [] if value is None else value


def read_keys(home: Path) -> tuple[KeyEntry, ...]:
    """Empty when there is no file. Raises ConfigError with all that is wrong with it."""
    path = home / FILE
    try:
        path.stat()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError([Problem(FILE, "", error.strerror or str(error))]) from None
    return _entries(files.read_yaml(path, FILE))


def _entries(document: Any) -> tuple[KeyEntry, ...]:
    try:
        entries = _KeysFile.model_validate({} if document is None else document).keys
    except ValidationError as error:
        raise ConfigError([_problem(detail) for detail in error.errors()]) from None
    problems = [
        Problem(FILE, f"keys.{index}.{field}", f"{value} stands twice; {remedy}")
        for field, remedy in (("name", "choose another"), ("hash", "make a key for each"))
        for index, value in _repeated([str(getattr(entry, field)) for entry in entries])
    ]
    if problems:
        raise ConfigError(problems)
    return tuple(entries)


def _problem(detail: Any) -> Problem:
    place = detail["loc"]
    is_field = len(place) > 2  # what stands in the place of an entry may be the key itself
    return Problem(
        FILE, findings.place(detail), findings.message(detail, KeyEntry if is_field else _KeysFile, secret=not is_field)
    )


def _repeated(values: list[str]) -> list[tuple[int, str]]:
    """Each value that stood there before, with its index."""
    return [(index, value) for index, value in enumerate(values) if value in values[:index]]


def unknown_models(entries: Collection[KeyEntry], names: Collection[str]) -> list[str]:
    """What the keys call models and no model is called; `names`: keys, names and aliases of all models."""
    return sorted({model for entry in entries for model in entry.models or ()}.difference(names))


def new_key() -> tuple[str, str]:
    """The value, for its user alone, and the hash, for the file."""
    # A random value of 256 bits cannot be guessed from its hash, so a plain SHA-256 does; a slow one would cost
    # every request what protects passwords, which people choose.
    value = f"sk-{secrets.token_urlsafe(32)}"
    return value, hash_of(value)


def metrics_key(api_key: str) -> str:
    """What Prometheus scrapes with. It follows from the deployment's key, and tells nothing of it."""
    return f"metrics-{hmac.new(api_key.encode(), b'vllm-unified metrics', hashlib.sha256).hexdigest()}"


def hash_of(value: str) -> str:
    return f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"


def add_key(home: Path, fields: Mapping[str, Any]) -> None:
    """Append an entry to the file. Raises ConfigError for a name that is there, a wrong field, or a broken file."""
    with _alone(home):
        known = [entry.name for entry in read_keys(home)]
        name = str(fields["name"])
        if name in known:
            remedy = f"choose another name, or `vllm-unified keys revoke {name}` first"
            raise ConfigError([Problem(FILE, "keys", f'there is a key "{name}" already; {remedy}')])
        item = yaml.safe_dump([dict(fields)], sort_keys=False, allow_unicode=True)
        _replace(home, _with_item(_text(home), item), [*known, name])


def remove_key(home: Path, name: str) -> None:
    """Raises ConfigError when there is none of that name, or the file is broken."""
    with _alone(home):
        known = [entry.name for entry in read_keys(home)]
        if name not in known:
            there = f"there are {', '.join(known)}" if known else "there is none"
            raise ConfigError([Problem(FILE, "keys", f'no key "{name}"; {there}')])
        index = known.index(name)
        _replace(home, _without_item(_text(home), index), known[:index] + known[index + 1 :])


def _with_item(text: str, item: str) -> str:
    keys = _keys_node(text)
    if keys is None:
        return f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}keys:\n{item}"
    if isinstance(keys, yaml.SequenceNode) and keys.value:
        at = _line_end(text, _end(keys))
        item = textwrap.indent(item, " " * keys.start_mark.column)
    else:  # `keys:` or `keys: []`
        text = text[: keys.start_mark.index] + text[keys.end_mark.index :]
        at = _line_end(text, keys.start_mark.index)
    before = text[:at]
    return f"{before}{'' if before.endswith(chr(10)) else chr(10)}{item}{text[at:]}"


def _without_item(text: str, index: int) -> str:
    """Comments beside and between the entry's own lines go with it; those above it stay."""
    keys = _keys_node(text)
    item = keys.value[index] if isinstance(keys, yaml.SequenceNode) else None
    if item is None:
        return text
    return text[: text.rfind("\n", 0, item.start_mark.index) + 1] + text[_line_end(text, _end(item)) :]


def _keys_node(text: str) -> Any:
    """The node of what `keys` says; its marks tell where in the text it stands."""
    document = yaml.compose(text, yaml.SafeLoader)
    return document.value[0][1] if isinstance(document, yaml.MappingNode) and document.value else None


def _end(node: Any) -> int:
    """Index behind the last character of the node: a block's own mark stands behind the comments that follow it."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(node, yaml.MappingNode) else last)


def _line_end(text: str, index: int) -> int:
    found = text.find("\n", index)
    return len(text) if found < 0 else found + 1


def _text(home: Path) -> str:
    path = home / FILE
    return path.read_text(encoding="utf-8-sig") if path.exists() else ""


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Of two that edit at once, the second begins when the first has ended."""
    folder = home / "run"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "keys.lock").open("w") as lock:
        _give(lock.fileno(), folder)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(home: Path, text: str, names: list[str]) -> None:
    """Write the file in one step. Raises ConfigError unless the text says the keys `names`.

    Its mode is 0600, or 0640 where its group could read it before.
    """
    try:
        found = [entry.name for entry in _entries(yaml.safe_load(text))]
    except yaml.YAMLError:
        found = []
    if found != names:
        raise ConfigError([Problem(FILE, "keys", "write each key on lines of its own, beginning with - name: …")])
    path = (home / FILE).resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        if path.exists():
            os.fchmod(file.fileno(), 0o600 | path.stat().st_mode & 0o040)
        _give(file.fileno(), path if path.exists() else path.parent)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _give(descriptor: int, like: Path) -> None:
    """What root makes, in a container say, belongs to whom its neighbour belongs: the router may be no root."""
    if os.geteuid() == 0:
        owner = like.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
