"""The bytes of a listing's files: resumed, several at a time, and nothing in its place before its sums are right.

huggingface_hub's snapshot_download is not used: it fetches from one hub alone, checks no sums, and neither a stall nor
a damaged file is told apart from a slow one.
"""

import email.utils
import io
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from vllm_unified import __version__
from vllm_unified.hub.folders import of_disk, part_of
from vllm_unified.hub.hubs import HubError, Listing, may_pass
from vllm_unified.hub.manifest import File
from vllm_unified.hub.parallel import Stopped, in_parallel
from vllm_unified.hub.sums import Progress, Sums, write

FILES_AT_A_TIME = 8
CONNECT_SECONDS = 10.0
# In a row, without a byte between them.
TRIES = 6
LONGEST_PAUSE = 30.0
LONGEST_ASKED_PAUSE = 300.0
# Less than this in as long as a silence may last is a stall too.
SLOWEST = 1024


class _Interrupted(Exception):
    """The connection ended, or might as well have; what came is kept. `pause`: seconds that the hub asks for."""

    def __init__(self, reason: str, status: int | None = None, pause: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.pause = pause


class _Astray(Exception):
    """A redirect that is not followed."""


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
        largest_first = sorted(files, key=lambda each: -each.file.size)
        with self._client() as client:

            def fetch(progress: Progress, stop: threading.Event) -> File:
                return _Transfer(self, client, progress, stop).run()

            return [file for _, file in in_parallel(fetch, largest_first, FILES_AT_A_TIME, tick)]

    def _client(self) -> httpx.Client:
        # Only to the hub itself: httpx leaves Authorization out where a redirect leads to another host.
        token = self.listing.hub.token
        headers = {"User-Agent": f"vllm-unified/{__version__}", "Accept-Encoding": "identity"}
        return httpx.Client(
            headers={**headers, **({"Authorization": f"Bearer {token}"} if token else {})},
            timeout=httpx.Timeout(self.stall, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=FILES_AT_A_TIME),
            follow_redirects=True,
            max_redirects=5,
            event_hooks={"response": [_refuse_astray]},
        )


class _Transfer:
    """One file. Its `.part` holds what has come, and `sums` are of that."""

    def __init__(self, fetcher: Fetcher, client: httpx.Client, progress: Progress, stop: threading.Event) -> None:
        self.fetcher = fetcher
        self.client = client
        self.progress = progress
        self.stop = stop
        self.file = progress.file
        self.place = fetcher.folder / self.file.path
        self.part = part_of(self.place)
        self.sums = Sums(self.file)
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
            self._begin_anew(part)
        try:
            return self._whole(part)
        except _WrongBytes as error:
            self._begin_anew(part)
            self.part.unlink()
            raise HubError(
                f"{self.what}: {self.fetcher.listing.hub.name} sends {error}; nothing of it was kept. "
                "Try again later, or name the other hub in `source`"
            ) from None

    def _whole(self, part: io.FileIO) -> File:
        self._take_up(part)
        failures = 0
        while self.progress.done < self.file.size:
            before = self.progress.done
            try:
                self._receive(part)
            except _Interrupted as interruption:
                failures = 1 if self.progress.done > before else failures + 1
                if failures >= TRIES:
                    hub = self.fetcher.listing.hub
                    raise hub.refusal(interruption.status, self.what, str(interruption)) from None
                self._pause(failures, interruption.pause)
        fetched = self.sums.of(self.file)
        if not fetched.is_same(self.file):
            raise _WrongBytes("other bytes than it lists (the checksum differs)")
        return fetched

    def _take_up(self, part: io.FileIO) -> None:
        if os.fstat(part.fileno()).st_size > self.file.size:
            self._begin_anew(part)
        while block := part.read(1 << 20):
            self._count(block)

    def _begin_anew(self, part: io.FileIO) -> None:
        part.seek(0)
        part.truncate()
        self.sums = Sums(self.file)
        self.progress.done = 0

    def _receive(self, part: io.FileIO) -> None:
        """Until the file is whole. Raises _Interrupted, _WrongBytes, HubError, and Stopped."""
        start = self.progress.done
        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            with self.client.stream("GET", self.fetcher.listing.url(self.file), headers=headers) as answer:
                self._check(answer, start)
                if answer.status_code == 200 and start:  # it has no ranges
                    self._begin_anew(part)
                self._take(answer, part)
        except (_Astray, httpx.TooManyRedirects, httpx.InvalidURL) as error:
            raise HubError(f"{self.what}: {self.fetcher.listing.hub.name} leads astray: {error}") from None
        except httpx.TransportError as error:
            raise _Interrupted(str(error) or type(error).__name__) from None
        if self.progress.done < self.file.size:
            raise _Interrupted(f"ended after {self.progress.done} of {self.file.size} bytes")

    def _check(self, answer: httpx.Response, start: int) -> None:
        status = answer.status_code
        if status == 416:
            raise _WrongBytes(f"no more than {start} bytes, and lists {self.file.size}")
        if may_pass(status):
            raise _Interrupted(f"status {status}", status, _retry_after(answer))
        if status not in (200, 206) or (status == 206 and not start):
            raise self.fetcher.listing.hub.refusal(status, self.what, "")
        offset = start if status == 206 else 0
        if status == 206 and not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
            raise _Interrupted("another range than was asked for")
        length = answer.headers.get("content-length", "")
        if length.isdecimal() and offset + int(length) != self.file.size:
            raise _WrongBytes(f"{offset + int(length)} bytes, and lists {self.file.size}")

    def _take(self, answer: httpx.Response, part: io.FileIO) -> None:
        window, counted = time.monotonic(), self.progress.done
        for block in answer.iter_raw():
            if self.stop.is_set():
                raise Stopped
            if self.progress.done + len(block) > self.file.size:
                raise _WrongBytes(f"more than the {self.file.size} bytes that it lists")
            write(part, block)
            self._count(block)
            now = time.monotonic()
            if now - window > self.fetcher.stall:
                if self.progress.done - counted < SLOWEST:
                    raise _Interrupted(f"fewer than {SLOWEST} bytes in {self.fetcher.stall:g} s")
                window, counted = now, self.progress.done

    def _count(self, block: bytes) -> None:
        self.sums.update(block)
        self.progress.done += len(block)

    def _pause(self, failures: int, asked: float | None) -> None:
        # Spread, so that eight files do not come back at one moment.
        own = min(LONGEST_PAUSE, 2.0 ** (failures - 2)) * random.uniform(0.75, 1.25)  # noqa: S311
        if self.stop.wait(own if asked is None else min(asked, LONGEST_ASKED_PAUSE)):
            raise Stopped


def _refuse_astray(answer: httpx.Response) -> None:
    """Only http and https, and from https to https alone."""
    url = answer.request.url
    if answer.has_redirect_location:
        following = url.join(answer.headers["location"]).scheme
        if following not in ("https", url.scheme):
            raise _Astray(f"from {url.scheme} to {following}")


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds, or a date."""
    value = answer.headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
