"""What a keeper says of its engine, in run/engines/KEY.json. Written by that keeper alone; read by everyone."""

import json
import os
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import psutil


class Phase(StrEnum):
    WAITING = "waiting"  # for its device
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"  # failed; tries again at `retry_at`
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Process:
    """A process that can't be mistaken for a later one with the same number."""

    pid: int
    started: float  # seconds since the epoch, as the kernel tells it

    @classmethod
    def of(cls, pid: int) -> "Process":
        return cls(pid, psutil.Process(pid).create_time())

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            # the kernel's clock base is rounded, so two readings of one start differ by up to a tick
            return abs(process.create_time() - self.started) < 0.1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True)
class EngineState:
    """Times are seconds since the epoch; `ready_after` is the seconds from start to ready, of the last start."""

    key: str
    phase: Phase
    since: float
    keeper: Process | None = None
    engine: Process | None = None
    scratch: str | None = None
    devices: tuple[str, ...] = ()
    restarts: int = 0
    reason: str | None = None
    retry_at: float | None = None
    ready_after: float | None = None

    def write(self, run: Path) -> None:
        path = _path(run, self.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".json.new")
        unfinished.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(unfinished, path)


def read(run: Path, key: str) -> EngineState:
    """As the keeper left it; `stopped` where there is no keeper, whatever a dead one wrote last."""
    state = read_as_written(run, key)
    if state is None:
        return EngineState(key, Phase.STOPPED, since=time.time())
    if state.phase is not Phase.STOPPED and (state.keeper is None or not state.keeper.is_alive()):
        return EngineState(key, Phase.STOPPED, since=state.since, restarts=state.restarts, reason="its keeper is gone")
    return state


def read_as_written(run: Path, key: str) -> EngineState | None:
    try:
        fields = json.loads(_path(run, key).read_text(encoding="utf-8"))
        fields["phase"] = Phase(fields["phase"])
        for name in ("keeper", "engine"):
            fields[name] = Process(**fields[name]) if fields[name] else None
        fields["devices"] = tuple(fields["devices"])
        return EngineState(**fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _path(run: Path, key: str) -> Path:
    return run / "engines" / f"{key}.json"
