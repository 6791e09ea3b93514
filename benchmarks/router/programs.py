"""Programs that a benchmark runs: compiled ones, and servers that end with it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SOURCES = Path(__file__).parent
START_SECONDS = 120.0
END_SECONDS = 15.0


class BenchmarkError(Exception):
    """What cannot be measured here, in one line, with the remedy."""


@dataclass(frozen=True)
class Programs:
    engine: Path
    load: Path


@contextlib.contextmanager
def compiled() -> Iterator[Programs]:
    """The engine and the load generator. Raises BenchmarkError where there is no C compiler."""
    with tempfile.TemporaryDirectory(prefix="vllm-unified-benchmark-") as folder:
        yield Programs(*(_compile(SOURCES / f"{name}.c", Path(folder) / name) for name in ("engine", "load")))


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


def _compile(source: Path, program: Path) -> Path:
    found = compiler()
    if not found:
        raise BenchmarkError("no C compiler (cc or gcc); on Debian or Ubuntu: apt-get install gcc libc6-dev")
    done = subprocess.run([found, "-O2", "-o", program, source], capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{source.name} does not compile: {done.stderr.strip()}")
    return program


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@dataclass(frozen=True)
class Server:
    """A program that serves, with the processes that it started."""

    process: psutil.Process

    def cpu_seconds(self) -> float:
        return sum(each.cpu_times().user + each.cpu_times().system for each in self._processes())

    def pss_bytes(self) -> int:
        """Memory, where pages that processes share are counted once."""
        return sum(each.memory_full_info().pss for each in self._processes())

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise BenchmarkError(f"process {self.process.pid} ended by itself") from None


@contextlib.contextmanager
def serving(
    command: Sequence[str | Path], environ: Mapping[str, str], log: Path, is_ready: Callable[[], bool]
) -> Iterator[Server]:
    """The program in a session of its own, from ready to ended. Raises BenchmarkError when it does not get ready."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environ}, cwd=log.parent, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-1500:]
                raise BenchmarkError(f"{command[0]} does not serve; its log ends:\n{said}")
            time.sleep(0.1)
        yield Server(psutil.Process(process.pid))
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    _signal_group(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    _signal_group(process, signal.SIGKILL)  # also what it left behind
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
