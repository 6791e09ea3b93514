"""Whether this machine can run the deployment now. Nothing is changed by looking."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from vllm_unified.engines.keeper import port_taken
from vllm_unified.engines.placement import plan_now
from vllm_unified.errors import ConfigError, Problem, UserError
from vllm_unified.hub.manifest import State, how_to_get, look
from vllm_unified.settings import Model, Settings
from vllm_unified.settings.environment import variable_of
from vllm_unified.supervision.companions import GRAFANA, NGINX, supervised, wanted
from vllm_unified.supervision.nginx import nginx_files

# A Unix socket's address has 108 bytes, the last of them zero; supervisord adds its pid while it makes one.
LONGEST_SOCKET_PATH = 95
UNPRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def problems_of_machine(
    settings: Settings, *, coming: Collection[Model], running: Collection[str] | None
) -> list[Problem]:
    """Everything that would keep the models, or what runs beside them, from starting: devices, folder, weights, ports,
    memory, programs that are not installed.

    `coming`: the models whose weights are about to be fetched or made. `running`: the programs of the deployment, which
    have their ports and memory already; None where it does not run.
    """
    found: list[Problem] = []
    try:
        plan_now(settings, running=running is not None)
    except ConfigError as error:
        found += error.problems
    found += _unusable_folder(settings)
    found += missing_weights(settings, coming)
    found += _missing_programs(settings)
    ports = [*(_taken_ports(settings) if running is None else ()), *_taken_ports_of_companions(settings, running or ())]
    # Nginx tries its own as well.
    if {each.place for each in ports}.isdisjoint(map(variable_of, NGINX.ports)):
        found += _wrong_nginx(settings)
    return found + ports


def notes_of_machine(settings: Settings) -> Iterator[str]:
    """What is not as it was asked for, and keeps nothing from starting."""
    if not settings.in_containers and GRAFANA in wanted(settings) and GRAFANA not in supervised(settings):
        yield (
            "Grafana is not installed, and no distribution has it: Prometheus runs without it. "
            "https://grafana.com/grafana/download has packages"
        )


def _missing_programs(settings: Settings) -> Iterator[Problem]:
    """A package starts a service of its own, which takes the port."""
    if settings.in_containers:
        return
    here = supervised(settings)
    for each in wanted(settings):
        if each not in here and each is not GRAFANA:
            message = (
                f"{each.profile}: {each.name} is not installed; "
                f"apt install {each.name} && systemctl disable --now {each.name}, or leave the profile out"
            )
            yield Problem(".env", variable_of("profiles"), message)


def _wrong_nginx(settings: Settings) -> Iterator[Problem]:
    """Its template is the user's own, and so is the certificate; the real one is asked where supervisord runs it."""
    if NGINX in wanted(settings):
        try:
            nginx_files(settings)
        except UserError as error:
            yield Problem("", "", str(error))


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
    ports = [(environment.router_host, settings.router.port, "router.port")]
    ports += [(environment.engine_host, model.port, f"models.{model.key}.port") for model in settings.engines]
    for host, port, place in ports:
        if taken := port_taken(host, port):
            yield Problem(settings.shown_file, place, _of_port(port, taken))


def _taken_ports_of_companions(settings: Settings, running: Collection[str]) -> Iterator[Problem]:
    """Before a restart too, which may be the first with a profile."""
    for companion in supervised(settings):
        if companion.name in running:
            continue
        for host, port, field in companion.listens_on(settings):
            if taken := port_taken(host, port):
                yield Problem(".env", variable_of(field), _of_port(port, taken))


def _of_port(port: int, taken: str) -> str:
    if port < _first_open_port() and os.geteuid():
        return f"{taken}: it is for root alone; name one from {_first_open_port()} on, or run it as root"
    holder = _holder(port)
    return f"{taken}{f' by {holder}' if holder else ''}; free it or choose another"


def _first_open_port() -> int:
    return int(UNPRIVILEGED_PORTS.read_text()) if UNPRIVILEGED_PORTS.exists() else 1024


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
