"""`deltamux signers generate|add|list|revoke|require`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from adapters.errors import InvalidRequest
from serving.cli.client import DEFAULT_SERVER, Client, ServerOption
from serving.cli.console import out, table, when

app = typer.Typer(
    help="Say who signs your tenant's uploads, and that they must be signed.", no_args_is_help=True
)

_PATH = ("v1", "signers")


@app.command()
def generate(
    file: Annotated[
        Path, typer.Argument(help="Where to write the private key; FILE.pub gets the public one.")
    ],
) -> None:
    """Make a key to sign uploads with. The private half never leaves this machine."""
    from adapters import signing  # noqa: PLC0415  (heavy)

    public_file = file.with_name(file.name + ".pub")
    private, public = signing.generate()
    try:
        for path, data, mode in ((public_file, public, 0o644), (file, private, 0o600)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as written:
                written.write(data)
    except OSError as error:
        raise InvalidRequest(f"{path} can't be written: {error.strerror}.", param="FILE") from None
    signer = signing.signer_id(signing.read_public_key(public.decode()))
    out.print(f"signer {signer}: private key {escape(str(file))}, public key {escape(str(public_file))}")


@app.command()
def add(
    public_key: Annotated[Path, typer.Argument(help="File with the public key.", metavar="FILE")],
    *,
    label: Annotated[str, typer.Option(help="Whose it is.")] = "",
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Accept the signatures of a public key. Needs a key with the scope manage."""
    with Client(server) as client:
        made = client.call("POST", *_PATH, json={"public_key": read_text(public_key), "label": label})
    out.print(f"signatures of [bold]{escape(made['id'])}[/] are accepted")


@app.command("list")
def list_signers(*, server: ServerOption = DEFAULT_SERVER) -> None:
    """List whose signatures are accepted. Needs a key with the scope manage."""
    with Client(server) as client:
        found = client.call("GET", *_PATH)
    shown = table(None, "signer", "label", "public key", "created", "state")
    for signer in found["data"]:
        state = "accepted" if signer["revoked"] is None else f"[red]revoked[/] {when(signer['revoked'])}"
        names = (signer["id"], signer["label"], signer["public_key"])
        shown.add_row(*map(escape, names), when(signer["created"]), state)
    out.print(shown)
    out.print("uploads must be signed" if found["require_signature"] else "uploads need not be signed")


@app.command()
def revoke(
    signer: Annotated[str, typer.Argument(help="The signer's id.")], *, server: ServerOption = DEFAULT_SERVER
) -> None:
    """Accept no further signature of a signer. Needs a key with the scope manage."""
    with Client(server) as client:
        client.call("DELETE", *_PATH, signer)
    out.print(f"revoked [bold]{escape(signer)}[/]")


@app.command()
def require(
    *,
    required: Annotated[bool, typer.Option("--on/--off", help="Take signed uploads only, or any.")] = True,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Have every upload of your tenant signed, or not. Needs a key with the scope manage."""
    with Client(server) as client:
        client.call("PUT", "v1", "signature_policy", json={"require_signature": required})
    out.print("uploads must be signed" if required else "uploads need not be signed")


def read_text(path: Path) -> str:
    """The text of a key's file. Raises InvalidRequest."""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} can't be read: {error}", param="FILE") from None
