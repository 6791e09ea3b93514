"""The documentation in a browser, `/docs`. Everything it needs comes from this machine: a closed network has no CDN."""

import base64
import importlib.resources
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse, Response

from vllm_unified.router.openapi import add_documents, add_forwarded
from vllm_unified.router.registry import Registry

# What a browser asks for before its user can say a key.
DOCS_PATHS = frozenset(
    {"/docs", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/docs/start.js", "/openapi.json"}
)
HEADERS = {
    # Swagger UI's icons are data: addresses.
    "content-security-policy": "default-src 'self'; img-src 'self' data:",
    "x-content-type-options": "nosniff",
}
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
    '<path d="M1 1l3 6 3-6" fill="none" stroke="#2f6fed" stroke-width="1.5"/></svg>'
)
# Addresses without a host and without a leading slash hold behind a proxy that adds a path, too.
PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vllm-unified</title>
<link rel="icon" href="data:image/svg+xml;base64,{base64.b64encode(ICON.encode()).decode()}">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# validatorUrl: otherwise Swagger UI sends the document to swagger.io to have it checked.
START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  tryItOutEnabled: true,
  validatorUrl: null
});
"""


def add_docs(
    app: FastAPI, registry: Registry, open_paths: Collection[str], documents: Callable[[], Awaitable[Mapping[str, Any]]]
) -> None:
    """`/docs`, and `/openapi.json` with the forwarded paths. Both are for everyone: they are read before a key is said.

    `open_paths`: those of the application that need no key. `documents`: the OpenAPI document of their service.
    """

    @app.get("/openapi.json", include_in_schema=False)
    async def document() -> dict[str, Any]:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        add_forwarded(found, registry, open_paths)
        add_documents(found, await documents())
        return found

    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers=HEADERS)

    @app.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(START, headers=HEADERS, media_type="text/javascript")

    _add_asset(app, "swagger-ui.css", "text/css")
    _add_asset(app, "swagger-ui-bundle.js", "text/javascript")


def _add_asset(app: FastAPI, name: str, media_type: str) -> None:
    path = Path(str(importlib.resources.files("fastapi_swagger.resources") / name))

    @app.get(f"/docs/{name}", include_in_schema=False)
    async def asset() -> Response:
        return FileResponse(path, headers=HEADERS, media_type=media_type)
