"""`deltamux push`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Annotated

import typer
from rich.markup import escape

from adapters.errors import InvalidDelta, InvalidRequest
from serving.cli.client import DEFAULT_SERVER, Client, JsonObject, ServerOption
from serving.cli.console import err, out, stages, table, transfer_bar
from serving.cli.convert import converted, parity_text
from serving.cli.large import is_large, send_large
from serving.cli.signers import read_text

PEFT_TENSORS = {"adapter_model.safetensors", "adapter_model.bin"}
CONVERTER = (
    "If your own PEFT loads it, `deltamux push DIR NAME --backbone B` converts it first, B being your copy of the "
    "backbone (`deltamux convert DIR OUT --backbone B` does only that)."
)


def push(  # noqa: PLR0913  one argument per flag
    directory: Annotated[Path, typer.Argument(help="What the library saved.", metavar="DIR")],
    name: Annotated[str, typer.Argument(help="The delta's name on the server.")],
    *,
    alias: Annotated[
        str | None, typer.Option(help="An alias to point at the new version, like prod.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    backbone_digest: Annotated[
        str | None, typer.Option(help="Digest of the backbone it was trained on.", metavar="HEX")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Your copy of the backbone: compare with PEFT first, and convert where the server needs that.",
            metavar="B",
        ),
    ] = None,
    parity: Annotated[
        Path | None, typer.Option(help="A record of `deltamux verify` to send along.", metavar="FILE")
    ] = None,
    lineage: Annotated[
        list[str] | None,
        typer.Option(
            help="Where it comes from, as initialised_from=sha256:...; repeat for more.", metavar="KEY=TEXT"
        ),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(help="Sign it with this private key (`deltamux signers`).", metavar="KEY"),
    ] = None,
) -> None:
    """Upload a delta as the next version of NAME, and show its admission proof."""
    if backbone and (parity or backbone_digest):
        raise InvalidRequest("--backbone makes the record and knows the digest by itself.", param="backbone")
    if sign and lineage:
        raise InvalidRequest(
            "--lineage changes the content after it was signed.",
            param="lineage",
            remedy="Push with --lineage first, then pull, sign and push what came.",
        )
    given = {"alias": alias, "backbone_digest": backbone_digest, "lineage": _lineage_field(lineage or [])}
    with TemporaryDirectory() as scratch:
        source = directory
        if backbone:
            source, parity = _prepared(directory, backbone, Path(scratch) / "converted")
        with stages("reading the files"):
            files = files_to_send(source)
            fields = _parity_fields(parity) | {
                key: value for key, value in given.items() if value is not None
            }
            if sign:
                fields["signature"] = _signature(sign, Path(scratch) / "converted" if backbone else directory)
        with Client(server) as client, transfer_bar() as progress:
            size = sum(path.stat().st_size for path in files.values())
            task = progress.add_task(f"uploading {len(files)} files", total=size)
            version = send(
                client,
                name,
                files,
                fields=fields,
                on_bytes=lambda num_bytes: progress.advance(task, num_bytes),
            )
    show_version(version)
    if parity and not version["proof"].get("parity"):
        err.print(f"[yellow]version {version['version']} was published before, without this record[/]")
    if alias:
        out.print(f"alias [bold]{escape(name)}:{escape(alias)}[/] points at version {version['version']}")


def _signature(key: Path, canonical: Path) -> str:
    """The signature over the canonical pair in a directory, which is what the server will store."""
    from adapters.canonical import digest_of_files  # noqa: PLC0415  (heavy)
    from adapters.signing import sign  # noqa: PLC0415

    pair = [canonical / name for name in ("manifest.json", "tensors.safetensors")]
    if not all(path.is_file() for path in pair):
        raise InvalidRequest(
            f"{canonical} is not in the canonical form, which is what gets signed.",
            param="sign",
            remedy="Add --backbone B, or push what `deltamux convert DIR OUT --backbone B` writes.",
        )
    return sign(read_text(key).encode(), digest_of_files(*pair))


def _lineage_field(entries: list[str]) -> str | None:
    pairs = [entry.partition("=") for entry in entries]
    if wrong := [key for key, equals, text in pairs if not (key and equals and text)]:
        raise InvalidRequest(f"--lineage {wrong[0]!r}: expected KEY=TEXT.", param="lineage")
    return json.dumps({key: text for key, _, text in pairs}) if pairs else None


def _prepared(directory: Path, backbone: str, target: Path) -> tuple[Path, Path | None]:
    """What to send instead of `directory`, if need be, and any parity record; compared with PEFT and said so."""
    conversion = converted(directory, backbone)
    conversion.write(target)
    if conversion.needed:
        err.print(f"the server can't read {escape(str(directory))}; its converted form is sent")
    source = target if conversion.needed else directory
    return source, target / "parity.json" if conversion.record else None


def _parity_fields(parity: Path | None) -> dict[str, str]:
    """The fields of an upload with this record. The digest in it says which backbone the uploader means."""
    if parity is None:
        return {}
    from adapters.parity import read_record  # noqa: PLC0415  (pydantic)

    try:
        text = parity.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{parity} can't be read: {error}", param="parity") from None
    return {"parity": text, "backbone_digest": read_record(text).backbone_digest}


def files_to_send(directory: Path) -> dict[str, Path]:
    """The files of `directory` that make up a delta, by name; nothing else of it is opened.

    Raises InvalidRequest where it is no directory, InvalidDelta where its files are not one delta.
    """
    from adapters.formats import PICKLED, READ, REFUSED, detect  # noqa: PLC0415  (heavy)

    if not directory.is_dir():
        raise InvalidRequest(f"{directory} is not a directory.", param="DIR")
    present = {entry.name: entry for entry in directory.iterdir() if entry.is_file()}
    tensors = {name for name in READ & set(present) if name.endswith(".safetensors")}
    # what would change the numbers if it stayed behind is named, so that it is refused
    missed = {name for name in REFUSED if name in present and not (tensors and name.endswith(PICKLED))}
    with _naming_the_converter(present):
        detect({name for name in present if name in READ} | missed)
    return {name: present[name] for name in sorted(READ & set(present))}


@contextmanager
def _naming_the_converter(names: Collection[str]) -> Iterator[None]:
    """Say what to run where files that PEFT wrote are refused."""
    try:
        yield
    except InvalidDelta as error:
        if error.remedy or not set(names) & PEFT_TENSORS:
            raise
        raise InvalidDelta(error.problems, param=error.param, remedy=CONVERTER) from None


def send(
    client: Client,
    name: str,
    files: Mapping[str, Path],
    *,
    fields: Mapping[str, str],
    on_bytes: Callable[[int], object] = lambda _: None,
) -> JsonObject:
    """Upload `files`, in parts where they are large; returns the version. Raises what the server says is wrong."""
    if is_large(files):
        with _naming_the_converter(files):
            return send_large(client, name, files, fields=fields, on_bytes=on_bytes)
    with ExitStack() as stack:
        parts = [
            (
                "file",
                (
                    label,
                    _Counting(stack.enter_context(path.open("rb")), on_bytes),
                    "application/octet-stream",
                ),
            )
            for label, path in files.items()
        ]
        with _naming_the_converter(files):
            return client.call("PUT", "v1", "adapters", name, "versions", files=parts, data=dict(fields))


def show_version(version: JsonObject) -> None:
    """A version and its admission proof as a table."""
    shown = table(None, "version", escape(version["id"]))
    for field in ("digest", "status", "method", "task", "backbone_digest", "size_bytes"):
        shown.add_row(field, escape(str(version[field])))
    for field, value in version["proof"].items():
        if field == "parity":
            shown.add_row("proof: parity", escape(_stated(value)))
        elif isinstance(value, dict):
            for key, item in value.items():
                shown.add_row(f"{field}: {escape(key)}", escape(_written(item)))
        else:
            shown.add_row(f"proof: {field}", escape(_written(value)))
    out.print(shown)


def _written(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_written, value))
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_written(item)}" for key, item in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _stated(record: JsonObject) -> str:
    from pydantic import ValidationError  # noqa: PLC0415  (heavy)

    from adapters.parity import ParityRecord  # noqa: PLC0415

    try:
        return parity_text(ParityRecord.model_validate(record))
    except ValidationError:  # a newer server's
        return str(record)


class _Counting:
    """A file that reports what is read from it."""

    def __init__(self, file: IO[bytes], on_bytes: Callable[[int], object]) -> None:
        self._file = file
        self._on_bytes = on_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._on_bytes(len(data))
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
