"""`deltamux demo`: a server with the embedded backbone and deltas, and proof that it serves them as trained."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from adapters.errors import NotFound
from serving.cli import heldout
from serving.cli.client import Client
from serving.cli.console import err, out, stages, table, until_stopped
from serving.cli.heldout import BASE, Result, Score, Task
from serving.cli.push import files_to_send, send
from serving.cli.serve import load

DATA = Path(__file__).parents[2] / "deploy" / "demo"
MODEL = "deltamux-demo"
EXAMPLES_PER_DELTA = 3
PROMPT_CHARS = 60


def demo(
    *,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    once: Annotated[
        bool,
        typer.Option("--once", envvar="DEMO_ONCE", help="Stop after the tables; exit code 1 if they differ."),
    ] = False,
    data: Annotated[Path, typer.Option(help="Directory of the demo's data.", hidden=True)] = DATA,
) -> None:
    """Serve a tiny backbone with three deltas of three methods, and compare them with their offline scores."""
    from serving.deployments import app  # noqa: PLC0415  (heavy)

    tasks = _tasks(data)
    with ExitStack() as stack:
        scratch = Path(
            stack.enter_context(TemporaryDirectory(prefix="deltamux-demo-", ignore_cleanup_errors=True))
        )
        settings = load(
            _flags(data, scratch, port, num_requests=2 * sum(len(t.prompts) for t in tasks)), None
        )
        with stages("starting") as report:
            server = stack.enter_context(app.running(settings, report))
            out.print(
                f"ready in {server.start_s:.1f} s: [bold]{server.url}[/] (single tenant, loopback only)"
            )
            report("uploading the deltas")
            _push(server.url, tasks, data)
        results = _run(server.url, tasks)
        scores = heldout.scores(tasks, results)
        out.print(_examples(tasks, results), _accuracies(scores))
        if once:
            raise typer.Exit(0 if all(score.passes for score in scores) else 1)
        _print_curls(server.url, tasks)
        out.print("Serving; press Ctrl-C to end. What you push here is gone then.")
        until_stopped(app.wait)


def _push(url: str, tasks: list[Task], data: Path) -> None:
    with Client(url) as client:
        for task in tasks:
            version = send(client, task.delta, files_to_send(data / "deltas" / task.delta), fields={})
            out.print(
                f"uploaded [bold]{task.delta}[/] ({task.method}, {task.library}): {version['digest'][:19]}"
            )


def _tasks(data: Path) -> list[Task]:
    try:
        return heldout.read_tasks(json.loads((data / "heldout.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise NotFound(
            f"The demo's data is not at {data}.", remedy="Run the demo from a checkout of the repository."
        ) from None


def _flags(data: Path, scratch: Path, port: int, num_requests: int) -> dict[str, Any]:
    return {
        "server": {"host": "127.0.0.1", "port": port},
        "backbone": {"path": str(data / "backbone"), "name": MODEL},
        "engine": {"max_queue": num_requests},  # the whole held-out set is in flight at once
        "store": {"path": str(scratch / "blobs")},
        "database": {"url": f"sqlite:///{scratch / 'registry.db'}"},
        "auth": {"secret_file": str(scratch / "secret")},
    }


def _run(url: str, tasks: list[Task]) -> list[Result]:
    """Every held-out prompt through its delta and through the bare backbone, all in flight together."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("mixed batch", total=2 * sum(len(task.prompts) for task in tasks))
        batch = heldout.run(url, tasks, MODEL, on_result=lambda: progress.advance(bar))
    out.print(
        f"{len(batch.results)} requests, {len(tasks)} deltas and the bare backbone in one shuffled batch: "
        f"{batch.duration_s:.1f} s"
    )
    return batch.results


def _examples(tasks: list[Task], results: list[Result]) -> Any:
    columns = ("prompt", "delta", "method", "output", "expected", "bare backbone")
    shown = table("One server, one batch", *columns)
    for task in tasks:
        first_of_each = {prompt.expected: prompt for prompt in reversed(task.prompts)}
        for prompt in list(first_of_each.values())[-EXAMPLES_PER_DELTA:]:
            given = {r.model: r for r in results if r.task is task and r.prompt is prompt}
            right = given[task.delta].is_correct
            shown.add_row(
                escape(_end_of(" ".join(prompt.prompt.split()))),
                task.delta,
                task.method,
                f"[{'green' if right else 'red'}]{escape(given[task.delta].text.strip())}[/]",
                escape(prompt.expected),
                f"[dim]{escape(given[BASE].text.strip())}[/]",
            )
    return shown


def _end_of(text: str) -> str:
    return text if len(text) <= PROMPT_CHARS else f"... {text[-PROMPT_CHARS:]}"


def _accuracies(scores: list[Score]) -> Any:
    columns = ("delta", "method", "served", "offline", "bare backbone", "equal?")
    shown = table("Accuracy on the held-out set", *columns)
    for score in scores:
        total = len(score.task.prompts)
        shown.add_row(
            score.task.delta,
            score.task.method,
            f"{score.served_correct / total:.1%}",
            f"{score.task.offline_correct / total:.1%}",
            f"{score.base_correct / total:.1%}",
            f"[{'green' if score.passes else 'red'}]{'yes' if score.is_equal else 'NO'}[/] "
            f"({score.num_identical}/{total} texts identical)",
        )
    return shown


def _print_curls(url: str, tasks: list[Task]) -> None:
    out.print("\nTry it:")
    for task in tasks:
        body = json.dumps(
            {
                "model": task.delta,
                "prompt": task.prompts[0].prompt,
                "max_tokens": task.max_tokens,
                "temperature": 0,
            }
        ).replace("'", "'\\''")
        out.print(
            f"curl {url}/v1/completions -H 'content-type: application/json' -d '{body}'",
            markup=False,
        )
    out.print()
