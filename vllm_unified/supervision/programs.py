"""Starting and stopping the engines' programs of the running supervisord."""

import xmlrpc.client
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import Faults

from vllm_unified.errors import UserError
from vllm_unified.supervision.ask import connected, programs

# The programs of the engines are one group; the router's is none of it.
GROUP = "engines"
RUNNING = ("STARTING", "RUNNING", "BACKOFF", "STOPPING")


class Programs:
    """`run`: the folder of supervisord's socket. What changes something blocks until it is done.

    Raises UserError when supervisord is not running, does not know the program, or can't start it.
    """

    def __init__(self, run: Path) -> None:
        self.run = run

    def running(self) -> frozenset[str]:
        """The keys of the engines that have a keeper, or are about to."""
        found = programs(self.run)
        if found is None:
            raise UserError("supervisord is not running; start it with ./deploy.sh start")
        engines = {name: info["statename"] for name, info in found.items() if info["group"] == GROUP}
        return frozenset(key for key, phase in engines.items() if phase in RUNNING)

    def start(self, key: str) -> None:
        """Until its keeper runs, not until its engine is ready. One that runs already goes on."""
        self._ask(key, lambda supervisor: supervisor.startProcess(f"{GROUP}:{key}"), fine=Faults.ALREADY_STARTED)

    def stop(self, key: str) -> None:
        """Until its engine has finished the requests in flight and is gone."""
        self._ask(key, lambda supervisor: supervisor.stopProcess(f"{GROUP}:{key}"), fine=Faults.NOT_RUNNING)

    def restart(self, key: str) -> None:
        self.stop(key)
        self.start(key)

    def _ask(self, key: str, question: Callable[[Any], object], fine: int) -> None:
        try:
            with connected(self.run) as supervisor:
                question(supervisor)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != fine:
                raise UserError(_in_words(key, fault)) from None
        except OSError:
            raise UserError("supervisord is not running; start it with ./deploy.sh start") from None


def _in_words(key: str, fault: xmlrpc.client.Fault) -> str:
    match fault.faultCode:
        case Faults.BAD_NAME:
            return f'supervisord knows no model "{key}" yet; ./deploy.sh restart tells it'
        case Faults.SPAWN_ERROR | Faults.ABNORMAL_TERMINATION:
            return f"{key}: its keeper ended at once; run/logs/{key}.keeper.log says why"
        case Faults.SHUTDOWN_STATE:
            return "supervisord is ending; ./deploy.sh start starts it again"
        case _:
            return f"{key}: supervisord says {fault.faultString}"
