"""Readings of this machine, and of GPUs that a file stands in for."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import psutil
import pynvml
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.conftest import TOPOLOGIES, Project, eventually
from vllm_unified.router.machine import CERTIFICATE, Machine
from vllm_unified.router.registry import Registry
from vllm_unified.router.replica import Replica
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


def test_a_gpu_that_is_gone_leaves_the_others_their_numbers(read: Read) -> None:
    devices = str(TOPOLOGIES / "half_filled.json")
    found = read(VLLM_UNIFIED_DEVICES=devices, CUDA_VISIBLE_DEVICES="GPU-gone,1")
    assert [key[1] for key in found if key[0] == "gpu_memory_bytes"] == ["1"]


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
    first = [family.name for family in machine.collect()]
    readings = len(asked)
    second = [family.name for family in machine.collect()]
    assert first == second
    assert len(set(first)) == len(first)
    assert len(asked) == readings > 0


class Scraped:
    """One machine, scraped at times that a test chooses."""

    def __init__(self, project: Project, engine: EngineState | None = None, **environ: str) -> None:
        project.write({"chat": {"name": "Qwen", "type": "chat"}})
        settings = project.load(environ)
        self.replica = Registry(settings).served[0].replicas[0]
        self.replica.engine = engine
        self.now = 100.0
        self.machine = Machine(lambda: settings, lambda: [self.replica], lambda: self.now)

    def at(self, seconds: float) -> dict[tuple[str, ...], float]:
        self.now = 100.0 + seconds
        return {
            (sample.name.removeprefix("vllm_unified_"), *sample.labels.values()): sample.value
            for family in self.machine.collect()
            for sample in family.samples
        }


@pytest.fixture
def hanging(project: Project) -> Iterator[Path]:
    """A certificate whose reading hangs while the test goes on."""
    file = project.home / CERTIFICATE
    file.parent.mkdir(parents=True)
    os.mkfifo(project.home / "pipe")
    yield project.home / "pipe"
    with contextlib.suppress(OSError):  # nobody reads it
        os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))


def test_a_reading_that_hangs_is_told_no_more_and_stops_no_other(project: Project, hanging: Path) -> None:
    file = project.home / CERTIFICATE
    file.write_bytes(certificate(90))
    scraped = Scraped(project)
    expiry, disk = ("certificate_expiry_timestamp_seconds", CERTIFICATE), ("disk_free_bytes", "run")
    assert {expiry, disk} <= scraped.at(0).keys()
    hanging.rename(file)
    assert {expiry, disk} <= scraped.at(11).keys()
    for seconds in (61, 600):
        found = scraped.at(seconds).keys()
        assert disk in found
        assert expiry not in found


def test_a_first_reading_that_hangs_stops_no_other(project: Project, hanging: Path) -> None:
    hanging.rename(project.home / CERTIFICATE)
    assert ("disk_free_bytes", "run") in Scraped(project).at(0)


def test_a_folder_that_cannot_be_read_is_left_out_and_logged_once(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    (project.home / "models").symlink_to("x" * 300)  # of which not even whether it exists is told
    scraped = Scraped(project)
    for seconds in (0, 100):
        found = scraped.at(seconds)
        assert ("disk_free_bytes", "models") not in found
        assert {("disk_free_bytes", "data"), ("disk_free_bytes", "run")} <= found.keys()
    assert [record.message for record in caplog.records] == [
        "metrics: reading the disk of models failed; it is tried again"
    ]


def test_a_slow_driver_does_not_make_memory_rarer(
    project: Project, engine: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly() -> None:
        time.sleep(1)
        raise pynvml.NVMLError_DriverNotLoaded

    monkeypatch.setattr(pynvml, "nvmlInit", slowly)
    state = EngineState("chat", Phase.READY, since=0.0, engine=engine)
    scraped = Scraped(project, state, VLLM_UNIFIED_DEVICES=str(TOPOLOGIES / "half_filled.json"))
    before = scraped.at(0)["engine_memory_bytes", "chat"]
    [child] = psutil.Process(engine.pid).children()
    child.kill()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert scraped.at(400)["engine_memory_bytes", "chat"] < before


def test_what_an_engine_held_is_told_no_more_when_it_is_gone(project: Project, engine: Process) -> None:
    scraped = Scraped(project, EngineState("chat", Phase.READY, since=0.0, engine=engine))
    assert ("engine_memory_bytes", "chat") in scraped.at(0)
    os.killpg(engine.pid, 9)
    eventually(lambda: not engine.is_alive())
    assert ("engine_memory_bytes", "chat") not in scraped.at(1)


def test_an_engine_that_ends_while_it_is_looked_at(project: Project, engine: Process) -> None:
    states = [EngineState("chat", Phase.READY, since=0.0, engine=engine)]

    class Ending:
        name = "chat"

        @property
        def engine(self) -> EngineState | None:
            return states.pop() if states else None

    project.write({"chat": {"name": "Qwen", "type": "chat"}})
    settings = project.load()
    machine = Machine(lambda: settings, lambda: [cast("Replica", Ending())])
    assert "vllm_unified_engine_memory_bytes" in [family.name for family in machine.collect()]
