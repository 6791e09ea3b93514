"""What the real vLLM writes, as it stands in the logs: with its level, and without what users sent."""

import json

import httpx

from tests.conftest import API_KEY
from tests.engine.conftest import HEADERS, Demo

SECRET = "xyzzy-secret-of-a-client"
CHAT = {"model": "demo-chat", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "user": SECRET}
WRONG = (
    {**CHAT, "max_tokens": 1_000_000},
    {**CHAT, "messages": [{"role": SECRET, "content": [{"type": SECRET}]}]},
    {**CHAT, "temperature": SECRET},
    {**CHAT, "tools": [{SECRET: SECRET}], "tool_choice": SECRET},
    {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": SECRET, "schema": {"type": SECRET}}}},
    {
        **CHAT,
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:{SECRET}"}}]}],
    },
)


def test_each_line_has_a_level_and_nothing_of_users(demo: Demo) -> None:
    for door in ("router", "chat"):
        with httpx.Client(base_url=demo.url(door), headers=HEADERS, params={"api_key": SECRET}, timeout=60) as client:
            assert client.post("/chat/completions", json=CHAT).status_code == 200
            assert client.post("/chat/completions", json={**CHAT, "stream": True}).status_code == 200
            assert 400 <= client.post("/chat/completions", content=json.dumps(CHAT)[:-2]).status_code < 500
            for each in WRONG:
                client.post("/chat/completions", json=each)
            assert client.post("/chat/completions", json=CHAT, headers={"authorization": SECRET}).status_code == 401
    logs = demo.run_folder / "logs"
    lines = [json.loads(line) for line in (logs / "chat.log").read_text().splitlines()]
    assert {line["model"] for line in lines} == {"chat"}
    of_engine = [line for line in lines if line["source"] == "engine"]
    assert {"info", "warning"} <= {line["level"] for line in of_engine}
    # The level and the time stand in the line of JSON, no more in the message.
    assert any(line["message"].startswith("(EngineCore pid=") for line in of_engine)
    assert [line["message"] for line in of_engine if " INFO 1" in line["message"][:60]] == []
    texts = {path.name: path.read_text(errors="replace") for path in logs.glob("*.log*")}
    assert [name for name, text in texts.items() if SECRET in text] == []
    assert [name for name, text in texts.items() if API_KEY in text] == []
