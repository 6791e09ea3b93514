"""config/models.json, config/vllm_config.yaml, `.env` and the environment → `Settings`, or all that is wrong.

Precedence, highest first: environment variable, the model's own field, vllm_config.yaml, vLLM's default.
"""

import ipaddress
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from vllm_unified.errors import ConfigError, Problem, UserError
from vllm_unified.settings import files, findings
from vllm_unified.settings.environment import (
    OWN_VARIABLES,
    PORT_VARIABLE,
    RUNTIME_VARIABLE,
    SECRET_VARIABLES,
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
    DocumentsSettings,
    Endpoint,
    EngineDefaults,
    FlagValue,
    Kind,
    Model,
    ModelEntry,
    ModelsFile,
    NginxSettings,
    RouterSettings,
    SystemSettings,
    Topology,
)

File = TypeVar("File", bound=BaseModel)
# Ours, of docker-compose.yml.
SERVICE = "vllm-unified"
DOCUMENTS_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Settings:
    """Everything that the deployment is told, resolved: no field of `models` waits for a default of ours.

    `models`: all that the router serves. `disabled`: the entries that are neither started nor served; what only
    counts for those that are (ports, names, keys of endpoints) is not checked. `endpoint_variables`: the names of
    the variables that hold keys of endpoints. `in_containers`: nginx, Prometheus and Grafana have containers of their
    own, in place of programs of our supervisord.
    """

    home: Path
    file: Path
    models: tuple[Model, ...]
    disabled: tuple[Model, ...]
    router: RouterSettings
    system: SystemSettings
    documents: DocumentsSettings
    nginx: NginxSettings
    environment: Environment
    engine_args: Mapping[str, FlagValue]
    engine_env: Mapping[str, str]
    endpoint_variables: frozenset[str]
    in_containers: bool

    @property
    def engines(self) -> tuple[Model, ...]:
        """The models that are served on this machine."""
        return tuple(model for model in self.models if model.served_here)

    @property
    def all_engines(self) -> tuple[Model, ...]:
        """Those, and the disabled ones that would be: a reload of the file may enable them."""
        return (*self.engines, *(model for model in self.disabled if model.served_here))

    @property
    def ocr_model(self) -> Model | None:
        """The one that documents are read with."""
        return next((model for model in self.models if model.type == "ocr"), None)

    @property
    def reads_documents(self) -> bool:
        """Whether the document service runs: also for a model that a reload may enable."""
        return any(model.type == "ocr" for model in (*self.models, *self.disabled))

    @property
    def own_variables(self) -> frozenset[str]:
        """What is said to the deployment and not to its engines."""
        ports = (port_variable(model.key) for model in (*self.models, *self.disabled))
        return frozenset((*OWN_VARIABLES, *SHELL_VARIABLES, *ports, *self.endpoint_variables))

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

    @property
    def router_address(self) -> str:
        """HOST:PORT, as nginx and Prometheus reach the router."""
        if self.in_containers:
            return f"{SERVICE}:{self.router.port}"
        return self.router_url.removeprefix("http://")

    @property
    def rendered(self) -> Path:
        """What nginx, Prometheus and Grafana read; their containers have it at the same place."""
        return self.run / "rendered"

    @property
    def has_certificate(self) -> bool:
        return is_there(self.home / "config" / "tls" / "cert.pem")

    @property
    def nginx_url(self) -> str:
        environment = self.environment
        if self.has_certificate:
            return _url(environment.nginx_host, environment.nginx_tls_port).replace("http", "https", 1)
        return _url(environment.nginx_host, environment.nginx_port)

    @property
    def prometheus_url(self) -> str:
        return _url(self.environment.monitoring_host, self.environment.prometheus_port)

    @property
    def grafana_url(self) -> str:
        return _url(self.environment.monitoring_host, self.environment.grafana_port)

    @property
    def documents_url(self) -> str:
        return _url(DOCUMENTS_HOST, self.documents.port)

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
    endpoint_variables = _endpoint_variables(models_file) if models_file else frozenset()
    environment = _read_environment(variables, endpoint_variables, problems)
    if models_file is None or defaults is None or environment is None:
        raise ConfigError(problems)
    resolved = _Resolver(home, models_file, defaults, environment, variables, shown, problems)
    settings = Settings(
        home=home,
        file=file,
        models=resolved.models(),
        disabled=resolved.disabled(),
        router=resolved.router(),
        system=models_file.system,
        documents=_documents(models_file.documents, environment),
        nginx=models_file.nginx,
        environment=environment,
        engine_args=_without_fields(defaults.engine_args),
        engine_env={**_passed_on(variables, models_file, endpoint_variables), **defaults.env},
        endpoint_variables=endpoint_variables,
        in_containers=environ.get(RUNTIME_VARIABLE) == "docker",
    )
    _check_together(settings, shown, problems)
    _check_ports_beside(settings, variables, problems)
    if problems:
        raise ConfigError(problems)
    return settings


def is_there(path: Path) -> bool:
    """Also where we may not look: Nginx' master, as root, reads folders that are closed to us."""
    try:
        return path.exists()
    except PermissionError:
        return True


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


def _endpoint_variables(file: ModelsFile) -> frozenset[str]:
    endpoints = (endpoint for entry in file.models.values() for endpoint in entry.endpoints)
    return frozenset(endpoint.api_key_variable for endpoint in endpoints if endpoint.api_key_variable)


def _read_environment(
    variables: Variables, endpoint_variables: frozenset[str], problems: list[Problem]
) -> Environment | None:
    for name in sorted(variables.from_file - endpoint_variables):
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
            secret = name in SECRET_VARIABLES
            problems.append(
                Problem(variables.file_of(name), name, findings.message(detail, Environment, secret=secret))
            )
        return None


def _parsed(kind: type[File], read: Callable[[], Any], shown: str, problems: list[Problem]) -> File | None:
    try:
        return kind.model_validate(read())
    except ConfigError as error:
        problems += error.problems
    except ValidationError as error:
        problems += [
            Problem(shown, findings.place(detail), findings.message(detail, kind)) for detail in error.errors()
        ]
    return None


def _documents(given: DocumentsSettings, environment: Environment) -> DocumentsSettings:
    said = {name: getattr(environment, name) for name in ("max_upload_mib", "pages_in_flight", "dpi", "retries")}
    said["port"] = environment.documents_port
    if environment.skip_joining is not None:
        said["join_pages"] = not environment.skip_joining
    return given.model_copy(update={name: value for name, value in said.items() if value is not None})


class _Resolver:
    """Fills what models.json leaves open from the environment and vllm_config.yaml."""

    def __init__(
        self,
        home: Path,
        file: ModelsFile,
        defaults: EngineDefaults,
        environment: Environment,
        variables: Variables,
        shown: str,
        problems: list[Problem],
    ) -> None:
        self.home = home
        self.file = file
        self.field_defaults = self._field_defaults(defaults, problems)
        self.environment = environment
        self.variables = variables
        self.shown = shown
        self.problems = problems
        self.entries = self._entries()

    @staticmethod
    def _field_defaults(defaults: EngineDefaults, problems: list[Problem]) -> dict[str, Any]:
        """Flags of vllm_config.yaml that a model has a field for, checked as that field is."""
        values = {flag.replace("-", "_"): value for flag, value in defaults.engine_args.items()}
        found = {name: value for name, value in values.items() if name in ModelEntry.model_fields and value is not None}
        try:
            ModelEntry.model_validate({"name": "defaults", "type": "chat", **found})
        except ValidationError as error:
            problems += [
                Problem("config/vllm_config.yaml", findings.place(detail), findings.message(detail, ModelEntry))
                for detail in error.errors()
            ]
            return {}
        return found

    def router(self) -> RouterSettings:
        port = self.environment.router_port
        return self.file.router if port is None else self.file.router.model_copy(update={"port": port})

    def models(self) -> tuple[Model, ...]:
        if not any(entry.enabled for entry in self.file.models.values()):
            self.problems.append(Problem(self.shown, "models", "every model is disabled; enable at least one"))
        return tuple(
            model.model_copy(update={"endpoints": self._endpoints(model)}) for model in self.entries if model.enabled
        )

    def disabled(self) -> tuple[Model, ...]:
        return tuple(model for model in self.entries if not model.enabled)

    def _entries(self) -> list[Model]:
        ports = self._port_overrides()
        return [
            self._resolved(number, key, entry, ports.get(key))
            for number, (key, entry) in enumerate(self.file.models.items())
        ]

    def _resolved(self, number: int, key: str, entry: ModelEntry, port: int | None) -> Model:
        own = {"key": key, "number": number}
        if not entry.served_here:
            return Model.model_construct(**{**dict(entry), **own})
        given = entry.model_fields_set
        if entry.memory_gib is not None:  # says the same, and the model's own word goes before a default
            given = given | {"gpu_memory_utilization"}
        unset = {name: value for name, value in self.field_defaults.items() if name not in given}
        resolved = {
            **own,
            **unset,
            "path": entry.path or f"models/{key}",
            "port": port or entry.port or DEFAULT_PORTS[entry.type],
        }
        return Model.model_construct(**{**dict(entry), **resolved})

    def _endpoints(self, model: Model) -> list[Endpoint]:
        """With the keys and files that they name, as far as those are there."""
        found: list[Endpoint] = []
        for number, endpoint in enumerate(model.endpoints):
            place = f"models.{model.key}.endpoints.{number}"
            if endpoint.url in [each.url for each in found]:
                message = f'"{endpoint.url}" stands twice; remove one, or give it a larger weight'
                self.problems.append(Problem(self.shown, f"{place}.url", message))
            if self._is_the_router(endpoint.url):
                message = f'"{endpoint.url}" is the router itself, so that a request would never end; name another'
                self.problems.append(Problem(self.shown, f"{place}.url", message))
            update = {"api_key": self._api_key(endpoint, place), "ca": self._ca(endpoint, place)}
            found.append(endpoint.model_copy(update=update))
        return found

    def _is_the_router(self, url: str) -> bool:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        return port == self.router().port and _is_this_machine(parts.hostname or "", self.environment.router_host)

    def _api_key(self, endpoint: Endpoint, place: str) -> str | None:
        name = endpoint.api_key_variable
        if name is None:
            return endpoint.api_key
        value = self.variables.values.get(name)
        if value is None:
            message = f"the variable {name} is not set; set it in .env, as {name}=KEY"
            self.problems.append(Problem(self.shown, f"{place}.api_key", message))
        elif not re.fullmatch("[!-~]+", value):
            message = "use printable ASCII without spaces; it travels in an HTTP header"
            self.problems.append(Problem(self.variables.file_of(name), name, message))
        return value

    def _ca(self, endpoint: Endpoint, place: str) -> str | None:
        if endpoint.ca is None:
            return None
        file = self.home / endpoint.ca
        try:
            ssl.create_default_context(cafile=file)
        except OSError as error:  # ssl.SSLError, where there is no certificate in it, is one too
            wrong = "no certificate in PEM form in it" if isinstance(error, ssl.SSLError) else error.strerror
            message = f"{file}: {wrong}; name the PEM file of the authority"
            self.problems.append(Problem(self.shown, f"{place}.ca", message))
        return str(file)

    def _port_overrides(self) -> dict[str, int]:
        """VLLM_CHAT_PORT is meant for the model with the key `chat`, else for the only chat model."""
        overrides: dict[str, int] = {}
        for variable, value in sorted(self.variables.values.items()):
            match = PORT_VARIABLE.match(variable)
            if not match or variable in (variable_of("router_port"), variable_of("documents_port")):
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
        remote = [key for key in exact if not self.file.models[key].served_here]
        if remote:
            message = f'its endpoints alone serve "{remote[0]}", so that it has no port here; remove the variable'
            self.problems.append(Problem(self.variables.file_of(variable), variable, message))
            return []
        if exact or word not in get_args(Kind):
            return exact
        started = {key: model for key, model in self.file.models.items() if model.enabled and model.served_here}
        of_kind = [key for key, model in started.items() if model.type == word]
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
    if settings.reads_documents:
        if settings.documents.port in ports:
            message = f"{settings.documents.port} is already used by the router; choose another"
            problems.append(Problem(shown, "documents.port", message))
        ports.setdefault(settings.documents.port, "the document service")
    names: dict[str, str] = {}
    for model in settings.engines:
        if model.port in ports:
            taken_by = ports[model.port]
            problems.append(
                Problem(
                    shown, f"models.{model.key}.port", f"{model.port} is already used by {taken_by}; choose another"
                )
            )
        ports.setdefault(model.port, f'"{model.key}"')
    for model in settings.models:
        for name in model.names:
            if name in names:
                message = f'the name "{name}" is already used by "{names[name]}"; every name must lead to one model'
                problems.append(Problem(shown, f"models.{model.key}.name", message))
            names.setdefault(name, model.key)


def _check_ports_beside(settings: Settings, variables: Variables, problems: list[Problem]) -> None:
    """Those of Nginx, Prometheus and Grafana, where a profile wants them; in Docker they are published on one host."""
    taken = [(settings.environment.router_host, settings.router.port, "the router")]
    if settings.reads_documents and not settings.in_containers:
        taken.append((DOCUMENTS_HOST, settings.documents.port, "the document service"))
    taken += [(settings.environment.engine_host, model.port, f'"{model.key}"') for model in settings.engines]
    for host, field, who in _listening_beside(settings):
        port, name = getattr(settings.environment, field), variable_of(field)
        other = next((each for at, used, each in taken if used == port and _overlap(at, host)), None)
        if other:
            message = f"{port} is already used by {other}; choose another"
            problems.append(Problem(variables.file_of(name), name, message))
        taken.append((host, port, who))


def _listening_beside(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Host, field of the port, and who listens."""
    environment = settings.environment
    if "nginx" in environment.profiles:
        yield environment.nginx_host, "nginx_port", "Nginx"
        if settings.has_certificate or settings.in_containers:  # docker-compose.yml publishes it in any case
            yield environment.nginx_host, "nginx_tls_port", "Nginx for HTTPS"
    if "monitoring" in environment.profiles:
        yield environment.monitoring_host, "prometheus_port", "Prometheus"
        yield environment.monitoring_host, "grafana_port", "Grafana"


def _overlap(host: str, other: str) -> bool:
    """Whether both can't have the same port."""
    one, two = (ipaddress.ip_address("127.0.0.1" if each == "localhost" else each) for each in (host, other))
    return one == two or one.is_unspecified or two.is_unspecified


def _is_this_machine(host: str, listens_on: str) -> bool:
    if host in ("localhost", listens_on):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _url(host: str, port: int) -> str:
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _without_fields(engine_args: Mapping[str, FlagValue]) -> dict[str, FlagValue]:
    return {flag: value for flag, value in engine_args.items() if flag.replace("-", "_") not in ModelEntry.model_fields}


def _passed_on(variables: Variables, file: ModelsFile, endpoint_variables: frozenset[str]) -> dict[str, str]:
    """What `.env` says beyond our own variables is meant for the engines (NCCL_P2P_DISABLE, VLLM_LOGGING_LEVEL …)."""
    own = {*OWN_VARIABLES, *endpoint_variables, *(port_variable(key) for key in file.models)}
    return {name: variables.values[name] for name in sorted(variables.from_file) if name not in own}


def _shown(path: Path, home: Path) -> str:
    return str(path.relative_to(home)) if path.is_relative_to(home) else str(path)
