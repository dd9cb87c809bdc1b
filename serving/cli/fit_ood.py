"""`deltamux adapters fit-ood`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from serving.cli.console import out, stages, table


def fit_ood(
    directory: Annotated[Path, typer.Argument(help="A classifier that the server reads.", metavar="DIR")],
    *,
    backbone: Annotated[str, typer.Option(help="Directory or Hub id of its base model.", metavar="B")],
    data: Annotated[
        Path, typer.Option(help="JSONL of `text`, `label` and at most `text_pair`.", metavar="FILE")
    ],
    target: Annotated[
        Path | None, typer.Option("--out", help="Where to write (DIR/ood.safetensors).", metavar="FILE")
    ] = None,
) -> None:
    """Fit what the server tells foreign inputs by: per class, what the head reads on average, and how it varies.

    `deltamux push DIR` sends the file along; then every classification comes with two more scores.
    """
    from serving.offline.fit_ood import fit  # noqa: PLC0415  (heavy)

    with stages("fitting") as report:
        found = fit(directory, backbone, data, report=report)
    written = target or directory / "ood.safetensors"
    found.write(written)
    shown = table(None, "label", "texts")
    for label, count in found.counts.items():
        shown.add_row(escape(label), str(count))
    out.print(shown)
    out.print(f"statistics: {escape(str(written))}")
