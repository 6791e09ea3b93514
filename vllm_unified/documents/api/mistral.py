"""Mistral's `POST /v1/ocr`, which today's clients know."""

import asyncio
import base64
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
from fastapi import APIRouter, Request, Response

from vllm_unified.documents.api.callers import Asking
from vllm_unified.documents.api.forms import NO_JSON
from vllm_unified.documents.api.tasks import as_json, require_success, service_of
from vllm_unified.documents.options import Options
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import DocumentError, on_disk
from vllm_unified.documents.service import Service, Wishes
from vllm_unified.documents.uploads import Upload

# With a document in base64 in it; larger ones are sent as forms, or fetched.
LONGEST_BODY = 64 << 20
LONGEST_LIST = 10_000  # of pages

router = APIRouter()


class ImageUrl(msgspec.Struct):
    url: str


class Source(msgspec.Struct):
    """One of the three addresses, as `type` says. An address is https:, http: or data:."""

    type: Literal["document_url", "image_url", "file"]
    document_url: str = ""
    document_name: str = ""
    image_url: str | ImageUrl = ""
    file_id: str = ""

    @property
    def url(self) -> str:
        if self.type == "document_url":
            return self.document_url
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class Asked(msgspec.Struct):
    """The body. `pages` counts from 0, as numbers or as "0-2,5". Fields that only Mistral's models know are passed
    over."""

    document: Source
    model: str = ""
    pages: list[int] | str | None = None
    include_image_base64: bool = False
    image_limit: int | None = None
    image_min_size: int | None = None


@router.post("/v1/ocr")
async def read(request: Request, caller: Asking) -> Response:
    """A document at an address, or in it; read before the answer comes."""
    service = service_of(request)
    model = await service.model()
    async with _spooled(request, service.incoming) as body, service.decoding:
        asked = _asked(body.read())
        options = msgspec.structs.replace(service.defaults, pages=_from_one(asked.pages))
        upload = await _inside(service, asked.document)
    upload = upload or await service.fetched(asked.document.url)
    task = await service.submit(upload, caller.key, options, "pdf", Wishes())
    status = await service.wait(task.id)
    pages = await service.pages(task.id)
    require_success(status, pages)
    document = {
        "pages": [await asyncio.to_thread(_page, service, task.id, page, asked, options) for page in pages],
        "model": model.name,
        "document_annotation": None,
        "usage_info": {"pages_processed": len(pages), "doc_size_bytes": upload.size},
    }
    return await as_json(document)


@contextlib.asynccontextmanager
async def _spooled(request: Request, folder: Path) -> AsyncIterator[BinaryIO]:
    """The body: of several that come at once, only one is in memory. Raises DocumentError 413."""
    with tempfile.TemporaryFile(dir=folder) as file:
        async for piece in request.stream():
            if file.tell() + len(piece) > LONGEST_BODY:
                raise DocumentError(413, f"the body is larger than {LONGEST_BODY >> 20} MiB", code="too_large")
            with on_disk():
                file.write(piece)
        file.seek(0)
        yield file


def _asked(body: bytes) -> Asked:
    try:
        return msgspec.json.decode(body, type=Asked)
    except msgspec.ValidationError as error:
        raise DocumentError(422, str(error), code="invalid_value") from None
    except NO_JSON as error:
        raise DocumentError(400, f"the body is not JSON: {error}", code="invalid_json") from None


async def _inside(service: Service, source: Source) -> Upload | None:
    """The document that stands in the body; its text is dropped then. None for one at an address."""
    if source.type == "file":
        message = "document.type: files are not kept here; send the document in document_url, as a data: URL"
        raise DocumentError(400, message, code="invalid_value")
    if not source.url:
        raise DocumentError(400, f"document.{source.type} is missing", code="invalid_value")
    if source.url[:5].lower() != "data:":
        return None
    upload = await service.from_base64(source.url, source.document_name)
    source.document_url = source.image_url = ""
    return upload


def _from_one(pages: list[int] | str | None) -> str:
    """Theirs count from 0."""
    if pages is None:
        return ""
    if len(pages) > LONGEST_LIST:
        raise DocumentError(400, f"pages: at most {LONGEST_LIST:,} are named; use ranges", code="invalid_value")
    parts = [str(page) for page in pages] if isinstance(pages, list) else pages.split(",")
    try:
        return ",".join("-".join(str(int(number) + 1) for number in part.split("-")) for part in parts)
    except ValueError:
        raise DocumentError(400, 'pages: use numbers from 0, or "0-2,5"', code="invalid_value") from None


def _page(service: Service, task_id: str, page: Page, asked: Asked, options: Options) -> dict[str, Any]:
    images = [
        _image(service, task_id, block.asset, box, whole=asked.include_image_base64)
        for block in page.blocks
        if block.asset
        for box in block.boxes[:1]
        if not asked.image_min_size or min(box[2] - box[0], box[3] - box[1]) >= asked.image_min_size
    ]
    return {
        "index": page.number - 1,
        "markdown": page.markdown,
        "images": images[: asked.image_limit] if asked.image_limit is not None else images,
        "dimensions": {"dpi": options.dpi, "height": page.height, "width": page.width},
    }


def _image(service: Service, task_id: str, asset: str, box: tuple[int, ...], *, whole: bool) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    encoded = None
    if whole:
        data = (service.folder_of(task_id) / asset).read_bytes()
        encoded = "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
    return {
        "id": asset,
        "top_left_x": x1,
        "top_left_y": y1,
        "bottom_right_x": x2,
        "bottom_right_y": y2,
        "image_base64": encoded,
    }
