"""`deltamux adapters list|show|promote|rollback|delete|undelete|pull|diff|similar|fit-ood|gc`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from adapters.errors import InvalidRequest, NotFound
from serving.cli.client import DEFAULT_SERVER, Client, JsonObject, ServerOption
from serving.cli.console import out, table, when
from serving.cli.contents import diff, pull, similar
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
    version: Annotated[
        int | None, typer.Argument(help="The version; by default the canary, or without one the latest.")
    ] = None,
    *,
    canary: Annotated[
        int | None,
        typer.Option(
            min=1, max=99, help="Give it only this share of the alias's requests.", metavar="PERCENT"
        ),
    ] = None,
    alias: AliasOption = "prod",
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Point an alias, or a share of its requests, at a version. Refused if someone else moves it at the same time."""
    with Client(server) as client:
        adapter = client.call("GET", "v1", "adapters", name)
        seen = _alias(adapter, alias)
        body = _promotion(adapter, seen, version, canary)
        _say_where(name, client.call("PUT", "v1", "adapters", name, "aliases", alias, json=body))


@app.command()
def rollback(
    name: NameArgument, *, alias: AliasOption = "prod", server: ServerOption = DEFAULT_SERVER
) -> None:
    """End an alias's canary, or without one return the alias to the version that it pointed at before."""
    with Client(server) as client:
        seen = _alias(client.call("GET", "v1", "adapters", name), alias)
        body = {"expected_revision": seen["revision"]} if seen else {}
        path = ("v1", "adapters", name, "aliases", alias, "rollback")
        _say_where(name, client.call("POST", *path, json=body))


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


for command in (pull, diff, similar, gc):
    app.command()(command)
app.command("fit-ood")(fit_ood)


def _promotion(
    adapter: JsonObject, seen: JsonObject | None, version: int | None, canary: int | None
) -> JsonObject:
    """The body that moves the alias `seen` (None: not set) as asked. Raises InvalidRequest, NotFound."""
    running = [int(item) for item in seen["weights"]][1:] if seen else []
    if version is None and canary is None and len(running) == 1:
        version = running[0]
    elif version is None:
        if not adapter["latest"]:
            raise NotFound(f"{adapter['name']} has no version that is ready.", param="version")
        version = adapter["latest"]["version"]
    revision = seen["revision"] if seen else 0
    if canary is None:
        return {"version": version, "expected_revision": revision}
    if seen is None or seen["version"] == version:
        raise InvalidRequest(
            f"Version {version} can't be a canary: the alias points at "
            + ("nothing else." if seen is None else "it already."),
            param="canary",
            remedy="Promote the present version without --canary first, or name another version.",
        )
    return {"version": seen["version"], "canaries": {str(version): canary}, "expected_revision": revision}


def _say_where(name: str, alias: JsonObject) -> None:
    where = f"version {alias['version']}" if len(alias["weights"]) == 1 else _points_at(alias)
    out.print(f"alias [bold]{escape(name)}:{escape(alias['alias'])}[/] points at {where}")


def _alias(adapter: JsonObject, alias: str) -> JsonObject | None:
    return next((found for found in adapter["aliases"] if found["alias"] == alias), None)


def _aliases(adapter: JsonObject) -> str:
    return ", ".join(f"{found['alias']} -> {_points_at(found)}" for found in adapter["aliases"]) or "-"


def _points_at(alias: JsonObject) -> str:
    weights = alias["weights"]
    if len(weights) == 1:
        return f"v{alias['version']}"
    return " and ".join(f"v{version} ({percent} %)" for version, percent in weights.items())
