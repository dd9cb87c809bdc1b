"""One part of a file, streamed from a multipart body to the spool: nothing of it is held in memory."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException

from adapters.errors import InvalidRequest
from adapters.spool import PartWriter
from serving.http.bodies import bounded_receive
from serving.http.threads import in_thread

DATA = "data"
_FIELDS = ("sha256",)
_MAX_FIELD_BYTES = 128
_MAX_HEADER_BYTES = 4096
_OVERHEAD_BYTES = 64 * 1024
"""What a multipart body may have beside the part itself."""
_WRITE_BYTES = 1 << 20


async def receive_part(request: Request, writer: PartWriter, max_bytes: int) -> dict[str, str]:
    """Write the file `data` of a multipart body to `writer`; the other fields.

    Raises HTTPException 413 at the first byte over `max_bytes`, InvalidRequest for a body that is not as it must be,
    StoreError where the disk fails.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind.lower() != b"multipart/form-data" or b"boundary" not in options:
        raise InvalidRequest(
            "content-type: expected multipart/form-data with a boundary.", param="content-type"
        )
    reader = _Reader(options[b"boundary"])
    stream = Request(request.scope, bounded_receive(request, max_bytes + _OVERHEAD_BYTES)).stream()
    async for chunk in stream:
        reader.feed(chunk)
        await _write(reader, writer, max_bytes, at_least=_WRITE_BYTES)
    reader.end()
    await _write(reader, writer, max_bytes, at_least=1)
    return reader.fields


async def _write(reader: _Reader, writer: PartWriter, max_bytes: int, *, at_least: int) -> None:
    if len(reader.data) < at_least:
        return
    if writer.num_bytes + len(reader.data) > max_bytes:
        raise HTTPException(413, f"The part is longer than the limit of {max_bytes} bytes.")
    data, reader.data = bytes(reader.data), bytearray()
    await in_thread(writer.write, data)


class _Reader:
    """The file `data`, as its bytes come, and the fields of a multipart body. Raises InvalidRequest."""

    def __init__(self, boundary: bytes) -> None:
        self.data = bytearray()
        self.fields: dict[str, str] = {}
        self._name = ""
        self._seen: set[str] = set()
        self._value = bytearray()
        self._header = [bytearray(), bytearray()]
        self._disposition = b""
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": self._collect(lambda: self._header[0]),
                "on_header_value": self._collect(lambda: self._header[1]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._part_begins,
                "on_part_data": self._collect(lambda: self.data if self._name == DATA else self._value),
                "on_part_end": self._part_ends,
                "on_end": self._body_ends,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Read on."""
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise _malformed("It is not valid.") from None
        if len(self._value) > _MAX_FIELD_BYTES or sum(map(len, self._header)) > _MAX_HEADER_BYTES:
            raise _malformed("A field or header is too long.")

    def end(self) -> None:
        """The body has ended."""
        if not self._ended:
            raise _malformed("It ends before its closing boundary.")
        if DATA not in self._seen:
            raise InvalidRequest("The body has no part of the name 'data'.", param=DATA)

    @staticmethod
    def _collect(target: Callable[[], bytearray]) -> Callable[[bytes, int, int], None]:
        return lambda data, start, end: target().extend(data[start:end])

    def _header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = [bytearray(), bytearray()]

    def _part_begins(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._disposition = b""
        self._name = options.get(b"name", b"").decode("latin-1")
        if self._name not in (DATA, *_FIELDS):
            raise InvalidRequest(
                f"{self._name[:40]!a}: not a field of a part; expected {DATA} and, if wanted, {', '.join(_FIELDS)}.",
                param="field",
            )
        if self._name in self._seen:
            raise InvalidRequest(f"The field {self._name!r} came twice.", param=self._name)
        self._seen.add(self._name)

    def _part_ends(self) -> None:
        if self._name != DATA:
            self.fields[self._name] = self._value.decode("latin-1")
            self._value = bytearray()

    def _body_ends(self) -> None:
        self._ended = True


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The multipart body can't be read. {why}", param="body", remedy="Let a library write it."
    )
