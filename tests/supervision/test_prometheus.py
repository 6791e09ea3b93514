"""What is rendered for Prometheus, as its own tool judges it."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import API_KEY, CHECKOUT, Project
from vllm_unified.errors import UserError
from vllm_unified.settings.keys import metrics_key
from vllm_unified.supervision.prometheus import prometheus_files

ENVIRON = {"VLLM_API_KEY": API_KEY}


def rendered(project: Project, router: str | None = None, **environ: str) -> dict[str, str]:
    project.write({"chat": {"name": "Qwen", "type": "chat"}})
    files = prometheus_files(project.load({**ENVIRON, **environ}), router)
    return {str(path): text for path, text in files.items()}


def job(files: dict[str, str]) -> Any:
    (found,) = yaml.safe_load(files["prometheus.yml"])["scrape_configs"]
    return found


@pytest.mark.parametrize(
    ("router", "environ", "url"),
    [
        (None, {}, "http://127.0.0.1:8000/sd"),
        (None, {"VLLM_ROUTER_HOST": "0.0.0.0", "VLLM_ROUTER_PORT": "9000"}, "http://127.0.0.1:9000/sd"),
        (None, {"VLLM_ROUTER_HOST": "::1"}, "http://[::1]:8000/sd"),
        ("vllm-unified:8000", {}, "http://vllm-unified:8000/sd"),
    ],
)
def test_where_the_router_is(project: Project, router: str | None, environ: dict[str, str], url: str) -> None:
    (discovery,) = job(rendered(project, router, **environ))["http_sd_configs"]
    assert discovery["url"] == url


def test_the_key_stands_in_a_file_of_its_own(project: Project) -> None:
    files = rendered(project)
    assert files["key"] == metrics_key(API_KEY)
    assert [path for path, text in files.items() if files["key"] in text] == ["key"]
    assert not any(API_KEY in text for text in files.values())
    found = job(files)
    assert {each["authorization"]["credentials_file"] for each in (found, *found["http_sd_configs"])} == {"key"}


def test_all_rules_come_along(project: Project) -> None:
    files = rendered(project)
    for path in (CHECKOUT / "monitoring" / "rules").glob("*.yml"):
        assert files.pop(f"rules/{path.name}") == path.read_text(encoding="utf-8")
    assert set(files) == {"prometheus.yml", "key"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
def test_prometheus_takes_it(project: Project, tmp_path: Path) -> None:
    for path, text in rendered(project).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    done = subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rule files found" in done.stdout


def test_rules_of_the_projects_own_folder_go_first(project: Project) -> None:
    shutil.copytree(CHECKOUT / "monitoring", project.home / "monitoring")
    (project.home / "monitoring" / "rules" / "own.yml").write_text("groups: []\n")
    assert "rules/own.yml" in rendered(project)


def test_without_a_key_there_is_nothing_to_render(project: Project) -> None:
    project.write({"chat": {"name": "Qwen", "type": "chat"}})
    with pytest.raises(UserError, match="VLLM_API_KEY is not set"):
        prometheus_files(project.load())
