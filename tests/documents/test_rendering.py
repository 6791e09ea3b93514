import asyncio
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pikepdf
import psutil
import pytest
from fpdf import FPDF
from PIL import Image, ImageDraw
from pillow_heif import register_heif_opener
from pypdfium2.version import PDFIUM_INFO

from tests.conftest import CHECKOUT, eventually
from tests.documents import bad_files
from vllm_unified.documents.kinds import Kind, require_kind
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.rendering import Inspected, Rendered, Renderer

register_heif_opener()
T = TypeVar("T")
COLOURS = {
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "black": (0, 0, 0),
}


class Drawn:
    """A renderer that lives as long as its loop."""

    def __init__(self, runner: asyncio.Runner, renderer: Renderer, folder: Path) -> None:
        self.run = runner.run
        self.renderer = renderer
        self._folder = folder

    def file(self, content: bytes) -> tuple[Path, Kind]:
        path = self._folder / "input"
        path.write_bytes(content)
        return path, require_kind(content[:4096], "input")

    def inspect(self, content: bytes, password: str = "") -> Inspected:
        return self.run(self.renderer.inspect(*self.file(content), password))

    def render(self, content: bytes, number: int = 1, **options: Any) -> Rendered:
        return self.run(self.renderer.render(*self.file(content), number, **options))

    def refuse(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[int, str, str]:
        with pytest.raises(DocumentError) as caught:
            call(*arguments, **options)
        return caught.value.status, caught.value.code, str(caught.value)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawn]:
    with asyncio.Runner() as runner:
        renderer = Renderer(1)
        yield Drawn(runner, renderer, tmp_path_factory.mktemp("files"))
        runner.run(renderer.__aexit__(None, None, None))


def opened(page: Rendered) -> Image.Image:
    picture = Image.open(io.BytesIO(page.image))
    assert picture.size == (page.width, page.height)
    assert page.media_type == f"image/{picture.format}".lower()
    return picture


def colour(page: Rendered, x: float, y: float) -> str:
    """The nearest colour at a share of the page's width and height."""
    found = pixel(opened(page), int(x * (page.width - 1)), int(y * (page.height - 1)))
    return min(COLOURS, key=lambda name: sum([abs(a - b) for a, b in zip(COLOURS[name], found, strict=True)]))


def pixel(picture: Image.Image, x: int, y: int) -> tuple[int, ...]:
    found = picture.convert("RGB").getpixel((x, y))
    assert isinstance(found, tuple)
    return found


def marked(size: tuple[int, int] = (600, 400), mode: str = "RGB") -> Image.Image:
    """Blue, with a red corner at the top left."""
    picture = Image.new("RGB", size, "blue")
    ImageDraw.Draw(picture).rectangle((0, 0, size[0] // 4, size[1] // 4), "red")
    return picture.convert(mode)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def prose(*texts: str) -> bytes:
    made = FPDF()
    made.set_font("Helvetica", size=12)
    for text in texts:
        made.add_page()
        made.multi_cell(0, 8, text)
    return bytes(made.output())


# PDF


def test_a_page_with_its_text(drawn: Drawn) -> None:
    content = prose("The first page.", "The second page,\nof two lines.")
    told = drawn.inspect(content)
    assert (told.pages, round(told.width), round(told.height), told.warnings) == (2, 595, 842, ())
    page = drawn.render(content, 2)
    assert (page.media_type, page.width, page.height, page.scale) == ("image/jpeg", 1191, 1684, 2)
    assert page.text == "The second page,\nof two lines."
    assert min(opened(page).convert("L").tobytes()) < 100, "nothing is drawn"


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((612, 792), {}, (1224, 1584)),
        ((612, 792), {"dpi": 72}, (612, 792)),
        ((612, 792), {"longest_side": 1024}, (792, 1024)),
        ((612, 792), {"longest_side": 5000}, (1224, 1584)),
        ((100, 50), {"shortest_side": 400}, (800, 400)),
        ((100, 50), {"shortest_side": 400, "longest_side": 600}, (600, 300)),
        ((14400, 14400), {}, (6325, 6325)),  # 200 inches
        ((14400, 14400), {"dpi": 600, "longest_side": 1280}, (1280, 1280)),
        ((14400, 3), {"dpi": 600}, (65500, 14)),
    ],
)
def test_size(drawn: Drawn, size: tuple[int, int], options: dict[str, Any], expected: tuple[int, int]) -> None:
    page = drawn.render(bad_files.written(bad_files.pdf(1, size)), **options)
    assert (page.width, page.height) == expected
    assert page.scale == pytest.approx(page.width / size[0], rel=0.01)


@pytest.mark.parametrize(
    ("own", "asked", "corner"), [(0, 0, (0, 0)), (90, 0, (1, 0)), (90, 90, (1, 1)), (0, 270, (0, 1))]
)
def test_rotation_of_a_pdf(drawn: Drawn, own: int, asked: int, corner: tuple[int, int]) -> None:
    made = bad_files.pdf(1, (400, 200))
    made.pages[0].Contents = made.make_stream(b"1 0 0 rg 0 150 100 50 re f")
    made.pages[0].Rotate = own
    page = drawn.render(bad_files.written(made), rotation=asked)
    assert (page.width > page.height) is ((own + asked) % 180 == 0)
    assert [at for at in ((0, 0), (1, 0), (0, 1), (1, 1)) if colour(page, *at) == "red"] == [corner]


def test_fields_of_a_form_are_drawn(drawn: Drawn) -> None:
    made = bad_files.pdf(1, (200, 200))
    look = made.make_stream(b"1 0 0 rg 0 0 200 200 re f", Type=pikepdf.Name.XObject, Subtype=pikepdf.Name.Form)
    look.BBox = pikepdf.Array([0, 0, 200, 200])
    field = made.make_indirect(
        pikepdf.Dictionary(
            Type=pikepdf.Name.Annot,
            Subtype=pikepdf.Name.Widget,
            FT=pikepdf.Name.Tx,
            T="name",
            F=4,
            Rect=pikepdf.Array([0, 0, 200, 200]),
            AP=pikepdf.Dictionary(N=look),
        )
    )
    made.pages[0].Annots = pikepdf.Array([field])
    made.Root.AcroForm = pikepdf.Dictionary(Fields=pikepdf.Array([field]))
    assert colour(drawn.render(bad_files.written(made)), 0.5, 0.5) == "red"


def test_a_password(drawn: Drawn) -> None:
    content = bad_files.written(bad_files.pdf(2), "ключ")
    assert drawn.inspect(content, "ключ").pages == 2
    assert drawn.render(content, 2, password="ключ", dpi=36).width == 298
    assert drawn.refuse(drawn.inspect, content)[:2] == (400, "password_required")
    assert drawn.refuse(drawn.render, content)[:2] == (400, "password_required")
    assert drawn.refuse(drawn.inspect, content, "wrong")[:2] == (400, "password_wrong")
    assert drawn.inspect(bad_files.written(bad_files.pdf()), "not needed").pages == 1


def test_too_many_pages(drawn: Drawn) -> None:
    status, code, message = drawn.refuse(drawn.inspect, bad_files.pdf_of_many_pages(10_000))
    assert (status, code) == (413, "too_many_pages")
    assert message == "the file has 10,000 pages, and at most 5,000 are read; split it"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (bad_files.written(bad_files.pdf(0)), 422, "no_pages"),
        (bad_files.written(bad_files.pdf(50))[:3000], 422, "damaged_file"),
        (b"%PDF-1.7\nDear Sir, this is a letter.", 422, "damaged_file"),
        (b"%PDF-1.7\n" + bytes(range(256)) * 100, 422, "damaged_file"),
    ],
)
def test_damaged_pdfs(drawn: Drawn, content: bytes, status: int, code: str) -> None:
    drawn.refuse(drawn.inspect, bad_files.written(bad_files.pdf(), "x"))  # whose error is not to be taken for theirs
    assert drawn.refuse(drawn.inspect, content)[:2] == (status, code)


def test_a_lost_page_costs_no_other(drawn: Drawn) -> None:
    content = bad_files.pdf_with_a_lost_page()
    assert drawn.inspect(content).pages == 3
    assert drawn.refuse(drawn.render, content, 2)[:2] == (422, "damaged_page")
    assert [drawn.render(content, number).width for number in (1, 3)] == [600, 600]
    assert drawn.refuse(drawn.render, content, 4) == (400, "no_such_page", "there is no page 4: the file has 3")


def test_pages_of_a_long_file_in_any_order(drawn: Drawn) -> None:
    content = prose(*(f"Page {number}." for number in range(1, 221)))
    path, kind = drawn.file(content)
    wanted = [1, 99, 100, 101, 220, 2, 199, 200]
    found = [drawn.run(drawn.renderer.render(path, kind, number, dpi=36)).text for number in wanted]
    assert found == [f"Page {number}." for number in wanted]


def test_another_file_of_the_same_name(drawn: Drawn) -> None:
    assert [drawn.render(prose(text), dpi=36).text for text in ("One.", "Two.")] == ["One.", "Two."]


def test_what_a_pdf_holds_besides_pages(drawn: Drawn) -> None:
    assert PDFIUM_INFO.flags == (), "this PDFium may run scripts"
    content = bad_files.pdf_with_javascript_and_a_file()
    assert drawn.inspect(content).warnings == (
        "files embedded in the PDF are not read: 1",
        "JavaScript in the PDF is not run: 1",
    )
    assert colour(drawn.render(content), 0.5, 0.5) == "white"
    cut = prose("Some page.").replace(b"%%EOF", b"")
    assert drawn.inspect(cut).warnings == ("the PDF's end is missing; pages may be too",)


# Images


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "HEIF", "AVIF", "TIFF"])
def test_every_kind_of_image(drawn: Drawn, kind: str) -> None:
    content = saved(marked(), kind)
    assert drawn.inspect(content) == Inspected(1, 600, 400)
    page = drawn.render(content, longest_side=300)
    assert (page.width, page.height, page.scale, page.text) == (300, 200, 0.5, "")
    assert (colour(page, 0, 0), colour(page, 1, 1)) == ("red", "blue")
    assert drawn.render(content, longest_side=3000).width == 600, "it was enlarged"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
@pytest.mark.parametrize("orientation", [3, 6, 8, 5])
def test_upright_by_exif(drawn: Drawn, kind: str, orientation: int) -> None:
    stored = marked()
    backwards = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
        5: Image.Transpose.TRANSPOSE,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = stored.transpose(backwards[orientation])
    if kind == "HEIF":  # turns by a property of its own, which is made of this
        stored.info["exif"] = exif.tobytes()
        content = saved(stored, kind)
    else:
        content = saved(stored, kind, exif=exif)
    assert drawn.inspect(content) == Inspected(1, 600, 400)
    page = drawn.render(content)
    assert (page.width, page.height) == (600, 400)
    assert [colour(page, x, y) for x, y in ((0, 0), (1, 0), (0, 1), (1, 1))] == ["red", "blue", "blue", "blue"]


def test_damaged_exif_does_no_harm(drawn: Drawn) -> None:
    content = saved(marked(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03" * 9)
    assert drawn.render(content).width == 600


@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (270, (0, 1))])
def test_rotation_of_an_image(drawn: Drawn, rotation: int, corner: tuple[int, int]) -> None:
    page = drawn.render(saved(marked(), "PNG"), rotation=rotation)
    assert colour(page, *corner) == "red"
    assert (page.width > page.height) is (rotation % 180 == 0)


def transparent(mode: str) -> Image.Image:
    """Nothing on the left, black on the right."""
    picture = Image.new("RGBA", (600, 400), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (300, 0, 600, 400))
    return picture.convert(mode)


def palette(**options: Any) -> bytes:
    picture = Image.new("P", (600, 400), 0)
    picture.putpalette([255, 0, 0, 0, 0, 0])
    picture.paste(1, (300, 0, 600, 400))
    return saved(picture, "PNG", **options)


def ramp(mode: str, left: float, right: float) -> bytes:
    picture = Image.new(mode, (600, 400), left)
    picture.paste(right, (300, 0, 600, 400))
    return saved(picture, "PNG" if mode in ("L", "1", "I;16") else "TIFF")


@pytest.mark.parametrize(
    ("content", "left", "right"),
    [
        (saved(transparent("RGBA"), "PNG"), "white", "black"),
        (saved(transparent("LA"), "PNG"), "white", "black"),
        (saved(transparent("RGBA"), "WEBP", lossless=True), "white", "black"),
        (saved(transparent("RGBA"), "TIFF"), "white", "black"),
        (palette(), "red", "black"),
        (palette(transparency=0), "white", "black"),
        (saved(transparent("RGBA"), "GIF"), "white", "black"),
        (ramp("I;16", 32768, 65535), "grey", "white"),
        (ramp("I;16B", 32768, 65535), "grey", "white"),
        (ramp("I", -70000, 70000), "black", "white"),
        (ramp("F", 0.25, 0.75), "black", "white"),
        (ramp("L", 0, 128), "black", "grey"),
        (ramp("1", 0, 1), "black", "white"),
        (saved(Image.new("CMYK", (600, 400), (0, 255, 255, 0)), "JPEG"), "red", "red"),
        (saved(Image.new("CMYK", (600, 400), (0, 255, 255, 0)), "TIFF"), "red", "red"),
    ],
)
def test_pixels_of_every_mode(drawn: Drawn, content: bytes, left: str, right: str) -> None:
    for options in ({}, {"longest_side": 300}):
        page = drawn.render(content, **options)
        assert opened(page).mode in ("RGB", "1")
        assert (colour(page, 0.2, 0.5), colour(page, 0.8, 0.5)) == (left, right)


@pytest.mark.parametrize(
    ("picture", "media_type"),
    [
        (Image.new("RGB", (600, 500)), "image/jpeg"),
        (Image.new("RGB", (500, 500)), "image/png"),
        (Image.new("1", (2000, 2000)), "image/png"),
    ],
)
def test_jpeg_or_png(drawn: Drawn, picture: Image.Image, media_type: str) -> None:
    assert drawn.render(saved(picture, "BMP")).media_type == media_type


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_a_moving_picture_the_first(drawn: Drawn, kind: str) -> None:
    frames = [Image.new("RGB", (600, 400), name) for name in ("red", "blue")]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    told = drawn.inspect(content)
    assert (told.pages, told.warnings) == (1, ("the file holds several pictures; only the first is read",))
    assert colour(drawn.render(content), 0.5, 0.5) == "red"
    assert drawn.refuse(drawn.render, content, 2)[:2] == (400, "no_such_page")


def test_tiff_of_many_pages(drawn: Drawn) -> None:
    frames = [Image.new(mode, (600 + 100 * index, 400), "white") for index, mode in enumerate(("1", "L", "RGB"))]
    content = saved(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert drawn.inspect(content) == Inspected(3, 600, 400)
    assert [drawn.render(content, number).width for number in (1, 2, 3)] == [600, 700, 800]
    assert drawn.refuse(drawn.render, content, 4) == (400, "no_such_page", "there is no page 4: the file has 3")


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (bad_files.png_that_says(30_000, 30_000), 413, "too_many_pixels"),
        (bad_files.image("GIF")[:6] + b"\xff\xff\xff\xff" + bad_files.image("GIF")[10:], 413, "too_many_pixels"),
        (bad_files.image("PNG")[:20], 422, "damaged_file"),
        (b"\xff\xd8\xff\xe0 no JPEG", 422, "damaged_file"),
        (b"II*\0\xff\xff\xff\x7f", 422, "damaged_file"),
    ],
)
def test_images_that_are_refused(drawn: Drawn, content: bytes, status: int, code: str) -> None:
    refused = drawn.refuse(drawn.inspect, content)
    assert refused[:2] == (status, code)
    assert "input" not in refused[2], "it tells the server's path"
    assert drawn.refuse(drawn.render, content)[0] == status


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "HEIF", "AVIF", "BMP"])
def test_images_that_are_cut_off(drawn: Drawn, kind: str) -> None:
    content = saved(Image.effect_noise((600, 400), 90), kind)
    status, code, _ = drawn.refuse(drawn.render, content[: len(content) // 2])
    assert (status, code) in ((422, "damaged_page"), (422, "damaged_file"))


def test_an_image_within_the_limit_that_wants_too_much_memory(drawn: Drawn) -> None:
    small = Renderer(1, memory_mib=300)

    async def refused() -> DocumentError:
        async with small:
            with pytest.raises(DocumentError) as caught:
                await small.render(*drawn.file(bad_files.png_that_says(9_000, 9_000)), 1)
            assert (await small.render(*drawn.file(bad_files.image("PNG")), 1)).width == 600
        return caught.value

    error = drawn.run(refused())
    assert (error.status, error.code) == (422, "out_of_memory")
    assert "300 MiB" in str(error)


def test_a_file_that_is_gone(drawn: Drawn, tmp_path: Path) -> None:
    for kind in (Kind.PDF, Kind.PNG):
        with pytest.raises(DocumentError, match="no longer there"):
            drawn.run(drawn.renderer.render(tmp_path / "gone", kind, 1))


# Figures


def test_crop(drawn: Drawn) -> None:
    page = drawn.render(saved(marked(), "PNG"))
    boxes = [(0, 0, 100, 80), (500, 300, 9999, 9999), (-50, -50, 10, 10), (30, 40, 30, 40), (5000, 5000, 6000, 6000)]
    figures = [Image.open(io.BytesIO(each)) for each in drawn.run(drawn.renderer.crop(page.image, boxes))]
    assert [figure.size for figure in figures] == [(100, 80), (100, 100), (10, 10), (1, 1), (1, 1)]
    assert {figure.format for figure in figures} == {"JPEG"}
    assert pixel(figures[0], 50, 40)[0] > 200
    assert pixel(figures[1], 50, 50)[2] > 200
    assert drawn.run(drawn.renderer.crop(page.image, [])) == []


def test_crops_have_a_limit(drawn: Drawn) -> None:
    refused = drawn.refuse(lambda: drawn.run(drawn.renderer.crop(bad_files.image("PNG"), [(0, 0, 9, 9)] * 501)))
    assert refused == (413, "too_many_figures", "the page has 501 boxes, and at most 500 are cut out")


# Processes


def workers() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "vllm_unified.documents.raster" in each.cmdline()]


def is_confined(worker: psutil.Process) -> bool:
    """Its libraries are loaded, and its work begins."""
    return worker.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)


def in_a_renderer(story: Callable[[Renderer], Awaitable[T]], processes: int = 2, **options: Any) -> T:
    """With none of the module's processes among the children."""

    async def told() -> T:
        async with Renderer(processes, **options) as renderer:
            return await story(renderer)

    return asyncio.run(told())


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A PDF that never ends, and one that is as it should be."""
    hostile, good = tmp_path / "hostile.pdf", tmp_path / "good.pdf"
    hostile.write_bytes(bad_files.pdf_that_takes_for_ever())
    good.write_bytes(prose("One.", "Two.", "Three."))
    return hostile, good


def test_a_page_that_takes_for_ever(files: tuple[Path, Path]) -> None:
    hostile, good = files

    async def story(renderer: Renderer) -> list[Any]:
        await renderer.render(good, Kind.PDF, 1)
        slow = asyncio.create_task(renderer.render(hostile, Kind.PDF, 1))
        pages = [await renderer.render(good, Kind.PDF, number) for number in (1, 2, 3)]
        ended = await asyncio.gather(slow, return_exceptions=True)
        return [*ended, *pages, await renderer.render(good, Kind.PDF, 3)]

    error, *pages = in_a_renderer(story, task_seconds=1.5)
    assert isinstance(error, DocumentError)
    assert (error.status, error.code) == (422, "too_slow"), error
    assert str(error) == "page 1 was given up: it took longer than 1.5 s"
    assert [page.text for page in pages] == ["One.", "Two.", "Three.", "Three."]


def test_a_process_that_is_killed_costs_its_page_alone(files: tuple[Path, Path]) -> None:
    hostile, good = files
    before = {each.pid for each in workers()}

    async def story(renderer: Renderer) -> list[Any]:
        hit = asyncio.create_task(renderer.render(hostile, Kind.PDF, 1))
        await asyncio.sleep(0)
        busy = await asyncio.to_thread(eventually, lambda: [each for each in workers() if each.pid not in before], 120)
        await asyncio.to_thread(eventually, lambda: is_confined(busy[0]), 120)
        started = busy[0].cpu_times().user
        await asyncio.to_thread(eventually, lambda: busy[0].cpu_times().user > started + 0.2, 120)
        await renderer.render(good, Kind.PDF, 1)
        others = [asyncio.create_task(renderer.render(good, Kind.PDF, number)) for number in (1, 2, 3)]
        busy[0].kill()
        return await asyncio.gather(hit, *others, return_exceptions=True)

    error, *pages = in_a_renderer(story)
    assert isinstance(error, DocumentError)
    assert (error.status, error.code) == (422, "render_crashed")
    assert "signal 9" in str(error)
    assert [page.text for page in pages] == ["One.", "Two.", "Three."]
    assert {each.pid for each in workers()} == before


def test_one_that_is_killed_at_rest_costs_nothing(files: tuple[Path, Path]) -> None:
    before = {each.pid for each in workers()}

    async def story(renderer: Renderer) -> list[str]:
        first = await renderer.render(files[1], Kind.PDF, 1)
        (worker,) = [each for each in workers() if each.pid not in before]
        worker.kill()
        await asyncio.to_thread(eventually, lambda: not worker.is_running(), 120)
        return [first.text, (await renderer.render(files[1], Kind.PDF, 2)).text]

    assert in_a_renderer(story, processes=1) == ["One.", "Two."]


def test_one_at_rest_keeps_no_file_open(files: tuple[Path, Path]) -> None:
    """It may have been deleted meanwhile."""
    before = {each.pid for each in workers()}

    async def story(renderer: Renderer) -> str:
        await renderer.render(files[1], Kind.PDF, 1)
        (worker,) = [each for each in workers() if each.pid not in before]
        await asyncio.to_thread(eventually, lambda: str(files[1]) not in opened_by(worker), 120)
        return (await renderer.render(files[1], Kind.PDF, 2)).text

    assert in_a_renderer(story, processes=1) == "Two."


def opened_by(process: psutil.Process) -> set[str]:
    return {file.path for file in process.open_files()}


@pytest.mark.parametrize("seconds", [0, 0.001, 0.01, 0.1, 0.5, 1.5])  # at its start, and at work
def test_a_task_that_is_cancelled_frees_its_place(files: tuple[Path, Path], seconds: float) -> None:
    hostile, good = files
    before = workers()

    async def story(renderer: Renderer) -> str:
        slow = asyncio.create_task(renderer.render(hostile, Kind.PDF, 1))
        await asyncio.sleep(seconds)
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert workers() == before
        return (await renderer.render(good, Kind.PDF, 2)).text

    assert in_a_renderer(story, processes=1) == "Two."


def open_files(pid: int) -> set[str]:
    return {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}


def test_what_a_process_has(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret")
    before = {each.pid for each in workers()}

    async def story(renderer: Renderer) -> None:
        with socket.socket() as door:
            door.bind(("127.0.0.1", 0))
            door.listen()
            door.set_inheritable(True)
            await renderer.render(files[1], Kind.PDF, 1)
            (worker,) = [each for each in workers() if each.pid not in before]
            assert not open_files(worker.pid) & {os.readlink(f"/proc/self/fd/{door.fileno()}")}
        assert "VLLM_API_KEY" not in worker.environ()
        assert worker.nice() > psutil.Process().nice() or worker.nice() == 19
        assert worker.rlimit(psutil.RLIMIT_AS) == (700 << 20, 700 << 20)
        assert is_confined(worker)

    in_a_renderer(story, processes=1, memory_mib=700)


def test_they_end_with_their_parent(files: tuple[Path, Path]) -> None:
    """Even at work, and the parent killed."""
    program = f"""
    import asyncio, sys
    from pathlib import Path
    from vllm_unified.documents.kinds import Kind
    from vllm_unified.documents.rendering import Renderer

    async def main():
        async with Renderer(2) as renderer:
            await renderer.inspect(Path({str(files[1])!r}), Kind.PDF)
            slow = asyncio.create_task(renderer.render(Path({str(files[0])!r}), Kind.PDF, 1))
            await asyncio.sleep(0.3)
            print("at work", flush=True)
            await slow

    asyncio.run(main())
    """
    argv = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"at work\n"
        children = psutil.Process(parent.pid).children()
        assert children
        parent.send_signal(signal.SIGKILL)
    psutil.wait_procs(children, timeout=120)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in children)


@pytest.mark.parametrize(("program", "why"), [("/bin/false", "exit status 1"), ("/nowhere", "No such file")])
def test_a_process_that_does_not_start(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, program: str, why: str
) -> None:
    monkeypatch.setattr(sys, "executable", program)

    async def story(renderer: Renderer) -> DocumentError:
        with pytest.raises(DocumentError) as caught:
            await renderer.render(files[1], Kind.PDF, 1)
        return caught.value

    error = in_a_renderer(story)
    assert (error.status, error.code) == (503, "renderer_unavailable")
    assert why in str(error)


def test_no_more_files_can_be_opened(files: tuple[Path, Path]) -> None:
    async def story(renderer: Renderer) -> DocumentError:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, most[1]))
        try:
            with pytest.raises(DocumentError) as caught:
                await renderer.render(files[1], Kind.PDF, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, most)
        return caught.value

    error = in_a_renderer(story)
    assert (error.status, error.code) == (503, "renderer_unavailable")
    assert "Too many open files" in str(error)
