"""`deltamux adapters gc`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.console import out, stages
from serving.cli.serve import given, load


def gc(
    *,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.", metavar="FILE")] = None,
    store: Annotated[str | None, typer.Option(help="The server's store.", metavar="PATH_OR_URL")] = None,
    database: Annotated[str | None, typer.Option(help="The server's database.", metavar="URL")] = None,
    grace_s: Annotated[float | None, typer.Option(help="Seconds for which unused bytes are kept.")] = None,
) -> None:
    """Remove the bytes of deltas deleted long enough ago. Works on store and database, beside any server."""
    from adapters.collector import Collector  # noqa: PLC0415  (heavy)
    from adapters.file_uploads import FileUploads  # noqa: PLC0415
    from adapters.registry import Registry  # noqa: PLC0415
    from adapters.spool import Spool  # noqa: PLC0415
    from adapters.store import open_store  # noqa: PLC0415
    from serving.config import linger_s  # noqa: PLC0415

    flags = given({"store": {"path": store, "grace_s": grace_s}, "database": {"url": database}})
    settings = load({**flags, "backbone": {"path": "none"}}, config)  # a required setting of no meaning here
    with Registry(settings.database.url) as registry, stages("collecting"):
        blobs = open_store(settings.store.path)
        files = FileUploads(
            registry.uploads,
            Spool(settings.store.spool_path),
            lifetime_s=settings.limits.file_lifetime_s,
            linger_s=linger_s(settings),
        )
        done = Collector(registry, blobs, grace_s=settings.store.grace_s, files=files).collect()
    out.print(f"{done.swept} removed, {done.marked} newly found unused; those wait for the grace period")
    out.print(f"{done.uploads} ended uploads removed")
