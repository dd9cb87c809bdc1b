"""The `deltamux` command. One module per command; whatever is heavy is imported when its command runs."""

from __future__ import annotations

import typer

from serving.cli.adapters import app as adapters_commands
from serving.cli.audit import app as audit_commands
from serving.cli.console import ErrorPrintingGroup
from serving.cli.convert import convert as convert_command
from serving.cli.demo import demo as demo_command
from serving.cli.doctor import doctor as doctor_command
from serving.cli.keys import app as keys_commands
from serving.cli.push import push as push_command
from serving.cli.serve import serve as serve_command
from serving.cli.signers import app as signers_commands
from serving.cli.tenants import app as tenants_commands
from serving.cli.usage import usage as usage_command
from serving.cli.verify import verify as verify_command

app = typer.Typer(
    name="deltamux",
    help="Many PEFT deltas over one frozen backbone, in one batch.",
    cls=ErrorPrintingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    serve_command,
    push_command,
    convert_command,
    verify_command,
    usage_command,
    demo_command,
    doctor_command,
):
    app.command()(command)
app.add_typer(adapters_commands, name="adapters")
app.add_typer(tenants_commands, name="tenants")
app.add_typer(keys_commands, name="keys")
app.add_typer(signers_commands, name="signers")
app.add_typer(audit_commands, name="audit")
