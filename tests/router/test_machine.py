"""Readings of this machine, and of GPUs that a file stands in for."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.conftest import TOPOLOGIES, Project, eventually
from vllm_unified.router.machine import CERTIFICATE, Machine
from vllm_unified.router.registry import Registry
from vllm_unified.state import EngineState, Phase, Process

Read = Callable[..., dict[tuple[str, ...], float]]


@pytest.fixture
def read(project: Project) -> Read:
    """Name and label values of each sample → its value; `environ` of the deployment, `engine`: a process group's."""

    def at_once(engine: Process | None = None, **environ: str) -> dict[tuple[str, ...], float]:
        project.write({"chat": {"name": "Qwen", "type": "chat"}})
        settings = project.load(environ)
        replicas = Registry(settings).served[0].replicas
        if engine is not None:
            replicas[0].engine = EngineState("chat", Phase.READY, since=0.0, engine=engine)
        samples = (
            sample for family in Machine(lambda: settings, lambda: replicas).collect() for sample in family.samples
        )
        return {
            (sample.name.removeprefix("vllm_unified_"), *sample.labels.values()): sample.value for sample in samples
        }

    return at_once


def test_the_host(read: Read) -> None:
    found = read()
    assert found["host_cpu_seconds_total", "idle"] > 0
    assert 0 < found["host_memory_available_bytes",] < found["host_memory_bytes",] == psutil.virtual_memory().total


def test_disks_of_folders_that_are_there_or_not_yet(read: Read, project: Project) -> None:
    (project.home / "models").mkdir()
    found = read()
    disk = psutil.disk_usage(str(project.home))
    for folder in ("models", "data", "run"):
        assert found["disk_bytes", folder] == disk.used + disk.free
        assert 0 < found["disk_free_bytes", folder] <= found["disk_bytes", folder]


def test_gpus(read: Read) -> None:
    found = read(VLLM_UNIFIED_DEVICES=str(TOPOLOGIES / "half_filled.json"), CUDA_VISIBLE_DEVICES="1")
    (info,) = (key for key in found if key[0] == "gpu_info")
    assert info[1] == "0"  # as `status` counts them
    assert 0 <= found["gpu_memory_used_bytes", "0"] < found["gpu_memory_bytes", "0"]
    assert not any(key[0] == "gpu_temperature_celsius" for key in found)  # no driver tells it


def test_a_machine_without_the_gpu_that_is_asked_for(read: Read) -> None:
    found = read(VLLM_UNIFIED_DEVICES=str(TOPOLOGIES / "1x24.json"), CUDA_VISIBLE_DEVICES="5")
    assert not any(key[0].startswith("gpu") for key in found)
    assert found["disk_free_bytes", "run"] > 0


@pytest.fixture
def engine() -> Iterator[Process]:
    """A process group of two, with 64 MiB."""
    child = "import time; time.sleep(60)"
    program = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); held = b'x' * (64 << 20)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}; print(flush=True); time.sleep(60)"],
        start_new_session=True,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield Process.of(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


def test_what_an_engine_holds(read: Read, engine: Process) -> None:
    found = read(engine)
    assert 64 << 20 < found["engine_memory_bytes", "chat"] < 512 << 20
    assert ("engine_gpu_memory_bytes", "chat") not in found


def test_an_engine_that_is_gone_holds_nothing(read: Read, engine: Process) -> None:
    os.killpg(engine.pid, 9)
    eventually(lambda: not engine.is_alive())
    assert ("engine_memory_bytes", "chat") not in read(engine)


def certificate(days: float) -> bytes:
    """In PEM form, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "router.example")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("chain", "days"),
    [([90], 90), ([90, 10, 3650], 10), ([], None)],
)
def test_the_certificate_that_expires_first(read: Read, project: Project, chain: list[int], days: Any) -> None:
    file = project.home / CERTIFICATE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"".join(map(certificate, chain)) or b"no certificate")
    found = read().get(("certificate_expiry_timestamp_seconds", CERTIFICATE))
    expected = None if days is None else datetime.now(UTC).timestamp() + days * 86400
    assert found == (expected if expected is None else pytest.approx(expected, abs=300))


def test_a_second_scrape_reads_nothing_anew(project: Project) -> None:
    asked = []
    project.write({"chat": {"name": "Qwen", "type": "chat"}})
    settings = project.load()

    def told() -> Any:
        asked.append(1)
        return settings

    machine = Machine(told, lambda: [])
    first, second = ([family.name for family in machine.collect()] for _ in range(2))
    assert first == second
    assert asked == [1]
