"""What an operator asks of the running router: with an admin key, from this machine alone."""

import asyncio
import logging
from typing import Any, Literal, Protocol

from fastapi import FastAPI, Request
from pydantic import BaseModel

from vllm_unified.errors import UserError
from vllm_unified.router.problems import RequestError
from vllm_unified.router.proxies import is_loopback
from vllm_unified.router.registry import Registry, Served
from vllm_unified.settings import Settings
from vllm_unified.settings.changes import changes

# What a proxy in front of us adds; behind one every client seems to be on this machine.
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")
LOOK_SECONDS = 0.1
Action = Literal["start", "stop", "restart", "drain"]

log = logging.getLogger(__name__)


class Operations(Protocol):
    """What is done to the engines. All of it blocks, and raises UserError when it can't be done."""

    def load(self) -> Settings: ...
    def enable(self, new: Settings, key: str) -> None: ...
    def start(self, key: str) -> None: ...
    def stop(self, key: str) -> None: ...
    def restart(self, key: str) -> None: ...


class Operated(Protocol):
    """What the admin calls work on."""

    settings: Settings
    registry: Registry

    def apply(self, settings: Settings) -> None: ...


class Reload(BaseModel):
    """`restarted`: keys of engines that were started with the files as they are now."""

    restarted: list[str] = []


def add_admin(app: FastAPI, router: Operated, operations: Operations) -> None:
    one_at_a_time = asyncio.Lock()

    @app.post("/admin/reload")
    async def reload(request: Request, body: Reload | None = None) -> dict[str, Any]:
        """Take up what changed in the configuration; says what waits for which restart."""
        require_operator(request)
        async with one_at_a_time:
            return await _reload(router, operations, body.restarted if body else [])

    @app.post("/admin/models/{key}/{action}")
    async def act(request: Request, key: str, action: Action) -> dict[str, Any]:
        """Drain a model (nothing more is let in), or start, stop or restart its engine."""
        require_operator(request)
        served = router.registry.by_key(key)
        if served is None:
            known = ", ".join(each.model.key for each in router.registry.served)
            raise RequestError(404, f'no model has the key "{key[:100]}"; there are {known}', code="model_not_found")
        if action == "drain":
            return await _drain(served, router.settings.system.drain_timeout)
        async with one_at_a_time:
            return await _act(router, served, action, operations)


def require_admin(request: Request) -> None:
    """Raises RequestError 403."""
    if not request.state.key.admin:
        raise RequestError(403, f"{request.url.path} is for admin keys", code="permission_denied")


def require_operator(request: Request) -> None:
    """Raises RequestError 403 for any but an admin on this machine."""
    require_admin(request)
    peer = request.client.host if request.client else ""
    if not is_loopback(peer) or any(name in request.headers for name in FORWARDED):
        message = f"{request.url.path} is for this machine alone; call it from there, not through a proxy"
        raise RequestError(403, message, code="permission_denied")


async def _reload(router: Operated, operations: Operations, restarted: list[str]) -> dict[str, Any]:
    try:
        new = await asyncio.to_thread(operations.load)
        found = changes(router.settings, new, restarted)
        for key in found.started:
            await asyncio.to_thread(operations.enable, new, key)
    except UserError as error:
        raise RequestError(400, str(error), code="invalid_configuration") from None
    router.apply(found.settings)
    for key in found.stopped:  # the router sends nothing more there
        await _done(operations.stop, key)
    for line in found.applied:
        log.info("reload: %s", line)
    return found.document()


async def _drain(served: Served, seconds: float) -> dict[str, Any]:
    """Let nothing more in, and wait up to `seconds` for what is in flight."""
    served.drained = True
    for _ in range(round(seconds / LOOK_SECONDS)):
        if not served.gate.active:
            break
        await asyncio.sleep(LOOK_SECONDS)
    return {"model": served.model.key, "state": "drained", "in_flight": served.gate.active}


async def _act(router: Operated, served: Served, action: Action, operations: Operations) -> dict[str, Any]:
    key = served.model.key
    if action == "start" and not served.model.served_here:
        served.drained = False
        return {"model": key, "state": "open"}
    if not served.model.served_here:
        message = f'"{key}" has no engine here, its endpoints serve it; drain and start are what can be done'
        raise RequestError(400, message, code="no_engine")
    if action == "stop":
        await _done(operations.stop, key)
        return {"model": key, "state": "stopped"}
    await _done(operations.restart if action == "restart" else operations.start, key)
    served.drained = False
    if action == "restart":  # it was started with the files as they are now
        await _reload(router, operations, [key])
    return {"model": key, "state": "starting"}


async def _done(work: Any, key: str) -> None:
    try:
        await asyncio.to_thread(work, key)
    except UserError as error:
        raise RequestError(409, str(error), code="not_possible") from None
