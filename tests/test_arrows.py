"""Who may import whom (the layers), and that the light commands stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import CHECKOUT

PACKAGE = CHECKOUT / "vllm_unified"
BASE = {"errors", "state", "devices", "held", "loopback", "logs"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "state": {"errors"},
    # a file that stands in for the cards is read and checked as every other file is, and only when there is one
    "devices": {"errors", "settings"},
    "held": set(),
    "loopback": set(),
    # one format for all that write a log, and what reads it
    "logs": {"errors"},
    "settings": {"errors"},
    "engines": BASE | {"settings"},
    "supervision": BASE | {"settings", "engines"},
    # whose spans both are sent by
    "tracing": {"errors", "settings"},
    "router": BASE | {"settings", "tracing"},
    "documents": BASE | {"settings", "tracing"},
    "hub": {"errors", "state", "settings"},
    "bundle": {"errors", "settings", "hub"},
    # charts of what the exporters of other rooms tell, over HTTP alone
    "monitoring": {"errors"},
    "backup": {"errors", "hub"},
    "machine": BASE | {"settings", "engines", "hub", "supervision"},
    "console": BASE | {"settings", "engines", "supervision"},
    "selftest": {"loopback", "settings"},
    "operations": BASE | {"settings", "engines", "supervision"},
    "cli": BASE
    | {"settings", "engines", "supervision", "router", "documents", "hub", "bundle", "machine", "console", "operations"}
    | {"selftest", "backup", "monitoring"},
    "__main__": {"cli"},
    "__init__": set(),
}


def imports_of(room: str) -> Iterator[tuple[str, str]]:
    """File and the room that it imports."""
    folder = PACKAGE / room
    for path in folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{room}.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = (
                    [node.module] if node.module != "vllm_unified" else [f"{node.module}.{a.name}" for a in node.names]
                )
            for name in names:
                parts = name.split(".")
                if parts[0] == "vllm_unified" and len(parts) > 1 and parts[1] not in (room, "__version__"):
                    yield path.name, parts[1]


def test_every_room_is_listed() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_one_way(room: str) -> None:
    wrong = [(file, imported) for file, imported in imports_of(room) if imported not in ALLOWED[room]]
    assert wrong == []


@pytest.mark.parametrize(
    "module", ["settings", "engines.keeper", "engines.command", "supervision.conf", "machine", "cli"]
)
def test_light_rooms_stay_light(module: str) -> None:
    """`check`, `plan` and `show` answer in a blink, and a keeper costs little memory."""
    program = f"import sys, vllm_unified.{module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"fastapi", "starlette", "uvloop", "httptools", "vllm", "torch"}.isdisjoint(loaded)
    assert {"httpx", "huggingface_hub", "modelscope", "modelscope_hub", "rich"}.isdisjoint(loaded)
    if module == "engines.keeper":  # one beside every engine, for months
        assert {"pydantic", "click", "yaml", "dotenv", "rich"}.isdisjoint(loaded)
