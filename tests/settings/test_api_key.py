from tests.conftest import Project
from vllm_unified.settings.environment import ensure_api_key


def test_made_once_random_and_private(project: Project) -> None:
    path = project.home / ".env"
    path.write_text("HF_TOKEN=x\nVLLM_API_KEY=\n")
    path.chmod(0o644)
    project.write({"chat": {"name": "a", "type": "chat"}})
    assert ensure_api_key(project.home, {})
    first = project.load().environment.api_key
    assert first is not None
    assert len(first) > 30
    assert path.stat().st_mode & 0o777 == 0o600
    assert project.load().environment.hf_token == "x"
    assert not ensure_api_key(project.home, {})
    assert project.load().environment.api_key == first

    path.unlink()
    assert ensure_api_key(project.home, {})
    assert project.load().environment.api_key not in (None, first)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_given_key_is_kept(project: Project) -> None:
    assert not ensure_api_key(project.home, {"VLLM_API_KEY": "given"})
    assert not (project.home / ".env").exists()
