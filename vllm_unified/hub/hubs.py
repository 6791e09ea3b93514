"""What Hugging Face and ModelScope say of a repository: its files with their sizes and sums, and where they are."""

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from vllm_unified.errors import UserError
from vllm_unified.hub.manifest import File, refuse_unsafe
from vllm_unified.hub.selection import needed
from vllm_unified.settings.environment import Environment

LISTING_SECONDS = 30.0
LISTING_PAUSES = (1.0, 3.0)


class HubError(UserError):
    """A hub does not give what was asked for; the message says why, and what to do."""


@dataclass(frozen=True)
class Hub:
    """`token` goes to `endpoint` and nowhere else."""

    key: str
    name: str
    endpoint: str
    token: str | None = field(repr=False)
    token_variable: str

    def files(self, repo: str, revision: str | None) -> tuple[str, list[File]]:
        """The commit, and every file. Raises what the hub's library raises."""
        raise NotImplementedError

    def url(self, repo: str, revision: str, path: str) -> str:
        raise NotImplementedError

    def refusal(self, status: int | None, what: str, detail: str) -> HubError:
        """In one line, whatever the hub and its library said in many."""
        where = f"{self.name} ({self.endpoint})"
        if status in (401, 403):
            token = f"its {self.token_variable} is refused there" if self.token else f"no {self.token_variable} is set"
            remedy = f"accept the model's licence on its page, and set {self.token_variable} in .env"
            return HubError(
                f"{what}: {where} answers {status}: gated, private, or no such repository, and {token}; {remedy}"
            )
        if status == 404:
            return HubError(f"{what}: {where} has no such repository, revision or file; look at repo and revision")
        if status is not None:
            return HubError(f"{what}: {where} answers {status}; try again later, or name the other hub in `source`")
        remedy = "try again, or name a mirror in .env (HF_ENDPOINT, MODELSCOPE_ENDPOINT)"
        return HubError(f"{what}: {where} does not answer ({detail}); {remedy}")


class HuggingFace(Hub):
    def files(self, repo: str, revision: str | None) -> tuple[str, list[File]]:
        # Read when the library is imported.
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from huggingface_hub import HfApi

        # False: not the token that someone left in the home folder.
        api = HfApi(endpoint=self.endpoint, token=self.token or False)
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=LISTING_SECONDS)
        found = [
            File(each.rfilename, each.lfs.size, sha256=each.lfs.sha256)
            if each.lfs
            else File(each.rfilename, _number(each.size), git_sha1=each.blob_id)
            for each in info.siblings or []
        ]
        return info.sha or revision or "main", found

    def url(self, repo: str, revision: str, path: str) -> str:
        return f"{self.endpoint}/{repo}/resolve/{quote(revision, safe='')}/{quote(path)}"


class ModelScope(Hub):
    def files(self, repo: str, revision: str | None) -> tuple[str, list[File]]:
        # Of the package modelscope, whose own HubApi imports torch and leaves the sums out.
        from modelscope_hub import HubApi, HubConfig

        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
        # No folder: in the home folder it would look for credentials, and keep a number that it sends with requests.
        nowhere = Path(os.devnull)
        config = HubConfig(endpoint=self.endpoint, token=self.token or "", config_dir=nowhere, cache_dir=nowhere)
        listed = HubApi(config).list_repo_files(repo, "model", revision=revision)
        found = [File(each.path, each.size, sha256=each.sha256) for each in listed if each.type != "tree"]
        # It names no commit: the sums say which files were meant.
        return revision or "master", found

    def url(self, repo: str, revision: str, path: str) -> str:
        return f"{self.endpoint}/api/v1/models/{repo}/repo?{urlencode({'Revision': revision, 'FilePath': path})}"


def hubs_of(environment: Environment, source: str) -> list[Hub]:
    """Those that a model may come from."""
    hubs: list[Hub] = [
        HuggingFace("huggingface", "Hugging Face", environment.hf_endpoint, environment.hf_token, "HF_TOKEN"),
        ModelScope(
            "modelscope",
            "ModelScope",
            environment.modelscope_endpoint,
            environment.modelscope_token,
            "MODELSCOPE_API_TOKEN",
        ),
    ]
    return [hub for hub in hubs if source in (hub.key, "auto")]


@dataclass(frozen=True)
class Listing:
    """The files of a repository that vLLM needs, at one revision of one hub."""

    hub: Hub
    repo: str
    revision: str
    files: tuple[File, ...]

    def url(self, file: File) -> str:
        return self.hub.url(self.repo, self.revision, file.path)


def listings(asked: Sequence[tuple[Hub, str | None]], repo: str) -> Iterator[Listing]:
    """`asked`: hubs, each with the revision to ask for. First the listing that comes first, then the next.

    Raises HubError, with what each hub said, where none has one.
    """
    answers: queue.SimpleQueue[Listing | BaseException] = queue.SimpleQueue()

    def ask(hub: Hub, revision: str | None) -> None:
        try:
            answers.put(_listing(hub, repo, revision))
        except BaseException as error:
            answers.put(error)

    for hub, revision in asked:
        threading.Thread(target=ask, args=(hub, revision), daemon=True).start()
    failures = []
    for _ in asked:
        answer = answers.get()
        if isinstance(answer, Listing):
            yield answer
        elif isinstance(answer, HubError):
            failures.append(str(answer))
        else:
            raise answer
    if len(failures) == len(asked):
        raise HubError("\n".join(failures))


def _listing(hub: Hub, repo: str, revision: str | None) -> Listing:
    for pause in (*LISTING_PAUSES, None):
        try:
            commit, files = hub.files(repo, revision)
            break
        # Each version of the two libraries has its own errors for what goes wrong on the way.
        except Exception as error:
            status = _status(error)
            if pause is None or (status is not None and not may_pass(status)):
                raise hub.refusal(status, repo, _first_line(error)) from None
            time.sleep(pause)
    if not re.fullmatch(r"[\w./-]{1,200}", commit):
        raise HubError(f"{repo}: {hub.name} ({hub.endpoint}) names no commit; name a mirror that does, in .env")
    refuse_unsafe(files, f"{hub.name} ({hub.endpoint}): {repo}")
    chosen = needed(files)
    if not chosen:
        said = f"{repo} on {hub.name} has no config.json with weights beside it that vLLM loads"
        raise HubError(f"{said} (safetensors, .bin, .pt, .pth); look at repo")
    return Listing(hub, repo, commit, tuple(chosen))


def may_pass(status: int) -> bool:
    """Whether the same request may be answered later."""
    return status in (408, 425, 429) or status >= 500


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _number(value: Any) -> Any:
    return -1 if value is None else value
