"""The demonstration on the real vLLM, started as a user starts it: by deploy.sh."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import API_KEY, CHECKOUT, free_port


@dataclass(frozen=True)
class Demo:
    home: Path
    ports: dict[str, int]
    environ: dict[str, str]
    printed: str

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [CHECKOUT / "deploy.sh", *arguments], env=self.environ, capture_output=True, text=True, timeout=600
        )

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return document

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}/v1"

    def client(self, name: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url(name), api_key=API_KEY, max_retries=0)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    home = tmp_path_factory.mktemp("demo")
    shutil.copytree(CHECKOUT / "config", home / "config")
    (home / "models").mkdir()
    (home / "models" / "demo").symlink_to(CHECKOUT / "models" / "demo")
    ports = {name: free_port() for name in ("router", "chat", "embedding", "rerank", "ocr")}
    environ = {
        **os.environ,
        "VLLM_UNIFIED_HOME": str(home),
        "VLLM_API_KEY": API_KEY,
        **{f"VLLM_{name.upper()}_PORT": str(port) for name, port in ports.items()},
    }
    started = subprocess.run(
        [CHECKOUT / "deploy.sh", "start", "--demo", "--timeout", "600"], env=environ, capture_output=True, text=True
    )
    demo = Demo(home, ports, environ, started.stdout)
    print(started.stdout)
    try:
        assert started.returncode == 0, started.stderr
        yield demo
    finally:
        demo.run("stop")
