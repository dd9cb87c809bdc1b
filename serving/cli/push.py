"""`deltamux push`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from adapters.errors import InvalidRequest
from serving.cli.client import DEFAULT_SERVER, Client, JsonObject, ServerOption
from serving.cli.console import err, out, stages, table


def push(
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
) -> None:
    """Upload a delta as the next version of NAME, and show its admission proof."""
    with stages("reading the files"):
        files = files_to_send(directory)
    fields = {"alias": alias, "backbone_digest": backbone_digest}
    with Client(server) as client, _bar() as progress:
        size = sum(path.stat().st_size for path in files.values())
        task = progress.add_task(f"uploading {len(files)} files", total=size)
        version = send(
            client,
            name,
            files,
            fields={key: value for key, value in fields.items() if value is not None},
            on_bytes=lambda num_bytes: progress.advance(task, num_bytes),
        )
    show_version(version)
    if alias:
        out.print(f"alias [bold]{escape(name)}:{escape(alias)}[/] points at version {version['version']}")


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
    detect({name for name in present if name in READ} | missed)
    return {name: present[name] for name in sorted(READ & set(present))}


def send(
    client: Client,
    name: str,
    files: Mapping[str, Path],
    *,
    fields: Mapping[str, str],
    on_bytes: Callable[[int], object] = lambda _: None,
) -> JsonObject:
    """Upload `files`; returns the version. Raises what the server says is wrong."""
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
        return client.call("PUT", "v1", "adapters", name, "versions", files=parts, data=dict(fields))


def show_version(version: JsonObject) -> None:
    """A version and its admission proof as a table."""
    shown = table(None, "version", escape(version["id"]))
    for field in ("digest", "status", "method", "task", "backbone_digest", "size_bytes"):
        shown.add_row(field, escape(str(version[field])))
    for field, value in version["proof"].items():
        shown.add_row(f"proof: {field}", f"{value:.6g}" if isinstance(value, float) else escape(str(value)))
    out.print(shown)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=err, transient=True)


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
