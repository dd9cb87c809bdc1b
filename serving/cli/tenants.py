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
BytesOption = Annotated[
    int | None, typer.Option("--max-bytes", help="Bytes of deltas and files it may keep.")
]
AdaptersOption = Annotated[int | None, typer.Option("--max-adapters", help="Deltas it may have.")]
VersionsOption = Annotated[
    int | None, typer.Option("--max-versions", help="Live versions of all its deltas.")
]
FilesOption = Annotated[
    int | None, typer.Option("--max-files", help="Files sent in parts, open or not used yet.")
]
WeightOption = Annotated[float | None, typer.Option(help="Share against other tenants' (1).")]
ClassOption = Annotated[
    Service | None, typer.Option("--class", help="How urgent its requests are (standard).")
]

KEPT = ("max_stored_bytes", "max_adapters", "max_versions", "max_files")
_PATH = ("v1", "admin", "tenants")


@app.command("list")
def list_tenants(*, server: ServerOption = DEFAULT_SERVER) -> None:
    """List all tenants and their limits."""
    with Client(server) as client:
        _show(client.call("GET", *_PATH)["data"])


@app.command()
def create(  # noqa: PLR0913  one option per limit
    name: NameArgument,
    *,
    rpm: RequestsOption = None,
    tpm: TokensOption = None,
    concurrency: ConcurrencyOption = None,
    max_bytes: BytesOption = None,
    max_adapters: AdaptersOption = None,
    max_versions: VersionsOption = None,
    max_files: FilesOption = None,
    weight: WeightOption = None,
    service: ClassOption = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Add a tenant. A limit that is not given does not exist, or is what the server's settings say."""
    body = {
        "name": name,
        **_limits(rpm, tpm, concurrency, (max_bytes, max_adapters, max_versions, max_files), weight, service),
    }
    with Client(server) as client:
        _show([client.call("POST", *_PATH, json=body)])


@app.command()
def limits(  # noqa: PLR0913  one option per limit
    name: NameArgument,
    *,
    rpm: RequestsOption = None,
    tpm: TokensOption = None,
    concurrency: ConcurrencyOption = None,
    max_bytes: BytesOption = None,
    max_adapters: AdaptersOption = None,
    max_versions: VersionsOption = None,
    max_files: FilesOption = None,
    weight: WeightOption = None,
    service: ClassOption = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Replace all limits of a tenant. One that is not given exists no longer."""
    body = _limits(rpm, tpm, concurrency, (max_bytes, max_adapters, max_versions, max_files), weight, service)
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
    rpm: int | None,
    tpm: int | None,
    concurrency: int | None,
    kept: tuple[int | None, int | None, int | None, int | None],
    weight: float | None,
    service: Service | None,
) -> dict[str, Any]:
    return given(
        {
            "requests_per_min": rpm,
            "tokens_per_min": tpm,
            "max_concurrency": concurrency,
            **dict(zip(KEPT, kept, strict=True)),
            "weight": weight,
            "service_class": service and service.value,
        }
    )


def _show(tenants: list[JsonObject]) -> None:
    columns = (
        "tenant",
        "requests/min",
        "tokens/min",
        "concurrency",
        "keeps at most",
        "weight",
        "class",
        "state",
        "created",
    )
    shown = table(None, *columns)
    for tenant in tenants:
        bounds = (tenant[name] for name in ("requests_per_min", "tokens_per_min", "max_concurrency"))
        shown.add_row(
            escape(tenant["id"]),
            *("-" if bound is None else str(bound) for bound in bounds),
            ", ".join(f"{tenant[name]} {name[4:]}" for name in KEPT if tenant.get(name) is not None) or "-",
            f"{tenant['weight']:g}",
            tenant["service_class"],
            "[red]disabled[/]" if tenant["disabled"] else "active",
            when(tenant["created"]),
        )
    out.print(shown)
