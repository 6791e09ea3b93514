"""What is measured. Each measure brings what it needs and gives figures; what they have to be is in report.py."""

import base64
import contextlib
import gc
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pypdfium2

from benchmarks.documents.papers import A4, A6, write_pdf
from benchmarks.documents.programs import Engine, Service, engine, load_average, percentile, repeatedly, service
from benchmarks.router.programs import BenchmarkError
from tests.documents import fake_ocr
from vllm_unified.documents.grounding import grounded

Figures = dict[str, Any]

PROMPT = "<image>\n<|grounding|>Convert the document to markdown."
SCALE = 2.0  # 144 dpi
RSS_SECONDS, HEALTH_SECONDS = 0.2, 0.05
SETTLE_SECONDS = 1.0  # for requests that are on their way to the engine
FORMATS = "html,docx,text"
PRODUCTS = ("result.md", "raw.json", "layout.pdf", "result.html", "result.docx", "result.txt", "result.zip")
# What no model should write, over and over.
HOSTILE = {
    "refs that never close": "<|ref|>",
    "dets that never close": "<|det|> ",
    "empty blocks": "<|ref|>a<|/ref|><|det|>",
    "tags cut in half": "<|ref",
    "brackets": "[",
    "boxes": "[1,2,300,400],",
    "digits": "9",
    "tables in tables": "<table>",
    "full-width tags": "〈｜",
}
DET = "<|ref|>text<|/ref|><|det|>[["


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `latency` and `concurrency` are the engine's."""

    rounds: int = 3
    latency: float = 1.0
    concurrency: int = 16
    pages: int = 480
    pages_one_at_a_time: int = 15
    documents: tuple[int, ...] = (350, 700, 1400, 2800)
    text_bytes: tuple[int, ...] = (250_000, 500_000, 1_000_000, 2_000_000)
    text_rounds: int = 5
    pages_under_kills: int = 300
    kills: int = 4


FULL = Sizes()
QUICK = Sizes(
    rounds=1,
    latency=0.1,
    concurrency=4,
    pages=12,
    pages_one_at_a_time=2,
    documents=(6, 12),
    text_bytes=(50_000, 100_000),
    text_rounds=1,
    pages_under_kills=12,
    kills=1,
)


@contextlib.contextmanager
def deployment(folder: Path) -> Iterator[tuple[Engine, Service]]:
    with engine(folder) as ocr, service(folder / "home", ocr) as documents:
        yield ocr, documents


# --- pages a second ---


def throughput(folder: Path, sizes: Sizes) -> Figures:
    """The engine alone, the service, and one page at a time, in turn, with one document of A4 pages."""
    pdf = write_pdf(folder / "long.pdf", sizes.pages, A4)
    few = write_pdf(folder / "short.pdf", sizes.pages_one_at_a_time, A4)
    with deployment(folder) as (ocr, documents):
        # The first document after a start: how many pages keep the engine busy is found out with it.
        first = service_rate(ocr, documents, pdf, sizes)["pages_per_second"]
        rounds = [
            {
                "load": load_average(),
                "engine": engine_rate(ocr, pdf, sizes),
                **service_rate(ocr, documents, pdf, sizes),
                "one_at_a_time": rate_of_one_at_a_time(ocr, few, sizes),
            }
            for _ in range(sizes.rounds)
        ]
    return {
        "rounds": rounds,
        "first": first,
        **{name: statistics.median(each[name] for each in rounds) for name in rounds[0]},
        "ratio": statistics.median(each["pages_per_second"] / each["engine"] for each in rounds),
        "ratio_of_one_at_a_time": statistics.median(each["one_at_a_time"] / each["engine"] for each in rounds),
        "ratio_of_first": first / statistics.median(each["engine"] for each in rounds),
    }


def engine_rate(ocr: Engine, pdf: Path, sizes: Sizes) -> float:
    """With twice as many requests as it takes at a time, whose pages were drawn before."""
    ocr.behave(latency=sizes.latency, concurrency=sizes.concurrency)
    with contextlib.closing(pypdfium2.PdfDocument(pdf)) as opened:
        body = request_of(opened[0])
    connections = 2 * sizes.concurrency
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    with httpx.Client(base_url=ocr.url, timeout=60, limits=limits) as client, ThreadPoolExecutor(connections) as pool:
        began = time.monotonic()
        for answer in pool.map(lambda _: client.post("/v1/chat/completions", json=body), range(sizes.pages)):
            answer.raise_for_status()
    return ocr.pages_per_second(sizes.pages, began)


def service_rate(ocr: Engine, documents: Service, pdf: Path, sizes: Sizes) -> Figures:
    """From before the upload to the last page's answer; the products are not waited for."""
    ocr.behave(latency=sizes.latency, concurrency=sizes.concurrency)
    began = time.monotonic()
    task = documents.send(pdf)
    documents.wait_for_pages(task, sizes.pages)
    documents.delete(task)
    return {
        "pages_per_second": ocr.pages_per_second(sizes.pages, began),
        "most_waiting": ocr.seen()["most_waiting"],
    }


def rate_of_one_at_a_time(ocr: Engine, pdf: Path, sizes: Sizes) -> float:
    """As the applications before did it: draw a page, ask, wait, draw the next."""
    ocr.behave(latency=sizes.latency, concurrency=sizes.concurrency)
    with (
        httpx.Client(base_url=ocr.url, timeout=60) as client,
        contextlib.closing(pypdfium2.PdfDocument(pdf)) as opened,
    ):
        began = time.monotonic()
        for page in opened:
            client.post("/v1/chat/completions", json=request_of(page)).raise_for_status()
    return ocr.pages_per_second(sizes.pages_one_at_a_time, began)


def request_of(page: pypdfium2.PdfPage) -> dict[str, Any]:
    drawn = io.BytesIO()
    page.render(scale=SCALE).to_pil().convert("RGB").save(drawn, "JPEG", quality=92)
    url = f"data:image/jpeg;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
    return {"model": "deepseek-ocr", "messages": [{"role": "user", "content": content}]}


# --- long documents: memory, time, health ---


def long_documents(folder: Path, sizes: Sizes) -> Figures:
    """One after the other through one service, on an engine so fast that the time is the service's own."""
    (folder / "idle").mkdir()
    with engine(folder / "idle") as idle, deployment(folder) as (ocr, documents):
        ocr.behave(latency=0.01, concurrency=8)
        found = [
            _long_document(documents, Watch(documents, idle), write_pdf(folder / "long.pdf", pages, A6), pages)
            for pages in sizes.documents
        ]
    return {"documents": found}


def _long_document(documents: Service, watch: "Watch", pdf: Path, pages: int) -> Figures:
    load = load_average()
    with watch.watching():
        began = time.monotonic()
        task = documents.send(pdf, formats=FORMATS)
        documents.wait_for_pages(task, pages)
        read = time.monotonic()
        watch.look()  # also where none came in a short while
        while_read, watch.rss = watch.rss, []
        documents.wait_for_end(task)
        ended = time.monotonic()
        product_bytes = _fetch_products(documents, task, pages)
    documents.delete(task)
    return {
        "pages": pages,
        "load": load,
        "read_seconds": read - began,
        "product_seconds": ended - read,
        "product_mb": product_bytes / 1e6,
        "rss_mb_while_read": max(own for own, _ in while_read),
        "rss_mb_after": max(own for own, _ in watch.rss),
        "rss_mb_with_renderers": max(both for _, both in while_read + watch.rss),
        "health_ms": watch.health_ms,
        "idle_ms": watch.idle_ms,
    }


class Watch:
    """Memory and /health of a service, looked at all along.

    `idle`: a server that has nothing to do. What its /health takes at the same time is the machine's and ours.
    """

    def __init__(self, documents: Service, idle: Engine) -> None:
        self._documents = documents
        self._idle = idle
        self.rss: list[tuple[float, float]] = []
        self.health_ms: Figures = {}
        self.idle_ms: Figures = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        of_service, of_idle = list[float](), list[float]()
        with self._documents.client() as client, httpx.Client(base_url=self._idle.url) as other:
            asking = partial(_ask_health, client, of_service), partial(_ask_health, other, of_idle)
            with repeatedly((self.look, RSS_SECONDS), *((ask, HEALTH_SECONDS) for ask in asking)):
                yield
        self.look()
        self.health_ms, self.idle_ms = _shares_of(of_service), _shares_of(of_idle)

    def look(self) -> None:
        self.rss.append(self._documents.rss_mb())


def _ask_health(client: httpx.Client, milliseconds: list[float]) -> None:
    began = time.perf_counter()
    client.get("/health").raise_for_status()
    milliseconds.append(1000 * (time.perf_counter() - began))


def _shares_of(milliseconds: list[float]) -> Figures:
    shares = {"median": 0.5, "p99": 0.99, "longest": 1.0}
    return {name: percentile(milliseconds or [0.0], share) for name, share in shares.items()} | {
        "asked": len(milliseconds)
    }


def _fetch_products(documents: Service, task: str, pages: int) -> int:
    """All of them, and the task as its clients see it; bytes of the files together."""
    size = 0
    with documents.client() as client:
        # Not parsed: that would hold up the threads that look.
        found = client.get(f"/api/tasks/{task}").raise_for_status().content.count(b'"page_number":')
        if found != pages:
            raise BenchmarkError(f"the result of {pages} pages has {found}")
        for name in PRODUCTS:
            with client.stream("GET", f"/api/tasks/{task}/download/{name}") as answer:
                answer.raise_for_status()
                size += sum(len(piece) for piece in answer.iter_bytes(1 << 20))
    return size


# --- grounding ---


def grounding(_: Path, sizes: Sizes) -> Figures:
    """Milliseconds of CPU for answers of so many bytes, the least of some rounds: DeepSeek-OCR's form, and hostile."""
    load = load_average()
    answers = {"DeepSeek-OCR's form": _true_answer}
    for name, part in HOSTILE.items():
        answers[name] = partial(_repeated, "", part)
        answers[f"{name}, in a det"] = partial(_repeated, DET, part)
    return {"load": load, "ms": {name: _grounding_ms(of, sizes) for name, of in answers.items()}}


def _true_answer(size: int) -> str:
    """Of many pages in a row: 130 bytes a block, in English and Chinese."""
    answers, length = [], 0
    for page in itertools.cycle(range(1, 1000)):
        answers.append(fake_ocr.answer("grounding", "markdown", page, ""))
        length += len(answers[-1].encode())
        if length >= size:
            break
    return "".join(answers)


def _repeated(before: str, part: str, size: int) -> str:
    return before + part * (size // len(part.encode()))


def _grounding_ms(answer_of: Callable[[int], str], sizes: Sizes) -> dict[int, float]:
    """By size. All of them in each round, so that a slow moment of the machine is none of one size."""
    answers = {size: answer_of(size) for size in sizes.text_bytes}
    rounds = [{size: _cpu_ms(answers[size]) for size in answers} for _ in range(sizes.text_rounds)]
    return {size: min(each[size] for each in rounds) for size in answers}


def _cpu_ms(text: str) -> float:
    gc.collect()
    began = time.process_time()
    grounded(text, 1200, 1700)
    return 1000 * (time.process_time() - began)


# --- kills ---


def kills(folder: Path, sizes: Sizes) -> Figures:
    """SIGKILL in the middle of the pages, again and again, and at last while the products are written."""
    pages = sizes.pages_under_kills
    pdf = write_pdf(folder / "killed.pdf", pages, A6)
    task, on_disk, asked_by_then = "", list[set[int]](), list[int]()
    load = load_average()
    with engine(folder) as ocr:
        ocr.behave(latency=0.1, concurrency=8)
        for number in range(1, sizes.kills + 2):
            with service(folder / "home", ocr) as documents:
                task = task or documents.send(pdf, formats=FORMATS)
                documents.wait_for_pages(task, pages * number // (sizes.kills + 1))
                documents.kill()
                on_disk.append(documents.pages_on_the_disk())
            time.sleep(SETTLE_SECONDS)
            asked_by_then.append(len(ocr.seen()["requests"]))
        with service(folder / "home", ocr) as documents:
            documents.wait_for_end(task)
            _fetch_products(documents, task, pages)
        asked = [each["page"] for each in ocr.seen()["requests"]]
    again = [page for begin, read in zip(asked_by_then, on_disk, strict=True) for page in asked[begin:] if page in read]
    return {
        "load": load,
        "pages": pages,
        "pages_read_at_each_kill": [len(read) for read in on_disk],
        "requests": len(asked),
        "pages_never_asked_for": pages - len(set(asked)),
        "pages_read_twice": len(set(again)),
    }
