"""Pages as images: asked for here, drawn in processes of their own.

PDFium is not thread-safe, hostile files crash and hang what opens them, and the event loop must stay free. A process
that dies or takes too long costs its own page and no other. concurrent.futures' ProcessPoolExecutor loses every task
of the pool when one process dies, and cannot end one that hangs.
"""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import msgspec

from vllm_unified.documents.kinds import Kind
from vllm_unified.documents.page import Box
from vllm_unified.documents.problems import DocumentError

Rotation = Literal[0, 90, 180, 270]

WAIT_PER_SECOND = 10
START_SECONDS = 120.0
END_SECONDS = 5.0  # for one that has hung up
TASKS_OF_A_PROCESS = 1000  # then a new one takes over: what the libraries leak does not add up
LONGEST_ANSWER = 256 << 20  # bytes
# Codes of errors that are the process' end
CRASHED, OUT_OF_MEMORY, TOO_SLOW = "render_crashed", "out_of_memory", "too_slow"
FRAME = struct.Struct(">I")  # what is sent to a process and back: the length in bytes, then MessagePack
# This very package, whatever lies in the working directory.
IMPORTS = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONSAFEPATH": "1"}
# All that a process which opens strangers' files is told of the environment, where the keys and tokens are.
INHERITED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME")
# Threads and their arenas count against the limit of address space, the more the more cores there are.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
QUIET = {"PYTHONWARNINGS": "ignore"}  # Pillow's, of files that are odd


class Limits(msgspec.Struct, frozen=True):
    """`memory_mib`: address space of a process. `task_seconds`: a core's time. `max_pixels`: of an image as stored."""

    memory_mib: int
    task_seconds: float
    max_pages: int
    max_pixels: int


class Inspect(msgspec.Struct, frozen=True, tag=True):
    path: str
    kind: Kind
    password: str


class Render(msgspec.Struct, frozen=True, tag=True):
    path: str
    kind: Kind
    number: int
    dpi: float
    longest_side: int | None
    shortest_side: int | None
    password: str
    rotation: Rotation


class Crop(msgspec.Struct, frozen=True, tag=True):
    image: bytes
    boxes: tuple[Box, ...]


Task = Inspect | Render | Crop


class Inspected(msgspec.Struct, frozen=True, tag=True):
    """`width`, `height`: of the first page, upright; points (1/72 inch) of a PDF's, pixels of an image.

    `warnings`: what of the file will not be read, in words for the client.
    """

    pages: int
    width: float
    height: float
    warnings: tuple[str, ...] = ()


class Rendered(msgspec.Struct, frozen=True, tag=True):
    """`image`: JPEG, or PNG where the page is small or bilevel; RGB or bilevel, upright, `width` x `height` pixels.

    `text`: the text layer of a PDF's page, at most 1 MiB; "" of an image. `scale`: pixels of `image` per point of the
    PDF's page, or per pixel of the image that was given. `blank`: of one colour, so that there is nothing to read.
    """

    image: bytes
    media_type: Literal["image/jpeg", "image/png"]
    width: int
    height: int
    scale: float
    text: str = ""
    blank: bool = False


class Cropped(msgspec.Struct, frozen=True, tag=True):
    images: tuple[bytes, ...]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A DocumentError of the other process."""

    status: int
    message: str
    code: str


Answer = TypeVar("Answer", Inspected, Rendered, Cropped)


class Renderer:
    """`processes` at once, each started when there is work for it; entered before use.

    `task_seconds`: how long a core may work on one page; it may be ten times as long by the clock, as the processes
    get what others leave of a busy machine. They run at low priority, under a limit of memory, with
    nothing of the service's sockets and secrets, and end with the service.
    """

    def __init__(
        self,
        processes: int,
        *,
        memory_mib: int = 1536,
        task_seconds: float = 60.0,
        max_pages: int = 5000,
        max_pixels: int = 100_000_000,
    ) -> None:
        self._limits = Limits(memory_mib, task_seconds, max_pages, max_pixels)
        self._longest_wait = WAIT_PER_SECOND * task_seconds
        self._slots = asyncio.Semaphore(processes)
        self._idle: list[Worker] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """No task may be under way any more."""
        while self._idle:
            await self._idle.pop().end()

    async def inspect(self, path: Path, kind: Kind, password: str = "") -> Inspected:
        """Raises DocumentError: 400 password_required, password_wrong; 413 too_many_pages, too_many_pixels;
        422 damaged_file, no_pages, unsupported_encryption, and those of a process that ends (see `render`).
        """
        return await self._ask(Inspect(str(path), kind, password), "the file", Inspected)

    async def render(
        self,
        path: Path,
        kind: Kind,
        number: int,
        *,
        dpi: float = 144,
        longest_side: int | None = None,
        shortest_side: int | None = None,
        password: str = "",
        rotation: Rotation = 0,
    ) -> Rendered:
        """Page `number`, from 1.

        A PDF is drawn at `dpi`: at more where its shortest side would have less than `shortest_side` pixels, at less
        where its longest would have more than `longest_side`, or the page more than 40 million pixels. An image keeps
        its pixels, and is only ever made smaller. `rotation`: degrees clockwise, beyond what the file itself says.

        Raises DocumentError as `inspect` does, and 400 no_such_page; 422 damaged_page, too_slow, render_crashed,
        out_of_memory; 503 renderer_unavailable.
        """
        task = Render(str(path), kind, number, dpi, longest_side, shortest_side, password, rotation)
        return await self._ask(task, f"page {number}", Rendered)

    async def crop(self, image: bytes, boxes: Sequence[Box]) -> list[bytes]:
        """A JPEG of each box of an image that `render` made; boxes that reach out of it are clamped.

        Raises DocumentError 413 too_many_figures, and those of a process that ends.
        """
        return list((await self._ask(Crop(image, tuple(boxes)), "the figures of a page", Cropped)).images)

    async def _ask(self, task: Task, what: str, answer: type[Answer]) -> Answer:
        async with self._slots:
            worker = await self._worker()
            fresh = not worker.tasks
            told = await self._told(worker, task, what, answer)
            # A process that has read other files may have ended, or be full, for what it met there.
            if isinstance(told, Refused) and told.code in (CRASHED, OUT_OF_MEMORY) and not fresh:
                told = await self._told(await Worker.start(self._limits), task, what, answer)
        if isinstance(told, Refused):
            raise DocumentError(told.status, told.message, code=told.code)
        return told

    async def _worker(self) -> "Worker":
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            await worker.end()
        return await Worker.start(self._limits)

    async def _told(self, worker: "Worker", task: Task, what: str, answer: type[Answer]) -> Answer | Refused:
        """The worker is at rest again afterwards, or has ended."""
        told: Answer | Refused
        try:
            async with asyncio.timeout(self._longest_wait):
                received = await worker.ask(msgspec.msgpack.encode(task))
            told = msgspec.msgpack.decode(received, type=answer | Refused)
        except TimeoutError:
            await worker.end()
            return self._too_slow(what)
        except (OSError, asyncio.IncompleteReadError, msgspec.DecodeError):
            status = await worker.end()
            return self._too_slow(what) if status == -signal.SIGPROF else crashed(what, status)
        except BaseException:
            await worker.end()
            raise
        if worker.tasks >= TASKS_OF_A_PROCESS or (isinstance(told, Refused) and told.code == OUT_OF_MEMORY):
            await worker.end()
        else:
            self._idle.append(worker)
        return told

    def _too_slow(self, what: str) -> Refused:
        message = f"{what} was given up: it took longer than {self._limits.task_seconds:g} s"
        return Refused(422, message, TOO_SLOW)


def crashed(what: str, status: int) -> Refused:
    message = f"{what} was given up: its process ended ({words_of(status)}); it is damaged, or wants too much memory"
    return Refused(422, message, CRASHED)


def words_of(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


class Worker:
    """One process that runs raster.py, and does one task after the other."""

    def __init__(self, process: Process, incoming: asyncio.StreamReader, outgoing: asyncio.StreamWriter) -> None:
        self._process = process
        self._incoming = incoming
        self._outgoing = outgoing
        self.tasks = 0

    @classmethod
    async def start(cls, limits: Limits) -> Self:
        """Ready for its first task. Raises DocumentError 503."""
        try:
            worker = await cls._spawn(limits)
        except OSError as error:
            raise _unavailable(str(error)) from None
        try:
            async with asyncio.timeout(START_SECONDS):
                await worker._receive()
        except (OSError, asyncio.IncompleteReadError):  # TimeoutError is an OSError
            raise _unavailable(words_of(await worker.end())) from None
        except BaseException:
            await worker.end()
            raise
        return worker

    @classmethod
    async def _spawn(cls, limits: Limits) -> Self:
        """Raises OSError."""
        environment = (
            {name: os.environ[name] for name in INHERITED if name in os.environ} | IMPORTS | ONE_THREAD | QUIET
        )
        argv = (sys.executable, "-m", "vllm_unified.documents.raster", msgspec.json.encode(limits).decode())
        # Not asyncio's pipes: they stay open when a start is cancelled half-way, or what came is not read to its end.
        ours, theirs = socket.socketpair()
        with theirs:
            incoming, outgoing = await asyncio.open_unix_connection(sock=ours, limit=1 << 20)
            try:
                process = await asyncio.create_subprocess_exec(
                    *argv, stdin=theirs.fileno(), stdout=theirs.fileno(), env=environment
                )
            except BaseException:
                outgoing.close()
                raise
        return cls(process, incoming, outgoing)

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None and not self._has_hung_up

    @property
    def _has_hung_up(self) -> bool:
        return self._incoming.at_eof() or self._incoming.exception() is not None

    async def ask(self, task: bytes) -> bytes:
        """Raises OSError or asyncio.IncompleteReadError when the process ends before it has answered."""
        self.tasks += 1
        self._outgoing.write(FRAME.pack(len(task)) + task)
        await self._outgoing.drain()
        return await self._receive()

    async def _receive(self) -> bytes:
        (length,) = FRAME.unpack(await self._incoming.readexactly(FRAME.size))
        if length > LONGEST_ANSWER:
            raise ConnectionError(f"an answer of {length} bytes")
        return await self._incoming.readexactly(length)

    async def end(self) -> int:
        """The status of the process as subprocess has it; it is killed, where it has not ended by itself."""
        seconds = END_SECONDS if self._has_hung_up else 0
        self._outgoing.transport.abort()
        exited = asyncio.ensure_future(self._process.wait())
        try:
            # Popen.kill would reap one that has just ended, and asyncio never learn its status. Not asyncio.timeout,
            # whose end is a cancellation like ours, when we are cancelled.
            await asyncio.wait([exited], timeout=seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        return await exited


def _unavailable(why: str) -> DocumentError:
    message = f"the process that renders pages did not start ({why}); the service's log says more"
    return DocumentError(503, message, code="renderer_unavailable")
