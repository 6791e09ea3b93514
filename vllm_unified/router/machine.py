"""What the router runs on, for Prometheus: the host, its GPUs, its disks, the certificate, what each engine holds."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
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
from vllm_unified.state import Process

READING_SECONDS = 10.0
# A reading that is later than this is not awaited: what was told until then is told no more.
LATE_SECONDS = 50.0
# A scrape waits so long for readings where there is nothing to tell; another is told those before.
WAIT_SECONDS = 2.0
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
    """Disks, drivers and processes may hang, so that a thread reads each: after a scrape, and at most every 10 s.

    What was read is told until the next reading is late, mostly for a minute. `monotonic`: it never goes back.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        replicas: Callable[[], Iterable[Replica]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = replicas
        self._monotonic = monotonic
        self._parts = (
            *(_Part(f"the disk of {name}", partial(_disk, settings, name), monotonic) for name in FOLDERS),
            _Part("the GPUs", lambda: _of_gpus(_gpus(settings())), monotonic),
            _Part("the certificate", lambda: _certificate(settings().home), monotonic),
            _Part("what engines hold on GPUs", self._gpu_memory, monotonic),
        )
        self._memory: dict[tuple[str, Process], _EngineMemory] = {}
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        parts = [*self._parts, *self._memory_parts()]
        self._read_again(parts)
        yield from _host()
        yield from _merged(family for part in parts for family in part.told())

    def _memory_parts(self) -> list["_EngineMemory"]:
        """Those of the engines that run now: what one that is gone held is told no more."""
        with self._lock:
            self._memory = {
                each: self._memory.get(each) or _EngineMemory(*each, self._monotonic)
                for each in self._engines().items()
            }
            return list(self._memory.values())

    def _read_again(self, parts: Iterable["_Part"]) -> None:
        awaited = [thread for part in parts if (thread := part.begin()) and not part.is_fresh]
        deadline = time.monotonic() + WAIT_SECONDS
        for thread in awaited:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _engines(self) -> dict[str, Process]:
        states = {each.name: each.engine for each in self._replicas()}
        return {
            key: state.engine for key, state in states.items() if state and state.engine and state.engine.is_alive()
        }

    def _gpu_memory(self) -> Iterator[Metric]:
        engines = self._engines()
        groups = processes_of([leader.pid for leader in engines.values()])
        held = held_on_gpus()
        values = {(key,): gpu_memory_of(groups[leader.pid], held) for key, leader in engines.items()}
        yield gauge("engine_gpu_memory_bytes", "Of all GPUs, held by the engine", ("model",), _told(values))


class _Part:
    """What one thread reads: not again while it hangs."""

    def __init__(self, name: str, read: Callable[[], Iterable[Metric]], monotonic: Callable[[], float]) -> None:
        self.pause = READING_SECONDS
        self._name = name
        self._read = read
        self._monotonic = monotonic
        self._found: list[Metric] = []
        self._fresh_until = -math.inf
        self._again_at = -math.inf
        self._has_failed = False
        self._lock = threading.Lock()

    @property
    def is_fresh(self) -> bool:
        return self._monotonic() < self._fresh_until

    def told(self) -> list[Metric]:
        return self._found if self.is_fresh else []

    def begin(self) -> threading.Thread | None:
        """None where it is not yet time."""
        with self._lock:
            if self._monotonic() < self._again_at:
                return None
            self._again_at = math.inf
        thread = threading.Thread(target=self._run, name="machine", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        began = self._monotonic()
        try:
            self._found = list(self._read())
            self._fresh_until = began + self.pause + LATE_SECONDS
            self._has_failed = False
        except Exception:
            if not self._has_failed:
                log.exception("metrics: reading %s failed; it is tried again", self._name)
            self._has_failed = True
        finally:
            self._again_at = began + self.pause


class _EngineMemory(_Part):
    """`leader`: of the engine's process group."""

    def __init__(self, key: str, leader: Process, monotonic: Callable[[], float]) -> None:
        super().__init__(f'the memory of "{key}"', self._measured, monotonic)
        self._key = key
        self._leader = leader

    def _measured(self) -> Iterator[Metric]:
        group = processes_of([self._leader.pid])[self._leader.pid]
        began = time.monotonic()
        size = memory_of(group)
        self.pause = max(READING_SECONDS, (time.monotonic() - began) / MEMORY_SHARE)
        values = _told({(self._key,): size})
        yield gauge("engine_memory_bytes", "Of the host's memory, held by the engine", ("model",), values)


def _merged(families: Iterable[Metric]) -> Iterable[Metric]:
    """Each family once, with the samples of all parts."""
    merged: dict[str, Metric] = {}
    for family in families:
        whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        whole.samples += family.samples
    return merged.values()


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
        found = read_devices(settings.environment.visible_devices, settings.devices_file, skip_lost=True)
    except UserError:  # the driver does not answer: `check --machine` and the keepers tell why
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


def _disk(settings: Callable[[], Settings], name: str) -> Iterator[Metric]:
    usage = psutil.disk_usage(str(_existing(settings().home / name)))
    text = "Size of the disk that the folder is on"
    yield gauge("disk_bytes", text, ("folder",), {(name,): usage.used + usage.free})
    yield gauge("disk_free_bytes", "What may still be written there", ("folder",), {(name,): usage.free})


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
