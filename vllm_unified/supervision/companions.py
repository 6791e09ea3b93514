"""nginx, Prometheus and Grafana: programs beside ours, where a profile wants them.

Natively supervisord runs them; in Docker they have containers of their own, which docker-compose.yml describes.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_unified.settings import Settings
from vllm_unified.settings.environment import Profile

CHECKOUT = Path(__file__).resolve().parents[2]
# Where distributions put servers, which is not on the path of every user.
SERVER_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/share/grafana/bin")


@dataclass(frozen=True)
class Companion:
    """`binaries`: the first of these that is installed. `command`: of that binary's path. `host`, `ports`: fields of
    `Environment`. `priority`: supervisord starts the lowest first and stops it last."""

    name: str
    title: str
    profile: Profile
    binaries: tuple[str, ...]
    command: Callable[[Settings, str], list[str]]
    url: Callable[[Settings], str]
    host: str
    ports: tuple[str, ...]
    priority: int

    def binary(self) -> str | None:
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), *SERVER_FOLDERS))
        return next((found for name in self.binaries if (found := shutil.which(name, path=path))), None)

    def listens_on(self, settings: Settings) -> list[tuple[str, int, str]]:
        """Host, port and field of the port."""
        environment = settings.environment
        ports = [port for port in self.ports if port != "nginx_tls_port" or settings.has_certificate]
        return [(getattr(environment, self.host), getattr(environment, port), port) for port in ports]


def nginx_command(binary: str, conf: Path) -> list[str]:
    return [binary, "-e", "stderr", "-c", str(conf), "-g", "daemon off;"]


def prometheus_command(settings: Settings, binary: str) -> list[str]:
    environment = settings.environment
    return [
        binary,
        f"--config.file={settings.rendered / 'prometheus' / 'prometheus.yml'}",
        f"--storage.tsdb.path={settings.home / 'data' / 'prometheus'}",
        f"--web.listen-address={_bracketed(environment.monitoring_host)}:{environment.prometheus_port}",
        *PROMETHEUS_OPTIONS,
    ]


# A month of a deployment of four models is about 1 GB.
PROMETHEUS_OPTIONS = (
    "--storage.tsdb.retention.time=30d",
    "--storage.tsdb.retention.size=4GB",
    "--query.max-samples=20000000",
)


def grafana_command(settings: Settings, binary: str) -> list[str]:
    environment = settings.environment
    variables = {
        **GRAFANA_SETTINGS,
        "GF_SERVER_HTTP_ADDR": environment.monitoring_host,
        "GF_SERVER_HTTP_PORT": str(environment.grafana_port),
        "GF_PATHS_DATA": str(settings.home / "data" / "grafana"),
        "GF_PATHS_PLUGINS": str(settings.home / "data" / "grafana" / "plugins"),
        "GF_PATHS_PROVISIONING": str(CHECKOUT / "monitoring" / "grafana" / "provisioning"),
        "GF_SECURITY_ADMIN_PASSWORD": f"$__file{{{settings.rendered / 'grafana' / 'password'}}}",
        "GF_LOG_MODE": "console",
        "GRAFANA_DASHBOARDS": str(CHECKOUT / "monitoring" / "grafana" / "dashboards"),
        "PROMETHEUS_URL": settings.prometheus_url,
    }
    server = [binary, "server"] if Path(binary).name == "grafana" else [binary]
    pairs = [f"{name}={value}" for name, value in variables.items()]
    return ["env", *pairs, *server, "--homepath", "/usr/share/grafana"]


# Nobody comes in without the password, and nothing is asked of the network.
GRAFANA_SETTINGS = {
    "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
    "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    "GF_ANALYTICS_FEEDBACK_LINKS_ENABLED": "false",
    "GF_ANALYTICS_REPORTING_ENABLED": "false",
    "GF_AUTH_ANONYMOUS_ENABLED": "false",
    "GF_NEWS_NEWS_FEED_ENABLED": "false",
    "GF_PLUGINS_PLUGIN_ADMIN_ENABLED": "false",
    "GF_PLUGINS_PREINSTALL_AUTO_UPDATE": "false",
    "GF_PLUGINS_PREINSTALL_DISABLED": "true",
    "GF_PLUGINS_PUBLIC_KEY_RETRIEVAL_DISABLED": "true",
    "GF_SECURITY_DISABLE_GRAVATAR": "true",
    "GF_SNAPSHOTS_EXTERNAL_ENABLED": "false",
    "GF_USERS_ALLOW_SIGN_UP": "false",
}


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


# nginx is there before the router and after it: it says what is missing meanwhile.
NGINX = Companion(
    name="nginx",
    title="Nginx",
    profile="nginx",
    binaries=("nginx",),
    command=lambda settings, binary: nginx_command(binary, settings.rendered / "nginx" / "nginx.conf"),
    url=lambda settings: settings.nginx_url,
    host="nginx_host",
    ports=("nginx_port", "nginx_tls_port"),
    priority=50,
)
PROMETHEUS = Companion(
    name="prometheus",
    title="Prometheus",
    profile="monitoring",
    binaries=("prometheus",),
    command=prometheus_command,
    url=lambda settings: settings.prometheus_url,
    host="monitoring_host",
    ports=("prometheus_port",),
    priority=300,
)
GRAFANA = Companion(
    name="grafana",
    title="Grafana",
    profile="monitoring",
    binaries=("grafana", "grafana-server"),
    command=grafana_command,
    url=lambda settings: settings.grafana_url,
    host="monitoring_host",
    ports=("grafana_port",),
    priority=300,
)
COMPANIONS = (NGINX, PROMETHEUS, GRAFANA)
BY_NAME = {each.name: each for each in COMPANIONS}


def wanted(settings: Settings) -> list[Companion]:
    return [each for each in COMPANIONS if each.profile in settings.environment.profiles]


def supervised(settings: Settings) -> dict[Companion, str]:
    """Those that supervisord runs, and the paths of their binaries; what is not installed is left out."""
    if settings.in_containers:
        return {}
    return {each: binary for each in wanted(settings) if (binary := each.binary())}
