"""The demonstration in a folder of its own, started by deploy.sh as a user starts it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from vllm_unified import state
from vllm_unified.state import EngineState, Phase

CHECKOUT = Path(__file__).resolve().parents[1]
KEYS = ("chat", "embedding", "rerank", "ocr")
API_KEY = "sk-of-the-benchmarks"


@dataclass(frozen=True)
class Demo:
    home: Path
    environ: Mapping[str, str]
    start_seconds: float

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {API_KEY}"}

    @property
    def router(self) -> str:
        return f"http://127.0.0.1:{self.environ['VLLM_ROUTER_PORT']}/v1"

    def state(self, key: str) -> EngineState:
        return state.read(self.home / "run", key)

    def is_ready(self, key: str) -> bool:
        return self.state(key).phase is Phase.READY

    def processes_without_owner(self) -> list[str]:
        """vLLM's processes that belong to no engine that runs now."""
        current = {each.engine.pid for key in KEYS if (each := self.state(key)).engine}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                ours = process.environ().get("VLLM_UNIFIED_ENGINE", "").startswith(f"{self.home}:")
                if ours and process.status() != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) not in current:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        return found


@contextlib.contextmanager
def project_folder() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with the configuration and the demonstration's models, and the variables that name it."""
    with tempfile.TemporaryDirectory(prefix="vllm-unified-benchmark-") as folder:
        home = Path(folder)
        shutil.copytree(CHECKOUT / "config", home / "config")
        (home / "models").mkdir()
        (home / "models" / "demo").symlink_to(CHECKOUT / "models" / "demo")
        ports = {name: str(free_port()) for name in ("ROUTER", *map(str.upper, KEYS))}
        environ = {
            **os.environ,
            "VLLM_UNIFIED_HOME": str(home),
            "VLLM_API_KEY": API_KEY,
            **{f"VLLM_{name}_PORT": port for name, port in ports.items()},
        }
        yield home, environ


@contextlib.contextmanager
def running_demo(**variables: str) -> Iterator[Demo]:
    with project_folder() as (home, environ):
        environ.update(variables)
        deploy = CHECKOUT / "deploy.sh"
        began = time.monotonic()
        try:
            subprocess.run([deploy, "start", "--demo"], env=environ, check=True, stdout=sys.stderr)
            yield Demo(home, environ, time.monotonic() - began)
        finally:
            subprocess.run([deploy, "stop"], env=environ, check=True, stdout=sys.stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def devices_file(home: Path, count: int) -> Path:
    """A topology of `count` CPU devices that share the machine's memory."""
    path = home / "devices.json"
    gib = psutil.virtual_memory().total / (1 << 30)
    devices = [{"kind": "cpu", "name": f"part {number}", "memory_gib": gib / count} for number in range(count)]
    path.write_text(json.dumps({"devices": devices}))
    return path
