"""The rendered file is read back by supervisord's own parser."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervisor.options import ServerOptions, UnhosedConfigParser

from tests.conftest import Project
from vllm_unified.supervision.conf import quoted, supervisord_conf

MODELS = {
    "chat": {"name": "c", "type": "chat"},
    "embedding": {"name": "e", "type": "embedding"},
    "off": {"name": "o", "type": "chat", "port": 9, "enabled": False},
    "remote": {"name": "r", "type": "chat", "endpoints": ["http://gpu-2:8000"]},
    "remote-off": {"name": "r", "type": "chat", "endpoints": ["http://gpu-2:8000"], "enabled": False},
}


def parsed(folder: Path, text: str) -> dict[str, Any]:
    """Program name → supervisord's own configuration of it, and "" → that of supervisord."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    path = folder / "supervisord.conf"
    path.write_text(text)
    options = ServerOptions()
    options.realize(["-c", str(path)], doc="")
    programs = {each.name: each for group in options.process_group_configs for each in group.process_configs}
    return {"": options, **programs}


@pytest.mark.parametrize("name", ["plain", "a ;b #c", 'it\'s "odd"'])
def test_what_supervisord_reads(tmp_path: Path, name: str) -> None:
    home = tmp_path / name
    (home / "config").mkdir(parents=True)
    project = Project(home)
    project.write(MODELS, system={"drain_timeout": 40})
    read = parsed(home / "run", supervisord_conf(project.load()))
    assert set(read) == {"", "router", "chat", "embedding", "off"}
    assert {name: each.autostart for name, each in read.items() if name} == {
        "router": True,
        "chat": True,
        "embedding": True,
        "off": False,
    }
    cli = [sys.executable, "-m", "vllm_unified", "--config", str(project.file)]
    assert shlex.split(read["chat"].command) == [*cli, "engine", "chat"]
    assert shlex.split(read["router"].command) == [*cli, "router"]
    assert read["router"].priority < read["chat"].priority
    assert read["chat"].stopwaitsecs > 40
    assert read["chat"].autorestart is not False
    assert not read["chat"].stopasgroup
    assert read["chat"].killasgroup
    assert read["chat"].stdout_logfile == str(home / "run" / "logs" / "chat.keeper.log")
    assert read[""].configroot.supervisord.pidfile == str(home / "run" / "supervisord.pid")
    (server,) = read[""].configroot.supervisord.server_configs
    assert (server["file"], server["chmod"]) == (str(home / "run" / "supervisor.sock"), 0o700)


def test_where_nothing_is_served_here_the_router_is_alone(project: Project) -> None:
    project.write({"remote": MODELS["remote"]})
    assert set(parsed(project.home / "run", supervisord_conf(project.load()))) == {"", "router"}


@given(st.lists(st.text(st.characters(blacklist_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1), min_size=1))
def test_any_command_comes_back_word_for_word(command: list[str]) -> None:
    parser = UnhosedConfigParser()
    parser.read_string(f"[program:x]\ncommand={quoted(command)}\n")
    assert shlex.split(parser.saneget("program:x", "command", expansions={})) == command
