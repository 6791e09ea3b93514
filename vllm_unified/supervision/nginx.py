"""run/rendered/nginx, as text."""

from pathlib import Path

from vllm_unified.settings import Settings


def nginx_files(settings: Settings, *, in_container: bool = False) -> dict[Path, str]:
    """By their paths from run/rendered/nginx."""
    environment = settings.environment
    return {
        Path("nginx.conf"): f"""\
pid /tmp/nginx.pid;
error_log stderr;
events {{}}
http {{
  access_log off;
  client_body_temp_path /tmp/nginx-body;
  proxy_temp_path /tmp/nginx-proxy;
  fastcgi_temp_path /tmp/nginx-fastcgi;
  uwsgi_temp_path /tmp/nginx-uwsgi;
  scgi_temp_path /tmp/nginx-scgi;
  server {{
    listen {environment.nginx_host}:{environment.nginx_port};
    location / {{ proxy_pass http://{settings.router_address}; proxy_buffering off; }}
  }}
}}
"""
    }
