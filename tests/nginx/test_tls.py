"""With config/tls/cert.pem and key.pem there is HTTPS, and HTTP leads to it."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.conftest import API_KEY, Project
from tests.nginx.conftest import Nginx
from tests.router.conftest import Deployment
from tests.router.wire import Client, post, request


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Nginx]:
    home = tmp_path_factory.mktemp("project")
    (home / "config" / "tls").mkdir(parents=True)
    shutil.copy(certificates / "server.pem", home / "config" / "tls" / "cert.pem")
    shutil.copy(certificates / "server.key", home / "config" / "tls" / "key.pem")
    deployment = Deployment(Project(home))
    deployment.start({"chat": {"type": "chat"}}, nginx={"hsts_max_age": 86400})
    with Nginx(deployment.project, certificates / "ca.pem") as nginx:
        yield nginx
    deployment.stop()


def test_openais_client_streams_over_it(secured: Nginx) -> None:
    with openai.OpenAI(
        base_url=f"{secured.url}/v1", api_key=API_KEY, max_retries=0, http_client=secured.client(None)
    ) as client:
        stream = client.chat.completions.create(
            model="chat", stream=True, messages=[{"role": "user", "content": "Say it"}]
        )
        words = [chunk.choices[0].delta.content for chunk in stream]
    assert words == ["One ", "word ", "after ", "the ", "other."]


def test_hsts_is_said_in_all_answers(secured: Nginx) -> None:
    with secured.client() as client:
        for path, status in (("/v1/models", 200), ("/metrics", 403)):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["strict-transport-security"]) == (status, "max-age=86400")


@pytest.mark.parametrize("text", [request("GET", "/v1/models?x=%20y"), post("/v1/chat/completions", {})])
def test_http_leads_to_https(secured: Nginx, text: bytes) -> None:
    with Client(secured.port) as client:
        client.send(text.replace(b"host: router", b"host: models.example:80"))
        answer = client.answer()
    target = text.split(b" ")[1].decode()
    assert (answer.status, answer["location"]) == (308, f"https://models.example:{secured.tls_port}{target}")


def test_http_on_the_port_of_https_is_told_so(secured: Nginx) -> None:
    with Client(secured.tls_port) as client:
        answer = client.get("/v1/models")
    assert (answer.status, answer.json()["error"]["message"]) == (
        400,
        "this port speaks HTTPS; write https:// in the address",
    )


@pytest.mark.parametrize(
    ("options", "is_taken"),
    [
        (["-tls1_3"], True),
        (["-tls1_2"], True),
        (["-tls1_2", "-cipher", "AES128-SHA:AES256-SHA:@SECLEVEL=0"], False),
        (["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], False),
    ],
)
def test_old_tls_is_refused(secured: Nginx, options: list[str], is_taken: bool) -> None:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{secured.tls_port}", *options]
    assert (subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0) is is_taken
