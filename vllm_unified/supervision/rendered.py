"""run/rendered: what nginx, Prometheus and Grafana read. In Docker it is a volume, which their containers have too."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from vllm_unified.errors import UserError
from vllm_unified.settings import Settings
from vllm_unified.settings.environment import Profile
from vllm_unified.supervision.nginx import nginx_files
from vllm_unified.supervision.prometheus import prometheus_files

FILE_MODE = 0o644
# Of folders and secrets. Group 0 is that of every container, and none of them has more than its own rights.
IN_CONTAINERS = (0o2755, 0o640)
NATIVELY = (0o700, 0o600)
SECRETS = (Path("prometheus/key"), Path("grafana/password"))


def write_rendered(settings: Settings, files: dict[Path, str]) -> None:
    """`files`: those of `rendered_files`. Anew: what is there and no longer wanted goes."""
    folder_mode, secret_mode = IN_CONTAINERS if settings.in_containers else NATIVELY
    for folder in sorted({parent for path in files for parent in path.parents[:-1]}):
        (settings.rendered / folder).mkdir(parents=True, exist_ok=True)
        (settings.rendered / folder).chmod(folder_mode)
    for path, text in files.items():
        _write(settings.rendered / path, text, secret_mode if path in SECRETS else FILE_MODE)
    for old in [path for path in settings.rendered.rglob("*") if path.is_file()]:
        if old.relative_to(settings.rendered) not in files:
            old.unlink()


def rendered_files(settings: Settings) -> dict[Path, str]:
    """By their paths from run/rendered. Those of a container that Compose may be asked for by `--profile` alone too, if
    they can be made. Raises UserError where a profile that is wanted can't be."""
    files: dict[Path, str] = {}
    for profile, of_profile in PROFILES.items():
        wanted = profile in settings.environment.profiles
        if wanted or settings.in_containers:
            try:
                files |= of_profile(settings)
            except UserError:
                if wanted:
                    raise
    return files


def _of_nginx(settings: Settings) -> dict[Path, str]:
    return {"nginx" / path: text for path, text in nginx_files(settings).items()}


def _of_monitoring(settings: Settings) -> dict[Path, str]:
    files = {"prometheus" / path: text for path, text in prometheus_files(settings, settings.router_address).items()}
    return {**files, Path("grafana/password"): Password(settings).ensure()}


PROFILES: dict[Profile, Callable[[Settings], dict[Path, str]]] = {"nginx": _of_nginx, "monitoring": _of_monitoring}


class Password:
    """Grafana's, of the user admin. Made once, as Grafana keeps it with its data. A file beside it notes that somebody
    was told it."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.home / "data" / "grafana.password"
        self._said = self.path.with_suffix(".password.said")

    def ensure(self) -> str:
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write(self.path, secrets.token_urlsafe(18), 0o600)
            self._said.unlink(missing_ok=True)
        return self.path.read_text(encoding="utf-8")

    def told(self) -> str | None:
        """The first time the password, from then on None."""
        if self._said.exists() or not self.path.is_file():
            return None
        self._said.touch(mode=0o600)
        return self.path.read_text(encoding="utf-8")


def _write(path: Path, text: str, mode: int) -> None:
    """Whole or not at all, and readable by those alone who may: also while it is written."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
    unfinished.chmod(mode)
    unfinished.replace(path)
