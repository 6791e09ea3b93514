"""The service's own metrics, for Prometheus: what waits, what was read, what was not and why, and for how long."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from vllm_unified.documents.jobs import FAULT, Load
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import FULL_DISK
from vllm_unified.documents.reading import EMPTY, FAILED, LOOPED, NOISE, REFUSED, TRUNCATED, TURNED
from vllm_unified.documents.store import FINISHED, State, Store

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
disable_created_metrics()  # a series more for each one, which nobody asks for
# Seconds. A small model on a good card reads a page in half a second; one that is read again and again takes minutes.
PAGE_BOUNDS = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)

Reason = Literal[
    "service",
    "disk",
    "repetition",
    "truncated",
    "not_upright",
    "noise",
    "refusal",
    "empty",
    "malformed",
    "engine",
    "file",
]
# What a page's reason has in it, the first that is found.
REASONS: Mapping[str, Reason] = {
    FAULT: "service",
    FAILED: "service",
    FULL_DISK: "disk",
    LOOPED.words: "repetition",
    TRUNCATED.words: "truncated",
    TURNED.words: "not_upright",
    NOISE.words: "noise",
    REFUSED.words: "refusal",
    EMPTY.words: "empty",
}


class Metrics:
    """`note` takes each page that was dealt with, `text` tells it together with how things stand."""

    def __init__(self, store: Store, folder: Path) -> None:
        """`folder`: where the documents are kept."""
        self._store = store
        self._folder = folder
        self._exposed = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        prefix = "vllm_unified_documents"
        self._done = Counter(f"{prefix}_pages_done", "Pages that were read", registry=registry)
        self._failed = Counter(f"{prefix}_pages_failed", "Pages that were not, by why", ["reason"], registry=registry)
        self._retries = Counter(f"{prefix}_page_retries", "Questions beyond a page's first", registry=registry)
        self._seconds = Histogram(
            f"{prefix}_page_seconds",
            "Of the model, for a page with all its retries",
            buckets=PAGE_BOUNDS,
            registry=registry,
        )
        for reason in get_args(Reason):  # Prometheus takes no notice of a step from nothing to 1
            self._failed.labels(reason)
        finished = "Documents that have ended, by how"
        self._finished = Counter(f"{prefix}_finished", finished, ["state"], registry=registry)
        for state in FINISHED:
            self._finished.labels(state)
        self._states = Gauge(f"{prefix}", "Documents that are kept, by state", ["state"], registry=registry)
        self._documents = Gauge(f"{prefix}_unfinished", "Documents that have not finished", registry=registry)
        self._pages = Gauge(f"{prefix}_pages_waiting", "Pages that were not dealt with", registry=registry)
        self._oldest = Gauge(
            f"{prefix}_oldest_waiting_seconds",
            "Of the document that waits longest for its first page",
            registry=registry,
        )
        self._in_flight = Gauge(f"{prefix}_pages_in_flight", "Pages that are read now", registry=registry)
        self._limit = Gauge(f"{prefix}_pages_in_flight_limit", "Pages that may be read at a time", registry=registry)
        self._bytes = Gauge(f"{prefix}_bytes", "Uploads and products on the disk", registry=registry)
        self._free = Gauge(f"{prefix}_disk_free_bytes", "Left on the disk that they are on", registry=registry)

    def note(self, page: Page) -> None:
        self._retries.inc(max(0, page.attempts - 1))
        if page.seconds:
            self._seconds.observe(page.seconds)
        if page.reason:
            self._failed.labels(reason_of(page)).inc()
        else:
            self._done.inc()

    def note_end(self, state: State) -> None:
        self._finished.labels(state).inc()

    def text(self, load: Load, limit: int) -> bytes:
        """Of the type CONTENT_TYPE. Reads the disk. `limit`: of pages in flight."""
        for state, count in self._store.counts().items():
            self._states.labels(state).set(count)
        self._documents.set(load.documents)
        self._pages.set(load.pages)
        oldest = self._store.oldest_queued()
        self._oldest.set(0 if oldest is None else max(0.0, time.time() - oldest))
        self._in_flight.set(load.in_flight)
        self._limit.set(limit)
        self._bytes.set(self._store.size())
        self._free.set(shutil.disk_usage(self._folder).free)
        return generate_latest(self._exposed)


def reason_of(page: Page) -> Reason:
    """One of a few words for why it was not read."""
    found = next((reason for words, reason in REASONS.items() if words in page.reason), None)
    return found or ("malformed" if page.raw_text else "engine" if page.width else "file")
