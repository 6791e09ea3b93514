"""The document service as a whole: its paths, its errors, its life."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_unified import __version__, tracing
from vllm_unified.documents.api import mistral, ocrflux, older, tasks
from vllm_unified.documents.api.openapi import describe
from vllm_unified.documents.metrics import CONTENT_TYPE
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.service import Service
from vllm_unified.documents.uploads import incomplete
from vllm_unified.errors import UserError
from vllm_unified.settings import Settings

STOP_SECONDS = 5
# By whose they are, as the documentation has them.
PATHS = {
    "documents": tasks,
    "documents, as the DeepSeek-OCR applications have them": older,
    "documents, as OCRFlux has them": ocrflux,
    "documents, as Mistral has them": mistral,
}

log = logging.getLogger(__name__)


def create_app(service: Service) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    # The documentation's pages are the router's, with what /openapi.json says here in them.
    app = FastAPI(title="vllm-unified documents", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.state.api_key = service.settings.require_api_key()
    for name, each in PATHS.items():
        app.include_router(each.router, tags=[name])
    app.add_api_route("/health", health, methods=["GET"], include_in_schema=False)
    app.add_api_route("/metrics", metrics, methods=["GET"], include_in_schema=False)
    described = describe(app, service.defaults)
    app.openapi = lambda: described  # type: ignore[method-assign]  # FastAPI's own way to extend it
    if service.settings.environment.otlp_endpoint is not None:
        app.add_middleware(_Traced)
    app.add_exception_handler(DocumentError, _answer_document_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(ClientDisconnect, _answer_incomplete)
    app.add_exception_handler(Exception, _answer_exception)
    return app


class _Traced:
    """What a request brings is part of the router's span of it; the router sends one when it traces."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope.get("headers", ()) if name == tracing.HEADER), b"")
        tracing.CURRENT.set(tracing.parsed(given))
        await self._app(scope, receive, send)


async def health(request: Request) -> Response:
    """With the words of both earlier applications. 503 while no OCR model is ready.

    What is known, so that it waits for no disk and no router.
    """
    service: Service = request.app.state.service
    model = service.engine.found
    ready = model is not None and model.ready
    document = {
        "status": "healthy" if ready else "starting",
        "model_loaded": ready,
        "inference_engine": older.INFERENCE_ENGINE,
        "vllm_configured": model is not None,
        "vllm_healthy": ready,
        "timestamp": time.time(),
        "repetition_guard": {"works": service.guard.works, "message": service.guard.message},
        "tasks": service.counts,
    }
    return JSONResponse(document, 200 if ready else 503)


async def metrics(request: Request) -> Response:
    """For Prometheus; the router has it as /metrics/documents."""
    service: Service = request.app.state.service
    text = await asyncio.to_thread(service.metrics.text, service.jobs.load(), service.pages_in_flight())
    return Response(text, media_type=CONTENT_TYPE)


def serve(settings: Settings) -> None:
    """Until SIGTERM. Raises UserError where it can't listen or its database can't be used."""
    # It would log each address that is asked, with what stands in it.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = uvicorn.Config(
        create_app(Service(settings)),
        host="127.0.0.1",
        port=settings.documents.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    try:
        uvicorn.Server(config).run()
    except SystemExit:  # uvicorn has said which address is taken
        raise UserError(f"documents.port: 127.0.0.1:{settings.documents.port} can't be listened on") from None


async def _answer_document_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, DocumentError):
        raise error
    return _error(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    what = {404: "no such path", 405: "this path does not take that method"}.get(error.status_code, str(error.detail))
    message = f"{request.method} {json.dumps(request.url.path)[1:-1][:200]}: {what}"
    code = "not_found" if error.status_code == 404 else "bad_request"
    return _error(DocumentError(error.status_code, message, code=code, headers=error.headers))


async def _answer_invalid(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return _error(DocumentError(400, f"{place}: {first['msg']}", code="invalid_value"))


async def _answer_incomplete(_request: Request, _left: Exception) -> Response:
    """Nobody waits for it."""
    return _error(incomplete())


async def _answer_exception(_request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return _error(
        DocumentError(500, "the document service failed; run/logs/documents.log says why", code="internal_error")
    )


def _error(error: DocumentError) -> Response:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    body: dict[str, Any] = {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}
    return JSONResponse(body, error.status, {**error.headers, "x-error-source": "documents"})
