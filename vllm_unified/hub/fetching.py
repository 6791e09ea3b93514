"""The bytes of a listing's files: resumed, several at a time, and nothing in its place before its sums are right.

huggingface_hub's snapshot_download is not used: it fetches from one hub alone and compares no checksums. Nor is httpx:
it takes three times the processor time for a gigabyte that http.client does, which a fast network feels.
"""

import contextlib
import email.message
import email.utils
import http.client
import io
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx

from vllm_unified import __version__
from vllm_unified.hub.folders import of_disk, part_of
from vllm_unified.hub.hubs import Hub, HubError, Listing, may_pass
from vllm_unified.hub.manifest import File
from vllm_unified.hub.parallel import Stopped, in_parallel
from vllm_unified.hub.sums import BLOCK, Progress, Sums, write

FILES_AT_A_TIME = 8
# In a row, without a byte between them.
TRIES = 6
LONGEST_PAUSE = 30.0
LONGEST_ASKED_PAUSE = 300.0
# Less than this in as long as a silence may last is a stall too.
SLOWEST = 1024
RECEIVED_AT_ONCE = 1 << 18
SECONDS_BETWEEN_LOOKS = 0.02


class _Interrupted(Exception):
    """The connection ended, or might as well have; what came is kept. `pause`: seconds that the hub asks for."""

    def __init__(self, reason: str, status: int | None = None, pause: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.pause = pause


class _WrongBytes(Exception):
    """All has come, and it is not the file."""


@dataclass(frozen=True)
class Fetcher:
    """`stall`: seconds without a byte after which a connection is given up."""

    listing: Listing
    folder: Path
    stall: float

    def all(self, files: Sequence[Progress], tick: Callable[[], None]) -> list[File]:
        """The files as they now stand in the folder. Raises HubError, and UserError where the disk is full."""
        # The certificates that the rest of us trusts; proxies are taken from the environment.
        https = urllib.request.HTTPSHandler(context=httpx.create_ssl_context())
        opener = urllib.request.build_opener(https, _Redirects(self.listing.hub))
        largest_first = sorted(files, key=lambda each: -each.file.size)

        def fetch(progress: Progress, stop: threading.Event) -> File:
            return _Transfer(self, opener, progress, stop).run()

        return [file for _, file in in_parallel(fetch, largest_first, FILES_AT_A_TIME, tick)]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http and https, from https to https alone; the token goes on to the hub's own address and no other."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("https", req.type):
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following:
            _authorize(following, self.hub)
        return following


def _authorize(request: urllib.request.Request, hub: Hub) -> None:
    ours = urlsplit(hub.endpoint)
    if hub.token and (request.type, request.host) == (ours.scheme, ours.netloc):
        request.add_unredirected_header("Authorization", f"Bearer {hub.token}")


class _Transfer:
    """One file. Its `.part` holds what has come."""

    def __init__(
        self, fetcher: Fetcher, opener: urllib.request.OpenerDirector, progress: Progress, stop: threading.Event
    ) -> None:
        self.hub = fetcher.listing.hub
        self.url = fetcher.listing.url(progress.file)
        self.stall = fetcher.stall
        self.opener = opener
        self.progress = progress
        self.stop = stop
        self.file = progress.file
        self.place = fetcher.folder / self.file.path
        self.part = part_of(self.place)
        self.what = f"{fetcher.listing.repo}: {self.file.path}"

    def run(self) -> File:
        self.progress.started = True
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(self.part, flags, 0o644), "r+b", buffering=0) as part:
                fetched = self._fetched(part)
        except OSError as error:
            raise of_disk(error, self.part) from None
        os.replace(self.part, self.place)
        return fetched

    def _fetched(self, part: io.FileIO) -> File:
        try:
            return self._whole(part)
        except _WrongBytes:
            # What an earlier run left may be of another file: once more, from its beginning.
            part.truncate(0)
        try:
            return self._whole(part)
        except _WrongBytes as error:
            self.part.unlink()
            raise HubError(
                f"{self.what}: {self.hub.name} sends {error}; nothing of it was kept. "
                "Try again later, or name the other hub in `source`"
            ) from None

    def _whole(self, part: io.FileIO) -> File:
        self.progress.done = part.seek(0, os.SEEK_END)
        if self.progress.done > self.file.size:
            raise _WrongBytes("other bytes than it lists")
        failures = 0
        with _Follower(part, self.file) as follower:
            while self.progress.done < self.file.size:
                before = self.progress.done
                try:
                    self._receive(part)
                except _Interrupted as interruption:
                    failures = 1 if self.progress.done > before else failures + 1
                    if failures >= TRIES:
                        raise self.hub.refusal(interruption.status, self.what, str(interruption)) from None
                    self._pause(failures, interruption.pause)
            fetched = follower.whole()
        if not fetched.is_same(self.file):
            raise _WrongBytes("other bytes than it lists (the checksum differs)")
        return fetched

    def _receive(self, part: io.FileIO) -> None:
        """Until the file is whole. Raises _Interrupted, _WrongBytes, HubError, and Stopped."""
        start = self.progress.done
        with contextlib.closing(self._answer(start)) as answer:
            # From a server without ranges all of it comes once more.
            passed_over = start if answer.status == 200 else 0
            self._check_length(answer, start - passed_over)
            window, counted = time.monotonic(), self.progress.done
            for received in self._blocks(answer):
                block = received[min(passed_over, len(received)) :]
                passed_over -= len(received) - len(block)
                if self.progress.done + len(block) > self.file.size:
                    raise _WrongBytes(f"more than the {self.file.size} bytes that it lists")
                write(part, block)
                self.progress.done += len(block)
                now = time.monotonic()
                if now - window > self.stall:
                    if self.progress.done - counted < SLOWEST and not passed_over:
                        raise _Interrupted(f"fewer than {SLOWEST} bytes in {self.stall:g} s")
                    window, counted = now, self.progress.done
        if self.progress.done < self.file.size:
            raise _Interrupted(f"ended after {self.progress.done} of {self.file.size} bytes")

    def _answer(self, start: int) -> http.client.HTTPResponse:
        headers = {"User-Agent": f"vllm-unified/{__version__}", **({"Range": f"bytes={start}-"} if start else {})}
        request = urllib.request.Request(self.url, headers=headers)  # noqa: S310
        _authorize(request, self.hub)
        try:
            answer: http.client.HTTPResponse = self.opener.open(request, timeout=self.stall)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error.code, error.headers, start) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(_words(error)) from None
        begins = answer.headers.get("content-range", "").startswith(f"bytes {start}-")
        if answer.status != 200 and not (answer.status == 206 and start and begins):
            answer.close()
            raise _Interrupted("another part of the file than was asked for")
        return answer

    def _refusal(self, status: int, headers: email.message.Message, start: int) -> Exception:
        if status == 416:
            return _WrongBytes(f"no more than {start} bytes, and lists {self.file.size}")
        if may_pass(status):
            return _Interrupted(f"status {status}", status, _retry_after(headers))
        if 300 <= status < 400:
            return HubError(f"{self.what}: {self.hub.name} leads astray, by a redirect that is not followed")
        return self.hub.refusal(status, self.what, "")

    def _check_length(self, answer: http.client.HTTPResponse, offset: int) -> None:
        if answer.length is not None and offset + answer.length != self.file.size:
            raise _WrongBytes(f"{offset + answer.length} bytes, and lists {self.file.size}")

    def _blocks(self, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        while True:
            if self.stop.is_set():
                raise Stopped
            try:
                block = answer.read1(RECEIVED_AT_ONCE)
            except (OSError, http.client.HTTPException) as error:
                raise _Interrupted(_words(error)) from None
            if not block:
                return
            yield block

    def _pause(self, failures: int, asked: float | None) -> None:
        # Spread, so that eight files do not come back at one moment.
        own = min(LONGEST_PAUSE, 2.0 ** (failures - 2)) * random.uniform(0.75, 1.25)  # noqa: S311
        if self.stop.wait(own if asked is None else min(asked, LONGEST_ASKED_PAUSE)):
            raise Stopped


class _Follower:
    """Sums up a file while it grows, in a thread of its own: on another core than the one that receives it."""

    def __init__(self, part: io.FileIO, file: File) -> None:
        # Its own, which is open until the thread ends.
        self._descriptor = os.dup(part.fileno())
        self._file = file
        self._sums = Sums(file)
        self._given_up = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up.set()

    def whole(self) -> File:
        """Once all is written. Raises OSError where it can't be read."""
        self._thread.join()
        if self._error:
            raise self._error
        return self._sums.of(self._file)

    def _run(self) -> None:
        done = 0
        try:
            while done < self._file.size and not self._given_up.is_set():
                if block := os.pread(self._descriptor, BLOCK, done):
                    self._sums.update(block)
                    done += len(block)
                else:
                    self._given_up.wait(SECONDS_BETWEEN_LOOKS)
        except OSError as error:
            self._error = error
        finally:
            os.close(self._descriptor)


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(error).__name__


def _retry_after(headers: email.message.Message) -> float | None:
    """Seconds, or a date."""
    value = headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
