"""What is done with a document, from its upload to its products: the jobs' `Work`, and what the paths ask for."""

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from vllm_unified.documents import figures, guard, joining, merging, products, profiles, uploads, webhooks
from vllm_unified.documents.answers import Rotation
from vllm_unified.documents.engine import Engine, EngineError, InFlight, OcrModel
from vllm_unified.documents.fetching import AddressRule, fetch
from vllm_unified.documents.grounding import grounded
from vllm_unified.documents.jobs import Jobs, Room, Status
from vllm_unified.documents.joining import Joint
from vllm_unified.documents.kinds import HEAD_BYTES, Kind, require_kind
from vllm_unified.documents.metrics import Metrics
from vllm_unified.documents.options import Options, pages_of
from vllm_unified.documents.page import Page
from vllm_unified.documents.problems import DocumentError, on_disk
from vllm_unified.documents.reading import read_page, request_of
from vllm_unified.documents.rendering import Rendered, Renderer
from vllm_unified.documents.store import Document, State, Store, Webhook
from vllm_unified.documents.store import Upload as Accepted
from vllm_unified.documents.uploads import Upload
from vllm_unified.settings import Settings
from vllm_unified.tracing import CURRENT, current, tracer_of

if TYPE_CHECKING:
    from vllm_unified.documents.spans import Spans

DAY_SECONDS = 86_400.0
RETENTION_SECONDS = 60.0
LOOK_SECONDS = 1.0
FETCH_SECONDS = 300.0
FETCHES = 4
LAYOUT_SIDE = 1200  # pixels
PAGES_AT_ONCE = 100  # of a result, read from the store
# Answers that a client waits for end with the job, however long that takes; proxies in between may be less patient.
LONGEST_JOB = 7 * DAY_SECONDS
INPUT = "input"
DRAWN = "page.part"  # of a page's image, while the products are written
RETRY = "POST /api/tasks/{}/retry: what was read stays read"

P = TypeVar("P")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wishes:
    """What a client wants beside the reading: the same document not twice, and to be told of the end."""

    idempotency_key: str = ""
    webhook_url: str = ""
    webhook_secret: str = ""

    def of(self, number: int) -> "Wishes":
        """Those of one of several files of a request: of the first they are the request's own."""
        keyed = self.idempotency_key and number
        return replace(self, idempotency_key=f"{self.idempotency_key}#{number}") if keyed else self


class Service:
    """One for the process. Between `start` and `stop` it works on what it has."""

    def __init__(self, settings: Settings) -> None:
        """Raises UserError when its database can't be used, or a variable of OpenTelemetry."""
        self.settings = settings
        given = settings.documents
        self.folder = settings.home / "data" / "documents"
        self.incoming = self.folder / "incoming"
        self.incoming.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.store = Store(self.folder / "documents.db")
        self.engine = Engine(settings.router_url, settings.require_api_key())
        self.renderer = Renderer(max(2, (os.cpu_count() or 2) // 2), max_pages=given.max_pages)
        room = Room(pages=given.max_waiting_pages, pages_per_key=given.max_waiting_pages)
        self.metrics = Metrics(self.store, self.folder)
        self.spans = _spans(settings)
        self.jobs = Jobs(
            self.store, self, self.pages_in_flight, room=room, note=self.metrics.note, ended=self._note_end
        )
        self.allowed = AddressRule(tuple(given.allowed_networks), tuple(given.allowed_hosts))
        # What holds where a client says nothing.
        self.defaults = Options(dpi=given.dpi, retries=given.retries, join_pages=given.join_pages)
        self.max_upload_bytes = given.max_upload_mib << 20
        self.guard = guard.UNTESTED
        self._guarded = ""  # the model that it was tested with
        self.counts: dict[State, int] = {}  # documents in each state, as of LOOK_SECONDS ago
        self._in_flight = InFlight()
        self._reading = 0
        self._fetches = asyncio.Semaphore(FETCHES)
        self.decoding = asyncio.Lock()  # of what is large in memory meanwhile
        self._beside: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await asyncio.to_thread(self._sweep)
        await self.jobs.start()
        works = (self._watch_engine, self._watch_guard, self._count, self._expire, self._tell_ends)
        self._beside = [asyncio.create_task(_for_ever(work)) for work in works]

    async def stop(self) -> None:
        for task in self._beside:
            task.cancel()
        await asyncio.gather(*self._beside, return_exceptions=True)
        await self.jobs.stop()
        await self.renderer.__aexit__(None, None, None)
        await self.engine.aclose()
        self.store.close()
        if self.spans is not None:
            await asyncio.to_thread(self.spans.close)

    # What the paths ask for

    async def submit(
        self, upload: Upload, key: str, options: Options, kind: Literal["image", "pdf"], wishes: Wishes
    ) -> Document:
        """Accept a file, which belongs to its task from then on.

        Raises DocumentError for what can't be read or is not allowed, 429 when too much waits, 507 on a full disk.
        """
        document, _ = await self._submit(upload, key, options, kind, wishes)
        return document

    async def submit_all(self, uploads: Sequence[Upload], key: str, options: Options, wishes: Wishes) -> list[Document]:
        """A task for each of several files, or none. Raises DocumentError."""
        tasks: list[Document] = []
        added: list[str] = []
        try:
            for number, upload in enumerate(uploads):
                task, is_new = await self._submit(upload, key, options, "pdf", wishes.of(number))
                tasks.append(task)
                added += [task.id] if is_new else []  # the others were accepted by an earlier request
        except DocumentError:
            for upload in uploads:
                upload.path.unlink(missing_ok=True)
            for task_id in added:
                await self.delete(task_id)
            raise
        return tasks

    async def _submit(
        self, upload: Upload, key: str, options: Options, kind: Literal["image", "pdf"], wishes: Wishes
    ) -> tuple[Document, bool]:
        """False: the same was sent before."""
        try:
            self.jobs.check_room(key)
            _refuse_zip(upload)
            model = await self.model()
            profiles.check(options, model.profile(options))
            inspected = await self.renderer.inspect(upload.path, upload.kind, options.password)
            pages_of(options, inspected.pages)
            if wishes.webhook_url:
                await webhooks.check(wishes.webhook_url, wishes.webhook_secret, allowed=self.allowed)
            accepted = Accepted(
                id=str(uuid.uuid4()),
                name=upload.name,
                kind=kind,
                key=key,
                options=options,
                size=upload.size,
                idempotency_key=wishes.idempotency_key,
                request_sha256=_digest(upload, options, wishes),
                webhook_url=wishes.webhook_url,
                webhook_secret=wishes.webhook_secret,
                traceparent=current(),
            )
            folder = self.folder_of(accepted.id)
            try:
                with on_disk():
                    await asyncio.to_thread(_move_in, upload.path, folder)
                document = await self.jobs.accept(accepted)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            is_new = document.id == accepted.id
            if not is_new:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            return document, is_new
        finally:
            upload.path.unlink(missing_ok=True)

    async def wait(self, document: str) -> Status:
        """For its end."""
        return await self.jobs.wait(document, LONGEST_JOB)

    async def pages(self, document: str) -> list[Page]:
        """Those that were dealt with."""
        return await asyncio.to_thread(lambda: list(self._pages(document)))

    async def fetched(self, url: str) -> Upload:
        """A file that stands at a client's URL. Raises DocumentError."""
        with on_disk():
            folder = Path(tempfile.mkdtemp(dir=self.incoming))
        try:
            with on_disk():
                async with self._fetches:
                    found = await fetch(
                        url, folder, max_bytes=self.max_upload_bytes, seconds=FETCH_SECONDS, allowed=self.allowed
                    )
            name = uploads.safe_name(found.name)
            kind = await asyncio.to_thread(_kind, found.path, name)
            path = self.incoming / f"upload-{uuid.uuid4().hex}"
            found.path.rename(path)
            return Upload("url", name, path, found.size, found.sha256, kind)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def from_base64(self, text: str, name: str) -> Upload:
        """Raises DocumentError."""
        return await asyncio.to_thread(
            uploads.save_base64, text, self.incoming, max_bytes=self.max_upload_bytes, name=name
        )

    async def ask_once(self, image: bytes, options: Options, key: str) -> str:
        """The model's answer to the letter, to one question that is not kept. Raises DocumentError."""
        model = await self.model()
        profile = model.profile(options)
        request = request_of(
            profiles.prompt_of(options, profile),
            image,
            "image/png",
            profiles.sampling(options, profile, temperature=0.0, stronger=False, max_model_len=model.max_model_len),
            image_first=profile.image_first,
            system=profile.system,
        )
        try:
            return (await self.engine.ask(model.name, request, key)).text
        except EngineError as error:
            raise DocumentError(502, str(error), code="engine_error") from None

    async def delete(self, document: str) -> None:
        await self.jobs.delete(document)
        await asyncio.to_thread(_remove, self.folder_of(document), self.incoming)

    async def model(self) -> OcrModel:
        """The model that documents are read with. Raises DocumentError 503."""
        found = await self.engine.find()
        if found is None:
            message = "no model of the type ocr is served; name one in config/models.json, then ./deploy.sh reload"
            raise DocumentError(503, message, code="no_ocr_model", headers={"retry-after": "30"})
        return found

    def folder_of(self, document: str) -> Path:
        return self.folder / document

    def products(self, document: str) -> list[str]:
        return products.existing(self.folder_of(document))

    # The jobs' work

    async def inspect(self, document: Document) -> Sequence[int]:
        path = self._input(document.id)
        inspected = await self.renderer.inspect(path, _kind(path, document.name), document.options.password)
        return pages_of(document.options, inspected.pages)

    async def read(self, document: Document, number: int) -> Page:
        if self.spans is None:
            return await self._read(document, number)
        return await self.spans.page(document, number, self._read)

    async def _read(self, document: Document, number: int) -> Page:
        model = await self.model()
        options, profile = document.options, model.profile(document.options)
        path = self._input(document.id)
        kind = _kind(path, document.name)

        async def rendered(rotation: Rotation = 0) -> Rendered:
            return await self.renderer.render(
                path,
                kind,
                number,
                dpi=options.dpi,
                longest_side=profiles.longest_side(options, profile),
                password=options.password,
                rotation=rotation,
            )

        image = await rendered()
        self._reading += 1
        try:
            page = await read_page(
                lambda request: self.engine.ask(model.name, request, document.key),
                image.image,
                image.media_type,
                image.width,
                image.height,
                number,
                options,
                profile,
                understand=grounded,
                text_layer=image.text,
                rotate=lambda rotation: _image_of(rendered(rotation)),
                blank=image.blank,
                max_model_len=model.max_model_len,
            )
        finally:
            self._reading -= 1
        page = msgspec.structs.replace(page, resolution_used=profiles.resolution_used(options, profile))
        if not options.extract_images:
            return page
        upright = await rendered(page.rotation) if page.rotation else image
        return await self._with_figures(document, page, upright)

    async def seams(self, document: Document) -> Sequence[int]:
        options = document.options
        model = await self.engine.find()
        if model is None or model.profile(options).merge is None:  # none is waited for: rules do it too
            return ()
        is_asked = options.join_pages and options.mode == "markdown"
        return await asyncio.to_thread(self.store.seams, document.id) if is_asked else ()

    async def join(self, document: Document, number: int) -> Sequence[Joint] | None:
        model = await self.model()
        if self.spans is not None:
            CURRENT.set(self.spans.of(document))
        first, second = await asyncio.to_thread(self.store.results, document.id, number - 1, 2)
        self._reading += 1
        try:
            return await merging.joints(
                lambda request: self.engine.ask(model.name, request, document.key),
                first,
                second,
                document.options,
                model.profile(document.options),
                max_model_len=model.max_model_len,
            )
        except EngineError as error:
            raise DocumentError(502, str(error), code="engine_error") from None
        finally:
            self._reading -= 1

    async def finish(self, document: Document) -> int:
        loop = asyncio.get_running_loop()
        given_up = threading.Event()
        with on_disk(RETRY.format(document.id)):
            writing = loop.run_in_executor(None, self._write_products, document, loop, given_up)
            try:
                return await asyncio.shield(writing)
            except asyncio.CancelledError:
                given_up.set()
                await asyncio.gather(writing, return_exceptions=True)  # a retry writes the same files
                raise

    async def _with_figures(self, document: Document, page: Page, image: Rendered) -> Page:
        """On a full disk the page has failed: its text stays, and a retry reads it again."""
        named = figures.named(page)
        wanted = figures.boxes_of(named)
        if wanted:
            cut = await self.renderer.crop(image.image, tuple(wanted.values()))
            files = dict(zip(wanted, cut, strict=True))
            try:
                with on_disk(RETRY.format(document.id)):
                    await asyncio.to_thread(_write_figures, self.folder_of(document.id), files)
            except DocumentError as error:
                return msgspec.structs.replace(page, reason=str(error))
        return named

    def _write_products(self, document: Document, loop: asyncio.AbstractEventLoop, given_up: threading.Event) -> int:
        """In a thread; the pages' images for layout.pdf are drawn again by the renderer of `loop`."""

        def pages() -> Iterator[Page]:
            for page in self._pages(document.id):
                if given_up.is_set():
                    raise _GivenUpError
                yield page

        folder = self.folder_of(document.id)
        path = self._input(document.id)
        kind = _kind(path, document.name)
        options = document.options

        rotations = {page.number: page.rotation for page in pages() if page.rotation}
        drawn = folder / DRAWN

        def image_of(number: int) -> Path | None:
            drawing = self.renderer.render(
                path,
                kind,
                number,
                dpi=options.dpi,
                longest_side=LAYOUT_SIDE,
                password=options.password,
                rotation=rotations.get(number, 0),
            )
            try:
                drawn.write_bytes(asyncio.run_coroutine_threadsafe(drawing, loop).result().image)
            except DocumentError:  # its reason stands with the page
                return None
            return drawn

        try:
            products.write_products(
                folder,
                name=document.name,
                pages=pages,
                joined=lambda: self._joined(document, pages),
                formats=options.formats,
                image_of=image_of,
            )
        finally:
            drawn.unlink(missing_ok=True)
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    def _joined(self, document: Document, pages: Callable[[], Iterator[Page]]) -> Iterator[str]:
        """The Markdown of the whole, a comment before each page that something begins on."""
        repeated = joining.repeated_lines(pages())
        parts = joining.joined(
            pages(),
            running_heads=document.options.running_heads,
            join_pages=document.options.join_pages,
            repeated=repeated,
            joints=lambda number: self.store.joints(document.id, number),
            warn=lambda message: log.warning("document %s: %s", document.id, message),
        )
        number = 0
        for part in parts:
            if part.page != number:
                number = part.page
                yield joining.page_break(number)
            yield figures.link(part.block) or part.block.text

    # What goes on beside the jobs

    async def _watch_engine(self) -> None:
        """How many pages keep the engine busy."""
        model = await self.engine.find()
        if model is not None and self._reading:
            queue = await self.engine.queue(model.name)
            if queue is not None:
                self._in_flight.observe(queue, self._reading, time.monotonic())
        await asyncio.sleep(LOOK_SECONDS)

    async def _count(self) -> None:
        self.counts = await asyncio.to_thread(self.store.counts)
        await asyncio.sleep(LOOK_SECONDS)

    async def _watch_guard(self) -> None:
        """Tested once for each start of the engine."""
        model = await self.engine.find()
        if model is None or not model.ready:
            self.guard, self._guarded = guard.UNTESTED, ""
        elif model.name != self._guarded and await self._is_idle(model):
            await self._test_guard(model)
        await asyncio.sleep(LOOK_SECONDS)

    async def _test_guard(self, model: OcrModel) -> None:
        profile = model.profile(self.defaults)
        self.guard = await guard.tested(lambda request: self.engine.ask(model.name, request), profile, self.defaults)
        self._guarded = model.name
        level = logging.INFO if self.guard.works else logging.WARNING
        log.log(level, "guard against repetition, %s: %s", model.name, self.guard.message)

    async def _is_idle(self, model: OcrModel) -> bool:
        if self._reading:
            return False
        queue = await self.engine.queue(model.name)
        return queue is None or not (queue.running or queue.waiting)

    async def _expire(self) -> None:
        given = self.settings.documents
        before = time.time() - given.keep_days * DAY_SECONDS
        for document in await asyncio.to_thread(self.store.expired, before, int(given.keep_gib * (1 << 30))):
            with contextlib.suppress(DocumentError):  # somebody else was faster
                await self.delete(document)
                log.info("document %s: kept for its time, deleted", document)
        await asyncio.sleep(RETENTION_SECONDS)

    async def _tell_ends(self) -> None:
        for due in await asyncio.to_thread(self.store.webhooks_due, time.time()):
            await self._tell(due)
        await asyncio.sleep(LOOK_SECONDS)

    async def _tell(self, due: Webhook) -> None:
        document = due.document
        body = msgspec.json.encode(
            {
                "type": f"document.{document.state}",
                "task_id": document.id,
                "status": document.state,
                "filename": document.name,
                "pages": document.pages,
                "pages_failed": document.failed,
                "error_message": document.error or None,
            }
        )
        headers = webhooks.headers(document.id, body, due.secret, int(time.time()))
        outcome = await webhooks.deliver(due.url, body, headers, allowed=self.allowed)
        pause = webhooks.next_attempt(due.attempts + 1) if outcome.state == "failed" else None
        if outcome.state != "delivered":
            log.warning("document %s: its webhook: %s", document.id, outcome.reason)
        await asyncio.to_thread(self.store.webhook_tried, document.id, None if pause is None else time.time() + pause)

    def pages_in_flight(self) -> int:
        """At most."""
        return self.settings.documents.pages_in_flight or self._in_flight.limit

    def _note_end(self, document: Document) -> None:
        self.metrics.note_end(document.state)
        if self.spans is not None:
            self.spans.ended(document)

    def _sweep(self) -> None:
        """At the start: uploads that never became a task, and folders of tasks that are gone."""
        known = self.store.ids()
        for path in [*self.incoming.iterdir(), *(each for each in self.folder.iterdir() if each.is_dir())]:
            if path != self.incoming and path.name not in known:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _pages(self, document: str) -> Iterator[Page]:
        last = 0
        while found := self.store.results(document, last, PAGES_AT_ONCE):
            yield from found
            last = found[-1].number

    def _input(self, document: str) -> Path:
        return self.folder_of(document) / INPUT


def _spans(settings: Settings) -> "Spans | None":
    """None when tracing is off."""
    tracer = tracer_of(settings, "documents")
    if tracer is None:
        return None
    from vllm_unified.documents.spans import Spans  # OpenTelemetry, of which nothing is needed without it

    return Spans(tracer)


class _GivenUpError(Exception):
    """Nobody waits for the products any more."""


async def _for_ever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s", work.__name__)
            await asyncio.sleep(RETENTION_SECONDS)


async def _image_of(drawing: Coroutine[Any, Any, Rendered]) -> bytes:
    return (await drawing).image


def _kind(path: Path, name: str) -> Kind:
    with path.open("rb") as file:
        return require_kind(file.read(HEAD_BYTES), name)


def _refuse_zip(upload: Upload) -> None:
    if upload.kind is Kind.ZIP:
        message = f"{upload.name} is a ZIP; send it to POST /api/ocr/pdf, which makes a task of each file in it"
        raise DocumentError(415, message, code="unsupported_file")


def _move_in(upload: Path, folder: Path) -> None:
    """On the disk, whatever happens to the machine, when this returns."""
    folder.mkdir(mode=0o700)
    upload.rename(folder / INPUT)
    for path in (folder / INPUT, folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(folder: Path, aside: Path) -> None:
    """Moved before: what is still on its way to the disk finds nothing under the old name."""
    moved = aside / f"deleted-{uuid.uuid4().hex}"
    with contextlib.suppress(FileNotFoundError):
        folder.rename(moved)
    shutil.rmtree(moved, ignore_errors=True)


def _write_figures(folder: Path, files: dict[str, bytes]) -> None:
    """Each whole or not at all: a page that is read again after a kill writes the same names."""
    (folder / "images").mkdir(exist_ok=True)
    for asset, data in files.items():
        beside = folder / f"{asset}.new"
        beside.write_bytes(data)
        beside.replace(folder / asset)


def _digest(upload: Upload, options: Options, wishes: Wishes) -> str:
    """Of everything that the client asked for."""
    asked = msgspec.json.encode((upload.sha256, upload.name, options, wishes.webhook_url, wishes.webhook_secret))
    return hashlib.sha256(asked).hexdigest()
