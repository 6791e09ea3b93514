"""Whom the router believes when it says who the client is."""

import json

import pytest

from tests.conftest import eventually
from tests.router.conftest import Deployment
from tests.router.wire import Client, request
from vllm_unified.router.proxies import TrustedProxies

LOCAL = ["127.0.0.0/8", "::1/128"]
SITE = [*LOCAL, "10.1.0.0/16"]


@pytest.mark.parametrize(
    ("networks", "peer", "said", "client"),
    [
        (LOCAL, "127.0.0.1", "9.9.9.9", "9.9.9.9"),
        (LOCAL, "::1", " 2001:DB8::1 ", "2001:db8::1"),
        (LOCAL, "::ffff:127.0.0.1", "::ffff:9.9.9.9", "9.9.9.9"),
        ([], "127.0.0.1", "9.9.9.9", "127.0.0.1"),
        (LOCAL, "10.1.0.7", "9.9.9.9", "10.1.0.7"),
        (LOCAL, "", "9.9.9.9", ""),
        # what a client wrote there itself stands before what the proxies wrote
        (LOCAL, "127.0.0.1", "1.1.1.1, 9.9.9.9", "9.9.9.9"),
        (SITE, "127.0.0.1", "1.1.1.1, 9.9.9.9, 10.1.0.7", "9.9.9.9"),
        (LOCAL, "127.0.0.1", "9.9.9.9, 10.1.0.7", "10.1.0.7"),
        (SITE, "10.1.0.7", "10.1.0.8,10.1.0.9", "10.1.0.8"),
        (LOCAL, "127.0.0.1", "", "127.0.0.1"),
        (LOCAL, "127.0.0.1", "9.9.9.9, unknown", "127.0.0.1"),
        (LOCAL, "127.0.0.1", "fe80::1%x\xe9", "127.0.0.1"),
        (LOCAL, "127.0.0.1", "9.9.9.9:443", "127.0.0.1"),
    ],
)
def test_who_the_client_is(networks: list[str], peer: str, said: str, client: str) -> None:
    assert TrustedProxies(networks).client_of(peer, said.encode("latin-1")) == client


def peers(deployment: Deployment) -> dict[str, str]:
    """By the id of the request."""
    lines = [json.loads(line) for line in deployment.log.read_text().splitlines() if line.startswith("{")]
    return {line["id"]: line["peer"] for line in lines}


@pytest.mark.parametrize(("networks", "peer"), [(["127.0.0.1"], "9.9.9.9"), (["127.0.0.2/32"], "127.0.0.1")])
def test_it_is_the_client_in_the_log_and_never_this_machine(
    deployment: Deployment, networks: list[str], peer: str
) -> None:
    deployment.start({"chat": {"type": "chat"}}, trusted_proxies=networks)
    with Client(deployment.ports["router"]) as client:
        client.post("/v1/chat/completions", {"model": "chat"}, "x-forwarded-for: 9.9.9.9", "x-request-id: far")
        client.post("/v1/chat/completions", {"model": "chat"}, "x-request-id: near")
        for path in ("/admin/reload", "/internal/infer"):
            client.send(request("POST", path, "x-forwarded-for: 127.0.0.1"))
            assert client.answer().status == 403
    found = eventually(lambda: (seen := peers(deployment)).keys() >= {"far", "near"} and seen)
    assert (found["far"], found["near"]) == (peer, "127.0.0.1")
