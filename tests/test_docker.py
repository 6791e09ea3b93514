"""scripts/docker.sh, with a stand-in for Docker. With Docker itself it is in tests/containers."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

Shell = Callable[[str], "subprocess.CompletedProcess[str]"]
DOCKER = """#!/bin/sh
case "$*" in
  *'{{.Status}}') cat <<'END' ;;
vllm-unified running Up 2 hours (healthy)
nginx running Up 2 seconds (health: starting)
prometheus exited Exited (0) 3 minutes ago
grafana running Up 3 hours (unhealthy)
END
  *'{{.State}}') printf '%s\\n' 'nginx 1a running' 'prometheus 2b exited' ;;
  ps*) printf '%s\\n' 'vllm-unified 0f' 'nginx 1a' ;;
  *) echo "$@" ;;
esac
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Of a command, with the functions of scripts/docker.sh."""
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)

    def run(command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"source scripts/lib.sh; source scripts/docker.sh; {command}"],
            cwd=CHECKOUT,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )

    return run


def test_states_of_companions(shell: Shell) -> None:
    said = shell("companion_states").stdout
    assert said.splitlines() == ["nginx=starting", "prometheus=exited", "grafana=unhealthy"]


def test_who_takes_up_what_changed(shell: Shell) -> None:
    done = shell("for name in nginx prometheus grafana; do reload_container $name; done")
    assert done.stdout == "exec 1a sh -c kill -HUP 1\n"
    assert done.stderr == "prometheus does not run (exited), and takes up what has changed when it starts\n"


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ("", "--tail 50"),
        ("--lines 5", "--tail 5"),
        ("--since 2h", "--since 2h"),
        ("--since 3d --follow", "--follow --since 72h"),
        ("--since 2h --lines 5", "--tail 5 --since 2h"),
        ("--lines 5 --since 2h", "--tail 5 --since 2h"),
    ],
)
def test_logs_of_a_companion(shell: Shell, options: str, asked: str) -> None:
    assert shell(f"logs_of_companion nginx {options}").stdout == f"logs {asked} 1a\n"
