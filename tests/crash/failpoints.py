"""Where a process can be killed: every step on files and on the database, found by hooks outside the product's code.

Audit events (PEP 578) fire before each file operation, SQLAlchemy's events around each statement and commit, and
the store's own `fsync` argument around each fsync.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

FILE_EVENTS = frozenset(
    {"open", "os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}
)


class Failpoints:
    """Counts the steps of the operation that runs, and kills the process with SIGKILL at the one that is armed.

    `tell` is called with the step's name right before the kill.
    """

    def __init__(self, root: Path, tell: Callable[[str], None]) -> None:
        self._root = str(root)
        self._tell = tell
        self._operation = ""
        self.steps = 0
        self._armed: tuple[str, int] | None = None
        sys.addaudithook(self._audit)
        event.listen(Engine, "begin", lambda _: self.step("begin"))
        event.listen(Engine, "before_cursor_execute", self._statement)
        event.listen(Engine, "commit", lambda _: self.step("commit"))
        event.listen(Engine, "checkin", lambda *_: self.step("committed"))

    def arm(self, operation: str, step: int) -> None:
        """Kill at the `step`-th step, counted from 1, of the next such operation."""
        self._armed = (operation, step)

    def enter(self, operation: str) -> None:
        """An operation begins."""
        self._operation, self.steps = operation, 0

    def leave(self) -> int:
        """The operation has ended; how many steps it had."""
        self._operation = ""
        return self.steps

    def fsync(self, fd: int) -> None:
        """Sync, with a step before and one after: a kill between two steps can't tell them apart otherwise."""
        self.step("before fsync")
        os.fsync(fd)
        self.step("after fsync")

    def step(self, name: str) -> None:
        """Count one step; the process may end here."""
        if not self._operation:
            return
        self.steps += 1
        if self._armed == (self._operation, self.steps):
            self._tell(f"{self._operation}: {name}")
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self._operation and name in FILE_EVENTS and str(arguments[0]).startswith(self._root):
            self.step(name)

    def _statement(self, *arguments: Any) -> None:
        self.step(" ".join(arguments[2].split()[:2]))
