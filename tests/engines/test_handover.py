import pytest

from tests.conftest import API_KEY, CHECKOUT, Project
from vllm_unified.devices import GIB
from vllm_unified.engines.handover import orders_for
from vllm_unified.engines.orders import Orders, Seat
from vllm_unified.errors import ConfigError
from vllm_unified.settings import Settings

MODELS = {
    "chat": {"name": "c", "type": "chat", "gpus": [0, 1], "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5},
    "embedding": {"name": "e", "type": "embedding", "gpus": [1], "memory_gib": 8, "priority": 1},
    "ocr": {"name": "o", "type": "ocr", "gpus": [0], "kv_cache_memory_gib": 4},
}


def settings(project: Project, topology: str) -> Settings:
    project.write(MODELS)
    cards = str(CHECKOUT / "tests" / "topologies" / topology)
    return project.load({"VLLM_API_KEY": API_KEY, "VLLM_UNIFIED_DEVICES": cards})


def test_what_a_keeper_is_told(project: Project) -> None:
    """Also where another program holds much of a card now: that is waited for when it is the model's turn."""
    loaded = settings(project, "2x80.json")
    orders = {
        model.key: orders_for(loaded, model, {"PATH": "/bin", "VLLM_ROUTER_PORT": "9"}) for model in loaded.models
    }
    assert orders["chat"].seats == (Seat("GPU-0", "GPU 0", 40 * GIB), Seat("GPU-1", "GPU 1", 40 * GIB))
    assert orders["embedding"].seats == (Seat("GPU-1", "GPU 1", 8 * GIB),)
    assert {key: each.before_us for key, each in orders.items()} == {
        "chat": ("embedding",),
        "embedding": (),
        "ocr": ("chat",),
    }
    environment = orders["chat"].environment
    assert (environment["PATH"], environment["VLLM_API_KEY"]) == ("/bin", API_KEY)
    assert "VLLM_ROUTER_PORT" not in environment
    assert API_KEY not in " ".join(orders["chat"].argv)


def test_another_models_fault_keeps_nobody_from_coming_back(project: Project) -> None:
    """It was written to the file, perhaps by mistake, and not taken up by a restart yet."""
    wrong = {"type": "chat", "name": "x", "gpus": [7], "port": 9000}
    large = {"type": "chat", "name": "y", "gpus": [1], "port": 9001, "gpu_memory_utilization": 0.9}
    project.write({**MODELS, "wrong": wrong, "large": large})
    cards = str(CHECKOUT / "tests" / "topologies" / "2x80.json")
    loaded = project.load({"VLLM_API_KEY": API_KEY, "VLLM_UNIFIED_DEVICES": cards})
    assert orders_for(loaded, loaded.models[0], {}).seats[1].label == "GPU 1"
    with pytest.raises(ConfigError, match="there is no GPU 7"):
        orders_for(loaded, loaded.models[3], {})


def test_orders_come_back_from_their_text(project: Project) -> None:
    loaded = settings(project, "2x80.json")
    for model in loaded.models:
        orders = orders_for(loaded, model, {"A": "ä\n"})
        assert Orders.from_json(orders.to_json()) == orders
