"""The devices that a model can run on: NVIDIA GPUs through NVML, or else the CPU with the machine's memory."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import pynvml

from vllm_unified.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One device. Memory in bytes, utilization in percent (None where the driver does not say)."""

    index: int
    kind: str  # "cuda" or "cpu"
    name: str
    handle: str  # what CUDA_VISIBLE_DEVICES calls it; "" for the CPU
    total_bytes: int
    free_bytes: int
    utilization: int | None = None

    @property
    def label(self) -> str:
        return f"GPU {self.index}" if self.kind == "cuda" else "CPU"


def read_devices(visible: str | None) -> list[Device]:
    """The GPUs among `visible` (CUDA_VISIBLE_DEVICES: numbers or UUIDs; None: all), else the CPU alone."""
    with _nvml() as running:
        gpus = list(_gpus(visible)) if running else []
    return gpus or [_cpu()]


@contextlib.contextmanager
def _nvml() -> Iterator[bool]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver: a machine without GPUs
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def _gpus(visible: str | None) -> Iterator[Device]:
    present = {}
    for number in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        present[str(number)] = handle
        present[pynvml.nvmlDeviceGetUUID(handle)] = handle
    count = len(present) // 2
    wanted: Sequence[str] = (
        [token.strip() for token in visible.split(",")] if visible else [str(number) for number in range(count)]
    )
    for index, token in enumerate(wanted):
        if token not in present:
            raise UserError(f"CUDA_VISIBLE_DEVICES: there is no GPU {token}; this machine has {', '.join(present)}")
        memory = pynvml.nvmlDeviceGetMemoryInfo(present[token])
        yield Device(
            index=index,
            kind="cuda",
            name=pynvml.nvmlDeviceGetName(present[token]),
            handle=token,
            total_bytes=int(memory.total),
            free_bytes=int(memory.free),
            utilization=_utilization(present[token]),
        )


def _utilization(handle: object) -> int | None:
    try:
        return int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except pynvml.NVMLError:
        return None


def _cpu() -> Device:
    memory = psutil.virtual_memory()
    return Device(0, "cpu", f"{psutil.cpu_count()} cores", "", memory.total, memory.available)
