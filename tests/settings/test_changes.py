"""What of a change a reload takes up, and what is said of the rest."""

from dataclasses import fields, replace
from typing import Any

import pytest

from tests.conftest import API_KEY, Project
from tests.settings.test_every_field_is_read import MODEL_FIELDS, ROUTER_FIELDS, SECTION_FIELDS, VARIABLES
from vllm_unified.settings import Settings
from vllm_unified.settings.changes import (
    LIVE_FIELDS,
    LIVE_ROUTER_FIELDS,
    RESTART_FIELDS,
    RESTART_ROUTER_FIELDS,
    Changes,
    changes,
)
from vllm_unified.settings.environment import SECRET_VARIABLES
from vllm_unified.settings.schema import Endpoint, ModelEntry, RouterSettings

CHAT = {"name": "c", "type": "chat", "repo": "someone/model"}
OTHER = {"name": "o", "type": "rerank"}
FAR = {"name": "f", "type": "embedding", "endpoints": ["http://gpu-2:8000"]}
KEY = {"VLLM_API_KEY": API_KEY}
NOTHING: dict[str, list[Any]] = {"applied": [], "restart": [], "started": [], "stopped": []}


def loaded(project: Project, models: dict[str, Any], environ: dict[str, str] = KEY, **sections: Any) -> Settings:
    project.write(models, **sections)
    return project.load(environ)


def changed(project: Project, old: dict[str, Any], new: dict[str, Any]) -> Changes:
    return changes(loaded(project, old), loaded(project, new))


def waiting(found: Changes) -> list[tuple[str, str]]:
    return [(each.what, each.command) for each in found.restart]


def test_no_field_is_forgotten() -> None:
    assert set(ModelEntry.model_fields) == {*LIVE_FIELDS, *RESTART_FIELDS, "enabled"}
    assert LIVE_FIELDS.isdisjoint(RESTART_FIELDS)
    assert set(RouterSettings.model_fields) == {*LIVE_ROUTER_FIELDS, *RESTART_ROUTER_FIELDS}
    assert LIVE_ROUTER_FIELDS.isdisjoint(RESTART_ROUTER_FIELDS)
    compared = {"models", "disabled", "router", "system", "documents", "nginx", "environment"}
    compared |= {"engine_args", "engine_env"}
    # Those of a deployment stay, and the keys that the variables hold stand in `models`.
    others = {"home", "file", "endpoint_variables", "in_containers"}
    assert {field.name for field in fields(Settings)} == {*compared, *others}


def test_nothing_has_changed(project: Project) -> None:
    models = {"chat": CHAT, "far": FAR, "off": {**OTHER, "enabled": False}}
    found = changed(project, models, models)
    assert found.document() == NOTHING
    assert found.settings == loaded(project, models)
    assert changed(project, models, dict(reversed(models.items()))).document() == NOTHING


@pytest.mark.parametrize("field", sorted(LIVE_FIELDS))
def test_a_live_field_of_a_model(project: Project, field: str) -> None:
    new = {"chat": {**CHAT, field: MODEL_FIELDS[field][0]}}
    found = changed(project, {"chat": CHAT}, new)
    (line,) = found.applied
    assert line.startswith((f"models.chat.{field}: ", f"models.chat.{field}.0.url: "))
    assert found.document() == {**NOTHING, "applied": [line]}
    assert getattr(found.settings.models[0], field) == getattr(loaded(project, new).models[0], field)


@pytest.mark.parametrize("field", sorted(RESTART_FIELDS))
def test_a_field_that_an_engine_was_started_with(project: Project, field: str) -> None:
    """It is served as before until the restart, and after it all is as in the file."""
    old = loaded(project, {"chat": CHAT, "other": OTHER})
    new = loaded(project, {"chat": {**CHAT, field: MODEL_FIELDS[field][0]}, "other": OTHER})
    found = changes(old, new)
    assert found.restart
    assert {each.command for each in found.restart} == {"./deploy.sh restart chat"}
    assert any(each.what.startswith(f"models.chat.{field}") for each in found.restart)
    assert (found.applied, found.settings) == ([], old)
    taken_up = changes(old, new, restarted=["chat"])
    assert (len(taken_up.applied), taken_up.restart) == (len(found.restart), [])
    assert taken_up.settings.models == new.models


@pytest.mark.parametrize("field", sorted(ROUTER_FIELDS))
def test_a_field_of_the_router(project: Project, field: str) -> None:
    value = ROUTER_FIELDS[field][0]
    old = loaded(project, {"chat": CHAT})
    found = changes(old, loaded(project, {"chat": CHAT}, router={field: value}))
    if field in LIVE_ROUTER_FIELDS:
        assert [line.partition(":")[0] for line in found.applied] == [f"router.{field}"]
        assert found.restart == []
        assert getattr(found.settings.router, field) == value
    else:
        assert [(what.partition(":")[0], command) for what, command in waiting(found)] == [
            (f"router.{field}", "./deploy.sh restart")
        ]
        assert (found.applied, found.settings) == ([], old)


@pytest.mark.parametrize(
    ("section", "field"), [(name, field) for name in ("system", "documents", "nginx") for field in SECTION_FIELDS[name]]
)
def test_a_field_that_waits_for_a_restart_of_all(project: Project, section: str, field: str) -> None:
    old = loaded(project, {"chat": CHAT})
    found = changes(old, loaded(project, {"chat": CHAT}, **{section: {field: SECTION_FIELDS[section][field][0]}}))
    assert [(what.partition(":")[0], command) for what, command in waiting(found)] == [
        (f"{section}.{field}", "./deploy.sh restart")
    ]
    assert found.settings == old


FIELDS_OF_VARIABLES = {
    "VLLM_ROUTER_PORT": "router.port",
    "VLLM_DOCUMENTS_PORT": "documents.port",
    "MAX_UPLOAD_SIZE_MB": "documents.max_upload_mib",
    "PDF_MAX_CONCURRENCY": "documents.pages_in_flight",
    "PDF_WORKER_DPI": "documents.dpi",
    "MAX_PAGE_RETRIES": "documents.retries",
    "SKIP_CROSS_PAGE_MERGE": "documents.join_pages",
}


READ_AT_EACH_DOWNLOAD = (
    "HF_ENDPOINT",
    "MODELSCOPE_ENDPOINT",
    "MODELSCOPE_API_TOKEN",
    "HF_HUB_DOWNLOAD_TIMEOUT",
    "VLLM_UNIFIED_OFFLINE",
    "HF_HUB_OFFLINE",
)


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_of_the_machine(project: Project, variable: str) -> None:
    models = {kind: {"name": kind, "type": kind} for kind in ("chat", "embedding", "rerank", "ocr")}
    value = VARIABLES[variable][0]
    found = changes(loaded(project, models), loaded(project, models, {**KEY, variable: value}))
    key = variable.removeprefix("VLLM_").removesuffix("_PORT").lower()
    if variable in READ_AT_EACH_DOWNLOAD:
        assert found.document() == NOTHING
    elif key in models:
        assert [command for _, command in waiting(found)] == [f"./deploy.sh restart {key}"]
    else:
        ((what, command),) = waiting(found)
        assert command == "./deploy.sh restart"
        assert what.startswith(f"{FIELDS_OF_VARIABLES.get(variable, variable)}: ")
    if variable in SECRET_VARIABLES:
        assert value not in str(found.document())


def test_what_all_engines_are_started_with(project: Project) -> None:
    project.write({"chat": CHAT})
    old = project.load(KEY)
    project.write_defaults("scheduler:\n  max_num_seqs: 7\nenv:\n  A: hidden\n")
    found = changes(old, project.load(KEY))
    assert waiting(found) == [
        ("config/vllm_config.yaml: max-num-seqs: unset → 7", "./deploy.sh restart"),
        ("variables of the engines: A: changed", "./deploy.sh restart"),
    ]


def test_lines_for_people(project: Project) -> None:
    first = {"url": "http://gpu-2:8000", "api_key": "sk-before"}
    old = {**CHAT, "path": "w", "max_concurrent": 4, "endpoints": [first, "http://gpu-3"], "env": {"A": "sk-before"}}
    new = {
        **CHAT,
        "path": "w",
        "max_concurrent": 8,
        "max_model_len": 16384,
        "endpoints": [{"url": "http://gpu-2:8000", "api_key": "sk-now", "weight": 2}, "http://gpu-4"],
        "env": {"A": "sk-now"},
        "engine_args": {"max_num_seqs": 3},
    }
    found = changed(project, {"chat": old}, {"chat": new})
    assert found.applied == [
        "models.chat.endpoints: http://gpu-3: removed",
        "models.chat.endpoints: http://gpu-4: added",
        "models.chat.endpoints: http://gpu-2:8000: api_key: changed",
        "models.chat.endpoints: http://gpu-2:8000: weight: 1 → 2",
        "models.chat.max_concurrent: 4 → 8",
    ]
    assert waiting(found) == [
        ("models.chat.max_model_len: unset → 16384", "./deploy.sh restart chat"),
        ("models.chat.engine_args.max-num-seqs: unset → 3", "./deploy.sh restart chat"),
        ("models.chat.env: changed", "./deploy.sh restart chat"),
    ]


@pytest.mark.parametrize("field", Endpoint.model_fields)
def test_every_field_of_an_endpoint_is_compared(project: Project, field: str) -> None:
    value = {"url": "https://gpu-9", "timeout": 1.0, "weight": 9}.get(field, "x")
    old = loaded(project, {"far": FAR})
    (endpoint,) = old.models[0].endpoints
    model = old.models[0].model_copy(update={"endpoints": [endpoint.model_copy(update={field: value})]})
    found = changes(old, replace(old, models=(model,)))
    assert found.applied
    assert found.settings.models == (model,)


OFF = {"enabled": False}


@pytest.mark.parametrize(
    ("old", "new", "said", "served"),
    [
        ({"off": {**CHAT, **OFF}}, {"off": CHAT}, {"started": ["off"]}, ["other", "off"]),
        ({"chat": CHAT}, {"chat": {**CHAT, **OFF}}, {"stopped": ["chat"]}, ["other"]),
        ({"chat": CHAT}, {}, {"stopped": ["chat"]}, ["other"]),
        ({}, {"far": FAR}, {"applied": ["models.far: served by its endpoints"]}, ["other", "far"]),
        ({"far": FAR}, {}, {"applied": ["models.far: removed"]}, ["other"]),
        ({"far": {**FAR, **OFF}}, {"far": FAR}, {"applied": ["models.far: served by its endpoints"]}, ["other", "far"]),
        (
            {"chat": CHAT},
            {"chat": {"name": "c", "type": "chat", "endpoints": ["http://gpu-2"]}},
            {"applied": ["models.chat: served by its endpoints"], "stopped": ["chat"]},
            ["other", "chat"],
        ),
        (
            {"far": FAR},
            {"far": {**FAR, "name": "g", "type": "chat"}},
            {"applied": ['models.far.name: "f" → "g"', 'models.far.type: "embedding" → "chat"']},
            ["other", "far"],
        ),
        (
            {},
            {"chat": CHAT},
            {"restart": [{"what": "models.chat: a new engine", "command": "./deploy.sh restart"}]},
            ["other"],
        ),
        (
            {"far": FAR},
            {"far": {**FAR, "path": "weights"}},
            {"restart": [{"what": "models.far: a new engine", "command": "./deploy.sh restart"}]},
            ["other", "far"],
        ),
    ],
)
def test_models_that_come_and_go(
    project: Project, old: dict[str, Any], new: dict[str, Any], said: dict[str, Any], served: list[str]
) -> None:
    found = changed(project, {"other": OTHER, **old}, {"other": OTHER, **new})
    assert found.document() == {**NOTHING, **said}
    assert [model.key for model in found.settings.models] == served


def test_an_engine_that_supervisord_does_not_know_waits_also_when_it_came_disabled(project: Project) -> None:
    first = loaded(project, {"other": OTHER})
    second = changes(first, loaded(project, {"other": OTHER, "chat": {**CHAT, **OFF}})).settings
    found = changes(second, loaded(project, {"other": OTHER, "chat": CHAT}))
    assert waiting(found) == [("models.chat: a new engine", "./deploy.sh restart")]


def test_what_waits_goes_on_waiting(project: Project) -> None:
    old, new = loaded(project, {"chat": CHAT}), loaded(project, {"chat": {**CHAT, "dtype": "float16"}})
    first = changes(old, new)
    assert changes(first.settings, new).document() == first.document()
