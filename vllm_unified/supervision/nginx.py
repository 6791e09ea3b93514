"""What Nginx runs with, as text: config/nginx.conf filled in, and the page that it shows while the router restarts."""

import os
import re
import ssl
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jinja2

from vllm_unified.errors import UserError
from vllm_unified.settings import Settings
from vllm_unified.settings.load import is_there
from vllm_unified.supervision.companions import NGINX, nginx_command, supervised

TEMPLATE = Path("config/nginx.conf")
PAGE = Path("config/maintenance.html")
CERTIFICATE = Path("config/tls/cert.pem")
CERTIFICATE_KEY = Path("config/tls/key.pem")

# Docker's own DNS server.
RESOLVER = "127.0.0.11"
# Beyond what the router itself refuses, whose words say which setting it was.
MARGIN_MIB = 16


def nginx_files(settings: Settings) -> dict[Path, str]:
    """Texts, by their paths below run/rendered/nginx, which Nginx has found to be right where supervisord runs it.
    Raises UserError.
    """
    here = _in_a_container(settings) if settings.in_containers else _native(settings)
    text = _conf(settings, here)
    if binary := supervised(settings).get(NGINX):
        with tempfile.TemporaryDirectory() as folder:
            # One that runs has the other folder, which is not there before the first start.
            _try(settings, binary, Path(folder), _conf(settings, {**here, "scratch": Path(folder, "nginx")}))
    return {Path("nginx.conf"): text, Path(PAGE.name): _read(settings.home, PAGE)}


def _conf(settings: Settings, here: dict[str, Any]) -> str:
    reads = settings.documents.max_upload_mib if settings.reads_documents else 0
    return _filled_in(
        settings.home,
        **here,
        tls=_certificate(settings),
        tls_port=settings.environment.nginx_tls_port,
        rendered=settings.rendered / "nginx",
        router=settings.router_address,
        max_body_mib=max(settings.router.max_body_mib, reads) + MARGIN_MIB,
        nginx=settings.nginx,
    )


def _try(settings: Settings, binary: str, folder: Path, text: str) -> None:
    """Ports too, but for those that are taken."""
    conf = folder / "nginx.conf"
    conf.write_text(text, encoding="utf-8")
    done = subprocess.run([*nginx_command(binary, conf), "-q", "-t"], capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "[emerg]" in line), done.stderr.strip())
        reason = re.sub(r"^.*\[emerg\] \d+#\d+: ", "", said)
        if found := re.search(rf" in {re.escape(str(conf))}:(\d+)$", reason):
            line = text.splitlines()[int(found[1]) - 1].strip()
            reason = f"{reason[: found.start()]}, at: {line}"
        raise UserError(f"{settings.home / TEMPLATE}: nginx refuses it: {reason}")


def _native(settings: Settings) -> dict[str, Any]:
    """Workers are the user that all else runs as, who alone may look into run/."""
    given = settings.environment.nginx_host
    host = f"[{given}]" if ":" in given else given
    return {
        "listen": f"{host}:{settings.environment.nginx_port}",
        "listen_tls": f"{host}:{settings.environment.nginx_tls_port}",
        "resolver": None,
        "user": None if os.geteuid() else "root",
        "scratch": settings.run / "nginx",
    }


def _in_a_container(settings: Settings) -> dict[str, Any]:
    """Its master is root, it may not write to run/, and the router is a name whose address changes. Everything listens;
    what the host's networks see is said where ports are published.
    """
    return {
        "listen": settings.environment.nginx_port,
        "listen_tls": settings.environment.nginx_tls_port,
        "resolver": RESOLVER,
        "user": None,
        "scratch": Path("/tmp/nginx"),  # noqa: S108 - of a container of its own
    }


def _certificate(settings: Settings) -> dict[str, Path] | None:
    """None where there is none. Raises UserError for one that Nginx could not use."""
    certificate, key = (settings.home / path for path in (CERTIFICATE, CERTIFICATE_KEY))
    if not is_there(certificate) and not is_there(key):
        return None
    for path, other in ((certificate, key), (key, certificate)):
        if not is_there(path):
            raise UserError(f"{path}: missing beside {other.name}; put it there, or remove {other.name} for plain HTTP")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password=_no_password)
    except PermissionError:
        pass  # Nginx' master may read what we may not
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{certificate.parent}: cert.pem and key.pem do not work together: {reason}") from None
    return {"certificate": certificate, "key": key}


def _no_password() -> str:
    """In place of a question on the terminal."""
    raise ValueError("key.pem has a password, which nobody is there to type in")


def _filled_in(home: Path, **values: Any) -> str:
    # It is no HTML, and the user's own.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)  # noqa: S701
    environment.filters["quoted"] = _quoted
    try:
        return environment.from_string(_read(home, TEMPLATE)).render(values) + "\n"
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{home / TEMPLATE}:{error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"{home / TEMPLATE}: {error}") from None


def _quoted(value: object) -> str:
    """One word for Nginx, which has no way to write a $ that is none of its variables."""
    text = str(value)
    if "$" in text:
        raise UserError(f"{text}: Nginx takes no path with a $ in it; rename the folder")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _read(home: Path, path: Path) -> str:
    try:
        return (home / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{home / path}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{home / path}: {error.strerror}; the release has one, copy it there") from None
