"""A server's private directory: Ray's sockets and logs, and a note by which `doctor` finds the server."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

PREFIX = "deltamux-"
STATE_FILE = "server.json"
_LONGEST_ROOT = 11
"""The paths of unix sockets end at 107 characters, HAProxy's at 97, and Ray puts its own 86 further down."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """What a server says of itself to `doctor`, in its private directory."""

    pid: int
    url: str
    backbone: str
    admin_url: str | None = None


class Session:
    """A directory that only this user can enter (mkdtemp's mode), for Ray's sockets and logs.

    It goes with the server unless `keep` is set, and what a killed server left goes with the next one.
    """

    def __init__(self, state: ServerState) -> None:
        for path, owner in _sessions():
            if not _is_running(owner.pid):
                shutil.rmtree(path, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_root()))
        (self.path / STATE_FILE).write_text(json.dumps(asdict(state)))
        self.keep = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.keep:
            shutil.rmtree(self.path, ignore_errors=True)


def running_servers() -> list[ServerState]:
    """Servers of this user on this machine, ready or not."""
    return [state for _, state in _sessions() if _is_running(state.pid)]


def _sessions() -> Iterator[tuple[Path, ServerState]]:
    for file in _root().glob(f"{PREFIX}*/{STATE_FILE}"):
        try:
            if file.stat().st_uid != os.getuid():
                continue
            state = ServerState(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):  # gone, or half written
            continue
        yield file.parent, state


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _root() -> Path:
    wanted = Path(tempfile.gettempdir())
    return wanted if len(str(wanted)) <= _LONGEST_ROOT else Path("/tmp")  # noqa: S108  (mkdtemp's own check)
