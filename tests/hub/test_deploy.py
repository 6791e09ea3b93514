"""`./deploy.sh start` fetches what is missing."""

import os
import subprocess

from tests.conftest import CHECKOUT, FAKE_ENGINE, eventually, free_port, processes_with
from tests.hub.conftest import REPO, Setup, is_whole


def deploy(setup: Setup, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environ = {
        **os.environ,
        "VLLM_UNIFIED_HOME": str(setup.project.home),
        "VLLM_UNIFIED_ENGINE_PROGRAM": FAKE_ENGINE,
        "COLUMNS": "200",
    }
    return subprocess.run(
        [str(CHECKOUT / "deploy.sh"), *arguments],
        env=environ,
        cwd=setup.project.home.parent,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def test_start_fetches_what_is_missing(setup: Setup) -> None:
    router = {"port": free_port(), "health_check_interval": 0.2}
    chat = {
        "name": "c",
        "type": "chat",
        "repo": REPO,
        "source": "huggingface",
        "port": free_port(),
        "engine_args": {"kv-cache-memory-bytes": "1M"},
    }
    setup.project.write({"chat": chat}, router=router)
    offline = deploy(setup, "start", "--offline")
    assert offline.returncode == 1
    assert f"offline, so bring {REPO}: where there is a network, ./deploy.sh models download chat" in offline.stderr
    assert setup.hub.requests == []
    check = deploy(setup, "check")
    assert check.returncode == 1
    assert f"no such folder; fetch {REPO} with: ./deploy.sh models download chat" in check.stderr
    try:
        started = deploy(setup, "start")
        assert started.returncode == 0, started.stderr
        assert f"chat: {REPO} at " in started.stdout
        assert is_whole(setup)
        removed = deploy(setup, "models", "remove", "chat", "--force")
        assert "models.chat runs" in removed.stderr
        assert deploy(setup, "models", "verify").returncode == 0
    finally:
        deploy(setup, "stop")
        eventually(lambda: not processes_with("VLLM_UNIFIED_HOME", str(setup.project.home)))
    moved = setup.folder.rename(setup.project.home.parent / "stick")
    assert deploy(setup, "models", "import", moved.name).returncode == 0  # from where it is called
    assert is_whole(setup)
