"""The real router in a process of its own, in front of fake engines in theirs."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import API_KEY, CHECKOUT, Project, eventually, free_port


class Deployment:
    """Engines by key, each with the behaviour that the test asks for; `None`: configured but not started."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports: dict[str, int] = {}

    def start(
        self,
        models: dict[str, dict[str, Any]],
        documents: dict[str, Any] | None = None,
        nginx: dict[str, Any] | None = None,
        **router: Any,
    ) -> None:
        """`models`: key → fields of the entry, and under `fake` how its engine behaves.

        One with `endpoints` and no `path` has no engine.
        """
        here = [key for key, fields in models.items() if "path" in fields or not fields.get("endpoints")]
        self.ports |= {key: free_port() for key in ("router", *here)}
        fake = {key: models[key].pop("fake", {}) for key in here}
        places = {key: {"port": self.ports[key]} if key in here else {} for key in models}
        entries = {key: {"name": key, **places[key], **fields} for key, fields in models.items()}
        for key in self.processes:
            eventually(partial(is_listening, self.ports[key]))
        settings = {"port": self.ports["router"], "health_check_interval": 0.2, **router}
        self.project.write(
            entries, router=settings, system={"drain_timeout": 1}, documents=documents or {}, nginx=nginx or {}
        )
        for key, behaviour in fake.items():
            if behaviour is not None:
                self.start_engine(key, behaviour)
        environ = {**os.environ, "VLLM_UNIFIED_HOME": str(self.project.home), "VLLM_API_KEY": API_KEY}
        with self.log.open("ab") as log:
            self.processes["router"] = subprocess.Popen(
                [sys.executable, "-m", "vllm_unified", "router"], env=environ, cwd=CHECKOUT, stdout=log, stderr=log
            )
        with self.client() as client:
            eventually(lambda: is_alive(client), 60)
            eventually(lambda: "not looked at yet" not in client.get("/health").text)
            running = [key for key, behaviour in fake.items() if behaviour is not None]
            eventually(lambda: all(self.service(client, key)["status"] == "healthy" for key in running), 60)

    def remote(self, key: str, /, *, behind: bool = True, **behaviour: Any) -> str:
        """Start an engine that is none of this deployment's, and wants no key; its address.

        Without `behind` nothing listens there yet.
        """
        self.ports[key] = free_port()
        if behind:
            self.start_engine(key, {"key": "", **behaviour})
        return f"http{'s' if 'tls' in behaviour else ''}://127.0.0.1:{self.ports[key]}"

    def behave(self, key: str, /, **behaviour: Any) -> None:
        """From now on; what it saw before is forgotten."""
        httpx.post(f"http://127.0.0.1:{self.ports[key]}/behave", json={"key": "", **behaviour}).raise_for_status()

    def name(self, key: str) -> str:
        """Of a remote replica, as x-served-by and the metrics have it."""
        return f"127.0.0.1:{self.ports[key]}"

    def start_engine(self, key: str, behaviour: dict[str, Any]) -> None:
        environ = {**os.environ, "VLLM_API_KEY": API_KEY, "FAKE_ENGINE": json.dumps(behaviour)}
        self.processes[key] = subprocess.Popen(
            [sys.executable, str(CHECKOUT / "tests" / "fake_engine.py"), "--port", str(self.ports[key])],
            env=environ,
            stdout=subprocess.DEVNULL,
        )

    def stop_engine(self, key: str) -> None:
        process = self.processes.pop(key)
        process.kill()
        process.wait()

    @property
    def log(self) -> Path:
        """What the router wrote: its access log and its own words."""
        return self.project.home / "router.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['router']}"

    def client(self, key: str | None = API_KEY, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, **options)

    def begin(self, path: str, body: dict[str, Any], key: str = API_KEY) -> socket.socket:
        """A request that was sent; to close the socket is to leave."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nauthorization: Bearer {key}\r\ncontent-length: {len(content)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.ports["router"]), timeout=20)
        connection.sendall(head.encode() + content)
        return connection

    def service(self, client: httpx.Client, key: str) -> dict[str, Any]:
        services: dict[str, dict[str, Any]] = client.get("/health").json()["services"]
        return services[key]

    def seen(self, key: str) -> dict[str, Any]:
        """What the engine itself saw."""
        answer: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.ports[key]}/seen").json()
        return answer

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            process.wait(20)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_alive(client: httpx.Client) -> bool:
    try:
        return client.get("/live").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def deployment(project: Project) -> Iterator[Deployment]:
    started = Deployment(project)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """For a module whose tests leave the deployment as it was; the first one that uses it starts it."""
    home = tmp_path_factory.mktemp("project")
    (home / "config").mkdir()
    started = Deployment(Project(home))
    yield started
    started.stop()
