"""What a list of files may say, as a table: a hub's, or that of a manifest on a stick."""

from typing import Any

import pytest

from vllm_unified.errors import UserError
from vllm_unified.hub.manifest import File, refuse_unsafe

SUM = "0" * 64


@pytest.mark.parametrize(
    "paths",
    [
        ["../a.json"],
        ["/etc/a.json"],
        ["a/../../b.json"],
        ["a\\b.json"],
        ["a//b.json"],
        ["./a.json"],
        ["a/"],
        [""],
        ["a\nb.json"],
        ["a\0b.json"],
        ["a\ud800.json"],
        ["a" * 1025],
        ["config.json", "config.json"],
        ["config.json", "Config.json"],
        ["caf\u00e9.json", "cafe\u0301.json"],
        ["A/x.json", "a/y.json"],
        ["a", "a/x.json"],
        [".manifest.json"],
        [".download.lock"],
    ],
)
def test_paths_that_are_refused(paths: list[str]) -> None:
    with pytest.raises(UserError, match=r"the hub: lists .*; nothing was written"):
        refuse_unsafe([File("model.safetensors", 1, SUM), *(File(path, 1, SUM) for path in paths)], "the hub")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": None}, "no path"),
        ({"path": 7}, "no path"),
        ({"size": -1}, "without a size"),
        ({"size": "1"}, "without a size"),
        ({"size": True}, "without a size"),
        ({"sha256": None}, "without a checksum"),
        ({"sha256": "../x"}, "a checksum that is none"),
        ({"git_sha1": "0"}, "a checksum that is none"),
    ],
)
def test_entries_that_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        refuse_unsafe([File(**{"path": "a", "size": 1, "sha256": SUM, **fields})], "the hub")


def test_what_models_have() -> None:
    paths = ["config.json", "1_Pooling/config.json", "1_Pooling/a b (c)+.json", "模型.json", "..a/.b..", "a.part"]
    refuse_unsafe([File(path, 0, SUM) for path in paths], "the hub")
