"""One server as a context: private directory, port, Ray, deployments; all of it gone at the end."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from adapters.errors import BackboneRefused, InvalidRequest, Unavailable
from serving.config import Settings
from serving.deployments.environment import ray_environment
from serving.deployments.ports import bound_socket, reserved_port
from serving.deployments.session import ServerState, Session

SAME_SIGNAL_S = 1.0
"""Signals that come closer together count as one."""
MAX_OPEN_FILES = 65536


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers. `start_s`: seconds from the first call to ready. `logs`: where Ray and Serve write.

    `has_keys`: callers need one; else the server is single-tenant and open to whoever reaches it. `admin_url`: where
    administrators' routes are, None where they are among the others.
    """

    url: str
    admin_url: str | None
    start_s: float
    logs: Path
    has_keys: bool


@contextmanager
def running(settings: Settings, report: Callable[[str], None]) -> Iterator[RunningServer]:
    """Start a server, and end it with the body. `report` is told each stage.

    Call it from the main thread, once per process: Ray reads its environment only when it is first imported.
    Raises DeltamuxError where the server can't start.
    """
    began = time.monotonic()
    host = settings.server.host
    _check_path(settings.backbone.path)
    has_keys = check_exposure(settings)
    _allow_many_files()
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.getsignal(number))
        _end_on_signals()
        port = stack.enter_context(reserved_port(host, settings.server.port))
        url = _url(host, port)
        admin_url = None
        if settings.server.admin_port is not None:
            admin = stack.enter_context(bound_socket(settings.server.admin_host, settings.server.admin_port))
            admin_url = _url(settings.server.admin_host, admin.getsockname()[1])
        state = ServerState(os.getpid(), url, settings.backbone.served_name, admin_url)
        session = stack.enter_context(Session(state))
        os.environ.update(ray_environment(settings, session.path))
        report("starting Ray")
        # now that the environment is set
        from serving.deployments import cluster  # noqa: PLC0415

        stack.callback(cluster.kill)
        try:
            cluster.start(settings, session.path, host, port)
            _end_on_signals()  # again: Ray has put its own handler in place
            report("loading the backbone")
            cluster.deploy(settings)
        except cluster.StartFailed as error:
            session.keep = True
            raise Unavailable(
                f"The server failed to start: {error}", remedy=f"The logs are in {session.path}."
            ) from None
        stack.callback(cluster.stop)
        if admin_url is not None:
            from serving.deployments import administration  # noqa: PLC0415  (heavy)

            stack.enter_context(administration.answering(settings, admin))
        logs = session.path / "session_latest" / "logs"
        yield RunningServer(url, admin_url, time.monotonic() - began, logs, has_keys)


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def wait() -> None:
    """Sleep until a signal ends the program."""
    threading.Event().wait()


def _end_on_signals() -> None:
    """Have SIGINT and SIGTERM end the program in order, and a second one at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_in_order)


def check_exposure(settings: Settings) -> bool:
    """Whether there are keys. Raises InvalidRequest where there are none and others than this machine could call."""
    from serving.tenancy.tenancy import Tenancy  # noqa: PLC0415  (heavy)

    with Tenancy(settings) as tenancy:
        has_keys = tenancy.keys.any()
    if not (has_keys or settings.server.is_loopback or settings.server.insecure):
        hosts = f"{settings.server.host!r} and, for administrators, {settings.server.admin_host!r}"
        raise InvalidRequest(
            f"host: got {hosts}, expected loopback addresses, since there are no keys.",
            param="server.host",
            remedy="Make one with `deltamux keys bootstrap`, listen on 127.0.0.1, or set insecure (--insecure) if "
            "all who reach the port may do everything.",
        )
    return has_keys


def _check_path(path: str) -> None:
    """Refuse at once what only looks like a directory. Raises BackboneRefused."""
    directory = Path(path)
    if directory.is_dir():
        problem = "" if (directory / "config.json").is_file() else "has no config.json"
    else:  # a Hub id is "name" or "owner/name"
        problem = (
            "does not exist" if directory.is_absolute() or path.startswith(".") or path.count("/") > 1 else ""
        )
    if problem:
        raise BackboneRefused(
            f"The directory {path} {problem}.",
            param="backbone",
            remedy="Give a directory that save_pretrained wrote, or a Hub id.",
        )


def _allow_many_files() -> None:
    """Raise the soft limit of open files, which Ray's processes inherit: every open stream is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _end_in_order(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (signal's signature)
    first = time.monotonic()

    def end_at_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        # supervisors send one signal to the process and again to its group: that is not impatience
        if time.monotonic() - first > SAME_SIGNAL_S:
            os._exit(128 + number)  # the kernel ends Ray's processes with this one

    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, end_at_once)
    raise SystemExit(0)
