"""What is done with a document, from its upload to its products: the jobs' `Work`, and what the paths ask for."""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vllm_unified.documents import joining, products, profiles
from vllm_unified.documents.engine import Engine
from vllm_unified.documents.fetching import AddressRule
from vllm_unified.documents.figures import placed
from vllm_unified.documents.jobs import Jobs, Room, Status
from vllm_unified.documents.options import Options, pages_of
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.reading import read_page
from vllm_unified.documents.rendering import Inspected, Renderer
from vllm_unified.documents.store import Document, Store, Upload
from vllm_unified.documents.uploads import Received
from vllm_unified.settings import Settings

RETENTION_SECONDS = 60.0
# Answers that a client waits for end with the job, however long that takes; proxies in between may be less patient.
A_DAY = 86_400.0
LAYOUT_SIDE = 1200  # pixels
PAGES_AT_ONCE = 100  # of a result, read from the store

log = logging.getLogger(__name__)
Task = Document


@dataclass(frozen=True)
class Wishes:
    """What a client wants beside the reading: the same document not twice, and to be told of the end."""

    idempotency_key: str = ""
    webhook_url: str = ""
    webhook_secret: str = ""

    def of(self, number: int) -> "Wishes":
        """Those of one of several files of a request."""
        return replace(self, idempotency_key=f"{self.idempotency_key}#{number}") if self.idempotency_key else self


class Service:
    """One for the process. Between `start` and `stop` it works on what it has."""

    def __init__(self, settings: Settings) -> None:
        """Raises UserError when its folder or its database can't be used."""
        self.settings = settings
        self.folder = settings.home / "data" / "documents"
        self.incoming = self.folder / "incoming"
        self.incoming.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.store = Store(self.folder / "documents.db")
        self.engine = Engine(settings.router_url, settings.require_api_key())
        self.renderer = Renderer(max_pages=settings.documents.max_pages)
        room = Room(pages=settings.documents.max_waiting_pages, pages_per_key=settings.documents.max_waiting_pages)
        self.jobs = Jobs(self.store, self, self._limit, room=room)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def defaults(self) -> Options:
        """What holds where a client says nothing."""
        given = self.settings.documents
        return Options(dpi=given.dpi, retries=given.retries, join_pages=given.join_pages)
