"""What a keeper says of its engine, in run/engines/KEY.json. Written by that keeper alone; read by everyone.

Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share and no step of the clock moves;
`wall_clock` turns one into a date for people.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

# A file of this size is written over in place where the disk has no room for a new one.
FILE_BYTES = 4096


class Phase(StrEnum):
    WAITING = "waiting"  # for its turn on its device, or for memory there
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # the router sends nothing more; requests in flight end
    STOPPING = "stopping"
    BACKOFF = "backoff"  # failed; tries again at `retry_at`
    STOPPED = "stopped"


@dataclass(frozen=True)
class Process:
    """A process that can't be mistaken for a later one with the same number.

    `started` is in clock ticks since the machine's start: a date would move with the clock.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Raises ProcessLookupError when there is none."""
        found = _stat(pid)
        if found is None:
            raise ProcessLookupError(pid)
        return cls(pid, found[1])

    def is_alive(self) -> bool:
        found = _stat(self.pid)
        return found is not None and found[1] == self.started and found[0] not in "ZX"


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start in ticks: fields 3 and 22 of proc(5). The name before them may hold anything."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class EngineState:
    """`reason`: why the engine failed last. `note`: what is being waited for, or what looks wrong, now.

    `ready_after`: seconds from start to ready, of the last start. `down_for`: seconds from not ready to ready again, of
    the last restart. `hangs`: restarts, among `restarts`, of an engine that hung. `retry_at` is set in back-off alone.
    """

    key: str
    phase: Phase
    since: float
    keeper: Process | None = None
    engine: Process | None = None
    scratch: str | None = None
    devices: tuple[str, ...] = ()
    restarts: int = 0
    reason: str | None = None
    note: str | None = None
    retry_at: float | None = None
    ready_after: float | None = None
    hangs: int = 0
    down_for: float | None = None

    @property
    def is_kept(self) -> bool:
        return self.keeper is not None and self.keeper.is_alive()

    def write(self, run: Path) -> None:
        """Raises OSError where not even the file that is there can be written."""
        path = path_of(run, self.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self)).ljust(FILE_BYTES)
        unfinished = path.with_suffix(".json.new")
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        except OSError:  # disk full: an old state that looks true would be worse than a moment without one
            with path.open("r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()


def wall_clock(monotonic: float) -> float:
    """Seconds since the epoch, by today's clock, to a tenth."""
    return round(time.time() - (time.monotonic() - monotonic), 1)


def read(run: Path, key: str) -> EngineState:
    """As the keeper left it; `stopped` where there is no keeper, whatever a dead one wrote last."""
    state = read_as_written(run, key)
    if state is None:
        return EngineState(key, Phase.STOPPED, since=time.monotonic())
    if state.phase is not Phase.STOPPED and not state.is_kept:
        return EngineState(key, Phase.STOPPED, since=state.since, restarts=state.restarts, reason="its keeper is gone")
    return state


def read_as_written(run: Path, key: str) -> EngineState | None:
    try:
        fields = json.loads(path_of(run, key).read_text(encoding="utf-8"))
        fields["phase"] = Phase(fields["phase"])
        for name in ("keeper", "engine"):
            fields[name] = Process(**fields[name]) if fields[name] else None
        fields["devices"] = tuple(fields["devices"])
        return EngineState(**fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def path_of(run: Path, key: str) -> Path:
    return run / "engines" / f"{key}.json"
