import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import CHECKOUT, TOPOLOGIES, Project
from vllm_unified.devices import GIB, Device, read_devices
from vllm_unified.engines.command import engine_command
from vllm_unified.engines.memory import parse_bytes
from vllm_unified.engines.placement import Plan, placement_text, plan, plan_now, recorded, with_ours_free
from vllm_unified.engines.refusal import Change, RefusedPlanError, changed
from vllm_unified.errors import ConfigError
from vllm_unified.settings import Settings, load

PORTS = itertools.count(8100)
CPU = [Device(0, "cpu", "2 cores", "", 12 * GIB, 12 * GIB)]


def topology(name: str) -> list[Device]:
    return read_devices(None, TOPOLOGIES / f"{name}.json")


def model(share: float | None = 0.3, **fields: Any) -> dict[str, Any]:
    """A chat model without a name."""
    given = {"type": "chat", "port": next(PORTS), **fields}
    return given if share is None else {**given, "gpu_memory_utilization": share}


def settings_of(project: Project, models: dict[str, Any]) -> Settings:
    project.write({key: {"name": key, **fields} for key, fields in models.items()})
    return project.load()


def places(planned: Plan) -> dict[str, list[int]]:
    return {each.model.key: [device.index for device in each.devices] for each in planned.placed}


WHERE: list[tuple[str, dict[str, Any], dict[str, list[int]]]] = [
    ("1x24", {"a": model(0.4), "b": model(0.4)}, {"a": [0], "b": [0]}),
    ("1x80", {"a": model(), "b": model()}, {"a": [0], "b": [0]}),
    ("2x24", {"a": model(0.6), "b": model(0.6)}, {"a": [0], "b": [1]}),
    ("2x80", {"a": model(0.6), "b": model(0.6)}, {"a": [0], "b": [1]}),
    # the one with a place of its own is seated first, the small one where more room is left
    ("2x80", {"small": model(0.2), "big": model(0.9, gpus=[0])}, {"small": [1], "big": [0]}),
    ("2x80", {"small": model(0.2), "wide": model(0.7, tensor_parallel_size=2)}, {"small": [0], "wide": [0, 1]}),
    ("2x80", {"a": model(0.5, gpus=[1, 0], pipeline_parallel_size=2)}, {"a": [1, 0]}),
    # the most room is not the best place for the first: 0.5 and 0.4 share a card, so that 0.9 has one
    (
        "2x80",
        {"a": model(None, memory_gib=40), "b": model(None, memory_gib=37), "c": model(None, memory_gib=70)},
        {"a": [1], "b": [1], "c": [0]},
    ),
    # largest first leaves 26 GiB on each for the last of 28: only trying again finds 40 + 37 and 26 + 26 + 24
    (
        "2x80",
        {key: model(None, memory_gib=size) for key, size in (("a", 39), ("b", 38), ("c", 26), ("d", 25), ("e", 24))},
        {"a": [0], "b": [0], "c": [1], "d": [1], "e": [1]},
    ),
    (
        "8x141",
        {
            "large": model(0.9, tensor_parallel_size=4),
            "middle": model(0.5, tensor_parallel_size=2),
            "small": model(0.3),
            "other": model(0.3),
        },
        {"large": [0, 1, 2, 3], "middle": [4, 5], "small": [6], "other": [7]},
    ),
    # ranks of one model on cards of one size
    ("mixed", {"wide": model(0.5, tensor_parallel_size=2), "a": model(0.8)}, {"wide": [0, 2], "a": [1]}),
    # on cards of several sizes when there are not enough of one
    ("mixed", {"wide": model(0.5, tensor_parallel_size=4)}, {"wide": [0, 1, 2, 3]}),
    ("half_filled", {"a": model(0.6), "b": model(0.3)}, {"a": [1], "b": [0]}),
    # a model has one MIG instance at most, so two ranks are no choice there
    ("mig", {"a": model(None, memory_gib=30), "b": model(None, memory_gib=50)}, {"a": [0], "b": [3]}),
    ("2_cpus", {"a": model(0.5), "b": model(0.5), "c": model(0.3, gpus=[1])}, {"a": [0], "b": [1], "c": [1]}),
]


@pytest.mark.parametrize(("devices", "models", "expected"), WHERE)
def test_where_models_go(
    project: Project, devices: str, models: dict[str, Any], expected: dict[str, list[int]]
) -> None:
    settings = settings_of(project, models)
    planned = plan(settings, topology(devices))
    assert places(planned) == expected
    assert plan(settings, topology(devices)) == planned


@pytest.mark.parametrize(
    ("devices", "models", "weights", "said"),
    [
        (
            "1x24",
            {"chat": model(0.8), "embedding": model(0.3)},
            {},
            "models: GPU 0 has 24.0 GiB, asked for 28.4 (chat 20.2 + embedding 8.2); "
            "lower chat.gpu_memory_utilization from 0.80 to 0.61",
        ),
        (
            "2x80",
            {"chat": model(0.8, gpus=[0]), "embedding": model(0.3, gpus=[0])},
            {"chat": 30},
            "models: GPU 0 has 80.0 GiB, asked for 90.0 (chat 65.0 + embedding 25.0); "
            "lower chat.gpu_memory_utilization from 0.80 to 0.67, or put embedding on GPU 1",
        ),
        # no single one can give so much
        (
            "1x80",
            {"a": model(0.8), "b": model(0.8)},
            {"a": 50, "b": 40},
            'models: GPU 0 has 80.0 GiB, asked for 130.0 (a 65.0 + b 65.0); disable a ("enabled": false)',
        ),
        (
            "1x80",
            {"a": model(0.8), "b": model(0.5)},
            {"a": 50, "b": 20},
            "models: GPU 0 has 80.0 GiB, asked for 106.0 (a 65.0 + b 41.0); "
            "lower a.gpu_memory_utilization from 0.80 to 0.66 and lower b.gpu_memory_utilization from 0.50 to 0.30",
        ),
        # two servers that leave everything to vLLM
        (
            "1x80",
            {"a": model(None), "b": model(None)},
            {},
            "models: GPU 0 has 80.0 GiB, asked for 149.2 (a 74.6 + b 74.6); "
            "lower a.gpu_memory_utilization from 0.92 to 0.48 and lower b.gpu_memory_utilization from 0.92 to 0.48",
        ),
        (
            "half_filled",
            {"a": model(0.6, gpus=[0])},
            {"a": 20},
            "models: GPU 0 has 80.0 GiB (38.5 held by others), asked for 49.0 (a 49.0); "
            "lower a.gpu_memory_utilization from 0.60 to 0.50, or put a on GPU 1",
        ),
        (
            "2x24",
            {"wide": model(0.7, tensor_parallel_size=2), "a": model(None, memory_gib=10)},
            {"wide": 20, "a": 6},
            "models: GPU 0 has 24.0 GiB, asked for 28.8 (wide 17.8 + a 11.0); "
            "lower wide.gpu_memory_utilization from 0.70 to 0.50",
        ),
        (
            "1x24",
            {"a": model(None, memory_gib=30)},
            {},
            "models: GPU 0 has 24.0 GiB, asked for 31.0 (a 31.0); lower a.memory_gib from 30 to 23",
        ),
        (
            "1x24",
            {"a": model(None, kv_cache_memory_gib=20)},
            {"a": 8},
            "models: GPU 0 has 24.0 GiB, asked for 31.0 (a 31.0); lower a.kv_cache_memory_gib from 20 to 13",
        ),
        (
            "1x24",
            {"a": model(0.1)},
            {"a": 3},
            "models.a: its weights take 3.0 GiB of each device, its share is 2.4; "
            "raise a.gpu_memory_utilization from 0.10 to 0.17",
        ),
        (
            "1x24",
            {"a": model(0.1), "b": model(0.9)},
            {"a": 3, "b": 8},
            "models.a: its weights take 3.0 GiB of each device, its share is 2.4\n"
            "models: GPU 0 has 24.0 GiB, asked for 26.0 (a 3.4 + b 22.6); raise a.gpu_memory_utilization from 0.10 "
            "to 0.17 and lower b.gpu_memory_utilization from 0.90 to 0.74",
        ),
        (
            "2x24",
            {"a": model(0.9)},
            {"a": 30},
            "models.a: its weights take 30.0 GiB of each device, its share is 21.6; "
            "raise a.tensor_parallel_size from 1 to 2",
        ),
        (
            "1x24",
            {"a": model(0.9)},
            {"a": 30},
            "models.a: its weights take 30.0 GiB of each device, its share is 21.6; "
            "use larger devices, fewer or smaller models, or spread one with tensor_parallel_size",
        ),
        (
            "1x80",
            {"a": model(0.9), "b": model(None, kv_cache_memory_gib=1, engine_args={"enforce-eager": True})},
            {"a": 78, "b": 40},
            "models.a: its weights take 78.0 GiB of each device, its share is 72.0\n"
            "models: GPU 0 has 80.0 GiB, asked for 116.0 (a 73.0 + b 43.0); "
            'disable a ("enabled": false)',
        ),
        (
            "1x24",
            {"a": model(0.9), "b": model(None, kv_cache_memory_gib=1)},
            {"a": 30, "b": 24},
            "models.a: its weights take 30.0 GiB of each device, its share is 21.6\n"
            "models: GPU 0 has 24.0 GiB, asked for 50.6 (a 22.6 + b 28.0); 26.6 GiB are missing: use larger devices, "
            "fewer or smaller models, or spread one with tensor_parallel_size",
        ),
        (
            "1x24",
            {"a": model(0.3, tensor_parallel_size=4), "b": model(0.3, gpus=[1])},
            {},
            "models.a: needs 4 GPUs (tensor_parallel_size 4 × pipeline_parallel_size 1), this machine has 1 GPU\n"
            "models.b.gpus: there is no GPU 1; this machine has 1, numbered from 0",
        ),
        (
            "mig",
            {"a": model(0.3, tensor_parallel_size=2)},
            {},
            "models.a: needs 2 GPUs (tensor_parallel_size 2 × pipeline_parallel_size 1), and a model can use no more "
            "than one MIG instance (CUDA shows a process only one); set tensor_parallel_size and "
            "pipeline_parallel_size to 1, or use GPUs that are not in MIG mode",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_changes_that_fit(
    project: Project, devices: str, models: dict[str, Any], weights: dict[str, float], said: str
) -> None:
    for key, size in weights.items():
        project.model_folder(key, size)
    settings = settings_of(project, models)
    with pytest.raises(ConfigError) as caught:
        plan(settings, topology(devices))
    assert str(caught.value) == "\n".join(f"config/models.json: {line}" for line in said.splitlines())
    for change in caught.value.changes if isinstance(caught.value, RefusedPlanError) else ():
        plan(changed(settings, change), topology(devices))


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (
            {"a": model(0.3, tensor_parallel_size=2)},
            "models.a: needs 2 GPUs (tensor_parallel_size 2 × pipeline_parallel_size 1), "
            "this machine has no NVIDIA GPU",
        ),
        (
            {"a": model(None)},
            "models: CPU has 12.0 GiB, asked for 13.0 (a 13.0); lower a.gpu_memory_utilization from 0.92 to 0.83",
        ),
        (
            {key: model(0.1, engine_args={"kv-cache-memory-bytes": "1G"}) for key in "abcde"},
            "models: CPU has 12.0 GiB, asked for 15.0 (a 3.0 + b 3.0 + c 3.0 + d 3.0 + e 3.0); "
            'disable a ("enabled": false)',
        ),
    ],
)
def test_what_cannot_fit_the_cpu(project: Project, models: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(settings_of(project, models), CPU)
    assert str(caught.value) == f"config/models.json: {said}"


@pytest.mark.parametrize("devices", ["1x24", "1x80", "2x24", "2x80", "8x141", "mixed", "half_filled", "mig"])
@pytest.mark.parametrize("shares", list(itertools.product((0.2, 0.55, 0.9), repeat=3)))
def test_every_change_that_is_offered_fits(project: Project, devices: str, shares: tuple[float, ...]) -> None:
    models = {key: model(share) for key, share in zip("abc", shares, strict=True)}
    models["c"]["gpus"] = [0]
    for key, size in (("a", 12), ("b", 3)):
        project.model_folder(key, size)
    settings = settings_of(project, models)
    changes = changes_for(settings, topology(devices))
    assert changes != ()
    for change in changes or ():
        assert plan(changed(settings, change), topology(devices)).fits


def changes_for(settings: Settings, devices: list[Device]) -> tuple[Change, ...] | None:
    """None when nothing has to be changed."""
    try:
        plan(settings, devices)
    except RefusedPlanError as refused:
        return refused.changes
    return None


@pytest.mark.parametrize(
    ("fields", "weights", "architecture", "expected"),
    [
        # weights, cache, margin in GiB, and the share for the command line
        (model(0.5), 8, "Qwen2ForCausalLM", (8, 32, 1, 0.5)),
        (model(None), 8, "Qwen2ForCausalLM", (8, 65.6, 1, None)),
        (model(None, memory_gib=30), 8, "Qwen2ForCausalLM", (8, 22, 1, 0.375)),
        # nothing is profiled, so CUDA graphs come on top; the share has only to be free when the server starts
        (model(None, kv_cache_memory_gib=4), 8, "Qwen2ForCausalLM", (8, 5, 2, 0.1625)),
        (model(0.9, kv_cache_memory_gib=4), 8, "Qwen2ForCausalLM", (8, 5, 2, 0.1625)),
        (model(0.1, engine_args={"kv-cache-memory-bytes": "4G"}), 8, "Qwen2ForCausalLM", (8, 5, 2, 0.1)),
        (model(0.9, env={"VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0"}), 8, "Qwen2ForCausalLM", (8, 64, 2, 0.9)),
        # encoder-only: what it takes, whatever its share says
        (model(0.5, type="embedding"), 3, "XLMRobertaModel", (3, 1, 2, 0.05)),
        (model(None, type="rerank"), 3, "XLMRobertaForSequenceClassification", (3, 1, 2, 0.05)),
        (model(None, type="embedding", engine_args={"enforce-eager": True}), 3, "NewModel", (3, 1, 1, 0.05)),
        (model(0.5, type="embedding"), 3, "Qwen3ForCausalLM", (3, 37, 1, 0.5)),
        (model(0.5, type="embedding"), 0, "BertModel", (0, 40, 1, 0.5)),
        (model(0.5), 8, "BertModel", (8, 32, 1, 0.5)),
        (model(0.5, tensor_parallel_size=2), 8, "Qwen2ForCausalLM", (4, 36, 1, 0.5)),
    ],
)
def test_what_a_model_asks_of_a_card_of_80(
    project: Project, fields: dict[str, Any], weights: float, architecture: str, expected: tuple[float, ...]
) -> None:
    project.model_folder("m", weights, architecture)
    settings = settings_of(project, {"m": fields})
    placed = plan(settings, topology("2x80")).of("m")
    (need, *others) = placed.needs
    assert [need.weights / GIB, need.cache / GIB, need.margin / GIB] == pytest.approx(expected[:3])
    assert placed.share == expected[3]
    assert others == [need] * (placed.model.devices_needed - 1)
    argv = engine_command(settings, placed).argv
    written = argv[argv.index("--gpu-memory-utilization") + 1] if placed.share else None
    assert written == (str(placed.share) if placed.share else None)


def test_vllms_own_check_at_the_start_passes(project: Project) -> None:
    """It wants share × card free, of what the ones before it and its own CUDA context have left."""
    project.model_folder("a", 8, "Qwen2ForCausalLM")
    project.model_folder("b", 2, "BertModel")
    models = {"a": model(0.7), "b": model(0.9, type="embedding"), "c": model(None, memory_gib=17)}
    planned = plan(settings_of(project, models), topology("1x80"))
    free = float(80 * GIB)
    for key in planned.order:
        placed = planned.of(key)
        assert placed.share is not None
        assert placed.share * 80 * GIB <= free - GIB
        free -= placed.needs[0].total
    assert free >= 0


def test_memory_on_cards_of_several_sizes(project: Project) -> None:
    settings = settings_of(project, {"a": model(None, memory_gib=12, tensor_parallel_size=4)})
    placed = plan(settings, topology("mixed")).of("a")
    assert placed.share == 0.5
    assert [need.total / GIB for need in placed.needs] == [13, 41, 13, 25]


@pytest.mark.parametrize(
    ("fields", "gib"),
    [
        (model(0.1, kv_cache_memory_gib=3), 2 + 1 + 3),
        (model(0.1, engine_args={"kv-cache-memory-bytes": "3G"}), 2 + 1 + 3),
        (model(0.25), 2 + 3),  # vLLM takes the worker's own memory out of the share
        (model(None, memory_gib=5), 2 + 5),
    ],
)
def test_what_a_model_asks_of_the_cpu(project: Project, fields: dict[str, Any], gib: float) -> None:
    project.model_folder("m", 1)
    planned = plan(settings_of(project, {"m": fields}), CPU)
    assert planned.asked_of(CPU[0]) == pytest.approx(gib * GIB)


def test_the_order_of_starting(project: Project) -> None:
    models = {
        "a": model(0.2, gpus=[0]),
        "b": model(0.2, gpus=[1]),
        "c": model(0.2, gpus=[0], priority=5),
        "d": model(0.2, gpus=[0, 1], tensor_parallel_size=2, priority=-1),
        "e": model(0.2, gpus=[1]),
    }
    planned = plan(settings_of(project, models), topology("2x80"))
    assert planned.order == ("c", "a", "b", "e", "d")
    before = {key: planned.before(key) for key in models}
    assert before == {"c": (), "a": ("c",), "b": (), "e": ("b",), "d": ("c", "a", "b", "e")}


def test_a_recorded_place_stays(project: Project) -> None:
    settings = settings_of(project, {"a": model(0.3), "b": model(0.3), "c": model(0.2, gpus=[1])})
    cards = topology("2x80")
    assert places(plan(settings, cards)) == {"a": [0], "b": [1], "c": [1]}
    before = {"a": ["GPU-1"], "b": ["GPU-1"], "c": ["GPU-0"]}
    assert places(plan(settings, cards, before)) == {"a": [1], "b": [1], "c": [1]}
    # not where it is gone, or has another number of ranks
    gone = {"a": ["GPU-9"], "b": ["GPU-0", "GPU-1"]}
    assert plan(settings, cards, gone) == plan(settings, cards)


def test_the_record_is_read_back(project: Project) -> None:
    settings = settings_of(project, {"a": model(0.3, tensor_parallel_size=2), "b": model(0.3)})
    assert recorded(settings) == {}
    settings.run.mkdir()
    file = settings.run / "placement.json"
    file.write_text(placement_text(plan(settings, topology("2x80")).places))
    assert recorded(settings) == {"a": ("GPU-0", "GPU-1"), "b": ("GPU-0",)}
    for text in ("", "[]", '{"a": 1}'):
        file.write_text(text)
        assert recorded(settings) == {}


def test_the_memory_of_running_engines_is_ours(project: Project) -> None:
    settings = settings_of(project, {"a": model(0.8, gpus=[0]), "b": model(0.1, gpus=[0]), "c": model(0.2, gpus=[1])})
    before = plan(settings, topology("2x80")).places
    now = [replace(each, free_bytes=size * GIB) for each, size in zip(topology("2x80"), (9, 50), strict=True)]
    with pytest.raises(RefusedPlanError):
        plan(settings, now, before)
    seen = with_ours_free(settings, now, before, up=["a"])
    assert [device.held_bytes / GIB for device in seen] == pytest.approx([6, 30])
    seen = with_ours_free(settings, now, before, up=["a", "b", "c"])
    assert [device.held_bytes / GIB for device in seen] == pytest.approx([0, 13])
    plan(settings, seen, before)


def test_the_memory_of_a_disabled_model_that_still_runs_is_about_to_be_free(project: Project) -> None:
    settings = settings_of(project, {"a": model(0.6, enabled=False), "b": model(0.6, gpus=[0])})
    now = [replace(each, free_bytes=31 * GIB) for each in topology("1x80")]
    with pytest.raises(RefusedPlanError):
        plan(settings, now)
    (card,) = now
    seen = with_ours_free(settings, now, {"a": [card.handle]}, up=["a"])
    assert places(plan(settings, seen)) == {"b": [0]}


def test_a_model_without_an_engine_takes_no_place(project: Project) -> None:
    far = {"type": "chat", "endpoints": ["http://gpu-2:8000"]}
    settings = settings_of(project, {"far": far, "a": model(0.6)})
    planned = plan(settings, topology("1x80"))
    assert places(planned) == {"a": [0]}
    assert planned.order == ("a",)
    with pytest.raises(RefusedPlanError) as caught:
        plan(settings_of(project, {"far": far, "a": model(0.6), "b": model(0.6)}), topology("1x80"))
    assert "far" not in str(caught.value)
    assert plan_now(settings_of(project, {"far": far}), running=False) == Plan((), (), ())


@pytest.mark.parametrize("share", [0.45, 0.75, 0.95])
def test_ten_models_on_eight_cards(project: Project, share: float) -> None:
    """The search is bounded, and finds changes within its bounds also where there are many places."""
    settings = settings_of(project, {f"m{number}": model(share - number / 50) for number in range(10)})
    assert changes_for(settings, topology("8x141")) != ()


def test_the_shipped_models_fit_two_cards_of_80_gb() -> None:
    planned = plan(load(CHECKOUT / "config" / "models.json", CHECKOUT, {}), topology("2x80"))
    shares = [planned.asked_of(device) / device.total_bytes for device in planned.devices]
    assert all(share <= 0.9 for share in shares)
    assert [device.index for device in planned.of("chat").devices] == [0, 1]


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("1G", GIB), ("many", 0)]
)
def test_sizes_as_vllm_writes_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def weights(project: Project, **sizes: int) -> None:
    """Sparse files in models/a; `name` with underscores for dots, sizes in GiB."""
    folder = project.home / "models" / "a"
    folder.mkdir(parents=True, exist_ok=True)
    for name, gib in sizes.items():
        with (folder / f"{name}.safetensors").open("wb") as file:
            file.truncate(gib * GIB)


@pytest.mark.parametrize(
    ("config", "fields", "expected"),
    [
        ({}, {}, 4),
        ({"torch_dtype": "float32"}, {}, 2),
        ({"dtype": "float32"}, {"dtype": "float32"}, 4),
        ({"torch_dtype": "bfloat16"}, {"dtype": "float32"}, 8),
        ({"torch_dtype": "bfloat16"}, {"engine_args": {"quantization": "fp8"}}, 2),
        ({"quantization_config": {"quant_method": "awq"}}, {"engine_args": {"quantization": "awq"}}, 4),
    ],
)
def test_weights_in_memory(project: Project, config: dict[str, Any], fields: dict[str, Any], expected: int) -> None:
    weights(project, model=4, consolidated=4)
    (project.home / "models" / "a" / "config.json").write_text(json.dumps(config))
    assert (
        plan(settings_of(project, {"a": model(**fields)}), topology("1x80")).of("a").needs[0].weights == expected * GIB
    )


def test_weights_that_an_index_lists(project: Project) -> None:
    weights(project, part1=2, part2=3, other=9)
    index = {"weight_map": {"x": "part1.safetensors", "y": "part2.safetensors", "z": "part2.safetensors"}}
    (project.home / "models" / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert plan(settings_of(project, {"a": model()}), topology("1x80")).of("a").needs[0].weights == 5 * GIB


def test_vllms_default_share_is_lowered_on_a_small_card(project: Project) -> None:
    settings = settings_of(project, {"a": model(None)})
    assert plan(settings, topology("1x80")).of("a").share is None
    small = plan(settings, [Device(0, "cuda", "small", "GPU-0", 10 * GIB, 10 * GIB)]).of("a")
    assert (small.share, small.needs[0].total) == (0.9, 10 * GIB)


def test_the_variable_of_vllms_cpu_build_for_its_cache(project: Project) -> None:
    settings = settings_of(project, {"a": model(None, env={"VLLM_CPU_KVCACHE_SPACE": "4"})})
    assert plan(settings, CPU).of("a").needs[0].cache == 4 * GIB
