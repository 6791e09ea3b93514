"""What the router reads of a request's body, and the little that it may change there."""

import json
import zlib
from typing import Any

import msgspec
from python_multipart.multipart import MultipartParser, parse_options_header

from vllm_unified.router.problems import RequestError, too_large


class Asked(msgspec.Struct):
    """The fields of a JSON body that the router itself reads; the others are looked over, and not kept.

    UNSET is a field that is not there, None one that is null.
    """

    model: Any = msgspec.UNSET
    stream: Any = None
    stream_options: Any = msgspec.UNSET
    user: Any = None


_asked = msgspec.json.Decoder(Asked)
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def asked_in(body: bytes) -> Asked:
    """Raises RequestError 400 for what is not a JSON object."""
    try:
        if not body.isascii():
            body.decode("utf-8")
        return _asked.decode(body)
    except UnicodeDecodeError:
        raise RequestError(400, "the body is not UTF-8", code="invalid_encoding") from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deep", code="invalid_json") from None
    except msgspec.ValidationError:
        raise RequestError(400, "the body must be a JSON object", code="invalid_json") from None
    except msgspec.DecodeError as error:
        raise RequestError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def document_in(body: bytes) -> dict[str, Any]:
    """The whole body. Raises RequestError 400, also for what `asked_in` has passed over: numbers of 5,000 digits."""
    document = json_of(body)
    if not isinstance(document, dict):
        raise RequestError(400, "the body must be a JSON object", code="invalid_json")
    return document


def json_of(text: bytes) -> Any:
    """Raises RequestError 400."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def dumped(document: Any) -> bytes:
    """JSON as it is sent; half a surrogate pair stays what it was."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def with_fields(body: bytes, fields: dict[str, Any]) -> bytes:
    """The body with `fields` set; the others stay as they were written, to the last digit."""
    try:
        document = _raw_fields.decode(body)
    except (msgspec.DecodeError, RecursionError):  # half a surrogate pair, which Python takes
        return dumped({**document_in(body), **fields})
    for name, value in fields.items():
        document[name] = msgspec.Raw(dumped(value))
    return msgspec.json.encode(document)


def with_new_field(body: bytes, field: bytes) -> bytes:
    """The body of an object with `field`, as `"name":value`, behind its last one; for a name that is not there."""
    end = body.rindex(b"}")
    comma = b"" if body[:end].rstrip().endswith(b"{") else b","
    return b"%b%b%b}" % (body[:end], comma, field)


def decompressed(body: bytes, encoding: bytes, limit: int) -> bytes:
    """The body without its `content-encoding`. Raises RequestError 400, 413, 415; never makes more than `limit`."""
    name = encoding.strip().lower()
    if name not in (b"gzip", b"x-gzip", b"deflate"):
        message = f"the content-encoding {name[:40]!r} is not understood; send gzip, deflate or none"
        raise RequestError(415, message, code="unsupported_encoding")
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, as its head says
    try:
        plain = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise RequestError(400, f"the body is not {name.decode()}: {error}", code="invalid_encoding") from None
    if len(plain) > limit:
        raise too_large(limit)
    if not unpacker.eof or unpacker.unused_data:
        raise RequestError(400, f"the body is not whole {name.decode()}", code="invalid_encoding")
    return plain


class FormField:
    """A text field of a multipart form, and where its value stands in the body (None when it is not there)."""

    def __init__(self, body: bytes, content_type: bytes, name: str) -> None:
        """Raises RequestError 400 for what is not a form."""
        self.body = body
        self.name = name.encode("ascii")
        kind, options = parse_options_header(content_type)
        self.boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not self.boundary:
            raise RequestError(400, "the body must be multipart/form-data, with its boundary", code="invalid_form")
        self.start: int | None = None
        self.end = 0
        self._header = b""
        self._value = b""
        self._here = False
        try:
            parser = MultipartParser(self.boundary, self._callbacks())
            parser.write(body)
            parser.finalize()
        except ValueError as error:  # python_multipart's errors are such
            raise RequestError(400, f"the form can't be read: {error}", code="invalid_form") from None

    @property
    def value(self) -> str | None:
        return None if self.start is None else self.body[self.start : self.end].decode("utf-8", "replace")

    def replaced(self, value: str) -> bytes:
        """The whole body with another value."""
        if self.start is not None:
            return self.body[: self.start] + value.encode() + self.body[self.end :]
        disposition = b'content-disposition: form-data; name="%b"' % self.name
        return b"--%b\r\n%b\r\n\r\n%b\r\n%b" % (self.boundary, disposition, value.encode(), self.body)

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._part_begins,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_ends,
            "on_part_data": self._part_data,
        }

    def _part_begins(self) -> None:
        self._here = False

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._here = parse_options_header(self._value)[1].get(b"name") == self.name
            if self._here:  # of two the last counts, as it does for the server behind us
                self.start = None
        self._header = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._here:
            self.start = start if self.start is None else self.start
            self.end = end
