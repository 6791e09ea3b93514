"""The FastAPI application: everything but forwarding is plain FastAPI."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_unified import __version__, state
from vllm_unified.devices import read_devices
from vllm_unified.router import health
from vllm_unified.router.forward import Forwarder
from vllm_unified.router.problems import RequestError
from vllm_unified.router.registry import Registry, Upstream
from vllm_unified.router.routes import ROUTES
from vllm_unified.settings import Settings

OPEN_PATHS = frozenset({"/live", "/ready", "/health"})


def create_app(settings: Settings) -> FastAPI:
    """Raises UserError when there is no API key."""
    api_key = settings.require_api_key()
    registry = Registry([Upstream(model, settings.engine_url(model)) for model in settings.models])
    forwarder = Forwarder(registry, api_key, settings.router.max_body_mib << 20, settings.run)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await forwarder.open()
        interval = settings.router.health_check_interval
        watching = asyncio.create_task(health.watch(registry, forwarder.session, settings.run, interval))
        yield
        watching.cancel()
        await forwarder.close()

    # The documentation pages load their scripts from a CDN, which a closed network has not.
    app = FastAPI(title="vllm-unified", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_KeyRequired, api_key=api_key)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_exception)
    _add_health(app, registry)
    _add_information(app, settings, registry)
    for route in ROUTES:
        app.add_route(route.path, forwarder.application(route), methods=["POST"])  # type: ignore[arg-type]
    return app


def _add_health(app: FastAPI, registry: Registry) -> None:
    @app.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        waiting = {
            each.model.key: each.problem for each in registry.upstreams if each.model.required and not each.ready
        }
        if waiting:
            return JSONResponse({"status": "not ready", "waiting_for": waiting}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/health")
    async def health_of_all() -> Response:
        healthy = all(each.ready for each in registry.upstreams)
        status = {"status": "healthy" if healthy else "degraded", "services": _services(registry)}
        return JSONResponse(status, 200 if healthy else 503)


def _services(registry: Registry) -> dict[str, dict[str, Any]]:
    return {
        each.model.key: {
            "status": "healthy" if each.ready else "unhealthy",
            "port": each.model.port,
            **({"model": each.model.name} if each.ready else {"error": each.problem}),
        }
        for each in registry.upstreams
    }


def _add_information(app: FastAPI, settings: Settings, registry: Registry) -> None:
    started = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entries = [
            {"id": name, "object": "model", "created": started, "owned_by": "vllm-unified", "root": each.model.name}
            for each in registry.upstreams
            for name in each.model.names
        ]
        return {"object": "list", "data": entries}

    @app.get("/models")
    async def models_with_ports() -> dict[str, Any]:
        entries = [
            {"id": model.name, "type": model.type, "port": model.port, "path": model.path} for model in settings.models
        ]
        return {"data": entries}

    @app.get("/system/info")
    def system_info() -> dict[str, Any]:
        return {"gpu_info": _gpu_info(settings), "processes": _processes(settings), "config": _public_config(settings)}


def _gpu_info(settings: Settings) -> dict[str, Any]:
    """Memory in MiB, utilization in percent."""
    gpus = [
        {
            "id": device.index,
            "name": device.name,
            "memory_total": device.total_bytes >> 20,
            "memory_used": (device.total_bytes - device.free_bytes) >> 20,
            "memory_free": device.free_bytes >> 20,
            "utilization": device.utilization,
        }
        for device in read_devices(settings.environment.visible_devices, settings.devices_file)
        if device.kind == "cuda"
    ]
    return {"gpus": gpus, "count": len(gpus)}


def _processes(settings: Settings) -> dict[str, Any]:
    states = {model.key: state.read(settings.run, model.key) for model in settings.models}
    return {
        key: {"pid": each.engine.pid if each.engine else None, "status": each.phase} for key, each in states.items()
    }


def _public_config(settings: Settings) -> dict[str, Any]:
    """Without the models' `env`, where tokens may stand."""
    models = {model.key: model.model_dump(exclude={"key", "env"}, exclude_none=True) for model in settings.models}
    return {"models": models, "router": settings.router.model_dump(), "system": settings.system.model_dump()}


class _KeyRequired:
    """Every path but the health checks wants the API key, also those that do not exist."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.api_key = api_key.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self.api_key):
                what = "wrong API key" if given else "no API key"
                error = RequestError(401, f"{what}; send `Authorization: Bearer KEY`", code="invalid_api_key")
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    what = {404: "no such path", 405: "this path does not take that method"}.get(status, str(error))
    message = f"{request.method} {json.dumps(request.url.path)[1:-1][:200]}: {what}"
    return RequestError(
        status, message, code="not_found" if status == 404 else "bad_request", headers=headers
    ).response()


async def _answer_exception(_request: Request, _error: Exception) -> Response:
    return RequestError(500, "the router failed; its log says why", code="internal_error").response()
