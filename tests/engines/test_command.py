import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import API_KEY, CHECKOUT, Project
from vllm_unified.devices import GIB, Device
from vllm_unified.engines.command import Command, engine_command
from vllm_unified.engines.placement import plan
from vllm_unified.settings import Settings

CPU = [Device(0, "cpu", "test", "", 64 * GIB, 64 * GIB)]
GPUS = [Device(index, "cuda", "test", f"GPU-{index}", 80 * GIB, 80 * GIB) for index in range(2)]


def command_of(settings: Settings, devices: list[Device], key: str = "chat") -> Command:
    return engine_command(settings, plan(settings, devices).of(key))


def test_the_whole_command_line(project: Project) -> None:
    project.write_defaults("server:\n  uvicorn_log_level: warning\nscheduler:\n  max_num_seqs: 9\n")
    project.write(
        {
            "chat": {
                "name": "Qwen",
                "type": "chat",
                "path": "/models/qwen",
                "tensor_parallel_size": 2,
                "gpu_memory_utilization": 0.6,
                "max_model_len": 4096,
                "dtype": "auto",
                "aliases": ["gpt-4"],
                "trust_remote_code": True,
                "engine_args": {
                    "max-num-seqs": 4,
                    "enable_prefix_caching": False,
                    "enforce-eager": False,
                    "disable-log-stats": False,
                    "logits-processors": ["a:B", "c:D"],
                    "hf-overrides": {"architectures": ["X"]},
                    "seed": -1,
                    "compilation-config.level": 3,
                },
            }
        }
    )
    settings = project.load({"VLLM_UNIFIED_ENGINE_PROGRAM": "vllm serve"})
    assert list(command_of(settings, GPUS).argv) == [
        *("vllm", "serve", "--model", "/models/qwen", "--served-model-name", "Qwen", "gpt-4"),
        *("--host", "127.0.0.1", "--port", "8001", "--runner", "generate", "--shutdown-timeout", "30"),
        *("--gpu-memory-utilization", "0.6", "--max-model-len", "4096"),
        *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "1", "--dtype", "auto", "--trust-remote-code"),
        *("--uvicorn-log-level", "warning", "--max-num-seqs", "4", "--no-enable-prefix-caching"),
        *("--no-enforce-eager", "--logits-processors", "a:B", "c:D"),
        *("--hf-overrides", '{"architectures": ["X"]}', "--seed=-1", "--compilation-config.level", "3"),
    ]


@pytest.mark.parametrize(
    ("kind", "runner"), [("chat", "generate"), ("ocr", "generate"), ("embedding", "pooling"), ("rerank", "pooling")]
)
def test_the_runner_follows_from_the_type(project: Project, kind: str, runner: str) -> None:
    project.write({"m": {"name": "m", "type": kind}})
    argv = command_of(project.load(), CPU, "m").argv
    assert argv[argv.index("--runner") + 1] == runner


def test_each_engine_has_its_own_environment(project: Project) -> None:
    gpu = {"type": "chat", "gpu_memory_utilization": 0.4}
    project.write({"a": {**gpu, "name": "a", "gpus": [1]}, "b": {**gpu, "name": "b", "port": 1, "env": {"X": "y"}}})
    settings = project.load({"VLLM_API_KEY": API_KEY})
    a, b = (command_of(settings, GPUS, key).environment for key in ("a", "b"))
    assert a["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert b["CUDA_VISIBLE_DEVICES"] == "GPU-0"
    assert (a["VLLM_PORT"], b["VLLM_PORT"]) == ("20000", "20100")
    assert b["X"] == "y"
    assert "X" not in a
    for each in (a, b):
        assert each["VLLM_API_KEY"] == API_KEY
        assert each["HF_HUB_OFFLINE"] == each["TRANSFORMERS_OFFLINE"] == each["DO_NOT_TRACK"] == "1"


def test_the_deployments_own_variables_stay_out_of_the_engine(project: Project) -> None:
    """vLLM warns of every VLLM_ variable it does not know; a shared metrics folder mixes two servers' figures."""
    project.write({"my-chat": {"name": "c", "type": "chat"}})
    base = {
        "VLLM_MY_CHAT_PORT": "2",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "3",
        "PATH": "/bin",
        "VLLM_CHAT_PORT": "1",
        "VLLM_ROUTER_HOST": "x",
        "VLLM_UNIFIED_HOME": "y",
        "PROMETHEUS_MULTIPROC_DIR": "/tmp/m",
        "VLLM_LOGGING_LEVEL": "DEBUG",
    }
    own = project.load().own_variables
    assert Command((), {"A": "b"}, own).full_environment(base) == {
        "PATH": "/bin",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "3",
        "A": "b",
    }


def test_the_key_of_an_endpoint_stays_out_of_the_engine(project: Project) -> None:
    endpoint = {"url": "https://api.example", "api_key": "$THEIR_KEY"}
    project.write({"chat": {"name": "c", "type": "chat", "path": "w", "endpoints": [endpoint]}})
    (project.home / ".env").write_text("THEIR_KEY=sk-theirs\n")
    command = command_of(project.load(), CPU)
    environment = command.full_environment({"THEIR_KEY": "sk-theirs", "PATH": "/bin"})
    assert "sk-theirs" not in [*environment.values(), *command.argv]


def test_an_engine_keeps_its_internal_ports_when_another_is_enabled(project: Project) -> None:
    off = {"name": "off", "type": "chat", "port": 8010}
    chat = {"name": "c", "type": "chat"}
    found = []
    for enabled in (False, True):
        project.write({"off": {**off, "enabled": enabled}, "chat": chat})
        found.append(command_of(project.load(), GPUS).environment["VLLM_PORT"])
    assert found == ["20100", "20100"]


ODD: dict[str, Any] = {
    "chat-template": "{% if a %} ;b #c \"d\" 'e' $HOME `x` \\ \n 100%{% endif %}",
    "hf-overrides": {"a b": ["; #", '"', "'", "%(here)s", "é漢"]},
    "served-model-name": None,
}


def test_odd_values_reach_argv_intact(project: Project) -> None:
    """Through a real process, and through a real shell for what `show` prints."""
    args = {flag: value for flag, value in ODD.items() if value is not None}
    folder = "models/a ;b #c 100% \"d\" 'e'"
    project.write({"chat": {"name": "m", "type": "chat", "path": folder, "engine_args": args}})
    printer = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    settings = project.load({"VLLM_UNIFIED_ENGINE_PROGRAM": printer})
    command = command_of(settings, CPU)
    shown = command.shown(settings)
    assert API_KEY not in shown
    direct = subprocess.run(command.argv, capture_output=True, text=True, check=True).stdout
    pasted = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True).stdout
    assert json.loads(direct) == json.loads(pasted) == list(command.argv[3:])
    received = json.loads(direct)
    assert received[received.index("--model") + 1] == str(project.home / folder)
    assert received[received.index("--chat-template") + 1] == ODD["chat-template"]
    assert json.loads(received[received.index("--hf-overrides") + 1]) == ODD["hf-overrides"]


def test_show_reads_the_key_where_it_stands(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    (project.home / ".env").write_text(f"VLLM_API_KEY={API_KEY}\n")
    project.write({"chat": {"name": "m", "type": "chat"}})
    program = f"{sys.executable} -c 'import os; print(os.environ[\"VLLM_API_KEY\"])'"
    settings = project.load({"VLLM_UNIFIED_ENGINE_PROGRAM": program})
    shown = command_of(settings, CPU).shown(settings)
    assert API_KEY not in shown
    assert subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True).stdout.strip() == API_KEY


def test_no_secret_is_shown(project: Project) -> None:
    (project.home / ".env").write_text(
        "MIRROR_PASSWORD=hidden-1\nHF_TOKEN='hidden-2'\nOTEL_EXPORTER_OTLP_HEADERS=x-key=hidden-4\n"
    )
    project.write({"chat": {"name": "m", "type": "chat", "env": {"S3_SECRET": "hidden-3", "PLAIN": "shown"}}})
    settings = project.load({"VLLM_UNIFIED_ENGINE_PROGRAM": "env"})
    shown = command_of(settings, CPU).shown(settings)
    assert "hidden" not in shown
    assert "PLAIN=shown" in shown
    pasted = subprocess.run(["sh", "-c", shown.partition(" --model")[0]], capture_output=True, text=True, check=True)
    assert "MIRROR_PASSWORD=hidden-1\n" in pasted.stdout
    assert "HF_TOKEN=hidden-2\n" in pasted.stdout


def test_the_program_is_vllm_beside_us(project: Project) -> None:
    project.write({"chat": {"name": "m", "type": "chat"}})
    argv = command_of(project.load(), CPU).argv
    here = Path(sys.executable).parent
    assert shlex.join(argv).startswith((f"{here}/vllm serve ", f"{sys.executable} -m vllm.entrypoints"))
    assert os.access(argv[0], os.X_OK) or argv[0].endswith("/vllm")
    assert CHECKOUT.is_dir()


TRACES = "http://collector:4318/v1/traces"


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ({}, TRACES),
        ({"otlp-traces-endpoint": "http://theirs/v1/traces"}, "http://theirs/v1/traces"),
        ({"otlp-traces-endpoint": None}, None),
        # vLLM 0.32 makes its spans of its statistics: AssertionError at every request without them
        ({"disable-log-stats": True}, None),
    ],
)
def test_an_engine_traces_where_the_deployment_does(
    project: Project, arguments: dict[str, Any], url: str | None
) -> None:
    project.write({"chat": {"name": "m", "type": "chat", "engine_args": arguments}})
    command = command_of(project.load({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/"}), CPU)
    flag = "--otlp-traces-endpoint"
    assert (command.argv[command.argv.index(flag) + 1] if flag in command.argv else None) == url
    assert command.environment["OTEL_SERVICE_NAME"] == "vllm-unified-chat"
    assert command.environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"


def test_an_engine_does_not_trace_by_default(project: Project) -> None:
    project.write({"chat": {"name": "m", "type": "chat"}})
    command = command_of(project.load(), CPU)
    assert not [each for each in (*command.argv, *command.environment) if "otlp" in each.lower() or "OTEL" in each]
