"""Stand-ins for the images of nginx, Prometheus and Grafana, where those are not to be had: a minimal Debian with its
own nginx and Prometheus. Users, folders and entry points are those of the true ones.

Grafana is not in Debian. Its stand-in reads what the true one reads, under the same user, and asks for the password.
"""

import subprocess
import tempfile
from pathlib import Path

from tests.conftest import CHECKOUT
from tests.containers.stand_in import make_debian

BASE = "vllm-unified-test-companions:latest"
PACKAGES = "nginx-light,prometheus,curl,wget"
NAMES = ("NGINX_IMAGE", "PROMETHEUS_IMAGE", "GRAFANA_IMAGE")

RUN_GRAFANA = """\
#!/bin/sh
set -eu
dashboards=$(find "$GRAFANA_DASHBOARDS" -name '*.json')
cat /etc/grafana/provisioning/*/*.yml $dashboards >/var/lib/grafana/read
[ -n "$dashboards" ]
mkdir -p /tmp/www/api
echo '{"database": "ok"}' | tee /tmp/www/api/health >/tmp/www/api/org
printf 'admin:{PLAIN}%s\\n' "$(cat "$GF_SECURITY_ADMIN_PASSWORD__FILE")" >/tmp/users
exec nginx -c /grafana.conf
"""
SERVE_GRAFANA = """\
daemon off;
pid /tmp/nginx.pid;
error_log stderr;
events {}
http {
  access_log off;
  client_body_temp_path /tmp; proxy_temp_path /tmp; fastcgi_temp_path /tmp; uwsgi_temp_path /tmp; scgi_temp_path /tmp;
  root /tmp/www;
  server {
    listen 3000;
    location = /api/health {}
    location / {
      auth_basic Grafana;
      auth_basic_user_file /tmp/users;
    }
  }
}
"""
FOLDERS = """\
mkdir -p "$1/prometheus" "$1/var/lib/grafana" "$1/etc/grafana"
chown 65534:65534 "$1/prometheus"
chown 472:0 "$1/var/lib/grafana"
chmod 777 "$1/var/lib/grafana"
chmod 755 "$1/run.sh"
"""
DOCKERFILES = {
    "NGINX_IMAGE": "CMD nginx -g 'daemon off;'",
    "PROMETHEUS_IMAGE": 'USER nobody\nWORKDIR /prometheus\nVOLUME /prometheus\nENTRYPOINT ["/bin/prometheus"]',
    "GRAFANA_IMAGE": 'USER 472\nENTRYPOINT ["/run.sh"]',
}


def names() -> dict[str, str]:
    """The images that scripts/versions.env says, by their variables."""
    command = f"source scripts/versions.env && printf '%s\\n' {' '.join(f'${name}' for name in NAMES)}"
    done = subprocess.run(["bash", "-c", command], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return dict(zip(NAMES, done.stdout.split(), strict=True))


def make() -> None:
    """Wants `mmdebstrap`. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as scratch:
        tar, script, conf = (Path(scratch) / name for name in ("debian.tar", "run.sh", "grafana.conf"))
        script.write_text(RUN_GRAFANA)
        conf.write_text(SERVE_GRAFANA)
        hooks = (f"copy-in {script} {conf} /", FOLDERS)
        make_debian(tar, PACKAGES, *(f"--customize-hook={hook}" for hook in hooks))
        subprocess.run(["docker", "import", str(tar), BASE], check=True, stdout=subprocess.DEVNULL)
    for name, image in names().items():
        dockerfile = f"FROM {BASE}\n{DOCKERFILES[name]}\n"
        subprocess.run(["docker", "build", "--quiet", "--tag", image, "-"], input=dockerfile, text=True, check=True)
