"""The FastAPI application: everything that is not forwarded to a model."""

import json
import time
from collections.abc import Mapping
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from vllm_unified import __version__, state
from vllm_unified.devices import read_devices
from vllm_unified.router.admin import Operations, add_admin, require_admin
from vllm_unified.router.docs import add_docs
from vllm_unified.router.engine_metrics import merged, of_engine, router_address, sd_document
from vllm_unified.router.metrics import CONTENT_TYPE
from vllm_unified.router.models import model_entry, model_list
from vllm_unified.router.problems import RequestError, failure
from vllm_unified.router.registry import Served
from vllm_unified.router.routes import ROUTES
from vllm_unified.router.serving import HEALTH_PATHS, Router
from vllm_unified.router.upstream import fetch
from vllm_unified.router.usage import add_usage
from vllm_unified.settings import Settings


def create_app(router: Router, operations: Operations) -> FastAPI:
    # The documentation pages of FastAPI load their scripts from a CDN, which a closed network has not.
    app = FastAPI(title="vllm-unified", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(Exception, _answer_exception)
    _add_health(app, router)
    _add_information(app, router)
    _add_metrics(app, router)
    add_usage(app, router.usage)
    add_admin(app, router, operations)
    add_docs(app, router.registry, HEALTH_PATHS, lambda: _openapi_of_documents(router))
    for route in ROUTES:  # POST never comes here
        app.add_api_route(route.path, _post_only, methods=["GET"], include_in_schema=False)
    return app


async def _openapi_of_documents(router: Router) -> Mapping[str, Any]:
    """Empty where the service does not run."""
    if not router.settings.reads_documents:
        return {}
    try:
        found: Mapping[str, Any] = json.loads(await router.documents.ask("/openapi.json"))
    except (RequestError, ValueError):
        return {}
    return found


async def _post_only() -> Response:
    raise HTTPException(405, headers={"allow": "POST"})


def _add_health(app: FastAPI, router: Router) -> None:
    @app.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", responses={503: {"description": "a model that is required is not ready"}})
    async def ready() -> Response:
        waiting = {
            each.model.key: each.problem for each in router.registry.served if each.model.required and not each.ready
        }
        if waiting:
            return JSONResponse({"status": "not ready", "waiting_for": waiting}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/health", responses={503: {"description": "a model is not ready"}})
    async def health_of_all() -> Response:
        served = router.registry.served
        healthy = all(each.ready for each in served)
        status: dict[str, Any] = {"status": "healthy" if healthy else "degraded", "services": _services(served)}
        status |= _reader(served)
        if router.keys.problem:
            status["keys"] = "config/keys.yaml is wrong, and the keys stay as they were; the router's log says more"
        return JSONResponse(status, 200 if healthy else 503)


def _services(served: tuple[Served, ...]) -> dict[str, dict[str, Any]]:
    return {
        each.model.key: {
            "status": "healthy" if each.ready else "unhealthy",
            "port": each.model.port or None,
            **({"model": each.model.name} if each.ready else {"error": each.problem}),
        }
        for each in served
    }


def _reader(served: tuple[Served, ...]) -> dict[str, Any]:
    """What scripts of the OCR applications before this one wait for; nothing where no model reads documents."""
    ready = next((each.ready for each in served if each.model.type == "ocr"), None)
    if ready is None:
        return {}
    words = {"model_loaded": ready, "inference_engine": "vllm", "vllm_configured": True, "vllm_healthy": ready}
    return {**words, "timestamp": time.time()}


def _add_information(app: FastAPI, router: Router) -> None:
    started = int(time.time())

    @app.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        return model_list(router.registry, request.state.key, router.settings, started)

    @app.get("/v1/models/{name:path}")
    def model(request: Request, name: str) -> dict[str, Any]:
        return model_entry(name, router.registry, request.state.key, router.settings, started)

    @app.get("/models")
    async def models_with_ports(request: Request) -> dict[str, Any]:
        entries = [
            {"id": each.model.name, "type": each.model.type, "port": each.model.port or None, "path": each.model.path}
            for each in router.registry.of(request.state.key)
        ]
        return {"data": entries}

    @app.get("/system/info")
    def system_info(request: Request) -> dict[str, Any]:
        require_admin(request)
        settings = router.settings
        return {"gpu_info": _gpu_info(settings), "processes": _processes(settings), "config": _public_config(settings)}


def _add_metrics(app: FastAPI, router: Router) -> None:
    """For Prometheus' key and admin keys: they tell the names of all models and keys."""

    async def require_reader(request: Request) -> None:
        if request.state.key is not router.keys.scraper:
            require_admin(request)

    reading = [Depends(require_reader)]

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=reading)
    def metrics() -> Response:
        return Response(router.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/metrics/engines", response_class=PlainTextResponse, dependencies=reading)
    async def engine_metrics() -> Response:
        return Response(await merged(router.registry, fetch), media_type=CONTENT_TYPE)

    @app.get("/metrics/engines/{key}", response_class=PlainTextResponse, dependencies=reading)
    async def metrics_of_engine(key: str) -> Response:
        return Response(await of_engine(router.registry, key, fetch), media_type=CONTENT_TYPE)

    @app.get("/metrics/documents", response_class=PlainTextResponse, dependencies=reading)
    async def documents_metrics() -> Response:
        return Response(await router.documents.ask("/metrics"), media_type=CONTENT_TYPE)

    @app.get("/sd", dependencies=reading)
    async def service_discovery(request: Request) -> list[dict[str, Any]]:
        address = router_address(request.headers.get("host", ""), router.settings.router_url)
        return sd_document(router.registry, address, documents=router.settings.reads_documents)


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
    states = {model.key: state.read(settings.run, model.key) for model in settings.engines}
    return {
        key: {"pid": each.engine.pid if each.engine else None, "status": each.phase} for key, each in states.items()
    }


def _public_config(settings: Settings) -> dict[str, Any]:
    """Without the models' `env` and their endpoints' keys, where tokens may stand."""
    hidden: Any = {"key": True, "env": True, "endpoints": {"__all__": {"api_key"}}}
    models = {model.key: model.model_dump(exclude=hidden, exclude_none=True) for model in settings.models}
    return {"models": models, "router": settings.router.model_dump(), "system": settings.system.model_dump()}


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    what = {404: "no such path", 405: "this path does not take that method"}.get(status, str(error))
    message = f"{request.method} {json.dumps(request.url.path)[1:-1][:200]}: {what}"
    return RequestError(
        status, message, code="not_found" if status == 404 else "bad_request", headers=headers
    ).response()


async def _answer_request_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    return error.response()


async def _answer_invalid(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return RequestError(400, f"{place}: {first['msg']}", code="invalid_value", param=place).response()


async def _answer_exception(_request: Request, _error: Exception) -> Response:
    return failure().response()
