"""Files as supervisord and the keepers leave them, read together."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_unified.errors import UserError
from vllm_unified.logs import files
from vllm_unified.logs.files import Logs
from vllm_unified.logs.lines import line

BEGAN = 1_795_359_600.0  # 2026-11-22 15:00:00 UTC


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(path: Path, *lines: tuple[float, str] | str, level: str = "info") -> None:
    """A line: seconds after BEGAN and its message, or its whole text."""
    with path.open("a", encoding="utf-8") as file:
        for each in lines:
            file.write(f"{each if isinstance(each, str) else said(*each, level=level)}\n")


def said(at: float, message: str, level: str = "info") -> str:
    return line(level, "router", message, at=BEGAN + at)


def shown(logs: Iterator[files.Entry] | list[files.Entry]) -> list[str]:
    return [each.line.message if each.line else each.raw for each in logs]


def so_far(
    folder: Path, *names: str, since: float | None = None, lines: int | None = None, errors: bool = False
) -> list[str]:
    after = None if since is None else BEGAN + since
    with contextlib.closing(Logs(folder, names, since=after, lines=lines, errors=errors)) as logs:
        return shown(logs.so_far())


def rotate(path: Path) -> None:
    for number in range(8, 0, -1):
        old = path.with_name(f"{path.name}.{number}")
        if old.exists():
            old.rename(path.with_name(f"{path.name}.{number + 1}"))
    path.rename(path.with_name(f"{path.name}.1"))


def test_all_files_in_the_order_of_time(folder: Path) -> None:
    write(folder / "chat.log", (1, "a"), (3, "c"), (6, "f"))
    write(folder / "router.log", (2, "b"), (5, "e"))
    write(folder / "chat.keeper.log", (4, "d"))
    write(folder / "install.log", "Collecting vllm")
    write(folder / "notes.txt", "no log")
    assert so_far(folder) == list("abcdef")
    assert so_far(folder, "chat") == list("acdf")
    assert so_far(folder, "router", "chat", lines=2) == list("ef")
    assert so_far(folder, "install") == ["Collecting vllm"]


def test_a_name_is_one_of_those_that_there_are(folder: Path) -> None:
    with pytest.raises(UserError, match="no logs yet"):
        Logs(folder / "none", [], since=None, lines=None, errors=False)
    write(folder / "chat.log", (1, "a"))
    with pytest.raises(UserError, match=r'no log of "\.\./chat"; there are: chat'):
        Logs(folder, ["../chat"], since=None, lines=None, errors=False)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 29, 30, 100])
@pytest.mark.parametrize("block", [1, 7, files.BLOCK])
def test_the_last_lines_reach_into_rotated_files(
    folder: Path, count: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK", block)
    for number in range(0, 30, 10):
        if number:
            rotate(folder / "chat.log")
        write(folder / "chat.log", *((at, str(at)) for at in range(number, number + 10)))
    assert so_far(folder, lines=count) == [str(at) for at in range(30)][-count or 30 :]


def test_since_reads_the_rotated_files_that_it_needs(folder: Path) -> None:
    for number in range(0, 30, 10):
        if number:
            os.utime(folder / "chat.log", (BEGAN + number, BEGAN + number))
            rotate(folder / "chat.log")
        write(folder / "chat.log", *((at, str(at)) for at in range(number, number + 10)))
    assert so_far(folder, since=8) == [str(at) for at in range(8, 30)]
    assert so_far(folder, since=25, lines=2) == ["28", "29"]
    # It is not even opened.
    (folder / "chat.log.2").write_text(said(27, "not here") + "\n")
    os.utime(folder / "chat.log.2", (BEGAN, BEGAN))
    assert so_far(folder, since=12)[:2] == ["12", "13"]


def test_only_errors(folder: Path) -> None:
    write(folder / "chat.log", (1, "a"), (2, "b"))
    write(folder / "chat.log", (3, "c"), level="error")
    write(folder / "chat.log", (4, "d"), level="critical")
    write(folder / "chat.log", (5, "e"), level="warning")
    for at, error in enumerate(("", "client", "router", "engine", "documents"), 6):
        write(folder / "router.log", said(at, error).replace("}", f', "error": "{error}"}}'))
    write(folder / "supervisord.log", "2026-11-22T15:01:00Z CRIT could not", "2026-11-22T15:01:01Z INFO spawned")
    wanted = ["c", "d", "router", "engine", "documents", "2026-11-22T15:01:00Z CRIT could not"]
    assert so_far(folder, errors=True) == wanted
    assert so_far(folder, errors=True, lines=4) == wanted[-4:]


def test_a_line_without_a_time_stays_where_it_stands(folder: Path) -> None:
    write(folder / "chat.log", "before all", (2, "b"), "Traceback", "  File", (5, "e"))
    write(folder / "router.log", (1, "a"), (3, "c"), (4, "d"))
    assert so_far(folder) == ["a", "before all", "b", "Traceback", "  File", "c", "d", "e"]


def test_a_file_without_any_time_is_as_old_as_it_is(folder: Path) -> None:
    write(folder / "old.log", "INFO: listening", "INFO: on")
    os.utime(folder / "old.log", (BEGAN + 2, BEGAN + 2))
    write(folder / "router.log", (1, "a"), (3, "c"))
    assert so_far(folder) == ["a", "INFO: listening", "INFO: on", "c"]


@pytest.mark.parametrize(
    ("raw", "at", "level"),
    [
        ("2026-11-22T15:00:07.250Z INFO x", 7.25, "info"),
        ("2026-11-22 16:00:07,250+01:00 CRIT x", 7.25, "critical"),
        ("2026-11-22 16:00:07,250+01:00 CRIT Supervisor is running as root.  Privileges were", 7.25, "info"),
        ("2026/11/22 15:00:07 [error] 17#17: *1 connect() failed", 7, "error"),
        ("time=2026-11-22T15:00:07.250Z level=WARN source=main.go:1 msg=error", 7.25, "warning"),
        ("ts=2026-11-22T15:00:07.250Z caller=main.go:1 level=info", 7.25, "info"),
        ("logger=http t=2026-11-22T15:00:07.25Z level=eror", 7.25, "info"),
        ("2026-99-99 99:99:99,000 INFO x", None, "info"),
        ('{"time": "2026-11-22T15:00:07Z", "level": "loud"}', 7, "info"),
        ('{"time": "2026-11-22T15:00:07Z", "level": "info", "message": ', 7, "info"),
        ('{"time": 7, "message": []}', None, "info"),
        ("{" * 100_000, None, "info"),
        ("[" * 100_000, None, "info"),
        ("", None, "info"),
    ],
)
def test_lines_of_others_and_broken_ones(
    raw: str, at: float | None, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    entry = files.read("x", raw)
    assert (entry.time, entry.level, entry.line) == (0.0 if at is None else BEGAN + at, level, None)


def test_bytes_that_are_no_text_and_endless_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST", 100)
    (folder / "chat.log").write_bytes(b"\xff\x00\n" + b"x" * 250 + b"\n")
    found = so_far(folder)
    assert (found[0], [len(each) for each in found[1:]]) == ("�\x00", [100, 100, 50])


# --- on ---


@pytest.fixture
def following(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """What came since the last call, of all that a test writes between."""
    monkeypatch.setattr(files, "LOOK_SECONDS", 0)
    write(folder / "chat.log", (1, "a"))
    with contextlib.closing(Logs(folder, [], since=None, lines=1, errors=False)) as logs:
        assert shown(logs.so_far()) == ["a"]
        batches = logs.on()
        yield lambda: shown(next(batches))


def test_follow(folder: Path, following: Callable[[], list[str]]) -> None:
    assert following() == []
    write(folder / "chat.log", (3, "c"), (4, "d"))
    write(folder / "router.log", (2, "b"))  # a new one
    assert following() == list("bcd")
    assert following() == []


def test_follow_waits_for_the_end_of_a_line(folder: Path, following: Callable[[], list[str]]) -> None:
    whole = said(2, "b") + "\n"
    with (folder / "chat.log").open("a", buffering=1) as file:
        file.write(whole[:10])
        file.flush()
        assert following() == []
        file.write(whole[10:])
    assert following() == ["b"]


def test_follow_over_a_rotation(folder: Path, following: Callable[[], list[str]]) -> None:
    write(folder / "chat.log", (2, "b"))
    rotate(folder / "chat.log")
    assert following() == ["b"]
    write(folder / "chat.log.1", (3, "c"))  # its writer had not yet seen that
    write(folder / "chat.log", (4, "d"))
    assert following() == list("cd")
    rotate(folder / "chat.log")
    write(folder / "chat.log", (5, "e"))
    assert following() == ["e"]


def test_follow_after_somebody_emptied_the_file(folder: Path, following: Callable[[], list[str]]) -> None:
    (folder / "chat.log").write_text("")
    assert following() == []
    write(folder / "chat.log", (2, "b"))
    assert following() == ["b"]


def test_so_far_of_a_file_that_was_rotated_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening of one file and of the next."""
    write(folder / "chat.log", (1, "a"))
    rotate(folder / "chat.log")
    write(folder / "chat.log", (2, "b"))
    rotated = []

    def open_and_rotate(path: Path, how: str, encoding: str | None = None) -> object:
        file = open(path, how, encoding=encoding)  # noqa: SIM115
        if not rotated:
            rotated.append(path)
            rotate(folder / "chat.log")
            write(folder / "chat.log", (3, "c"))
        return file

    monkeypatch.setattr(Path, "open", open_and_rotate)
    with contextlib.closing(Logs(folder, [], since=None, lines=None, errors=False)) as logs:
        monkeypatch.undo()
        assert shown(logs.so_far()) == list("abc")
