"""Mistral's `POST /v1/ocr`, which today's clients know."""

import asyncio
import base64
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response

from vllm_unified.documents.api.callers import Asking
from vllm_unified.documents.api.forms import small_body
from vllm_unified.documents.api.tasks import as_json, require_success, service_of
from vllm_unified.documents.options import Options
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.service import Service, Wishes
from vllm_unified.documents.uploads import Upload

# All of it is in memory at once, with a document in base64 in it; larger ones are sent as forms, or fetched.
LONGEST_BODY = 64 << 20

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
    asked = _asked(await small_body(request, LONGEST_BODY))
    model = await service.model()
    upload = await _upload(service, asked.document)
    options = msgspec.structs.replace(service.defaults, pages=_from_one(asked.pages))
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


def _asked(body: bytes) -> Asked:
    try:
        return msgspec.json.decode(body, type=Asked)
    except msgspec.ValidationError as error:
        raise DocumentError(422, str(error), code="invalid_value") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise DocumentError(400, f"the body is not JSON: {error}", code="invalid_json") from None


async def _upload(service: Service, source: Source) -> Upload:
    if source.type == "file":
        message = "document.type: files are not kept here; send the document in document_url, as a data: URL"
        raise DocumentError(400, message, code="invalid_value")
    image = source.image_url if isinstance(source.image_url, str) else source.image_url.url
    url = source.document_url if source.type == "document_url" else image
    if not url:
        raise DocumentError(400, f"document.{source.type} is missing", code="invalid_value")
    if url[:5].lower() == "data:":
        return await service.from_base64(url, source.document_name)
    return await service.fetched(url)


def _from_one(pages: list[int] | str | None) -> str:
    """Theirs count from 0."""
    if pages is None:
        return ""
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
