"""Where the commands print, and how they fail: what, where, remedy, exit code 1; no traceback for errors of ours."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from typer.core import TyperGroup

from adapters.errors import DeltamuxError, InvalidDelta

# a table in a log file is wide rather than folded into 80 columns
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class ErrorPrintingGroup(TyperGroup):
    """The root command: prints our errors and ends with 1. Any other exception is a bug and shows itself."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except DeltamuxError as error:
            print_error(error)
            raise typer.Exit(1) from None


def print_error(error: DeltamuxError) -> None:
    """What is wrong, every problem on its own line, where, and what to do."""
    listed = error.problems if isinstance(error, InvalidDelta) else ()
    what = f"{len(listed)} problems" if len(listed) > 1 else (listed[0] if listed else error.message)
    err.print(f"[bold red]error:[/] {escape(what)}")
    if len(listed) > 1:
        for problem in listed:
            err.print(f"  - {escape(problem)}")
    if error.param:
        err.print(f"[bold]where:[/] {escape(error.param)}")
    if error.remedy:
        err.print(f"[bold]remedy:[/] {escape(error.remedy)}")


@contextmanager
def stages(first: str) -> Iterator[Callable[[str], None]]:
    """A spinner that shows the present stage; the value takes the next one. Plain lines where there is no terminal."""
    if not err.is_terminal:
        err.print(f"{first} ...")
        yield lambda stage: err.print(f"{stage} ...")
        return
    with err.status(first) as status:
        yield status.update


def transfer_bar() -> Progress:
    """A progress bar in bytes, gone when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=err, transient=True)


def until_stopped(wait: Callable[[], None]) -> None:
    """Wait, and say so when a signal ends the waiting: stopping takes some seconds."""
    try:
        wait()
    except SystemExit:
        err.print("stopping; requests in progress may finish (interrupt again to end at once)")
        raise


def table(title: str | None, *columns: str) -> Table:
    """An empty table in the house style."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def when(at: float) -> str:
    """A time in Unix seconds, as this machine's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
