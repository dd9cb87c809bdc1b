"""`deltamux serve`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from adapters.errors import InvalidRequest
from serving.cli.console import err, out, stages, until_stopped


class Device(StrEnum):
    """Choices of --device."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """Choices of --dtype."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def serve(  # noqa: PLR0913  one parameter per flag
    *,
    backbone: Annotated[
        str | None, typer.Option(help="Directory or Hub id of the frozen model.", metavar="DIR_OR_HUB_ID")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.", metavar="FILE")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (8000); 0 takes a free one.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where the model runs (auto).")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of weights and activations (auto).")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of the backbone (1).")] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Directory of the blob store, or s3://bucket/prefix, gs://, az://.", metavar="PATH_OR_URL"
        ),
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL of the registry.", metavar="URL")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond loopback although there are no keys.")
    ] = None,
) -> None:
    """Serve a backbone and its deltas over HTTP until interrupted."""
    flags: dict[str, Any] = {
        "server": {"host": host, "port": port, "insecure": insecure},
        "backbone": {"path": backbone, "device": device, "dtype": dtype},
        "store": {"path": store},
        "database": {"url": database},
        "replicas": replicas,
    }
    run(given(flags), config)


def run(flags: Mapping[str, Any], config: Path | None) -> None:
    """Serve with these settings until a signal comes."""
    from serving.deployments import app  # noqa: PLC0415  (heavy)

    settings = load(flags, config)
    with ExitStack() as stack:
        with stages("starting") as report:
            server = stack.enter_context(app.running(settings, report))
        out.print(
            f"[bold green]ready[/] in {server.start_s:.1f} s: {server.url}  (documentation: {server.url}/docs)"
        )
        model = f"model [bold]{escape(settings.backbone.served_name)}[/]"
        out.print(f"{model}, metrics at {server.url}/metrics, logs in {server.logs}")
        if server.admin_url is not None:
            out.print(
                f"administration at {server.admin_url}, and only there: deltamux keys, tenants --server ..."
            )
        if server.has_keys:
            out.print("callers need a key: see `deltamux keys`")
        elif settings.server.is_loopback:
            out.print("single tenant, no keys, on loopback only: every process of this machine may use it")
        else:
            err.print(
                f"[bold yellow]insecure:[/] there are no keys; whoever reaches {server.url} "
                "may use, change and delete everything."
            )
        until_stopped(app.wait)


def load(flags: Mapping[str, Any], config: Path | None) -> Any:
    """The settings. Raises InvalidRequest for what is wrong with them."""
    from serving.config import load_settings  # noqa: PLC0415  (heavy)

    try:
        return load_settings(config, flags)
    except ValueError as error:
        raise InvalidRequest(
            str(error), param="settings", remedy="Correct the flag, the DELTAMUX_ variable or the file."
        ) from None


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """`flags` without those that were not given, so that lower sources show through."""
    kept = {name: given(value) if isinstance(value, Mapping) else value for name, value in flags.items()}
    return {name: value for name, value in kept.items() if value not in (None, {})}
