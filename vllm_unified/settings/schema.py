"""The fields of config/models.json and config/vllm_config.yaml: default, check, description, in one place."""

import ipaddress
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from vllm_unified.settings import flags

Kind = Literal["chat", "embedding", "rerank", "ocr"]
DEFAULT_PORTS: dict[Kind, int] = {"chat": 8001, "embedding": 8002, "rerank": 8003, "ocr": 8004}

# A key names a supervisord program, a log file and a state file; a name travels in URLs and headers.
KEY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,47}$"
NAME_PATTERN = r"^\w[\w.:/@+-]{0,199}$"
RESERVED_KEYS = ("router", "documents", "engines", "supervisord", "install", "nginx", "prometheus", "grafana")

Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
KV_CACHE_FLAG = "kv-cache-memory-bytes"
FlagValue = bool | int | float | str | list[Any] | dict[str, Any] | None


def _device_list(value: Any) -> Any:
    """`0`, `"0"`, `"0,1"` and `[0, 1]` say the same of devices."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, str) and re.fullmatch(r"\d+(,\s*\d+)*", value):
        return [int(number) for number in value.split(",")]
    return value


# What the deployment gives to each engine by itself, and where to say it instead.
PER_ENGINE_VARIABLES = {"VLLM_API_KEY": ".env", "CUDA_VISIBLE_DEVICES": "gpus", "VLLM_PORT": "port"}


def _not_ours(value: dict[str, str]) -> dict[str, str]:
    wrong = [
        f'"{name}" is set by the deployment; use {PER_ENGINE_VARIABLES[name]}'
        for name in value
        if name in PER_ENGINE_VARIABLES
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    return value


VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
EngineVariables = Annotated[dict[VariableName, str], AfterValidator(_not_ours)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _base_address(value: str) -> str:
    """Without `/v1`, which every path that is asked there begins with."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # no port, no IPv6 address
        usable = False
    if usable and parts.username is not None:  # a password, perhaps: not shown
        raise ValueError("an address has no user name in it; put the key into api_key")
    if not usable or parts.query or parts.fragment or not re.fullmatch("[!-~]+", value):
        raise ValueError(f'"{value}" is no address of a server; use http://HOST:PORT/v1 or https://HOST/v1')
    return value.rstrip("/").removesuffix("/v1").rstrip("/")


class Endpoint(_Strict):
    """A remote OpenAI-compatible server that serves a model; a string in the file is its `url`."""

    url: Annotated[str, AfterValidator(_base_address)] = Field(
        description="its address, as http://gpu-2:8000/v1; /v1 may be left out"
    )
    api_key: Annotated[str, Field(pattern="^[!-~]+$")] | None = Field(
        default=None,
        repr=False,
        exclude=True,
        description="the key it wants; $NAME takes the variable NAME of .env or of the environment",
    )
    model: Name | None = Field(default=None, description="the name that the model has there (default: the same)")
    ca: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="PEM file with the authority that signed its certificate"
    )
    timeout: float = Field(default=600.0, gt=0, le=86400, description="seconds that it may be silent in an answer")
    weight: int = Field(default=1, ge=1, le=1000, description="its share of the requests among the replicas")

    @property
    def api_key_variable(self) -> str | None:
        """The variable that `api_key` names, until the key itself stands in its place."""
        return self.api_key[1:] if self.api_key and self.api_key.startswith("$") else None

    @model_validator(mode="after")
    def _has_a_certificate(self) -> "Endpoint":
        if self.ca and self.url.startswith("http:"):
            raise ValueError("ca is for an https address; remove it, or write https in url")
        return self


def _endpoint(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


def _complete_schema(schema: dict[str, Any]) -> None:
    """The older names of fields, which pydantic leaves out; no default where it depends on other fields."""
    properties = schema["properties"]
    properties["aliases"] = properties["served_model_names"]
    one_number = [{"minimum": 0, "type": "integer"}, {"type": "string"}]
    properties["cuda_device"] = {**properties["gpus"], "anyOf": [*properties["gpus"]["anyOf"], *one_number]}
    for name in ("path", "port"):
        del properties[name]["default"]


# How the engine of a model runs: without a meaning where none runs on this machine.
ENGINE_FIELDS = (
    "path",
    "port",
    "gpus",
    "gpu_memory_utilization",
    "memory_gib",
    "kv_cache_memory_gib",
    "priority",
    "max_model_len",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "dtype",
    "trust_remote_code",
    "repo",
    "revision",
    "source",
    "engine_args",
    "env",
    "startup_timeout",
)


class ModelEntry(_Strict):
    """One entry of `models`: one model, served by one vLLM server. Unset fields are left to vLLM."""

    model_config = ConfigDict(json_schema_extra=_complete_schema)

    name: Name = Field(description="the name that clients send as `model`")
    type: Kind = Field(description="what the model does; decides which paths it serves and how vLLM runs it")
    path: Annotated[str, Field(min_length=1)] = Field(
        default="", description="folder with the weights, absolute or from the project's folder (default models/KEY)"
    )
    port: Port = Field(
        default=0,
        validate_default=False,
        description="port of the model's own server (default 8001 chat, 8002 embedding, 8003 rerank, 8004 ocr)",
    )
    enabled: bool = Field(default=True, description="false: the entry is checked but neither started nor served")
    required: bool = Field(default=True, description="false: the deployment counts as ready without this model")
    served_model_names: list[Name] = Field(
        default=[],
        validation_alias=AliasChoices("served_model_names", "aliases"),
        description="further names that clients may send",
    )
    gpus: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_device_list), Field(min_length=1)] | None = (
        Field(
            default=None,
            validation_alias=AliasChoices("gpus", "cuda_device"),
            description="the GPUs, as numbers among the visible ones (default: placed by themselves)",
        )
    )
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, description="share of each of its devices' memory; vLLM takes 0.92 when unset"
    )
    memory_gib: float | None = Field(
        default=None, gt=0, description="GiB of each of its devices, in place of gpu_memory_utilization"
    )
    kv_cache_memory_gib: float | None = Field(
        default=None, gt=0, description="GiB of KV cache on each of its devices, in place of what the share leaves"
    )
    priority: int = Field(
        default=0, description="of the models that wait for one device the highest starts first, then the file's order"
    )
    max_model_len: int | None = Field(default=None, ge=1, description="longest context, in tokens")
    tensor_parallel_size: int = Field(default=1, ge=1, description="devices that share each layer")
    pipeline_parallel_size: int = Field(default=1, ge=1, description="devices that follow one another")
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] | None = Field(
        default=None, description="type of the weights in memory"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the weights")
    repo: str | None = Field(
        default=None, pattern=r"^\w[\w.-]*/\w[\w.-]*$", description="where the weights come from: OWNER/NAME on the hub"
    )
    revision: str | None = Field(
        default=None, pattern=r"^\w[\w./-]*$", description="branch, tag or commit on the hub (default: its main one)"
    )
    source: Literal["huggingface", "modelscope", "auto"] = Field(
        default="auto", description="the hub; auto asks both and takes the one that answers first"
    )
    engine_args: dict[str, FlagValue] = Field(
        default={}, description="any flag of vLLM's server; true is --flag, false is --no-flag, null drops a default"
    )
    env: EngineVariables = Field(default={}, description="environment of this server alone")
    startup_timeout: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="seconds from start to ready (default router.startup_timeout)"
    )
    endpoints: list[Annotated[Endpoint, BeforeValidator(_endpoint)]] = Field(
        default=[], description="remote OpenAI servers that serve it; with `path` or `repo` it is served here as well"
    )
    balancing: Literal["least_loaded", "round_robin", "sticky"] = Field(
        default="least_loaded", description="how its replicas share the requests; sticky keeps a session on one"
    )
    max_concurrent: int | None = Field(
        default=None, ge=1, description="requests at a time; more wait in a queue (default: as many as come)"
    )
    max_queue: int = Field(default=100, ge=0, description="requests that may wait; more are refused with 429")
    queue_timeout: float = Field(
        default=60.0, gt=0, le=3600, description="seconds that a request waits in the queue before 503"
    )
    wait_for_ready: float = Field(
        default=0.0, ge=0, le=3600, description="seconds that a request waits for a model that is starting"
    )

    @property
    def served_here(self) -> bool:
        """Whether it has an engine of its own; else its endpoints alone serve it."""
        return bool(self.path or self.repo) or not self.endpoints

    @property
    def devices_needed(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @field_validator("engine_args")
    @classmethod
    def _known_flags(cls, value: dict[str, FlagValue]) -> dict[str, FlagValue]:
        return flags.normalised(value, own_fields=set(cls.model_fields))

    @model_validator(mode="after")
    def _said_once(self) -> "ModelEntry":
        if self.memory_gib is not None and self.gpu_memory_utilization is not None:
            raise ValueError("memory_gib and gpu_memory_utilization say the same; remove one")
        if self.kv_cache_memory_gib is not None and KV_CACHE_FLAG in self.engine_args:
            raise ValueError(f'kv_cache_memory_gib and "{KV_CACHE_FLAG}" in engine_args say the same; remove one')
        return self

    @model_validator(mode="after")
    def _engine_has_fields_of_engines(self) -> "ModelEntry":
        idle = () if self.served_here else [name for name in ENGINE_FIELDS if name in self.model_fields_set]
        if idle:
            raise ValueError(
                f"its endpoints alone serve it, and {' and '.join(idle)} would be of an engine on this machine; "
                "remove that, or say in path or repo which weights an engine here serves"
            )
        return self

    @model_validator(mode="after")
    def _one_device_a_rank(self) -> "ModelEntry":
        if self.gpus is None:
            return self
        if len(set(self.gpus)) != len(self.gpus):
            raise ValueError(f"gpus {self.gpus} names a GPU twice")
        if len(self.gpus) != self.devices_needed:
            raise ValueError(
                f"gpus names {len(self.gpus)} of them, but tensor_parallel_size × pipeline_parallel_size is "
                f"{self.devices_needed}; name {self.devices_needed}, or leave gpus out"
            )
        return self


class Model(ModelEntry):
    """An entry under its key, with `path` and `port` settled: "" and 0 where it has no engine here.

    `number`: its place in the file, whatever else is enabled.
    """

    key: str
    number: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.served_model_names)


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value))
    except ValueError:
        raise ValueError(f'"{value}" is no network; use ADDRESS or ADDRESS/BITS, as 10.1.0.0/16') from None


Network = Annotated[str, AfterValidator(_network)]


class RouterSettings(_Strict):
    """`router` in models.json."""

    port: Port = Field(default=8000, description="port of the router")
    health_check_interval: float = Field(default=2.0, gt=0, le=3600, description="seconds between looks at each engine")
    startup_timeout: float = Field(default=1800.0, gt=0, description="seconds that a model may take to be ready")
    max_body_mib: int = Field(default=32, ge=1, le=1024, description="largest request, in MiB")
    retries: int = Field(
        default=3, ge=0, le=10, description="further tries of a request that no byte of an answer came back for"
    )
    cors_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[!-~]+[^/])$")]] = Field(
        default=[], description="web pages that may call it from a browser, as https://app.example; * is any"
    )
    access_log: bool = Field(default=True, description="one line of JSON a request, in run/logs/router.log")
    trusted_proxies: list[Network] = Field(
        default=["127.0.0.0/8", "::1/128"],
        description="networks of proxies that are believed when they say in X-Forwarded-For who the client is",
    )


class SystemSettings(_Strict):
    """`system` in models.json."""

    drain_timeout: float = Field(
        default=30.0, ge=0, le=3600, description="seconds that requests in flight are given when a server stops"
    )
    longest_backoff: float = Field(
        default=300.0, ge=1, le=3600, description="longest pause between two tries of a model that fails, in seconds"
    )
    progress_check: bool = Field(
        default=True, description="restart an engine that hangs though it answers its health check"
    )
    progress_interval: float = Field(
        default=60.0, gt=0, le=3600, description="seconds between two looks at an engine's progress"
    )
    progress_timeout: float = Field(
        default=120.0, gt=0, le=3600, description="seconds without progress that make a look a miss"
    )
    progress_misses: int = Field(
        default=3, ge=1, le=100, description="misses in a row that make an engine count as hung"
    )


class DocumentsSettings(_Strict):
    """`documents` in models.json: the service that reads images and PDFs with the first model of the type ocr."""

    port: Port = Field(default=8010, description="port of the service, on 127.0.0.1; clients come through the router")
    max_upload_mib: int = Field(default=512, ge=1, le=65536, description="largest upload, in MiB")
    max_pages: int = Field(default=5000, ge=1, le=100_000, description="pages of the longest document")
    max_waiting_pages: int = Field(
        default=20_000, ge=1, description="pages that may wait to be read; further documents are refused with 429"
    )
    pages_in_flight: int | None = Field(
        default=None, ge=1, le=1024, description="pages that are read at a time (default: as many as keep it busy)"
    )
    dpi: int = Field(default=144, ge=36, le=600, description="pixels per inch that a page of a PDF is drawn with")
    retries: int = Field(default=3, ge=0, le=10, description="further attempts at a page that was not read well")
    join_pages: bool = Field(default=True, description="put paragraphs and tables together that a page break parts")
    keep_days: float = Field(default=7.0, gt=0, le=3650, description="days that a finished document is kept")
    keep_gib: float = Field(default=20.0, gt=0, description="GiB of finished documents; beyond it the oldest go")
    allowed_networks: list[Network] = Field(
        default=[], description="private networks that documents may be fetched from and webhooks sent to"
    )
    allowed_hosts: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,252}$")]] = Field(
        default=[], description="hosts of private addresses for which the same holds"
    )


class NginxSettings(_Strict):
    """`nginx` in models.json: the profile of that name."""

    requests_per_second: int = Field(
        default=100, ge=0, le=1_000_000, description="of one address, before keys are looked at; 0 is no limit"
    )
    burst: int = Field(default=200, ge=0, le=1_000_000, description="requests of one address beyond that, at once")
    hsts_max_age: int = Field(
        default=0,
        ge=0,
        description="seconds that a browser insists on TLS after its last visit (HSTS); 0 is not at all",
    )


class ModelsFile(_Strict):
    """config/models.json."""

    schema_file: str | None = Field(default=None, alias="$schema", description="for editors, which complete and check")
    models: dict[Annotated[str, Field(pattern=KEY_PATTERN)], ModelEntry] = Field(
        min_length=1, description="the models, under any key you like"
    )
    router: RouterSettings = RouterSettings()
    system: SystemSettings = SystemSettings()
    documents: DocumentsSettings = DocumentsSettings()
    nginx: NginxSettings = NginxSettings()

    @field_validator("models")
    @classmethod
    def _free_keys(cls, value: dict[str, ModelEntry]) -> dict[str, ModelEntry]:
        for key in value:
            if key.lower() in RESERVED_KEYS:
                raise ValueError(f'the key "{key}" is taken by a part of the deployment; choose another')
        return value


class EngineDefaults(_Strict):
    """config/vllm_config.yaml: flags of vLLM's server for every engine, in sections that only order them."""

    server: dict[str, FlagValue] = Field(default={}, description="HTTP server")
    parallelism: dict[str, FlagValue] = Field(default={}, description="how a model is spread over devices")
    scheduler: dict[str, FlagValue] = Field(default={}, description="batching")
    cache: dict[str, FlagValue] = Field(default={}, description="KV cache and memory")
    logging: dict[str, FlagValue] = Field(default={}, description="what the servers write to their logs")
    env: EngineVariables = Field(default={}, description="environment of every engine")

    @field_validator("server", "parallelism", "scheduler", "cache", "logging", mode="before")
    @classmethod
    def _known_flags(cls, value: Any) -> Any:
        if value is None:  # a section whose lines are all commented out
            return {}
        return flags.normalised(value, own_fields=set()) if isinstance(value, dict) else value

    @field_validator("env", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    @property
    def engine_args(self) -> dict[str, FlagValue]:
        return {**self.server, **self.parallelism, **self.scheduler, **self.cache, **self.logging}


class DeviceEntry(_Strict):
    """A device in a file that stands in for those of the machine."""

    kind: Literal["gpu", "cpu"] = "gpu"
    name: Annotated[str, Field(min_length=1)] = "stand-in"
    memory_gib: float = Field(gt=0)
    free_gib: float | None = Field(default=None, ge=0)
    uuid: Annotated[str, Field(pattern=r"^(GPU|MIG)-[\w-]+$")] | None = None
    parts: list["DeviceEntry"] = []

    @model_validator(mode="after")
    def _possible(self) -> "DeviceEntry":
        if self.free_gib is not None and self.free_gib > self.memory_gib:
            raise ValueError(f"free_gib {self.free_gib:g} is more than memory_gib {self.memory_gib:g}")
        if any(part.parts or part.kind != self.kind for part in self.parts):
            raise ValueError("the parts of a GPU are GPUs without parts")
        if self.kind == "cpu" and (self.parts or self.uuid):
            raise ValueError("a CPU has neither parts nor a uuid")
        return self


class Topology(_Strict):
    """The file that VLLM_UNIFIED_DEVICES or --devices names."""

    devices: list[DeviceEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Topology":
        if len({device.kind for device in self.devices}) > 1:
            raise ValueError('devices of the kinds "gpu" and "cpu" cannot stand together')
        given = [each.uuid for device in self.devices for each in (device, *device.parts) if each.uuid]
        if len(set(given)) < len(given):
            raise ValueError("a uuid stands twice")
        return self
