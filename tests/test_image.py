"""What the image's files say is compared with what they have to agree with. Built and run it is in tests/containers."""

import re
import signal
import subprocess
import tomllib

import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import CHECKOUT, Project, eventually
from vllm_unified.engines.keeper import LEAVING_SECONDS, SETTLING_SECONDS
from vllm_unified.settings import Settings
from vllm_unified.settings.schema import DEFAULT_PORTS, RouterSettings
from vllm_unified.supervision.companions import BY_NAME
from vllm_unified.supervision.conf import supervisord_conf

COMPOSE = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICE = COMPOSE["services"]["vllm-unified"]
DOCKERFILE = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8")


def test_the_base_image_is_that_of_the_versions() -> None:
    command = ["bash", "-c", 'source scripts/versions.env && echo "$GPU_IMAGE"']
    wanted = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()
    assert re.findall("^ARG BASE_IMAGE=(.+)$", DOCKERFILE, re.MULTILINE) == [wanted]


def test_the_images_of_others_are_those_of_the_versions() -> None:
    names = ("NGINX_IMAGE", "PROMETHEUS_IMAGE", "GRAFANA_IMAGE")
    command = ["bash", "-c", f"source scripts/versions.env && echo {' '.join(f'${name}' for name in names)}"]
    wanted = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.split()
    found = [COMPOSE["services"][name]["image"] for name in ("nginx", "prometheus", "grafana")]
    assert found == [f"${{{name}:-{image}}}" for name, image in zip(names, wanted, strict=True)]


def test_every_dependency_has_a_version_that_fits() -> None:
    lock = (CHECKOUT / "requirements.lock").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([\w-]+)==(\S+)", lock, re.MULTILINE))
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_the_ports_are_published(project: Project) -> None:
    published = [re.findall(r":-(\d+)\}", port) for port in SERVICE["ports"]]
    wanted = [RouterSettings().port, *DEFAULT_PORTS.values()]
    assert published == [[str(port), str(port)] for port in wanted]
    assert all(port.startswith("${VLLM_") and ":-127.0.0.1}:" in port for port in SERVICE["ports"])


def test_what_runs_beside_it_is_closed_too(project: Project) -> None:
    beside = {name: each for name, each in COMPOSE["services"].items() if "profiles" in each}
    assert set(beside) == set(BY_NAME)
    for name, service in beside.items():
        assert service["profiles"] == [BY_NAME[name].profile]
        assert (service["pull_policy"], service["cap_drop"]) == ("never", ["ALL"])
        assert (service["read_only"], service["security_opt"]) == (True, ["no-new-privileges:true"])
        assert service["healthcheck"]["test"]
        assert "vllm_rendered:/app/run/rendered:ro" in service["volumes"]
        assert all(re.match(r"\$\{VLLM_(NGINX|MONITORING)_HOST:-127\.0\.0\.1\}:", port) for port in service["ports"])
    environment = project_with_nothing(project).environment
    defaults = {field: str(getattr(environment, field)) for each in BY_NAME.values() for field in each.ports}
    published = re.findall(r"VLLM_(\w+):-(\d+)\}:", " ".join(" ".join(each["ports"]) for each in beside.values()))
    assert {name.lower(): port for name, port in published} == defaults


@pytest.mark.parametrize("name", BY_NAME)
def test_what_waits_for_ours_can_be_stopped(name: str) -> None:
    (command,) = COMPOSE["services"][name]["command"]
    assert command.startswith("trap 'exit 0' TERM QUIT INT; until [ -s /app/run/rendered/")
    number = getattr(signal, COMPOSE["services"][name].get("stop_signal", "SIGTERM"))
    # A shell can't trap what is ignored when it begins, as SIGQUIT is in background jobs. In a container nothing is.
    waiting = subprocess.Popen(
        ["/bin/sh", "-c", command.replace("/app/", "/nowhere/")],
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    try:
        # Of its first moment, in which it has no trap, nothing is known.
        eventually(lambda: psutil.Process(waiting.pid).children() != [])
        waiting.send_signal(number)
        assert waiting.wait(timeout=30) == 0
    finally:
        waiting.kill()


def test_the_oldest_docker_takes_it() -> None:
    """`start_interval` wants Docker 25."""
    assert [name for name, each in COMPOSE["services"].items() if "start_interval" in each.get("healthcheck", {})] == []


def project_with_nothing(project: Project) -> Settings:
    project.write({"chat": {"name": "m", "type": "chat"}})
    return project.load()


def test_all_programs_may_take_the_time_that_they_are_given(project: Project) -> None:
    """supervisord ends the engines, then the documents, then the router."""
    project.write({"read": {"name": "m", "type": "ocr"}})
    waits = [
        int(seconds) for seconds in re.findall(r"^stopwaitsecs=(\d+)$", supervisord_conf(project.load()), re.MULTILINE)
    ]
    assert len(waits) == 3
    assert sum(waits) > 2 * (30 + LEAVING_SECONDS + SETTLING_SECONDS)
    assert int(SERVICE["stop_grace_period"].removesuffix("m")) * 60 > sum(waits)


def test_all_that_is_made_carries_our_label() -> None:
    made = [*COMPOSE["services"].values(), *COMPOSE["volumes"].values(), *COMPOSE["networks"].values()]
    assert all("vllm-unified" in each["labels"] for each in made)
    assert 'LABEL vllm-unified="$VERSION"' in DOCKERFILE
