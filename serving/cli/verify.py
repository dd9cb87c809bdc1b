"""`deltamux verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from adapters.errors import InvalidRequest
from serving.cli.console import out, stages, table
from serving.cli.convert import parity_text

if TYPE_CHECKING:
    from serving.model.backbone import Backbone
    from serving.offline.parity import Comparison


def verify(
    directory: Annotated[Path, typer.Argument(help="A delta that the server reads.", metavar="DIR")],
    *,
    backbone: Annotated[str, typer.Option(help="Directory or Hub id of its base model.", metavar="B")],
    reference: Annotated[
        Path | None,
        typer.Option(help="What PEFT loads, if not DIR itself: the directory that DIR was converted from."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file of prompts, one a line, beside the random ones.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Where to write the parity record (DIR/parity.json).", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON, no table.")] = False,
) -> None:
    """Compare our engine with PEFT on your machine: logits and greedy text, prompt by prompt.

    Ends with 1 where they differ by more than the tolerance. The record can go along with an upload.
    """
    from serving.offline.parity import verify as run  # noqa: PLC0415  (heavy)

    with stages("verifying") as report:
        found, loaded = run(directory, backbone, reference=reference, prompts_file=prompts, report=report)
    target = record or directory / "parity.json"
    try:
        target.write_text(found.record.model_dump_json())
    except OSError as error:
        raise InvalidRequest(
            f"{target} can't be written: {error.strerror}.",
            param="record",
            remedy="Name another with --record.",
        ) from None
    if as_json:
        summary = {"error": found.record.error, "passes": found.record.passes}
        out.print_json(json.dumps({**found.record.model_dump(), **summary}))
    else:
        _show(found, loaded)
        out.print(f"record: {escape(str(target))}")
    raise typer.Exit(0 if found.record.passes else 1)


def _show(found: Comparison, backbone: Backbone) -> None:
    """The table of probes and the verdict."""
    from adapters.parity import TOLERANCE  # noqa: PLC0415  (pydantic)

    shown = table(
        f"sha256:{found.record.delta_digest}", "prompt", "tokens", "error", "limit", "greedy text", "text"
    )
    for probe, expected, got in zip(found.record.probes, found.expected, found.got, strict=True):
        inside = probe.error <= TOLERANCE
        texts = [_text(backbone, tokens) for tokens in (expected, got)]
        shown.add_row(
            probe.source,
            f"{probe.prompt_tokens} + {probe.new_tokens}",
            f"{probe.error:.1e}" if inside else f"[red]{probe.error:.1e}[/]",
            f"{TOLERANCE:.0e}",
            "equal" if probe.greedy_equal else "[red]different[/]",
            escape(texts[0] if texts[0] == texts[1] else f"PEFT: {texts[0]}  ours: {texts[1]}"),
        )
    out.print(shown)
    verdict = "[bold green]equal[/]" if found.record.passes else "[bold red]different[/]"
    out.print(f"{verdict}: {escape(parity_text(found.record))}")


def _text(backbone: Backbone, tokens: list[int]) -> str:
    if backbone.tokenizer is None:
        return str(tokens)
    return ascii(backbone.tokenizer.decode(tokens))[1:-1]
