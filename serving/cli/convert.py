"""`deltamux convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from adapters.errors import InvalidRequest
from serving.cli.console import err, out, stages, table

if TYPE_CHECKING:
    from adapters.parity import ParityRecord
    from serving.offline.convert import Conversion

QUOTA_MIB = 4096


def convert(
    directory: Annotated[
        Path, typer.Argument(help="What PEFT or AdapterHub's library saved.", metavar="DIR")
    ],
    target: Annotated[Path, typer.Argument(help="Directory to write; new or empty.", metavar="OUT")],
    *,
    backbone: Annotated[
        str | None,
        typer.Option(help="Directory or Hub id of its base model (what its config names).", metavar="B"),
    ] = None,
    quota_mib: Annotated[int, typer.Option(help="The most that its changes may take.", min=1)] = QUOTA_MIB,
) -> None:
    """Turn an adapter that the server can't read into one that it can, with your own PEFT.

    For pickled files, for methods that draw numbers from a seed or compute them from the base weights. Each adapted
    module is probed and checked, then the whole model. What AdapterHub's library pickled is read, without a comparison.
    Nothing is sent anywhere.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidRequest(f"{target} exists and is not an empty directory.", param="OUT")
    conversion = converted(directory, backbone or base_of(directory), quota_bytes=quota_mib << 20)
    conversion.write(target)
    out.print(f"[bold green]written[/] {escape(str(target))}: sha256:{conversion.canonical.digest}")
    parity = f" --parity {escape(str(target))}/parity.json" if conversion.record else ""
    out.print(f"send it with: deltamux push {escape(str(target))} NAME{parity}")


def converted(directory: Path, backbone: str, *, quota_bytes: int = QUOTA_MIB << 20) -> Conversion:
    """Convert, and show what was found."""
    from serving.offline.convert import convert as run  # noqa: PLC0415  (heavy)

    with stages("converting") as report:
        conversion = run(directory, backbone, quota_bytes=quota_bytes, report=report)
    for note in conversion.notes:
        err.print(f"[yellow]{'PEFT' if conversion.record else 'note'}:[/] {escape(note)}")
    if conversion.forms and conversion.record:
        err.print(
            "what the method draws from a seed or computes from the base weights was made anew here, with torch "
            f"{conversion.record.torch} and PEFT {conversion.record.library_version}"
        )
    shown = table(None, "converted", escape(conversion.delta.method))
    for form, count in conversion.forms.items() or (("read as it is", len(conversion.delta.ops)),):
        shown.add_row(form, f"{count} {'modules' if conversion.forms else 'ops'}")
    shown.add_row("bytes", str(conversion.canonical.size_bytes))
    if conversion.record:
        shown.add_row("parity", parity_text(conversion.record))
    else:
        shown.add_row("parity", "not compared: AdapterHub's library can't be loaded beside this one")
    out.print(shown)
    return conversion


def parity_text(record: ParityRecord) -> str:
    """A parity record in one line."""
    return (
        f"{record.library} {record.library_version}, torch {record.torch}, {record.dtype}: error {record.error:.1e} of "
        f"the logits' scale on {len(record.probes)} prompts, greedy text "
        f"{'equal' if record.greedy_equal else 'different'}"
    )


def base_of(directory: Path) -> str:
    """The base model that the adapter's config names. Raises InvalidRequest where it names none."""
    try:
        config = json.loads((directory / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    name = None
    if isinstance(config, dict):
        name = config.get("base_model_name_or_path") or config.get("model_name")  # PEFT's, AdapterHub's
    if not (isinstance(name, str) and name):
        raise InvalidRequest(
            f"{directory} does not say which base model it is for.",
            param="backbone",
            remedy="Name its directory or Hub id with --backbone.",
        )
    return name
