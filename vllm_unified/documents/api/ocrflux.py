"""The paths of OCRFlux's document API, with status codes that say what happened."""

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from vllm_unified.documents.api.callers import Asking
from vllm_unified.documents.api.forms import Form, discarded_on_error, flag_in, json_form, received
from vllm_unified.documents.api.tasks import as_json, require_success
from vllm_unified.documents.options import Options
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.service import Service
from vllm_unified.documents.uploads import Upload

FIELDS = ("output_format", "max_page_retries", "skip_cross_page_merge", "url")
OUTPUTS = {"markdown": "result.md", "text": "result.txt"}

router = APIRouter()


@router.post("/convert/file")
async def convert_file(request: Request, caller: Asking) -> Response:
    """A file, as Markdown or text."""
    try:
        service, form = await received(request, caller, ("file",), known=FIELDS)
        with discarded_on_error(form.files):
            upload, options = form.one_file(), _options(form)
        return await _converted(service, form, upload, options, caller.key)
    except DocumentError as error:
        return _failed(error)


@router.post("/convert/url")
async def convert_url(request: Request, caller: Asking) -> Response:
    """A file that stands at `url`, as Markdown or text."""
    try:
        service, form = await json_form(request, known=FIELDS)
        options = _options(form)
        upload = await service.fetched(form.fields.get("url", ""))
        return await _converted(service, form, upload, options, caller.key)
    except DocumentError as error:
        return _failed(error)


async def _converted(service: Service, form: Form, upload: Upload, options: Options, key: str) -> Response:
    task = await service.submit(upload, key, options, "pdf", form.wishes)
    status = await service.wait(task.id)
    pages = await service.pages(task.id)
    require_success(status, pages)
    wanted = _wanted(form)
    file = service.folder_of(task.id) / OUTPUTS[wanted]
    content = await asyncio.to_thread(file.read_text, encoding="utf-8")
    fallback = [page.number for page in pages if page.reason]
    metadata: dict[str, Any] = {
        "filename": upload.name,
        "file_size": upload.size,
        "pages_processed": len(pages),
        "fallback_pages": fallback,
        "task_id": task.id,
    }
    if form.fields.get("url"):
        metadata["url"] = form.fields["url"]
    answer = {"status": "success", "format": wanted, "content": content, "error": None, "metadata": metadata}
    return await as_json(answer)


def _wanted(form: Form) -> str:
    wanted = form.fields.get("output_format", "").strip().lower() or "markdown"
    if wanted not in OUTPUTS:
        message = f'output_format: "{wanted[:40]}" is unknown; use markdown or text'
        raise DocumentError(400, message, code="invalid_value")
    return wanted


def _options(form: Form) -> Options:
    changes: dict[str, Any] = {"formats": (_wanted(form),)}
    if retries := form.fields.get("max_page_retries", "").strip():
        if not retries.isdecimal() or len(retries) > 2 or int(retries) > 10:
            raise DocumentError(400, "max_page_retries: use 0 to 10", code="invalid_value")
        changes["retries"] = int(retries)
    if "skip_cross_page_merge" in form.fields:
        changes["join_pages"] = not flag_in(form.fields, "skip_cross_page_merge", default=False)
    return msgspec.structs.replace(form.options, **changes)


def _failed(error: DocumentError) -> Response:
    document = {"status": "error", "format": None, "content": None, "error": str(error), "metadata": None}
    return JSONResponse(document, error.status, {**error.headers, "x-error-source": "documents"})
