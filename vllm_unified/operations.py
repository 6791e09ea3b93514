"""What a change of the configuration does to the running engines."""

import os
from collections.abc import Mapping
from pathlib import Path

from vllm_unified.engines.placement import Recorded, placement_text, plan_beside, recorded
from vllm_unified.settings import Settings, load
from vllm_unified.supervision.programs import Programs


class Operations:
    """On the deployment of `file` in `home`. All of it blocks; UserError where it can't be done.

    `environ`: the process' own variables, which go before those of `.env`.
    """

    def __init__(self, file: Path, home: Path, environ: Mapping[str, str]) -> None:
        self.file = file
        self.home = home
        self.environ = environ
        self._programs = Programs(home / "run")

    def load(self) -> Settings:
        """The files as they are now. Raises ConfigError with all that is wrong with them."""
        return load(self.file, self.home, self.environ)

    def enable(self, new: Settings, key: str) -> None:
        """Give an engine of `new` that does not run yet a place beside those that do, and start it.

        Raises ConfigError with the plan's own refusal when `new` does not fit; then nothing was changed.
        """
        running = self._programs.running()
        seated = {each: handles for each, handles in recorded(new).items() if each in running}
        _record(new, {**seated, **plan_beside(new, seated).places})
        self._programs.start(key)

    def start(self, key: str) -> None:
        self._programs.start(key)

    def stop(self, key: str) -> None:
        self._programs.stop(key)

    def restart(self, key: str) -> None:
        self._programs.restart(key)


def _record(settings: Settings, places: Recorded) -> None:
    """Whole or not at all: keepers read it while it is written."""
    path = settings.run / "placement.json"
    unfinished = path.with_suffix(".json.new")
    unfinished.write_text(placement_text(places), encoding="utf-8")
    os.replace(unfinished, path)
