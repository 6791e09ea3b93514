"""run/supervisord.conf, as text."""

import re
import shlex
import sys

from vllm_unified.engines.keeper import LEAVING_SECONDS, SETTLING_SECONDS
from vllm_unified.settings import Settings
from vllm_unified.supervision.companions import supervised
from vllm_unified.supervision.programs import GROUP

# Time for a keeper to kill what did not leave, after all that it grants the engine.
KEEPER_SECONDS = 20
# It gives up the pages in flight, and goes on with them at the next start.
DOCUMENTS_SECONDS = 15
# Prometheus writes what it holds, and Grafana closes its database.
COMPANION_SECONDS = 30
# Of themselves they go on when supervisord was killed, and keep their ports from the next start.
ENDS_WITH_SUPERVISORD = ("setpriv", "--pdeathsig", "TERM", "--")


def supervisord_conf(settings: Settings) -> str:
    """The router, the document service, one keeper an engine, and what the profiles want beside them. `%(here)s` is the
    folder of the file itself, run/.

    Disabled models have a program that is not started, so that a reload can enable them.
    """
    keepers = settings.all_engines
    patience = round(settings.system.drain_timeout + LEAVING_SECONDS + SETTLING_SECONDS + KEEPER_SECONDS)
    sections = [
        _MAIN.format(config=settings.file),
        _program("router", [*_cli(settings), "router"], priority=100, patience=patience),
        *(
            [_program("documents", [*_cli(settings), "documents"], priority=150, patience=DOCUMENTS_SECONDS)]
            if settings.reads_documents
            else []
        ),
        *(
            _program(
                model.key,
                [*_cli(settings), "engine", model.key],
                priority=200,
                patience=patience,
                log=f"{model.key}.keeper.log",
                autostart=model.enabled,
            )
            for model in keepers
        ),
        *(
            _program(
                each.name,
                [*ENDS_WITH_SUPERVISORD, *each.command(settings, binary)],
                priority=each.priority,
                patience=COMPANION_SECONDS,
            )
            for each, binary in supervised(settings).items()
        ),
    ]
    if keepers:
        # One group, because supervisord stops the programs of a group together and groups one by one.
        sections.append(f"[group:{GROUP}]\nprograms={','.join(model.key for model in keepers)}\npriority=200\n")
    return "\n".join(sections)


_MAIN = """\
; Rendered by `vllm-unified render` from {config}. Edits are lost at the next start.
[unix_http_server]
file=%(here)s/supervisor.sock
chmod=0700

[supervisord]
logfile=%(here)s/logs/supervisord.log
logfile_maxbytes=5MB
logfile_backups=2
pidfile=%(here)s/supervisord.pid
childlogdir=%(here)s/logs
directory=%(here)s/..
umask=077

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl=unix://%(here)s/supervisor.sock
"""


def _program(
    name: str, command: list[str], priority: int, patience: int, log: str | None = None, autostart: bool = True
) -> str:
    """supervisord gives up on a program that fails `startretries` times in a row; ours are never given up."""
    return "\n".join(
        [
            f"[program:{name}]",
            f"command={quoted(command)}",
            f"priority={priority}",
            f"autostart={str(autostart).lower()}",
            "autorestart=true",
            "startsecs=1",
            "startretries=1000000",
            f"stopwaitsecs={patience}",
            "stopsignal=TERM",
            "stopasgroup=false",
            "killasgroup=true",
            "redirect_stderr=true",
            f"stdout_logfile=%(here)s/logs/{log or name + '.log'}",
            "stdout_logfile_maxbytes=20MB",
            "stdout_logfile_backups=4",
            "",
        ]
    )


def _cli(settings: Settings) -> list[str]:
    return [sys.executable, "-m", "vllm_unified", "--config", str(settings.file)]


def quoted(command: list[str]) -> str:
    """A command that supervisord splits into the same words again.

    It cuts a value at a space followed by ; or # even inside quotes, without a word, and expands %. So such
    a space gets quotes of its own, and a percent sign is doubled.
    """
    return re.sub(r"(\s)(?=[;#])", r"\1''", shlex.join(command)).replace("%", "%%")
