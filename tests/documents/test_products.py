"""Products as their readers read them: DOCX by python-docx, PDF by pdfium, archives by zipfile, HTML by lxml."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docx
import lxml.html  # type: ignore[import-untyped]
import pypdfium2 as pdfium
import pytest
from docx.table import Table
from docx.text.paragraph import Paragraph
from PIL import Image

from vllm_unified.documents import products as module
from vllm_unified.documents.layout import write_layout
from vllm_unified.documents.options import Format
from vllm_unified.documents.page import Block, Page
from vllm_unified.documents.products import Products, name_for, write_products

ALL: tuple[Format, ...] = ("markdown", "html", "docx", "text", "json")
FIGURE = "images/page-1-img-1.jpg"
MARKDOWN = f"""# Report

**Bold**, *italic*, `code`, H<sub>2</sub>O, [a link](https://a.example/?a=1&b=2).

2. two
5. five
   - inner

![Sales]({FIGURE})

<table><tr><th rowspan=2>A</th><th colspan=2>B</th></tr><tr><th>C</th><th>D</th></tr>
<tr><td>1</td><td>2</td></tr></table>
"""
PAGES = (
    Page(
        1,
        600,
        800,
        MARKDOWN,
        "<|ref|>title<|/ref|>\x00",
        (
            Block("title", "# Report", ((60, 80, 300, 160),)),
            Block("image", "", ((60, 400, 300, 600), (310, 400, 540, 600)), asset=FIGURE),
        ),
    ),
    Page(2, source="nothing", reason="it repeats itself", warnings=("truncated",)),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (288, 144), "orange").save(tmp_path / FIGURE)
    Image.new("RGB", (600, 800), "white").save(tmp_path / "page.png")
    return tmp_path


def write(folder: Path, *joined: str, formats: tuple[Format, ...] = ALL, name: str = "Q1 报告.pdf") -> Products:
    return write_products(
        folder,
        name=name,
        pages=lambda: iter(PAGES),
        joined=lambda: iter(joined or (MARKDOWN,)),
        formats=formats,
        image_of=lambda number: folder / "page.png" if number == 1 else None,
    )


def test_what_every_document_has_and_what_was_asked_for(folder: Path) -> None:
    assert write(folder, formats=("markdown",)) == Products(
        ("result.md", "raw.json", "layout.pdf", "result.zip"), (FIGURE,)
    )
    assert write(folder).files == module.PRODUCTS
    assert {path.name for path in folder.iterdir()} == {*module.PRODUCTS, "images", "page.png"}


def test_a_second_run_writes_the_same_bytes(folder: Path) -> None:
    write(folder)
    first = {file: (folder / file).read_bytes() for file in module.PRODUCTS}
    write(folder)
    assert [file for file in first if (folder / file).read_bytes() != first[file]] == []


def test_a_run_that_fails_leaves_what_was_there(folder: Path) -> None:
    write(folder)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def failing() -> Iterator[str]:
        yield "# New"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_products(
            folder,
            name="a",
            pages=lambda: iter(PAGES),
            joined=failing,
            formats=ALL,
            image_of=lambda number: None,
        )
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_pieces_are_set_apart_in_result_md(folder: Path) -> None:
    write(folder, "one\n", "\ntwo", "half a pair \ud800")
    assert (folder / "result.md").read_text() == "one\n\ntwo\n\nhalf a pair ?\n"


def test_raw_json_has_what_older_clients_read(folder: Path) -> None:
    write(folder)
    first, second = json.loads((folder / "raw.json").read_text())["pages"]
    assert (first["index"], first["page_number"], first["markdown"]) == (0, 1, MARKDOWN)
    assert first["raw_text"] == "<|ref|>title<|/ref|>\x00"
    assert first["boxes"][0] == {"label": "title", "box": [60, 80, 300, 160]}
    assert [box["label"] for box in first["boxes"]] == ["title", "image", "image"]
    assert first["image_assets"] == [FIGURE]
    assert first["blocks"][0]["shares"] == [[0.1, 0.1, 0.5, 0.2]]
    assert (second["source"], second["reason"], second["warnings"]) == ("nothing", "it repeats itself", ["truncated"])


def test_raw_json_of_half_a_surrogate_pair(folder: Path) -> None:
    write_products(
        folder,
        name="a",
        pages=lambda: iter([Page(1, raw_text="\ud800")]),
        joined=lambda: iter([""]),
        formats=(),
        image_of=lambda number: None,
    )
    assert json.loads((folder / "raw.json").read_text())["pages"][0]["raw_text"] == "\ud800"


def test_the_archive(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "images/page-10-img-1.jpg")
    Image.new("RGB", (8, 8)).save(folder / "images/page-2-img-1.jpg")
    (folder / "images/page-3-img-1.jpg").symlink_to("/etc/hostname")
    (folder / "images/note.txt").write_text("not a figure")
    write(folder)
    with zipfile.ZipFile(folder / "result.zip") as archive:
        assert archive.testzip() is None
        names = ["result.md", "raw.json", "Q1 报告.html", "Q1 报告.docx", "Q1 报告.txt"]
        images = [FIGURE, "images/page-2-img-1.jpg", "images/page-10-img-1.jpg"]
        assert archive.namelist() == names + images
        assert archive.read("result.md") == (folder / "result.md").read_bytes()


@pytest.mark.parametrize(
    ("uploaded", "expected"),
    [
        ("report.pdf", "report.md"),
        ("../../etc/passwd", "passwd.md"),
        ("..\\..\\boot.ini", "boot.md"),
        ("a\x00b.pdf", "ab.md"),
        ("", "document.md"),
        ("..", "document.md"),
        (".pdf", "pdf.md"),
        ("😀.pdf", "😀.md"),
        ("x" * 4096 + ".pdf", "x" * 100 + ".md"),
        ("報" * 4096, "報" * 33 + ".md"),
        ("con.pdf", "_con.md"),
        ('a"b<c>|d?.pdf', "a_b_c__d_.md"),
        ("half\ud800.pdf", "half.md"),
        ("a\r\nb.pdf", "a__b.md"),
    ],
)
def test_names_follow_the_upload(uploaded: str, expected: str) -> None:
    assert name_for("result.md", uploaded) == expected


def test_docx_is_real(folder: Path) -> None:
    write(folder)
    document = docx.Document(str(folder / "result.docx"))
    blocks = [block for block in document.iter_inner_content() if isinstance(block, Table) or block._p.xpath(".//w:r")]
    heading, prose, two, five, inner, figure, table = blocks
    assert isinstance(heading, Paragraph)
    assert isinstance(prose, Paragraph)
    assert isinstance(table, Table)
    assert heading.style is not None
    assert (heading.style.name, heading.text) == ("Heading 1", "Report")
    looks = {run.text: (run.bold, run.italic, run.font.name, run.font.subscript) for run in prose.runs}
    assert looks["Bold"][0]
    assert looks["italic"][1]
    assert looks["code"][2] == "Courier New"
    assert looks["2"][3]
    assert [link.address for link in prose.hyperlinks] == ["https://a.example/?a=1&b=2"]
    assert [_number(document, item) for item in (two, five, inner)] == ["2", "5", None]
    assert len(document.inline_shapes) == 1
    assert (document.inline_shapes[0].width.inches, document.inline_shapes[0].height.inches) == (2, 1)
    assert isinstance(figure, Paragraph)
    # Its last row was cut short by the model.
    assert [[cell.text for cell in row.cells] for row in table.rows] == [
        ["A", "B", "B"],
        ["A", "C", "D"],
        ["1", "2", ""],
    ]
    assert document.core_properties.title == "Q1 报告.pdf"


def _number(document: Any, item: Any) -> str | None:
    """What its list begins with; None of bullets."""
    number = item._p.pPr.numPr.numId.val
    (found,) = document.part.numbering_part.element.xpath(f"./w:num[@w:numId='{number}']")
    starts = found.xpath("./w:lvlOverride[1]/w:startOverride/@w:val")
    return starts[0] if starts else None


@pytest.mark.parametrize(
    "markdown",
    [
        "a\x00b\x0b\ud800 &#11; &#0;",
        "![gone](images/page-9-img-9.jpg) ![bad](images/broken.jpg) ![x](http://a.example/x.png)",
        "# " * 3000,
        "[a](<https://a.example/\"'<&>) [b](https://a.example/\x0b)",
        "<table><tr>" + "<td>x</td>" * 80 + "</tr></table>",
        "<table><tr><td></td></tr></table><table></table>",
        "99999999. a",
        "> - 1. > - deep\n" + "".join(" " * 2 * depth + "- x\n" for depth in range(30)),
        "",
    ],
)
def test_a_docx_opens_whatever_the_markdown(folder: Path, markdown: str) -> None:
    (folder / "images/broken.jpg").write_bytes(b"no image")
    write(folder, markdown, name="a\x00<b>&.pdf")
    document = docx.Document(str(folder / "result.docx"))
    assert "\x00" not in document.core_properties.title
    assert lxml.html.parse(str(folder / "result.html")).getroot().tag == "html"


def test_html_needs_nothing_but_itself(folder: Path) -> None:
    write(folder, MARKDOWN + "<script>alert(1)</script>", name="</title><script>alert(1)</script>.pdf")
    page = (folder / "result.html").read_text()
    root = lxml.html.document_fromstring(page)
    assert root.xpath("//script") == []
    (source,) = root.xpath("//img/@src")
    kind, _, data = source.partition(",")
    assert (kind, base64.b64decode(data)) == ("data:image/jpeg;base64", (folder / FIGURE).read_bytes())
    (policy,) = root.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"style-src 'sha256-{digest}'" in policy


def test_html_links_figures_that_are_too_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES_OF_FIGURES", (folder / FIGURE).stat().st_size)
    write(folder, f"![a]({FIGURE})", f"![b]({FIGURE}) ![c](images/page-9-img-9.jpg)")
    sources = lxml.html.parse(str(folder / "result.html")).getroot().xpath("//img/@src")
    assert sources[0].startswith("data:")
    assert sources[1:] == [FIGURE, "images/page-9-img-9.jpg"]


def test_layout_shows_each_page_and_its_boxes(folder: Path) -> None:
    write(folder)
    layout = pdfium.PdfDocument(folder / "layout.pdf")
    try:
        assert len(layout) == 2
        first, second = layout[0], layout[1]
        assert first.get_size() == pytest.approx((631.5, 842))
        assert "1 title" in first.get_textpage().get_text_range()
        assert "2 image" in first.get_textpage().get_text_range()
        assert "page 2: could not be read; it repeats itself" in second.get_textpage().get_text_range()
        shown = first.render(scale=600 / 631.5).to_pil().convert("RGB")
        red, green, blue = shown.getpixel((60, 120))
        assert red > 150 > green
        assert green == pytest.approx(blue, abs=10)
        assert shown.getpixel((180, 130)) == (255, 255, 255)
    finally:
        layout.close()


def test_layout_numbers_the_further_boxes_of_a_block_beside_them(tmp_path: Path) -> None:
    """Above them is the text of the box before."""
    page = Page(1, 600, 842, blocks=(Block("text", "", ((100, 100, 500, 120), (100, 120, 500, 140))),))
    with (tmp_path / "layout.pdf").open("wb") as file:
        write_layout(file, [page], lambda number: None)
    layout = pdfium.PdfDocument(tmp_path / "layout.pdf")
    try:
        shown = layout[0].render().to_pil().convert("RGB")
        assert shown.getpixel((102, 97)) != (255, 255, 255)
        assert shown.getpixel((98, 122)) != (255, 255, 255)
        assert shown.crop((102, 102, 498, 118)).getcolors() == [(396 * 16, (255, 255, 255))]
    finally:
        layout.close()


@pytest.mark.parametrize(
    "page",
    [
        Page(1, 600, 800, blocks=(Block("标题 \\( )\n", "", ((0, 0, 600, 800),)),)),
        Page(1, 600, 800, blocks=tuple(Block("text", "", ((0, 0, 1, 1),)) for _ in range(10_000))),
        Page(1, 100_000, 10, blocks=(Block("text", "", ((0, 0, 10, 10),)),)),
        Page(1, 0, 0, blocks=(Block("text", "", ((0, 0, 10, 10),)),)),
    ],
)
@pytest.mark.parametrize("image", [b"", b"no image", None])
def test_layout_of_odd_pages(folder: Path, page: Page, image: bytes | None) -> None:
    (folder / "odd.jpg").write_bytes(image or b"")
    write_products(
        folder,
        name="a",
        pages=lambda: iter([page]),
        joined=lambda: iter([""]),
        formats=(),
        image_of=lambda number: None if image is None else folder / "odd.jpg",
    )
    layout = pdfium.PdfDocument(folder / "layout.pdf")
    try:
        assert max(layout[0].get_size()) == pytest.approx(842)
    finally:
        layout.close()


def test_a_document_of_no_pages_has_no_layout(folder: Path) -> None:
    products = write_products(
        folder, name="a", pages=lambda: iter(()), joined=lambda: iter(()), formats=(), image_of=lambda number: None
    )
    assert products.files == ("result.md", "raw.json", "result.zip")


MEGABYTE = 1 << 20
WRITE_MANY = """
import re, sys
from pathlib import Path
from vllm_unified.documents.page import Block, Page
from vllm_unified.documents.products import write_products
folder, count = Path(sys.argv[1]), int(sys.argv[2])
text = "## Part\\n\\n" + "Some **bold** prose of a page, and more of it.\\n\\n" * 4 + "![f](images/page-1-img-1.jpg)"
block = Block("text", text, ((10, 10, 500, 300),))
write_products(
    folder, name="a", joined=lambda: (text for _ in range(count)), formats=("html", "docx", "text"),
    pages=lambda: (Page(n, 600, 800, text, "r" * 20_000, (block,)) for n in range(1, count + 1)),
    image_of=lambda number: folder / "page.jpg",
)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_pages(folder: Path) -> None:
    noise = Image.effect_noise((600, 800), 100)
    noise.save(folder / "page.jpg", quality=95)
    assert (folder / "page.jpg").stat().st_size > MEGABYTE // 4
    shutil.copy(folder / "page.jpg", folder / FIGURE)
    peaks = []
    for count in ("40", "200"):
        command = [sys.executable, "-c", WRITE_MANY, str(folder), count]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True).stdout) * 1024)
    # The images alone are 40 MB and more of the difference.
    assert peaks[1] - peaks[0] < 24 * MEGABYTE
    assert (folder / "layout.pdf").stat().st_size > 40 * MEGABYTE
