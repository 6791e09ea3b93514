from typing import Any

import pytest

from tests.conftest import Project
from vllm_unified.devices import GIB, Device
from vllm_unified.engines.placement import parse_bytes, plan
from vllm_unified.errors import ConfigError


def gpus(*sizes: int) -> list[Device]:
    return [Device(index, "cuda", "test", str(index), size * GIB, size * GIB) for index, size in enumerate(sizes)]


def model(name: str, share: float | None = 0.3, **fields: Any) -> dict[str, Any]:
    port = 8001 + sum(map(ord, name)) % 1000
    given = {"name": name, "type": "chat", "port": port, **fields}
    return given if share is None else {**given, "gpu_memory_utilization": share}


CPU = [Device(0, "cpu", "2 cores", "", 12 * GIB, 12 * GIB)]


@pytest.mark.parametrize(
    ("devices", "models", "expected"),
    [
        (gpus(80), {"a": model("a"), "b": model("b")}, {"a": [0], "b": [0]}),
        (gpus(80, 80), {"a": model("a", 0.6), "b": model("b", 0.6)}, {"a": [0], "b": [1]}),
        # the one with a place of its own is seated first, the small one where more room is left
        (gpus(80, 80), {"small": model("small", 0.2), "big": model("big", 0.9, gpus=[0])}, {"small": [1], "big": [0]}),
        (gpus(24, 80), {"a": model("a", 0.8)}, {"a": [1]}),
        (
            gpus(80, 80),
            {"small": model("small", 0.2), "wide": model("wide", 0.7, tensor_parallel_size=2)},
            {"small": [0], "wide": [0, 1]},
        ),
        (gpus(80, 80), {"a": model("a", 0.5, gpus=[1, 0], pipeline_parallel_size=2)}, {"a": [1, 0]}),
    ],
)
def test_where_models_go(
    project: Project, devices: list[Device], models: dict[str, Any], expected: dict[str, list[int]]
) -> None:
    project.write(models)
    planned = plan(project.load(), devices)
    assert {each.model.key: [device.index for device in each.devices] for each in planned.placed} == expected


@pytest.mark.parametrize(
    ("devices", "models", "lines"),
    [
        (
            gpus(80),
            {"a": model("a", 0.8), "b": model("b", 0.3), "c": model("c", 0.2)},
            [
                "config/models.json: models: GPU 0 has 80.0 GiB, asked for 104.0 (a 64.0 + b 24.0 + c 16.0); "
                "lower gpu_memory_utilization, or move a model with gpus"
            ],
        ),
        (
            CPU,
            {"a": model("a", tensor_parallel_size=2)},
            [
                "config/models.json: models.a: needs 2 GPUs (tensor_parallel_size 2 × pipeline_parallel_size 1), "
                "this machine has no NVIDIA GPU"
            ],
        ),
        (
            gpus(80),
            {"a": model("a", tensor_parallel_size=4), "b": model("b", gpus=[1])},
            [
                "config/models.json: models.a: needs 4 GPUs (tensor_parallel_size 4 × pipeline_parallel_size 1), "
                "this machine has 1 GPU",
                "config/models.json: models.b.gpus: there is no GPU 1; this machine has 1, numbered from 0",
            ],
        ),
        (
            CPU,
            {"a": model("a", None)},
            [
                "config/models.json: models: CPU has 12.0 GiB, asked for 13.0 (a 13.0); "
                'disable a model ("enabled": false), or lower its kv-cache-memory-bytes'
            ],
        ),
    ],
)
def test_what_cannot_fit_is_refused(
    project: Project, devices: list[Device], models: dict[str, Any], lines: list[str]
) -> None:
    project.write(models)
    with pytest.raises(ConfigError) as caught:
        plan(project.load(), devices)
    assert sorted(str(caught.value).splitlines()) == sorted(lines)


def test_weights_larger_than_their_share_are_refused(project: Project) -> None:
    project.write({"a": model("a", 0.1)})
    folder = project.home / "models" / "a"
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as weights:
        weights.truncate(3 * GIB)
    with pytest.raises(ConfigError, match=r"its weights take 3\.0 GiB of each device, its share is 2\.4"):
        plan(project.load(), gpus(24))
    plan(project.load(), gpus(80))


def test_the_shipped_models_fit_two_cards_of_80_gb() -> None:
    from tests.conftest import CHECKOUT
    from vllm_unified.settings import load

    planned = plan(load(CHECKOUT / "config" / "models.json", CHECKOUT, {}), gpus(80, 80))
    shares = [planned.asked_of(device) / device.total_bytes for device in planned.devices]
    assert all(share <= 0.86 for share in shares)
    assert [device.index for device in planned.of("chat").devices] == [0, 1]


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("1G", GIB), ("many", 0)]
)
def test_sizes_as_vllm_writes_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size
