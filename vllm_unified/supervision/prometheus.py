"""run/rendered/prometheus/, as text: monitoring/prometheus.yml with our address and key, and the rules."""

from pathlib import Path
from typing import Any

import yaml

from vllm_unified.errors import UserError
from vllm_unified.settings import Settings
from vllm_unified.settings.keys import metrics_key

KEY_FILE = "key"
HEAD = "# Rendered by `vllm-unified render` from monitoring/prometheus.yml. Edits are lost at the next start.\n"


def prometheus_files(settings: Settings, router: str | None = None) -> dict[Path, str]:
    """By the path below run/rendered/prometheus/; `key` is a secret.

    `router`: host:port at which Prometheus finds it; None: on this machine. Raises UserError where monitoring/ is not
    there, or there is no API key.
    """
    folder = _source(settings.home)
    rules = sorted((folder / "rules").glob("*.yml"))
    return {
        Path("prometheus.yml"): HEAD + _config(folder / "prometheus.yml", router or _address(settings)),
        Path(KEY_FILE): metrics_key(settings.require_api_key()),
        **{Path("rules") / rule.name: rule.read_text(encoding="utf-8") for rule in rules},
    }


def _source(home: Path) -> Path:
    """Of the project's folder, or else of the checkout that this program is of."""
    for folder in (home / "monitoring", Path(__file__).parents[2] / "monitoring"):
        if (folder / "prometheus.yml").is_file():
            return folder
    raise UserError(f"{home / 'monitoring'}: no prometheus.yml in it; copy the folder monitoring/ of the release there")


def _config(file: Path, router: str) -> str:
    document: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    for job in document["scrape_configs"]:
        for asked in (job, *job["http_sd_configs"]):
            asked["authorization"]["credentials_file"] = KEY_FILE
        for discovery in job["http_sd_configs"]:
            discovery["url"] = f"http://{router}/sd"
    return yaml.safe_dump(document, sort_keys=False)


def _address(settings: Settings) -> str:
    return settings.router_url.partition("://")[2]
