"""A backup and its way back, and what is no backup. In Docker it is in tests/containers."""

import io
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT, Project
from vllm_unified.backup import HEADER, SUMS, Places, restore, write
from vllm_unified.errors import UserError

OLD = {
    ".env": "VLLM_API_KEY=sk-old\n",
    "config/models.json": '{"models": {"chat": {"name": "c", "type": "chat"}}}',
    "config/keys.yaml": "keys: []\n",
    "data/documents/1/page.md": "# A page\n",
    "models/chat/config.json": "{}",
    "models/chat/1_Pooling/config.json": "{}",
}
# Of these a backup has none: what is made anew.
LEFT_OUT = {
    "run/x.log": "",
    "data/prometheus/wal/00000001": "history",
    "models/demo/config.json": "{}",
    "models/chat/.download.lock": "",
    "models/chat/a.part": "",
}
# And these stay as they are where it is put back.
STAYS = ("data/prometheus/wal/00000001", "models/demo/config.json")


def fill(home: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(text, encoding="utf-8")


def contents(home: Path, *folders: str) -> dict[str, str]:
    files = [path for folder in folders for path in (home / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(home)): path.read_text(encoding="utf-8") for path in [*files, home / ".env"]}


def backup_of(home: Path, *, with_models: bool = True) -> bytes:
    out = io.BytesIO()
    write(Places(home, home), out, with_models=with_models)
    return out.getvalue()


def put_back(home: Path, content: bytes) -> str:
    return restore(Places(home, home), io.BytesIO(content))


@pytest.fixture
def home(project: Project) -> Path:
    fill(project.home, {**OLD, **LEFT_OUT})
    (project.home / ".env").chmod(0o600)
    return project.home


def test_all_comes_back_and_nothing_else_does(home: Path) -> None:
    made = backup_of(home)
    newer = {".env": "VLLM_API_KEY=sk-new\n", "config/models.json": "{}", "data/documents/2/page.md": "", "run/y": "y"}
    fill(home, {**newer, "models/chat/config.json": "new", "models/chat/new": "", "models/mine/config.json": "mine"})
    assert put_back(home, made).startswith("restored config, .env, data, models, of 20")
    mine = {"models/mine/config.json": "mine", **{path: LEFT_OUT[path] for path in STAYS}}  # which the backup has not
    assert contents(home, "config", "data", "models") == {**OLD, **mine}
    assert (home / ".env").stat().st_mode & 0o777 == 0o600
    assert (home / "run/y").read_text() == "y"
    assert {path.name for path in home.iterdir()} == {".env", "config", "data", "models", "run"}


def test_models_only_on_request(home: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    put_back(fresh, backup_of(home, with_models=False))
    assert contents(fresh, ".") == {path: text for path, text in OLD.items() if not path.startswith("models/")}


def test_a_database_that_is_written_to(home: Path, tmp_path: Path) -> None:
    with sqlite3.connect(home / "data" / "usage.db", isolation_level=None) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE tokens (count INTEGER)")
        database.execute("INSERT INTO tokens VALUES (7)")
        made = backup_of(home)
    database.close()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    put_back(fresh, made)
    assert sorted(path.name for path in (fresh / "data").iterdir()) == ["documents", "usage.db"]
    restored = sqlite3.connect(fresh / "data" / "usage.db")
    assert restored.execute("SELECT count FROM tokens").fetchall() == [(7,)]
    restored.close()


def rewritten(content: bytes, change: Callable[[tarfile.TarInfo], object]) -> bytes:
    """The same members, each as `change` makes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as source, tarfile.open(fileobj=out, mode="w") as target:
        for member in source:
            data = source.extractfile(member)
            change(member)
            target.addfile(member, data if member.isfile() else None)
    return out.getvalue()


def renamed(name: str) -> Callable[[bytes], bytes]:
    def change(member: tarfile.TarInfo) -> None:
        if member.name == "config/keys.yaml":
            member.name = name

    return lambda content: rewritten(content, change)


def retyped(kind: bytes) -> Callable[[bytes], bytes]:
    def change(member: tarfile.TarInfo) -> None:
        if member.name == "config/keys.yaml":
            member.type, member.linkname, member.size = kind, "/etc/passwd", 0

    return lambda content: rewritten(content, change)


def with_header(**fields: object) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            header = tar.extractfile(HEADER)
            assert header is not None
            text = json.dumps({**json.loads(header.read()), **fields}).encode()
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            entry = tarfile.TarInfo(HEADER)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
        return out.getvalue()

    return changed


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"", "no backup of"),
        (lambda content: b"PK\x03\x04" * 1000, "no backup of"),
        (lambda content: b"\0" * 10240, "not a backup: it does not begin"),
        (lambda content: content[: len(content) // 2], "damaged"),
        (lambda content: content[: content.index(SUMS.encode())], "it breaks off"),
        (lambda content: content.replace(b"sk-old", b"sk-odd"), ".env is not as it was written"),
        (renamed("config/../../escaped"), "'config/../../escaped' has no place in one"),
        (renamed("../escaped"), "'../escaped' has no place in one"),
        (renamed("/tmp/escaped"), "'/tmp/escaped' has no place in one"),
        (renamed("config//keys.yaml"), "has no place in one"),
        (renamed("config"), "'config' has no place in one"),
        (renamed(".env/x"), "'.env/x' has no place in one"),
        (renamed("run/x"), "'run/x' has no place in one"),
        (renamed("config/models.json"), "'config/models.json' stands in it twice"),
        (retyped(tarfile.SYMTYPE), "'config/keys.yaml' has no place in one"),
        (retyped(tarfile.LNKTYPE), "'config/keys.yaml' has no place in one"),
        (retyped(tarfile.FIFOTYPE), "'config/keys.yaml' has no place in one"),
        (with_header(runtime="docker"), "a backup of a deployment that was docker, this one is native"),
        (with_header(format=2), "a backup of format 2"),
        (with_header(parts=7), "no backup of"),
        (with_header(), "it breaks off"),
    ],
)
def test_what_is_no_backup_changes_nothing(home: Path, damage: Callable[[bytes], bytes], said: str) -> None:
    content = damage(backup_of(home))
    before = contents(home, "config", "data", "models")
    with pytest.raises(UserError) as error:
        put_back(home, content)
    assert said in str(error.value)
    assert contents(home, "config", "data", "models") == before
    assert {path.name for path in home.iterdir()} == {".env", "config", "data", "models", "run"}
    assert not (home.parent / "escaped").exists()


def test_what_a_broken_off_restore_left_is_not_lost(home: Path) -> None:
    made = backup_of(home)
    (home / "config" / ".replaced").mkdir()
    (home / "config" / ".replaced" / "models.json").write_text("{}")
    with pytest.raises(UserError, match=r"config/\.replaced: what was there before a restore"):
        put_back(home, made)
    assert (home / "config" / ".replaced" / "models.json").exists()


def test_what_cannot_be_put_in_place_is_undone(home: Path) -> None:
    made = backup_of(home)
    fill(home, {"config/models.json": "{}"})
    mounted = home / "data" / "documents"
    if os.geteuid() != 0 or subprocess.run(["mount", "--bind", mounted, mounted], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(UserError, match="documents: Device or resource busy; nothing was changed"):
            put_back(home, made)
    finally:
        subprocess.run(["umount", mounted], check=True)
    assert (home / "config/models.json").read_text() == "{}"
    assert put_back(home, made).startswith("restored")


def deploy(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(home), "DOCKER_HOST": "unix:///nowhere"}
    return subprocess.run(
        [str(CHECKOUT / "deploy.sh"), *arguments],
        env=environ,
        cwd=home.parent,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_by_deploy(home: Path) -> None:
    done = deploy(home, "backup", "kept.tar")
    assert done.returncode == 0, done.stderr
    kept = home.parent / "kept.tar"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert "kept.tar is there already" in deploy(home, "backup", "kept.tar").stderr
    (home / "config" / "models.json").write_text("{}")
    asked = deploy(home, "restore", "kept.tar")
    assert asked.returncode == 1
    assert "asks before it restores; say --force where nobody can answer" in asked.stderr
    assert (home / "config" / "models.json").read_text() == "{}"
    assert deploy(home, "restore", "kept.tar", "--force").returncode == 0
    assert (home / "config" / "models.json").read_text() == OLD["config/models.json"]
    for wrong in ("none.tar", str(home)):
        assert "no file that can be read" in deploy(home, "restore", wrong, "--force").stderr
    assert deploy(home, "restore", str(CHECKOUT / "README.md"), "--force").stderr.startswith("no backup of")


def test_a_terminal_gets_no_archive(home: Path) -> None:
    command = [sys.executable, "-m", "vllm_unified", "backup"]
    leader, follower = os.openpty()
    done = subprocess.run(
        command,
        stdout=follower,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "VLLM_UNIFIED_HOME": str(home)},
        cwd=CHECKOUT,
    )
    os.close(leader)
    os.close(follower)
    assert done.returncode == 1
    assert done.stderr == "a backup is no text: ./deploy.sh backup FILE puts it into a file\n"
