"""How far a download or a check is: bars on a terminal, a line every few seconds elsewhere."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from vllm_unified.hub.sums import Progress

SECONDS_BETWEEN_LINES = 5.0
LINES_OF_SPEED = 6


@contextlib.contextmanager
def shown(what: str, files: Sequence[Progress]) -> Iterator[Callable[[], None]]:
    """Yields what shows the state of `files` now; it is called several times a second. On standard error."""
    console = Console(stderr=True)
    with _bars(console, what, files) if console.is_terminal else _lines(console, what, files) as tick:
        yield tick


@contextlib.contextmanager
def _bars(console: Console, what: str, files: Sequence[Progress]) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=console, transient=True, refresh_per_second=5) as bars:
        whole = bars.add_task(what, total=_size(files), completed=_done(files))
        rows = {
            file.file.path: bars.add_task(
                f"  {file.file.path}", total=file.file.size, completed=file.done, visible=False
            )
            for file in files
        }

        def tick() -> None:
            bars.update(whole, completed=_done(files))
            for file in files:
                in_flight = file.started and file.done < file.file.size
                bars.update(rows[file.file.path], completed=file.done, visible=in_flight)

        yield tick


@contextlib.contextmanager
def _lines(console: Console, what: str, files: Sequence[Progress]) -> Iterator[Callable[[], None]]:
    # Times and bytes of the latest lines, from the first byte on: what came before it says nothing of the speed.
    looks: deque[tuple[float, int]] = deque(maxlen=LINES_OF_SPEED)

    def tick() -> None:
        now = time.monotonic()
        if not looks:
            looks.append((now, _done(files)))
        if now - looks[-1][0] < SECONDS_BETWEEN_LINES:
            return
        done, size = _done(files), _size(files)
        began, before = looks[0]
        looks.append((now, done))
        speed = max(0.0, done - before) / (now - began)
        left = f"{duration((size - done) / speed)} left" if speed else "nothing comes"
        console.print(
            f"{what}: {decimal(done)} of {decimal(size)}, {decimal(int(speed))}/s, {left}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    yield tick


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _done(files: Sequence[Progress]) -> int:
    return sum(file.done for file in files)


def _size(files: Sequence[Progress]) -> int:
    return sum(file.file.size for file in files)
