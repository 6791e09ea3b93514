"""Files that nobody should send, and somebody does; made when a test wants them."""

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping

import pikepdf
from PIL import Image

A4 = (595, 842)


def pdf(pages: int = 1, size: tuple[float, float] = A4, **objects: pikepdf.Object) -> pikepdf.Pdf:
    """Blank pages, and what its catalogue has besides."""
    made = pikepdf.new()
    for _ in range(pages):
        made.add_blank_page(page_size=size)
    for name, value in objects.items():
        made.Root[f"/{name}"] = value
    return made


def written(made: pikepdf.Pdf, password: str = "") -> bytes:
    file = io.BytesIO()
    made.save(file, encryption=pikepdf.Encryption(owner="owner", user=password) if password else False)
    return file.getvalue()


def raw_pdf(*objects: bytes) -> bytes:
    """The first one is the catalogue."""
    body, offsets = b"%PDF-1.7\n", []
    for number, value in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%b\nendobj\n" % (number, value)
    rows = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    end = b"xref\n0 %d\n0000000000 65535 f \n%btrailer\n<< /Root 1 0 R /Size %d >>\nstartxref\n%d\n%%%%EOF\n"
    return body + end % (size, rows, size, len(body))


def pdf_of_many_pages(pages: int) -> bytes:
    kids = b" ".join(b"%d 0 R" % number for number in range(3, pages + 3))
    tree = b"<< /Type /Pages /Count %d /Kids [ %b ] /MediaBox [0 0 100 100] >>" % (pages, kids)
    return raw_pdf(b"<< /Type /Catalog /Pages 2 0 R >>", tree, *[b"<< /Type /Page /Parent 2 0 R >>"] * pages)


def pdf_with_a_lost_page() -> bytes:
    """The second of three leads nowhere."""
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 300] >>"
    tree = b"<< /Type /Pages /Count 3 /Kids [ 3 0 R 99 0 R 4 0 R ] >>"
    return raw_pdf(b"<< /Type /Catalog /Pages 2 0 R >>", tree, page, page)


def pdf_that_takes_for_ever() -> bytes:
    """A form that draws another ten times, which draws another ten times, and so on: 10 billion rectangles.

    PDFium's memory grows with them, by some 400 MB a second.
    """

    def form(content: bytes, below: int) -> bytes:
        entries = b"/Type /XObject /Subtype /Form /BBox [0 0 600 600] /Resources << /XObject << /F %d 0 R >> >>" % below
        return b"<< %b /Length %d >>\nstream\n%b\nendstream" % (entries, len(content), content)

    first, depth = 4, 10
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 600] /Contents %d 0 R /Resources %b >>"
    forms = [form(b"/F Do " * 10, first + number + 1) for number in range(depth)]
    return raw_pdf(
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count 1 /Kids [ 3 0 R ] >>",
        page % (first, b"<< /XObject << /F %d 0 R >> >>" % first),
        *forms,
        form(b"0 0 600 600 re f", first + depth),
    )


def pdf_with_javascript_and_a_file() -> bytes:
    script = pikepdf.Dictionary(S=pikepdf.Name.JavaScript, JS="app.launchURL('http://127.0.0.1:9')")
    made = pdf(1, OpenAction=script)
    names = pikepdf.Array(["run", script])
    made.Root.Names = pikepdf.Dictionary(JavaScript=pikepdf.Dictionary(Names=names))
    made.attachments["virus.exe"] = b"MZ"
    return written(made)


def png_that_says(width: int, height: int) -> bytes:
    """A header, and next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def image(kind: str, size: tuple[int, int] = (600, 500), colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def zip_of(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def encrypted_zip() -> bytes:
    """Its members say so; what they hold is plain."""
    plain = bytearray(zip_of({"secret.pdf": b"%PDF-1.7"}))
    plain[6] |= 1
    plain[plain.index(b"PK\x01\x02") + 8] |= 1
    return bytes(plain)


def zip_with_a_link(name: str, target: str) -> bytes:
    file = io.BytesIO()
    link = zipfile.ZipInfo(name)
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(link, target)
        archive.writestr("good.png", image("PNG"))
    return file.getvalue()


def zip_bomb(mib: int, claim: int | None = None) -> bytes:
    """A BMP of zeros; `claim`: the size that its entry gives instead."""
    content = image("BMP")[:54] + bytes(mib << 20)
    archive = bytearray(zip_of({"bomb.bmp": content}))
    if claim is not None:
        for at in (22, archive.index(b"PK\x01\x02") + 24):
            archive[at : at + 4] = struct.pack("<I", claim)
    return bytes(archive)


def zip_with_many_entries(entries: int) -> bytes:
    """A central directory alone, which names one member again and again."""
    one = zip_of({"page.png": b"x"})
    start = one.index(b"PK\x01\x02")
    end = one.index(b"PK\x05\x06")
    directory = one[start:end] * entries
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, entries % 65536, entries % 65536, len(directory), start, 0)
    return one[:start] + directory + tail
