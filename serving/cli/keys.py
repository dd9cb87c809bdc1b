"""`deltamux keys bootstrap|create|list|rotate|revoke`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.markup import escape

from serving.cli.client import DEFAULT_SERVER, KEY_VARIABLE, Client, JsonObject, ServerOption
from serving.cli.console import err, out, table, when
from serving.cli.local import ConfigOption, DatabaseOption, open_tenancy
from serving.cli.serve import given

app = typer.Typer(help="Make, rotate and revoke API keys.", no_args_is_help=True)

KeyArgument = Annotated[str, typer.Argument(help="The key's id.", metavar="ID")]
DAY_S = 86400.0
_PATH = ("v1", "admin", "keys")


class ScopeChoice(StrEnum):
    """Choices of --scope."""

    INFER = "infer"
    UPLOAD = "upload"
    MANAGE = "manage"
    ADMIN = "admin"


@app.command()
def bootstrap(
    *,
    tenant: Annotated[str, typer.Option(help="The administrator's tenant.")] = "default",
    config: ConfigOption = None,
    database: DatabaseOption = None,
) -> None:
    """Make an administrator's key in the server's database. Run it on the server's machine, as the server's user.

    From its first key on a server wants one from every caller, also if it is running now.
    """
    from serving.tenancy.principal import Scope  # noqa: PLC0415  (heavy)

    with open_tenancy(config, database) as tenancy:
        record, made = tenancy.keys.create(tenant, [Scope.ADMIN], label="bootstrap", actor="cli")
    _show_once(record.id, made.text)


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="The tenant that the key is for.")],
    *,
    scope: Annotated[list[ScopeChoice], typer.Option(help="What it may do; repeat for more.")] = [  # noqa: B006
        ScopeChoice.INFER
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="A delta that it reaches, * stands for anything; repeat. All otherwise.", metavar="GLOB"
        ),
    ] = None,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    days: Annotated[float | None, typer.Option(help="Days until it ends; never otherwise.")] = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Make a key. It is shown once. Needs a key with the scope admin."""
    body = {
        "tenant": tenant,
        "scopes": [item.value for item in scope],
        "adapters": adapter,
        "label": label,
        "expires_in_s": None if days is None else days * DAY_S,
    }
    with Client(server) as client:
        made = client.call("POST", *_PATH, json=given(body))
    _show_once(made["id"], made["key"])


@app.command("list")
def list_keys(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """List the records of all keys; never the keys. Needs a key with the scope admin."""
    shown = table(None, "id", "tenant", "label", "scopes", "deltas", "created", "state")
    with Client(server) as client:
        for key in client.call("GET", *_PATH, params={"tenant": tenant} if tenant else None)["data"]:
            shown.add_row(
                escape(key["id"]),
                escape(key["tenant"]),
                escape(key["label"]),
                " ".join(key["scopes"]),
                escape(" ".join(key["adapters"])) or "all",
                when(key["created"]),
                _state(key),
            )
    out.print(shown)


@app.command()
def rotate(
    key: KeyArgument,
    *,
    overlap: Annotated[float, typer.Option(help="Hours for which the old key stays valid.")] = 24.0,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Make a key in the place of another. Needs a key with the scope admin."""
    with Client(server) as client:
        made = client.call("POST", *_PATH, key, "rotate", json={"overlap_s": overlap * 3600})
    _show_once(made["id"], made["key"])


@app.command()
def revoke(key: KeyArgument, *, server: ServerOption = DEFAULT_SERVER) -> None:
    """End a key now. Needs a key with the scope admin."""
    with Client(server) as client:
        client.call("DELETE", *_PATH, key)
    out.print(f"revoked [bold]{escape(key)}[/]")


def _show_once(key_id: str, text: str) -> None:
    """The key alone on standard output, so that a script can take it."""
    err.print(f"key [bold]{escape(key_id)}[/], shown this once; commands take it from {KEY_VARIABLE}:")
    out.print(text, markup=False)


def _state(key: JsonObject) -> str:
    if key["revoked"] is not None:
        return f"[red]revoked[/] {when(key['revoked'])}"
    return "no end" if key["expires"] is None else f"until {when(key['expires'])}"
