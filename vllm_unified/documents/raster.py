"""Pages of PDFs and images as pixels: the program of the processes that rendering.py starts.

It opens strangers' files, so it has limits of its own, writes nowhere, and speaks MessagePack with its parent: an
answer can be wrong, but it is data.
"""

import contextlib
import ctypes
import functools
import io
import math
import os
import resource
import select
import signal
import sys
from collections.abc import Iterator
from typing import IO, Literal, cast

import msgspec
import pillow_heif
import pypdfium2
import pypdfium2.raw
from PIL import AvifImagePlugin, ExifTags, Image, UnidentifiedImageError

from vllm_unified.documents.kinds import Kind
from vllm_unified.documents.page import Box
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.rendering import (
    FRAME,
    OUT_OF_MEMORY,
    Crop,
    Cropped,
    Inspect,
    Inspected,
    Limits,
    Refused,
    Render,
    Rendered,
    Rotation,
    Task,
)

PR_SET_PDEATHSIG = 1
NICER_BY = 10
POINTS_PER_INCH = 72
LARGEST_PAGE = 40_000_000  # pixels handed out: A0 at 144 dpi has 32 million
LONGEST_SIDE = 65_500  # pixels, of a JPEG
SMALL_PAGE = 250_000  # pixels: a PNG of it is no burden, and loses nothing
JPEG_QUALITY = 92
PAPER = 12  # shades of grey, of 255, that a page with nothing on it may have
# To find page 2,000 PDFium walks past those before it, so a file stays open, but not until all its objects are in
# memory, nor when there is nothing to do: it may have been deleted.
PAGES_OF_AN_OPEN_FILE = 100
OPEN_SECONDS = 5.0
TEXT_LIMIT = 1 << 20  # bytes of a page's text layer
MOST_FIGURES = 500  # of a page
FIGURES_LIMIT = 128 << 20  # bytes of them together
PILLOW_FORMATS = {Kind.JPEG: "JPEG", Kind.HEIC: "HEIF"}  # the others have their kind's name
MAY_MOVE = (Kind.GIF, Kind.WEBP, Kind.PNG, Kind.AVIF, Kind.HEIC)

# EXIF's orientation, as what makes the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow turns the other way round.
CLOCKWISE = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}


def main() -> None:
    limits = msgspec.json.decode(sys.argv[1], type=Limits)
    end_with_parent()
    incoming, outgoing = taken_connection()
    confine(limits)
    prepare_libraries()
    send(outgoing, b"")
    while frame := awaited(incoming):
        task = msgspec.msgpack.decode(frame, type=Task)
        signal.setitimer(signal.ITIMER_PROF, limits.task_seconds)  # SIGPROF ends us, even deep in a library
        told = answer(task, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(outgoing, msgspec.msgpack.encode(told))


def end_with_parent() -> None:
    """SIGKILL when the parent's thread that started us ends; the end of our input says it where that comes too late."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent decides


def taken_connection() -> tuple[IO[bytes], IO[bytes]]:
    """What was stdin and stdout, where no library can write into the answers any more."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    return incoming, outgoing


def confine(limits: Limits) -> None:
    os.nice(NICER_BY)
    _limit(resource.RLIMIT_AS, limits.memory_mib << 20)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def prepare_libraries() -> None:
    pillow_heif.register_heif_opener()
    pillow_heif.options.DECODE_THREADS = 1
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    Image.MAX_IMAGE_PIXELS = None  # opened_image has the check, and says the numbers


def awaited(incoming: IO[bytes]) -> bytes:
    """Empty at the end."""
    if not select.select([incoming], [], [], OPEN_SECONDS)[0]:
        kept_open.cache_clear()
    return receive(incoming)


def receive(incoming: IO[bytes]) -> bytes:
    """Empty at the end."""
    head = incoming.read(FRAME.size)
    return incoming.read(FRAME.unpack(head)[0]) if len(head) == FRAME.size else b""


def send(outgoing: IO[bytes], answer: bytes) -> None:
    outgoing.write(FRAME.pack(len(answer)) + answer)
    outgoing.flush()


def answer(task: Task, limits: Limits) -> Inspected | Rendered | Cropped | Refused:
    try:
        if isinstance(task, Crop):
            return cropped(task)
        if isinstance(task, Inspect):
            return inspected_pdf(task, limits) if task.kind is Kind.PDF else inspected_image(task, limits)
        return rendered_pdf(task) if task.kind is Kind.PDF else rendered_image(task, limits)
    except DocumentError as error:
        return Refused(error.status, str(error), error.code)
    except MemoryError:
        return Refused(422, f"{subject(task)} wants more than {limits.memory_mib} MiB of memory", OUT_OF_MEMORY)
    except FileNotFoundError:
        return Refused(404, "the document's file is no longer there", "file_gone")
    except UnidentifiedImageError:  # its words have the file's path
        return Refused(422, f"{subject(task)} is damaged: its header can't be read", "damaged_file")
    except Exception as error:  # whatever a library makes of a hostile file
        reason = f"{error or type(error).__name__}"[:200]
        code = "damaged_file" if isinstance(task, Inspect) else "damaged_page"
        return Refused(422, f"{subject(task)} is damaged: {reason}", code)


def subject(task: Task) -> str:
    match task:
        case Render():
            return f"page {task.number} of the {task.kind.upper()} file"
        case Inspect():
            return f"the {task.kind.upper()} file"
        case Crop():
            return "the page's image"


def inspected_pdf(task: Inspect, limits: Limits) -> Inspected:
    with contextlib.closing(opened_pdf(task.path, task.password)) as pdf:
        pages = len(pdf)
        check_pages(pages, limits)
        width, height = pdf[0].get_size()
        return Inspected(pages, width, height, tuple(pdf_warnings(pdf, task.path)))


def check_pages(pages: int, limits: Limits) -> None:
    if not pages:
        raise DocumentError(422, "the file has no pages", code="no_pages")
    if pages > limits.max_pages:
        message = f"the file has {pages:,} pages, and at most {limits.max_pages:,} are read; split it"
        raise DocumentError(413, message, code="too_many_pages")


def opened_pdf(path: str, password: str) -> pypdfium2.PdfDocument:
    # The error of a load that fails without one is that of the last load that had one; now that is ERR_FILE.
    pypdfium2.raw.FPDF_LoadDocument(b"", None)
    try:
        pdf = pypdfium2.PdfDocument(path, password=password or None)
    except pypdfium2.PdfiumError as error:
        raise pdf_problem(error.err_code, password) from None
    if pdf.get_formtype() == pypdfium2.raw.FORMTYPE_ACRO_FORM:
        pdf.init_forms()  # so that the fields are drawn; their scripts have nothing that would run them
    return pdf


@functools.lru_cache(maxsize=1)
def kept_open(path: str, password: str, *_: int) -> pypdfium2.PdfDocument:
    """The same as before while all that is said is the same. What is no longer kept closes itself."""
    return opened_pdf(path, password)


def pdf_problem(code: int | None, password: str) -> DocumentError:
    match code:
        case pypdfium2.raw.FPDF_ERR_PASSWORD if password:
            return DocumentError(400, "the PDF's password is another one", code="password_wrong")
        case pypdfium2.raw.FPDF_ERR_PASSWORD:
            return DocumentError(400, "the PDF is encrypted; send its `password`", code="password_required")
        case pypdfium2.raw.FPDF_ERR_SECURITY:
            message = "the PDF is encrypted in a way that can't be read; send it without encryption"
            return DocumentError(422, message, code="unsupported_encryption")
        case pypdfium2.raw.FPDF_ERR_FILE:
            return DocumentError(422, "the PDF has no pages", code="no_pages")
        case _:
            message = "the PDF is damaged: it is cut off, or no PDF behind its header; save it again and resend it"
            return DocumentError(422, message, code="damaged_file")


def pdf_warnings(pdf: pypdfium2.PdfDocument, path: str) -> Iterator[str]:
    if not ends_well(path):
        yield "the PDF's end is missing; pages may be too"
    if pdf.get_formtype() in (pypdfium2.raw.FORMTYPE_XFA_FULL, pypdfium2.raw.FORMTYPE_XFA_FOREGROUND):
        yield "an XFA form: only what its PDF pages show is read"
    if attachments := pdf.count_attachments():
        yield f"files embedded in the PDF are not read: {attachments}"
    if scripts := pypdfium2.raw.FPDFDoc_GetJavaScriptActionCount(pdf):
        yield f"JavaScript in the PDF is not run: {max(scripts, 1)}"


def ends_well(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2048))
        return b"%%EOF" in file.read()


def rendered_pdf(task: Render) -> Rendered:
    file = os.stat(task.path)
    part = task.number // PAGES_OF_AN_OPEN_FILE
    pdf = kept_open(task.path, task.password, part, file.st_ino, file.st_size, file.st_mtime_ns)
    check_number(task.number, len(pdf))
    with contextlib.closing(pdf[task.number - 1]) as page:
        width, height = page.get_size()
        scale = scale_of(task, width, height, task.dpi / POINTS_PER_INCH)
        # PDFium's sides are rounded up: a page of 1024.0000001 pixels is not to become one of 1025.
        image = page.render(scale=scale * (1 - 1e-6), rotation=task.rotation).to_pil()
        # To convert what is RGB would copy it, which takes as long as drawing it.
        return encoded(image if image.mode == "RGB" else image.convert("RGB"), scale, text_layer(page))


def check_number(number: int, pages: int) -> None:
    if not 1 <= number <= pages:
        raise DocumentError(400, f"there is no page {number}: the file has {pages}", code="no_such_page")


def scale_of(task: Render, width: float, height: float, wanted: float) -> float:
    """Of the sides of a page: not below the shortest side that is asked for, and above all not over a limit."""
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise DocumentError(422, f"page {task.number} has no size", code="damaged_page")
    longest = max(width, height)
    if task.shortest_side:
        wanted = max(wanted, task.shortest_side / min(width, height))
    most = min(task.longest_side or LONGEST_SIDE, LONGEST_SIDE)
    return min(wanted, most / longest, math.sqrt(LARGEST_PAGE / width / height))


def text_layer(page: pypdfium2.PdfPage) -> str:
    textpage = page.get_textpage()
    text: str = textpage.get_text_range(0, min(textpage.count_chars(), TEXT_LIMIT))
    # PDFium's sign of a hyphen at the end of a line is U+0002 or the noncharacter U+FFFE.
    text = text.replace("\r\n", "\n").replace("\x02", "-").replace("\ufffe", "-").replace("\0", "")
    return text.encode("utf-8", "replace")[:TEXT_LIMIT].decode("utf-8", "ignore")


def inspected_image(task: Inspect, limits: Limits) -> Inspected:
    with opened_image(task.path, task.kind, limits) as image:
        pages = getattr(image, "n_frames", 1) if task.kind is Kind.TIFF else 1
        check_pages(pages, limits)
        width, height = image.size
        if orientation_of(image) >= 5:
            width, height = height, width
        return Inspected(pages, width, height, tuple(image_warnings(image, task.kind)))


@contextlib.contextmanager
def opened_image(path: str, kind: Kind, limits: Limits, number: int = 1) -> Iterator[Image.Image]:
    """Its header only. One format, so that no other of Pillow's readers sees the file."""
    with Image.open(path, formats=[PILLOW_FORMATS.get(kind, kind.upper())]) as image:
        check_pixels(image, limits)
        for page in range(1, number):  # one by one, as Pillow miscounts a TIFF that is asked for more than it has
            try:
                image.seek(page)
            except EOFError:
                check_number(number, page)
            check_pixels(image, limits)
        yield image


def check_pixels(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        message = (
            f"the image has {width:,} x {height:,} pixels, and at most {limits.max_pixels:,} are read; make it smaller"
        )
        raise DocumentError(413, message, code="too_many_pixels")


def orientation_of(image: Image.Image) -> int:
    """As EXIF has it, 1 to 8; 1 where Pillow turns the picture by itself, and where EXIF is damaged."""
    if image.format == "TIFF":
        return 1
    with contextlib.suppress(Exception):  # of EXIF that lies about itself
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in UPRIGHT else 1
    return 1


def image_warnings(image: Image.Image, kind: Kind) -> Iterator[str]:
    if kind in MAY_MOVE and getattr(image, "is_animated", False):
        yield "the file holds several pictures; only the first is read"


def rendered_image(task: Render, limits: Limits) -> Rendered:
    if task.kind is not Kind.TIFF:
        check_number(task.number, 1)
    with opened_image(task.path, task.kind, limits, task.number) as image:
        width, height = image.size
        scale = min(1.0, scale_of(task, width, height, 1.0))
        orientation = orientation_of(image)
        picture = smaller(with_plain_pixels(image), scale)
        if orientation in UPRIGHT:
            picture = picture.transpose(UPRIGHT[orientation])
        return encoded(turned(on_white(picture), task.rotation), scale)


def with_plain_pixels(image: Image.Image) -> Image.Image:
    """Of eight bits a channel, and none that is looked up, so that pixels can be averaged."""
    if "transparency" in image.info or image.mode == "PA":
        return image.convert("RGBA")
    if image.mode == "P":
        return image.convert("RGB")
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("I", "F"):
        low, high = (float(value) for value in image.getextrema() if not isinstance(value, tuple))
        stretch = 255 / (high - low) if high > low else 0.0
        return image.point(lambda value: value * stretch - low * stretch).convert("L")
    return image


def smaller(image: Image.Image, scale: float) -> Image.Image:
    if scale >= 1:
        return image
    if image.mode == "1":
        image = image.convert("L")
    size = max(1, int(image.width * scale + 0.5)), max(1, int(image.height * scale + 0.5))
    # A JPEG is decoded to an eighth of its size or so at once, where that is enough.
    image.thumbnail(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def on_white(image: Image.Image) -> Image.Image:
    """RGB, or bilevel as it was."""
    if image.mode == "1":
        return image
    if image.mode not in ("RGBA", "RGBa", "LA", "La"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def turned(image: Image.Image, rotation: Rotation) -> Image.Image:
    return image.transpose(CLOCKWISE[rotation]) if rotation else image


def encoded(image: Image.Image, scale: float, text: str = "") -> Rendered:
    written = io.BytesIO()
    media_type: Literal["image/png", "image/jpeg"] = "image/jpeg"
    if image.mode == "1" or image.width * image.height <= SMALL_PAGE:
        media_type = "image/png"
        image.save(written, "PNG")
    else:
        image.save(written, "JPEG", quality=JPEG_QUALITY)
    lowest, highest = cast("tuple[int, int]", image.convert("L").getextrema())
    return Rendered(
        written.getvalue(), media_type, image.width, image.height, scale, text, blank=highest - lowest <= PAPER
    )


def cropped(task: Crop) -> Cropped:
    if len(task.boxes) > MOST_FIGURES:
        raise too_many_figures(f"{len(task.boxes):,} boxes, and at most {MOST_FIGURES} are cut out")
    figures, size = [], 0
    with Image.open(io.BytesIO(task.image), formats=["JPEG", "PNG"]) as image:
        for box in task.boxes:
            written = io.BytesIO()
            image.crop(clamped(box, image.width, image.height)).convert("RGB").save(
                written, "JPEG", quality=JPEG_QUALITY
            )
            figures.append(written.getvalue())
            size += len(figures[-1])
            if size > FIGURES_LIMIT:
                raise too_many_figures(f"figures of more than {FIGURES_LIMIT >> 20} MiB together")
    return Cropped(tuple(figures))


def clamped(box: Box, width: int, height: int) -> Box:
    """Within the image, and of one pixel at least."""
    x1, y1, x2, y2 = box
    left, top = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return left, top, min(max(x2, left + 1), width), min(max(y2, top + 1), height)


def too_many_figures(what: str) -> DocumentError:
    return DocumentError(413, f"the page has {what}", code="too_many_figures")


if __name__ == "__main__":
    main()
