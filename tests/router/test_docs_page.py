"""The documentation as a browser on a closed network sees it."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from tests.conftest import Project
from vllm_unified.documents.api.openapi import OPERATIONS, describe
from vllm_unified.documents.app import PATHS
from vllm_unified.documents.options import Options
from vllm_unified.router.docs import DOCS_PATHS, add_docs
from vllm_unified.router.openapi import BODIES, OF_FORWARDED
from vllm_unified.router.problems import not_ready
from vllm_unified.router.registry import Registry
from vllm_unified.router.routes import ROUTES

HOST = "http://testserver"


class Links(HTMLParser):
    """Every src and href of a page, and the scripts and styles that stand in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        self.inline += [value or "" for name, value in attrs if name == "style" or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture
def registry(project: Project) -> Registry:
    project.write({"chat": {"name": "Qwen", "type": "chat"}, "rerank": {"name": "bge-rerank", "type": "rerank"}})
    return Registry(project.load())


@pytest.fixture
def client(registry: Registry) -> Iterator[TestClient]:
    app = FastAPI(title="vllm-unified", version="1", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/live")
    async def live() -> dict[str, str]:
        return {}

    @app.get("/v1/models")
    async def models() -> dict[str, str]:
        return {}

    async def documents() -> dict[str, Any]:
        own = FastAPI()
        for part in PATHS.values():
            own.include_router(part.router)
        return describe(own, Options())

    add_docs(app, registry, {"/live", "/not/there"}, documents)
    with TestClient(app, base_url=HOST) as client:
        yield client


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def test_the_page_asks_only_its_own_host(client: TestClient) -> None:
    page = client.get("/docs")
    links = Links(page.text)
    assert len(links.found) >= 4
    assert links.inline == []  # the policy forbids them
    asked = set()
    for link in links.found:
        if not link.startswith("data:"):
            address = urljoin(f"{HOST}/docs", link)
            assert urlsplit(address).netloc == urlsplit(HOST).netloc
            asked.add(urlsplit(address).path)
            assert client.get(address).status_code == 200, address
    assert {"/docs", *asked, "/openapi.json"} == DOCS_PATHS


def test_what_the_page_loads_asks_no_other_host(client: TestClient) -> None:
    css = client.get("/docs/swagger-ui.css").text
    assert {link.partition(":")[0] for link in re.findall(r"url\([\"']?([^)]{4})", css)} == {"data"}
    assert "@import" not in css
    start = client.get("/docs/start.js").text
    assert "//" not in start
    assert "validatorUrl: null" in start


def test_every_answer_forbids_other_hosts(client: TestClient) -> None:
    for path in DOCS_PATHS - {"/openapi.json"}:
        policy = client.get(path).headers["content-security-policy"]
        assert [part.split() for part in policy.split(";")] == [
            ["default-src", "'self'"],
            ["img-src", "'self'", "data:"],
        ]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/docs", "text/html; charset=utf-8"),
        ("/docs/start.js", "text/javascript; charset=utf-8"),
        ("/docs/swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
        ("/docs/swagger-ui.css", "text/css; charset=utf-8"),
    ],
)
def test_types(client: TestClient, path: str, kind: str) -> None:
    assert client.get(path).headers["content-type"] == kind


def test_the_document_is_openapi(document: dict[str, Any]) -> None:
    validate(document)


def test_every_forwarded_path_is_in_it_beside_the_applications(document: dict[str, Any]) -> None:
    documents = {path for _, path in OPERATIONS}
    assert set(document["paths"]) == {"/live", "/v1/models", *(route.path for route in ROUTES), *documents}
    assert set(BODIES) == {route.path for route in ROUTES}
    for route in ROUTES:
        operation = document["paths"][route.path]["post"]
        assert operation["summary"] == route.summary
        assert list(operation["responses"]) == ["200", *map(str, OF_FORWARDED)]
        assert list(operation["requestBody"]["content"]) == [
            "multipart/form-data" if route.multipart else "application/json"
        ]


@pytest.mark.parametrize("path", [route.path for route in ROUTES if not route.multipart])
def test_the_examples_are_what_the_schemas_say(document: dict[str, Any], path: str) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    Draft202012Validator.check_schema(content["schema"])
    Draft202012Validator(content["schema"]).validate(content["example"])
    assert set(content["example"]) <= set(content["schema"]["properties"])


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/chat/completions", "Qwen"),
        ("/v1/messages", "Qwen"),
        ("/rerank", "bge-rerank"),
        ("/tokenize", "Qwen"),
        ("/v1/embeddings", None),
    ],
)
def test_an_example_names_a_model_that_can_answer(document: dict[str, Any], path: str, model: str | None) -> None:
    example = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert example.get("model") == model


def test_the_examples_follow_the_models(client: TestClient, registry: Registry, project: Project) -> None:
    project.write({"vectors": {"name": "bge-m3", "type": "embedding"}})
    registry.apply(project.load())
    content = client.get("/openapi.json").json()["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]
    assert content["application/json"]["example"]["model"] == "bge-m3"


def test_keys_are_wanted_where_they_are(document: dict[str, Any]) -> None:
    assert document["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert document["paths"]["/live"]["get"]["security"] == []
    assert "security" not in document["paths"]["/v1/models"]["get"]
    assert "security" not in document["paths"]["/v1/embeddings"]["post"]


def test_errors_have_the_shape_that_the_router_answers_with(document: dict[str, Any]) -> None:
    error = Draft202012Validator(document["components"]["schemas"]["Error"])
    error.validate(json.loads(not_ready("come back", 5).body()))
    assert not error.is_valid({"error": "text"})
    answers = document["paths"]["/v1/embeddings"]["post"]["responses"]
    assert set(answers["503"]["headers"]) == {"x-error-source", "retry-after"}
    assert set(answers["404"]["headers"]) == {"x-error-source"}
