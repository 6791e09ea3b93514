"""What of a changed configuration a reload takes up, and what waits for which restart."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_unified.settings.environment import (
    DOWNLOAD_VARIABLES,
    FIELD_VARIABLES,
    SECRET_VARIABLES,
    Environment,
    variable_of,
)
from vllm_unified.settings.load import Settings
from vllm_unified.settings.schema import ENGINE_FIELDS, Endpoint, Model, ModelEntry, RouterSettings

# Of a model: those that the router alone reads, and those that its engine or its keeper was started with.
LIVE_FIELDS = frozenset(
    {
        "served_model_names",
        "endpoints",
        "balancing",
        "max_concurrent",
        "max_queue",
        "queue_timeout",
        "wait_for_ready",
        "required",
    }
)
RESTART_FIELDS = frozenset({"name", "type", *ENGINE_FIELDS})
# Of the router; the other two are of its socket and of the keepers.
LIVE_ROUTER_FIELDS = frozenset(
    {"health_check_interval", "max_body_mib", "retries", "cors_origins", "access_log", "trusted_proxies"}
)
RESTART_ROUTER_FIELDS = frozenset({"port", "startup_timeout"})
RESTART_ALL = "./deploy.sh restart"
# They may hold keys and tokens: only that they differ is said.
UNSHOWN = ("api_key", "env", *SECRET_VARIABLES)
LONGEST_SHOWN = 60


@dataclass(frozen=True)
class Restart:
    """What is not in force yet, and the command that takes it up."""

    what: str
    command: str


@dataclass(frozen=True)
class Changes:
    """`started` and `stopped`: keys of engines that were switched on, and off or out of the file.

    `settings`: what is in force once these changes are applied, in which all that waits for a restart is as before.
    """

    applied: list[str]
    restart: list[Restart]
    started: list[str]
    stopped: list[str]
    settings: Settings

    def document(self) -> dict[str, Any]:
        """Stable: fields are added, never renamed."""
        return {
            "applied": self.applied,
            "restart": [asdict(each) for each in self.restart],
            "started": self.started,
            "stopped": self.stopped,
        }


def changes(old: Settings, new: Settings, restarted: Collection[str] = ()) -> Changes:
    """`old`: what is in force. `restarted`: keys of engines that were started with `new` already."""
    known = {model.key for model in old.all_engines}  # to supervisord
    before = {model.key: model for model in old.models}
    engines = {model.key for model in new.engines}
    result = Changes([], [], [], [key for key in before if before[key].served_here and key not in engines], old)
    models = [
        each for model in new.models if (each := _in_force(before.get(model.key), model, known, restarted, result))
    ]
    left = {model.key for model in new.models}
    result.applied.extend(f"models.{key}: removed" for key in before if key not in left and not before[key].served_here)
    result.restart.extend(Restart(what, RESTART_ALL) for what in _of_all(old, new))
    in_force = replace(
        old,
        models=tuple(models),
        disabled=tuple(model for model in new.disabled if model.key in known or not model.served_here),
        router=old.router.model_copy(update={name: getattr(new.router, name) for name in LIVE_ROUTER_FIELDS}),
        endpoint_variables=new.endpoint_variables,
    )
    result.applied.extend(_differences("router.", dict(old.router), dict(in_force.router)))
    return replace(result, settings=in_force)


def _in_force(
    old: Model | None, new: Model, known: Collection[str], restarted: Collection[str], result: Changes
) -> Model | None:
    """The model that is served now, None where it can't be yet; what is to be said of it goes into `result`."""
    place = f"models.{new.key}"
    if new.served_here and new.key not in known:
        result.restart.append(Restart(f"{place}: a new engine", RESTART_ALL))
        return old
    if old is None or old.served_here != new.served_here:
        if new.served_here:
            result.started.append(new.key)
        else:
            result.applied.append(f"{place}: served by its endpoints")
        return new
    if not new.served_here or new.key in restarted:
        result.applied.extend(_of_fields(old, new, ModelEntry.model_fields))
        return new
    result.applied.extend(_of_fields(old, new, LIVE_FIELDS))
    command = f"{RESTART_ALL} {new.key}"
    result.restart.extend(Restart(what, command) for what in _of_fields(old, new, RESTART_FIELDS))
    return old.model_copy(update={name: getattr(new, name) for name in LIVE_FIELDS})


def _of_fields(old: Model, new: Model, fields: Collection[str]) -> Iterator[str]:
    place = f"models.{new.key}"
    for name in (name for name in ModelEntry.model_fields if name in fields):
        was, now = getattr(old, name), getattr(new, name)
        if name == "endpoints":
            yield from _of_endpoints(f"{place}.endpoints", was, now)
        elif name == "engine_args":
            yield from _differences(f"{place}.engine_args.", was, now)
        else:
            yield from _differences(f"{place}.", {name: was}, {name: now})


def _of_endpoints(place: str, old: list[Endpoint], new: list[Endpoint]) -> Iterator[str]:
    was, now = ({endpoint.url: endpoint for endpoint in endpoints} for endpoints in (old, new))
    yield from (f"{place}: {url}: removed" for url in was if url not in now)
    yield from (f"{place}: {url}: added" for url in now if url not in was)
    for url in (url for url in now if url in was):
        yield from _differences(f"{place}: {url}: ", dict(was[url]), dict(now[url]))


def _of_all(old: Settings, new: Settings) -> Iterator[str]:
    """What the router's own process, or every keeper, was started with."""
    yield from _differences("router.", *(_fixed(each.router) for each in (old, new)))
    yield from _differences("system.", dict(old.system), dict(new.system))
    yield from _differences("documents.", dict(old.documents), dict(new.documents))
    yield from _differences("nginx.", dict(old.nginx), dict(new.nginx))
    yield from _differences("", *(_variables(each.environment) for each in (old, new)))
    yield from _differences("config/vllm_config.yaml: ", old.engine_args, new.engine_args)
    was, now = old.engine_env, new.engine_env
    names = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
    yield from (f"variables of the engines: {name}: changed" for name in names)


def _fixed(router: RouterSettings) -> dict[str, Any]:
    return {name: value for name, value in router if name not in LIVE_ROUTER_FIELDS}


def _variables(environment: Environment) -> dict[str, Any]:
    """Without those that stand in fields of models.json too, as the router's port does, and those of downloads."""
    apart = (*FIELD_VARIABLES, *DOWNLOAD_VARIABLES)
    return {variable_of(name): value for name, value in environment if name not in apart}


def _differences(place: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in {**old, **new}:
        was, now = old.get(name), new.get(name)
        if was != now:
            yield f"{place}{name}: " + ("changed" if name in UNSHOWN else f"{_shown(was)} → {_shown(now)}")


def _shown(value: Any) -> str:
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"
