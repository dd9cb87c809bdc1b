"""`deltamux tenants list|create|limits|disable|enable`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.markup import escape

from serving.cli.client import DEFAULT_SERVER, Client, JsonObject, ServerOption
from serving.cli.console import out, table, when
from serving.cli.serve import given

app = typer.Typer(
    help="Make tenants and set their limits. Needs a key with the scope admin.", no_args_is_help=True
)


class Service(StrEnum):
    """Choices of --class."""

    REALTIME = "realtime"
    STANDARD = "standard"
    BATCH = "batch"


NameArgument = Annotated[str, typer.Argument(help="The tenant's name.")]
RequestsOption = Annotated[int | None, typer.Option("--rpm", help="Requests per minute.")]
TokensOption = Annotated[int | None, typer.Option("--tpm", help="Prompt and generated tokens per minute.")]
ConcurrencyOption = Annotated[int | None, typer.Option("--concurrency", help="Requests in progress.")]
WeightOption = Annotated[float | None, typer.Option(help="Share against other tenants' (1).")]
ClassOption = Annotated[
    Service | None, typer.Option("--class", help="How urgent its requests are (standard).")
]

_PATH = ("v1", "admin", "tenants")


@app.command("list")
def list_tenants(*, server: ServerOption = DEFAULT_SERVER) -> None:
    """List all tenants and their limits."""
    with Client(server) as client:
        _show(client.call("GET", *_PATH)["data"])


@app.command()
def create(
    name: NameArgument,
    *,
    rpm: RequestsOption = None,
    tpm: TokensOption = None,
    concurrency: ConcurrencyOption = None,
    weight: WeightOption = None,
    service: ClassOption = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Add a tenant. A limit that is not given does not exist."""
    body = {"name": name, **_limits(rpm, tpm, concurrency, weight, service)}
    with Client(server) as client:
        _show([client.call("POST", *_PATH, json=body)])


@app.command()
def limits(
    name: NameArgument,
    *,
    rpm: RequestsOption = None,
    tpm: TokensOption = None,
    concurrency: ConcurrencyOption = None,
    weight: WeightOption = None,
    service: ClassOption = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Replace all limits of a tenant. One that is not given exists no longer."""
    body = _limits(rpm, tpm, concurrency, weight, service)
    with Client(server) as client:
        _show([client.call("PUT", *_PATH, name, "limits", json=body)])


@app.command()
def disable(name: NameArgument, *, server: ServerOption = DEFAULT_SERVER) -> None:
    """Refuse every key of a tenant. Its deltas stay."""
    with Client(server) as client:
        _show([client.call("PUT", *_PATH, name, "state", json={"disabled": True})])


@app.command()
def enable(name: NameArgument, *, server: ServerOption = DEFAULT_SERVER) -> None:
    """Take a disabled tenant's keys again."""
    with Client(server) as client:
        _show([client.call("PUT", *_PATH, name, "state", json={"disabled": False})])


def _limits(
    rpm: int | None, tpm: int | None, concurrency: int | None, weight: float | None, service: Service | None
) -> dict[str, Any]:
    return given(
        {
            "requests_per_min": rpm,
            "tokens_per_min": tpm,
            "max_concurrency": concurrency,
            "weight": weight,
            "service_class": service and service.value,
        }
    )


def _show(tenants: list[JsonObject]) -> None:
    columns = ("tenant", "requests/min", "tokens/min", "concurrency", "weight", "class", "state", "created")
    shown = table(None, *columns)
    for tenant in tenants:
        bounds = (tenant[name] for name in ("requests_per_min", "tokens_per_min", "max_concurrency"))
        shown.add_row(
            escape(tenant["id"]),
            *("-" if bound is None else str(bound) for bound in bounds),
            f"{tenant['weight']:g}",
            tenant["service_class"],
            "[red]disabled[/]" if tenant["disabled"] else "active",
            when(tenant["created"]),
        )
    out.print(shown)
