"""Ten thousand requests, every tenth client of which vanishes: nothing stays taken."""

import asyncio
import hashlib
import json
import random
from typing import Literal

import psutil
import yaml

from tests.conftest import eventually
from tests.router.conftest import Deployment
from tests.router.wire import request

REQUESTS, AT_ONCE, MODEL_SLOTS, KEY_SLOTS = 10_000, 64, 16, 48
KEY = "sk-of-many-clients"
EVENT = b'data: {"choices": [{"delta": {"content": "hi"}}]}\n\n'
GAUGES = ("in_flight", "queued", "waiting", "replica_in_flight")
Moment = Literal["in the head", "in the body", "at once", "waiting", "in the answer"]
MOMENTS: tuple[Moment, ...] = ("in the head", "in the body", "at once", "waiting", "in the answer")


async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes the milliseconds that it is told, and streams where it is asked to."""
    try:
        await answer_all(reader, writer)
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.transport.abort()


async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            continue
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        asked = json.loads(await reader.readexactly(length))
        await asyncio.sleep(asked["ms"] / 1000)
        if not asked["stream"]:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            continue
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(5):
            writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
            await asyncio.sleep(asked["ms"] / 1000)
        writer.write(b"0\r\n\r\n")
        await writer.drain()


class Crowd:
    """Clients one after the other: those who wait for their answer share a connection, who vanishes ends it."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.random = random.Random(seed)
        self.statuses: dict[int, int] = {}
        self.vanished = 0
        self.connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, count: int) -> None:
        for number in range(count):
            await self.one(self.random.choice(MOMENTS) if number % 10 == 9 else None)
        self.leave()

    async def one(self, leaves: Moment | None) -> None:
        self.connection = self.connection or await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.connection
        text = asked(ms=self.random.choice([0, 1, 5]), stream=self.random.random() < 0.3)
        places = {"in the head": 40, "in the body": len(text) - 500}
        writer.write(text[: places.get(leaves or "", len(text))])
        if leaves is None:
            self.count(await status_of_whole(reader))
            return
        if leaves == "in the answer":
            await reader.readexactly(20)
        elif leaves != "at once":
            await asyncio.sleep(self.random.choice([0, 0.002, 0.01]))
        self.vanished += 1
        self.leave()

    def count(self, status: int) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def leave(self) -> None:
        if self.connection:
            self.connection[1].transport.abort()
            self.connection = None


def asked(**fields: object) -> bytes:
    body = json.dumps({"model": "chat", "text": "x" * 1000, **fields}).encode()
    text = request("POST", "/v1/chat/completions", f"x-api-key: {KEY}", body=body)
    return b"\r\n".join(line for line in text.split(b"\r\n") if not line.startswith(b"authorization"))


async def status_of_whole(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    if b"chunked" in head:
        await reader.readuntil(b"\r\n0\r\n\r\n")
    else:
        await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
    return int(head[9:12])


async def crowds(port: int, count: int) -> list[Crowd]:
    found = [Crowd(port, seed) for seed in range(AT_ONCE)]
    await asyncio.gather(*(crowd.ask(count // AT_ONCE) for crowd in found))
    return found


async def at_once(port: int, count: int) -> list[int]:
    """What `count` clients get that all ask in one moment, each for 300 ms."""

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asked(ms=300, stream=False))
        status = await status_of_whole(reader)
        writer.transport.abort()
        return status

    return await asyncio.gather(*(one() for _ in range(count)))


def taken(deployment: Deployment) -> dict[str, float]:
    with deployment.client() as client:
        lines = client.get("/metrics").text.splitlines()
    names = tuple(f"vllm_unified_{gauge}{{" for gauge in GAUGES)
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line.startswith(names))}


def test_nothing_stays_taken(deployment: Deployment) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    entry = {"name": "crowd", "hash": f"sha256:{digest}", "max_concurrent": KEY_SLOTS}
    (deployment.project.home / "config" / "keys.yaml").write_text(yaml.safe_dump({"keys": [entry]}))
    model = {"type": "chat", "max_concurrent": MODEL_SLOTS, "max_queue": 1000, "fake": None}
    deployment.start({"chat": model}, access_log=False)
    router = psutil.Process(deployment.processes["router"].pid)
    asyncio.run(_run(deployment, router))


async def _run(deployment: Deployment, router: psutil.Process) -> None:
    port = deployment.ports["router"]
    server = await asyncio.start_server(engine, "127.0.0.1", deployment.ports["chat"])
    try:
        files = router.num_fds()
        await crowds(port, 1_000)
        memory = router.memory_info().rss
        found = await crowds(port, REQUESTS)
        statuses = [sum(crowd.statuses.get(status, 0) for crowd in found) for status in (200, 429)]
        vanished = sum(crowd.vanished for crowd in found)
        assert sum(statuses) + vanished == REQUESTS // AT_ONCE * AT_ONCE
        assert min(*statuses, vanished) > 100, "both limits were reached, and not all the time"
        await asyncio.to_thread(eventually, lambda: set(taken(deployment).values()) == {0.0})
        assert len(taken(deployment)) == len(GAUGES)
        assert await at_once(port, KEY_SLOTS) == [200] * KEY_SLOTS
        assert sorted(await at_once(port, KEY_SLOTS + 1)) == [200] * KEY_SLOTS + [429]
        assert router.memory_info().rss - memory < 20 << 20
        # idle connections to the engine end after four seconds; a health check may be under way
        await asyncio.to_thread(eventually, lambda: router.num_fds() <= files + 1)
    finally:
        server.close()
