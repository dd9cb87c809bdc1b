"""`deltamux doctor`: what is installed, what runs, what is reachable."""

from __future__ import annotations

import platform
import time
from importlib import metadata
from typing import Annotated

import httpx
import typer
from rich.markup import escape

from serving.cli.console import out, stages, table
from serving.cli.sockets import Listener, listeners

PACKAGES = (
    "deltamux",
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "ray",
    "fastapi",
    "sqlalchemy",
    "peft",
    "openai",
)


def doctor(
    *, server: Annotated[list[str] | None, typer.Option(help="Another server to ask.", metavar="URL")] = None
) -> None:
    """Show what is installed, what runs and what is reachable."""
    _installed()
    with stages("importing torch"):
        runs = _what_runs()
    shown = table("Runs", "what", "how")
    for what, how in runs:
        shown.add_row(what, escape(how))
    out.print(shown)
    _reachable(server or [])


def _installed() -> None:
    shown = table("Installed", "package", "version")
    shown.add_row("python", platform.python_version())
    for package in PACKAGES:
        try:
            shown.add_row(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            shown.add_row(package, "-")
    out.print(shown)


def _what_runs() -> list[tuple[str, str]]:
    """Each device and the kernels that it would get, tried out."""
    import torch  # noqa: PLC0415  (heavy)

    square = torch.ones(256, 256)
    started = time.perf_counter()
    square @ square
    runs = [
        (
            "torch on cpu",
            f"{torch.get_num_threads()} threads, {(time.perf_counter() - started) * 1e3:.1f} ms probe",
        ),
        ("torch's cpu kernels", torch.backends.cpu.get_cpu_capability()),
        ("delta kernels on cpu", _delta_kernels()),
    ]
    if not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}, no device" if torch.version.cuda else "not built for it"
        )
        return [*runs, ("torch on cuda", built)]
    try:
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        return [*runs, ("torch on cuda", f"fails: {str(error).splitlines()[0]}")]
    return [*runs, ("torch on cuda", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")]


def _delta_kernels() -> str:
    from serving.kernels.cpu import CpuRows  # noqa: PLC0415  (heavy)
    from serving.kernels.cpu_build import KernelBuildError  # noqa: PLC0415

    try:
        CpuRows()
    except KernelBuildError as error:
        return f"[yellow]plain torch[/], slower: {escape(str(error))}"
    return "compiled for this processor"


def _reachable(others: list[str]) -> None:
    from serving.deployments.session import running_servers  # noqa: PLC0415

    servers = running_servers()
    if not servers and not others:
        out.print("No server of yours runs on this machine.")
        return
    health = table("Servers", "url", "backbone", "pid", "health")
    for state in servers:
        health.add_row(state.url, escape(state.backbone), str(state.pid), escape(_health(state.url)))
    for url in others:
        health.add_row(escape(url), "", "", escape(_health(url)))
    out.print(health)
    for state in servers:
        found = listeners(state.pid)
        if not found:
            out.print(f"The ports of process {state.pid} can't be listed on this system.")
            continue
        ports = table(f"Open ports of {state.url}", "address", "port", "process", "verdict")
        for listener in found:
            ports.add_row(
                listener.address,
                str(listener.port),
                escape(listener.process),
                verdict(listener, *filter(None, (state.url, state.admin_url))),
            )
        out.print(ports)
        if any(not listener.is_loopback for listener in found):
            out.print("Ports that are not on loopback belong behind a firewall.")


def _health(url: str) -> str:
    try:
        answer = httpx.get(f"{url.rstrip('/')}/health/ready", timeout=10.0)
    except httpx.HTTPError as error:
        return f"does not answer ({type(error).__name__})"
    except httpx.InvalidURL:
        return "not a URL"
    return "ready" if answer.is_success else f"not ready ({answer.status_code})"


def verdict(listener: Listener, *urls: str) -> str:
    """What to think of one open port of the server that answers at `urls`."""
    if listener.port in [httpx.URL(url).port for url in urls]:
        if listener.is_loopback:
            return "[green]as meant[/]: HTTP, loopback only"
        return "[yellow]open[/]: HTTP; callers need a key, unless --insecure is all that allows it"
    if listener.is_loopback:
        return "[green]closed[/]: loopback only"
    return "[yellow]guarded[/]: answers Ray's token only"
