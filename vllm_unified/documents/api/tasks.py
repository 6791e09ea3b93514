"""A document is a task: sent, watched, fetched, cancelled, deleted."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from vllm_unified.documents import products
from vllm_unified.documents.api.callers import Asking, Caller
from vllm_unified.documents.api.forms import received, small_form
from vllm_unified.documents.jobs import Status
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.service import Service
from vllm_unified.documents.store import Document, State

# Proxies cut a silent connection, the first of them at 60 seconds.
LONGEST_WAIT = 50.0
KEEP_ALIVE_SECONDS = 15.0
PRODUCT = re.compile(r"result\.(?:md|zip|html|docx|txt)|raw\.json|layout\.pdf|images/page-\d{1,6}-img-\d{1,6}\.jpg")
# As older clients know them. "cancelled" is new to them, and so is the path that leads to it.
STATES: dict[State, str] = {"queued": "pending"}

Wait = Annotated[float, Query(ge=0, description=f"seconds to wait for the end, at most {LONGEST_WAIT:g}")]
router = APIRouter()


@router.post("/api/ocr/image")
async def read_image(request: Request, caller: Asking) -> Response:
    """An image, read before the answer comes."""
    service, form = await received(request, caller, ("image", "file"))
    task = await service.submit(form.one_file(), caller.key, form.options, "image", form.wishes)
    status = await service.wait(task.id)
    pages = await service.pages(task.id)
    require_success(status, pages)
    first = pages[0]
    timing = _timing(status)
    document = {
        "success": True,
        "text": "\n\n".join(page.markdown for page in pages),
        "raw_text": "\n\n".join(page.raw_text for page in pages),
        "boxes": products.boxes_of(first),
        "image_dims": {"w": first.width, "h": first.height},
        "resolution_used": first.resolution_used or None,
        "task_id": status.id,
        "timing": timing,
        "duration_ms": timing["duration_ms"],
        "warnings": [*(f"page {page.number}: {page.reason}" for page in pages if page.reason), *first.warnings],
    }
    return JSONResponse(document)


@router.post("/api/ocr/pdf")
async def read_pdf(request: Request, caller: Asking, wait: Wait = 0.0) -> Response:
    """A PDF, an image of many pages, or a ZIP of such: read in the background, a task for each file."""
    service, form = await received(request, caller, ("pdf", "file", "files", "image"))
    unpacked = await form.unpacked(service)
    tasks = await service.submit_all(unpacked.files, caller.key, form.options, form.wishes)
    if wait and len(tasks) == 1:
        status = await service.jobs.wait(tasks[0].id, min(wait, LONGEST_WAIT))
        if status.is_finished:
            return await as_json(await task_document(service, status))
    answer: dict[str, Any] = {"task_id": tasks[0].id}
    if len(tasks) > 1:
        answer["task_ids"] = [task.id for task in tasks]
    if unpacked.skipped:
        answer["skipped"] = unpacked.skipped
    return JSONResponse(answer, 202, {"location": f"/api/tasks/{tasks[0].id}"})


@router.get("/api/tasks")
async def list_tasks(
    request: Request,
    caller: Asking,
    status: Literal["pending", "running", "succeeded", "failed", "cancelled"] | None = None,
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Response:
    """The newest first, those of the client's own key; an admin sees all. `after`: the last id of the list before."""
    service = service_of(request)
    states: dict[str, State] = {"pending": "queued", "running": "running", "succeeded": "succeeded"}
    state: State | None = None if status is None else states.get(status, status)  # type: ignore[arg-type]
    key = None if caller.admin else caller.key
    found = await asyncio.to_thread(service.store.documents, key, state, after, limit)
    entries = [await _entry_of(service, each) for each in found]
    counts = await asyncio.to_thread(service.store.counts, key)
    return JSONResponse({"tasks": [entry for entry in entries if entry is not None], "counts": counts})


@router.get("/api/tasks/{task_id}")
async def show_task(request: Request, caller: Asking, task_id: str, wait: Wait = 0.0) -> Response:
    """Status, progress and, at the end, the result."""
    service = service_of(request)
    await own_document(service, caller, task_id)
    if wait:
        status = await service.jobs.wait(task_id, min(wait, LONGEST_WAIT))
    else:
        status = await service.jobs.status(task_id)
    return await as_json(await task_document(service, status))


@router.get("/api/tasks/{task_id}/events")
async def watch_task(request: Request, caller: Asking, task_id: str) -> Response:
    """Server-sent events: `status` at each change, the last of them with the result."""
    service = service_of(request)
    await own_document(service, caller, task_id)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_events(service, task_id), media_type="text/event-stream", headers=headers)


@router.post("/api/tasks/{task_id}/cancel")
async def cancel_task(request: Request, caller: Asking, task_id: str) -> Response:
    """Read no more of its pages; those that were read stay."""
    service = service_of(request)
    await own_document(service, caller, task_id)
    return await as_json(await task_document(service, await service.jobs.cancel(task_id)))


@router.post("/api/tasks/{task_id}/retry")
async def retry_task(request: Request, caller: Asking, task_id: str) -> Response:
    """Read again the pages that failed, and no others. The file's `password`, if it has one, is sent again."""
    service = service_of(request)
    await own_document(service, caller, task_id)
    form = await small_form(request)
    status = await service.jobs.retry_failed(task_id, form.get("password", ""))
    return await as_json(await task_document(service, status), 202)


@router.delete("/api/tasks/{task_id}")
async def delete_task(request: Request, caller: Asking, task_id: str) -> Response:
    """The task and all its files."""
    service = service_of(request)
    await own_document(service, caller, task_id)
    await service.delete(task_id)
    return Response(status_code=204)


@router.get("/api/tasks/{task_id}/download/{path:path}")
async def download(request: Request, caller: Asking, task_id: str, path: str) -> Response:
    """A product: result.md, raw.json, result.zip, layout.pdf, images/…, and what `formats` asked for."""
    service = service_of(request)
    document = await own_document(service, caller, task_id)
    file = service.folder_of(task_id) / path
    if not PRODUCT.fullmatch(path) or not await asyncio.to_thread(file.is_file):
        known = ", ".join(await asyncio.to_thread(service.products, task_id)) or "nothing yet"
        message = f'the task has no "{path[:80]}"; it has {known}'
        raise DocumentError(404, message, code="no_such_product")
    headers = {"x-content-type-options": "nosniff"}
    if path.endswith(".html"):  # a model's words, shown from our address
        headers["content-security-policy"] = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    name = file.name if path.startswith("images/") else products.name_for(path, document.name)
    return FileResponse(file, media_type=products.MEDIA_TYPES.get(path), filename=name, headers=headers)


# Their shapes


async def task_document(service: Service, status: Status) -> dict[str, Any]:
    """As the clients of the earlier applications know it; what is ours is added."""
    document = {**_entry(status), "result": None, "fallback_pages": []}
    if status.is_finished:
        failures = await asyncio.to_thread(service.store.failures, status.id)
        document["fallback_pages"] = [{"page": number, "reason": reason} for number, reason in failures]
    if status.state == "succeeded":
        pages = await service.pages(status.id)
        document["result"] = await asyncio.to_thread(_result, service, status.id, pages)
    return document


async def as_json(document: dict[str, Any], status: int = 200) -> Response:
    return Response(await encoded(document), status, media_type="application/json")


async def encoded(document: dict[str, Any]) -> bytes:
    """In a thread, as the result of a long document takes time that all others would wait for."""
    return await asyncio.to_thread(msgspec.json.encode, document)


def _result(service: Service, task_id: str, pages: list[Page]) -> dict[str, Any]:
    """In a thread."""
    at = f"/api/tasks/{task_id}/download"
    files = service.products(task_id)
    assets = [block.asset for page in pages for block in page.blocks if block.asset]
    return {
        "markdown_url": f"{at}/result.md",
        "raw_json_url": f"{at}/raw.json",
        "archive_url": f"{at}/result.zip",
        "image_urls": [f"{at}/{asset}" for asset in assets],
        "product_urls": {name: f"{at}/{name}" for name in files},
        "resolution_used": next((page.resolution_used for page in pages if page.resolution_used), None),
        "pages": [products.raw_page(page) for page in pages],
    }


async def _entry_of(service: Service, document: Document) -> dict[str, Any] | None:
    """None for one that was deleted since it was listed."""
    try:
        return _entry(await service.jobs.status(document.id))
    except DocumentError as error:
        if error.status == 404:
            return None
        raise


def _entry(status: Status) -> dict[str, Any]:
    return {
        "task_id": status.id,
        "status": STATES.get(status.state, status.state),
        "task_type": status.kind,
        "filename": status.name,
        "created_at": _iso(status.queued_at),
        "updated_at": _iso(status.updated_at),
        "error_message": status.error or None,
        "progress": {
            "current": status.done + status.failed,
            "total": status.pages or 0,
            "percent": status.percent,
            "message": _message(status),
            "pages_completed": status.done,
            "pages_failed": status.failed,
            "pages_total": status.pages or 0,
            "queue_position": status.position,
            "pages_per_minute": round(status.pages_per_minute, 1),
            "seconds_left": None if status.seconds_left is None else round(status.seconds_left, 1),
        },
        "timing": _timing(status),
    }


def _message(status: Status) -> str:
    match status.state:
        case "queued" if status.position:
            return f"waiting; {status.position} documents are before it"
        case "queued" | "running" if status.pages is None:
            return "looking at the file"
        case "queued" | "running":
            return f"{status.done + status.failed} of {status.pages} pages"
        case "succeeded" if status.failed:
            return f"{status.done} pages read, {status.failed} not; see fallback_pages"
        case "succeeded":
            return f"{status.done} pages read"
        case _:
            return status.error or status.state


def _timing(status: Status) -> dict[str, Any]:
    return {
        "queued_at": _iso(status.queued_at),
        "started_at": _iso(status.started_at),
        "finished_at": _iso(status.finished_at),
        "duration_ms": status.duration_ms,
    }


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


async def _events(service: Service, task_id: str) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(service.jobs.events(task_id)) as changes:
        coming = asyncio.ensure_future(anext(changes))
        try:
            while True:
                done, _ = await asyncio.wait((coming,), timeout=KEEP_ALIVE_SECONDS)
                if not done:
                    yield b": still here\n\n"
                    continue
                status = coming.result()
                yield b"event: status\ndata: %b\n\n" % await encoded(await task_document(service, status))
                coming = asyncio.ensure_future(anext(changes))
        except StopAsyncIteration:
            pass
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


# Who may


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def own_document(service: Service, caller: Caller, task_id: str) -> Document:
    """Raises DocumentError 404."""
    return caller.require(await asyncio.to_thread(service.store.get, task_id))


def require_success(status: Status, pages: list[Page]) -> None:
    """Raises DocumentError 502 where nothing came of any page, 409 where somebody cancelled or deleted it."""
    if status.state == "cancelled":
        raise DocumentError(409, "the task was cancelled", code="cancelled")
    if status.state == "succeeded" and not pages:
        raise DocumentError(409, "the task was deleted before its result was sent", code="deleted")
    if status.state == "failed":
        raise DocumentError(422, status.error, code="unreadable")
    if all(page.source == "nothing" for page in pages):
        raise DocumentError(502, f"no page could be read: {pages[0].reason}", code="not_read")
