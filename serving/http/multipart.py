"""What an upload consists of, read from a multipart body, or from a JSON one that names files sent before."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import Request
from pydantic_core import from_json, to_json
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from adapters.errors import InvalidRequest
from adapters.names import check_name
from adapters.parity import MAX_RECORD_BYTES, ParityRecord, read_record
from serving.http.bodies import JsonRequest, bounded_receive

MAX_FILES = 8
MAX_LABELS = 32
MAX_LABEL_CHARS = 256
MAX_JSON_BYTES = 256 << 10
"""Of a JSON body: every field at its largest, twice over. Eight megabytes of lists take half a second to parse."""
_MAX_FIELD_BYTES = MAX_RECORD_BYTES  # the largest of the fields
_FIELDS = ("alias", "backbone_digest", "file_ids", "labels", "lineage", "parity", "signature")


@dataclass(frozen=True, slots=True)
class Parts:
    """What an upload's body holds: its files by name, the ids of others sent before, and the optional fields.

    `fields`: as they came, for comparing one upload with another.
    """

    files: Mapping[str, bytes]
    fields: Mapping[str, str]
    file_ids: tuple[str, ...] = ()
    backbone_digest: str | None = None
    alias: str | None = None
    parity: ParityRecord | None = None
    signature: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)

    def content(self) -> Iterator[bytes]:
        """What makes two uploads the same one."""
        for name, data in sorted(self.files.items()):
            yield f"file {name}".encode()
            yield hashlib.sha256(data).digest()
        for name, text in sorted(self.fields.items()):
            yield f"field {name}".encode()
            yield text.encode()


async def receive_parts(request: Request, max_bytes: int) -> Parts:
    """Read a body of at most `max_bytes`, a JSON one of MAX_JSON_BYTES; large parts wait on disk, not in memory.

    Raises HTTPException 413 at the first excess byte, InvalidRequest for parts that no upload has.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        receive = bounded_receive(request, min(max_bytes, MAX_JSON_BYTES))
        return _parts({}, await _json_fields(JsonRequest(request.scope, receive, max_values=MAX_JSON_BYTES)))
    if kind != "multipart/form-data":
        raise InvalidRequest(
            "content-type: expected multipart/form-data, or application/json with file_ids.",
            param="content-type",
            remedy="Send each file as a part whose file name says what it is, like adapter_config.json.",
        )
    files: dict[str, bytes] = {}
    fields: dict[str, str] = {}
    form = await _parse(Request(request.scope, bounded_receive(request, max_bytes)))
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                key = value.filename or ""
                _once(key, files, "file")
                files[key] = await value.read()
            else:
                _once(name, fields, "field")
                fields[name] = value
    finally:
        await form.close()
    return _parts(files, fields)


async def _json_fields(request: JsonRequest) -> dict[str, str]:
    body = await request.json()
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", param="body")
    given = {name: value for name, value in body.items() if value is not None}
    return {name: v if isinstance(v, str) else to_json(v).decode() for name, v in given.items()}


def _parts(files: Mapping[str, bytes], fields: Mapping[str, str]) -> Parts:
    if unknown := sorted(set(fields) - set(_FIELDS)):
        raise InvalidRequest(
            f"{unknown[0][:40]!a}: not a field of an upload; expected {', '.join(_FIELDS)}.",
            param="field",
            remedy="A file needs a file name in its part.",
        )
    return Parts(
        files,
        fields,
        file_ids=_file_ids(fields.get("file_ids") or "[]"),
        backbone_digest=fields.get("backbone_digest") or None,
        alias=check_name(fields["alias"], what="alias") if fields.get("alias") else None,
        parity=read_record(fields["parity"]) if fields.get("parity") else None,
        signature=fields.get("signature") or None,
        labels=_strings("labels", fields.get("labels") or "{}"),
        lineage=_strings("lineage", fields.get("lineage") or "{}"),
    )


class _Parser(MultiPartParser):
    """A parser that knows whether it has seen the closing boundary: without it, the body was cut short."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


async def _parse(request: Request) -> FormData:
    async def whole() -> AsyncGenerator[bytes, None]:
        async with aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                yield chunk
        if not parser.ended:  # raised in here, where the parser closes the files that it has begun
            raise MultiPartException("It ends before its closing boundary.")

    parser = _Parser(
        request.headers, whole(), max_files=MAX_FILES, max_fields=len(_FIELDS), max_part_size=_MAX_FIELD_BYTES
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(
            f"The multipart body can't be read. {error.message}",
            param="body",
            remedy="Let a library write it.",
        ) from None


def _once(key: str, seen: Mapping[str, object], what: str) -> None:
    if key in seen:
        raise InvalidRequest(f"The {what} {key[:40]!a} came twice.", param=what, remedy="Send it once.")


def _file_ids(text: str) -> tuple[str, ...]:
    try:
        ids = from_json(text)
    except ValueError:
        ids = None
    if not isinstance(ids, list) or len(ids) > MAX_FILES or not all(isinstance(item, str) for item in ids):
        raise InvalidRequest(
            f"file_ids: expected a JSON list of at most {MAX_FILES} ids of files.", param="file_ids"
        )
    return tuple(ids)


def _strings(name: str, text: str) -> Mapping[str, str]:
    try:
        found = from_json(text, allow_inf_nan=False)
    except ValueError:
        found = None
    if (
        not isinstance(found, dict)
        or len(found) > MAX_LABELS
        or not all(isinstance(value, str) for value in found.values())
        or any(len(part) > MAX_LABEL_CHARS for item in found.items() for part in item)
    ):
        raise InvalidRequest(
            f"{name}: expected a JSON object of at most {MAX_LABELS} strings of {MAX_LABEL_CHARS} characters.",
            param=name,
        )
    return found
