"""What a client sends beside its key: files, options, wishes."""

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec
from fastapi import Request
from starlette.types import Message

from vllm_unified.documents import uploads
from vllm_unified.documents.api.callers import Caller
from vllm_unified.documents.kinds import Kind
from vllm_unified.documents.options import Options, options_in
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.service import Service, Wishes
from vllm_unified.documents.uploads import Upload

WISHES = ("webhook_url", "webhook_secret")
LONGEST_IDEMPOTENCY_KEY = 255
LONGEST_JSON = 1 << 20
# What the decoder says of a body that is not the JSON that is wanted, or is no UTF-8, or is too deep.
NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True)
class Form:
    fields: Mapping[str, str]
    files: tuple[Upload, ...]
    options: Options
    wishes: Wishes

    def one_file(self) -> Upload:
        """Raises DocumentError 400."""
        if len(self.files) != 1:
            discard(self.files)
            message = f"send one file here, not {len(self.files)}" if self.files else "the form has no file in it"
            raise DocumentError(400, message, code="invalid_form")
        return self.files[0]

    def flag(self, name: str, *, default: bool) -> bool:
        return flag_in(self.fields, name, default=default)

    async def unpacked(self, service: Service) -> uploads.Unpacked:
        """The files, with those in ZIPs in place of the ZIPs. Raises DocumentError 400 where there is none."""
        found, skipped = list(self.files), list[str]()
        with discarded_on_error(found):
            for upload in [each for each in self.files if each.kind is Kind.ZIP]:
                inside = await asyncio.to_thread(
                    uploads.unpack, upload, service.incoming, max_bytes=service.max_upload_bytes
                )
                at = found.index(upload)
                found[at : at + 1] = inside.files
                skipped += inside.skipped
                discard([upload])
            if not found:
                raise DocumentError(400, "the form has no file in it", code="invalid_form")
        return uploads.Unpacked(found, skipped)


async def received(
    request: Request, caller: Caller, file_fields: Collection[str], known: Collection[str] = ()
) -> tuple[Service, Form]:
    """A multipart form. `known`: fields that the path reads itself. Raises DocumentError."""
    service: Service = request.app.state.service
    service.jobs.check_room(caller.key)
    form = await uploads.receive_form(
        request, service.incoming, max_bytes=service.max_upload_bytes, file_fields=file_fields
    )
    with discarded_on_error(form.files):
        return service, _form(request, service, form.fields, tuple(form.files), known)


@contextlib.contextmanager
def discarded_on_error(files: Iterable[Upload]) -> Iterator[None]:
    """Uploads that become no task."""
    try:
        yield
    except BaseException:
        discard(files)
        raise


def discard(files: Iterable[Upload]) -> None:
    for upload in files:
        upload.path.unlink(missing_ok=True)


async def json_form(request: Request, known: Collection[str] = ()) -> tuple[Service, Form]:
    """The same fields in a JSON object, without files. Raises DocumentError."""
    service: Service = request.app.state.service
    try:
        given = msgspec.json.decode(await small_body(request), type=dict[str, bool | int | str | None])
    except NO_JSON as error:
        raise DocumentError(400, f"the body is no JSON object of such fields: {error}", code="invalid_json") from None
    fields = {name: str(value) for name, value in given.items() if value is not None}
    return service, _form(request, service, fields, (), known)


async def small_form(request: Request) -> dict[str, str]:
    """The fields of a form of either encoding; none where there is no form. Raises DocumentError 413."""
    body = await small_body(request)

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    form = await Request(request.scope, receive).form(max_files=0)
    return {name: value for name, value in form.multi_items() if isinstance(value, str)}


async def small_body(request: Request, limit: int = LONGEST_JSON) -> bytes:
    """Raises DocumentError 413."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise DocumentError(413, f"the body is larger than {limit >> 20} MiB", code="too_large")
    return bytes(body)


def flag_in(fields: Mapping[str, str], name: str, *, default: bool) -> bool:
    """Raises DocumentError 400."""
    given = fields.get(name, "").strip().lower()
    if given in ("", "true", "1", "yes", "on", "false", "0", "no", "off"):
        return given in ("true", "1", "yes", "on") if given else default
    raise DocumentError(400, f'{name}: "{given[:40]}" is neither true nor false', code="invalid_value")


def _form(
    request: Request, service: Service, fields: Mapping[str, str], files: tuple[Upload, ...], known: Collection[str]
) -> Form:
    options = options_in(fields, service.defaults, (*WISHES, *known))
    idempotency_key = request.headers.get("idempotency-key", "")
    if len(idempotency_key) > LONGEST_IDEMPOTENCY_KEY:
        message = f"idempotency-key: {len(idempotency_key)} characters; use at most {LONGEST_IDEMPOTENCY_KEY}"
        raise DocumentError(400, message, code="invalid_value")
    wishes = Wishes(
        idempotency_key,
        fields.get("webhook_url", "").strip(),
        fields.get("webhook_secret", "").strip(),
    )
    return Form(fields, files, options, wishes)
