"""Tracing costs nothing where it is off, and says what is wrong where it is not."""

import os
import subprocess
import sys

import pytest

from tests.conftest import API_KEY, CHECKOUT, Project, free_port
from vllm_unified.errors import ConfigError

ROUTER = """
from vllm_unified.router.serving import Router
async def run(settings):
    async with Router(settings).running():
        show()
"""
DOCUMENTS = """
from vllm_unified.documents.app import create_app
from vllm_unified.documents.service import Service
async def run(settings):
    service = Service(settings)
    app = create_app(service)
    async with app.router.lifespan_context(app):
        show()
"""
PROGRAM = """
import asyncio, os, pathlib, sys, threading
from vllm_unified.settings import load
{service}
def show():
    print(*(name for name in sys.modules if "opentelemetry" in name), *(each.name for each in threading.enumerate()))
home = pathlib.Path(sys.argv[1])
asyncio.run(run(load(home / "config" / "models.json", home, os.environ)))
"""


def shown(project: Project, service: str, **environ: str) -> str:
    """What runs and what is loaded."""
    project.write({"ocr": {"name": "ocr", "type": "ocr", "endpoints": ["http://127.0.0.1:9"]}})
    program = [sys.executable, "-c", PROGRAM.format(service=service), str(project.home)]
    given = {**os.environ, "VLLM_API_KEY": API_KEY, **environ}
    return subprocess.run(program, env=given, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("service", [ROUTER, DOCUMENTS])
def test_nothing_of_it_is_loaded_by_default(project: Project, service: str) -> None:
    off = shown(project, service)
    assert "MainThread" in off
    assert "opentelemetry.sdk" not in off, "FastAPI loads the API where it is installed"
    assert "Otel" not in off
    on = shown(project, service, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert "opentelemetry.sdk.trace" in on
    assert "OtelBatchSpanRecordProcessor" in on


@pytest.mark.parametrize(
    "address", ["collector:4318", "grpc://c:4317", "http://u:sk-1@c", "http://c:x", "http://c/?k=1"]
)
def test_what_is_no_address_is_refused(project: Project, address: str) -> None:
    project.write({"chat": {"name": "a", "type": "chat"}})
    with pytest.raises(ConfigError) as caught:
        project.load({"OTEL_EXPORTER_OTLP_ENDPOINT": address})
    (line,) = str(caught.value).splitlines()
    assert "OTEL_EXPORTER_OTLP_ENDPOINT: " in line
    assert "use http://HOST:4318" in line


@pytest.mark.parametrize("service", ["router", "documents"])
def test_a_variable_of_the_sdk_that_cannot_be_meant(project: Project, service: str) -> None:
    project.write({"ocr": {"name": "a", "type": "ocr", "endpoints": ["http://127.0.0.1:9"]}})
    (project.home / ".env").write_text("OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:9\nOTEL_BSP_MAX_QUEUE_SIZE=8\n")
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(project.home), "VLLM_API_KEY": API_KEY}
    program = [sys.executable, "-m", "vllm_unified", service]
    ended = subprocess.run(program, env=environ, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "OTEL_…: max_export_batch_size must be less than or equal to max_queue_size" in ended.stderr
    assert "Traceback" not in ended.stderr
