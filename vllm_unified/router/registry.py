"""Which model a request means, which replicas serve it, and which of them takes it."""

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence

from vllm_unified.router.gate import Gate
from vllm_unified.router.keys import Key
from vllm_unified.router.outbox import Outbox
from vllm_unified.router.problems import RequestError
from vllm_unified.router.replica import Replica
from vllm_unified.router.routes import ROUTES, Route
from vllm_unified.router.shapes import is_deepseek_ocr, prompts_of
from vllm_unified.settings import Kind, Model, Settings
from vllm_unified.settings.schema import Endpoint

LONGEST_ECHO = 100
RETRY_AFTER_SECONDS = 5  # where nobody knows
LONGEST_RETRY_AFTER = 600


class Served:
    """A model as the router serves it: its settings, its replicas, its gate."""

    def __init__(self, model: Model, replicas: Sequence[Replica]) -> None:
        self.prompts: frozenset[str] | None = None  # of an embedding model that is served here
        self.gate = Gate(model.max_concurrent, model.max_queue, model.queue_timeout)
        self.drained = False  # an operator's word: nothing more is let in
        self.waiting = 0  # requests that wait for it to be ready
        self._turn = 0
        self._take(model, replicas)

    def _take(self, model: Model, replicas: Sequence[Replica]) -> None:
        self.model = model
        self.handles = (model.key, *model.names)  # what a key's list of models may call it
        self.deepseek_ocr = is_deepseek_ocr(model)
        self.replicas = tuple(replicas)

    def change(self, model: Model, replicas: Sequence[Replica]) -> None:
        self._take(model, replicas)
        self.gate.change(model.max_concurrent, model.max_queue, model.queue_timeout)

    @property
    def ready(self) -> bool:
        return not self.drained and any(replica.ready for replica in self.replicas)

    @property
    def problem(self) -> str | None:
        """Why it is not ready, in words for everyone."""
        if self.ready:
            return None
        if self.drained:
            return "drained by an operator"
        if len(self.replicas) == 1:
            return self.replicas[0].problem
        return "; ".join(f"{replica.name}: {replica.problem}" for replica in self.replicas)

    def retry_after(self, now: float) -> int:
        """Seconds after which a request is worth another try."""
        known = [at for each in self.replicas if (at := each.opens_at(now)) is not None]
        seconds = math.ceil(min(known) - now) if known else RETRY_AFTER_SECONDS
        return max(1, min(seconds, LONGEST_RETRY_AFTER))

    def wait_seconds(self, now: float) -> float:
        """What a request that comes now is likely to wait, as Retry-After tells those that are refused."""
        return self.gate.wait_seconds if self.ready else float(self.retry_after(now))

    def open_to(self, key: Key) -> bool:
        return key.may_use(self.handles)

    @property
    def reason(self) -> str | None:
        return next((replica.reason for replica in self.replicas if replica.reason), None)

    def pick(self, now: float, tried: Collection[Replica], session: bytes | None) -> Replica | None:
        """The replica for a request that `tried` some already; None when nothing may be sent anywhere.

        One that was not tried goes first, then one whose last look was good: a look is some seconds old, and where
        nothing else is left, a request finds out.
        """
        replicas = self.replicas
        if len(replicas) == 1:
            only = replicas[0]
            return only if only.takes(now) else None
        open_ones = [each for each in replicas if each.takes(now)]
        fresh = [each for each in open_ones if each not in tried] or open_ones
        best = [each for each in fresh if each.error is None] or fresh
        return self._balanced(best, session) if best else None

    def has_untried(self, now: float, tried: Collection[Replica]) -> bool:
        """Whether `pick` would give one that is not among `tried`."""
        return any(each not in tried and each.takes(now) for each in self.replicas)

    def _balanced(self, replicas: list[Replica], session: bytes | None) -> Replica:
        balancing = self.model.balancing
        if balancing == "sticky" and session:
            return max(replicas, key=lambda each: _affinity(session, each))
        self._turn += 1
        if balancing == "round_robin":
            turns = [each for each in replicas for _ in range(each.endpoint.weight)]
            return turns[self._turn % len(turns)]
        # Of equally loaded ones not always the first.
        start = self._turn % len(replicas)
        return min(replicas[start:] + replicas[:start], key=lambda each: (each.in_flight + 1) / each.endpoint.weight)


def _affinity(session: bytes, replica: Replica) -> float:
    """Rendezvous hashing: when a replica goes, only its own sessions move."""
    digest = hashlib.blake2b(session + b"\0" + replica.name.encode(), digest_size=8).digest()
    return float((int.from_bytes(digest, "big") / 2**64) ** (1 / replica.endpoint.weight))


class Registry:
    """All models, by their names. `apply` takes up new settings; what stays keeps its connections and counts."""

    def __init__(self, settings: Settings) -> None:
        self.served: tuple[Served, ...] = ()
        self._outbox = Outbox()
        self._by_name: dict[str, Served] = {}
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        known = {served.model.key: served for served in self.served}
        before_all = {replica for served in self.served for replica in served.replicas}
        served = []
        for model in settings.models:
            before = known.get(model.key)
            replicas = _replicas(settings, model, before.replicas if before else (), self._outbox)
            if before:
                before.change(model, replicas)
            after = before or Served(model, replicas)
            is_known = model.type == "embedding" and model.served_here and not model.endpoints
            after.prompts = prompts_of(settings.folder(model)) if is_known else None
            served.append(after)
        self.served = tuple(served)
        self._by_name = {name: each for each in served for name in each.model.names}
        for gone in before_all.difference(each for one in served for each in one.replicas):
            gone.retire()

    def by_name(self, name: str) -> Served | None:
        return self._by_name.get(name)

    def by_key(self, key: str) -> Served | None:
        return next((served for served in self.served if served.model.key == key), None)

    def choose(self, name: object, route: Route, key: Key) -> Served:
        """Raises RequestError: 400 for a missing, wrong or unsuitable model, 403 for one that is not `key`'s, 404 for
        one that is not served.
        """
        if name is None:
            return self._only_one(route.kinds[0], key)
        if not isinstance(name, str):
            raise RequestError(400, "model must be a string", code="invalid_type", param="model")
        served = self._by_name.get(name)
        if served is None:
            known = ", ".join(sorted(name for each in self.of(key) for name in each.model.names)) or "none"
            raise RequestError(
                404,
                f'no model "{name[:LONGEST_ECHO]}"; served here: {known}',
                code="model_not_found",
                param="model",
            )
        if not served.open_to(key):
            raise RequestError(403, f'this API key may not use "{name}"', code="model_not_allowed", param="model")
        if served.model.type not in route.kinds:
            suited = ", ".join(each.path for each in ROUTES if served.model.type in each.kinds)
            raise RequestError(
                400,
                f'"{name}" is a model for {served.model.type}; {route.path} is not for it, use {suited}',
                code="wrong_model_type",
                param="model",
            )
        return served

    def of(self, key: Key) -> list[Served]:
        """The models that `key` may use."""
        return [served for served in self.served if served.open_to(key)]

    def _only_one(self, kind: Kind, key: Key) -> Served:
        suited = [served for served in self.of(key) if served.model.type == kind]
        if len(suited) == 1:
            return suited[0]
        names = ", ".join(served.model.name for served in suited) or f"none of the type {kind} is served"
        raise RequestError(400, f"say which model: {names}", code="model_required", param="model")


def _replicas(settings: Settings, model: Model, before: Iterable[Replica], outbox: Outbox) -> list[Replica]:
    known = {(each.name, each.endpoint, each.model): each for each in before}
    wanted = [
        (endpoint.url.partition("://")[2], endpoint, endpoint.model or model.name, False)
        for endpoint in model.endpoints
    ]
    if model.served_here:
        own = Endpoint.model_construct(
            url=settings.engine_url(model), api_key=settings.environment.api_key, timeout=0.0, weight=1
        )
        wanted.insert(0, (model.key, own, model.name, True))
    return [
        known.get((name, endpoint, upstream_model))
        or Replica(
            name,
            endpoint,
            upstream_model,
            local=local,
            ca=settings.home / endpoint.ca if endpoint.ca else None,
            outbox=outbox,
        )
        for name, endpoint, upstream_model, local in wanted
    ]
