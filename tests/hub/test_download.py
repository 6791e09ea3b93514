"""`models download` against a hub that has good and bad days."""

import contextlib
import os
import signal
import subprocess
from typing import Any

import pytest

from tests.conftest import eventually
from tests.hub.conftest import FIRST, MODEL, NEEDED, REPO, SECOND, Setup, is_whole, sha256
from tests.hub.server import COMMIT, Fault, always

OTHER = "0123456789abcdef" + "0" * 24


@pytest.mark.parametrize("source", ["huggingface", "modelscope", "auto"])
def test_what_vllm_needs_and_a_manifest_of_it(setup: Setup, source: str) -> None:
    setup.configure(source=source)
    assert setup.state() == "missing"
    said = setup.right("download")
    assert f"chat: {REPO} at " in said
    assert f"{len(NEEDED)} of {len(NEEDED)} files, 3.0 MB in " in said
    assert is_whole(setup)
    manifest = setup.manifest()
    entries = {file["path"]: (file["size"], file["sha256"]) for file in manifest["files"]}
    assert entries == {path: (len(MODEL[path]), sha256(MODEL[path])) for path in NEEDED}
    assert (manifest["repo"], manifest["asked"]) == (REPO, None)
    assert manifest["source"] in ("huggingface", "modelscope") if source == "auto" else manifest["source"] == source
    assert manifest["revision"] == (COMMIT if manifest["source"] == "huggingface" else "master")
    assert setup.state() == "complete"
    asked = len(setup.hub.requests)
    assert setup.right("download") == "no model is missing\n"
    assert len(setup.hub.requests) == asked
    assert "complete, nothing to fetch" in setup.right("download", "chat")
    assert setup.hub.fetched(FIRST) == [None]


PASSING = {
    "drops": [Fault(drop=700_000), Fault(drop=1000)],
    "drops before the first byte": [Fault(drop=0)] * 2,
    "stalls": [Fault(stall=100_000)],
    "is asked too often": [Fault(status=429, headers=(("Retry-After", "0"),))] * 3,
    "is down": [Fault(status=503, headers=(("Retry-After", "0"),)), Fault(status=500), Fault(status=502)],
    "has no ranges": [Fault(drop=700_000), Fault(no_ranges=True, drop=1_500_000)],
    "sends damaged bytes once": [Fault(damage=True)],
    "sends too much once": [Fault(length=2_000_001, drop=2_000_000)],
}


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("what", PASSING)
def test_what_passes(setup: Setup, source: str, what: str) -> None:
    setup.configure(source=source)
    setup.hub.fail(FIRST, *PASSING[what])
    setup.right("download", "chat")
    assert is_whole(setup)
    ranges = setup.hub.fetched(FIRST)
    assert len(ranges) == len(PASSING[what]) + 1
    if what == "drops":
        assert ranges == [None, "bytes=700000-", "bytes=701000-"]


@pytest.mark.parametrize("what", ["huggingface", "modelscope"])
def test_a_list_that_comes_at_the_second_try(setup: Setup, what: str) -> None:
    setup.configure(source=what)
    setup.hub.fail(what, Fault(status=503, headers=(("Retry-After", "0"),)))
    setup.right("download")
    assert is_whole(setup)


SOON = (("Retry-After", "0"),)
LASTING: dict[str, tuple[dict[str, Fault], str]] = {
    "401": ({FIRST: Fault(status=401)}, "accept the model's licence on its page, and set HF_TOKEN in .env"),
    "403": ({FIRST: Fault(status=403)}, "accept the model's licence on its page, and set HF_TOKEN in .env"),
    "404 of a file": ({FIRST: Fault(status=404)}, "no such repository, revision or file"),
    "429": ({FIRST: Fault(status=429, headers=SOON)}, "answers 429; try again later"),
    "500": ({FIRST: Fault(status=500, headers=SOON)}, "answers 500; try again later"),
    "401 of the list": ({"huggingface": Fault(status=401)}, "accept the model's licence on its page"),
    "403 of the list": ({"huggingface": Fault(status=403)}, "accept the model's licence on its page"),
    "404 of the list": ({"huggingface": Fault(status=404)}, "look at repo and revision"),
    "503 of the list": ({"huggingface": Fault(status=503)}, "answers 503; try again later"),
    "wrong bytes": ({FIRST: Fault(damage=True)}, "the checksum differs"),
    "too few bytes": ({FIRST: Fault(length=7, drop=7)}, "sends 7 bytes, and lists 2000000"),
    "astray": ({FIRST: Fault(redirect="file:///etc/passwd")}, "leads astray"),
}


@pytest.mark.parametrize("what", LASTING)
def test_what_lasts(setup: Setup, what: str) -> None:
    faults, said = LASTING[what]
    setup.hub.faults = {path: always(fault) for path, fault in faults.items()}
    (line,) = setup.wrong("download")
    assert said in line
    assert REPO in line
    assert FIRST not in (setup.files() if setup.folder.exists() else [])


def test_a_repository_and_a_revision_that_are_not_there(setup: Setup) -> None:
    setup.configure(repo="someone/else")
    assert "someone/else: Hugging Face" in setup.wrong("download")[0]
    setup.configure(revision="v9")
    assert "look at repo and revision" in setup.wrong("download")[0]
    assert not setup.folder.exists()


def test_a_list_that_lies_about_a_size(setup: Setup) -> None:
    setup.hub.listed[FIRST] = {"size": 2_500_000}
    (line,) = setup.wrong("download")
    assert "sends 2000000 bytes, and lists 2500000" in line


@pytest.mark.parametrize(
    ("source", "path"), [("huggingface", "../a.json"), ("modelscope", "/etc/a.json"), ("huggingface", "Config.json")]
)
def test_a_list_that_leads_astray(setup: Setup, source: str, path: str) -> None:
    setup.configure(source=source)
    setup.hub.put(REPO, {**MODEL, path: b"{}"})
    (line,) = setup.wrong("download")
    assert "nothing was written" in line
    assert not setup.folder.exists()
    assert setup.hub.fetched(FIRST) == []


@pytest.mark.parametrize("link", [FIRST, f"{FIRST}.part", "1_Pooling", ".manifest.json", ".download.lock"])
def test_a_symlink_in_the_folder(setup: Setup, link: str) -> None:
    outside = setup.project.home / "outside"
    outside.mkdir()
    setup.folder.mkdir(parents=True)
    (setup.folder / link).symlink_to(outside / "file")
    (line,) = setup.wrong("download")
    assert f"{setup.folder / link}: " in line
    assert list(outside.iterdir()) == []


def test_a_disk_that_is_too_small(setup: Setup) -> None:
    setup.hub.listed[FIRST] = {"size": 10**18}
    (line,) = setup.wrong("download")
    assert "needs 1.0 EB, " in line
    assert setup.hub.fetched(SECOND) == []


def begun(setup: Setup, *arguments: str) -> "subprocess.Popen[str]":
    """A download that hangs in the middle of FIRST, with the others there."""
    setup.hub.fail(FIRST, Fault(stall=600_000))
    argv, environ = setup.command("download", *arguments)
    environ["HF_HUB_DOWNLOAD_TIMEOUT"] = "60"
    process = subprocess.Popen(argv, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part = setup.folder / f"{FIRST}.part"
    eventually(lambda: part.exists() and part.stat().st_size == 600_000 and (setup.folder / SECOND).exists())
    return process


def test_ctrl_c_leaves_what_can_be_taken_up(setup: Setup) -> None:
    process = begun(setup)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert setup.state() == "incomplete"
    assert "not there in full" in setup.right("list")
    setup.right("download")
    assert is_whole(setup)
    assert setup.hub.fetched(FIRST) == [None, "bytes=600000-"]
    assert setup.hub.fetched(SECOND) == [None]


def test_a_part_of_another_file_is_not_taken_up(setup: Setup) -> None:
    setup.folder.mkdir(parents=True)
    (setup.folder / f"{FIRST}.part").write_bytes(b"x" * 500)
    (setup.folder / f"{SECOND}.part").write_bytes(b"x" * 5_000_000)
    setup.right("download")
    assert is_whole(setup)


def test_two_at_once_are_kept_apart(setup: Setup) -> None:
    process = begun(setup)
    (line,) = setup.wrong("download")
    assert line == f"{setup.folder}: another download is at work there; wait for it, or end it"
    process.kill()
    process.communicate()
    setup.right("download")
    assert is_whole(setup)


def test_auto_takes_the_hub_that_has_it(setup: Setup) -> None:
    setup.configure(source="auto")
    setup.hub.faults["huggingface"] = always(Fault(status=404))
    setup.right("download")
    assert setup.manifest()["source"] == "modelscope"


def test_auto_waits_for_no_hub_that_hangs(setup: Setup) -> None:
    setup.configure(source="auto")
    setup.hub.fail("modelscope", Fault(stall=0))
    setup.right("download")
    assert setup.manifest()["source"] == "huggingface"


def test_auto_says_what_each_hub_said(setup: Setup) -> None:
    setup.configure(source="auto", repo="someone/else")
    lines = setup.wrong("download")
    assert sorted(line.partition(" (")[0] for line in lines) == [
        "someone/else: Hugging Face",
        "someone/else: ModelScope",
    ]


def test_auto_goes_on_with_the_other_hub(setup: Setup) -> None:
    """The one that answered first gives a list, and not the bytes."""
    setup.configure(source="auto")
    setup.hub.fail(FIRST, Fault(status=404))
    setup.right("download")
    assert is_whole(setup)
    assert setup.hub.fetched(FIRST) == [None, None]


def test_a_token_goes_to_the_hub_alone_and_is_never_shown(setup: Setup) -> None:
    setup.hub.token = "hf_of-the-tests"
    (line,) = setup.wrong("download")
    assert "no HF_TOKEN is set" in line
    (line,) = setup.wrong("download", HF_TOKEN="hf_wrong")
    assert "HF_TOKEN is refused" in line
    assert "hf_wrong" not in line
    said = setup.run("download", HF_TOKEN=setup.hub.token)
    assert said.returncode == 0
    assert setup.hub.token not in said.stdout + said.stderr
    given = {each.host: each.authorization for each in setup.hub.requests}
    assert given == {"127.0.0.1": f"Bearer {setup.hub.token}", "localhost": None}


def test_a_revision_is_pinned_and_changed(setup: Setup) -> None:
    newer: dict[str, Any] = {**MODEL, FIRST: b"n" * 2_000_000}
    del newer["1_Pooling/config.json"]
    setup.hub.put(REPO, newer, OTHER)
    setup.configure(revision=COMMIT)
    setup.right("download")
    assert is_whole(setup)
    setup.configure(revision=OTHER)
    assert setup.state() == "incomplete"
    setup.right("download")
    assert (setup.folder / FIRST).read_bytes() == newer[FIRST]
    assert setup.files() == sorted(set(NEEDED) - {"1_Pooling/config.json"})
    assert setup.hub.fetched(SECOND) == [None]
    assert setup.manifest()["revision"] == OTHER


def test_the_rest_is_of_the_commit_that_it_began_with(setup: Setup) -> None:
    setup.hub.faults[FIRST] = always(Fault(status=404))
    setup.wrong("download")
    setup.hub.put(REPO, {**MODEL, SECOND: b"n" * 1_000_000}, OTHER)
    del setup.hub.faults[FIRST]
    setup.right("download")
    assert is_whole(setup)


def test_files_that_were_there_before(setup: Setup) -> None:
    setup.folder.mkdir(parents=True)
    for path in ("config.json", FIRST):
        (setup.folder / path).write_bytes(MODEL[path])
    assert setup.state() == "unverified"
    assert setup.right("download") == "no model is missing\n"
    setup.right("download", "chat")
    assert is_whole(setup)
    assert setup.hub.fetched(FIRST) == []


def test_someone_elses_files_are_not_written_over(setup: Setup) -> None:
    setup.folder.mkdir(parents=True)
    for path in ("config.json", FIRST):
        (setup.folder / path).write_bytes(b"mine")
    (line,) = setup.wrong("download", "chat")
    assert "another file than that of someone/model" in line
    assert (setup.folder / FIRST).read_bytes() == b"mine"


@pytest.mark.parametrize("variable", ["VLLM_UNIFIED_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_it_says_what_to_bring(setup: Setup, variable: str) -> None:
    (line,) = setup.wrong("download", **{variable: "1"})
    assert f"offline, so bring {REPO}" in line
    assert f"carry {setup.folder} over" in line
    assert setup.hub.requests == []


def test_a_line_now_and_then_where_there_is_no_terminal(setup: Setup) -> None:
    setup.hub.fail(FIRST, Fault(stall=600_000))
    said = setup.run("download", HF_HUB_DOWNLOAD_TIMEOUT="7")
    assert said.returncode == 0
    assert "chat: 1.6 MB of 3.0 MB, " in said.stderr


def test_bars_on_a_terminal(setup: Setup) -> None:
    setup.hub.fail(FIRST, Fault(stall=600_000))
    argv, environ = setup.command("download")
    reader, writer = os.openpty()
    with subprocess.Popen(argv, env={**environ, "TERM": "xterm"}, stdout=subprocess.DEVNULL, stderr=writer) as process:
        os.close(writer)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal whose other end is closed
            while piece := os.read(reader, 4096):
                shown += piece
        assert process.wait() == 0
    os.close(reader)
    assert f"  {FIRST}".encode() in shown
    assert b"1.6/3.0 MB" in shown


def test_a_disk_that_takes_no_more(setup: Setup) -> None:
    """As a quota has it: a piece of the last block is written, then nothing."""
    argv, environ = setup.command("download")
    limited = ["prlimit", "--fsize=1500000", *argv]
    done = subprocess.run(limited, env=environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"{setup.folder / FIRST}.part: File too large\n"
    setup.right("download")
    assert is_whole(setup)
    assert setup.hub.fetched(FIRST) == [None, "bytes=1500000-"]


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("http://127.0.0.1:9", "does not answer"),
        ("ftp://hub.example", ".env: HF_ENDPOINT: no address of a hub"),
        ("https://me:secret@hub.example", ".env: HF_ENDPOINT: no address of a hub"),
    ],
)
def test_a_hub_that_is_none(setup: Setup, endpoint: str, said: str) -> None:
    (setup.project.home / ".env").write_text(f"HF_ENDPOINT={endpoint}\n")
    (line,) = setup.wrong("download")
    assert said in line
    assert "secret" not in line
