"""The parent of one vLLM server: waits for its device, starts it, restarts it, leaves nothing of it behind.

A process of its own, `python -m vllm_unified.engines.keeper KEY DESCRIPTOR`, which the command `engine` turns into;
the descriptor holds its orders.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from vllm_unified import loopback, state
from vllm_unified.devices import GIB, Device, read_devices
from vllm_unified.engines import locks, processes, progress
from vllm_unified.engines.log import EngineLog
from vllm_unified.engines.orders import Orders
from vllm_unified.engines.progress import Counters
from vllm_unified.errors import UserError
from vllm_unified.logs.lines import end, write_json
from vllm_unified.state import EngineState, Phase, Process

POLL_SECONDS = 0.3
HEALTH_SECONDS = 5.0
FIRST_BACKOFF_SECONDS = 1.0
HEALTHY_SECONDS = 600.0
# The router looks at the states four times a second.
NOTICE_SECONDS = 0.6
# Beyond the drain: what vLLM takes to end its own processes when nothing is in flight (measured: 8 s).
LEAVING_SECONDS = 15.0
# All keepers are started together; one that starts earlier than us may need this long to say that it is there.
COMING_SECONDS = 10.0
# A neighbour's clean-up takes seconds; what is held for longer belongs to somebody who stays.
MEMORY_SECONDS = 60.0
SETTLED_BYTES = 64 << 20
SETTLED_READINGS = 2
SETTLING_SECONDS = 30.0

Result = TypeVar("Result")


class _StopRequested(Exception):
    """SIGTERM or SIGINT came."""


class Keeper:
    """Runs until it is told to stop, in the main thread of its own process."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.run_folder = Path(orders.run)
        self.log = EngineLog(self.run_folder / "logs" / f"{orders.key}.log")
        self.mark = f"{orders.home}:{orders.key}"
        self.born = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        self.reader: threading.Thread | None = None
        self.failures_in_a_row = 0
        self.down_since: float | None = None
        self.lock_folder = self.run_folder / "locks"
        self.device_locks = [seat.lock for seat in orders.seats]
        self.state = EngineState(
            key=orders.key,
            phase=Phase.WAITING,
            since=time.monotonic(),
            keeper=Process.of(os.getpid()),
            devices=tuple(seat.label for seat in orders.seats),
        )

    def run(self) -> None:
        """Raises UserError when another keeper has this engine already."""
        with locks.owned(self.lock_folder, f"keeper-{self.orders.key}") as owned:
            if not owned:
                raise UserError(f'"{self.orders.key}" has its keeper already; ./deploy.sh restart {self.orders.key}')
            processes.become_parent()
            self._end_predecessors_engine()
            try:
                while True:
                    reason = self._attempt_whatever_happens()
                    self.failures_in_a_row += 1
                    self.state = replace(self.state, reason=reason, note=None, restarts=self.state.restarts + 1)
                    self.log.say(f"not running: {reason}", "error")
                    self._back_off()
            except _StopRequested:
                self._leave()

    def _attempt_whatever_happens(self) -> str:
        try:
            reason = self._attempt()
        except _StopRequested:
            raise
        except Exception as error:  # a keeper that ends would leave its model without one
            self.log.say("the keeper failed", "error", exception=traceback.format_exc())
            reason = f"the keeper failed: {type(error).__name__}: {error}"
        self._end_engine()
        return reason

    def _attempt(self) -> str:
        """Start the engine and watch it; returns why it is gone, or has to go."""
        self._enter(Phase.WAITING)
        pause = partial(self._pause, POLL_SECONDS)
        with locks.held(self.lock_folder, self.device_locks, pause, self._is_our_turn) as descriptors:
            try:
                failure = self._start(descriptors)
            finally:
                if self.state.phase is not Phase.READY:
                    self._end_engine()  # before the next one may start on the device
        if failure:
            return failure
        ready_at = time.monotonic()
        reason = self._watch()
        if time.monotonic() - ready_at > HEALTHY_SECONDS:
            self.failures_in_a_row = 0
        return reason

    # --- waiting ---

    def _is_our_turn(self) -> bool:
        first = next((key for key in self.orders.before_us if self._goes_first(key)), None)
        self._note(f"{first} starts first" if first else None)
        return first is None

    def _goes_first(self, key: str) -> bool:
        other = state.read_as_written(self.run_folder, key)
        if other is None or (not other.is_kept and other.phase is not Phase.STOPPED):
            return time.monotonic() - self.born < COMING_SECONDS
        return other.is_kept and other.phase is Phase.WAITING

    def _wait_for_memory(self) -> str | None:
        """None when every device has what the engine needs, else what is missing after a while."""
        until = time.monotonic() + MEMORY_SECONDS
        try:
            while missing := self._missing_memory():
                self._note(f"waits for memory: {missing}")
                if time.monotonic() > until:
                    return f"{missing}; other programs hold the rest, end them or give this model less"
                self._pause(POLL_SECONDS)
        except UserError as error:
            return str(error)
        self._note(None)
        return None

    def _missing_memory(self) -> str | None:
        for seat, device in zip(self.orders.seats, self._devices(), strict=True):
            if device.free_bytes < seat.needed_bytes:
                free, needed = device.free_bytes / GIB, seat.needed_bytes / GIB
                return f"{seat.label} has {free:.1f} GiB free, {needed:.1f} are needed"
        return None

    def _devices(self) -> list[Device]:
        """Those of the seats, as they are now. Raises UserError when one is no longer there."""
        file = Path(self.orders.devices_file) if self.orders.devices_file else None
        present = {device.handle: device for device in read_devices(self.orders.visible_devices, file)}
        gone = [seat.label for seat in self.orders.seats if seat.handle not in present]
        if gone:
            raise UserError(f"{' and '.join(gone)}: the driver does not show it any more; look at `nvidia-smi`")
        return [present[seat.handle] for seat in self.orders.seats]

    # --- starting ---

    def _start(self, lock_descriptors: Sequence[int]) -> str | None:
        """None when the engine is ready, else why it is not."""
        failure = port_taken(self.orders.host, self.orders.port) or self._missing_weights() or self._wait_for_memory()
        if failure:
            return failure
        began = time.monotonic()
        deadline = began + self.orders.startup_timeout
        failure = (
            self._launch(lock_descriptors) or self._wait_for_health(deadline) or self._wait_for_first_answer(deadline)
        )
        if failure is None:
            self._enter_ready(began)
            self.log.say(f"ready after {self.state.ready_after} s")
            self.log.forget()
        return failure

    def _enter_ready(self, began: float) -> None:
        now = time.monotonic()
        down_for = self.state.down_for if self.down_since is None else round(now - self.down_since, 1)
        self.down_since = None
        self._enter(Phase.READY, reason=None, note=None, ready_after=round(now - began, 1), down_for=down_for)

    def _missing_weights(self) -> str | None:
        if Path(self.orders.weights).is_dir():
            return None
        return f"{self.orders.weights}: no such folder; put the weights there"

    def _launch(self, lock_descriptors: Sequence[int]) -> str | None:
        # vLLM leaves sockets in TMPDIR when it is killed; in a folder of its own they go with it.
        scratch = tempfile.mkdtemp(prefix=f"vllm-unified-{self.orders.key}-")
        environment = {
            **self.orders.environment,
            **processes.KEEP_ENVIRONMENT,
            processes.MARK: self.mark,
            "TMPDIR": scratch,
            "PYTHONUNBUFFERED": "1",
        }
        self.state = replace(self.state, scratch=scratch)
        try:
            self.process = processes.start_group(
                self.orders.argv, environment, Path(self.orders.home), lock_descriptors
            )
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            self.state = replace(self.state, scratch=None)
            return f"{self.orders.argv[0]}: {(error.strerror or str(error)).lower()}; is vLLM installed?"
        self.reader = self.log.follow(self.process)
        self._enter(Phase.STARTING, engine=Process.of(self.process.pid))
        self.log.say(f"started process {self.process.pid}")
        return None

    def _wait_for_health(self, deadline: float) -> str | None:
        while time.monotonic() < deadline:
            if self._has_exited():
                return self._exit_reason()
            if self._off_thread(lambda: is_healthy(self.orders.url)):
                return None
            self._pause(POLL_SECONDS)
        return self._too_late()

    def _wait_for_first_answer(self, deadline: float) -> str | None:
        """A server that answers its health check may still fail at the first thing it is asked."""
        self._note("answers its health check; asked for its first answer")
        try:
            refused = self._off_thread(lambda: self._smallest_request(max(1.0, deadline - time.monotonic())))
        except TimeoutError:
            return self._too_late()
        except OSError as error:
            self._pause(POLL_SECONDS)  # an engine that dies takes a moment to be seen as dead
            return self._exit_reason() if self._has_exited() else f"its first answer never came: {error}"
        return f"its first answer is an error: {refused}" if refused else None

    def _too_late(self) -> str:
        said = self.log.reason()
        limit = f"not ready after {self.orders.startup_timeout:.0f} s (startup_timeout)"
        return f"{limit}; last: {said}" if said else limit

    # --- watching ---

    def _watch(self) -> str:
        """Returns why the engine is gone, or has to go."""
        check = self.orders.progress
        misses = 0
        if not check.enabled or not self._has_counters():
            self._pause_unless_exited(float("inf"))
        while not self._has_exited():
            before = self._counters()
            self._pause_unless_exited(check.interval)
            if self._has_exited() or self._made_progress(before):
                misses = 0
                self._note(None)
                continue
            misses += 1
            self._note(f"no progress, {misses} of {check.misses} looks in a row")
            self.log.say(str(self.state.note), "warning")
            if misses >= check.misses and not self._has_exited():
                self.state = replace(self.state, hangs=self.state.hangs + 1)
                return f"hung: its server answers, but {misses} looks of {check.timeout:g} s saw no progress"
        return self._exit_reason()

    def _has_counters(self) -> bool:
        """Without them a long queue can't be told from a hang, so no hang is looked for."""
        try:
            found = self._off_thread(lambda: progress.read_counters(self.orders.url))
        except OSError:
            return True
        if found is None:
            self.log.say(
                "the server has no counters (disable-log-stats?): a hang of it would not be noticed", "warning"
            )
        return found is not None

    def _made_progress(self, before: Counters | None) -> bool:
        """Whether its counters moved, or else, when nothing is in it, whether it answers a request of ours.

        An engine in the middle of a long prefill moves no counter and is not asked: it has `timeout` seconds.
        """
        deadline = time.monotonic() + self.orders.progress.timeout
        asked: Future[str | None] | None = None
        pause = 0.02
        while not self._has_exited():
            now = self._counters()
            before = before or now
            if before and now and now.work != before.work:
                return True
            if asked is None and (now is None or now.requests == 0):
                asked = _in_background(lambda: self._smallest_request(self.orders.progress.timeout))
            if asked and asked.done():
                return asked.exception() is None and asked.result() is None
            if time.monotonic() > deadline:
                return False
            pause = min(pause * 2, POLL_SECONDS)
            self._pause(pause)
        return True

    def _counters(self) -> Counters | None:
        """None also when the server does not answer: then the request of ours decides."""
        try:
            return self._off_thread(lambda: progress.read_counters(self.orders.url))
        except OSError:
            return None

    def _smallest_request(self, timeout: float) -> str | None:
        orders = self.orders
        traces = "--otlp-traces-endpoint" in orders.argv
        return progress.smallest_request(orders.url, orders.kind, orders.name, orders.api_key, timeout, traces=traces)

    def _off_thread(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises; meanwhile we hear when we are told to stop."""
        asked = _in_background(work)
        pause = 0.002
        while not asked.done():
            self._pause(pause)
            pause = min(pause * 2, POLL_SECONDS)
        return asked.result()

    def _pause(self, seconds: float) -> None:
        """Wait, at most until a child ends. Raises _StopRequested when we are told to stop."""
        if processes.wait_for_signal(seconds) in (signal.SIGTERM, signal.SIGINT):
            raise _StopRequested

    def _pause_unless_exited(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._has_exited() and (left := until - time.monotonic()) > 0:
            self._pause(min(left, 60.0))  # SIGCHLD ends a pause at once

    def _has_exited(self) -> bool:
        return self.process is None or self.process.poll() is not None

    # --- ending ---

    def _exit_reason(self) -> str:
        code = self.process.returncode if self.process else None
        self._end_engine()
        said = self.log.reason(code)
        return f"{said} ({_how(code)})" if said else _how(code)

    def _end_engine(self) -> None:
        """Nothing of it is left when this returns, its memory is back, and all that it wrote is in the log."""
        if self.process is None:
            return
        if self.state.phase is Phase.READY:
            self.down_since = time.monotonic()
        self._enter(Phase.STOPPING)
        self.process.poll()
        processes.end_descendants(self._tell_stuck)
        self.process.wait()
        self.process = None  # its number may be somebody else's from here on
        if self.reader:
            self.reader.join(timeout=5)
        if self.state.scratch:
            shutil.rmtree(self.state.scratch, ignore_errors=True)
        self._wait_for_memory_back()
        self.state = replace(self.state, engine=None, scratch=None, note=None)
        self._write_state()

    def _tell_stuck(self, pids: Sequence[int]) -> None:
        self._note(f"process {', '.join(map(str, pids))} can't be ended: it is inside the kernel, mostly in a driver")
        self.log.say(str(self.state.note), "error")

    def _wait_for_memory_back(self) -> None:
        """A driver gives back what a killed process held some time after the process: wait until that settles."""
        until = time.monotonic() + SETTLING_SECONDS
        readings = [self._free_on_gpus()]
        while readings[-1] and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            readings.append(self._free_on_gpus())
            if len(readings) > SETTLED_READINGS and readings[-1] - readings[-1 - SETTLED_READINGS] < SETTLED_BYTES:
                return

    def _free_on_gpus(self) -> int:
        """Of the CPU's memory nothing is held when a process has ended: 0."""
        try:
            return sum(device.free_bytes for device in self._devices() if device.kind == "cuda")
        except UserError:  # a GPU that fell off the bus is no reason to wait
            return 0

    def _end_predecessors_engine(self) -> None:
        before = state.read_as_written(self.run_folder, self.orders.key)
        if before is None:
            return
        if before.phase is not Phase.STOPPED:
            self.state = replace(
                self.state,
                restarts=before.restarts + 1,
                hangs=before.hangs,
                down_for=before.down_for,
                reason="its keeper was killed",
            )
        if before.phase is Phase.READY:
            self.down_since = self.born
        if before.engine and processes.end_left_over(before.engine, self.mark):
            self.log.say(f"ended process group {before.engine.pid}, left behind by a killed keeper", "warning")
        if before.scratch and Path(before.scratch).name.startswith(f"vllm-unified-{self.orders.key}-"):
            shutil.rmtree(before.scratch, ignore_errors=True)

    def _back_off(self) -> None:
        doubled = FIRST_BACKOFF_SECONDS * 2 ** min(self.failures_in_a_row - 1, 16)
        seconds = min(self.orders.longest_backoff, doubled) * random.uniform(0.75, 1.0)  # noqa: S311  (jitter, not a secret)
        until = time.monotonic() + seconds
        self._enter(Phase.BACKOFF, retry_at=until)
        while (left := until - time.monotonic()) > 0:
            self._pause(left)
        self.state = replace(self.state, retry_at=None)

    def _leave(self) -> None:
        was_ready = self.state.phase is Phase.READY
        drained_until = time.monotonic() + self.orders.drain_timeout
        if was_ready:
            self._drain(drained_until)
        # Many may leave a device at the same time, but none starts on it before their memory is back.
        with locks.shared(self.lock_folder, self.device_locks):
            self._enter(Phase.STOPPING)
            # SIGTERM during warm-up leaves workers (vLLM #44751), and there is nothing to lose yet.
            if was_ready and self.process is not None and self.process.poll() is None:
                self.process.terminate()
                self._wait_for_exit(LEAVING_SECONDS + max(0.0, drained_until - time.monotonic()))
            self._end_engine()
        self._enter(Phase.STOPPED, keeper=None, devices=(), reason=None, note=None, retry_at=None, ready_after=None)
        self.log.say("stopped")
        self.log.close()

    def _drain(self, until: float) -> None:
        """Let what is in the engine end; vLLM does it itself where it has no counters to look at.

        We are told to stop already: further signals change nothing.
        """
        self._enter(Phase.DRAINING)
        if self.orders.drain_timeout:
            self._wait_for_exit(NOTICE_SECONDS)
        while not self._has_exited() and time.monotonic() < until:
            try:
                counters = progress.read_counters(self.orders.url, timeout=max(0.1, until - time.monotonic()))
            except OSError:
                return
            if counters is None or counters.requests == 0:
                return
            self._wait_for_exit(POLL_SECONDS)

    def _wait_for_exit(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._has_exited() and (left := until - time.monotonic()) > 0:
            processes.wait_for_signal(left)

    # --- the state ---

    def _note(self, note: str | None) -> None:
        if note != self.state.note:
            self.state = replace(self.state, note=note)
            self._write_state()

    def _enter(self, phase: Phase, **changes: object) -> None:
        self.state = replace(self.state, phase=phase, since=time.monotonic(), **changes)  # type: ignore[arg-type]
        self._write_state()

    def _write_state(self) -> None:
        try:
            self.state.write(self.run_folder)
        except OSError as error:  # a disk that is full must not end an engine that works
            self.log.say(f"cannot write the state: {error.strerror or error}", "error")


def _in_background(work: Callable[[], Result]) -> "Future[Result]":
    """In a thread of its own, which may hang for ever without holding up anything else."""
    future: Future[Result] = Future()
    threading.Thread(target=_fulfil, args=(future, work), daemon=True).start()
    return future


def _fulfil(future: "Future[Result]", work: Callable[[], Result]) -> None:
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-code}"


def is_healthy(url: str) -> bool:
    try:
        return loopback.get(f"{url}/health", HEALTH_SECONDS)[0] == 200
    except OSError:
        return False


def port_taken(host: str, port: int) -> str | None:
    """Why a server could not listen there, or None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return f"port {port} on {host}: {(error.strerror or str(error)).lower()}"
    return None


def main() -> None:
    write_json("keeper", sys.argv[1])
    with open(int(sys.argv[2]), encoding="utf-8") as file:
        orders = Orders.from_json(file.read())
    try:
        Keeper(orders).run()
    except UserError as error:
        end(str(error))


if __name__ == "__main__":
    main()
