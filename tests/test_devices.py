import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from tests.conftest import TOPOLOGIES
from vllm_unified.devices import GIB, held_on_gpus, read_devices
from vllm_unified.errors import ConfigError, UserError

MIG = TOPOLOGIES / "mig.json"
PARTS = ("MIG-1a2b3c00-0001", "MIG-1a2b4d00-0002", "MIG-7e7e0000-0003")


@pytest.mark.parametrize(
    ("visible", "handles"),
    [
        (None, [*PARTS, "GPU-8932a111-0000"]),
        ("1", ["GPU-8932a111-0000"]),
        ("GPU-8932a111-0000", ["GPU-8932a111-0000"]),
        ("GPU-8932a", ["GPU-8932a111-0000"]),
        ("1, MIG-7", ["GPU-8932a111-0000", "MIG-7e7e0000-0003"]),
        ("MIG-1a2b4,MIG-1a2b3c00-0001", ["MIG-1a2b4d00-0002", "MIG-1a2b3c00-0001"]),
    ],
)
def test_which_gpus_are_visible(visible: str | None, handles: list[str]) -> None:
    found = read_devices(visible, MIG)
    assert [device.handle for device in found] == handles
    assert [device.label for device in found] == [f"GPU {number}" for number in range(len(handles))]
    assert [device.is_mig_part for device in found] == [handle.startswith("MIG-") for handle in handles]


@pytest.mark.parametrize(
    ("visible", "said"),
    [
        (
            "7",
            "there is no GPU 7; this machine has 0, 1, GPU-8932f937-d72c, GPU-8932a111-0000, MIG-1a2b3c00-0001, "
            "MIG-1a2b4d00-0002, MIG-7e7e0000-0003",
        ),
        ("GPU-9", "there is no GPU GPU-9; this machine has 0, 1, "),
        ("8932a", "there is no GPU 8932a; this machine has 0, 1, "),
        ("GPU-8932", "GPU-8932 may be GPU-8932f937-d72c, GPU-8932a111-0000; write more of the one that is meant"),
        ("MIG-1a2b", "MIG-1a2b may be MIG-1a2b3c00-0001, MIG-1a2b4d00-0002; write more of the one that is meant"),
        ("1,GPU-8932a", "GPU-8932a is named twice; name each GPU once"),
        ("0", f"GPU 0 is in MIG mode, and only its parts can be used; name of {', '.join(PARTS)}"),
        ("GPU-8932f", f"GPU GPU-8932f is in MIG mode, and only its parts can be used; name of {', '.join(PARTS)}"),
    ],
)
def test_what_is_wrong_with_visible_gpus(visible: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_devices(visible, MIG)
    assert str(caught.value).startswith(f"CUDA_VISIBLE_DEVICES: {said}")


def test_memory_of_a_topology(tmp_path: Path) -> None:
    file = tmp_path / "cards.json"
    file.write_text((TOPOLOGIES / "half_filled.json").read_text())
    first, second = read_devices(None, file)
    assert (first.total_bytes, first.free_bytes, first.held_bytes) == (80 * GIB, 41.5 * GIB, 38.5 * GIB)
    assert (second.handle, second.held_bytes) == ("GPU-1", 0)
    file.write_text('{"devices": [{"memory_gib": 24}]}')
    assert [device.total_bytes for device in read_devices(None, file)] == [24 * GIB]


def test_numbers_go_before_beginnings_of_names(tmp_path: Path) -> None:
    file = tmp_path / "cards.json"
    file.write_text(json.dumps({"devices": [{"memory_gib": 24}] * 12}))
    assert [device.handle for device in read_devices("GPU-1,11", file)] == ["GPU-1", "GPU-11"]


def test_cpus_of_a_topology(tmp_path: Path) -> None:
    found = read_devices("0", TOPOLOGIES / "2_cpus.json")
    assert [(device.label, device.handle, device.kind) for device in found] == [
        ("CPU 0", "0", "cpu"),
        ("CPU 1", "1", "cpu"),
    ]
    file = tmp_path / "cpu.json"
    file.write_text('{"devices": [{"kind": "cpu", "memory_gib": 8}]}')
    assert [device.label for device in read_devices(None, file)] == ["CPU"]


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ([], "devices: at least one is needed"),
        ([{"memory": 24}], 'devices.0: nothing reads "memory"; did you mean "memory_gib"?'),
        ([{"memory_gib": 0}], "devices.0.memory_gib: 0: should be greater than 0"),
        ([{"memory_gib": 8, "free_gib": 9}], "devices.0: free_gib 9 is more than memory_gib 8"),
        ([{"memory_gib": 8, "uuid": "x"}], 'devices.0.uuid: "x": '),
        ([{"memory_gib": 8}, {"memory_gib": 8, "kind": "cpu"}], 'devices of the kinds "gpu" and "cpu" cannot stand'),
        ([{"memory_gib": 8, "uuid": "GPU-a"}] * 2, "a uuid stands twice"),
        ([{"memory_gib": 8, "kind": "cpu", "uuid": "GPU-a"}], "devices.0: a CPU has neither parts nor a uuid"),
        ([{"memory_gib": 8, "parts": [{"memory_gib": 4, "kind": "cpu"}]}], "devices.0: the parts of a GPU are GPUs"),
    ],
)
def test_what_is_wrong_with_a_topology(tmp_path: Path, devices: Any, said: str) -> None:
    file = tmp_path / "cards.json"
    file.write_text(json.dumps({"devices": devices}))
    with pytest.raises(ConfigError) as caught:
        read_devices(None, file)
    assert f"{file}: {said}" in str(caught.value)


def test_a_topology_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: no such file; name another with --devices FILE"):
        read_devices(None, tmp_path / "none.json")


def test_the_machine_itself_has_a_device() -> None:
    found = read_devices(None)
    assert found[0].total_bytes > found[0].free_bytes > 0


def test_a_lost_gpu_hides_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(number: int) -> int:
        if number == 1:
            raise pynvml.NVMLError_GpuIsLost
        return number

    def processes(handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=7, usedGpuMemory=5), SimpleNamespace(pid=10 + handle, usedGpuMemory=None)]

    driver = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetComputeRunningProcesses": processes,
    }
    for name, stand_in in driver.items():
        monkeypatch.setattr(pynvml, name, stand_in)
    assert held_on_gpus() == {7: 10, 10: 0, 12: 0}


def test_a_small_process_imports_nothing_large() -> None:
    program = "import sys, vllm_unified.devices; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"pynvml", "psutil", "pydantic", "yaml"}.isdisjoint(loaded)
