"""What the documents say is compared with what there is."""

import re
import subprocess
import tomllib

import pytest

from scripts.write_docs import readme, schema
from tests.conftest import CHECKOUT
from vllm_unified import __version__
from vllm_unified.cli import cli
from vllm_unified.router.routes import ROUTES
from vllm_unified.settings.environment import OWN_VARIABLES
from vllm_unified.settings.keys import KeyEntry

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
CHINESE = (CHECKOUT / "README.zh.md").read_text(encoding="utf-8")
HELP = subprocess.run([CHECKOUT / "deploy.sh", "help"], capture_output=True, text=True, check=True).stdout


def test_the_schema_and_the_tables_are_made_from_the_settings() -> None:
    assert (CHECKOUT / "config" / "models.schema.json").read_text(encoding="utf-8") == schema(), "scripts/write_docs.py"
    assert readme(README) == README, "run scripts/write_docs.py"


@pytest.mark.parametrize("text", [README, CHINESE])
def test_every_path_and_setting_is_in_both_readmes(text: str) -> None:
    expected = [
        *(route.path for route in ROUTES),
        "/live",
        "/ready",
        "/health",
        "/models",
        "/system/info",
        "/usage",
        "/v1/models",
    ]
    expected += OWN_VARIABLES
    expected += re.findall(r"^\| `([\w.]+)`", README, re.MULTILINE)
    assert [word for word in expected if f"`{word}`" not in text and f"GET {word}`" not in text] == []


@pytest.mark.parametrize(("text", "heading"), [(README, "## Keys and usage\n"), (CHINESE, "## 密钥与用量\n")])
def test_every_field_of_a_key_is_in_both_readmes(text: str, heading: str) -> None:
    section = text.partition(heading)[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == list(KeyEntry.model_fields)


def test_both_readmes_show_the_same_commands() -> None:
    commands = [re.sub(r"\s+#.*", "", line) for line in code_of(README)]
    assert commands == [re.sub(r"\s+#.*", "", line) for line in code_of(CHINESE)]


@pytest.mark.parametrize("name", ["docs/offline", "docs/operations", "scripts/offline/README"])
def test_both_languages_of_a_document_show_the_same(name: str) -> None:
    english, chinese = ((CHECKOUT / f"{name}{suffix}").read_text(encoding="utf-8") for suffix in (".md", ".zh.md"))
    assert [re.sub(r"\s+#.*", "", line) for line in code_of(english)] == [
        re.sub(r"\s+#.*", "", line) for line in code_of(chinese)
    ]
    assert len(re.findall(r"^\|", english, re.MULTILINE)) == len(re.findall(r"^\|", chinese, re.MULTILINE))


def test_both_languages_name_the_same_remedies_of_each_alert() -> None:
    english, chinese = (
        (CHECKOUT / "docs" / f"operations{suffix}").read_text(encoding="utf-8").split("\n## ")[1:]
        for suffix in (".md", ".zh.md")
    )
    assert [section.partition("\n")[0] for section in english] == [section.partition("\n")[0] for section in chinese]
    for one, other in zip(english, chinese, strict=True):
        assert named_in(one) == named_in(other), one.partition("\n")[0]


def named_in(section: str) -> list[str]:
    """Commands, settings, metrics, values of labels and links, in any order, wherever the lines break."""
    named = re.findall(r"`([^`]+)`|(?<!\*)\*([\w-]+)\*(?!\*)|\]\(([^)]+)\)", section)
    return sorted(" ".join("".join(groups).split()) for groups in named)


def code_of(text: str) -> list[str]:
    blocks = re.findall(r"```(?:bash|console|python)\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_verbs_of_deploy_are_documented() -> None:
    script = (CHECKOUT / "deploy.sh").read_text()
    verbs = re.findall(r"^verb_(\w+)\(\)", script, re.MULTILINE)
    assert len(verbs) == 17
    for verb in verbs:
        assert re.search(rf"^  {verb}\b", HELP, re.MULTILINE), verb
    for verb in re.findall(r"\./deploy\.sh (\w+)", README + CHINESE + HELP):
        assert verb in (*verbs, "help", "VERB"), verb


def test_the_commands_of_the_cli_are_documented() -> None:
    changelog = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name, command in cli.commands.items():
        if command.hidden:  # behind one of the scripts
            continue
        assert f"`{name}`" in changelog or f" {name}`" in changelog, name
        assert command.help


def test_every_variable_is_in_the_example() -> None:
    example = (CHECKOUT / ".env.example").read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+)=", example, re.MULTILINE)) == set(OWN_VARIABLES)


def test_one_version() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert project["version"] == __version__ == re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0]


def test_versions_stand_in_one_file() -> None:
    versions = (CHECKOUT / "scripts" / "versions.env").read_text()
    pinned = re.findall(r"^\w+=(?:[\w-]+==)?([\d.]+)", versions, re.MULTILINE)
    assert len(pinned) == 4
    for path in (*CHECKOUT.glob("*.sh"), *CHECKOUT.glob("scripts/*"), CHECKOUT / "pyproject.toml"):
        if path.is_file() and path.name != "versions.env":
            text = path.read_text(encoding="utf-8")
            assert [version for version in pinned if f"=={version}" in text] == [], path.name
