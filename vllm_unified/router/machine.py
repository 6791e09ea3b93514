"""What the router runs on, for Prometheus: the host, its GPUs, its disks, the certificate, what each engine holds."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import psutil
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from vllm_unified.devices import Device, Sensors, held_on_gpus, read_devices, read_sensors
from vllm_unified.errors import UserError
from vllm_unified.held import gpu_memory_of, memory_of, processes_of
from vllm_unified.router.families import Labels, counter, gauge
from vllm_unified.router.replica import Replica
from vllm_unified.settings import Settings

READING_SECONDS = 10.0
# The first scrape waits so long for its readings; a later one is told those before.
FIRST_SECONDS = 2.0
# What the kernel takes to tell an engine's memory, in which it looks at every page, is this share of the time at most.
MEMORY_SHARE = 1 / 500
FOLDERS = ("models", "data", "run")
CERTIFICATE = "config/tls/cert.pem"
SILENT = Sensors(None, None, None)
GPU_GAUGES: tuple[tuple[str, str, Callable[[Device, Sensors], float | None]], ...] = (
    ("gpu_memory_bytes", "Its memory", lambda gpu, _: gpu.total_bytes),
    ("gpu_memory_used_bytes", "Held of it", lambda gpu, _: gpu.held_bytes),
    (
        "gpu_utilization_ratio",
        "Of the time in which a kernel ran, 0 to 1",
        lambda gpu, _: None if gpu.utilization is None else gpu.utilization / 100,
    ),
    ("gpu_temperature_celsius", "Its temperature", lambda _, sensors: sensors.celsius),
    ("gpu_temperature_limit_celsius", "It runs slower from there", lambda _, sensors: sensors.limit_celsius),
    ("gpu_power_watts", "What it takes now", lambda _, sensors: sensors.watts),
)

log = logging.getLogger(__name__)


class Machine(Collector):
    """Disks and drivers may take long, or hang, so a thread reads them: after a scrape, and at most each 10 s."""

    def __init__(self, settings: Callable[[], Settings], replicas: Callable[[], Iterable[Replica]]) -> None:
        self._settings = settings
        self._replicas = replicas
        self._found: list[Metric] = []
        self._memory: list[Metric] = []
        self._memory_again_at = 0.0
        self._read_again_at = 0.0
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        self._read_again()
        yield from _host()
        yield from self._found

    def _read_again(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._read_again_at:
                return
            self._read_again_at = float("inf")
        thread = threading.Thread(target=self._read, name="machine", daemon=True)
        thread.start()
        if not self._found:
            thread.join(FIRST_SECONDS)

    def _read(self) -> None:
        began = time.monotonic()
        try:
            settings = self._settings()
            devices = _gpus(settings)
            if began >= self._memory_again_at:
                self._memory = list(self._engines(on_gpus=bool(devices)))
                took = time.monotonic() - began
                self._memory_again_at = began + took / MEMORY_SHARE
            self._found = [*_of_gpus(devices), *_disks(settings.home), *_certificate(settings.home), *self._memory]
        except Exception:
            log.exception("reading the machine's metrics failed; it is tried again")
        finally:
            self._read_again_at = began + READING_SECONDS

    def _engines(self, *, on_gpus: bool) -> Iterator[Metric]:
        leaders = {each.name: each.engine.engine.pid for each in self._replicas() if each.engine and each.engine.engine}
        groups = processes_of(leaders.values())
        held = held_on_gpus() if on_gpus else None
        memory = {(key,): memory_of(groups[leader]) for key, leader in leaders.items()}
        gpu_memory = {(key,): gpu_memory_of(groups[leader], held) for key, leader in leaders.items()}
        yield gauge("engine_memory_bytes", "Of the host's memory, held by the engine", ("model",), _told(memory))
        yield gauge("engine_gpu_memory_bytes", "Of all GPUs, held by the engine", ("model",), _told(gpu_memory))


def _told(values: Mapping[tuple[str], float | None]) -> dict[Labels, float]:
    return {labels: value for labels, value in values.items() if value is not None}


def _host() -> Iterator[Metric]:
    memory = psutil.virtual_memory()
    modes: dict[Labels, float] = {(mode,): seconds for mode, seconds in psutil.cpu_times()._asdict().items()}
    yield counter("host_cpu_seconds", "Of all cores together, by what they did", ("mode",), modes)
    yield gauge("host_memory_bytes", "The host's memory", (), {(): memory.total})
    yield gauge("host_memory_available_bytes", "What programs could still have of it", (), {(): memory.available})


def _gpus(settings: Settings) -> list[Device]:
    try:
        found = read_devices(settings.environment.visible_devices, settings.devices_file)
    except UserError:  # the driver does not answer, or a GPU is gone: `check --machine` and the keepers tell why
        return []
    return [device for device in found if device.kind == "cuda"]


def _of_gpus(gpus: list[Device]) -> Iterator[Metric]:
    if not gpus:
        return
    infos: dict[Labels, float] = {(str(each.index), each.handle, each.name): 1 for each in gpus}
    yield gauge("gpu_info", "1; uuid and name are labels", ("gpu", "uuid", "name"), infos)
    sensors = read_sensors([each.handle for each in gpus])
    for name, text, value_of in GPU_GAUGES:
        values = {(str(each.index),): value_of(each, sensors.get(each.handle, SILENT)) for each in gpus}
        yield gauge(name, text, ("gpu",), _told(values))


def _disks(home: Path) -> Iterator[Metric]:
    usages = {(name,): psutil.disk_usage(str(_existing(home / name))) for name in FOLDERS}
    sizes: dict[Labels, float] = {labels: usage.used + usage.free for labels, usage in usages.items()}
    free: dict[Labels, float] = {labels: usage.free for labels, usage in usages.items()}
    yield gauge("disk_bytes", "Size of the disk that the folder is on", ("folder",), sizes)
    yield gauge("disk_free_bytes", "What may still be written there", ("folder",), free)


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())


def _certificate(home: Path) -> Iterator[Metric]:
    """Of the chain in the file, the certificate that expires first."""
    from cryptography import x509  # here, because few deployments have one

    try:
        chain = x509.load_pem_x509_certificates((home / CERTIFICATE).read_bytes())
    except (OSError, ValueError):  # none, or none that Nginx would start with
        return
    expires = min(each.not_valid_after_utc.timestamp() for each in chain)
    text = "When it expires, seconds since 1970"
    yield gauge("certificate_expiry_timestamp_seconds", text, ("file",), {(CERTIFICATE,): expires})
