"""What the OpenAPI document promises is tried out: any request that it allows, and many that it does not."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.conftest import API_KEY
from tests.router.conftest import Deployment
from vllm_unified.router.routes import ROUTES

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MODELS: dict[str, dict[str, Any]] = {
    "chat": {"type": "chat"},
    "embedding": {"type": "embedding"},
    "rerank": {"type": "rerank"},
    "down": {"type": "ocr", "fake": None},
}


def test_answers_are_as_the_document_says(deployment: Deployment) -> None:
    deployment.start(MODELS)
    document: Any = schemathesis.openapi.from_url(f"{deployment.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    wrong = []
    for operation in operations:
        try:
            fuzz(operation)
        except (Exception, BaseExceptionGroup) as error:
            wrong.append(f"{operation.label}: {error}")
    assert wrong == []
    assert len(operations) > len(ROUTES)


def fuzz(operation: Any) -> None:
    takes_something = operation.body or operation.definition.raw.get("parameters")
    modes = list(GenerationMode) if takes_something else [GenerationMode.POSITIVE]

    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)))
    def ask(case: Any) -> None:
        answer = case.call(headers={"authorization": f"Bearer {API_KEY}"})
        case.validate_response(answer, checks=CHECKS)
        assert answer.status_code < 500 or answer.status_code in (502, 503), answer.text

    ask()
