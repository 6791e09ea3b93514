"""Every variation is read by the real Nginx; what stands in it is told apart by what is configured."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Project, free_port, openssl
from tests.nginx.conftest import NGINX, write_nginx
from vllm_unified.errors import UserError
from vllm_unified.supervision.nginx import nginx_files

CHAT = {"chat": {"name": "chat", "type": "chat"}}
READER = {"reader": {"name": "reader", "type": "ocr"}}
DOCKER = {"VLLM_UNIFIED_RUNTIME": "docker"}


def rendered(project: Project, **variables: str) -> str:
    """The text of nginx.conf, which Nginx has found to be right; it tries the ports too."""
    if not project.file.exists():
        project.write(CHAT)
    ports = {name: str(free_port()) for name in ("VLLM_NGINX_PORT", "VLLM_NGINX_TLS_PORT")}
    conf = write_nginx(project, **ports, **variables)
    said = subprocess.run([NGINX, "-e", "stderr", "-t", "-c", conf], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "[warn]" not in said.stderr
    return conf.read_text()


def values(text: str, directive: str) -> list[str]:
    return re.findall(rf"^ *{directive} ([^;{{\n]+);", text, re.MULTILINE)


def with_tls(project: Project, certificates: Path) -> None:
    folder = project.home / "config" / "tls"
    folder.mkdir()
    shutil.copy(certificates / "server.pem", folder / "cert.pem")
    shutil.copy(certificates / "server.key", folder / "key.pem")


@pytest.mark.parametrize("variables", [{}, DOCKER])
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("section", [{}, {"requests_per_second": 0}, {"hsts_max_age": 3600, "burst": 0}])
def test_nginx_takes_every_variation(
    project: Project, certificates: Path, variables: dict[str, str], tls: bool, section: dict[str, Any]
) -> None:
    project.write(CHAT, nginx=section)
    if tls:
        with_tls(project, certificates)
    text = rendered(project, **variables)
    assert len(values(text, "listen")) == 1 + tls
    assert bool(values(text, "limit_req")) == section.get("requests_per_second", True)
    assert ("max-age=3600" in text) == (tls and "hsts_max_age" in section)


@pytest.mark.parametrize("name", ["plain", "a ;b #c", 'it\'s {"odd"}\\', "在此"])
def test_nginx_takes_any_folder(tmp_path: Path, certificates: Path, name: str) -> None:
    (tmp_path / name / "config").mkdir(parents=True)
    project = Project(tmp_path / name)
    with_tls(project, certificates)
    rendered(project)
    assert (project.home / "run" / "nginx").is_dir()  # made by it, for files that nobody writes


@pytest.mark.parametrize(
    ("variables", "listen", "router"),
    [
        ({}, "127.0.0.1:80", "127.0.0.1:8000"),
        ({"VLLM_NGINX_HOST": "0.0.0.0", "VLLM_NGINX_PORT": "8080"}, "0.0.0.0:8080", "127.0.0.1:8000"),
        ({"VLLM_NGINX_HOST": "::1", "VLLM_ROUTER_HOST": "::"}, "[::1]:80", "[::1]:8000"),
        ({"VLLM_ROUTER_HOST": "0.0.0.0", "VLLM_ROUTER_PORT": "9000"}, "127.0.0.1:80", "127.0.0.1:9000"),
        ({**DOCKER, "VLLM_NGINX_PORT": "8080", "VLLM_ROUTER_PORT": "9000"}, "8080", "vllm-unified:9000"),
    ],
)
def test_addresses(project: Project, variables: dict[str, str], listen: str, router: str) -> None:
    project.write(CHAT)
    text = write_nginx(project, **variables).read_text()
    assert values(text, "listen") == [f"{listen} so_keepalive=60s:15s:4"]
    assert values(text, "set [$]router" if "VLLM_UNIFIED_RUNTIME" in variables else "server") == [router]


def test_in_a_container_of_its_own(project: Project) -> None:
    """Workers are those of the image, nothing is written below run/, and the router's name is looked up anew."""
    text = rendered(project, **DOCKER)
    assert values(text, "user") == []
    assert values(text, "pid") == ['"/tmp/nginx.pid"']
    assert set(values(text, r"\w+_temp_path")) == {'"/tmp/nginx"'}
    assert values(text, "resolver") == ["127.0.0.11 valid=2s ipv6=off"]
    native = rendered(project)
    assert values(native, "user") == ([] if os.geteuid() else ["root"])
    assert values(native, "resolver") == []


@pytest.mark.parametrize(
    ("models", "sections", "size"),
    [
        (CHAT, {}, "48m"),
        (CHAT, {"documents": {"max_upload_mib": 600}}, "48m"),  # which nobody reads
        (READER, {}, "528m"),
        (READER, {"documents": {"max_upload_mib": 7}, "router": {"max_body_mib": 100}}, "116m"),
    ],
)
def test_uploads_are_taken_as_the_router_takes_them(
    project: Project, models: dict[str, Any], sections: dict[str, Any], size: str
) -> None:
    project.write(models, **sections)
    assert values(rendered(project), "client_max_body_size") == [size]


def test_long_generations_have_their_time(project: Project) -> None:
    text = rendered(project)
    assert values(text, "proxy_read_timeout") == ["1d"]
    assert values(text, "proxy_buffering") == values(text, "proxy_request_buffering") == ["off"]
    assert "event-stream" not in values(text, "gzip_types")[0]


def test_a_certificate_with_the_key_of_another(project: Project, certificates: Path) -> None:
    with_tls(project, certificates)
    shutil.copy(certificates / "ca.key", project.home / "config" / "tls" / "key.pem")
    assert refused(project) == (
        f"{project.home}/config/tls: cert.pem and key.pem do not work together: KEY_VALUES_MISMATCH"
    )


def test_a_key_with_a_password(project: Project, certificates: Path) -> None:
    with_tls(project, certificates)
    key = project.home / "config" / "tls" / "key.pem"
    source = certificates / "server.key"
    openssl(project.home, "pkey", "-in", str(source), "-aes128", "-passout", "pass:secret", "-out", str(key))
    assert refused(project).endswith("key.pem has a password, which nobody is there to type in")


@pytest.mark.parametrize(("left", "missing"), [("cert.pem", "key.pem"), ("key.pem", "cert.pem")])
def test_half_of_a_certificate(project: Project, certificates: Path, left: str, missing: str) -> None:
    with_tls(project, certificates)
    (project.home / "config" / "tls" / missing).unlink()
    assert refused(project) == (
        f"{project.home}/config/tls/{missing}: missing beside {left}; put it there, or remove {left} for plain HTTP"
    )


def test_a_certificate_where_root_alone_may_look(project: Project, certificates: Path) -> None:
    project.write(CHAT)
    write_nginx(project)
    with_tls(project, certificates)
    folder = project.home / "config" / "tls"
    folder.chmod(0)
    program = f"""
from pathlib import Path
from vllm_unified.settings import load
from vllm_unified.supervision.nginx import nginx_files
settings = load(Path({str(project.file)!r}), Path({str(project.home)!r}), {{}})
print(settings.nginx_url, "ssl_certificate " in nginx_files(settings)[Path("nginx.conf")])
"""
    closed_to_root = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    try:
        said = subprocess.run([*closed_to_root, sys.executable, "-c", program], capture_output=True, text=True)
    finally:
        folder.chmod(0o700)
    assert said.stdout == "https://127.0.0.1:443 True\n", said.stderr


def test_a_folder_that_nginx_has_no_word_for(tmp_path: Path) -> None:
    (tmp_path / "a$b" / "config").mkdir(parents=True)
    project = Project(tmp_path / "a$b")
    assert refused(project) == f"{project.home}/run/nginx.pid: Nginx takes no path with a $ in it; rename the folder"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("one\n{% if %}", "nginx.conf:2: Expected an expression, got 'end of statement block'"),
        ("{{ nginx.rate }}", "has no attribute 'rate'"),
        ("{{ router_port }}", "nginx.conf: 'router_port' is undefined"),
    ],
)
def test_a_template_that_was_edited_wrongly(project: Project, template: str, message: str) -> None:
    (project.home / "config" / "nginx.conf").write_text(template)
    assert refused(project).endswith(message)


def test_without_the_template(project: Project) -> None:
    project.write(CHAT)
    with pytest.raises(UserError, match=r"config/nginx\.conf: No such file or directory; the release has one"):
        nginx_files(project.load())


def refused(project: Project, **variables: str) -> str:
    project.write(CHAT)
    with pytest.raises(UserError) as error:
        write_nginx(project, **variables)
    return str(error.value)
