"""run/rendered/prometheus, as text."""

from pathlib import Path

from vllm_unified.settings import Settings


def prometheus_files(settings: Settings) -> dict[Path, str]:
    """By their paths from run/rendered/prometheus."""
    return {
        Path("prometheus.yml"): f"""\
scrape_configs:
  - job_name: vllm-unified
    authorization:
      credentials_file: key
    http_sd_configs:
      - url: http://{settings.router_address}/sd
        authorization:
          credentials_file: key
""",
        Path("key"): settings.require_api_key(),
    }
