"""The golden questions: to models that answer rightly, and to such as are wrong in one way each."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image, ImageChops

from demo.training import pages
from tests.conftest import API_KEY, CHECKOUT, Project, free_port
from tests.router.conftest import Deployment
from vllm_unified.selftest import CHINESE, ENGLISH, PICTURE, WORD


@pytest.fixture
def deployment(project: Project) -> Iterator[Deployment]:
    started = Deployment(project)
    yield started
    started.stop()


def selftest(project: Project, *options: str) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(project.home), "VLLM_API_KEY": API_KEY, "COLUMNS": "200"}
    command = [sys.executable, "-m", "vllm_unified", "selftest", *options]
    return subprocess.run(command, env=environ, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)


KINDS = ("chat", "ocr", "embedding", "rerank")


def test_models_that_answer_rightly(deployment: Deployment) -> None:
    deployment.start({kind: {"type": kind, "fake": {"golden": "right"}} for kind in KINDS})
    done = selftest(deployment.project, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr, document["passed"]) == (0, "", True)
    assert {each["passed"] for each in document["checks"]} == {True}, document
    assert {each["kind"] for each in document["checks"]} == set(KINDS)
    shown = selftest(deployment.project)
    assert shown.returncode == 0
    assert shown.stdout.count("✓") == len(document["checks"])


RERANK = {
    "reversed": {"the answer comes first, English"},
    "flat": {"scores are apart"},
    "one shape": {"one ranking in every shape"},
    "no Chinese": set[str](),
}
EMBEDDING = {
    "random": {"related is nearer, English"},
    "batches": {"many at once as one by one", "related is nearer, English"},
    "drifts": {"the same text twice", "many at once as one by one", "base64 as floats"},
    "base64": {"base64 as floats"},
}
CHAT = {"silent": {"answers", "streams, and counts its tokens"}}
OCR = {"blind": {"reads a word"}}


@pytest.mark.parametrize(
    ("kind", "wrong", "failing"),
    [
        (kind, wrong, failing)
        for kind, table in {"rerank": RERANK, "embedding": EMBEDDING, "chat": CHAT, "ocr": OCR}.items()
        for wrong, failing in table.items()
    ],
)
def test_a_model_that_is_wrong_is_found_out(deployment: Deployment, kind: str, wrong: str, failing: set[str]) -> None:
    deployment.start({kind: {"type": kind, "fake": {"golden": wrong}}})
    done = selftest(deployment.project, "--json")
    document = json.loads(done.stdout)
    failed = {each["check"]: each for each in document["checks"] if each["passed"] is False}
    assert set(failed) == failing, document
    assert done.returncode == (1 if failing else 0)
    assert all(each["remedy"] for each in failed.values())
    if (kind, wrong) == ("rerank", "reversed"):
        shown = selftest(deployment.project)
        assert shown.returncode == 1
        assert "✗" in shown.stdout
        assert "Qwen3ForSequenceClassification" in shown.stdout
    if wrong == "no Chinese":
        assert {each["check"] for each in document["checks"] if each["passed"] is None} == {
            "the answer comes first, Chinese"
        }


@pytest.mark.parametrize(
    ("fake", "measured"),
    [
        (None, "answers 503"),
        ({"refuse": 418}, "answers 418"),
        ({"answer": {"data": "odd"}}, "an answer of another shape"),
        ({"answer": "not JSON"}, "an answer of another shape"),
        ({"golden": "nothing"}, "cosine nan"),
    ],
)
def test_a_model_that_does_not_answer(deployment: Deployment, fake: object, measured: str) -> None:
    deployment.start({"embedding": {"type": "embedding", "fake": fake}}, retries=0)
    done = selftest(deployment.project, "--json")
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == 1
    assert any(measured in each["measured"] for each in checks), checks
    assert all(each["remedy"] for each in checks if each["passed"] is False)


def test_it_does_not_run(project: Project) -> None:
    project.write({"chat": {"name": "chat", "type": "chat"}}, router={"port": free_port()})
    done = selftest(project)
    assert done.returncode == 3
    assert "is it running?" in done.stderr


def test_the_picture_shows_the_word() -> None:
    wanted = pages.written([WORD], size=23, left=60, top=60).draw()
    with Image.open(BytesIO(base64.b64decode(PICTURE))) as image:
        difference = ImageChops.difference(image.convert("L"), wanted)
    assert max(difference.tobytes()) < 80, "more than four shades of grey explain"


def test_each_answer_stands_once() -> None:
    """Among the documents of a ranking an answer is found by its text."""
    for triples in (ENGLISH, CHINESE):
        texts = [text for triple in triples for text in triple]
        assert len(set(texts)) == len(texts)
