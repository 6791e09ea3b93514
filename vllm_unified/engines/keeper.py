"""The parent of one vLLM server: waits for its device, starts it, restarts it, leaves nothing of it behind."""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from vllm_unified import loopback, state
from vllm_unified.devices import read_devices
from vllm_unified.engines import locks, processes
from vllm_unified.engines.command import engine_command
from vllm_unified.engines.log import EngineLog
from vllm_unified.engines.placement import plan
from vllm_unified.errors import UserError
from vllm_unified.settings import Model, Settings
from vllm_unified.state import EngineState, Phase, Process

POLL_SECONDS = 0.3
HEALTH_SECONDS = 5
FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 300.0
HEALTHY_SECONDS = 600.0
# Beyond the drain: what vLLM takes to end its own processes when nothing is in flight (measured: 8 s).
LEAVING_SECONDS = 15.0


class _StopRequested(Exception):
    """SIGTERM or SIGINT came."""


class Keeper:
    """Runs until it is told to stop, in the main thread of its own process."""

    def __init__(self, settings: Settings, model: Model, environ: dict[str, str]) -> None:
        settings.require_api_key()
        self.settings = settings
        self.model = model
        self.placed = plan(settings, read_devices(settings.environment.visible_devices)).of(model.key)
        self.command = engine_command(settings, self.placed)
        self.environ = environ
        self.log = EngineLog(settings.run / "logs" / f"{model.key}.log")
        self.mark = f"{settings.home}:{model.key}"
        self.process: subprocess.Popen[bytes] | None = None
        self.failures_in_a_row = 0
        self.state = EngineState(
            key=model.key,
            phase=Phase.WAITING,
            since=time.time(),
            keeper=Process.of(os.getpid()),
            devices=tuple(device.label for device in self.placed.devices),
        )

    def run(self) -> None:
        """Raises UserError when another keeper has this engine already."""
        with locks.owned(self.settings.run / "locks", f"keeper-{self.model.key}") as owned:
            if not owned:
                raise UserError(f'"{self.model.key}" has its keeper already; ./deploy.sh restart {self.model.key}')
            processes.become_keeper()
            self._end_predecessors_engine()
            try:
                while True:
                    self._start_and_watch()
                    self._back_off()
            except _StopRequested:
                self._leave()

    def _start_and_watch(self) -> None:
        """Returns when the engine has ended, with the reason in the state."""
        self._enter(Phase.WAITING)
        names = [device.label.lower().replace(" ", "-") for device in self.placed.devices]
        with locks.held(self.settings.run / "locks", names, pause=lambda: self._pause(POLL_SECONDS)):
            try:
                reason = self._start()
            finally:
                if self.state.phase is not Phase.READY:
                    self._end_engine()  # before the next one may start on the device
        if reason is None:
            ready_at = time.monotonic()
            reason = self._watch()
            if time.monotonic() - ready_at > HEALTHY_SECONDS:
                self.failures_in_a_row = 0
        self._end_engine()
        self.failures_in_a_row += 1
        self.state = replace(self.state, reason=reason, restarts=self.state.restarts + 1)
        self.log.say(f"not running: {reason}")

    def _start(self) -> str | None:
        """None when the engine is ready, else why it is not."""
        taken = port_taken(self.settings.environment.engine_host, self.model.port)
        if taken:
            return taken
        if not self.settings.folder(self.model).is_dir():
            return f"{self.settings.folder(self.model)}: no such folder; put the weights there"
        began = time.monotonic()
        failure = self._launch()
        if failure:
            return failure
        while time.monotonic() - began < self.settings.startup_timeout(self.model):
            if self._has_exited():
                return self._exit_reason()
            if is_healthy(self.settings.engine_url(self.model)):
                self._enter(Phase.READY, reason=None, ready_after=round(time.monotonic() - began, 1))
                self.log.say(f"ready after {self.state.ready_after} s")
                return None
            self._pause(POLL_SECONDS)
        return f"not ready after {self.settings.startup_timeout(self.model):.0f} s (startup_timeout)"

    def _launch(self) -> str | None:
        # vLLM leaves sockets in TMPDIR when it is killed; in a folder of its own they go with it.
        scratch = tempfile.mkdtemp(prefix=f"vllm-unified-{self.model.key}-")
        environment = {
            **self.command.full_environment(self.environ),
            "TMPDIR": scratch,
            "PYTHONUNBUFFERED": "1",
            processes.MARK: self.mark,
        }
        self.state = replace(self.state, scratch=scratch)
        try:
            self.process = processes.start_group(self.command.argv, environment, self.settings.home)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            self.state = replace(self.state, scratch=None)
            return f"{self.command.argv[0]}: {(error.strerror or str(error)).lower()}; is vLLM installed?"
        self.reader = self.log.follow(self.process)
        self._enter(Phase.STARTING, engine=Process.of(self.process.pid))
        self.log.say(f"started process {self.process.pid}")
        return None

    def _watch(self) -> str:
        while not self._has_exited():
            self._pause(60.0)  # SIGCHLD ends the pause at once
        return self._exit_reason()

    def _pause(self, seconds: float) -> None:
        """Wait, at most until a child ends. Raises _StopRequested when we are told to stop."""
        if processes.wait_for_signal(seconds) in (signal.SIGTERM, signal.SIGINT):
            raise _StopRequested

    def _has_exited(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def _exit_reason(self) -> str:
        code = self.process.returncode if self.process else None
        self._end_engine()
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        said = self.log.reason()
        return f"{said} ({how})" if said else how

    def _end_engine(self) -> None:
        """Nothing of the group is left when this returns, and all that it wrote is in the log."""
        if self.process is None:
            return
        self.process.poll()
        processes.end_group(self.process.pid)
        processes.end_descendants()
        self.process.wait()
        self.process = None  # its number may be somebody else's from here on
        self.reader.join(timeout=5)
        if self.state.scratch:
            shutil.rmtree(self.state.scratch, ignore_errors=True)
        self.state = replace(self.state, engine=None, scratch=None)

    def _end_predecessors_engine(self) -> None:
        before = state.read_as_written(self.settings.run, self.model.key)
        if before is None or before.engine is None:
            return
        if processes.end_left_over(before.engine, self.mark):
            self.log.say(f"ended process group {before.engine.pid}, left behind by a killed keeper")
        if before.scratch and Path(before.scratch).name.startswith(f"vllm-unified-{self.model.key}-"):
            shutil.rmtree(before.scratch, ignore_errors=True)

    def _back_off(self) -> None:
        longest = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(self.failures_in_a_row - 1, 16))
        seconds = longest * random.uniform(0.75, 1.0)  # noqa: S311  (jitter, not a secret)
        self._enter(Phase.BACKOFF, retry_at=time.time() + seconds)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._pause(left)
        self.state = replace(self.state, retry_at=None)

    def _leave(self) -> None:
        was_ready = self.state.phase is Phase.READY
        self._enter(Phase.STOPPING)
        # Nothing is in flight before it is ready; and SIGTERM during warm-up leaves workers (vLLM #44751).
        if was_ready and self.process is not None and self.process.poll() is None:
            self.process.terminate()
            until = time.monotonic() + self.settings.system.drain_timeout + LEAVING_SECONDS
            while self.process.poll() is None and time.monotonic() < until:
                processes.wait_for_signal(until - time.monotonic())
        self._end_engine()
        self._enter(Phase.STOPPED, keeper=None, devices=(), reason=None, retry_at=None, ready_after=None)
        self.log.say("stopped")
        self.log.close()

    def _enter(self, phase: Phase, **changes: object) -> None:
        self.state = replace(self.state, phase=phase, since=time.time(), **changes)  # type: ignore[arg-type]
        self.state.write(self.settings.run)


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
