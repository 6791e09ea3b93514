"""That the OpenAPI document of the service says what its paths do."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from tests.documents.conftest import Served
from tests.documents.fake_ocr import page_image
from tests.documents.test_service import pdf_of
from vllm_unified.documents.api.forms import WISHES
from vllm_unified.documents.api.openapi import OPERATIONS, OPTIONS
from vllm_unified.documents.options import LIMITS, Options


@pytest.fixture(scope="module")
def document(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{served.url}/openapi.json").raise_for_status().json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, found in document["paths"].items():
        for method, operation in found.items():
            yield method, path, operation


def form_of(document: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = document["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    return found


def test_it_is_openapi_and_has_every_path(document: dict[str, Any]) -> None:
    validate(document)
    assert {(method, path) for method, path, _ in operations(document)} == set(OPERATIONS)


def test_each_has_a_summary_and_its_errors(document: dict[str, Any]) -> None:
    summaries = [operation["summary"] for _, _, operation in operations(document)]
    assert all(5 < len(summary) < 120 for summary in summaries), summaries
    for method, path, operation in operations(document):
        assert operation["responses"].keys() >= {"401", "503"}, path
        for parameter in operation.get("parameters", ()):
            assert parameter["in"] == "path" or parameter["name"] in (
                "wait",
                "status",
                "after",
                "limit",
                "x-internal-token",
                "Idempotency-Key",
            ), (method, path)


def test_every_option_is_described(document: dict[str, Any]) -> None:
    assert set(OPTIONS) == set(Options.__struct_fields__)
    fields = form_of(document, "/api/ocr/pdf")["properties"]
    assert fields.keys() == {"pdf", "file", "files", "image", *OPTIONS, *WISHES}
    assert all(field["description"] for field in fields.values())
    for name, (least, most) in LIMITS.items():
        assert (fields[name]["type"], fields[name]["minimum"], fields[name]["maximum"]) == ("integer", least, most)
    assert (fields["formats"]["type"], fields["formats"]["default"]) == ("string", "markdown")


def test_the_defaults_are_taken(client: httpx.Client, document: dict[str, Any]) -> None:
    for path, operation in ((path, operation) for method, path, operation in operations(document) if method == "post"):
        content = operation.get("requestBody", {}).get("content", {})
        if path.endswith("/retry") or "multipart/form-data" not in content:
            continue
        fields = form_of(document, path)["properties"]
        file = next(name for name, field in fields.items() if "contentMediaType" in field)
        data = {name: str(field["default"]) for name, field in fields.items() if "default" in field}
        assert len(data) > 5
        answer = client.post(path, files={file: ("a.pdf", pdf_of(1))}, data=data)
        assert str(answer.status_code) in operation["responses"], (path, answer.text)
        assert answer.is_success, (path, answer.text)


@pytest.mark.parametrize(
    ("method", "path", "sent", "schema"),
    [
        ("post", "/api/ocr/image", {"files": {"image": ("a.png", b"just text")}}, "Error"),
        ("post", "/api/ocr/pdf", {"files": {"pdf": ("a.pdf", b"%PDF-1.7\nnothing")}}, "Error"),
        ("post", "/api/ocr", {"files": {"pdf": ("a.png", page_image(1))}}, "Error"),
        ("post", "/v1/ocr", {"json": {"document": {}}}, "Error"),
        ("post", "/internal/infer", {"json": {"prompt": "x"}}, "Error"),
        ("get", "/api/tasks", {"params": {"limit": 0}}, "Error"),
        ("get", "/api/tasks/{task_id}", {}, "Error"),
        ("get", "/api/tasks/{task_id}/events", {}, "Error"),
        ("delete", "/api/tasks/{task_id}", {}, "Error"),
        ("post", "/api/tasks/{task_id}/cancel", {}, "Error"),
        ("post", "/api/tasks/{task_id}/retry", {}, "Error"),
        ("get", "/api/tasks/{task_id}/download/{path}", {}, "Error"),
        ("post", "/convert/file", {"files": {"file": ("a.png", b"just text")}}, "ConvertError"),
        ("post", "/convert/url", {"json": {"url": "http://127.0.0.1/"}}, "ConvertError"),
    ],
)
def test_an_error_is_as_it_is_described(
    client: httpx.Client, document: dict[str, Any], method: str, path: str, sent: Any, schema: str
) -> None:
    answer = client.request(method, path.format(task_id="7", path="result.md"), **sent)
    described = document["paths"][path][method]["responses"][str(answer.status_code)]
    assert answer.is_error
    assert described["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{schema}"}
    Draft202012Validator(document["components"]["schemas"][schema]).validate(answer.json())
    assert answer.headers["x-error-source"] == described["headers"]["x-error-source"]["schema"]["const"]
