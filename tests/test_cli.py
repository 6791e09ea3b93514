import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import API_KEY, CHECKOUT, FAKE_ENGINE, Project, free_port, listening


def run(project: Project, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    given = {
        **os.environ,
        "VLLM_UNIFIED_HOME": str(project.home),
        "VLLM_UNIFIED_ENGINE_PROGRAM": FAKE_ENGINE,
        **environ,
    }
    return subprocess.run(
        [sys.executable, "-m", "vllm_unified", *arguments],
        env={**given, "COLUMNS": "120"},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def small(project: Project) -> Project:
    ports = {"router": free_port(), "chat": free_port()}
    chat = {"name": "c", "type": "chat", "port": ports["chat"], "engine_args": {"kv-cache-memory-bytes": "1M"}}
    project.write({"chat": chat}, router={"port": ports["router"]})
    project.model_folder("chat")
    return project


def test_check(small: Project) -> None:
    done = run(small, "check", "--machine")
    assert (done.stderr, done.stdout) == ("", "config/models.json: 1 model, nothing wrong\n")


def test_a_users_error_is_a_line_and_exit_1(small: Project) -> None:
    small.write({"chat": {"name": "a b", "type": "chat"}, "x": {"name": "x", "type": "y"}})
    for command in (["check"], ["plan"], ["show", "chat"], ["render"], ["router"], ["engine", "chat"], ["status"]):
        done = run(small, *command)
        assert done.returncode == 1, command
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 2
        assert "Traceback" not in done.stderr
    assert not (small.home / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show", "nobody"], 1, 'config/models.json: no model "nobody"; there are chat'),
        (["engine", "nobody"], 1, 'config/models.json: no model "nobody"; there are chat'),
        (["engine", "chat"], 1, "VLLM_API_KEY is not set: `vllm-unified init` puts a random one into .env"),
        (["router"], 1, "VLLM_API_KEY is not set: `vllm-unified init` puts a random one into .env"),
        (["welcome"], 1, "VLLM_API_KEY is not set: `vllm-unified init` puts a random one into .env"),
        (["--config", "/no/such.json", "check"], 1, "/no/such.json: no such file; name another with --config FILE"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["check", "--nonsense"], 2, "No such option"),
    ],
)
def test_what_it_says_of_mistakes(small: Project, arguments: list[str], code: int, said: str) -> None:
    done = run(small, *arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_check_machine_names_everything(small: Project) -> None:
    (small.home / "models" / "chat" / "config.json").unlink()
    settings = small.load()
    with listening(settings.models[0].port):
        done = run(small, "check", "--machine")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith(f"config/models.json: models.chat.path: {small.home}/models/chat: no config.json in it; ")
    assert second.startswith(f"config/models.json: models.chat.port: port {settings.models[0].port} on 127.0.0.1: ")
    assert f"(pid {os.getpid()})" in second


@pytest.mark.parametrize(
    ("fields", "offline", "remedy"),
    [
        ({"repo": "o/n"}, "", "no such folder; fetch o/n with: ./deploy.sh models download chat"),
        ({"repo": "o/n", "revision": "v1"}, "1", "no such folder; offline, so bring o/n at v1: "),
        ({}, "", "put the weights there, or say in `repo` where they come from"),
    ],
)
def test_check_says_how_to_get_the_weights(project: Project, fields: dict[str, str], offline: str, remedy: str) -> None:
    project.write({"chat": {"name": "c", "type": "chat", "gpu_memory_utilization": 0.1, **fields}})
    assert remedy in run(project, "check", "--machine", VLLM_UNIFIED_OFFLINE=offline).stderr


@pytest.mark.parametrize(
    ("before", "fields", "code"), [("making", {}, 0), ("fetching", {"repo": "o/n"}, 0), ("fetching", {}, 1)]
)
def test_check_before_the_weights_come(small: Project, before: str, fields: dict[str, str], code: int) -> None:
    (small.home / "models" / "chat" / "config.json").unlink()
    document = json.loads(small.file.read_text())
    document["models"]["chat"] |= fields
    small.write(json.dumps(document))
    assert run(small, "check", "--machine", "--before", before).returncode == code


@pytest.mark.parametrize(
    ("folder", "said"), [("100%", "cannot run in a folder with %"), ("x" * 120, "too long a path for a Unix socket")]
)
def test_folders_that_supervisord_cannot_run_in(small: Project, folder: str, said: str) -> None:
    moved = Project(small.home.rename(small.home.with_name(folder)))
    assert said in run(moved, "check", "--machine").stderr


def test_plan(small: Project) -> None:
    document = json.loads(run(small, "plan", "--json").stdout)
    (device,) = document["devices"]
    assert device["asked_bytes"] == device["models"]["chat"] > 2 << 30
    assert "chat" in run(small, "plan").stdout


def cards(project: Project, **first: float) -> str:
    file = project.home / "cards.json"
    file.write_text(json.dumps({"devices": [{"memory_gib": 80, **first}, {"memory_gib": 80}]}))
    return str(file)


def test_plan_for_other_devices(small: Project) -> None:
    models: dict[str, Any] = {"a": {"gpus": [0], "gpu_memory_utilization": 0.6}, "b": {"memory_gib": 20, "priority": 1}}
    small.write({key: {"name": key, "type": "chat", "port": ord(key), **rest} for key, rest in models.items()})
    file = cards(small, free_gib=70)
    document = json.loads(run(small, "plan", "--json", "--devices", file).stdout)
    gib = 1 << 30
    assert document["order"] == ["b", "a"]
    first, second = document["devices"]
    assert (first["models"], second["models"]) == ({"a": 49 * gib}, {"b": 21 * gib})
    assert (first["held_by_others_bytes"], first["left_bytes"]) == (10 * gib, 21 * gib)
    assert document["models"]["b"] == {
        "devices": ["GPU 1"],
        "gpu_memory_utilization": 0.25,
        "starts_after": [],
        "of_each_device": [{"weights_bytes": 0, "cache_bytes": 20 * gib, "margin_bytes": gib, "asked_bytes": 21 * gib}],
    }
    assert [line.rstrip() for line in run(small, "plan", VLLM_UNIFIED_DEVICES=file).stdout.splitlines()] == [
        "GPU 0  stand-in  80.0 GiB, 10.0 held by others",
        "  ░░░░░░▏a                           ▏            ▏",
        *(f"  {line}" for line in ("a         49.0 GiB  cache 48.0 + margin 1.0", "together  49.0 GiB  21.0 GiB left")),
        "",
        "GPU 1  stand-in  80.0 GiB, 0.0 held by others",
        "  ▏b           ▏                                  ▏",
        *(f"  {line}" for line in ("b         21.0 GiB  cache 20.0 + margin 1.0", "together  21.0 GiB  59.0 GiB left")),
        "",
        "starting order: b, a",
    ]


def test_a_file_of_the_command_line_goes_before_the_variable(small: Project) -> None:
    small.write({"a": {"name": "a", "type": "chat", "gpus": [0], "gpu_memory_utilization": 0.6}})
    shown = run(small, "show", "a", "--devices", cards(small), VLLM_UNIFIED_DEVICES="/none.json")
    assert "CUDA_VISIBLE_DEVICES=GPU-0" in shown.stdout
    assert "/none.json: no such file" in run(small, "show", "a", VLLM_UNIFIED_DEVICES="/none.json").stderr


def test_check_machine_counts_what_others_hold(small: Project) -> None:
    small.write({"a": {"name": "a", "type": "chat", "gpus": [0], "gpu_memory_utilization": 0.6}})
    small.model_folder("a")
    file = cards(small, free_gib=20)
    assert run(small, "check", "--devices", file).returncode == 0
    assert run(small, "check", "--machine", "--devices", file).stderr == (
        "config/models.json: models: GPU 0 has 80.0 GiB (60.0 held by others), asked for 49.0 (a 49.0); "
        "put a on GPU 1\n"
    )


def test_show_can_be_pasted(small: Project) -> None:
    shown = run(small, "show", "c", VLLM_API_KEY=API_KEY).stdout
    assert API_KEY not in shown
    assert f"--model {small.home}/models/chat --served-model-name c" in shown


def test_render_and_init(small: Project) -> None:
    assert run(small, "render").returncode == 0
    assert "[program:chat]" in (small.home / "run" / "supervisord.conf").read_text()
    assert json.loads((small.home / "run" / "placement.json").read_text()) == {"chat": [""]}
    assert run(small, "init").stdout.endswith("made an API key\n")
    assert run(small, "init").stdout.endswith("has its API key already\n")


def test_status_of_what_does_not_run(small: Project) -> None:
    done = run(small, "status")
    assert (done.returncode, done.stdout) == (3, "not running; start it with ./deploy.sh start\n")
    done = run(small, "status", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 3
    assert (document["running"], document["ready"]) == (False, False)
    assert document["models"]["chat"]["state"] == "stopped"
    assert run(small, "health").returncode == 3


def test_a_key_goes_before_another_models_alias(small: Project) -> None:
    cached = {"engine_args": {"kv-cache-memory-bytes": "1M"}}
    main = {"name": "m", "type": "chat", "aliases": ["b"], **cached}
    small.write({"main": main, "b": {"name": "x", "type": "ocr", **cached}})
    assert "/models/b --served-model-name x" in run(small, "show", "b").stdout
    assert "/models/main --served-model-name m b" in run(small, "show", "m").stdout


def test_config_may_stand_before_the_command_and_behind_it(small: Project) -> None:
    other = small.file.rename(small.file.with_name("other.json"))
    for arguments in (["--config", str(other), "check"], ["check", "--config", str(other)]):
        assert run(small, *arguments).stdout == "config/other.json: 1 model, nothing wrong\n"
    assert run(small, "check", VLLM_UNIFIED_CONFIG=str(other)).returncode == 0
    assert run(small, "check").returncode == 1


FAR = {"name": "far", "type": "embedding", "endpoints": ["http://gpu-2:8000", "http://gpu-3:8000"]}


def test_where_nothing_is_served_here(project: Project) -> None:
    project.write({"far": FAR}, router={"port": free_port()})
    key = {"VLLM_API_KEY": API_KEY}
    assert run(project, "check", "--machine").stdout == "config/models.json: 1 model, nothing wrong\n"
    said = "config/models.json: nothing is served on this machine, all by endpoints\n"
    assert run(project, "plan").stdout == said
    assert json.loads(run(project, "plan", "--json").stdout) == {"devices": [], "models": {}, "order": []}
    assert run(project, "engines").stdout == ""
    assert run(project, "render").returncode == 0
    assert json.loads((project.home / "run" / "placement.json").read_text()) == {}
    assert "far  2 endpoints  far\n" in run(project, "welcome", **key).stdout
    for command in ("show", "engine"):
        done = run(project, command, "far", **key)
        assert (done.returncode, done.stderr) == (
            1,
            "config/models.json: models.far: no engine here serves it, its endpoints do\n",
        )


def test_remote_and_disabled_models_beside_others(small: Project) -> None:
    chat = json.loads(small.file.read_text())["models"]["chat"]
    off = {**chat, "name": "off", "port": 9, "enabled": False}
    far = {**FAR, "endpoints": [{"url": "http://gpu-2:8000", "api_key": "sk-theirs"}]}
    small.write({"far": far, "chat": chat, "off": off, "far-off": {**far, "enabled": False}})
    assert run(small, "check", "--machine").stdout == "config/models.json: 2 models, nothing wrong\n"
    assert run(small, "engines").stdout == "chat\n"
    assert list(json.loads(run(small, "plan", "--json").stdout)["models"]) == ["chat"]
    said = run(small, "status", "--json").stdout
    models = json.loads(said)["models"]
    assert {key: each["state"] for key, each in models.items()} == {
        "chat": "stopped",
        "far": "remote",
        "off": "disabled",
        "far-off": "disabled",
    }
    assert (models["far"]["endpoints"], models["far"]["port"]) == (1, None)
    assert "sk-theirs" not in said
    assert run(small, "show", "off").stderr == (
        "config/models.json: models.off is disabled; enable it, and ./deploy.sh reload\n"
    )


def test_reload_of_what_does_not_run(small: Project) -> None:
    done = run(small, "reload")
    assert (done.returncode, done.stderr) == (3, "not running; start it with ./deploy.sh start\n")
    small.write({})
    done = run(small, "reload")
    assert (done.returncode, done.stderr) == (1, "config/models.json: models: at least one is needed\n")


def test_help_has_examples() -> None:
    done = subprocess.run([sys.executable, "-m", "vllm_unified", "--help"], capture_output=True, text=True, check=True)
    assert "vllm-unified check --machine" in done.stdout
    assert "Exit codes: 0 done" in done.stdout


def test_check_tells_of_a_key_for_a_model_that_is_not_there(project: Project) -> None:
    project.write(
        {
            "chat": {"name": "a", "type": "chat", "aliases": ["b"]},
            "off": {"name": "c", "type": "chat", "enabled": False},
        }
    )
    entry = {"name": "team", "hash": f"sha256:{'0' * 64}", "models": ["chat", "a", "b", "c", "d"]}
    (project.home / "config" / "keys.yaml").write_text(json.dumps({"keys": [entry]}))
    done = run(project, "check")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert 'no model is called "d"' in done.stderr
