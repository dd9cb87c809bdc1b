"""`deltamux adapters list|show|promote|rollback|delete|undelete|gc|fit-ood`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from adapters.errors import NotFound
from serving.cli.client import DEFAULT_SERVER, Client, JsonObject, ServerOption
from serving.cli.console import out, table, when
from serving.cli.fit_ood import fit_ood
from serving.cli.gc import gc
from serving.cli.push import show_version

app = typer.Typer(help="List, show, promote, roll back and delete deltas.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="The delta's name.")]
AliasOption = Annotated[str, typer.Option(help="The alias to move.")]


@app.command("list")
def list_adapters(*, server: ServerOption = DEFAULT_SERVER) -> None:
    """List all deltas."""
    shown = table(None, "name", "latest", "method", "bytes", "aliases", "created")
    with Client(server) as client:
        for adapter in client.pages("v1", "adapters"):
            latest = adapter["latest"] or {}
            shown.add_row(
                escape(adapter["name"]),
                f"v{latest['version']}" if latest else "-",
                escape(str(latest.get("method", "-"))),
                str(latest.get("size_bytes", "-")),
                escape(_aliases(adapter)),
                when(adapter["created"]),
            )
    out.print(shown)


@app.command()
def show(name: NameArgument, *, server: ServerOption = DEFAULT_SERVER) -> None:
    """Show a delta: its versions, its aliases, and the latest version's admission proof."""
    with Client(server) as client:
        adapter = client.call("GET", "v1", "adapters", name)
        versions = client.call("GET", "v1", "adapters", name, "versions")["data"]
    shown = table(None, "version", "digest", "status", "method", "bytes", "created")
    for version in versions:
        values = (version["digest"], version["status"], version["method"], str(version["size_bytes"]))
        shown.add_row(f"v{version['version']}", *map(escape, values), when(version["created"]))
    out.print(shown)
    out.print(f"aliases: {escape(_aliases(adapter))}")
    if adapter["latest"]:
        show_version(adapter["latest"])


@app.command()
def promote(
    name: NameArgument,
    version: Annotated[int, typer.Argument(help="The version to point at.")],
    *,
    alias: AliasOption = "prod",
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Point an alias at a version. Refused if someone else moves it at the same time."""
    with Client(server) as client:
        seen = _alias(client.call("GET", "v1", "adapters", name), alias)
        _move(client, name, alias, version, seen["revision"] if seen else 0)


@app.command()
def rollback(
    name: NameArgument, *, alias: AliasOption = "prod", server: ServerOption = DEFAULT_SERVER
) -> None:
    """Point an alias at the version before the one that it has."""
    with Client(server) as client:
        seen = _alias(client.call("GET", "v1", "adapters", name), alias)
        if seen is None:
            raise NotFound(
                f"{name} has no alias {alias!r}.", param="alias", remedy="See `deltamux adapters show`."
            )
        path = ("v1", "adapters", name, "versions")
        older = (
            client.call("GET", *path, params={"before": seen["version"]})["data"]
            if seen["version"] > 1
            else []
        )
        ready = [version["version"] for version in older if version["status"] == "ready"]
        if not ready:
            raise NotFound(
                f"{name} has no ready version before v{seen['version']}.",
                param="version",
                remedy="Push one, or choose a version with `deltamux adapters promote`.",
            )
        _move(client, name, alias, ready[0], seen["revision"])


@app.command()
def delete(
    name: NameArgument,
    *,
    version: Annotated[int | None, typer.Option(help="Only this version; all of them otherwise.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Delete a delta, or one version of it, and free its memory."""
    what = name if version is None else f"{name}@v{version}"
    if not yes:
        typer.confirm(f"Delete {what}?", abort=True)
    path = ("v1", "adapters", name) if version is None else ("v1", "adapters", name, "versions", str(version))
    with Client(server) as client:
        gone = client.call("DELETE", *path)
    freed = gone["bytes_freed"]
    memory = "its memory is freed on demand" if freed is None else f"{freed} bytes of device memory freed"
    out.print(f"deleted [bold]{escape(what)}[/]; {memory}")


@app.command()
def undelete(
    name: NameArgument,
    version: Annotated[int, typer.Argument(help="The version to bring back.")],
    *,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Undo the deletion of a version, as long as its bytes are not collected. Aliases stay as they are."""
    with Client(server) as client:
        show_version(client.call("POST", "v1", "adapters", name, "versions", str(version), "undelete"))


app.command()(gc)
app.command("fit-ood")(fit_ood)


def _move(client: Client, name: str, alias: str, version: int, revision: int) -> None:
    body = {"version": version, "expected_revision": revision}
    client.call("PUT", "v1", "adapters", name, "aliases", alias, json=body)
    out.print(f"alias [bold]{escape(name)}:{escape(alias)}[/] points at version {version}")


def _alias(adapter: JsonObject, alias: str) -> dict[str, Any] | None:
    return next((found for found in adapter["aliases"] if found["alias"] == alias), None)


def _aliases(adapter: JsonObject) -> str:
    return ", ".join(f"{found['alias']} -> v{found['version']}" for found in adapter["aliases"]) or "-"
