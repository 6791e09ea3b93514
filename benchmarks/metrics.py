"""What metrics cost the router: the time of /metrics with 10,000 keys, and the CPU of scraping 64 models each 15 s.

The engines are fake and answer with a real vLLM's text. Prints Markdown; exits with 1 when a bar is missed. Run it with
nothing else on the machine.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.router.programs import BenchmarkError, Server, free_ports, serving
from vllm_unified.settings.keys import hash_of, metrics_key
from vllm_unified.state import EngineState, Phase, Process

CHECKOUT = Path(__file__).resolve().parents[1]
VLLM = (CHECKOUT / "tests" / "vllm_metrics.txt").read_bytes()
API_KEY = "sk-of-the-benchmarks"
MODELS, KEYS = 64, 10_000
SCRAPE_SECONDS = 15.0
LOOKS = 20
MOST_MILLISECONDS, MOST_PERCENT = 50.0, 1.0
LIMITS = {"requests_per_minute": 1000, "tokens_per_minute": 10_000, "tokens_per_month": 1_000_000}


class Engines:
    """All of them in one thread: /metrics is vLLM's text, everything else an empty 200."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._listening = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        self._listening.wait()

    async def _serve(self) -> None:
        for port in self._ports:
            await asyncio.start_server(self._answer, "127.0.0.1", port)
        self._listening.set()
        await asyncio.Event().wait()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                body = VLLM if head.startswith(b"GET /metrics ") else b"{}"
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
        writer.close()


@contextlib.contextmanager
def router(models: int, keys: list[str]) -> Iterator[tuple[Server, str]]:
    """The process and its address, in front of so many engines, whose keepers say that they are ready."""
    port, *ports = free_ports(models + 1)
    Engines(ports)
    with tempfile.TemporaryDirectory(prefix="vllm-unified-benchmark-") as folder:
        home = Path(folder)
        (home / "config").mkdir()
        entries = {f"m{number}": {"name": f"m{number}", "type": "chat", "port": at} for number, at in enumerate(ports)}
        (home / "config" / "models.json").write_text(json.dumps({"models": entries, "router": {"port": port}}))
        listed = [{"name": f"k{number}", "hash": hash_of(key), **LIMITS} for number, key in enumerate(keys)]
        (home / "config" / "keys.yaml").write_text(yaml.dump({"keys": listed}, Dumper=yaml.CSafeDumper))
        _say_that_they_are_ready(home, list(entries))
        url = f"http://127.0.0.1:{port}"
        environ = {"VLLM_UNIFIED_HOME": folder, "VLLM_API_KEY": API_KEY, "PYTHONPATH": str(CHECKOUT)}
        command = [sys.executable, "-m", "vllm_unified", "router"]
        with serving(command, environ, home / "router.log", lambda: _is_ready(url)) as server:
            yield server, url


def _say_that_they_are_ready(home: Path, keys: list[str]) -> None:
    keeper, engine = Process.of(os.getpid()), Process.of(os.getpgid(0))
    for key in keys:
        EngineState(key, Phase.READY, time.monotonic(), keeper, engine, ready_after=20.0).write(home / "run")


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready").status_code == 200
    return False


def with_many_keys(count: int) -> dict[str, float]:
    """Milliseconds of GET /metrics, when each key has been used."""
    keys = [f"sk-{secrets.token_hex(12)}" for _ in range(count)]
    with router(4, keys) as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        for key in keys:
            client.post("/v1/embeddings", json={"model": "none"}, headers={"authorization": f"Bearer {key}"})
        headers = {"authorization": f"Bearer {metrics_key(API_KEY)}"}
        told = client.get("/metrics", headers=headers).raise_for_status().text
        seconds = []
        for _ in range(LOOKS):
            began = time.perf_counter()
            client.get("/metrics", headers=headers)
            seconds.append(time.perf_counter() - began)
    series = sum(not line.startswith("#") for line in told.splitlines())
    if told.count("key_requests_total{") < count:
        raise BenchmarkError("not every key is told")
    return {"series": series, "MiB": len(told) / (1 << 20), "ms": statistics.median(seconds) * 1e3}


def with_many_models(count: int, rounds: int) -> dict[str, float]:
    """Percent of a core: idle, and while all is scraped as Prometheus does it."""
    with router(count, []) as (server, url), httpx.Client(base_url=url, timeout=60) as client:
        client.headers["authorization"] = f"Bearer {metrics_key(API_KEY)}"
        _scrape(client, count)
        idle = _cpu_share(server, rounds, lambda: None)
        scraped = _cpu_share(server, rounds, lambda: _scrape(client, count))
    return {"idle": idle * 100, "scraped": scraped * 100, "scraping": (scraped - idle) * 100}


def _scrape(client: httpx.Client, count: int) -> None:
    targets = client.get("/sd").json()
    for target in targets:
        client.get(target["labels"]["__metrics_path__"]).raise_for_status()
    if len(targets) != count + 1:
        raise BenchmarkError(f"/sd names {len(targets)} targets")


def _cpu_share(server: Server, rounds: int, work: Any) -> float:
    began, before = time.monotonic(), server.cpu_seconds()
    for number in range(1, rounds + 1):
        work()
        time.sleep(max(0.0, began + number * SCRAPE_SECONDS - time.monotonic()))
    return (server.cpu_seconds() - before) / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="scrapes, 15 s apart, and as long idle (default 8)")
    parser.add_argument("--quick", action="store_true", help="small: whether it works, not what it costs")
    options = parser.parse_args()
    models, keys, rounds = (2, 50, 1) if options.quick else (MODELS, KEYS, options.rounds)
    try:
        of_keys, of_models = with_many_keys(keys), with_many_models(models, rounds)
    except BenchmarkError as error:
        sys.exit(f"benchmarks.metrics: {error}")
    print(f"load before: {os.getloadavg()[0]:.1f}\n\n| | measured | bar |\n|---|---|---|")
    size = f"{of_keys['series']:,} series, {of_keys['MiB']:.1f} MiB"
    print(f"| `/metrics` with {keys:,} keys ({size}) | {of_keys['ms']:.1f} ms | {MOST_MILLISECONDS:g} ms |")
    beside = f"{of_models['scraped']:.2f} % beside {of_models['idle']:.2f} % idle"
    print(
        f"| scraping {models} models each {SCRAPE_SECONDS:g} s, of a core ({beside}) | {of_models['scraping']:.2f} % "
        f"| {MOST_PERCENT:g} % |"
    )
    if not options.quick and (of_keys["ms"] > MOST_MILLISECONDS or of_models["scraping"] > MOST_PERCENT):
        sys.exit(1)


if __name__ == "__main__":
    main()
