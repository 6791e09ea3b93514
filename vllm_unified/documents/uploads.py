"""Bytes from a client, as files on disk: streamed, within limits, all of them or none.

What a client calls a file is kept as a name to show; on disk it has one that nobody chose.
"""

import asyncio
import binascii
import contextlib
import hashlib
import io
import os
import stat
import struct
import tempfile
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, Protocol, Self, TypeVar

import msgspec
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from vllm_unified.documents.kinds import HEAD_BYTES, READABLE, Kind, kind_of, looks_like, require_kind
from vllm_unified.documents.problems import DocumentError, on_disk

S = TypeVar("S")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MIB = 1 << 20
MOST_PARTS = 100
TEXT_LIMIT = MIB  # bytes of a form's text fields together
FORM_ALLOWANCE = 4 * MIB  # bytes of a form that are not files: text, headers, boundaries
HEADER_LIMIT = 17 << 10  # bytes of a part's header: a name of 4,096 characters of four bytes each
MOST_PARAMETERS = 256  # of a part's header; the library's time grows with their square
NAMELESS = "document"
NAME_BYTES = 120
LONGEST_NAME = 512  # characters that are looked at
EXTENSION_BYTES = 16
DIRECTORY_LIMIT = MIB  # bytes of a ZIP's list of members, all of which is held in memory
CHUNK = 64 << 10
# A member of more than RATIO_FROM bytes is no document if they come of a 200th of them.
RATIO = 200
RATIO_FROM = 16 * MIB
ENCRYPTED, UTF8 = 0x1, 0x800  # flags of a ZIP's member
PLAIN_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # LZMA takes as much memory as the file says
DOCUMENTS_THAT_ARE_ZIPS = {
    "[Content_Types].xml": "an Office document; save it as PDF",
    "mimetype": "an OpenDocument or EPUB file; convert it to PDF",
}

WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³")}
UNWANTED = dict.fromkeys(map(ord, '<>:"|?*'), "_")  # of Windows
JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji
# Control, format (those that turn the direction of writing too), surrogate, private, line and paragraph separators.
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


class Upload(msgspec.Struct, frozen=True):
    """`name`: to show, and for the names of products; never a path. `size` in bytes, `sha256` in hexadecimal."""

    field: str
    name: str
    path: Path
    size: int
    sha256: str
    kind: Kind


class Form(msgspec.Struct, frozen=True):
    """`fields`: the last value of each name. `files`: as they came."""

    fields: dict[str, str]
    files: list[Upload]


class Unpacked(msgspec.Struct, frozen=True):
    """`skipped`: what of the ZIP is not read, each with its reason, in words for the client."""

    files: list[Upload]
    skipped: list[str]


def safe_name(given: str) -> str:
    """A file's name without folders, of 120 bytes of UTF-8 at most, that every file system takes; "document" for none.

    The extension is kept, and so are emoji and the letters of all scripts.
    """
    last = given.replace("\\", "/").rpartition("/")[2]
    if len(last) > LONGEST_NAME:  # normalising takes the square of its length, if it is made for that
        last = last[: LONGEST_NAME - EXTENSION_BYTES - 1] + last[-EXTENSION_BYTES - 1 :]
    normal = unicodedata.normalize("NFC", last.replace("\0", ""))
    visible = "".join(c for c in normal if c in JOINERS or unicodedata.category(c) not in INVISIBLE)
    name = visible.translate(UNWANTED).strip(". " + JOINERS)
    stem, dot, extension = name.rpartition(".")
    if not dot or len(extension.encode()) > EXTENSION_BYTES:
        stem, dot, extension = name, "", ""
    stem = _shortened(stem, NAME_BYTES - len((dot + extension).encode()) - 1)
    if stem.partition(".")[0].rstrip().upper() in WINDOWS_DEVICES:
        stem = f"_{stem}"
    return f"{stem}{dot}{extension}" or NAMELESS


def _shortened(text: str, size: int) -> str:
    """Characters that are cut in two go, and what is left dangling by it."""
    return text.encode()[:size].decode("utf-8", "ignore").rstrip(". " + JOINERS)


class Spool:
    """Files on their way to disk, `max_bytes` of them together; one is written at a time.

    As a context: what was written is removed when it ends in an error. Its methods block, and may be called from
    different threads.
    """

    def __init__(self, folder: Path, max_bytes: int, whole: str) -> None:
        """`whole`: what has the limit, in words for the client."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._whole = whole
        self._total = 0
        self._paths: list[Path] = []
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error:
            self.discard()

    @on_disk()
    def begin(self, field: str, name: str) -> None:
        """Raises DocumentError 507."""
        descriptor, path = tempfile.mkstemp(prefix="upload-", dir=self._folder)
        self._file = os.fdopen(descriptor, "wb")
        self._paths.append(Path(path))
        self._field, self._name = field, safe_name(name)
        self.size, self.head = 0, b""  # of the file that is being written
        self._hash = hashlib.sha256()

    @on_disk()
    def write(self, data: bytes) -> None:
        """Raises DocumentError 413, 507."""
        if self._file is None:
            raise RuntimeError("no file was begun")
        self.size += len(data)
        self._total += len(data)
        if self._total > self._max_bytes:
            raise too_large(self._whole, self._max_bytes)
        if len(self.head) < HEAD_BYTES:
            self.head = (self.head + data)[:HEAD_BYTES]
        self._hash.update(data)
        self._file.write(data)

    @on_disk()
    def end(self) -> Upload:
        """Raises DocumentError 400 for an empty file, 415 for one that is not read, 507."""
        self._close(durable=True)
        kind = require_kind(self.head, self._name)
        name = f"{self._name}{kind.extension}" if self._name == NAMELESS else self._name
        return Upload(self._field, name, self._paths[-1], self.size, self._hash.hexdigest(), kind)

    def drop(self) -> None:
        """The last file."""
        self._paths.pop().unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a full disk
            self._close()

    def discard(self) -> None:
        """All files."""
        while self._paths:
            self.drop()

    def _close(self, *, durable: bool = False) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with file:
                if durable:
                    file.flush()
                    os.fsync(file.fileno())


def too_large(whole: str, max_bytes: int) -> DocumentError:
    limit = f"{max_bytes / MIB:g} MiB" if max_bytes >= MIB else f"{max_bytes:,} bytes"
    return DocumentError(413, f"{whole} larger than {limit}, the limit; send less", code="too_large")


async def receive_form(request: Request, folder: Path, *, max_bytes: int, file_fields: Collection[str]) -> Form:
    """A multipart form, its files in `folder`, `max_bytes` of them together.

    Raises DocumentError: 400 invalid_form, incomplete_upload, unexpected_file, not_a_file, invalid_encoding,
    empty_file; 413 too_large, too_many_parts, fields_too_large; 415 unsupported_file, not_a_form; 507 no_space.
    """
    spool = Spool(folder, max_bytes, "the files are")
    reader = FormReader(request.headers.get("content-type", ""), spool, file_fields)
    return await _received(request, reader, spool, max_bytes, FORM_ALLOWANCE)


async def receive_body(request: Request, folder: Path, max_bytes: int) -> Upload:
    """A file that is the whole body. Raises DocumentError 400 empty_file, incomplete_upload; 413; 415; 507."""
    spool = Spool(folder, max_bytes, "the file is")
    return await _received(request, BodyReader(spool), spool, max_bytes, 0)


def save_base64(text: str, folder: Path, *, max_bytes: int, name: str = "") -> Upload:
    """A file in base64, or a data: URL of one. Blocks.

    Raises DocumentError 400 invalid_base64, empty_file; 413; 415; 507.
    """
    is_url = text[:5].lower() == "data:"
    head, comma, body = text.partition(",") if is_url else ("", "", text)
    if is_url and not (comma and head.rstrip().lower().endswith(";base64")):
        raise DocumentError(400, "the data: URL must be of base64: data:image/png;base64,…", code="invalid_base64")
    body = "".join(body.split())
    step = CHUNK * 4
    with Spool(folder, max_bytes, "the file is") as spool:
        spool.begin("", name)
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            try:
                spool.write(binascii.a2b_base64(piece + "=" * (-len(piece) % 4), strict_mode=True))
            except ValueError:
                message = f"the file is not base64, somewhere from character {start:,} on"
                raise DocumentError(400, message, code="invalid_base64") from None
        return spool.end()


def unpack(upload: Upload, folder: Path, *, max_files: int = 100, max_bytes: int) -> Unpacked:
    """The documents in a ZIP, in its order. Blocks.

    A member that is not read (of another kind, empty, damaged, a link, a ZIP itself) is listed, and the others go on;
    folders, hidden files and __MACOSX are passed over. The limits are of what really comes out.

    Raises DocumentError: 400 damaged_zip, encrypted_zip; 413 too_many_files, too_large, zip_bomb; 415 nothing_readable,
    unsupported_file; 507 no_space.
    """
    with open_zip(upload) as archive, Spool(folder, max_bytes, "the files in the ZIP are") as spool:
        unpacked = Unpacked([], [])
        for member in documents_in(archive, upload.name, max_files):
            try:
                unpacked.files.append(_unpacked(archive, member, upload, spool))
            except Skipped as reason:
                unpacked.skipped.append(f"{safe_name(member_name(member))} {reason}")
        if not unpacked.files:
            what = "; ".join(unpacked.skipped[:10]) or "it is empty"
            message = f"{upload.name} holds nothing that is read ({what}); what is read: {READABLE}"
            raise DocumentError(415, message, code="nothing_readable")
        return unpacked


class Reader(Protocol[T_co]):
    """Takes a body as it comes. Its methods block."""

    def feed(self, chunk: bytes) -> None: ...

    def end(self) -> T_co: ...


async def _received(request: Request, reader: Reader[T], spool: Spool, max_bytes: int, allowance: int) -> T:
    """What the reader makes of the body. Nothing is left of the spool's files if it fails."""
    # A task that is cancelled leaves its thread running: what that still writes has to be removed after it.
    lock = threading.Lock()

    def one_after_the_other(step: Callable[..., S], *arguments: Any) -> S:
        with lock:
            return step(*arguments)

    try:
        async for chunk in _limited(request, max_bytes, allowance):
            await asyncio.to_thread(one_after_the_other, reader.feed, chunk)
        return await asyncio.to_thread(one_after_the_other, reader.end)
    except BaseException:
        await asyncio.to_thread(one_after_the_other, spool.discard)
        raise


async def _limited(request: Request, max_bytes: int, allowance: int) -> AsyncIterator[bytes]:
    """The body's chunks. Raises DocumentError 413 as soon as it is clear, and 400 where the client leaves."""
    limit = max_bytes + allowance
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise too_large("the upload is", max_bytes)
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise too_large("the upload is", max_bytes)
            if chunk:
                yield chunk
    except ClientDisconnect:
        raise incomplete() from None


def incomplete() -> DocumentError:
    return DocumentError(400, "the upload stopped half-way; send it again", code="incomplete_upload")


class BodyReader:
    """One file."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._begun = False

    def feed(self, chunk: bytes) -> None:
        self._begin()
        self._spool.write(chunk)

    def end(self) -> Upload:
        self._begin()
        return self._spool.end()

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._spool.begin("", "")


class FormReader:
    """A multipart form."""

    def __init__(self, content_type: str, spool: Spool, file_fields: Collection[str]) -> None:
        """Raises DocumentError 415."""
        kind, options = parse_options_header(content_type[:1000])
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            message = "the body must be multipart/form-data, with its boundary"
            raise DocumentError(415, message, code="not_a_form")
        self._spool = spool
        self._file_fields = file_fields
        self._fields: dict[str, str] = {}
        self._files: list[Upload] = []
        self._parts = 0
        self._text_size = 0
        self._complete = False
        try:
            self._parser = MultipartParser(options[b"boundary"], self._callbacks(), max_header_size=HEADER_LIMIT)
        except ValueError as error:
            raise invalid_form(str(error)) from None

    def feed(self, chunk: bytes) -> None:
        """Raises DocumentError."""
        try:
            self._parser.write(chunk)
        except ValueError as error:  # python_multipart's errors are such
            raise invalid_form(str(error)) from None

    def end(self) -> Form:
        """Raises DocumentError 400 where the last boundary did not come."""
        if not self._complete:
            raise incomplete()
        return Form(self._fields, self._files)

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._part_begins,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_ends,
            "on_headers_finished": self._content_begins,
            "on_part_data": self._content,
            "on_part_end": self._part_ends,
            "on_end": self._completed,
        }

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise DocumentError(413, f"the form has more than {MOST_PARTS} parts, the limit", code="too_many_parts")
        self._header = self._value = self._disposition = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _content_begins(self) -> None:
        if self._disposition.count(b";") > MOST_PARAMETERS:
            raise invalid_form("a part's content-disposition has too many parameters")
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise invalid_form("a part has no name")
        self._field = options[b"name"].decode("utf-8", "replace")
        self._filename = options[b"filename"].decode("utf-8", "replace") if b"filename" in options else None
        self._text = bytearray()
        if self._filename is not None:
            self._check_file_field()
            self._spool.begin(self._field, self._filename)

    def _content(self, data: bytes, start: int, end: int) -> None:
        if self._filename is not None:
            self._spool.write(data[start:end])
            return
        self._text_size += end - start
        if self._text_size > TEXT_LIMIT:
            message = f"the form's text is larger than {TEXT_LIMIT / MIB:g} MiB, the limit"
            raise DocumentError(413, message, code="fields_too_large")
        self._text += data[start:end]

    def _part_ends(self) -> None:
        if self._filename is None:
            self._text_ends()
        elif self._filename or self._spool.size:
            self._files.append(self._spool.end())
        else:  # a browser's, where no file was chosen
            self._spool.drop()

    def _text_ends(self) -> None:
        name = self._field[:100]
        if self._field in self._file_fields:
            if self._text:
                message = f'the field "{name}" must be a file: send it with a filename'
                raise DocumentError(400, message, code="not_a_file")
            return
        try:
            self._fields[self._field] = self._text.decode()
        except UnicodeDecodeError:
            raise DocumentError(400, f'the field "{name}" is not UTF-8', code="invalid_encoding") from None

    def _check_file_field(self) -> None:
        if self._field not in self._file_fields:
            known = ", ".join(f'"{field}"' for field in self._file_fields)
            message = f'the field "{self._field[:100]}" holds a file; files go in {known}'
            raise DocumentError(400, message, code="unexpected_file")

    def _completed(self) -> None:
        self._complete = True


def invalid_form(why: str) -> DocumentError:
    return DocumentError(400, f"the form can't be read: {why}", code="invalid_form")


class Skipped(Exception):
    """A member of a ZIP that is not read; the message goes on from its name."""


class ZipOnDisk(io.FileIO):
    """zipfile reads the whole list of members at once, however long the file says that it is."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > DIRECTORY_LIMIT:
            message = f"the ZIP's list of members is larger than {DIRECTORY_LIMIT / MIB:g} MiB, the limit"
            raise DocumentError(413, message, code="too_many_files")
        return super().read(size)


@contextlib.contextmanager
def open_zip(upload: Upload) -> Iterator[zipfile.ZipFile]:
    with ZipOnDisk(upload.path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error):
            message = f"{upload.name} is damaged: it is cut off, or no ZIP behind its header"
            raise DocumentError(400, message, code="damaged_zip") from None
        with archive:
            yield archive


def documents_in(archive: zipfile.ZipFile, name: str, max_files: int) -> list[zipfile.ZipInfo]:
    """Those that may be documents. Raises DocumentError 400, 413, 415."""
    for member, words in DOCUMENTS_THAT_ARE_ZIPS.items():
        if member in archive.NameToInfo:
            raise DocumentError(415, f"{name} is {words}", code="unsupported_file")
    members = [each for each in archive.infolist() if not (each.is_dir() or is_hidden(each))]
    if len(members) > max_files:
        message = f"{name} holds {len(members):,} files, and at most {max_files} are read; split it"
        raise DocumentError(413, message, code="too_many_files")
    if locked := next((each for each in members if each.flag_bits & ENCRYPTED), None):
        message = f"{safe_name(member_name(locked))} in {name} is encrypted; send it unencrypted"
        raise DocumentError(400, message, code="encrypted_zip")
    return members


def is_hidden(member: zipfile.ZipInfo) -> bool:
    parts = PurePosixPath(member.filename.replace("\\", "/")).parts
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts)


def member_name(member: zipfile.ZipInfo) -> str:
    """zipfile reads names as DOS wrote them, where no flag says UTF-8; macOS writes UTF-8 and no flag."""
    if not member.flag_bits & UTF8:
        with contextlib.suppress(UnicodeError):
            return member.filename.encode("cp437").decode()
    return member.filename


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, upload: Upload, spool: Spool) -> Upload:
    """Raises Skipped, and DocumentError 413."""
    if stat.S_ISLNK(member.external_attr >> 16):
        raise Skipped("is a link")
    if member.compress_type not in PLAIN_METHODS:
        raise Skipped("is compressed in a way that is not read; use deflate")
    spool.begin(upload.field, member_name(member))
    try:
        for piece in _content(archive, member):
            spool.write(piece)
            if spool.size > max(RATIO_FROM, RATIO * member.compress_size):
                message = f"{upload.name} is a decompression bomb: it holds far more than it weighs"
                raise DocumentError(413, message, code="zip_bomb")
        check_kind(spool.head)
        return spool.end()
    except Skipped:
        spool.drop()
        raise


def check_kind(head: bytes) -> None:
    """Raises Skipped."""
    kind = kind_of(head)
    if kind is Kind.ZIP:
        raise Skipped("is a ZIP within the ZIP; send it by itself")
    if kind is None:
        raise Skipped(f"is {looks_like(head)}" if head else "is empty")


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with archive.open(member) as file:
            while piece := file.read(CHUNK):
                yield piece
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError, RuntimeError):
        raise Skipped("is damaged") from None
