"""The paths of the DeepSeek-OCR applications before their tasks, and the door of their workers."""

import asyncio
import base64
import binascii
import hmac
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from vllm_unified.documents import products
from vllm_unified.documents.api.callers import Asking
from vllm_unified.documents.api.forms import NO_JSON, Form, discarded_on_error, received, small_body
from vllm_unified.documents.api.tasks import as_json, require_success, service_of
from vllm_unified.documents.options import Options, checked
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import DocumentError

INFERENCE_ENGINE = "vllm"
# Of theirs: what no model was trained on, so that it is taken and changes nothing; the answer says so.
WITHOUT_EFFECT = ("include_caption", "schema", "test_compress")
LONGEST_INFERENCE = 64 << 20
OUTPUTS = {"markdown": "result.md", "html": "result.html", "docx": "result.docx"}

router = APIRouter()


class Inference(msgspec.Struct):
    """The body of /internal/infer."""

    prompt: str
    image_base64: str | None = None
    base_size: int | None = None
    image_size: int | None = None
    crop_mode: bool | None = None


@router.post("/api/ocr")
async def read_image(request: Request, caller: Asking) -> Response:
    """An image, read before the answer comes."""
    service, form = await received(request, caller, ("image",), known=("grounding", *WITHOUT_EFFECT))
    with discarded_on_error(form.files):
        upload, grounded = form.one_file(), form.flag("grounding", default=True)
    task = await service.submit(upload, caller.key, form.options, "image", form.wishes)
    status = await service.wait(task.id)
    pages = await service.pages(task.id)
    require_success(status, pages)
    first = pages[0]
    document = {
        "success": True,
        "text": "\n\n".join(page.markdown for page in pages),
        "raw_text": "\n\n".join(page.raw_text for page in pages),
        "boxes": products.boxes_of(first) if grounded else [],
        "image_dims": {"w": first.width, "h": first.height},
        "metadata": _metadata(form, task.id, first),
    }
    return JSONResponse(document)


@router.post("/api/process-pdf")
async def read_pdf(request: Request, caller: Asking) -> Response:
    """A PDF, read before the answer comes: as JSON, or as a file of the format that is asked for."""
    known = ("grounding", "output_format", *WITHOUT_EFFECT)
    service, form = await received(request, caller, ("pdf_file",), known=known)
    with discarded_on_error(form.files):
        wanted, grounded = _wanted(form), form.flag("grounding", default=True)
        upload = form.one_file()
    options = msgspec.structs.replace(form.options, formats=() if wanted == "json" else (wanted,))
    task = await service.submit(upload, caller.key, options, "pdf", form.wishes)
    status = await service.wait(task.id)
    pages = await service.pages(task.id)
    require_success(status, pages)
    if wanted in OUTPUTS:
        file = service.folder_of(task.id) / OUTPUTS[wanted]
        return FileResponse(file, filename=products.name_for(file.name, task.name))
    document = {
        "success": True,
        "total_pages": len(pages),
        "pages": await asyncio.to_thread(lambda: [_page(page, grounded=grounded) for page in pages]),
        "metadata": _metadata(form, task.id, pages[0]),
    }
    return await as_json(document)


@router.post("/internal/infer")
async def infer(request: Request, caller: Asking, x_internal_token: Annotated[str, Header()] = "") -> dict[str, str]:
    """One question to the model, by a worker on this machine. The answer is the model's to the letter."""
    service = service_of(request)
    wanted = service.settings.environment.internal_api_token
    if not wanted or not hmac.compare_digest(x_internal_token.encode(), wanted.encode()):
        message = "X-Internal-Token is not that of INTERNAL_API_TOKEN in .env, without which this path is closed"
        raise DocumentError(403, message, code="permission_denied")
    try:
        asked = msgspec.json.decode(await small_body(request, LONGEST_INFERENCE), type=Inference)
        encoded = "".join((asked.image_base64 or "").rpartition(",")[2].split())
        image = base64.b64decode(encoded, validate=True)
    except (*NO_JSON, binascii.Error) as error:
        raise DocumentError(400, str(error), code="invalid_value") from None
    options = checked(
        Options(
            mode="prompt",
            prompt=asked.prompt,
            base_size=asked.base_size,
            image_size=asked.image_size,
            crop_mode=asked.crop_mode,
        )
    )
    return {"text": await service.ask_once(image, options, caller.key)}


def _page(page: Page, *, grounded: bool) -> dict[str, Any]:
    return {
        "page_number": page.number,
        "text": page.markdown,
        "raw_text": page.raw_text,
        "boxes": products.boxes_of(page) if grounded else [],
        "images": [block.asset for block in page.blocks if block.asset],
        "image_dims": {"w": page.width, "h": page.height},
        "warnings": [*page.warnings, *([page.reason] if page.reason else [])],
    }


def _wanted(form: Form) -> str:
    wanted = form.fields.get("output_format", "").strip().lower() or "markdown"
    if wanted not in (*OUTPUTS, "json"):
        message = f'output_format: "{wanted[:40]}" is unknown; use {", ".join(OUTPUTS)} or json'
        raise DocumentError(400, message, code="invalid_value")
    return wanted


def _metadata(form: Form, task_id: str, first: Page) -> dict[str, Any]:
    options = form.options
    return {
        "mode": options.mode,
        "grounding": form.flag("grounding", default=True),
        "base_size": options.base_size,
        "image_size": options.image_size,
        "crop_mode": options.crop_mode,
        "resolution_used": first.resolution_used or None,
        "inference_engine": INFERENCE_ENGINE,
        "task_id": task_id,
        "without_effect": [name for name in WITHOUT_EFFECT if name in form.fields],
    }
