"""`models verify`, `import`, `list` and `remove`."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub.conftest import FIRST, MODEL, NEEDED, REPO, SECOND, Setup, is_whole
from tests.hub.server import COMMIT
from vllm_unified.state import EngineState, Phase, Process


@pytest.fixture
def fetched(setup: Setup) -> Setup:
    setup.right("download")
    setup.hub.requests.clear()
    return setup


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verify(fetched: Setup) -> None:
    assert fetched.right("verify").startswith(f"chat: {len(NEEDED)} files, 3.0 MB in ")
    flip(fetched.folder / FIRST)
    (fetched.folder / SECOND).unlink()
    (fetched.folder / "tokenizer.json").write_bytes(b"short")
    flip(fetched.folder / "config.json")
    assert fetched.wrong("verify") == [
        "chat: config.json: damaged, its checksum differs",
        f"chat: {FIRST}: damaged, its checksum differs",
        f"chat: {SECOND}: missing",
        "chat: tokenizer.json: 5 bytes, should be 3000",
        "./deploy.sh models verify chat --repair fetches that again",
    ]
    assert fetched.hub.requests == []
    done = fetched.right("verify", "--repair")
    assert "4 of 6 files" in done
    assert is_whole(fetched)
    asked = {each.path for each in fetched.hub.requests} - {"huggingface", f"resolve {FIRST}", f"resolve {SECOND}"}
    assert asked == {FIRST, SECOND, "tokenizer.json", "config.json"}
    fetched.right("verify")


def test_verify_without_a_manifest(setup: Setup) -> None:
    (line,) = setup.wrong("verify")
    assert f"{setup.folder}: no such folder; fetch {REPO} with: ./deploy.sh models download chat" in line
    setup.folder.mkdir(parents=True)
    (setup.folder / "config.json").write_text("{}")
    (line,) = setup.wrong("verify", "chat")
    assert "no manifest says what its files should be" in line
    assert f"./deploy.sh models import {setup.folder} chat" in line


@pytest.mark.parametrize("text", ["{", "[]", '{"files": []}', "\0"])
def test_a_damaged_manifest(fetched: Setup, text: str) -> None:
    (fetched.folder / ".manifest.json").write_text(text)
    for command in ("verify", "download"):
        (line,) = fetched.wrong(command)
        assert f"{fetched.folder / '.manifest.json'}: no manifest (" in line
    assert fetched.state() == "incomplete"


def test_a_manifest_that_leads_astray(fetched: Setup) -> None:
    document = fetched.manifest()
    document["files"][0]["path"] = "../../../secret"
    (fetched.folder / ".manifest.json").write_text(json.dumps(document))
    for command in (["verify"], ["remove", "chat", "--force"]):
        assert "leads out of the model's folder" in fetched.wrong(*command)[0]


def test_list(fetched: Setup) -> None:
    (row,) = json.loads(fetched.right("list", "--json"))
    size = sum(len(MODEL[path]) for path in NEEDED)
    assert 0 < row.pop("bytes") - size < 5000  # the manifest
    assert row == {
        "model": "chat",
        "repo": REPO,
        "revision": COMMIT,
        "source": "huggingface",
        "folder": str(fetched.folder),
        "state": "complete",
        "note": "",
    }
    assert f"chat   complete  3.0 MB  {REPO} {COMMIT[:12]}  {fetched.folder}" in fetched.right("list")


# --- import ---


def on_a_stick(setup: Setup, manifest: bool = True) -> Path:
    stick = setup.project.home.parent / "stick" / "chat"
    shutil.move(setup.folder, stick)
    if not manifest:
        (stick / ".manifest.json").unlink()
    return stick


@pytest.mark.parametrize("move", [[], ["--move"]])
@pytest.mark.parametrize("manifest", [True, False])
def test_import(fetched: Setup, move: list[str], manifest: bool) -> None:
    stick = on_a_stick(fetched, manifest)
    names = [] if manifest else ["chat"]
    said = fetched.right("import", str(stick), *names, *move)
    assert said.startswith(f"chat: {len(NEEDED)} files, 3.0 MB in ")
    assert is_whole(fetched)
    assert fetched.state() == "complete"
    assert stick.exists() == (not move)
    assert fetched.manifest()["repo"] == (REPO if manifest else None)
    fetched.right("verify")
    assert fetched.hub.requests == []


def test_import_in_place_makes_a_manifest(fetched: Setup) -> None:
    (fetched.folder / ".manifest.json").unlink()
    fetched.right("import", str(fetched.folder), "chat", "--move")
    assert is_whole(fetched)
    fetched.right("verify")


@pytest.mark.parametrize("move", [[], ["--move"]])
def test_import_of_damaged_files(fetched: Setup, move: list[str]) -> None:
    stick = on_a_stick(fetched)
    flip(stick / SECOND)
    (line,) = fetched.wrong("import", str(stick), *move)
    assert line.startswith(f"{stick / SECOND}: damaged")
    assert fetched.state() == "missing"
    assert (stick / FIRST).exists()


def cached(setup: Setup) -> Path:
    """As huggingface_hub keeps it."""
    cache = setup.project.home.parent / f"models--{REPO.replace('/', '--')}"
    snapshot = cache / "snapshots" / COMMIT
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    for path in NEEDED:
        content = MODEL[path]
        large = path.endswith(".safetensors")
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = cache / "blobs" / (hashlib.sha256(content).hexdigest() if large else git)
        blob.write_bytes(content)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(os.path.relpath(blob, (snapshot / path).parent))
    return cache


@pytest.mark.parametrize("inner", [".", f"snapshots/{COMMIT}"])
def test_import_from_hugging_faces_cache(setup: Setup, inner: str) -> None:
    cache = cached(setup)
    assert "leave --move out" in setup.wrong("import", str(cache / inner), "--move")[0]
    setup.right("import", str(cache / inner))
    assert is_whole(setup)
    assert (setup.manifest()["repo"], setup.manifest()["revision"]) == (REPO, COMMIT)
    assert not any((setup.folder / path).is_symlink() for path in NEEDED)
    setup.configure(revision=COMMIT)
    assert setup.state() == "complete"


@pytest.mark.parametrize("path", [FIRST, "config.json"])
def test_import_from_a_damaged_cache(setup: Setup, path: str) -> None:
    cache = cached(setup)
    flip((cache / "snapshots" / COMMIT / path).resolve())
    assert "damaged" in setup.wrong("import", str(cache))[0]
    assert setup.state() == "missing"


def test_what_import_refuses(fetched: Setup) -> None:
    stick = on_a_stick(fetched)
    somewhere = fetched.project.home.parent / "somewhere"
    assert fetched.wrong("import", str(somewhere)) == [f"{somewhere}: no such folder"]
    somewhere.mkdir()
    assert "no config.json in it" in fetched.wrong("import", str(somewhere))[0]
    (somewhere / "config.json").write_text("{}")
    assert "does not say which repository it holds; say which" in fetched.wrong("import", str(somewhere))[0]
    (somewhere / "secret").symlink_to("/etc/passwd")
    assert "leads out of" in fetched.wrong("import", str(somewhere), "chat")[0]
    (stick / "link.json").symlink_to("/etc/passwd")  # not of the manifest
    fetched.configure(revision="v9")
    assert f"holds {REPO} at {COMMIT}; models.chat wants {REPO} at v9" in fetched.wrong("import", str(stick))[0]
    fetched.configure()
    fetched.right("import", str(stick))
    assert is_whole(fetched)
    assert "holds a model already" in fetched.wrong("import", str(stick))[0]


# --- remove ---


def test_remove(fetched: Setup) -> None:
    assert "say --force where nobody can answer" in fetched.wrong("remove", "chat")[0]
    assert is_whole(fetched)
    notes = fetched.folder / "notes.txt"
    notes.write_text("mine")
    said = fetched.right("remove", "chat", "--force")
    assert said == f"chat: removed; {fetched.folder} keeps what is not the model's\n"
    assert fetched.files() == ["notes.txt"]
    notes.unlink()
    fetched.folder.rmdir()
    assert "nothing to remove" in fetched.wrong("remove", "chat", "--force")[0]
    fetched.right("download")
    assert fetched.right("remove", "chat", "--force") == f"chat: removed {fetched.folder}\n"
    assert not fetched.folder.exists()


def running(setup: Setup) -> None:
    EngineState("chat", Phase.READY, time.monotonic(), keeper=Process.of(os.getpid())).write(setup.project.home / "run")


def shared(setup: Setup) -> None:
    chat = {"name": "c", "type": "chat", "repo": REPO}
    other = {"name": "o", "type": "ocr", "path": "models/../models/chat", "enabled": False}
    setup.project.write({"chat": chat, "ocr": other})


def without_manifest(setup: Setup) -> None:
    (setup.folder / ".manifest.json").unlink()


def with_a_symlink(setup: Setup) -> None:
    outside = setup.project.home / "outside.json"
    (setup.folder / "1_Pooling" / "config.json").rename(outside)
    (setup.folder / "1_Pooling" / "config.json").symlink_to(outside)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (running, "models.chat runs; ./deploy.sh stop chat ends it first"),
        (shared, "models.ocr uses it too"),
        (without_manifest, "remove them yourself"),
        (with_a_symlink, "a symlink"),
    ],
)
def test_what_remove_refuses(fetched: Setup, spoil: Callable[[Setup], None], said: str) -> None:
    spoil(fetched)
    assert said in fetched.wrong("remove", "chat", "--force")[0]
    assert (fetched.folder / FIRST).exists()


def test_a_model_that_is_not_there(setup: Setup) -> None:
    for command in ("download", "verify", "remove"):
        (line,) = setup.wrong(command, "nobody")
        assert line == 'config/models.json: no model "nobody" with weights here; there are: chat'
    assert setup.run("nonsense").returncode == 2
