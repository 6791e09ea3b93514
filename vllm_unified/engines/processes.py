"""Starting a process group, waiting for signals, and ending all that came of it so that nothing is left."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from vllm_unified.state import Process

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
WAKING_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
# In the environment of every process of an engine. vLLM's processes give themselves titles, which setproctitle writes
# over the environment, unless it is told to leave that alone.
MARK = "VLLM_UNIFIED_ENGINE"
KEEP_ENVIRONMENT = {"SPT_NOENV": "1"}
STUCK_SECONDS = 10.0

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


def start_group(
    argv: Sequence[str], environment: Mapping[str, str], folder: Path, descriptors: Sequence[int]
) -> "subprocess.Popen[bytes]":
    """The leader of a new process group; its stdout and stderr in one pipe. It inherits `descriptors`.

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
        pass_fds=descriptors,
        start_new_session=True,
        preexec_fn=_in_child,
    )


def _in_child() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WAKING_SIGNALS)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_descendants(on_stuck: Callable[[Sequence[int]], object]) -> None:
    """SIGKILL to all below us, until nothing is; a keeper has no descendants but its engine's.

    As their subreaper we adopt every orphan among them, whatever group or session it went into. A process in
    uninterruptible sleep, in a driver mostly, ends when that lets it: `on_stuck` hears the pids once, and we go on.
    """
    stuck_at = time.monotonic() + STUCK_SECONDS
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _reap()
        if time.monotonic() > stuck_at:
            on_stuck([process.pid for process in left])
            stuck_at = float("inf")
        time.sleep(0.02)


def end_left_over(leader: Process, mark: str) -> bool:
    """End what a killed predecessor left of its engine; True if there was something.

    Known by the mark that only this engine's processes carry, and by not being older than its `leader`.
    """
    members = [process for process in psutil.process_iter() if _belongs_to(process, leader, mark)]
    for process in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(members, timeout=30)
    return bool(members)


def _belongs_to(process: psutil.Process, leader: Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and Process.of(process.pid).started >= leader.started
    except (psutil.Error, OSError):
        return False


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
