"""`deltamux usage`."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.markup import escape

from serving.cli.client import DEFAULT_SERVER, Client, JsonObject, ServerOption
from serving.cli.console import err, out, table, when


class By(StrEnum):
    """Choices of --by."""

    TENANT = "tenant"
    KEY = "key"
    ADAPTER = "adapter"
    HOUR = "hour"
    OUTCOME = "outcome"


_NUMBERS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
_DIGEST_CHARS = 19


def usage(
    *,
    by: Annotated[
        list[By] | None, typer.Option(help="A row for each; repeat for more. Default: tenant.")
    ] = None,
    hours: Annotated[float, typer.Option(min=0.01, help="How far back.")] = 24.0,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Show requests and tokens, from the server's ledger. Needs a key with the scope manage, for all tenants admin."""
    groups = [item.value for item in by or [By.TENANT]]
    now = time.time()
    query: dict[str, Any] = {"group_by": groups, "start_time": now - hours * 3600, "end_time": now + 1}
    if tenant is not None:
        query["tenant"] = tenant
    with Client(server) as client:
        found = client.call("GET", "v1", "usage", params=query)
    shown = table(None, *groups, *(name.replace("_", " ") for name in _NUMBERS))
    for row in found["data"]:
        shown.add_row(*(_text(group, row) for group in groups), *(f"{row[name]:,}" for name in _NUMBERS))
    out.print(shown)
    if found["has_more"]:
        err.print("There is more than this table shows; narrow it with --hours or --tenant.")


def _text(group: str, row: JsonObject) -> str:
    value = row[group]
    if group == By.HOUR:
        return when(value)
    if group == By.ADAPTER:
        return escape(" ".join([str(value)[:_DIGEST_CHARS], *row.get("versions", ())]))
    return escape(str(value) or "-")
