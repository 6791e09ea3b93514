"""nginx, Prometheus and Grafana: what is rendered for them, how they start, and what is said where they can not."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import API_KEY, CHECKOUT, Project, eventually, free_port, listening
from tests.supervision.test_conf import parsed
from vllm_unified import machine
from vllm_unified.console import welcome_text
from vllm_unified.engines.keeper import port_taken
from vllm_unified.errors import UserError
from vllm_unified.settings import Settings
from vllm_unified.supervision import companions
from vllm_unified.supervision.conf import supervisord_conf
from vllm_unified.supervision.rendered import rendered_files, write_rendered

BOTH = {"COMPOSE_PROFILES": "nginx,monitoring"}
REMOTE = {"remote": {"name": "r", "type": "chat", "endpoints": ["http://gpu-2:8000"]}}


def loaded(project: Project, **environ: str) -> Settings:
    for name in ("nginx.conf", "maintenance.html"):
        shutil.copy(CHECKOUT / "config" / name, project.home / "config")
    project.write(REMOTE)
    return project.load({"VLLM_API_KEY": API_KEY, "VLLM_NGINX_PORT": str(free_port()), **environ})


def write(settings: Settings) -> None:
    write_rendered(settings, rendered_files(settings))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, and there are no others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(companions, "SERVER_FOLDERS", ())
    return folder


def install(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)


def test_programs_of_supervisord(project: Project, installed: Path) -> None:
    install(installed, "nginx", "prometheus", "grafana-server")
    settings = loaded(project, **BOTH)
    read = parsed(settings.run, supervisord_conf(settings))
    assert {"nginx", "prometheus", "grafana"} < set(read)
    assert read["nginx"].priority < read["router"].priority < read["prometheus"].priority
    assert set(parsed(settings.run, supervisord_conf(loaded(project)))) == {"", "router"}


# Starts what it is told, and waits until it is killed.
PARENT = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"


@pytest.mark.parametrize(("name", "variable"), [("nginx", "VLLM_NGINX_PORT"), ("prometheus", "VLLM_PROMETHEUS_PORT")])
def test_none_of_them_outlives_supervisord(project: Project, name: str, variable: str) -> None:
    """The real ones, with all their processes: none holds the port."""
    port = free_port()
    settings = loaded(project, **BOTH, **{variable: str(port)})
    write(settings)
    read = parsed(settings.run, supervisord_conf(settings))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *shlex.split(read[name].command)])
    try:
        eventually(lambda: port_taken("127.0.0.1", port))
    finally:
        parent.kill()
        parent.wait()
    eventually(lambda: not port_taken("127.0.0.1", port))


def test_what_is_not_installed_is_said_before_anything_starts(project: Project, installed: Path) -> None:
    settings = loaded(project, **BOTH)
    problems = [str(each) for each in machine.problems_of_machine(settings, coming=(), running=None)]
    for name in ("nginx", "prometheus"):
        assert [each for each in problems if f"{name} is not installed; apt install {name}" in each]
    assert "grafana" not in "".join(problems)
    (note,) = machine.notes_of_machine(settings)
    assert note.startswith("Grafana is not installed")
    install(installed, "nginx", "prometheus", "grafana")
    assert machine.problems_of_machine(settings, coming=(), running=()) == []
    assert list(machine.notes_of_machine(settings)) == []


def test_in_a_container_nothing_is_missing(project: Project, installed: Path) -> None:
    settings = loaded(project, VLLM_UNIFIED_RUNTIME="docker", **BOTH)
    assert machine.problems_of_machine(settings, coming=(), running=()) == []
    assert set(parsed(settings.run, supervisord_conf(settings))) == {"", "router"}


def test_ports_of_their_own(project: Project, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(installed, "prometheus")
    port = free_port()
    settings = loaded(project, COMPOSE_PROFILES="monitoring", VLLM_PROMETHEUS_PORT=str(port))
    with listening(port):
        (problem,) = machine.problems_of_machine(settings, coming=(), running=None)
        (same,) = machine.problems_of_machine(
            settings, coming=(), running=["router"]
        )  # before a restart, which stops it
        assert machine.problems_of_machine(settings, coming=(), running=["router", "prometheus"]) == []
    assert str(problem) == str(same)
    assert str(problem).startswith(f".env: VLLM_PROMETHEUS_PORT: port {port} on 127.0.0.1: address already in use")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    said = machine._of_port(80, "port 80 on 127.0.0.1: permission denied")
    assert said.endswith("it is for root alone; name one from 1024 on, or run it as root")


@pytest.mark.parametrize(
    ("environ", "folder", "secret"), [(BOTH, 0o700, 0o600), ({"VLLM_UNIFIED_RUNTIME": "docker"}, 0o2755, 0o640)]
)
def test_what_is_rendered(project: Project, environ: dict[str, str], folder: int, secret: int) -> None:
    """In Docker whatever the profiles are: Compose may be asked for one by --profile."""
    settings = loaded(project, **environ)
    write(settings)
    modes = {path.relative_to(settings.rendered).as_posix(): path for path in settings.rendered.rglob("*")}
    assert {name for name, path in modes.items() if path.stat().st_mode & 0o7777 == secret} == {
        "grafana/password",
        "prometheus/key",
    }
    for name, path in modes.items():
        assert path.stat().st_mode & 0o022 == 0, name
        assert path.is_file() or path.stat().st_mode & 0o7777 == folder, name
    assert {"nginx/nginx.conf", "prometheus/prometheus.yml", "prometheus/rules/alerts.yml"} < set(modes)
    router = "vllm-unified:8000" if settings.in_containers else "127.0.0.1:8000"
    for name in ("nginx/nginx.conf", "prometheus/prometheus.yml"):
        assert router in modes[name].read_text()


def test_what_is_no_longer_wanted_goes(project: Project) -> None:
    write(loaded(project, **BOTH))
    settings = loaded(project, COMPOSE_PROFILES="monitoring")
    (settings.rendered / "prometheus/rules/older.yml").write_text("groups: []")
    write(settings)
    left = {path.relative_to(settings.rendered).as_posix() for path in settings.rendered.rglob("*") if path.is_file()}
    assert "prometheus/rules/alerts.yml" in left
    assert not {name for name in left if name.startswith("nginx/") or "older" in name}


def test_a_template_that_is_wrong_stops_those_alone_who_want_nginx(project: Project) -> None:
    def broken(**environ: str) -> Settings:
        settings = loaded(project, **environ)
        (project.home / "config/nginx.conf").write_text("{{ nothing }}")
        return settings

    write(broken(VLLM_UNIFIED_RUNTIME="docker"))
    with pytest.raises(UserError, match=r"nginx\.conf"):
        write(broken(COMPOSE_PROFILES="nginx"))
    problems = machine.problems_of_machine(broken(COMPOSE_PROFILES="nginx"), coming=(), running=())
    assert [each for each in problems if "nothing" in str(each)]


def test_what_nginx_itself_refuses(project: Project) -> None:
    """The real one, before anything starts; what it took before stays."""
    settings = loaded(project, COMPOSE_PROFILES="nginx")
    write(settings)
    conf = settings.rendered / "nginx/nginx.conf"
    good = conf.read_text()
    template = project.home / "config/nginx.conf"
    template.write_text(template.read_text().replace("gzip on;", "gzip onn;"))
    reason = 'invalid value "onn" in "gzip" directive, it must be "on" or "off", at: gzip onn;'
    said = f"{template}: nginx refuses it: {reason}"
    with pytest.raises(UserError) as error:
        write(settings)
    assert (str(error.value), conf.read_text()) == (said, good)
    assert [str(each) for each in machine.problems_of_machine(settings, coming=(), running=None)] == [said]
    assert not (settings.run / "nginx").exists()


def test_a_port_that_nginx_can_not_have_is_said_once(project: Project) -> None:
    settings = loaded(project, COMPOSE_PROFILES="nginx", VLLM_NGINX_HOST="192.0.2.1")
    (problem,) = machine.problems_of_machine(settings, coming=(), running=None)
    assert str(problem).startswith(".env: VLLM_NGINX_PORT: ")


def test_grafanas_password_is_made_once_and_said_once(project: Project, installed: Path) -> None:
    install(installed, "nginx", "prometheus", "grafana")
    settings = loaded(project, **BOTH)
    write(settings)
    password = (settings.rendered / "grafana/password").read_text()
    assert len(password) >= 20
    kept = settings.home / "data/grafana.password"
    assert kept.read_text() == password
    first, second = welcome_text(settings), welcome_text(settings)
    assert f"user admin, password {password}   (this once; in {kept})" in first
    assert (password in second, f"user admin, password (in {kept})" in second) == (False, True)
    shutil.rmtree(settings.run)
    write(settings)
    assert (settings.rendered / "grafana/password").read_text() == kept.read_text() == password
    assert kept.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("given", ["", " nginx , monitoring,", "monitoring"])
def test_profiles_are_written_as_compose_takes_them(project: Project, given: str) -> None:
    wanted = [name.strip() for name in given.split(",") if name.strip()]
    assert list(loaded(project, COMPOSE_PROFILES=given).environment.profiles) == wanted


def variables_of(command: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in command if word.startswith("GF_"))


def test_compose_starts_them_as_supervisord_does(project: Project) -> None:
    """But for folders, and addresses, which there are those of the containers."""
    services = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    grafana = variables_of(companions.grafana_command(loaded(project), "grafana"))
    of_the_place = {name for name in grafana if name.startswith(("GF_SERVER", "GF_PATHS", "GF_LOG"))}
    ours = {name: value for name, value in grafana.items() if name not in of_the_place}
    theirs = services["grafana"]["environment"]
    assert ours.pop("GF_SECURITY_ADMIN_PASSWORD").endswith("/run/rendered/grafana/password}")
    assert theirs.pop("GF_SECURITY_ADMIN_PASSWORD__FILE") == "/app/run/rendered/grafana/password"
    assert {name: value for name, value in theirs.items() if name.startswith("GF_")} == ours
    (command,) = services["prometheus"]["command"]
    assert all(option in command.split() for option in companions.PROMETHEUS_OPTIONS)
