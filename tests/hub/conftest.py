"""A model on a hub of this machine, and the real program against it."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT, Project
from tests.hub.server import Hub, hub

REPO = "someone/model"
DICE = random.Random(7)
MODEL = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": DICE.randbytes(3000),
    "README.md": b"# A model\n",
    "model-00001-of-00002.safetensors": DICE.randbytes(2_000_000),
    "model-00002-of-00002.safetensors": DICE.randbytes(1_000_000),
    "1_Pooling/config.json": b"{}",
    # What vLLM does not need.
    "pytorch_model.bin": b"the same once more",
    "onnx/model.onnx": b"and once more",
    "figure.png": b"a picture",
    ".gitattributes": b"",
}
NEEDED = sorted(list(MODEL)[:6])
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@dataclass
class Setup:
    """A project whose model `chat` comes from `hub`."""

    hub: Hub
    project: Project

    @property
    def folder(self) -> Path:
        return self.project.home / "models" / "chat"

    def configure(self, **fields: Any) -> None:
        chat = {"name": "c", "type": "chat", "repo": REPO, "source": "huggingface", **fields}
        self.project.write({"chat": chat})

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        environ = {
            **os.environ,
            "VLLM_UNIFIED_HOME": str(self.project.home),
            "HOME": str(self.project.home.parent),
            "COLUMNS": "200",
        }
        return [sys.executable, "-m", "vllm_unified", "models", *arguments], environ

    def run(self, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        argv, own = self.command(*arguments)
        return subprocess.run(
            argv,
            env={**own, **environ},
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )

    def right(self, *arguments: str, **environ: str) -> str:
        done = self.run(*arguments, **environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wrong(self, *arguments: str, **environ: str) -> list[str]:
        """The lines that it says; never a traceback."""
        done = self.run(*arguments, **environ)
        assert done.returncode == 1, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()

    def state(self) -> str:
        (row,) = json.loads(self.right("list", "--json"))
        return str(row["state"])

    def manifest(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.folder / ".manifest.json").read_text())
        return document

    def files(self) -> list[str]:
        """What is in the model's folder, but for what we keep there for ourselves."""
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted({str(path.relative_to(self.folder)) for path in paths} - {".manifest.json", ".download.lock"})


def is_whole(setup: Setup, files: dict[str, bytes] = MODEL) -> bool:
    return setup.files() == NEEDED and all((setup.folder / path).read_bytes() == files[path] for path in NEEDED)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def setup(project: Project) -> Iterator[Setup]:
    with hub() as served:
        served.put(REPO, MODEL)
        each = Setup(served, project)
        each.configure()
        variables = {"HF_ENDPOINT": served.url, "MODELSCOPE_ENDPOINT": served.url, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
        (project.home / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        yield each
