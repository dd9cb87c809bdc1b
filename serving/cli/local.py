"""What the commands that work on the server's machine share: its settings, without a backbone, and its tenancy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.serve import given, load

if TYPE_CHECKING:
    from serving.tenancy.tenancy import Tenancy

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="The server's YAML file of settings.", metavar="FILE")
]
DatabaseOption = Annotated[
    str | None, typer.Option("--database", help="The server's SQLAlchemy URL.", metavar="URL")
]


def open_tenancy(config: Path | None, database: str | None) -> Tenancy:
    """The tenancy in the database that a server with these settings uses. Raises DeltamuxError."""
    from serving.tenancy.tenancy import Tenancy  # noqa: PLC0415  (heavy)

    # the one setting without a default, which plays no part here
    flags = {"backbone": {"path": "none"}, "database": {"url": database}}
    return Tenancy(load(given(flags), config))
