"""Starting a process group, waiting for signals, and ending a group so that nothing of it is left."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from vllm_unified.state import Process

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
WAKING_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
# In the environment of every process of an engine: a group is ended only where its members carry it.
MARK = "VLLM_UNIFIED_ENGINE"

_libc = ctypes.CDLL(None, use_errno=True)


def become_parent() -> None:
    """Wait for signals instead of being interrupted by them; adopt orphaned grandchildren."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WAKING_SIGNALS)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """SIGTERM to us when our parent ends, so that a killed supervisord leaves nothing running."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_for_signal(seconds: float) -> int | None:
    """The signal that came within `seconds`, or None."""
    received = signal.sigtimedwait(WAKING_SIGNALS, max(0.0, seconds))
    return received.si_signo if received else None


def start_group(argv: Sequence[str], environment: Mapping[str, str], folder: Path) -> "subprocess.Popen[bytes]":
    """The leader of a new process group; its stdout and stderr in one pipe.

    It gets SIGTERM when its keeper dies. SIGTERM and not SIGKILL, because vLLM's API server then ends
    its EngineCore and workers too; killed, it would leave them holding the memory.
    """
    return subprocess.Popen(
        argv,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_in_child,
    )


def _in_child() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WAKING_SIGNALS)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_group(group: int) -> None:
    """SIGKILL to what is left of the group; returns when nothing is."""
    while _signal_group(group, signal.SIGKILL):
        _reap(group)
        time.sleep(0.02)


def end_descendants() -> None:
    """SIGKILL to what left the group by a session of its own; a keeper has no children but its engine's."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def end_left_over(leader: Process, mark: str) -> bool:
    """End the group that a killed predecessor left behind; True if there was one.

    Known by its number, by not being older than its leader, and by the mark that only our engines carry:
    the number alone could be somebody else's by now.
    """
    members = [process for process in psutil.process_iter() if _belongs_to(process, leader, mark)]
    for process in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(members, timeout=30)
    return bool(members)


def _belongs_to(process: psutil.Process, leader: Process, mark: str) -> bool:
    try:
        return (
            os.getpgid(process.pid) == leader.pid
            and Process.of(process.pid).started >= leader.started
            and process.environ().get(MARK) == mark
        )
    except (psutil.Error, OSError):
        return False


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _reap(group: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
