"""The command behind build_offline_package.sh: what goes in, what never does, and what is refused."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT, Project
from vllm_unified.bundle.contents import read_sums
from vllm_unified.hub.manifest import File, Manifest

CHAT = {"name": "c", "type": "chat"}
SECRET = "sk-of-this-machine"


@pytest.fixture
def home(project: Project) -> Project:
    """With a model and another that is not enabled, a key, and what a broken-off download leaves."""
    project.write({"chat": CHAT, "rank": {"name": "r", "type": "rerank", "enabled": False}})
    for key in ("chat", "rank"):
        project.model_folder(key)
    (project.home / "models/chat/model.safetensors").write_bytes(bytes(1000))
    (project.home / "models/chat/other.safetensors.part").write_bytes(bytes(10))
    (project.home / ".env").write_text(f"VLLM_API_KEY={SECRET}\n")
    for name in ("keys.yaml", "keys.yaml~", ".keys.yaml.swp", "keys.yaml.bak", ".env.local"):
        (project.home / "config" / name).write_text(f"keys: [{{name: a, sha256: {SECRET}}}]\n")
    (project.home / "config/tls").mkdir()
    (project.home / "config/tls/key.pem").write_text(SECRET)
    return project


def bundle(home: Project, *options: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "vllm_unified", "bundle", "--devices", "cpu", "--output", str(home.home / "dist")]
    given = {**os.environ, "VLLM_UNIFIED_HOME": str(home.home), **environ}
    return subprocess.run([*command, *options], cwd=CHECKOUT, env=given, capture_output=True, text=True, timeout=120)


def made(home: Project, *options: str) -> dict[str, bytes]:
    """The content of each file in it."""
    done = bundle(home, *options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    tar = home.home / "dist" / f"knowflow-offline-{options[options.index('--version') + 1]}.tar"
    with tarfile.open(tar) as opened:
        members = {each.name.removeprefix("knowflow-offline/"): each for each in opened if each.isfile()}
        return {name: opened.extractfile(each).read() for name, each in members.items()}  # type: ignore[union-attr]


def test_what_is_in_it(home: Project) -> None:
    files = made(home, "--version", "v1")
    sums = read_sums(home.home / "dist/knowflow-offline-v1.SHA256SUMS")
    assert set(files) == {*sums, "SHA256SUMS"}
    assert {"install.sh", "verify.sh", "README.zh.md", "scripts/load_images.sh", "scripts/deploy.sh"} <= set(files)
    assert {name for name in files if name.startswith("models/")} == {
        "models/chat/config.json",
        "models/chat/model.safetensors",
    }
    assert files["release/config/models.json"] == home.file.read_bytes(), "of this deployment"
    assert b"BUNDLE_VERSION=v1\n" in files["bundle.env"]
    carried = b"".join(files.values())
    assert SECRET.encode() not in carried
    assert not {name for name in files if name.endswith(("/.env", "keys.yaml", ".part"))}


def test_models_can_be_chosen(home: Project) -> None:
    files = made(home, "--version", "v1", "--models", "rank, chat ,rank")
    assert {name.split("/")[1] for name in files if name.startswith("models/")} == {"chat", "rank"}
    assert not any(name.startswith("models/") for name in made(home, "--version", "v2", "--skip-models"))


def test_an_increment_has_what_is_new(home: Project) -> None:
    first = made(home, "--version", "v1")
    (home.home / "models/chat/config.json").write_text('{"a": 1}')
    since = str(home.home / "dist/knowflow-offline-v1.SHA256SUMS")
    second = made(home, "--version", "v2", "--since", since)
    weights = "models/chat/model.safetensors"
    assert {name for name in first if name not in second} == {weights}
    assert second["models/chat/config.json"] == b'{"a": 1}'
    assert second["SINCE"].decode().split() == [read_sums(Path(since))[weights], weights]
    whole = read_sums(home.home / "dist/knowflow-offline-v2.SHA256SUMS")
    assert weights in whole, "the next increment may build on this one"


def test_parts_have_checksums_that_sha256sum_reads(home: Project) -> None:
    (home.home / "models/chat/model.safetensors").write_bytes(bytes(2_000_000))
    done = bundle(home, "--version", "v1", "--split", "1M")
    assert done.returncode == 0
    assert "cat knowflow-offline-v1.tar.* | tar x" in done.stdout
    parts = sorted(path.name for path in (home.home / "dist").glob("*.tar.*"))
    assert len(parts) > 2
    assert parts == [f"knowflow-offline-v1.tar.{number:03}" for number in range(1, len(parts) + 1)]
    check = ["sha256sum", "--check", "--strict", "knowflow-offline-v1.sha256"]
    checked = subprocess.run(check, cwd=home.home / "dist", capture_output=True, text=True).stdout
    assert checked.count(": OK") == len(parts)


def test_what_is_made_stays(home: Project) -> None:
    made(home, "--version", "v1")
    again = bundle(home, "--version", "v1")
    assert (again.returncode, "the bundle is made already" in again.stderr) == (1, True)
    assert (home.home / "dist/knowflow-offline-v1.tar").exists()


def test_too_many_parts(home: Project) -> None:
    os.truncate(home.home / "models/chat/model.safetensors", 1_000_000_001)
    done = bundle(home, "--split", "1M")
    assert (done.returncode, "more than 999 parts" in done.stderr) == (1, True)


def test_damaged_weights_are_not_carried(home: Project) -> None:
    folder = home.home / "models/chat"
    files = (File("config.json", 2, sha256="0" * 64),)
    Manifest("o/chat", "huggingface", "main", None, files).write(folder)
    done = bundle(home, "--version", "v1")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "models/chat/config.json: damaged, its checksum is another than it should be; "
        "./deploy.sh models verify --repair\n"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--version", "../v1"], '--version "../v1": letters, digits, dots and dashes'),
        (["--models", "chat,what"], 'config/models.json has no model "what"; it has: chat, rank'),
        (["--models", ","], "--models: names no model; --skip-models carries none"),
        (["--split", "12"], '--split "12": a size as 4G or 700M, of 1M at least'),
        (["--split", "4X"], '--split "4X"'),
        (["--since", "missing"], "missing: No such file or directory"),
        (["--since", "README.md"], "README.md:1: not a checksum and a path; name the SHA256SUMS of an earlier bundle"),
        (["--since", "demo/ocr/page.png"], "demo/ocr/page.png: not a text file"),
    ],
)
def test_wrong_options(home: Project, options: list[str], said: str) -> None:
    done = bundle(home, *options)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr
    assert not (home.home / "dist").exists()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"path": "models/none"}, "no weights of chat; fetch them first: ./deploy.sh models download chat"),
        ({"path": "/usr/share"}, "models.chat.path: /usr/share: a bundle carries what is below"),
    ],
)
def test_weights_that_are_not_there(home: Project, entry: dict[str, Any], said: str) -> None:
    home.write({"chat": {**CHAT, **entry}})
    if entry["path"] == "/usr/share":
        outside = home.home.parent / "outside"
        outside.mkdir()
        (outside / "config.json").write_text("{}")
        home.write({"chat": {**CHAT, "path": str(outside)}})
        said = said.replace("/usr/share", str(outside))
    done = bundle(home)
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr


def test_a_full_disk_is_known_before(home: Project) -> None:
    os.truncate(home.home / "models/chat/model.safetensors", 1 << 43)
    done = bundle(home)
    assert done.returncode == 1
    assert "needs about 8.8 TB" in done.stderr
    assert done.stderr.endswith("make room, or name another place with --output\n")
    assert not (home.home / "dist").exists()
