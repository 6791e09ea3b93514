"""Whether this machine can run the deployment now. Nothing is changed by looking."""

from collections.abc import Collection, Iterator

import psutil

from vllm_unified.engines.keeper import port_taken
from vllm_unified.engines.placement import plan_now
from vllm_unified.errors import ConfigError, Problem
from vllm_unified.hub.manifest import State, how_to_get, look
from vllm_unified.settings import Model, Settings

# A Unix socket's address has 108 bytes, the last of them zero; supervisord adds its pid while it makes one.
LONGEST_SOCKET_PATH = 95


def problems_of_machine(settings: Settings, *, coming: Collection[Model], running: bool) -> list[Problem]:
    """Everything that would keep the models from starting: devices, folder, weights, ports, memory.

    `coming`: the models whose weights are about to be fetched or made. `running`: the deployment has its ports and
    memory already.
    """
    found: list[Problem] = []
    try:
        plan_now(settings, running=running)
    except ConfigError as error:
        found += error.problems
    found += _unusable_folder(settings)
    found += missing_weights(settings, coming)
    if not running:
        found += _taken_ports(settings)
    return found


def missing_weights(settings: Settings, coming: Collection[Model] = ()) -> Iterator[Problem]:
    for model in settings.engines:
        folder = settings.folder(model)
        found = look(folder, model)
        if model not in coming and found.state in (State.MISSING, State.INCOMPLETE):
            message = f"{folder}: {found.note}; {how_to_get(settings, model)}"
            yield Problem(settings.shown_file, f"models.{model.key}.path", message)


def to_be_fetched(settings: Settings) -> list[Model]:
    """The models that a start may fetch."""
    return [] if settings.environment.is_offline else [model for model in settings.engines if model.repo]


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
