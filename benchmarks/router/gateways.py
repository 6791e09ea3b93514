"""How each gateway is started: all proxy plainly and log no request, but ours, which has everything on."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.demo import API_KEY, CHECKOUT
from benchmarks.router.programs import BenchmarkError, Server, free_ports, serving
from benchmarks.router.requests import MODEL, Request, chat

PEERS = CHECKOUT / ".bench"
# A limit that is counted and never reached.
UNREACHED = 1_000_000_000


@dataclass(frozen=True)
class Command:
    """`port`: where the gateway listens. `keys`: the first one that it takes is used."""

    arguments: Sequence[str | Path]
    port: int
    environ: Mapping[str, str] = field(default_factory=dict)
    keys: Sequence[str] = (API_KEY,)


@dataclass(frozen=True)
class Gateway:
    port: int
    key: str
    server: Server


@contextlib.contextmanager
def running(command: Command, folder: Path, models: Sequence[str] = (MODEL,)) -> Iterator[Gateway]:
    """The gateway, from its first complete answers of every model on."""

    def takes(key: str) -> bool:
        return all(answers(command.port, chat(key, name)) for name in models)

    def is_ready() -> bool:
        return any(map(takes, command.keys))

    with serving(command.arguments, command.environ, folder / "log", is_ready) as server:
        yield Gateway(command.port, next(filter(takes, command.keys)), server)


def answers(port: int, request: Request) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", request.path, request.body, dict(request.headers))
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ours(folder: Path, engines: Sequence[int], models: Sequence[str] = (MODEL,), keys: int = 1) -> Command:
    """`engines`: a port for each model. The deployment's own key is used where keys.yaml is not read."""
    (port,) = free_ports(1)
    config = folder / "config"
    config.mkdir()
    entries = {
        name: {"name": name, "type": "chat", "port": engines[at], "path": name} for at, name in enumerate(models)
    }
    (config / "models.json").write_text(json.dumps({"models": entries, "router": {"port": port}}))
    (config / "keys.yaml").write_text(json.dumps({"keys": [_key_entry(number) for number in range(keys)]}))
    return Command(
        [sys.executable, "-m", "vllm_unified", "--config", config / "models.json", "router"],
        port,
        {"VLLM_UNIFIED_HOME": str(folder), "VLLM_API_KEY": API_KEY, "PYTHONPATH": str(CHECKOUT)},
        (client_key(keys - 1), API_KEY),
    )


def client_key(number: int) -> str:
    """The key of the client that keys.yaml names `client-NUMBER`."""
    return f"sk-of-client-{number}"


def _key_entry(number: int) -> dict[str, str | int]:
    digest = hashlib.sha256(client_key(number).encode()).hexdigest()
    limits = {"requests_per_minute": UNREACHED, "tokens_per_minute": UNREACHED}
    return {"name": f"client-{number}", "hash": f"sha256:{digest}", **limits}


NGINX = """
daemon off;
{user}
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_max_body_size 64m;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000;
  upstream engine {{
    server 127.0.0.1:{engine};
    keepalive 1024;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""


def nginx(folder: Path, engines: Sequence[int]) -> Command:
    (port,) = free_ports(1)
    user = "user root;" if os.geteuid() == 0 else ""  # otherwise its worker cannot write to the folder
    (folder / "nginx.conf").write_text(NGINX.format(user=user, folder=folder, engine=engines[0], port=port))
    return Command([_nginx(), "-p", folder, "-e", "stderr", "-c", folder / "nginx.conf"], port)


def _nginx() -> str:
    found = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if not found:
        raise BenchmarkError("no nginx; run benchmarks/router/install")
    return found


def vllm_router(folder: Path, engines: Sequence[int]) -> Command:
    port, metrics = free_ports(2)
    options = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
    options += ["--worker-urls", f"http://127.0.0.1:{engines[0]}", "--policy", "round_robin", "--log-level", "warning"]
    options += ["--prometheus-host", "127.0.0.1"]
    return Command([_peer("vllm-router"), *options], port)


def smg(folder: Path, engines: Sequence[int]) -> Command:
    port, metrics = free_ports(2)
    options = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
    options += ["--worker-urls", f"http://127.0.0.1:{engines[0]}", "--policy", "round_robin", "--log-level", "warn"]
    options += ["--prometheus-host", "127.0.0.1", "--disable-tokenizer-autoload"]
    return Command([_peer("smg"), "launch", *options], port)


def litellm(folder: Path, engines: Sequence[int]) -> Command:
    (port,) = free_ports(1)
    engine = {"model": f"hosted_vllm/{MODEL}", "api_base": f"http://127.0.0.1:{engines[0]}/v1", "api_key": API_KEY}
    (folder / "config.yaml").write_text(json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": engine}]}))
    # its server would write a line for each request
    (folder / "logging.json").write_text(json.dumps({"version": 1, "disable_existing_loggers": False}))
    options = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    options += ["--config", str(folder / "config.yaml"), "--log_config", str(folder / "logging.json")]
    environ = {"LITELLM_MASTER_KEY": API_KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    return Command([_peer("litellm"), *options], port, environ)


def _peer(name: str) -> Path:
    program = PEERS / name / "bin" / name
    if not program.exists():
        raise BenchmarkError(f"no {name} in {PEERS.name}/; run benchmarks/router/install")
    return program


GATEWAYS: dict[str, Callable[[Path, Sequence[int]], Command]] = {
    "ours": ours,
    "nginx": nginx,
    "vllm-router": vllm_router,
    "smg": smg,
    "litellm": litellm,
}


def version(name: str) -> str:
    if name == "nginx":
        said = subprocess.run([_nginx(), "-v"], capture_output=True, text=True).stderr
    elif name == "ours":
        commit = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
        return subprocess.run(commit, capture_output=True, text=True).stdout.strip()
    else:
        python = _peer(name).with_name("python")
        shown = [str(python), "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]
        said = subprocess.run(shown, capture_output=True, text=True).stdout
    found = re.search(r"\d+[.\d]*", said)
    return found[0] if found else "?"
