"""The OpenAPI document of the service's paths: their forms, which FastAPI doesn't know, and their errors.

The router puts it into its own, which stands behind its /docs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from vllm_unified.documents.api.mistral import Asked
from vllm_unified.documents.api.older import Inference
from vllm_unified.documents.options import LIMITS, Options
from vllm_unified.errors import OPENAI_ERROR

Schema = dict[str, Any]

JSON = "application/json"
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_FILE: Schema = {"type": "string", "contentMediaType": "application/octet-stream", "description": "the file"}
_REFERENCE = "#/components/schemas/{name}"
OPTIONS: Mapping[str, str] = {
    "mode": "what is asked of the model; find wants find_term, prompt wants prompt",
    "prompt": "the words for the model, of the mode prompt",
    "find_term": "the text to look for, of the mode find",
    "profile": "how the model is asked and understood; found by its name where this is left out",
    "base_size": "DeepSeek-OCR's resolution: pixels of the view; resolution_used in the answer says what came of it",
    "image_size": "DeepSeek-OCR's resolution: pixels of a tile",
    "crop_mode": "DeepSeek-OCR's resolution: with tiles",
    "dpi": "pixels per inch that a page of a PDF is drawn with",
    "retries": "further attempts at a page that was not read well",
    "ngram_size": "guard against repetition: how many tokens in a row don't come twice; 0 turns it off",
    "window_size": "guard against repetition: among how many of the last tokens",
    "whitelist_token_ids": "guard against repetition: tokens that may repeat; numbers with commas between them",
    "pages": "the pages to read, as 1-3,7,9-; all where it is left out",
    "password": "of the PDF",
    "running_heads": "headers, footers and page numbers in result.md",
    "join_pages": "put paragraphs and tables together that a page break parts",
    "extract_images": "cut figures out, and link them in result.md",
    "formats": "further products, as html,docx,text",
}
OTHER_FIELDS: Mapping[str, Schema] = {
    "webhook_url": {**_TEXT, "description": "told of the end, as Standard Webhooks have it"},
    "webhook_secret": {**_TEXT, "description": "whsec_ and 24 to 64 bytes in base64, with which that is signed"},
    "grounding": {**_FLAG, "default": True, "description": "boxes in the answer"},
    "max_page_retries": {"type": "integer", "minimum": 0, "maximum": 10, "description": "as retries"},
    "skip_cross_page_merge": {**_FLAG, "default": False, "description": "the contrary of join_pages"},
    "url": {"type": "string", "format": "uri", "description": "where the file stands"},
}
WISHES = ("webhook_url", "webhook_secret")
IDEMPOTENCY_KEY: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "the same request with the same key is one task",
    "schema": {"type": "string", "maxLength": 255},
}


@dataclass(frozen=True)
class Operation:
    """What FastAPI does not know. `files`: fields of a form that hold one, any of them. `fields`: further ones beside
    the options'. `body`: of one that is JSON. `answers`: media types by status."""

    errors: tuple[int, ...]
    files: tuple[str, ...] = ()
    fields: Mapping[str, Schema] | None = None
    body: Schema | None = None
    answers: Mapping[int, str] | None = None
    error_schema: str = "Error"


ERRORS = {
    400: "the request is wrong; the message says what to change",
    401: "no API key, or not one of this deployment's",
    403: "the key may not do this, or the address is one that is not asked",
    404: "no such task, or not one of this key's",
    409: "the task is past that, or the idempotency key was used for another request",
    413: "too large: in bytes, in pages, or unpacked",
    415: "no kind of file that is read",
    422: "the file can't be read; the message says why",
    429: "a limit of the key is reached, or too much waits; come back after retry-after",
    502: "no page could be read, or the address could not be fetched",
    503: "no model is ready to read it, or the disk fails; come back after retry-after",
    507: "the disk is full",
}
ACCEPTING = (400, 401, 403, 409, 413, 415, 422, 429, 503, 507)
READING = (400, 401, 403, 409, 413, 415, 422, 429, 502, 503, 507)
OF_TASK = (401, 404, 503)


def _output(*formats: str) -> Mapping[str, Schema]:
    described = "the form of the answer"
    return {"output_format": {"type": "string", "enum": [*formats], "default": "markdown", "description": described}}


def _others(*names: str) -> Mapping[str, Schema]:
    return {name: OTHER_FIELDS[name] for name in names}


def _component(struct: type[msgspec.Struct]) -> Schema:
    return {"$ref": _REFERENCE.format(name=struct.__name__)}


_CONVERTED = {**_output("markdown", "text"), **_others("max_page_retries", "skip_cross_page_merge")}
# A file of the format that is asked for, or JSON.
_ANY_FORMAT = {200: "*/*"}
OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("post", "/api/ocr/image"): Operation(READING, ("image", "file"), {}),
    ("post", "/api/ocr/pdf"): Operation(
        ACCEPTING, ("pdf", "file", "files", "image"), {}, answers={200: JSON, 202: JSON}
    ),
    ("get", "/api/tasks"): Operation((400, 401, 503)),
    ("get", "/api/tasks/{task_id}"): Operation((400, *OF_TASK)),
    ("delete", "/api/tasks/{task_id}"): Operation(OF_TASK, answers={204: ""}),
    ("get", "/api/tasks/{task_id}/events"): Operation(OF_TASK, answers={200: "text/event-stream"}),
    ("post", "/api/tasks/{task_id}/cancel"): Operation((401, 404, 409, 503)),
    ("post", "/api/tasks/{task_id}/retry"): Operation(
        (401, 404, 409, 429, 503, 507),
        body={"type": "object", "properties": {"password": {**_TEXT, "description": OPTIONS["password"]}}},
        answers={202: JSON},
    ),
    ("get", "/api/tasks/{task_id}/download/{path}"): Operation(OF_TASK, answers={200: "*/*"}),
    ("post", "/api/ocr"): Operation(READING, ("image",), _others("grounding")),
    ("post", "/api/process-pdf"): Operation(
        READING,
        ("pdf_file",),
        {**_output("markdown", "html", "docx", "json"), **_others("grounding")},
        answers=_ANY_FORMAT,
    ),
    ("post", "/internal/infer"): Operation((400, 401, 403, 502, 503), body=_component(Inference)),
    ("post", "/convert/file"): Operation(READING, ("file",), _CONVERTED, error_schema="ConvertError"),
    ("post", "/convert/url"): Operation(READING, fields={**_CONVERTED, **_others("url")}, error_schema="ConvertError"),
    ("post", "/v1/ocr"): Operation(READING, body=_component(Asked)),
}
HEADERS: Mapping[str, Schema] = {
    "x-error-source": {"description": "whose error it is", "schema": {"const": "documents"}},
    "retry-after": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}},
}
_MESSAGE: Schema = {"type": "string", "description": "what is wrong, and what to do"}
SCHEMAS: Mapping[str, Schema] = {
    "Error": OPENAI_ERROR,
    "ConvertError": {
        "type": "object",
        "required": ["status", "error"],
        "properties": {"status": {"const": "error"}, "error": _MESSAGE},
    },
}


def describe(app: FastAPI, defaults: Options) -> Schema:
    """OpenAPI 3.1. `defaults`: what holds where a client says nothing."""
    options = _options(defaults)
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(operation, OPERATIONS[method, path], options)
    _, components = msgspec.json.schema_components([Asked, Inference], ref_template=_REFERENCE)
    document["components"] = {"schemas": {**components, **SCHEMAS}}
    return document


def _complete(operation: Schema, known: Operation, options: Mapping[str, Schema]) -> None:
    text = operation["description"].replace("\n", " ")
    operation["summary"] = text.partition(". ")[0].rstrip(".")
    answers = {200: JSON} if known.answers is None else known.answers
    operation["responses"] = {
        **{str(status): _answer(status, media) for status, media in answers.items()},
        **{str(status): _error(status, known.error_schema) for status in known.errors},
    }
    if known.fields is not None:
        operation.setdefault("parameters", []).append(IDEMPOTENCY_KEY)
    if (body := _body(known, options)) is not None:
        operation["requestBody"] = body


def _answer(status: int, media: str) -> Schema:
    described = {202: "accepted; location says where it is watched", 204: "it is gone"}.get(
        status, "what was asked for"
    )
    schema = {"schema": {"type": "object"}} if media == JSON else {}
    return {"description": described, **({"content": {media: schema}} if media else {})}


def _error(status: int, schema: str) -> Schema:
    content = {JSON: {"schema": {"$ref": _REFERENCE.format(name=schema)}}}
    names = ["x-error-source", *(["retry-after"] if status in (429, 503) else [])]
    return {"description": ERRORS[status], "headers": {name: HEADERS[name] for name in names}, "content": content}


def _body(known: Operation, options: Mapping[str, Schema]) -> Schema | None:
    if known.body is not None:
        is_form = "$ref" not in known.body
        media = "multipart/form-data" if is_form else JSON
        return {"required": not is_form, "content": {media: {"schema": known.body}}}
    if known.fields is None:
        return None
    fields = {**options, **_others(*WISHES), **known.fields}
    schema: Schema = {"type": "object", "properties": {**dict.fromkeys(known.files, _FILE), **fields}}
    if not known.files:
        return {"required": True, "content": {JSON: {"schema": {**schema, "required": ["url"]}}}}
    if len(known.files) == 1:
        schema["required"] = [*known.files]
    else:
        schema["anyOf"] = [{"required": [file]} for file in known.files]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _options(defaults: Options) -> dict[str, Schema]:
    """As fields of a form: what is a list there stands in one text."""
    known: dict[str, Schema] = msgspec.json.schema(Options)["$defs"]["Options"]["properties"]
    return {
        name: {**_form_field(name, known[name], getattr(defaults, name)), "description": OPTIONS[name]}
        for name in OPTIONS
    }


def _form_field(name: str, schema: Schema, default: Any) -> Schema:
    schema = next((each for each in schema.get("anyOf", ()) if each["type"] != "null"), schema)
    if schema.get("type") == "array":
        schema, default = _TEXT, ",".join(map(str, default))
    field = {word: value for word, value in schema.items() if word != "default"}
    if name in LIMITS:
        field["minimum"], field["maximum"] = LIMITS[name]
    return field if default in ("", None) else {**field, "default": default}
