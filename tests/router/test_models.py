"""The list of models, from real folders with the configurations that models of each family have."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Project
from vllm_unified.router.keys import Key
from vllm_unified.router.models import model_entry, model_list
from vllm_unified.router.problems import RequestError
from vllm_unified.router.registry import Registry
from vllm_unified.settings.keys import KeyEntry

STARTED = 1_795_283_400


def key_for(*models: str) -> Key:
    return Key(KeyEntry(name="team", hash="sha256:" + "0" * 64, models=list(models) or None))


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")


def entries(project: Project, models: dict[str, dict[str, Any]], key: Key | None = None) -> dict[str, dict[str, Any]]:
    """Name → document."""
    project.write(models)
    settings = project.load()
    listed = model_list(Registry(settings), key or key_for(), settings, STARTED)
    assert listed["object"] == "list"
    json.dumps(listed)
    return {entry["id"]: entry for entry in listed["data"]}


def capabilities(project: Project, config: Any, kind: str = "chat", **fields: Any) -> dict[str, Any]:
    """Of a model whose folder has this config.json."""
    write_json(project.home / "models" / "it" / "config.json", config)
    found: dict[str, Any] = entries(project, {"it": {"name": "it", "type": kind, **fields}})["it"]["capabilities"]
    return found


def test_every_name_and_alias_has_an_entry(project: Project) -> None:
    write_json(project.home / "models" / "chat" / "config.json", {"max_position_embeddings": 32768})
    found = entries(project, {"chat": {"name": "Qwen", "type": "chat", "aliases": ["gpt-4", "org/通义"]}})
    assert list(found) == ["Qwen", "gpt-4", "org/通义"]
    assert found["gpt-4"] == {
        "id": "gpt-4",
        "object": "model",
        "created": STARTED,
        "owned_by": "vllm-unified",
        "root": "Qwen",
        "parent": None,
        "max_model_len": 32768,
        "aliases": ["gpt-4", "org/通义"],
        "type": "chat",
        "state": "unavailable",
        "capabilities": {
            "kind": "chat",
            "modalities": {"input": ["text"], "output": ["text"]},
            "context_length": 32768,
            "dimensions": None,
        },
    }


@pytest.mark.parametrize(
    ("models", "listed"), [((), ["a", "b", "bb"]), (("a",), ["a"]), (("bb",), ["b", "bb"]), (("y",), ["b", "bb"])]
)
def test_a_key_sees_the_models_that_it_may_use(project: Project, models: tuple[str, ...], listed: list[str]) -> None:
    two: dict[str, dict[str, Any]] = {
        "x": {"name": "a", "type": "chat"},
        "y": {"name": "b", "type": "embedding", "aliases": ["bb"]},
    }
    assert list(entries(project, two, key_for(*models))) == listed


def test_one_model_by_its_name(project: Project) -> None:
    project.write({"x": {"name": "org/a", "type": "chat", "aliases": ["a"]}, "y": {"name": "b", "type": "embedding"}})
    settings = project.load()
    registry = Registry(settings)
    assert model_entry("org/a", registry, key_for(), settings, STARTED)["root"] == "org/a"
    assert model_entry("a", registry, key_for(), settings, STARTED)["root"] == "org/a"
    for name, status, code in (("c" * 9999, 404, "model_not_found"), ("b", 403, "model_not_allowed")):
        with pytest.raises(RequestError) as caught:
            model_entry(name, registry, key_for("a"), settings, STARTED)
        assert (caught.value.status, caught.value.code) == (status, code)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"llm_config": {"max_position_embeddings": 16384}, "vision_config": {"max_position_embeddings": 77}}, 16384),
        ({"thinker_config": {"text_config": {"max_position_embeddings": 65536}}}, 65536),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 8194, "pad_token_id": 1}, 8192),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": True, "text_config": [4096]}, None),
        ({}, None),
    ],
)
def test_context_length_of_the_weights(project: Project, config: Any, length: int | None) -> None:
    assert capabilities(project, config)["context_length"] == length


def test_context_length_the_server_knows_best_then_the_settings(project: Project) -> None:
    write_json(project.home / "models" / "it" / "config.json", {"max_position_embeddings": 4096})
    project.write(
        {
            "it": {
                "name": "it",
                "type": "chat",
                "max_model_len": 2048,
                "path": "models/it",
                "endpoints": ["http://gpu-2"],
            }
        }
    )
    settings = project.load()
    registry = Registry(settings)

    def length() -> tuple[Any, Any]:
        entry = model_entry("it", registry, key_for(), settings, STARTED)
        return entry["max_model_len"], entry["capabilities"]["context_length"]

    assert length() == (2048, 2048)
    registry.served[0].replicas[1].context_length = 1500
    assert length() == (1500, 1500)
    registry.served[0].replicas[0].context_length = 1000
    assert length() == (1000, 1000)


@pytest.mark.parametrize(
    ("config", "kind", "inputs"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "chat", ["text"]),
        (
            {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": {"depth": 32}},
            "chat",
            ["text", "image"],
        ),
        ({"architectures": ["QWenLMHeadModel"], "visual": {"layers": 48}}, "chat", ["text", "image"]),
        ({"architectures": ["MolmoForCausalLM"]}, "chat", ["text", "image"]),
        ({"vision_config": {}, "text_config": {"vocab_size": 10}}, "chat", ["text"]),
        ({"audio_config": {"d_model": 1280}}, "chat", ["text", "audio"]),
        (
            {"thinker_config": {"vision_config": {"depth": 1}, "audio_config": {"d_model": 1}}},
            "chat",
            ["text", "image", "audio"],
        ),
        ({"architectures": ["WhisperForConditionalGeneration"]}, "chat", ["audio"]),
        ({"architectures": ["DeepseekOCRForCausalLM"]}, "ocr", ["text", "image"]),
        ({"architectures": ["XLMRobertaForSequenceClassification"]}, "rerank", ["text"]),
        ({"architectures": "Qwen2ForCausalLM"}, "chat", ["text"]),
    ],
)
def test_input_modalities(project: Project, config: Any, kind: str, inputs: list[str]) -> None:
    found = capabilities(project, config, kind)
    assert (found["kind"], found["modalities"]["input"]) == (kind, inputs)


@pytest.mark.parametrize(
    ("kind", "output"), [("chat", "text"), ("ocr", "text"), ("embedding", "embedding"), ("rerank", "score")]
)
def test_output_modalities(project: Project, kind: str, output: str) -> None:
    assert capabilities(project, {"model_type": "bert"}, kind)["modalities"]["output"] == [output]


DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


@pytest.mark.parametrize(
    ("kind", "files", "dimensions"),
    [
        ("embedding", {"config.json": {"hidden_size": 1024}}, 1024),
        ("embedding", {"config.json": {"text_config": {"hidden_size": 2048}}}, 2048),
        ("embedding", {"config.json": {"hidden_size": 1024}, "modules.json": [POOLING]}, 1024),
        (
            "embedding",
            {
                "config.json": {"hidden_size": 1024},
                "modules.json": [POOLING, DENSE],
                "2_Dense/config.json": {"in_features": 1024, "out_features": 768},
            },
            768,
        ),
        ("embedding", {"config.json": {"hidden_size": 1024}, "modules.json": [DENSE]}, None),
        ("embedding", {"config.json": {"hidden_size": 1024}, "modules.json": '[{"type":'}, 1024),
        ("embedding", {"config.json": {}}, None),
        ("chat", {"config.json": {"hidden_size": 1024}}, None),
    ],
)
def test_dimensions(project: Project, kind: str, files: dict[str, Any], dimensions: int | None) -> None:
    for name, document in files.items():
        write_json(project.home / "models" / "it" / name, document)
    found = entries(project, {"it": {"name": "it", "type": kind}})["it"]
    assert found["capabilities"]["dimensions"] == dimensions


@pytest.mark.parametrize("text", [None, "", "{", "[1, 2]", "null", '"text"', '{"a": ' * 100_000, "\x00"])
def test_a_broken_config_leaves_the_list_whole(project: Project, text: str | None) -> None:
    if text is not None:
        write_json(project.home / "models" / "it" / "config.json", text)
    found = entries(project, {"it": {"name": "it", "type": "embedding"}, "ocr": {"name": "ocr", "type": "ocr"}})
    assert found["it"]["capabilities"] == {
        "kind": "embedding",
        "modalities": {"input": None, "output": ["embedding"]},
        "context_length": None,
        "dimensions": None,
    }
    assert found["ocr"]["capabilities"]["modalities"]["input"] == ["text", "image"]


def test_a_remote_model_says_what_its_server_says(project: Project) -> None:
    found = entries(project, {"far": {"name": "far", "type": "embedding", "endpoints": ["http://gpu-2:8000"]}})["far"]
    assert found["max_model_len"] is None
    assert found["capabilities"]["modalities"] == {"input": None, "output": ["embedding"]}
    assert found["capabilities"]["dimensions"] is None


def test_new_weights_are_noticed(project: Project) -> None:
    path = project.home / "models" / "it" / "config.json"
    assert capabilities(project, {"max_position_embeddings": 4096})["context_length"] == 4096
    write_json(path, {"max_position_embeddings": 8192})
    os.utime(path, (STARTED, STARTED))
    settings = project.load()
    found = model_entry("it", Registry(settings), key_for(), settings, STARTED)
    assert found["capabilities"]["context_length"] == 8192


@pytest.mark.parametrize(
    ("problems", "state"),
    [
        ([None], "ready"),
        (["starting"], "starting"),
        (["waiting for its device"], "waiting"),
        (["failed, tried again soon"], "failed"),
        (["it does not answer on its port"], "unavailable"),
        (["stopped", None], "ready"),
        (["it does not answer on its port", "starting"], "starting"),
    ],
)
def test_state(project: Project, problems: list[str | None], state: str) -> None:
    project.write(
        {"it": {"name": "it", "type": "chat", "endpoints": [f"http://gpu-{n}" for n in range(len(problems))]}}
    )
    settings = project.load()
    registry = Registry(settings)
    (served,) = registry.served
    for replica, problem in zip(served.replicas, problems, strict=True):
        replica.error = problem
    assert model_entry("it", registry, key_for(), settings, STARTED)["state"] == state
    served.drained = True
    assert model_entry("it", registry, key_for(), settings, STARTED)["state"] == "drained"
