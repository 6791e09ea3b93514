"""A document as DOCX, written to disk as it comes.

python-docx makes the elements, the styles and everything about them; but it keeps a document in memory to save it, with
every figure, which for 3,000 pages is more than the service may have. So the body is streamed into the archive here.
"""

import io
import shutil
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO
from xml.sax.saxutils import quoteattr

import docx
from docx.opc.constants import RELATIONSHIP_TYPE
from docx.oxml.ns import nsmap, qn
from docx.oxml.parser import OxmlElement
from docx.oxml.shape import CT_Inline
from docx.shared import Emu, Length
from lxml import etree  # type: ignore[import-untyped]
from PIL import Image

from vllm_unified.documents.markdown import Cell, Paragraph, Span, Table, without_controls

# DOS's first day: an archive of the same document has the same bytes.
EPOCH = (1980, 1, 1, 0, 0, 0)
# Word opens no wider table.
MOST_WORD_COLUMNS = 63
HIGHEST_NUMBER = 32_767
DEEPEST_LIST = 8

# A4 with margins of an inch, in twentieths of a point.
_PAGE = '<w:pgSz w:w="11906" w:h="16838"/><w:pgMar w:top="1440" w:right="1440" w:bottom="1440" w:left="1440" \
w:header="720" w:footer="720" w:gutter="0"/>'
_TEXT_TWIPS = 11_906 - 2 * 1440
_EMU_PER_TWIP = 635
_FIGURE_WIDTH = _TEXT_TWIPS * _EMU_PER_TWIP
_FIGURE_HEIGHT = 12_000 * _EMU_PER_TWIP
# Pages are rendered at 144 dpi: figures come out as large as they were.
_EMU_PER_PIXEL = 914_400 // 144
_INDENT = 360

_SPACE = "{http://www.w3.org/XML/1998/namespace}space"
_BULLETS, _NUMBERS, _FIRST_NUM = 900, 901, 900
_MEDIA_TYPES = {"JPEG": ("jpg", "image/jpeg"), "PNG": ("png", "image/png"), "GIF": ("gif", "image/gif")}
_DOCUMENT, _RELATIONSHIPS = "word/document.xml", "word/_rels/document.xml.rels"
_TYPES, _NUMBERING = "[Content_Types].xml", "word/numbering.xml"


class WordDocument:
    """Takes the blocks of a document in order; `close` makes the file whole.

    `figure_of` gives the file of a linked figure, None where there is none; then its description stands there.
    Kept in memory: the path of each figure, each address that is linked, a number a list.
    """

    def __init__(self, file: BinaryIO, title: str, figure_of: Callable[[str], Path | None]) -> None:
        self._figure_of = figure_of
        self._template = docx.Document()
        self._template.core_properties.title = without_controls(title)[:255]
        self._template.core_properties.author = self._template.core_properties.comments = ""
        # Else Word takes Japanese fonts for what is Chinese, and another one where those lack a character.
        (language,) = self._template.styles.element.xpath("./w:docDefaults//w:lang")
        language.set(qn("w:eastAsia"), "zh-CN")
        self._links: dict[str, str] = {}
        self._media: dict[Path, _Medium | None] = {}
        self._drawn = 0
        # Of each numbered list the number it begins with; None stands for the one list of bullets.
        self._nums: list[int | None] = [None]
        # The list that is open at each depth, and the number that its next item has by itself.
        self._open_lists: dict[int, tuple[int, int]] = {}
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED)
        self._write(_TYPES, self._content_types())
        self._stack = ExitStack()
        entry = self._stack.enter_context(self._zip.open(_entry(_DOCUMENT), "w", force_zip64=True))
        self._xml = self._stack.enter_context(etree.xmlfile(entry, encoding="UTF-8"))
        self._xml.write_declaration(standalone=True)
        names = {prefix: nsmap[prefix] for prefix in ("w", "r", "wp", "a", "pic")}
        self._stack.enter_context(self._xml.element(qn("w:document"), nsmap=names))
        self._stack.enter_context(self._xml.element(qn("w:body")))

    def add(self, block: Paragraph | Table) -> None:
        if isinstance(block, Paragraph):
            self._xml.write(self._paragraph(block))
        elif block.columns > MOST_WORD_COLUMNS:
            for line in block.lines:
                self.add(line)
        else:
            self._add_table(block)

    def close(self) -> None:
        self._xml.write(etree.fromstring(f'<w:sectPr xmlns:w="{nsmap["w"]}">{_PAGE}</w:sectPr>'))
        self._stack.close()
        for path, medium in self._media.items():
            if medium is not None:
                self._copy(path, f"word/{medium.target}")
        self._add_numbering()
        saved = io.BytesIO()
        self._template.save(saved)
        with zipfile.ZipFile(saved) as template:
            for name in template.namelist():
                if name == _RELATIONSHIPS:
                    self._write(name, self._relationships(template.read(name)))
                elif name not in (_DOCUMENT, _TYPES):
                    self._write(name, template.read(name))
        self._zip.close()

    def abandon(self) -> None:
        """After an error: free what is open, whatever the file is then."""
        for close in (self._stack.close, self._zip.close):
            try:
                close()
            except (OSError, ValueError, etree.LxmlError):
                continue

    def _paragraph(self, paragraph: Paragraph) -> Any:
        element = _element("w:p")
        element.append(self._properties(paragraph))
        for span in paragraph.spans:
            element.append(self._run(span, is_code=paragraph.kind == "code"))
        return element

    def _properties(self, paragraph: Paragraph) -> Any:
        """In the order that the schema wants."""
        properties = _element("w:pPr")
        indent = _INDENT * (2 * paragraph.quoted + (paragraph.level if paragraph.kind != "heading" else 0))
        if paragraph.kind == "heading":
            properties.append(_element("w:pStyle", val=f"Heading{paragraph.level}"))
        elif paragraph.kind == "item":
            properties.append(_element("w:pStyle", val="ListParagraph"))
            properties.append(self._numbered(paragraph))
        elif paragraph.kind == "rule":
            border = _element("w:pBdr")
            border.append(_element("w:bottom", val="single", sz="6", space="1", color="A0A0A0"))
            properties.append(border)
        if paragraph.kind == "item":
            properties.append(_element("w:ind", left=str(indent), hanging=str(_INDENT)))
        elif indent:
            properties.append(_element("w:ind", left=str(indent)))
        if paragraph.align:
            properties.append(_element("w:jc", val=paragraph.align))
        return properties

    def _numbered(self, item: Paragraph) -> Any:
        depth = min(item.level, DEEPEST_LIST + 1) - 1
        numbered = _element("w:numPr")
        numbered.append(_element("w:ilvl", val=str(depth)))
        numbered.append(_element("w:numId", val=str(_FIRST_NUM + self._list_of(item, depth))))
        return numbered

    def _list_of(self, item: Paragraph, depth: int) -> int:
        """A new list wherever Word would count on otherwise than the page does."""
        if item.number is None:
            return 0
        which, expected = self._open_lists.get(depth, (0, -1))
        if item.begins or item.number != expected:
            which = len(self._nums)
            self._nums.append(min(item.number, HIGHEST_NUMBER))
        self._open_lists[depth] = which, item.number + 1
        return which

    def _run(self, span: Span, *, is_code: bool = False) -> Any:
        if span.image and (drawing := self._drawing(span)) is not None:
            run = _element("w:r")
            run.append(drawing)
            return run
        run = _element("w:r")
        run.append(_look(span, is_code=is_code))
        _add_text(run, without_controls(f"[{span.text or span.image}]" if span.image else span.text))
        if not span.href:
            return run
        link = _element("w:hyperlink")
        link.set(qn("r:id"), self._links.setdefault(span.href, f"link{len(self._links)}"))
        link.append(run)
        return link

    def _drawing(self, span: Span) -> Any:
        path = self._figure_of(span.image)
        if path is None:
            return None
        if path not in self._media:
            self._media[path] = _medium(path, len(self._media))
        medium = self._media[path]
        if medium is None:
            return None
        self._drawn += 1
        inline = CT_Inline.new_pic_inline(self._drawn, medium.relationship, path.name, medium.width, medium.height)
        if description := without_controls(span.text):
            inline.docPr.set("descr", description)
        drawing = _element("w:drawing")
        drawing.append(inline)
        return drawing

    def _add_table(self, table: Table) -> None:
        with self._xml.element(qn("w:tbl")):
            self._xml.write(_table_properties())
            self._xml.write(_columns(table.columns))
            headers = table.header_rows
            for row, cells in enumerate(table.rows):
                self._xml.write(self._row(row, cells, repeats=row < headers))
        # Word takes two tables with nothing between them for one.
        self._xml.write(_element("w:p"))

    def _row(self, row: int, cells: list[Cell], *, repeats: bool) -> Any:
        element = _element("w:tr")
        properties = _element("w:trPr")
        if repeats:
            properties.append(_element("w:tblHeader"))
        element.append(properties)
        for column, cell in enumerate(cells):
            if cell.column == column:
                element.append(self._cell(row, cell))
        return element

    def _cell(self, row: int, cell: Cell) -> Any:
        element = _element("w:tc")
        properties = _element("w:tcPr")
        element.append(properties)
        if cell.colspan > 1:
            properties.append(_element("w:gridSpan", val=str(cell.colspan)))
        if cell.rowspan > 1:
            properties.append(_element("w:vMerge", val="restart" if cell.row == row else "continue"))
        if cell.row == row:
            for paragraph in cell.paragraphs:
                element.append(self._paragraph(_in_cell(paragraph, cell)))
        if len(element) == 1:
            element.append(_element("w:p"))
        return element

    def _add_numbering(self) -> None:
        numbering = self._template.part.numbering_part.element
        first_num = numbering.find(qn("w:num"))
        for which, number_format in ((_BULLETS, "bullet"), (_NUMBERS, "decimal")):
            first_num.addprevious(_abstract_list(which, number_format))
        for which, start in enumerate(self._nums):
            numbering.append(_list(_FIRST_NUM + which, start))

    def _content_types(self) -> bytes:
        saved = io.BytesIO()
        self._template.save(saved)
        with zipfile.ZipFile(saved) as template:
            types = etree.fromstring(template.read(_TYPES))
        known = {default.get("Extension") for default in types}
        for extension, media_type in _MEDIA_TYPES.values():
            if extension not in known:
                default = etree.Element(f"{{{types.nsmap[None]}}}Default", Extension=extension, ContentType=media_type)
                types.insert(0, default)
        return _as_bytes(types)

    def _relationships(self, template: bytes) -> bytes:
        media = ((m.relationship, RELATIONSHIP_TYPE.IMAGE, m.target, "") for m in self._media.values() if m is not None)
        links = (
            (name, RELATIONSHIP_TYPE.HYPERLINK, address, ' TargetMode="External"')
            for address, name in self._links.items()
        )
        added = "".join(
            f'<Relationship Id="{name}" Type="{kind}" Target={quoteattr(target)}{mode}/>'
            for name, kind, target, mode in (*media, *links)
        )
        return template.replace(b"</Relationships>", added.encode() + b"</Relationships>")

    def _write(self, name: str, content: bytes) -> None:
        self._zip.writestr(_entry(name), content)

    def _copy(self, path: Path, name: str) -> None:
        entry = _entry(name)
        entry.compress_type = zipfile.ZIP_STORED
        entry.file_size = path.stat().st_size
        with path.open("rb") as source, self._zip.open(entry, "w") as target:
            shutil.copyfileobj(source, target)


class _Medium:
    def __init__(self, which: int, extension: str, width: int, height: int) -> None:
        scale = min(_EMU_PER_PIXEL, _FIGURE_WIDTH / width, _FIGURE_HEIGHT / height)
        self.relationship = f"figure{which}"
        self.target = f"media/figure{which}.{extension}"
        self.width: Length = Emu(max(1, int(width * scale)))
        self.height: Length = Emu(max(1, int(height * scale)))


def _medium(path: Path, which: int) -> _Medium | None:
    """None for a file that is no image, or of a kind that Word does not show."""
    try:
        with Image.open(path, formats=list(_MEDIA_TYPES)) as image:
            return _Medium(which, _MEDIA_TYPES[image.format or ""][0], image.width, image.height)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry


def _element(tag: str, **attributes: str) -> Any:
    element = OxmlElement(tag)
    for name, value in attributes.items():
        element.set(qn(f"w:{name}"), value)
    return element


def _add_text(run: Any, text: str) -> None:
    """As python-docx does it letter by letter, which takes ten times as long."""
    for which, line in enumerate(text.split("\n")):
        if which:
            run.append(_element("w:br"))
        if line:
            said = _element("w:t")
            said.text = line
            said.set(_SPACE, "preserve")
            run.append(said)


def _look(span: Span, *, is_code: bool) -> Any:
    """In the order that the schema wants."""
    look = _element("w:rPr")
    if is_code or "code" in span.styles:
        look.append(_element("w:rFonts", ascii="Courier New", hAnsi="Courier New", cs="Courier New"))
    for style, tag in (("strong", "w:b"), ("em", "w:i"), ("del", "w:strike")):
        if style in span.styles:
            look.append(_element(tag))
    if span.href:
        look.append(_element("w:color", val="0563C1"))
    if span.href or "u" in span.styles:
        look.append(_element("w:u", val="single"))
    for style, position in (("sup", "superscript"), ("sub", "subscript")):
        if style in span.styles:
            look.append(_element("w:vertAlign", val=position))
            break
    return look


def _in_cell(paragraph: Paragraph, cell: Cell) -> Paragraph:
    spans = paragraph.spans
    if cell.is_header:
        spans = tuple(span._replace(styles=span.styles | {"strong"}) for span in spans)
    return paragraph._replace(spans=spans, align=paragraph.align or cell.align)


def _table_properties() -> Any:
    properties = _element("w:tblPr")
    properties.append(_element("w:tblStyle", val="TableGrid"))
    properties.append(_element("w:tblW", type="auto", w="0"))
    return properties


def _columns(columns: int) -> Any:
    grid = _element("w:tblGrid")
    for _ in range(columns):
        grid.append(_element("w:gridCol", w=str(_TEXT_TWIPS // columns)))
    return grid


def _abstract_list(which: int, number_format: str) -> Any:
    levels = "".join(
        f'<w:lvl w:ilvl="{depth}"><w:start w:val="1"/><w:numFmt w:val="{number_format}"/>'
        f'<w:lvlText w:val="{"•" if number_format == "bullet" else f"%{depth + 1}."}"/><w:lvlJc w:val="left"/>'
        f'<w:pPr><w:ind w:left="{_INDENT * (depth + 1)}" w:hanging="{_INDENT}"/></w:pPr></w:lvl>'
        for depth in range(DEEPEST_LIST + 1)
    )
    return etree.fromstring(
        f'<w:abstractNum xmlns:w="{nsmap["w"]}" w:abstractNumId="{which}">'
        f'<w:multiLevelType w:val="hybridMultilevel"/>{levels}</w:abstractNum>'
    )


def _list(which: int, start: int | None) -> Any:
    override = "".join(
        f'<w:lvlOverride w:ilvl="{depth}"><w:startOverride w:val="{start}"/></w:lvlOverride>'
        for depth in range(DEEPEST_LIST + 1)
        if start is not None
    )
    return etree.fromstring(
        f'<w:num xmlns:w="{nsmap["w"]}" w:numId="{which}">'
        f'<w:abstractNumId w:val="{_BULLETS if start is None else _NUMBERS}"/>{override}</w:num>'
    )


def _as_bytes(element: Any) -> bytes:
    return bytes(etree.tostring(element, xml_declaration=True, encoding="UTF-8", standalone=True))
