"""`deltamux audit list|verify`: the log of every mutation, read from the server's database."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from serving.cli.console import out, table, when
from serving.cli.local import ConfigOption, DatabaseOption, open_tenancy

app = typer.Typer(
    help="Read and check the log of every change. Run it on the server's machine.", no_args_is_help=True
)


@app.command("list")
def list_lines(
    *,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, newest first.")] = 50,
    config: ConfigOption = None,
    database: DatabaseOption = None,
) -> None:
    """List the latest changes: who changed what."""
    with open_tenancy(config, database) as tenancy:
        lines = tenancy.audit_lines(limit=limit)
    shown = table(None, "line", "time", "actor", "action", "tenant", "subject", "details")
    for line in lines:
        texts = (line.actor, line.action, line.tenant, line.subject, line.details)
        shown.add_row(str(line.seq), when(line.at), *map(escape, texts))
    out.print(shown)


@app.command()
def verify(
    *,
    head: Annotated[
        str | None,
        typer.Option(help="The log must contain this hash, noted from an earlier run.", metavar="HEX"),
    ] = None,
    config: ConfigOption = None,
    database: DatabaseOption = None,
) -> None:
    """Recompute the log's chain of hashes; exit code 1 if a line was changed, removed or put in."""
    with open_tenancy(config, database) as tenancy:
        verdict = tenancy.verify_audit(expected=head)
    if verdict.problem is not None:
        out.print(f"[bold red]broken:[/] {escape(verdict.problem)}")
        raise typer.Exit(1)
    out.print(f"[green]whole[/]: {verdict.num_lines} lines, head {verdict.head}")
    out.print("Note the head elsewhere and give it to the next run with --head.")
