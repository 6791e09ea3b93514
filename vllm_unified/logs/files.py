"""The lines of all files in run/logs together, in the order of their time; those of rotated files too."""

import collections
import heapq
import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec

from vllm_unified.errors import UserError

LONGEST = 1 << 20
BLOCK = 1 << 16
LOOK_SECONDS = 0.25
# Of an installation, which is not the deployment's life: shown where it is asked for.
INSTALLATION = "install"
# supervisord's, nginx' and Prometheus' own lines begin with their time, and say their level next.
TIME = re.compile(r"\d{4}[-/]\d\d[-/]\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,6})?(?:Z|[+-]\d\d:\d\d)?")
TIME_WITHIN = 60
LEVEL = re.compile(r"\b(debug|debg|info|notice|warn|erro|crit|alert|emerg|fatal)", re.IGNORECASE)
LEVEL_WITHIN = 40
LEVELS: dict[str, "Level"] = {"debug": "debug", "debg": "debug", "warn": "warning", "erro": "error"}
LEVELS |= dict.fromkeys(("crit", "alert", "emerg", "fatal"), "critical")

# supervisord calls critical what is meant: its socket is in a folder of ours, with the mode 0700.
MEANT = ("Supervisor is running as root", "Server 'unix_http_server' running without any HTTP authentication")

Level = Literal["debug", "info", "warning", "error", "critical"]


class Line(msgspec.Struct, gc=False):
    """What is shown of a line of JSON. Those of the access log have a `duration_us`."""

    time: Annotated[datetime, msgspec.Meta(tz=True)]
    level: Level = "info"
    source: str = ""
    model: str = ""
    message: str = ""
    exception: str = ""
    path: str = ""
    key: str = ""
    status: int = 0
    error: str = ""
    duration_us: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """`name`: of the file. `time`: seconds since 1970; a line that has none has that of the line before it.

    `level`: of a request that failed, and not by its client, "error". `line`: None where it is no JSON of ours.
    """

    name: str
    time: float
    level: Level
    raw: str
    line: Line | None

    @property
    def is_error(self) -> bool:
        return self.level in ("error", "critical")


def names(folder: Path) -> list[str]:
    """What has a log: models, the router …"""
    return sorted({_name(path) for path in folder.glob("*.log")})


def _name(path: Path) -> str:
    return path.stem.removesuffix(".keeper")  # what a keeper writes when it can't be one


class Logs:
    """The logs of some names, or of all but the installation's.

    Raises UserError for a name that has no log, and when there are no logs.
    """

    def __init__(
        self, folder: Path, wanted: Sequence[str], *, since: float | None, lines: int | None, errors: bool
    ) -> None:
        """`since`: seconds since 1970. `lines`: that many of the last ones."""
        self._folder = folder
        self._wanted = frozenset(wanted)
        self._since = since
        self._errors = errors
        there = names(folder)
        if not there:
            raise UserError("no logs yet; start it with ./deploy.sh start")
        for name in wanted:
            if name not in there:
                raise UserError(f'no log of "{name}"; there are: {", ".join(there)}')
        self._lines = lines
        # Where some are left out, the last few can be anywhere.
        at_most = None if errors else lines
        self._files = {path: _File(path, since, at_most) for path in self._paths()}

    @property
    def width(self) -> int:
        """Of the longest name."""
        return max(len(_name(path)) for path in self._files)

    def so_far(self) -> Iterator[Entry]:
        merged = self._chosen(heapq.merge(*(each.entries() for each in self._files.values()), key=_time))
        return merged if self._lines is None else iter(collections.deque(merged, self._lines))

    def on(self) -> Iterator[list[Entry]]:
        """What comes from now on, as it comes; it never ends."""
        while True:
            new = [path for path in self._paths() if path not in self._files]
            self._files |= {path: _File(path, None, None) for path in new}
            came = itertools.chain.from_iterable(each.entries(whole=True) for each in self._files.values())
            yield sorted(self._chosen(came), key=_time)
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        for each in self._files.values():
            each.close()

    def _paths(self) -> list[Path]:
        there = [(path, _name(path)) for path in sorted(self._folder.glob("*.log"))]
        return [path for path, name in there if (name in self._wanted if self._wanted else name != INSTALLATION)]

    def _chosen(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        since = self._since or 0.0
        return (each for each in entries if each.time >= since and (each.is_error or not self._errors))


def _time(entry: Entry) -> float:
    return entry.time


class _File:
    """NAME.log and what it was rotated to, NAME.log.1 …, from the oldest wanted line on."""

    def __init__(self, path: Path, since: float | None, lines: int | None) -> None:
        self._path = path
        self._name = _name(path)
        self._last: float | None = None
        self._open = _opened(path, since, lines)

    def entries(self, *, whole: bool = False) -> Iterator[Entry]:
        """Those that came since it was asked last. `whole`: a line without its end is left for the next time."""
        without_time: list[Entry] = []
        for raw in self._raw_lines(whole):
            entry = read(self._name, raw.decode("utf-8", "replace").rstrip("\r\n"))
            if entry.time:
                self._last = entry.time
                yield from (replace(each, time=entry.time) for each in without_time)
                without_time = []
                yield entry
            elif self._last is not None:
                yield replace(entry, time=self._last)
            else:
                without_time.append(entry)
        if without_time:
            written = self._path.stat().st_mtime if self._path.exists() else time.time()
            yield from (replace(each, time=written) for each in without_time)

    def close(self) -> None:
        for each in self._open:
            each.close()

    def _raw_lines(self, whole: bool) -> Iterator[bytes]:
        while self._open:
            yield from _rest(self._open[0], whole and len(self._open) == 1)
            if len(self._open) == 1 and not self._goes_on_in_another():
                return
            # It was rotated. What came between the two looks is there now.
            yield from _rest(self._open[0], whole=False)
            self._open.popleft().close()

    def _goes_on_in_another(self) -> bool:
        """Opens it."""
        try:
            there = self._path.stat()
        except FileNotFoundError:  # in the middle of a rotation
            return False
        mine = os.fstat(self._open[0].fileno())
        if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            self._open.append(self._path.open("rb"))
            return True
        if there.st_size < self._open[0].tell():  # somebody has emptied it
            self._open[0].seek(0)
        return False


def _opened(path: Path, since: float | None, lines: int | None) -> collections.deque[BinaryIO]:
    """The oldest first. What ended before `since` is left out, and what is before the last `lines`.

    They are opened from the newest on: a rotation meanwhile would hide one the other way round.
    """
    opened: collections.deque[BinaryIO] = collections.deque()
    seen: set[int] = set()
    for number in itertools.count():
        try:
            file = path.with_name(f"{path.name}.{number}").open("rb") if number else path.open("rb")
        except FileNotFoundError:
            if number:
                return opened
            continue
        status = os.fstat(file.fileno())
        if status.st_ino in seen:
            file.close()
            continue
        if number and since is not None and status.st_mtime < since:
            file.close()
            return opened
        seen.add(status.st_ino)
        opened.appendleft(file)
        if lines is not None:
            lines -= _go_before_last(file, lines)
            if lines <= 0:
                return opened
    return opened


def _go_before_last(file: BinaryIO, lines: int) -> int:
    """Returns how many there are, at most `lines`."""
    left = file.seek(0, os.SEEK_END)
    found = -1  # the end of the last one begins none
    while left > 0:
        size = min(BLOCK, left)
        left -= size
        file.seek(left)
        block = file.read(size)
        at = len(block)
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            found += 1
            if found == lines:
                file.seek(left + at + 1)
                return lines
    file.seek(0)
    return found + 1


def _rest(file: BinaryIO, whole: bool) -> Iterator[bytes]:
    while raw := file.readline(LONGEST):
        if whole and not raw.endswith(b"\n") and len(raw) < LONGEST:
            file.seek(-len(raw), os.SEEK_CUR)
            return
        yield raw


DECODER = msgspec.json.Decoder(Line)


def read(name: str, raw: str) -> Entry:
    """One line of the file of that name. Its time is 0 where it says none."""
    if raw.startswith("{"):
        try:
            line = DECODER.decode(raw)
            return Entry(name, line.time.timestamp(), _level(line), raw, line)
        except (ValueError, RecursionError, OverflowError):  # of another program, or torn
            pass
    found = TIME.search(raw, 0, TIME_WITHIN)
    if not found:
        return Entry(name, 0.0, "info", raw, None)
    said = LEVEL.search(raw, found.end(), found.end() + LEVEL_WITHIN)
    level = LEVELS.get(said[1].lower(), "info") if said and not any(each in raw for each in MEANT) else "info"
    return Entry(name, _seconds(found[0]), level, raw, None)


def _level(line: Line) -> Level:
    return "error" if line.error not in ("", "client") else line.level


def _seconds(moment: str) -> float:
    """Since 1970, of a time that is local where it does not say its zone; 0 where there is no such time."""
    try:
        return datetime.fromisoformat(moment.replace("/", "-").replace(",", ".")).timestamp()
    except (ValueError, OverflowError):
        return 0.0
