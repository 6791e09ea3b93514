"""`.env` and the process environment. A variable of the process wins over the same one in `.env`."""

import difflib
import ipaddress
import os
import re
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from dotenv import dotenv_values, set_key
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from vllm_unified.errors import ConfigError, Problem
from vllm_unified.settings.schema import Kind, Port

# What may run beside us, by Compose's own variable. In Docker these are profiles of docker-compose.yml with containers
# of their own, natively they are programs of supervisord.
Profile = Literal["nginx", "monitoring"]


def _split(value: Any) -> Any:
    return [each.strip() for each in value.split(",") if each.strip()] if isinstance(value, str) else value


class Environment(BaseModel):
    """The variables that the deployment itself reads. Every other line of `.env` reaches the engines as it is."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    router_host: str = Field(
        default="127.0.0.1", alias="VLLM_ROUTER_HOST", description="address that the router listens on"
    )
    engine_host: str = Field(
        default="127.0.0.1", alias="VLLM_ENGINE_HOST", description="address that the models' own servers listen on"
    )
    router_port: Port | None = Field(default=None, alias="VLLM_ROUTER_PORT", description="wins over router.port")
    api_key: str | None = Field(
        default=None, alias="VLLM_API_KEY", description="the key that clients send; made at the first start", repr=False
    )
    hf_token: str | None = Field(
        default=None, alias="HF_TOKEN", description="token for gated models on Hugging Face", repr=False
    )
    hf_endpoint: str = Field(
        default="https://huggingface.co",
        alias="HF_ENDPOINT",
        description="Hugging Face, or a mirror of it (default https://huggingface.co)",
    )
    modelscope_endpoint: str = Field(
        default="https://modelscope.cn",
        alias="MODELSCOPE_ENDPOINT",
        description="ModelScope, or a mirror of it (default https://modelscope.cn)",
    )
    modelscope_token: str | None = Field(
        default=None, alias="MODELSCOPE_API_TOKEN", description="token for private models on ModelScope", repr=False
    )
    download_timeout: float = Field(
        default=30.0,
        alias="HF_HUB_DOWNLOAD_TIMEOUT",
        gt=0,
        le=3600,
        description="seconds without a byte after which a download is taken up anew (default 30)",
    )
    offline: bool = Field(
        default=False, alias="VLLM_UNIFIED_OFFLINE", description="1: fetch nothing, and say what to bring instead"
    )
    hf_hub_offline: bool = Field(
        default=False, alias="HF_HUB_OFFLINE", description="the same, under Hugging Face's name"
    )
    visible_devices: str | None = Field(
        default=None,
        alias="CUDA_VISIBLE_DEVICES",
        description="the GPUs that belong to this deployment, as 0,1, UUIDs or MIG names",
    )
    devices_file: str | None = Field(
        default=None,
        alias="VLLM_UNIFIED_DEVICES",
        description="JSON file that stands in for this machine's devices, to plan for other ones",
    )
    engine_program: str | None = Field(
        default=None,
        alias="VLLM_UNIFIED_ENGINE_PROGRAM",
        description="command that serves a model in place of the vLLM beside us, as /opt/vllm/bin/vllm serve",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="where traces are sent, as http://collector:4318; off without it",
    )

    profiles: Annotated[tuple[Profile, ...], BeforeValidator(_split)] = Field(
        default=(),
        alias="COMPOSE_PROFILES",
        description="what runs beside the models, with commas: nginx, monitoring (Prometheus and Grafana)",
    )
    monitoring_host: str = Field(
        default="127.0.0.1",
        alias="VLLM_MONITORING_HOST",
        description="address that Prometheus and Grafana listen on",
    )
    prometheus_port: Port = Field(
        default=9090, alias="VLLM_PROMETHEUS_PORT", description="port of Prometheus (default 9090)"
    )
    grafana_port: Port = Field(default=3000, alias="VLLM_GRAFANA_PORT", description="port of Grafana (default 3000)")

    # Of the document service, under the names that its forerunners had.
    internal_api_token: str | None = Field(
        default=None,
        alias="INTERNAL_API_TOKEN",
        description="what /internal/infer wants; closed without it",
        repr=False,
    )
    documents_port: Port | None = Field(
        default=None, alias="VLLM_DOCUMENTS_PORT", description="wins over documents.port"
    )
    max_upload_mib: int | None = Field(
        default=None, alias="MAX_UPLOAD_SIZE_MB", ge=1, le=65536, description="wins over documents.max_upload_mib"
    )
    pages_in_flight: int | None = Field(
        default=None, alias="PDF_MAX_CONCURRENCY", ge=1, le=1024, description="wins over documents.pages_in_flight"
    )
    dpi: int | None = Field(default=None, alias="PDF_WORKER_DPI", ge=36, le=600, description="wins over documents.dpi")
    retries: int | None = Field(
        default=None, alias="MAX_PAGE_RETRIES", ge=0, le=10, description="wins over documents.retries"
    )
    skip_joining: bool | None = Field(
        default=None, alias="SKIP_CROSS_PAGE_MERGE", description="true: documents.join_pages is false"
    )

    nginx_host: str = Field(default="127.0.0.1", alias="VLLM_NGINX_HOST", description="address that Nginx listens on")
    nginx_port: Port = Field(default=80, alias="VLLM_NGINX_PORT", description="Nginx' port for HTTP (default 80)")
    nginx_tls_port: Port = Field(
        default=443,
        alias="VLLM_NGINX_TLS_PORT",
        description="its port for HTTPS, where config/tls has a certificate (default 443)",
    )

    @property
    def is_offline(self) -> bool:
        return self.offline or self.hf_hub_offline

    @property
    def otlp_traces_url(self) -> str | None:
        """By OTLP over HTTP with Protobuf; None: tracing is off."""
        return None if self.otlp_endpoint is None else f"{self.otlp_endpoint}/v1/traces"

    @field_validator("hf_endpoint", "modelscope_endpoint")
    @classmethod
    def _hub(cls, value: str) -> str:
        if not _is_base_address(value):
            raise ValueError("no address of a hub; use https://HOST, with the token in a variable of its own")
        return value.rstrip("/")

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not _is_base_address(value):
            raise ValueError(
                "no address of a collector; use http://HOST:4318, with a key in OTEL_EXPORTER_OTLP_HEADERS"
            )
        return value.rstrip("/")

    @field_validator("api_key", "internal_api_token", "hf_token", "modelscope_token")
    @classmethod
    def _sendable(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[!-~]+", value):
            raise ValueError("use printable ASCII without spaces; it travels in an HTTP header")
        return value

    @field_validator("router_host", "engine_host", "nginx_host", "monitoring_host")
    @classmethod
    def _address(cls, value: str) -> str:
        if value != "localhost":
            try:
                ipaddress.ip_address(value)
            except ValueError:
                raise ValueError(f'"{value}" is no address; use 127.0.0.1, 0.0.0.0 or one of this machine') from None
        return value

    @field_validator("engine_program")
    @classmethod
    def _words(cls, value: str | None) -> str | None:
        try:
            shlex.split(value or "")
        except ValueError as error:
            raise ValueError(f"{value!r} can't be split into words: {str(error).lower()}") from None
        return value

    @field_validator("visible_devices")
    @classmethod
    def _device_names(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w-]+(,\s*[\w-]+)*", value):
            raise ValueError("name GPUs as 0,1, by their UUIDs or MIG names, with commas between them")
        return value


def _is_base_address(value: str) -> bool:
    """Of a server, to which paths are added; it is shown, so it holds no password."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # no port, no IPv6 address
        return False
    return bool(usable) and parts.username is None and not parts.query and not parts.fragment


@dataclass(frozen=True)
class Variables:
    """All variables, and where each stands."""

    values: Mapping[str, str]
    from_file: frozenset[str]

    def file_of(self, name: str) -> str:
        return ".env" if name in self.from_file else "environment"


def port_variable(key: str) -> str:
    return f"VLLM_{key.upper().replace('-', '_')}_PORT"


PORT_VARIABLE = re.compile(r"^VLLM_([A-Z0-9_]+)_PORT$")
# What the image says of itself, as `docker`.
RUNTIME_VARIABLE = "VLLM_UNIFIED_RUNTIME"
# Said to the program in the shell that starts it: they say where .env is.
SHELL_VARIABLES = ("VLLM_UNIFIED_HOME", "VLLM_UNIFIED_CONFIG", RUNTIME_VARIABLE)
OWN_VARIABLES = (
    *(str(field.alias) for field in Environment.model_fields.values()),
    *(port_variable(kind) for kind in get_args(Kind)),
)


def read_variables(home: Path, environ: Mapping[str, str]) -> Variables:
    """An empty value counts as unset, as in `.env.example`."""
    path = home / ".env"
    try:
        in_file = {name: value for name, value in dotenv_values(path).items() if value} if path.is_file() else {}
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(".env", f"byte {error.start}", "not UTF-8; save the file as UTF-8")]) from None
    given = {name: value for name, value in environ.items() if value}
    return Variables({**in_file, **given}, frozenset(in_file) - frozenset(given))


def likely_typo(name: str) -> str | None:
    """The variable of ours that `name` was probably meant to be."""
    if name in OWN_VARIABLES or not name.startswith(("VLLM_", "HF_", "CUDA_")):
        return None
    near = difflib.get_close_matches(name, OWN_VARIABLES, n=1, cutoff=0.9)
    return near[0] if near else None


def variable_of(field: str) -> str:
    return str(Environment.model_fields[field].alias)


def ensure_api_key(home: Path, environ: Mapping[str, str]) -> bool:
    """Put a random key into `.env` (mode 0600) unless one is set; True if one was made."""
    path = home / ".env"
    if read_variables(home, environ).values.get(variable_of("api_key")):
        if path.exists():
            path.chmod(0o600)
        return False
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.fchmod(descriptor, 0o600)
    os.close(descriptor)
    set_key(path, variable_of("api_key"), f"sk-{secrets.token_urlsafe(24)}", quote_mode="never")
    path.chmod(0o600)
    return True


# Those that win over a field of models.json.
FIELD_VARIABLES = (
    "router_port",
    "documents_port",
    "max_upload_mib",
    "pages_in_flight",
    "dpi",
    "retries",
    "skip_joining",
)
# Those that each download reads anew, and nothing that runs.
DOWNLOAD_VARIABLES = (
    "hf_endpoint",
    "modelscope_endpoint",
    "modelscope_token",
    "download_timeout",
    "offline",
    "hf_hub_offline",
)
SECRET_VARIABLES = tuple(
    variable_of(field) for field in ("api_key", "hf_token", "modelscope_token", "internal_api_token")
)


def as_fields(values: Mapping[str, str]) -> dict[str, Any]:
    return {name: values[name] for name in OWN_VARIABLES if name in values}
