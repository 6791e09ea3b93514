"""A network namespace from which no cable goes out, and a Docker engine in it.

Its only way out is a device that leads nowhere and counts what is sent into it.
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import eventually

NAMESPACE = "vllm-unified-test"
# Of addresses that are kept for documents, so that nobody has them.
LINK = """
ip link set lo up
sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1
ip link add out type veth peer name nowhere
ip address add 192.0.2.2/24 dev out
ip link set nowhere up
ip link set out up
ip neighbour add 192.0.2.1 lladdr 02:00:00:00:00:01 dev out nud permanent
ip route add default via 192.0.2.1
"""


@dataclass(frozen=True)
class Airgap:
    """`environ`: with the engine of the namespace, if there is one, as the one that `docker` talks to."""

    environ: dict[str, str]

    def run(self, *command: str | Path, timeout: float = 900) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(_inside(*command), env=self.environ, capture_output=True, text=True, timeout=timeout)

    def started(self, *command: str | Path) -> "subprocess.Popen[str]":
        """In a session of its own."""
        return subprocess.Popen(
            _inside(*command), env=self.environ, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def done(self, *command: str | Path) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def sent(self) -> int:
        """Packets that something tried to send out of here."""
        (out,) = json.loads(self.done("ip", "-json", "-statistics", "link", "show", "out"))
        return int(out["stats64"]["tx"]["packets"])


@contextlib.contextmanager
def airgap(folder: Path | None = None) -> Iterator[Airgap]:
    """With a Docker engine that keeps all it has in `folder`, if that is named. Wants root."""
    needed = ["ip", "nsenter", "sysctl", *(["dockerd"] if folder else [])]
    lacking = [name for name in needed if shutil.which(name) is None]
    if os.geteuid() or lacking:
        pytest.skip(f"a namespace without a network wants root and {', '.join(needed)}")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_UNIFIED_")}
    subprocess.run(["ip", "netns", "delete", NAMESPACE], capture_output=True)
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    try:
        gap = Airgap(environ)
        gap.done("sh", "-ec", LINK)
        if folder is None:
            yield gap
        else:
            with _engine(folder) as host:
                yield Airgap({**environ, "DOCKER_HOST": host})
    finally:
        subprocess.run(["ip", "netns", "delete", NAMESPACE], check=True)


@contextlib.contextmanager
def _engine(folder: Path) -> Iterator[str]:
    host = f"unix://{folder}/docker.sock"
    places = ("--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid", "-H", host)
    command = _inside("dockerd", *places)
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as engine:
        try:
            environ = {**os.environ, "DOCKER_HOST": host}
            eventually(lambda: not subprocess.run(["docker", "info"], env=environ, capture_output=True).returncode, 60)
            yield host
        finally:
            engine.terminate()


def _inside(*command: str | Path) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{NAMESPACE}", *map(str, command)]
