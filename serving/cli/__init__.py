"""The `deltamux` command. One module per command; whatever is heavy is imported when its command runs."""

from __future__ import annotations

import typer

from serving.cli import adapters, demo, doctor, push, serve
from serving.cli.console import ErrorPrintingGroup

app = typer.Typer(
    name="deltamux",
    help="Many PEFT deltas over one frozen backbone, in one batch.",
    cls=ErrorPrintingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve.serve)
app.command()(push.push)
app.add_typer(adapters.app, name="adapters")
app.command()(demo.demo)
app.command()(doctor.doctor)
