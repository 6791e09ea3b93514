"""config/models.json, config/vllm_config.yaml, `.env` and the environment → `Settings`, or all that is wrong.

Precedence, highest first: environment variable, the model's own field, vllm_config.yaml, vLLM's default.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vllm_unified.errors import ConfigError, Problem, UserError
from vllm_unified.settings import files
from vllm_unified.settings.environment import (
    OWN_VARIABLES,
    PORT_VARIABLE,
    SHELL_VARIABLES,
    Environment,
    Variables,
    as_fields,
    likely_typo,
    port_variable,
    read_variables,
    variable_of,
)
from vllm_unified.settings.schema import (
    DEFAULT_PORTS,
    PER_ENGINE_VARIABLES,
    DeviceEntry,
    EngineDefaults,
    FlagValue,
    Kind,
    Model,
    ModelEntry,
    ModelsFile,
    RouterSettings,
    SystemSettings,
    Topology,
)

File = TypeVar("File", bound=BaseModel)


@dataclass(frozen=True)
class Settings:
    """Everything that the deployment is told, resolved: no field of `models` waits for a default of ours."""

    home: Path
    file: Path
    models: tuple[Model, ...]
    router: RouterSettings
    system: SystemSettings
    environment: Environment
    engine_args: Mapping[str, FlagValue]
    engine_env: Mapping[str, str]

    @property
    def engines(self) -> tuple[Model, ...]:
        """The models that are served on this machine."""
        return tuple(model for model in self.models if model.served_here)

    @property
    def own_variables(self) -> frozenset[str]:
        """What is said to the deployment and not to its engines."""
        return frozenset((*OWN_VARIABLES, *SHELL_VARIABLES, *(port_variable(model.key) for model in self.models)))

    @property
    def run(self) -> Path:
        """Where the deployment keeps what it makes: sockets, state, logs."""
        return self.home / "run"

    @property
    def shown_file(self) -> str:
        return _shown(self.file, self.home)

    @property
    def devices_file(self) -> Path | None:
        """Stands in for the machine's devices; None: the machine's own."""
        given = self.environment.devices_file
        return None if given is None else self.home / given

    def require_api_key(self) -> str:
        """Raises UserError when there is none."""
        if self.environment.api_key is None:
            raise UserError("VLLM_API_KEY is not set: `vllm-unified init` puts a random one into .env")
        return self.environment.api_key

    @property
    def router_url(self) -> str:
        """Where this machine reaches the router, also when it listens everywhere."""
        return _url(self.environment.router_host, self.router.port)

    def engine_url(self, model: Model) -> str:
        """Where this machine reaches the model's own server."""
        return _url(self.environment.engine_host, model.port)

    def model(self, key: str) -> Model | None:
        return next((model for model in self.models if model.key == key), None)

    def folder(self, model: Model) -> Path:
        return self.home / model.path  # an absolute path stays itself

    def startup_timeout(self, model: Model) -> float:
        return model.startup_timeout or self.router.startup_timeout


def load(file: Path, home: Path, environ: Mapping[str, str]) -> Settings:
    """Raises ConfigError with every problem of every file."""
    problems: list[Problem] = []
    shown = _shown(file, home)
    variables = read_variables(home, environ)
    models_file = _parsed(ModelsFile, lambda: files.read_json(file, shown), shown, problems)
    defaults = _read_defaults(home, problems)
    environment = _read_environment(variables, problems)
    if models_file is None or defaults is None or environment is None:
        raise ConfigError(problems)
    resolved = _Resolver(models_file, defaults, environment, variables, shown, problems)
    settings = Settings(
        home=home,
        file=file,
        models=resolved.models(),
        router=resolved.router(),
        system=models_file.system,
        environment=environment,
        engine_args=_without_fields(defaults.engine_args),
        engine_env={**_passed_on(variables, models_file), **defaults.env},
    )
    _check_together(settings, shown, problems)
    if problems:
        raise ConfigError(problems)
    return settings


def read_topology(file: Path) -> Topology:
    """Raises ConfigError with all that is wrong with the file."""
    problems: list[Problem] = []
    topology = _parsed(Topology, lambda: files.read_json(file, str(file), "--devices"), str(file), problems)
    if topology is None:
        raise ConfigError(problems)
    return topology


def _read_defaults(home: Path, problems: list[Problem]) -> EngineDefaults | None:
    path = home / "config" / "vllm_config.yaml"
    if not path.exists():
        return EngineDefaults()
    shown = _shown(path, home)
    return _parsed(EngineDefaults, lambda: files.read_yaml(path, shown) or {}, shown, problems)


def _read_environment(variables: Variables, problems: list[Problem]) -> Environment | None:
    for name in sorted(variables.from_file):
        meant = likely_typo(name)
        if meant:
            problems.append(Problem(".env", name, f"nothing reads this variable; did you mean {meant}?"))
    for name in sorted(variables.from_file.intersection(SHELL_VARIABLES)):
        problems.append(Problem(".env", name, "is read before .env is; set it in the shell"))
    for name in sorted(variables.from_file.intersection(PER_ENGINE_VARIABLES).difference(OWN_VARIABLES)):
        problems.append(Problem(".env", name, "would be the same for every engine, and each needs its own; remove it"))
    try:
        return Environment.model_validate(as_fields(variables.values))
    except ValidationError as error:
        for detail in error.errors():
            name = str(detail["loc"][0])
            secret = name in (variable_of("api_key"), variable_of("hf_token"))
            problems.append(Problem(variables.file_of(name), name, _message(detail, Environment, secret=secret)))
        return None


def _parsed(kind: type[File], read: Callable[[], Any], shown: str, problems: list[Problem]) -> File | None:
    try:
        return kind.model_validate(read())
    except ConfigError as error:
        problems += error.problems
    except ValidationError as error:
        problems += [Problem(shown, _place(detail), _message(detail, kind)) for detail in error.errors()]
    return None


class _Resolver:
    """Fills what models.json leaves open from the environment and vllm_config.yaml."""

    def __init__(
        self,
        file: ModelsFile,
        defaults: EngineDefaults,
        environment: Environment,
        variables: Variables,
        shown: str,
        problems: list[Problem],
    ) -> None:
        self.file = file
        self.field_defaults = self._field_defaults(defaults, problems)
        self.environment = environment
        self.variables = variables
        self.shown = shown
        self.problems = problems

    @staticmethod
    def _field_defaults(defaults: EngineDefaults, problems: list[Problem]) -> dict[str, Any]:
        """Flags of vllm_config.yaml that a model has a field for, checked as that field is."""
        values = {flag.replace("-", "_"): value for flag, value in defaults.engine_args.items()}
        found = {name: value for name, value in values.items() if name in ModelEntry.model_fields and value is not None}
        try:
            ModelEntry.model_validate({"name": "defaults", "type": "chat", **found})
        except ValidationError as error:
            problems += [
                Problem("config/vllm_config.yaml", _place(detail), _message(detail, ModelEntry))
                for detail in error.errors()
            ]
            return {}
        return found

    def router(self) -> RouterSettings:
        port = self.environment.router_port
        return self.file.router if port is None else self.file.router.model_copy(update={"port": port})

    def models(self) -> tuple[Model, ...]:
        ports = self._port_overrides()
        enabled = {key: model for key, model in self.file.models.items() if model.enabled}
        if not enabled:
            self.problems.append(Problem(self.shown, "models", "every model is disabled; enable at least one"))
        return tuple(self._resolved(key, model, ports.get(key)) for key, model in enabled.items())

    def _resolved(self, key: str, entry: ModelEntry, port: int | None) -> Model:
        given = entry.model_fields_set
        if entry.memory_gib is not None:  # says the same, and the model's own word goes before a default
            given = given | {"gpu_memory_utilization"}
        unset = {name: value for name, value in self.field_defaults.items() if name not in given}
        served_here = bool(entry.path or entry.repo or not entry.endpoints)
        resolved = {
            **unset,
            "key": key,
            "path": (entry.path or f"models/{key}") if served_here else "",
            "port": (port or entry.port or DEFAULT_PORTS[entry.type]) if served_here else 0,
        }
        return Model.model_construct(**{**dict(entry), **resolved})

    def _port_overrides(self) -> dict[str, int]:
        """VLLM_CHAT_PORT is meant for the model with the key `chat`, else for the only chat model."""
        overrides: dict[str, int] = {}
        for variable, value in sorted(self.variables.values.items()):
            match = PORT_VARIABLE.match(variable)
            if not match or variable == variable_of("router_port"):
                continue
            keys = self._keys_meant(match[1].lower(), variable)
            if not keys:
                continue
            if not re.fullmatch("[0-9]{1,5}", value) or not 1 <= int(value) <= 65535:
                place = self.variables.file_of(variable)
                self.problems.append(Problem(place, variable, f'"{value}" is no port; use 1 to 65535'))
                continue
            overrides[keys[0]] = int(value)
        return overrides

    def _keys_meant(self, word: str, variable: str) -> list[str]:
        exact = [key for key in self.file.models if port_variable(key) == variable]
        if exact or word not in get_args(Kind):
            return exact
        of_kind = [key for key, model in self.file.models.items() if model.type == word and model.enabled]
        if len(of_kind) > 1:
            message = f'{len(of_kind)} models are of the type "{word}" ({", ".join(of_kind)}); set "port" in each'
            self.problems.append(Problem(self.variables.file_of(variable), variable, message))
            return []
        return of_kind


def _check_together(settings: Settings, shown: str, problems: list[Problem]) -> None:
    variables: dict[str, str] = {}
    for model in settings.models:
        other = variables.setdefault(port_variable(model.key), model.key)
        if other != model.key:
            message = f'is the same as "{other}" but for case and dashes; rename one'
            problems.append(Problem(shown, f"models.{model.key}", message))
    ports = {settings.router.port: "the router"}
    names: dict[str, str] = {}
    for model in settings.models:
        if model.port in ports:
            taken_by = ports[model.port]
            problems.append(
                Problem(
                    shown, f"models.{model.key}.port", f"{model.port} is already used by {taken_by}; choose another"
                )
            )
        ports.setdefault(model.port, f'"{model.key}"')
        for name in model.names:
            if name in names:
                message = f'the name "{name}" is already used by "{names[name]}"; every name must lead to one model'
                problems.append(Problem(shown, f"models.{model.key}.name", message))
            names.setdefault(name, model.key)


def _url(host: str, port: int) -> str:
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _without_fields(engine_args: Mapping[str, FlagValue]) -> dict[str, FlagValue]:
    return {flag: value for flag, value in engine_args.items() if flag.replace("-", "_") not in ModelEntry.model_fields}


def _passed_on(variables: Variables, file: ModelsFile) -> dict[str, str]:
    """What `.env` says beyond our own variables is meant for the engines (HF_ENDPOINT, NCCL_P2P_DISABLE …)."""
    own = {*OWN_VARIABLES, *(port_variable(key) for key in file.models)}
    return {name: variables.values[name] for name in sorted(variables.from_file) if name not in own}


def _shown(path: Path, home: Path) -> str:
    return str(path.relative_to(home)) if path.is_relative_to(home) else str(path)


def _place(detail: ErrorDetails) -> str:
    parts = list(detail["loc"])
    if detail["type"] in ("extra_forbidden", "missing") or "[key]" in parts:
        parts = [part for part in parts[:-1] if part != "[key]"]
    # the branches of a union are pydantic's own words
    kept = [str(part) for part in parts if not isinstance(part, str) or "[" not in part]
    return ".".join(kept)


def _message(detail: ErrorDetails, kind: type[BaseModel], *, secret: bool = False) -> str:
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
    inside["devices"] = DeviceEntry
    holder = inside.get(str(place[0]), kind) if place else kind
    return list(holder.model_fields)


def _quoted(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
