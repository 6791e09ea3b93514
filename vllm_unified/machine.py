"""Whether this machine can run the deployment now. Nothing is changed by looking."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import psutil

from vllm_unified.engines.keeper import port_taken
from vllm_unified.engines.placement import plan_now
from vllm_unified.errors import ConfigError, Problem
from vllm_unified.settings import Model, Settings

# A Unix socket's address has 108 bytes, the last of them zero; supervisord adds its pid while it makes one.
LONGEST_SOCKET_PATH = 95


def problems_of_machine(settings: Settings, *, weights: bool, running: bool) -> list[Problem]:
    """Everything that would keep the models from starting: devices, folder, weights, ports, memory.

    `weights`: False where they are about to be made. `running`: the deployment has its ports and memory already.
    """
    found: list[Problem] = []
    try:
        plan_now(settings, running=running)
    except ConfigError as error:
        found += error.problems
    found += _unusable_folder(settings)
    if weights:
        found += missing_weights(settings)
    if not running:
        found += _taken_ports(settings)
    return found


def missing_weights(settings: Settings) -> Iterator[Problem]:
    for model in settings.engines:
        folder = settings.folder(model)
        if (folder / "config.json").is_file() or (folder / "params.json").is_file():
            continue
        what = "no such folder" if not folder.exists() else "no config.json in it"
        yield Problem(settings.shown_file, f"models.{model.key}.path", f"{folder}: {what}; {_remedy(model, folder)}")


def _remedy(model: Model, folder: Path) -> str:
    """The command that fetches the weights."""
    if model.repo is None:
        return "put the weights there, or say in `repo` where they come from"
    revision = f" --revision {model.revision}" if model.revision else ""
    if model.source == "modelscope":
        get = f"{model.repo}{revision} --local_dir {shlex.quote(str(folder))}"
        return f"fetch them with: .venv/bin/pip install modelscope && .venv/bin/modelscope download --model {get}"
    return f"fetch them with: .venv/bin/hf download {model.repo}{revision} --local-dir {shlex.quote(str(folder))}"


def _taken_ports(settings: Settings) -> Iterator[Problem]:
    environment = settings.environment
    wanted = [(environment.router_host, settings.router.port, "router.port")]
    wanted += [(environment.engine_host, model.port, f"models.{model.key}.port") for model in settings.engines]
    for host, port, place in wanted:
        if taken := port_taken(host, port):
            holder = _holder(port)
            message = f"{taken}{f' by {holder}' if holder else ''}; free it or choose another"
            yield Problem(settings.shown_file, place, message)


def _holder(port: int) -> str | None:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        return None
    return None


def _unusable_folder(settings: Settings) -> Iterator[Problem]:
    socket = settings.run / "supervisor.sock"
    if len(str(socket).encode()) > LONGEST_SOCKET_PATH:
        message = f"too long a path for a Unix socket ({LONGEST_SOCKET_PATH} bytes); move the project to a shorter one"
        yield Problem(str(socket), "", message)
    if "%" in str(settings.home):
        message = "supervisord cannot run in a folder with % in its path; move the project to another"
        yield Problem(str(settings.home), "", message)
