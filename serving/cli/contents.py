"""`deltamux adapters pull|diff|similar`: what versions hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress

from adapters.errors import InvalidRequest, InvalidSignature, NotFound, Unavailable
from adapters.names import LATEST, ModelReference
from serving.cli.client import DEFAULT_SERVER, Client, JsonObject, ServerOption
from serving.cli.console import out, stages, table, transfer_bar
from serving.cli.signers import read_text

ReferenceArgument = Annotated[
    str, typer.Argument(help="NAME, NAME:ALIAS, NAME@vN or NAME@sha256:HEX.", metavar="REFERENCE")
]
FILES = ("manifest.json", "tensors.safetensors")


def pull(
    reference: ReferenceArgument,
    directory: Annotated[Path, typer.Argument(help="Where to put the files; it is made.", metavar="DIR")],
    *,
    signed_by: Annotated[
        Path | None,
        typer.Option(help="Take it only if it is signed with this public key.", metavar="FILE"),
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Download a version as its canonical pair, byte for byte, and check it against its digest."""
    from adapters.canonical import digest_of_files  # noqa: PLC0415  (heavy)

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidRequest(f"{directory} exists already and is not an empty directory.", param="DIR")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with Client(server) as client, TemporaryDirectory(dir=directory.parent, prefix=".pull-") as scratch:
        version = version_of(client, reference)
        files = [Path(scratch) / file for file in FILES]
        with transfer_bar() as progress:
            for path in files:
                _download(client, version, path, progress)
        digest = f"sha256:{digest_of_files(*files)}"
        if digest != version["digest"]:
            raise Unavailable(
                f"What came has the digest {digest}, the server says {version['digest']}.",
                param="digest",
                remedy="Try again; if it stays, the store or something on the way changes bytes.",
            )
        signer = _checked_signer(version, signed_by)
        directory.mkdir(exist_ok=True)
        for path in files:
            shutil.move(path, directory / path.name)
    out.print(f"[bold green]pulled[/] {escape(version['id'])} to {escape(str(directory))}: {digest}{signer}")


def diff(
    first: ReferenceArgument, second: ReferenceArgument, *, server: ServerOption = DEFAULT_SERVER
) -> None:
    """Compare two versions: manifest fields, ops, ranks, and how far apart they are at each site."""
    with Client(server) as client, stages("comparing"):
        version = version_of(client, first)
        path = ("v1", "adapters", version["name"], "versions", str(version["version"]), "diff")
        found = client.call("GET", *path, params={"against": second})
    names = [item["id"] for item in found["between"]]
    if found["fields"]:
        shown = table("manifest", "field", *map(escape, names))
        for entry in found["fields"]:
            shown.add_row(escape(entry["field"]), *(escape(_written(value)) for value in entry["values"]))
        out.print(shown)
    shown = table("ops", "site", "op", "size", *(f"norm {escape(name)}" for name in names), "difference")
    for op in found["ops"]:
        settings = [f"{item['field']} {_written(item['values'])}" for item in op["settings"]]
        shown.add_row(
            escape(op["site"]),
            escape(" ".join([op["kind"], *settings])),
            escape(_both([_size(size) for size in op["sizes"]])),
            *map(_number, op["norms"]),
            _number(op["difference"]),
        )
    out.print(shown)
    if found["distance"] == 0.0 and not found["fields"]:
        out.print("the two are equal")
    else:
        out.print(f"distance: {_number(found['distance'])}")


def similar(
    reference: ReferenceArgument,
    *,
    top: Annotated[int, typer.Option(min=1, max=20, help="How many to show.")] = 10,
    activations: Annotated[
        bool, typer.Option(help="Also compare the neurons that each prompt activates.")
    ] = True,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Find prompts like another one: cosines of their tokens, and the overlap of the neurons they activate."""
    with Client(server) as client, stages("comparing"):
        version = version_of(client, reference)
        path = ("v1", "adapters", version["name"], "versions", str(version["version"]), "similar")
        found = client.call("GET", *path, params={"top": top, "activations": activations})
    shown = table(None, "prompt", "mean token cosine", "token cosine", "activation overlap")
    for item in found["data"]:
        numbers = (item["mean_cosine"], item["token_cosine"], item["activation_overlap"])
        shown.add_row(escape(item["id"]), *map(_number, numbers))
    out.print(shown)
    more = "; there are more, which were not looked at" if found["has_more"] else ""
    out.print(f"{found['num_compared']} prompts of the same form compared{more}")


def version_of(client: Client, text: str) -> JsonObject:
    """The version that a reference means on the server. Raises NotFound, InvalidReference."""
    reference = ModelReference.parse(text)
    path = ("v1", "adapters", reference.name)
    if reference.version is not None:
        return client.call("GET", *path, "versions", str(reference.version))
    if reference.alias is not None:
        adapter = client.call("GET", *path)
        if reference.alias == LATEST and adapter["latest"]:
            latest: JsonObject = adapter["latest"]
            return latest
        for alias in adapter["aliases"]:
            if alias["alias"] == reference.alias:
                return client.call("GET", *path, "versions", str(alias["version"]))
    else:
        for version in client.call("GET", *path, "versions", params={"limit": 200})["data"]:
            if version["digest"] == f"sha256:{reference.digest}":
                found: JsonObject = version
                return found
    raise NotFound(f"{text} does not exist.", param="reference", remedy="See `deltamux adapters show`.")


def _checked_signer(version: JsonObject, signed_by: Path | None) -> str:
    """Who has signed a version, in words. Raises InvalidSignature where it is not who it has to be."""
    record = version["proof"].get("signature")
    if record is None and signed_by is None:
        return ""
    from adapters.signing import is_signed_by, read_public_key, signer_id  # noqa: PLC0415  (heavy)

    record = record or {"public_key": "", "signature": ""}
    key = record["public_key"] if signed_by is None else read_public_key(read_text(signed_by))
    if not is_signed_by(key, version["digest"].removeprefix("sha256:"), record["signature"]):
        raise InvalidSignature(
            f"{version['id']} is not signed with {signed_by or 'the key that its proof names'}.",
            param="signature",
            remedy="Do not use it, or leave --signed-by out if you trust the server.",
        )
    return f", signed by {signer_id(key)}"


def _download(client: Client, version: JsonObject, target: Path, progress: Progress) -> None:
    path = ("v1", "adapters", version["name"], "versions", str(version["version"]), "files", target.name)
    with client.stream(*path) as answer, target.open("wb") as file:
        task = progress.add_task(target.name, total=int(answer.headers["content-length"]))
        for piece in answer.iter_bytes():
            file.write(piece)
            progress.advance(task, len(piece))


def _written(value: Any) -> str:
    if isinstance(value, list):
        return _both([_written(item) for item in value])
    return "-" if value is None else str(value)


def _both(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else " -> ".join(values)


def _size(sizes: JsonObject | None) -> str:
    if sizes is None:
        return "-"
    return ", ".join(f"{field} {'x'.join(map(str, _listed(size)))}" for field, size in sizes.items())


def _listed(size: Any) -> list[Any]:
    return size if isinstance(size, list) else [size]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
