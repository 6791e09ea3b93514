"""A field, key or variable that nothing reads is a defect. Here each one is changed, and something else changes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import API_KEY, AUTHORITY, CHECKOUT, Project
from vllm_unified import machine
from vllm_unified.devices import GIB, Device
from vllm_unified.engines import placement
from vllm_unified.engines.command import engine_command
from vllm_unified.engines.handover import orders_for
from vllm_unified.engines.orders import Orders
from vllm_unified.hub.hubs import hubs_of
from vllm_unified.router.registry import Registry
from vllm_unified.settings import Settings, load
from vllm_unified.settings.environment import OWN_VARIABLES
from vllm_unified.settings.schema import (
    DocumentsSettings,
    Endpoint,
    EngineDefaults,
    ModelEntry,
    ModelsFile,
    NginxSettings,
    RouterSettings,
    SystemSettings,
)
from vllm_unified.supervision.companions import GRAFANA, PROMETHEUS, Companion, wanted
from vllm_unified.supervision.conf import supervisord_conf

GPUS = [Device(index, "cuda", "test", str(index), 80 * GIB, 80 * GIB) for index in range(4)]
BASE = {"name": "a", "type": "chat"}
Effect = Callable[[Settings], Any]


def command(settings: Settings) -> list[str]:
    return list(engine_command(settings, placement.plan(settings, GPUS).of(settings.models[0].key)).argv)


def environment(settings: Settings) -> dict[str, str]:
    return dict(engine_command(settings, placement.plan(settings, GPUS).of(settings.models[0].key)).environment)


def orders(settings: Settings) -> Orders:
    cards = str(CHECKOUT / "tests" / "topologies" / "2x80.json")
    environment = settings.environment.model_copy(update={"api_key": API_KEY, "devices_file": cards})
    return orders_for(replace(settings, environment=environment), settings.models[0], {})


def devices(settings: Settings) -> list[str]:
    return [device.label for device in placement.plan(settings, GPUS).of("chat").devices]


def served(settings: Settings) -> list[str]:
    return [model.key for model in settings.models]


def remedy(settings: Settings) -> list[str]:
    """What `check --machine` says of weights that are not there."""
    return [str(problem) for problem in machine.missing_weights(settings)]


def asked(settings: Settings) -> list[str]:
    """Where a download looks for the first model."""
    model = settings.models[0]
    hubs = hubs_of(settings.environment, model.source)
    return [f"{hub.url(str(model.repo), str(model.revision), '')} {hub.token}" for hub in hubs]


def patience(settings: Settings) -> float:
    return settings.startup_timeout(settings.models[0])


def of_model(field: str) -> Effect:
    return lambda settings: getattr(settings.models[0], field)


def of_router(field: str) -> Effect:
    return lambda settings: getattr(settings.router, field)


def routed(settings: Settings) -> bytes:
    """What the router says to an engine in every request."""
    return Registry(settings).served[0].replicas[0].fixed_headers


def command_of(companion: Companion) -> Effect:
    return lambda settings: companion.command(settings, "/usr/bin/it")


MODEL_FIELDS: dict[str, tuple[Any, Effect]] = {
    "name": ("b", command),
    "type": ("embedding", command),
    "path": ("/weights", command),
    "port": (9009, command),
    "enabled": (False, served),
    "required": (False, lambda settings: [model.key for model in settings.models if model.required]),
    "served_model_names": (["alias"], command),
    "gpus": ([3], devices),
    "gpu_memory_utilization": (0.5, command),
    "memory_gib": (40, command),
    "kv_cache_memory_gib": (8, command),
    "priority": (-1, lambda settings: placement.plan(settings, GPUS).order),
    "max_model_len": (100, command),
    "tensor_parallel_size": (2, command),
    "pipeline_parallel_size": (2, command),
    "dtype": ("float16", command),
    "trust_remote_code": (True, command),
    "repo": ("owner/name", remedy),
    "revision": ("v1", asked),
    "source": ("modelscope", asked),
    "engine_args": ({"max-num-seqs": 3}, command),
    "env": ({"A": "b"}, environment),
    "startup_timeout": (5.0, patience),
    # From here on seen at work in tests/router.
    "endpoints": ([{"url": "http://gpu-2:8000", "weight": 2}], of_model("endpoints")),
    "balancing": ("sticky", of_model("balancing")),
    "max_concurrent": (4, of_model("max_concurrent")),
    "max_queue": (7, of_model("max_queue")),
    "queue_timeout": (5.0, of_model("queue_timeout")),
    "wait_for_ready": (5.0, of_model("wait_for_ready")),
}


def test_no_field_is_forgotten() -> None:
    assert set(MODEL_FIELDS) == set(ModelEntry.model_fields)
    assert set(ROUTER_FIELDS) == set(RouterSettings.model_fields)
    assert set(SYSTEM_FIELDS) == set(SystemSettings.model_fields)
    assert set(DOCUMENTS_FIELDS) == set(DocumentsSettings.model_fields)
    assert set(NGINX_FIELDS) == set(NginxSettings.model_fields)
    assert set(ENDPOINT_FIELDS) == set(Endpoint.model_fields)
    assert set(VARIABLES) == set(OWN_VARIABLES)
    assert set(ModelsFile.model_fields) == {"schema_file", "models", "router", "system", "documents", "nginx"}
    assert set(EngineDefaults.model_fields) == {*SECTIONS, "env"}


@pytest.mark.parametrize("field", MODEL_FIELDS)
def test_a_models_field(project: Project, field: str) -> None:
    value, effect = MODEL_FIELDS[field]
    other = {"name": "other", "type": "rerank"}
    base = {**BASE, "repo": "someone/model"} if field in ("revision", "source") else BASE
    project.write({"chat": base, "other": other})
    before = effect(project.load())
    project.write({"chat": {**base, field: value}, "other": other})
    assert effect(project.load()) != before


@pytest.mark.parametrize(
    ("older", "newer"), [("cuda_device", {"gpus": [2]}), ("aliases", {"served_model_names": ["x"]})]
)
def test_an_older_name_says_the_same(project: Project, older: str, newer: dict[str, Any]) -> None:
    (value,) = newer.values()
    project.write({"chat": {**BASE, **newer}})
    expected = project.load().models
    for written in (value, "2", 2) if older == "cuda_device" else (value,):
        project.write({"chat": {**BASE, older: written}})
        assert project.load().models == expected


# All but port and startup_timeout are seen at work in tests/router.
ROUTER_FIELDS: dict[str, tuple[Any, Effect]] = {
    "port": (9000, lambda settings: settings.router_url),
    "health_check_interval": (9.0, of_router("health_check_interval")),
    "startup_timeout": (7.0, patience),
    "max_body_mib": (1, of_router("max_body_mib")),
    "retries": (0, of_router("retries")),
    "cors_origins": (["https://app.example"], of_router("cors_origins")),
    "access_log": (False, of_router("access_log")),
    "trusted_proxies": (["10.1.0.0/16"], of_router("trusted_proxies")),
}
# All of them are seen at work in tests/engines/test_keeper.py.
SYSTEM_FIELDS: dict[str, tuple[Any, Effect]] = {
    "drain_timeout": (3.0, lambda settings: (command(settings), supervisord_conf(settings))),
    "longest_backoff": (9.0, lambda settings: orders(settings).longest_backoff),
    "progress_check": (False, lambda settings: orders(settings).progress),
    "progress_interval": (5.0, lambda settings: orders(settings).progress),
    "progress_timeout": (9.0, lambda settings: orders(settings).progress),
    "progress_misses": (1, lambda settings: orders(settings).progress),
}


def of_documents(field: str) -> Effect:
    return lambda settings: getattr(settings.documents, field)


# All of them are seen at work in tests/documents.
DOCUMENTS_FIELDS: dict[str, tuple[Any, Effect]] = {
    "port": (8011, lambda settings: settings.documents_url),
    "max_upload_mib": (1, of_documents("max_upload_mib")),
    "max_pages": (2, of_documents("max_pages")),
    "max_waiting_pages": (9, of_documents("max_waiting_pages")),
    "pages_in_flight": (3, of_documents("pages_in_flight")),
    "dpi": (72, of_documents("dpi")),
    "retries": (0, of_documents("retries")),
    "join_pages": (False, of_documents("join_pages")),
    "keep_days": (1.0, of_documents("keep_days")),
    "keep_gib": (1.0, of_documents("keep_gib")),
    "allowed_networks": (["10.1.0.0/16"], of_documents("allowed_networks")),
    "allowed_hosts": (["files.example"], of_documents("allowed_hosts")),
}


def of_nginx(field: str) -> Effect:
    return lambda settings: getattr(settings.nginx, field)


# All of them are seen at work in tests/nginx.
NGINX_FIELDS: dict[str, tuple[Any, Effect]] = {
    "requests_per_second": (7, of_nginx("requests_per_second")),
    "burst": (7, of_nginx("burst")),
    "hsts_max_age": (86400, of_nginx("hsts_max_age")),
}


# All of them are seen at work in tests/router.
ENDPOINT_FIELDS: dict[str, Any] = {
    "url": "https://gpu-3:8000",
    "api_key": "sk-theirs",
    "model": "theirs",
    "ca": str(AUTHORITY),
    "timeout": 5.0,
    "weight": 3,
}


@pytest.mark.parametrize("field", ENDPOINT_FIELDS)
def test_a_field_of_an_endpoint(project: Project, field: str) -> None:
    value = ENDPOINT_FIELDS[field]
    endpoint = {"url": "https://gpu-2:8000"}
    project.write({"chat": {**BASE, "endpoints": [endpoint]}})
    assert getattr(project.load().models[0].endpoints[0], field) != value
    project.write({"chat": {**BASE, "endpoints": [{**endpoint, field: value}]}})
    assert getattr(project.load().models[0].endpoints[0], field) == value


SECTION_FIELDS = {
    "router": ROUTER_FIELDS,
    "system": SYSTEM_FIELDS,
    "documents": DOCUMENTS_FIELDS,
    "nginx": NGINX_FIELDS,
}


@pytest.mark.parametrize(
    ("section", "field"),
    [(section, field) for section, fields in SECTION_FIELDS.items() for field in fields],
)
def test_a_field_of_a_section(project: Project, section: str, field: str) -> None:
    value, effect = SECTION_FIELDS[section][field]
    project.write({"chat": BASE})
    before = effect(project.load())
    project.write({"chat": BASE}, **{section: {field: value}})
    assert effect(project.load()) != before


VARIABLES: dict[str, tuple[str, Effect]] = {
    "VLLM_ROUTER_HOST": ("::1", lambda settings: settings.router_url),
    "VLLM_ENGINE_HOST": ("0.0.0.0", command),
    "VLLM_ROUTER_PORT": ("9000", lambda settings: settings.router_url),
    "VLLM_CHAT_PORT": ("9001", command),
    "VLLM_EMBEDDING_PORT": ("9002", lambda settings: settings.models[1].port),
    "VLLM_RERANK_PORT": ("9003", lambda settings: settings.models[2].port),
    "VLLM_OCR_PORT": ("9004", lambda settings: settings.models[3].port),
    "VLLM_API_KEY": ("sk-another", lambda settings: (environment(settings), routed(settings))),
    "HF_TOKEN": ("hf_x", lambda settings: (environment(settings), asked(settings))),
    # Seen at work in tests/hub, as is the time-out.
    "HF_ENDPOINT": ("https://mirror.example", asked),
    "MODELSCOPE_ENDPOINT": ("https://mirror.example", asked),
    "MODELSCOPE_API_TOKEN": ("ms-x", asked),
    "HF_HUB_DOWNLOAD_TIMEOUT": ("7", lambda settings: settings.environment.download_timeout),
    "VLLM_UNIFIED_OFFLINE": ("1", lambda settings: settings.environment.is_offline),
    "HF_HUB_OFFLINE": ("1", lambda settings: settings.environment.is_offline),
    "CUDA_VISIBLE_DEVICES": ("1", lambda settings: settings.environment.visible_devices),
    "VLLM_UNIFIED_DEVICES": ("/cards.json", lambda settings: settings.devices_file),
    "VLLM_UNIFIED_ENGINE_PROGRAM": ("/opt/vllm serve", command),
    # Seen at work in tests/router/test_spans.py and tests/documents/test_spans.py.
    "OTEL_EXPORTER_OTLP_ENDPOINT": ("http://collector:4318", command),
    "COMPOSE_PROFILES": ("nginx", lambda settings: [each.name for each in wanted(settings)]),
    # Seen at work in tests/nginx.
    "VLLM_NGINX_HOST": ("0.0.0.0", lambda settings: settings.environment.nginx_host),
    "VLLM_NGINX_PORT": ("8080", lambda settings: settings.nginx_url),
    "VLLM_NGINX_TLS_PORT": ("8443", lambda settings: settings.environment.nginx_tls_port),
    "VLLM_MONITORING_HOST": ("0.0.0.0", command_of(PROMETHEUS)),
    "VLLM_PROMETHEUS_PORT": ("9091", command_of(PROMETHEUS)),
    "VLLM_GRAFANA_PORT": ("3001", command_of(GRAFANA)),
    "INTERNAL_API_TOKEN": ("secret", lambda settings: settings.environment.internal_api_token),
    "VLLM_DOCUMENTS_PORT": ("9010", lambda settings: settings.documents_url),
    "MAX_UPLOAD_SIZE_MB": ("7", of_documents("max_upload_mib")),
    "PDF_MAX_CONCURRENCY": ("7", of_documents("pages_in_flight")),
    "PDF_WORKER_DPI": ("77", of_documents("dpi")),
    "MAX_PAGE_RETRIES": ("7", of_documents("retries")),
    "SKIP_CROSS_PAGE_MERGE": ("true", of_documents("join_pages")),
}


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("stands_in", ["environment", ".env"])
def test_a_variable(project: Project, variable: str, stands_in: str) -> None:
    value, effect = VARIABLES[variable]
    project.write({kind: {"name": kind, "type": kind, "port": port} for kind, port in PORTS.items()})
    before = effect(project.load({"VLLM_API_KEY": API_KEY}))
    if stands_in == ".env":
        (project.home / ".env").write_text(f"VLLM_API_KEY={API_KEY}\n{variable}={value}\n")
        after = effect(project.load())
    else:
        after = effect(project.load({"VLLM_API_KEY": API_KEY, variable: value}))
    assert after != before


PORTS = {"chat": 8001, "embedding": 8002, "rerank": 8003, "ocr": 8004}
SECTIONS = ("server", "parallelism", "scheduler", "cache", "logging")


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_of_vllm_config_yaml(project: Project, section: str) -> None:
    project.write({"chat": BASE})
    project.write_defaults(f"{section}:\n  max_num_seqs: 7\n  dtype: float32\nenv:\n  A: b\n")
    argv = command(project.load())
    assert argv[argv.index("--max-num-seqs") + 1] == "7"
    assert argv[argv.index("--dtype") + 1] == "float32"
    assert environment(project.load())["A"] == "b"


def test_precedence(project: Project) -> None:
    """Environment over the model's own field over vllm_config.yaml; null drops a default."""
    project.write_defaults("cache:\n  gpu_memory_utilization: 0.5\nscheduler:\n  max_num_seqs: 7\nenv:\n  A: file\n")
    project.write(
        {
            "chat": {
                **BASE,
                "port": 1,
                "gpu_memory_utilization": 0.2,
                "engine_args": {"max_num_seqs": None},
                "env": {"A": "own"},
            }
        }
    )
    settings = project.load({"VLLM_CHAT_PORT": "2"})
    argv = command(settings)
    assert settings.models[0].port == 2
    assert argv[argv.index("--gpu-memory-utilization") + 1] == "0.2"
    assert "--max-num-seqs" not in argv
    assert environment(settings)["A"] == "own"


def test_the_process_wins_over_dot_env(project: Project) -> None:
    project.write({"chat": BASE})
    (project.home / ".env").write_text("VLLM_CHAT_PORT=2\nNCCL_DEBUG=INFO\n")
    assert project.load({"VLLM_CHAT_PORT": "3"}).models[0].port == 3
    assert project.load({"VLLM_CHAT_PORT": ""}).models[0].port == 2
    assert environment(project.load())["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize("file", ["models.json", "models.demo.json"])
def test_the_shipped_files_are_right(file: str) -> None:
    settings = load(CHECKOUT / "config" / file, CHECKOUT, {})
    assert [model.type for model in settings.models] == ["chat", "embedding", "rerank", "ocr"]
    assert [model.port for model in settings.models] == [8001, 8002, 8003, 8004]
