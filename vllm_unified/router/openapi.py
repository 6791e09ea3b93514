"""The forwarded paths in the OpenAPI document: FastAPI knows its own paths, and these are not FastAPI's."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_unified.errors import OPENAI_ERROR
from vllm_unified.router.problems import Shape
from vllm_unified.router.registry import Registry
from vllm_unified.router.routes import ROUTES, Route

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_COUNT: Schema = {"type": "integer", "minimum": 1}
_OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
FIELDS: dict[str, Schema] = {
    "model": {**_TEXT, "description": "a name from /v1/models; may be left out where only one model can be meant"},
    "messages": {**_OBJECTS, "description": "the conversation so far; an image is a part of a message's content"},
    "prompt": {**_TEXT, "description": "the text to go on from, or to split into tokens"},
    "input": {**_TEXTS, "description": "a text, or several"},
    "query": {**_TEXT, "description": "what is looked for"},
    "documents": {"type": "array", "items": {}, "description": "texts to put in order"},
    "texts": {"type": "array", "items": _TEXT, "description": "what is to be ranked, as TEI has it, or embedded"},
    "embedding_types": {"type": "array", "items": {"enum": ["float", "base64", "binary", "ubinary"]}},
    "input_type": {**_TEXT, "description": "search_query, search_document, …, where the model has a prompt for it"},
    "truncate": {"enum": ["NONE", "START", "END"], "description": "which end of a text that is too long is cut"},
    "top_n": {**_COUNT, "description": "how many documents come back (default: all)"},
    "text_1": {**_TEXTS, "description": "one text, or as many as in text_2"},
    "text_2": {**_TEXTS, "description": "the texts to compare it with"},
    "tokens": {"type": "array", "items": {"type": "integer"}},
    "stream": {"type": "boolean", "default": False, "description": "answer in events, as the text comes"},
    "max_tokens": {**_COUNT, "description": "longest answer, in tokens"},
    "max_output_tokens": {**_COUNT, "description": "longest answer, in tokens"},
    "temperature": {"type": "number", "minimum": 0, "description": "0 is the likeliest answer"},
    "system": {**_TEXT, "description": "instructions that stand before the conversation"},
    "tools": {**_OBJECTS, "description": "functions that the model may call"},
    "response_format": {"type": "object", "description": "JSON, or JSON of a schema"},
    "encoding_format": {"type": "string", "enum": ["float", "base64"], "default": "float"},
    "dimensions": {**_COUNT, "description": "shorter vectors, of a model that was trained for them"},
    "file": {"type": "string", "contentMediaType": "application/octet-stream", "description": "the recording"},
    "language": {**_TEXT, "description": "of the recording, as ISO 639-1"},
}


@dataclass(frozen=True)
class _Body:
    required: tuple[str, ...]
    further: tuple[str, ...]
    example: Schema


_HELLO = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 100}
_SENTENCE = {"input": "Paris is the capital of France."}
_QUESTION, _ANSWERS = "What is the capital of France?", ["Paris is.", "Berlin is in Germany."]
_PAIRS = _Body(("text_1", "text_2"), (), {"text_1": _QUESTION, "text_2": _ANSWERS})
_RANKED = _Body(("query", "documents"), ("top_n",), {"query": _QUESTION, "documents": _ANSWERS})
BODIES = {
    "/v1/chat/completions": _Body(
        ("messages",), ("max_tokens", "stream", "temperature", "tools", "response_format"), _HELLO
    ),
    "/v1/completions": _Body(
        ("prompt",), ("max_tokens", "stream", "temperature"), {"prompt": "Once upon a time", "max_tokens": 50}
    ),
    "/v1/responses": _Body(
        ("input",),
        ("max_output_tokens", "stream", "temperature", "tools"),
        {"input": "Hello!", "max_output_tokens": 100},
    ),
    "/v1/messages": _Body(("messages", "max_tokens"), ("stream", "temperature", "system", "tools"), _HELLO),
    "/v1/messages/count_tokens": _Body(("messages",), ("system", "tools"), {"messages": _HELLO["messages"]}),
    "/v1/embeddings": _Body(("input",), ("encoding_format", "dimensions"), _SENTENCE),
    "/v2/embed": _Body(
        ("texts",), ("embedding_types", "input_type", "truncate"), {"texts": ["Paris is the capital of France."]}
    ),
    "/pooling": _Body(("input",), ("encoding_format",), _SENTENCE),
    "/classify": _Body(("input",), (), _SENTENCE),
    "/score": _PAIRS,
    "/v1/score": _PAIRS,
    "/rerank": replace(_RANKED, required=("query",), further=("documents", "texts", "top_n")),
    "/v1/rerank": _RANKED,
    "/v2/rerank": _RANKED,
    "/tokenize": _Body((), ("prompt", "messages"), {"prompt": "Paris is the capital of France."}),
    "/detokenize": _Body(("tokens",), (), {"tokens": [1, 2, 3]}),
    "/v1/audio/transcriptions": _Body(("file",), ("language", "prompt", "stream"), {}),
    "/v1/audio/translations": _Body(("file",), ("prompt", "stream"), {}),
}

ERRORS = {
    400: "the request is wrong; the message says what to change",
    401: "no API key, or not one of this deployment's",
    403: "the key is good, but not for this",
    404: "no model of that name",
    409: "it can't be done as things are; the message says why",
    413: "the request is larger than router.max_body_mib",
    415: "the body is packed in a way that is not understood; send gzip, deflate or none",
    429: "a limit of the key is reached, or the model's queue is full; come back after retry-after",
    502: "the model's server failed",
    503: "the model is known but not ready, or stayed busy; come back after retry-after",
    504: "the model's server was silent for too long",
}
OF_FORWARDED = (400, 401, 403, 404, 413, 415, 429, 502, 503, 504)
# What FastAPI's own paths answer, beside 401.
OF_OWN: dict[str, tuple[int, ...]] = {
    "/v1/models/{name}": (403, 404),
    "/system/info": (403,),
    "/metrics": (403,),
    "/metrics/engines": (403,),
    "/metrics/engines/{key}": (403, 404, 503),
    "/metrics/documents": (403, 503),
    "/sd": (403,),
    "/usage": (400, 403),
    "/admin/reload": (400, 403),
    "/admin/models/{key}/{action}": (400, 403, 404, 409),
}
COMPONENTS: dict[str, Schema] = {
    "schemas": {
        "Error": OPENAI_ERROR,
        "AnthropicError": {
            "type": "object",
            "required": ["type", "error"],
            "properties": {
                "type": {"type": "string", "const": "error"},
                "error": {
                    "type": "object",
                    "required": ["type", "message"],
                    "properties": {
                        "type": {"type": "string", "examples": ["invalid_request_error", "api_error"]},
                        "message": {"type": "string", "description": "what is wrong, and what to do"},
                    },
                },
            },
        },
    },
    "headers": {
        "x-error-source": {
            "description": "router: this deployment's own error; engine: the model's server answered so; "
            "documents: the document service did",
            "schema": {"type": "string", "enum": ["router", "engine", "documents"]},
        },
        "retry-after": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}},
    },
    "securitySchemes": {
        "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY, as OpenAI has it"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "as Anthropic has it"},
    },
}


def add_forwarded(document: Schema, registry: Registry, open_paths: Collection[str]) -> None:
    """Complete FastAPI's document. `open_paths` need no key. The examples name models that are served now."""
    components = document.setdefault("components", {})
    for name, parts in COMPONENTS.items():
        components.setdefault(name, {}).update(parts)
    document["security"] = [{name: []} for name in COMPONENTS["securitySchemes"]]
    paths = document.setdefault("paths", {})
    for path, operations in paths.items():
        for operation in operations.values():
            if path in open_paths:
                operation["security"] = []
            operation["responses"].pop("422", None)  # FastAPI's own shape, in which nothing is answered here
            for status in () if path in open_paths else (401, *OF_OWN.get(path, ())):
                operation["responses"][str(status)] = _error(status)
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    for route in ROUTES:
        paths[route.path] = {"post": _operation(route, registry)}


def add_documents(document: Schema, documents: Mapping[str, Any]) -> None:
    """The document service's own paths. What both have is the router's."""
    document["paths"] = {**documents.get("paths", {}), **document["paths"]}
    schemas = document["components"]["schemas"]
    document["components"]["schemas"] = {**documents.get("components", {}).get("schemas", {}), **schemas}


def _operation(route: Route, registry: Registry) -> Schema:
    body = BODIES[route.path]
    kinds = ["object", "array"] if "texts" in body.further else ["object"]  # TEI's ranks are a list
    answer: Schema = {"application/json": {"schema": {"type": kinds}}}
    if "stream" in body.further:
        answer["text/event-stream"] = {}
    return {
        "tags": [", ".join(route.kinds)],
        "summary": route.summary,
        "operationId": route.path.strip("/").replace("/", "-"),
        "requestBody": {"required": True, "content": _content(route, body, registry)},
        "responses": {
            "200": {"description": "as the model's server answers", "content": answer},
            **{str(status): _error(status, route.errors) for status in OF_FORWARDED},
        },
    }


def _content(route: Route, body: _Body, registry: Registry) -> Schema:
    names = ("model", *body.required, *body.further)
    schema: Schema = {
        "type": "object",
        "properties": {name: FIELDS[name] for name in names},
        "additionalProperties": True,
    }
    if body.required:
        schema["required"] = list(body.required)
    if route.multipart:
        return {"multipart/form-data": {"schema": schema}}
    suited = [served.model for kind in route.kinds for served in registry.served if served.model.type == kind]
    model = {"model": suited[0].name} if suited else {}
    return {"application/json": {"schema": schema, "example": {**model, **body.example}}}


def _error(status: int, shape: Shape = "openai") -> Schema:
    schema = "AnthropicError" if shape == "anthropic" else "Error"
    headers = ["x-error-source", *(["retry-after"] if status in (429, 503) else [])]
    return {
        "description": ERRORS[status],
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }
