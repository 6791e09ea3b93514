"""config/keys.yaml: what is wrong with it, and editing it without losing what its user wrote."""

import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import yaml

from tests.conftest import CHECKOUT, Project
from tests.test_cli import run
from vllm_unified.errors import ConfigError
from vllm_unified.router.usage import Usage
from vllm_unified.settings.keys import FILE, KeyEntry, add_key, new_key, read_keys, remove_key, unknown_models

HASH = f"sha256:{'0' * 64}"
OTHER = f"sha256:{'1' * 64}"


def write(project: Project, text: str) -> None:
    (project.home / FILE).write_text(text, encoding="utf-8")


def text_of(project: Project) -> str:
    return (project.home / FILE).read_text(encoding="utf-8")


def names(project: Project) -> list[str]:
    return [entry.name for entry in read_keys(project.home)]


def test_the_example_loads_and_shows_every_field(project: Project) -> None:
    text = (CHECKOUT / "config" / "keys.example.yaml").read_text(encoding="utf-8")
    write(project, text)
    assert names(project) == ["alice@example.com", "nightly-indexer", "accounting"]
    shown = {field for entry in yaml.safe_load(text)["keys"] for field in entry}
    assert shown == set(KeyEntry.model_fields)


@pytest.mark.parametrize("text", [None, "", "# nothing\n", "keys:\n", "keys: []\n"])
def test_no_keys(project: Project, text: str | None) -> None:
    if text is not None:
        write(project, text)
    assert read_keys(project.home) == ()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("keys: [\n", ["config/keys.yaml: line 2, column 1: expected the node content, but found '<stream end>'"]),
        ("- a\n", ["config/keys.yaml: should be an object in braces"]),
        ("kees: []\n", ['config/keys.yaml: nothing reads "kees"; did you mean "keys"?']),
        ("keys: sk-secret\n", ["config/keys.yaml: keys: should be a valid list"]),
        ("keys: [sk-secret]\n", ["config/keys.yaml: keys.0: should be an object in braces"]),
        ("keys: [{name: a}]\n", ['config/keys.yaml: keys.0: "hash" is missing']),
        (
            "keys: [{name: a, hash: sk-secret}]\n",
            [
                "config/keys.yaml: keys.0.hash: should be sha256: and 64 digits 0-9 a-f, as "
                "`vllm-unified keys create NAME` writes it"
            ],
        ),
        (
            f'keys: [{{name: "=1+1", hash: "{HASH}"}}]\n',
            [
                'config/keys.yaml: keys.0.name: "=1+1": use up to 64 letters, digits and _ . @ -, a letter or digit '
                "first"
            ],
        ),
        (
            f'keys: [{{name: Deployment, hash: "{HASH}"}}]\n',
            ['config/keys.yaml: keys.0.name: "Deployment" is the name of the key in .env; choose another'],
        ),
        (
            f'keys: [{{name: a, hash: "{HASH}", model: [chat]}}]\n',
            ['config/keys.yaml: keys.0: nothing reads "model"; did you mean "models"?'],
        ),
        (
            f'keys: [{{name: a, hash: "{HASH}", models: [chat, "a b"], max_concurrent: 0, priority: "1"}}]\n',
            [
                'config/keys.yaml: keys.0.models.1: "a b": use letters, digits and _ - . : / @ + only',
                "config/keys.yaml: keys.0.max_concurrent: 0: should be greater than or equal to 1",
                'config/keys.yaml: keys.0.priority: "1": should be a valid integer',
            ],
        ),
        (
            f'keys: [{{name: a, hash: "{HASH}", models: []}}]\n',
            ["config/keys.yaml: keys.0.models: at least one is needed"],
        ),
        (
            f'keys: [{{name: a, hash: "{HASH}", expires: soon}}]\n',
            ['config/keys.yaml: keys.0.expires: "soon" is no date; write it as 2026-12-31 or 2026-12-31T18:00:00Z'],
        ),
        (
            f'keys: [{{name: a, hash: "{HASH}"}}, {{name: a, hash: "{HASH}"}}]\n',
            [
                "config/keys.yaml: keys.1.name: a stands twice; choose another",
                f"config/keys.yaml: keys.1.hash: {HASH} stands twice; make a key for each",
            ],
        ),
    ],
)
def test_whatever_is_wrong(project: Project, text: str, lines: list[str]) -> None:
    write(project, text)
    with pytest.raises(ConfigError) as caught:
        read_keys(project.home)
    assert str(caught.value).splitlines() == lines


def test_check_looks_at_the_keys_too(project: Project) -> None:
    project.write({"chat": {"name": "c", "type": "chat"}})
    write(project, "keys: 5\n")
    done = run(project, "check")
    assert (done.returncode, done.stderr) == (1, "config/keys.yaml: keys: should be a valid list\n")


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("2026-12-31", datetime(2026, 12, 31, 23, 59, 59, 999999, UTC)),
        ("'2026-12-31'", datetime(2026, 12, 31, 23, 59, 59, 999999, UTC)),
        ("2026-12-31T18:00:00", datetime(2026, 12, 31, 18, tzinfo=UTC)),
        ("2026-12-31T18:00:00Z", datetime(2026, 12, 31, 18, tzinfo=UTC)),
        ("'2026-12-31T18:00:00+02:00'", datetime(2026, 12, 31, 16, tzinfo=UTC)),
        ("2026-12-31 18:00:00 +2", datetime(2026, 12, 31, 16, tzinfo=UTC)),
    ],
)
def test_expires(project: Project, written: str, moment: datetime) -> None:
    write(project, f"keys:\n- {{name: a, hash: '{HASH}', expires: {written}}}\n")
    assert read_keys(project.home)[0].expires == moment


def test_a_key_is_random_and_its_hash_is_plain_sha256() -> None:
    value, hashed = new_key()
    assert value.startswith("sk-")
    assert len(value) == 3 + 43  # 256 bits, 6 a letter
    assert hashed == f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
    assert new_key()[0] != value


def test_unknown_models() -> None:
    entries = [KeyEntry(name="a", hash=HASH, models=["chat", "x"]), KeyEntry(name="b", hash=OTHER)]
    assert unknown_models(entries, ["chat", "y"]) == ["x"]


EDITED = f"""\
# who may come in
keys:
  # the first
  - name: a   # a friend
    hash: {HASH}
    models:
      - chat  # only this one

  # the second
  - hash: {OTHER}
    name: b
# the end
"""


def test_what_stands_there_stays(project: Project) -> None:
    write(project, EDITED)
    remove_key(project.home, "a")
    first = EDITED.splitlines(keepends=True)
    assert text_of(project) == "".join(first[:3] + first[7:])
    write(project, EDITED)
    add_key(project.home, {"name": "c", "hash": f"sha256:{'2' * 64}", "models": ["chat"]})
    added = f"  - name: c\n    hash: sha256:{'2' * 64}\n    models:\n    - chat\n"
    assert text_of(project) == EDITED.replace("# the end\n", f"{added}# the end\n")


@pytest.mark.parametrize(
    "text",
    [
        EDITED,
        EDITED.replace("\n  ", "\n"),
        "",
        "# only a remark\n",
        "keys:\n",
        "keys:   # none yet\n# the end\n",
        f"keys:\n- {{name: a, hash: '{HASH}'}}",
        f"---\nkeys:\n  -   name: a\n      hash: '{HASH}'\n\n\n",
        f"keys:\n- name: 中文\n  hash: '{HASH}'\n".replace("中文", "a中文"),
    ],
)
def test_a_key_comes_and_goes(project: Project, text: str) -> None:
    write(project, text)
    before = read_keys(project.home)
    add_key(project.home, {"name": "new", "hash": f"sha256:{'3' * 64}", "priority": 2, "models": ["a/b"]})
    assert read_keys(project.home) == (
        *before,
        KeyEntry(name="new", hash=f"sha256:{'3' * 64}", priority=2, models=["a/b"]),
    )
    remove_key(project.home, "new")
    assert read_keys(project.home) == before
    assert text_of(project).rstrip("\n") in (text.rstrip("\n"), f"{text}keys:")


def test_what_only_a_person_can_edit_is_left_alone(project: Project) -> None:
    text = f"keys: [{{name: a, hash: '{HASH}'}}, {{name: b, hash: '{OTHER}'}}]\n"
    write(project, text)
    remedy = "config/keys.yaml: keys: write each key on lines of its own, beginning with - name: …"
    with pytest.raises(ConfigError, match=remedy):
        add_key(project.home, {"name": "c", "hash": f"sha256:{'2' * 64}"})
    with pytest.raises(ConfigError, match=remedy):
        remove_key(project.home, "a")
    assert text_of(project) == text


@pytest.mark.parametrize("fields", [{"name": "a b", "hash": HASH}, {"name": "a", "hash": HASH, "expires": "soon"}])
def test_a_wrong_entry_is_not_written(project: Project, fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^config/keys.yaml: keys\.0\."):
        add_key(project.home, fields)
    assert not (project.home / FILE).exists()


def test_a_link_stays_a_link(project: Project) -> None:
    elsewhere = project.home / "secrets.yaml"
    (project.home / FILE).symlink_to(elsewhere)
    add_key(project.home, {"name": "a", "hash": HASH})
    assert (project.home / FILE).is_symlink()
    assert "name: a" in elsewhere.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_leaves_the_file_to_its_owner(project: Project) -> None:
    os.chown(project.home / "config", 1234, 1234)
    add_key(project.home, {"name": "a", "hash": HASH})
    assert (project.home / FILE).stat().st_uid == 1234
    os.chown(project.home / FILE, 4321, 4321)
    remove_key(project.home, "a")
    assert (project.home / FILE).stat().st_uid == 4321


@pytest.fixture
def two_models(project: Project) -> Project:
    project.write({"chat": {"name": "qwen", "type": "chat", "aliases": ["gpt-4"]}, "ocr": {"name": "o", "type": "ocr"}})
    return project


def test_create_list_revoke(two_models: Project) -> None:
    limits = ["--requests-per-minute", "60", "--tokens-per-day", "1000", "--expires", "2020-01-31", "--priority", "-1"]
    made = run(two_models, "keys", "create", "alice", "--model", "gpt-4", "--model", "ocr", *limits)
    value = made.stdout.strip()
    assert made.stdout == f"{value}\n"
    assert "only its hash is" in made.stderr
    (entry,) = read_keys(two_models.home)
    assert entry.hash == f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
    assert value not in text_of(two_models)
    assert (two_models.home / FILE).stat().st_mode & 0o777 == 0o600
    assert run(two_models, "keys", "create", "root", "--admin").returncode == 0

    usage = Usage(two_models.home / "data" / "usage.db")
    usage.note("alice", "chat", error=False, prompt_tokens=1000, completion_tokens=234, seconds=1.0)
    usage.close()
    alice, root = json.loads(run(two_models, "keys", "list", "--json").stdout)["keys"]
    assert datetime.now(UTC) - datetime.fromisoformat(alice.pop("created")) < timedelta(minutes=5)
    assert alice == {
        "name": "alice",
        "models": ["gpt-4", "ocr"],
        "requests_per_minute": 60,
        "tokens_per_minute": None,
        "max_concurrent": None,
        "tokens_per_day": 1000,
        "tokens_per_month": None,
        "expires": "2020-01-31T23:59:59.999999Z",
        "priority": -1,
        "admin": False,
        "expired": True,
        "tokens_today": 1234,
        "tokens_this_month": 1234,
    }
    assert (root["admin"], root["expired"], root["tokens_today"]) == (True, False, 0)
    table = run(two_models, "keys", "list").stdout
    for shown in (
        "alice",
        "gpt-4, ocr",
        "60 requests/min",
        "1,000 tokens/day",
        "2020-01-31, over",
        "1,234",
        "root (admin)",
    ):
        assert shown in table

    assert run(two_models, "keys", "revoke", "alice").returncode == 0
    assert names(two_models) == ["root"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["create", "root"], 1, 'there is a key "root" already; choose another name, or `vllm-unified keys revoke'),
        (["create", "a b"], 1, 'keys.1.name: "a b": use up to 64 letters'),
        (["create", "a", "--expires", "soon"], 1, 'keys.1.expires: "soon" is no date'),
        (["create", "a", "--model", "x"], 1, 'config/models.json: no model "x"; there are chat, gpt-4, o, ocr, qwen'),
        (["create", "a", "--max-concurrent", "0"], 2, "Invalid value for '--max-concurrent'"),
        (["revoke", "nobody"], 1, 'config/keys.yaml: keys: no key "nobody"; there are root'),
    ],
)
def test_what_it_says_of_mistakes(two_models: Project, arguments: list[str], code: int, said: str) -> None:
    write(two_models, f"keys:\n- {{name: root, hash: '{HASH}'}}\n")
    done = run(two_models, "keys", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert names(two_models) == ["root"]


def test_a_broken_file_is_not_edited(two_models: Project) -> None:
    write(two_models, "keys: 5\n")
    for arguments in (["create", "a"], ["revoke", "a"], ["list"]):
        done = run(two_models, "keys", *arguments)
        assert (done.returncode, done.stderr) == (1, "config/keys.yaml: keys: should be a valid list\n")
    assert text_of(two_models) == "keys: 5\n"


def test_all_of_many_at_once_survive(project: Project) -> None:
    environ = {**os.environ, "VLLM_UNIFIED_HOME": str(project.home)}
    program = [sys.executable, "-m", "vllm_unified", "keys", "create"]
    wanted = [f"key-{number}" for number in range(6)]
    makers = [
        subprocess.Popen([*program, name], env=environ, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for name in wanted
    ]
    values = [maker.communicate()[0].decode().strip() for maker in makers]
    assert sorted(names(project)) == wanted
    hashes = {entry.name: entry.hash for entry in read_keys(project.home)}
    assert [hashes[name] for name in wanted] == [
        f"sha256:{hashlib.sha256(value.encode()).hexdigest()}" for value in values
    ]
