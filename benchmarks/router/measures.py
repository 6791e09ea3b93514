"""What is measured of one gateway, each within a bounded time."""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.router import requests
from benchmarks.router.gateways import Gateway
from benchmarks.router.programs import BenchmarkError, Programs
from benchmarks.router.requests import Request

Figures = dict[str, float]

CONNECTIONS = 64
CHUNKS = 65
CHUNK_INTERVAL_MS = 10
SLOW_INTERVAL_MS = 200
MEMORY_LOOK_SECONDS = 1.0
MEMORY_STEPS = 10


@dataclass(frozen=True)
class Sizes:
    """How much is measured. Seconds, but where the name says otherwise."""

    warm_up: float = 1.0
    requests: float = 5.0
    streams: int = 128
    stream_waves: int = 5
    many_streams: int = 1000
    many_chunks: int = 40
    body_bytes: int = 20_000_000
    bodies: int = 5
    memory_requests: int = 1_000_000
    most_keys: int = 10_000
    at_most: float = 90.0


FULL = Sizes()
QUICK = Sizes(
    warm_up=0.2,
    requests=0.5,
    streams=16,
    stream_waves=1,
    many_streams=50,
    many_chunks=5,
    body_bytes=1_000_000,
    bodies=2,
    memory_requests=10_000,
    most_keys=100,
    at_most=20.0,
)


@dataclass(frozen=True)
class Clients:
    """The load generator. `each`: requests of a connection in a wave, 0 for as many as it can for the time."""

    program: Path
    port: int

    def command(
        self, folder: Path, wire: Sequence[Request], *, connections: int, waves: int = 1, each: int = 0,
        warm_up: float = 0.0, seconds: float, marks: int = 1, end: str = "}",
    ) -> list[str]:  # fmt: skip
        files = [folder / f"request-{number}" for number in range(len(wire))]
        for file, request in zip(files, wire, strict=True):
            file.write_bytes(request.on_the_wire(self.port))
        numbers = (self.port, connections, waves, each, warm_up, seconds, marks)
        return [str(self.program), *map(str, numbers), end, *map(str, files)]

    def run(self, wire: Sequence[Request], **options: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            command = self.command(Path(folder), wire, **options)
            done = subprocess.run(command, stdout=subprocess.PIPE)
            return _seen(done.stdout)


def _seen(printed: bytes) -> dict[str, Any]:
    if not printed:
        raise BenchmarkError("the load generator failed")
    seen: dict[str, Any] = json.loads(printed)
    return seen


def everything(programs: Programs, gateway: Gateway, sizes: Sizes) -> Figures:
    clients = Clients(programs.load, gateway.port)
    parts = (short_answers, streams, many_streams, large_bodies)
    found = [part(clients, gateway, sizes) for part in parts]
    figures = {name: value for part in found for name, value in part.items()}
    return {**figures, "errors": sum(part["errors"] for part in found)}


def short_answers(clients: Clients, gateway: Gateway, sizes: Sizes) -> Figures:
    return rate(clients, [requests.chat(gateway.key)], sizes)


def rate(clients: Clients, wire: Sequence[Request], sizes: Sizes) -> Figures:
    """Complete answers in a second, over connections that are kept."""
    seen = clients.run(wire, connections=CONNECTIONS, warm_up=sizes.warm_up, seconds=sizes.requests)
    return {"requests_per_second": seen["complete"] / seen["seconds"], "errors": seen["errors"]}


def streams(clients: Clients, gateway: Gateway, sizes: Sizes) -> Figures:
    """CPU of all the gateway's processes for a chunk, and the time to the first one, over connections that are new."""
    wire = [requests.stream(gateway.key, CHUNKS, CHUNK_INTERVAL_MS)]
    before = gateway.server.cpu_seconds()
    seen = clients.run(
        wire,
        connections=sizes.streams, waves=sizes.stream_waves, each=1, seconds=sizes.at_most, marks=CHUNKS, end="[DONE]",
    )  # fmt: skip
    spent = gateway.server.cpu_seconds() - before
    return {
        "cpu_us_per_chunk": spent * 1e6 / max(1, seen["complete"] * CHUNKS),
        "first_chunk_ms": seen["first_ms"]["median"],
        "first_chunk_p99_ms": seen["first_ms"]["p99"],
        "errors": seen["errors"],
    }


def many_streams(clients: Clients, gateway: Gateway, sizes: Sizes) -> Figures:
    """The most memory of all the gateway's processes while the streams are open."""
    wire = [requests.stream(gateway.key, sizes.many_chunks, SLOW_INTERVAL_MS)]
    found = [gateway.server.pss_bytes()]
    with tempfile.TemporaryDirectory() as folder:
        command = clients.command(
            Path(folder), wire, connections=sizes.many_streams, each=1, seconds=sizes.at_most, marks=sizes.many_chunks,
            end="[DONE]",
        )  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
            try:
                while _is_running(running, MEMORY_LOOK_SECONDS):
                    found.append(gateway.server.pss_bytes())
                seen = _seen(running.stdout.read() if running.stdout else b"")
            finally:
                running.kill()
    return {"mib_of_many_streams": max(found) / (1 << 20), "errors": seen["errors"]}


def _is_running(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def large_bodies(clients: Clients, gateway: Gateway, sizes: Sizes) -> Figures:
    """Seconds for one, one after the other."""
    wire = [requests.image(gateway.key, sizes.body_bytes)]
    seen = clients.run(wire, connections=1, waves=sizes.bodies, each=1, seconds=sizes.at_most)
    return {"large_body_seconds": seen["whole_ms"]["median"] / 1e3, "errors": seen["errors"]}


def memory(clients: Clients, gateway: Gateway, sizes: Sizes) -> list[dict[str, float]]:
    """MiB after each tenth of the requests."""
    each = sizes.memory_requests // MEMORY_STEPS // CONNECTIONS + 1
    found = []
    for _ in range(MEMORY_STEPS):
        seen = clients.run([requests.chat(gateway.key)], connections=CONNECTIONS, each=each, seconds=600)
        found.append({"mib": gateway.server.pss_bytes() / (1 << 20), **{k: seen[k] for k in ("complete", "errors")}})
    return found


def median_of(rounds: Sequence[Figures]) -> Figures:
    """Errors are added up."""
    names = [name for name in rounds[0] if name != "errors"]
    medians = {name: statistics.median(each[name] for each in rounds) for name in names}
    return {**medians, "errors": sum(each["errors"] for each in rounds)}
