"""The devices that a model can run on: NVIDIA GPUs, or else the CPU with the machine's memory.

Where they are read (NVML, or a file that stands in for the cards) is apart from the choice among them
(CUDA_VISIBLE_DEVICES), so that the choice needs no cards.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_unified.errors import UserError

if TYPE_CHECKING:
    from vllm_unified.settings.schema import DeviceEntry

GIB = 1 << 30
VISIBLE = "CUDA_VISIBLE_DEVICES"
WHOLE_GPU = "GPU-"
MIG_PART = "MIG-"


@dataclass(frozen=True)
class Device:
    """One device. Memory in bytes, utilization in percent (None where the driver does not say).

    `handle`: what CUDA_VISIBLE_DEVICES calls it, the whole UUID, since vLLM resolves no shortened one and a
    number changes when a card drops out. Of several CPUs their number, of the only one "".
    """

    index: int
    kind: Literal["cuda", "cpu"]
    name: str
    handle: str
    total_bytes: int
    free_bytes: int
    utilization: int | None = None

    @property
    def label(self) -> str:
        return f"GPU {self.index}" if self.kind == "cuda" else f"CPU {self.handle}".rstrip()

    @property
    def held_bytes(self) -> int:
        return self.total_bytes - self.free_bytes

    @property
    def is_mig_part(self) -> bool:
        return self.kind == "cuda" and self.handle.startswith(MIG_PART)


@dataclass(frozen=True)
class Gpu:
    """A GPU as it is in the machine. `parts`: its MIG instances, which are used in its place."""

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    utilization: int | None = None
    parts: tuple["Gpu", ...] = ()


def read_devices(visible: str | None, file: Path | None = None, *, skip_lost: bool = False) -> list[Device]:
    """The GPUs among `visible` (CUDA_VISIBLE_DEVICES; None: all), else the CPU alone.

    `file`: stands in for the cards of the machine, and is read again at each call. Raises UserError for what
    `visible` names wrongly, ConfigError for what is wrong with the file. `skip_lost`: a GPU that `visible` names and
    that is not there is left out in place of that, and the others keep their numbers.
    """
    if file is not None:
        return _devices_of_file(file, visible, skip_lost=skip_lost)
    gpus = _gpus_of_nvml()
    return select(gpus, visible, skip_lost=skip_lost) if gpus else [_cpu_of_machine()]


def select(gpus: Sequence[Gpu], visible: str | None, *, skip_lost: bool = False) -> list[Device]:
    """Numbered in the order in which `visible` names them, or else in the machine's own."""
    chosen: dict[int, Gpu] = {}
    if visible is None:
        chosen.update(enumerate(part for gpu in gpus for part in (gpu.parts or (gpu,))))
    else:
        for number, token in enumerate(token.strip() for token in visible.split(",")):
            with contextlib.suppress(*[_LostError] if skip_lost else []):
                gpu = _named(token, gpus)
                if gpu in chosen.values():
                    raise UserError(f"{VISIBLE}: {token} is named twice; name each GPU once")
                chosen[number] = gpu
    return [
        Device(index, "cuda", gpu.name, gpu.uuid, gpu.total_bytes, gpu.free_bytes, gpu.utilization)
        for index, gpu in chosen.items()
    ]


class _LostError(UserError):
    """`visible` names a GPU that is not there."""


def _named(token: str, gpus: Sequence[Gpu]) -> Gpu:
    by_name = {str(number): gpu for number, gpu in enumerate(gpus)}
    by_name |= {gpu.uuid: gpu for gpu in gpus} | {part.uuid: part for gpu in gpus for part in gpu.parts}
    found = [by_name[token]] if token in by_name else []
    if not found and token.startswith((WHOLE_GPU, MIG_PART)):
        found = [gpu for uuid, gpu in by_name.items() if uuid.startswith(token)]
    if not found:
        raise _LostError(f"{VISIBLE}: there is no GPU {token}; this machine has {', '.join(by_name)}")
    if len(found) > 1:
        names = ", ".join(gpu.uuid for gpu in found)
        raise UserError(f"{VISIBLE}: {token} may be {names}; write more of the one that is meant")
    if found[0].parts:
        names = ", ".join(part.uuid for part in found[0].parts)
        raise UserError(f"{VISIBLE}: GPU {token} is in MIG mode, and only its parts can be used; name of {names}")
    return found[0]


def _gpus_of_nvml() -> list[Gpu]:
    import pynvml  # here, because a small process that imports this module asks for no devices

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):  # a machine without GPUs
        return []
    except pynvml.NVMLError as error:
        raise UserError(f"the NVIDIA driver does not answer: {error}; `nvidia-smi` has to work first") from None
    try:
        found = (_gpu_of_nvml(number) for number in range(pynvml.nvmlDeviceGetCount()))
        return [gpu for gpu in found if gpu]
    finally:
        pynvml.nvmlShutdown()


def _gpu_of_nvml(number: int) -> Gpu | None:
    """None for a card that does not answer: it is lost until the machine starts anew, and the others go on."""
    import pynvml

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        parts = tuple(_described(part) for part in _mig_handles(handle))
        return _described(handle, parts)
    except pynvml.NVMLError:
        return None


def _described(handle: object, parts: tuple[Gpu, ...] = ()) -> Gpu:
    import pynvml

    total, free = _memory_of_nvml(handle)
    name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    return Gpu(name, uuid, total, free, _utilization(handle), parts)


def _memory_of_nvml(handle: object) -> tuple[int, int]:
    """Total and free. What the driver keeps for itself is no part of the total, as in CUDA's own figure."""
    import psutil
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return int(memory.total - memory.reserved), int(memory.free)
    except pynvml.NVMLError_NotSupported:  # the GPU shares the machine's memory
        shared = psutil.virtual_memory()
        return shared.total, shared.available
    except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_InvalidArgument, AttributeError):  # an older driver
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return int(memory.total), int(memory.free)


def _mig_handles(handle: object) -> list[object]:
    import pynvml

    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return []
    except pynvml.NVMLError:  # a card without MIG
        return []
    found = []
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            found.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        except pynvml.NVMLError:  # a place for an instance that was not made
            continue
    return found


def held_on_gpus() -> dict[int, int] | None:
    """Bytes that each process holds on all GPUs that answer; None where there is no driver.

    In most containers the driver tells of no process.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    held: Counter[int] = Counter()
    try:
        for number in range(pynvml.nvmlDeviceGetCount()):
            for each in _processes_on(number):
                held[each.pid] += each.usedGpuMemory or 0
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return held


def _processes_on(number: int) -> list[Any]:
    """None of a card that does not answer, as when it is lost; the others go on."""
    import pynvml

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        return list(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except pynvml.NVMLError:
        return []


@dataclass(frozen=True)
class Sensors:
    """Of one GPU; None where the driver does not tell, as of a MIG part. `limit_celsius`: it runs slower from there."""

    celsius: float | None
    limit_celsius: float | None
    watts: float | None


def read_sensors(handles: Collection[str]) -> dict[str, Sensors]:
    """By handle, of the GPUs that answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        found = ((handle, _sensors(handle)) for handle in handles)
        return {handle: sensors for handle, sensors in found if sensors}
    finally:
        pynvml.nvmlShutdown()


def _sensors(uuid: str) -> Sensors | None:
    import pynvml

    def asked(question: Callable[..., int], *arguments: object) -> int | None:
        try:
            return question(handle, *arguments)
        except pynvml.NVMLError:
            return None

    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:  # lost, or of a file that stands in for the cards
        return None
    milliwatts = asked(pynvml.nvmlDeviceGetPowerUsage)
    return Sensors(
        celsius=asked(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        limit_celsius=asked(pynvml.nvmlDeviceGetTemperatureThreshold, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
        watts=None if milliwatts is None else milliwatts / 1000,
    )


def _utilization(handle: object) -> int | None:
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except pynvml.NVMLError:
        return None


def _cpu_of_machine() -> Device:
    import psutil

    memory = psutil.virtual_memory()
    return Device(0, "cpu", f"{psutil.cpu_count()} cores", "", memory.total, memory.available)


def _devices_of_file(file: Path, visible: str | None, *, skip_lost: bool) -> list[Device]:
    from vllm_unified.settings.load import read_topology

    entries = read_topology(file).devices
    if entries[0].kind == "gpu":
        gpus = [_gpu_of_entry(entry, str(number)) for number, entry in enumerate(entries)]
        return select(gpus, visible, skip_lost=skip_lost)
    return [
        Device(number, "cpu", entry.name, str(number) if len(entries) > 1 else "", *_memory_of_entry(entry))
        for number, entry in enumerate(entries)
    ]


def _gpu_of_entry(entry: "DeviceEntry", number: str, prefix: str = WHOLE_GPU) -> Gpu:
    total, free = _memory_of_entry(entry)
    parts = tuple(_gpu_of_entry(part, f"{number}-{place}", MIG_PART) for place, part in enumerate(entry.parts))
    return Gpu(entry.name, entry.uuid or f"{prefix}{number}", total, free, parts=parts)


def _memory_of_entry(entry: "DeviceEntry") -> tuple[int, int]:
    total = int(entry.memory_gib * GIB)
    return total, total if entry.free_gib is None else int(entry.free_gib * GIB)
