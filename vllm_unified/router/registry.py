"""Which upstream serves a model, and what is known of its health."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_unified.router.problems import RequestError
from vllm_unified.router.routes import ROUTES, Route
from vllm_unified.settings import Kind, Model

LONGEST_ECHO = 100


@dataclass
class Upstream:
    """A model's own server.

    `error`: why it is not ready, in words for everyone; None when it is ready. `reason`: what its log says,
    for those with a key. `closed`: its keeper says that nothing may be sent to it.
    """

    model: Model
    url: str
    closed: str | None = None
    error: str | None = "not looked at yet"
    reason: str | None = None

    @property
    def ready(self) -> bool:
        return self.problem is None

    @property
    def problem(self) -> str | None:
        return self.closed or self.error


class Registry:
    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self.upstreams = tuple(upstreams)
        self._by_name = {name: upstream for upstream in upstreams for name in upstream.model.names}

    def choose(self, name: object, route: Route) -> Upstream:
        """Raises RequestError: 400 for a missing, wrong or unsuitable model, 404 for one that is not served."""
        if name is None:
            return self._only_one(route.kinds[0])
        if not isinstance(name, str):
            raise RequestError(400, "model must be a string", code="invalid_type", param="model")
        upstream = self._by_name.get(name)
        if upstream is None:
            raise RequestError(
                404,
                f'no model "{name[:LONGEST_ECHO]}"; served here: {", ".join(sorted(self._by_name))}',
                code="model_not_found",
                param="model",
            )
        if upstream.model.type not in route.kinds:
            suited = ", ".join(each.path for each in ROUTES if upstream.model.type in each.kinds)
            raise RequestError(
                400,
                f'"{name}" is a model for {upstream.model.type}; {route.path} is not for it, use {suited}',
                code="wrong_model_type",
                param="model",
            )
        return upstream

    def _only_one(self, kind: Kind) -> Upstream:
        suited = [upstream for upstream in self.upstreams if upstream.model.type == kind]
        if len(suited) == 1:
            return suited[0]
        names = ", ".join(upstream.model.name for upstream in suited) or f"none of the type {kind} is served"
        raise RequestError(400, f"say which model: {names}", code="model_required", param="model")
