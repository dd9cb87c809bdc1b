"""A power cut without one: what a disk has to keep is what was fsynced, and not a byte more.

`Disk.fsync` is given to a store in place of `os.fsync`. It notes the content of a synced file, and the names in a
synced directory. `survive` then writes down a directory tree that a journalling file system may show after a power
cut at this moment (POSIX fsync(2); ext4 and XFS give more): unsynced names are there or not, unsynced content isn't.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

Keeps = Callable[[], bool]
"""Whether a change of a name survives although its directory was not synced: asked per name."""


class Disk:
    """What has been synced below `root`, by inode."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._content: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._is_directory: dict[int, bool] = {}
        self._open: list[int] = []  # an inode that is open is not given to another file

    def fsync(self, fd: int) -> None:
        """In place of `os.fsync`."""
        self._open.append(os.dup(fd))
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = self._listed(Path(os.readlink(f"/proc/self/fd/{fd}")))
        else:
            self._content[found.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()

    def survive(self, target: Path, keeps: Keeps) -> None:
        """Write what is left after a power cut to the new directory `target`."""
        self._survive(self._root, os.stat(self._root).st_ino, target, keeps)

    def close(self) -> None:
        """Let go of the files."""
        for fd in self._open:
            os.close(fd)

    def _survive(self, now: Path | None, inode: int, target: Path, keeps: Keeps) -> None:
        target.mkdir()
        synced = self._names.get(inode, {})
        present = self._listed(now) if now is not None else synced
        for name in sorted(synced.keys() | present.keys()):
            changed = synced.get(name) != present.get(name)
            kept = (present if changed and keeps() else synced).get(name)
            if kept is None:
                continue
            at = now / name if now is not None and present.get(name) == kept else None
            if self._is_directory[kept]:
                self._survive(at, kept, target / name, keeps)
            else:
                (target / name).write_bytes(self._content.get(kept, b""))

    def _listed(self, directory: Path) -> dict[str, int]:
        found = {}
        with os.scandir(directory) as entries:
            for entry in entries:
                found[entry.name] = entry.inode()
                self._is_directory[entry.inode()] = entry.is_dir(follow_symlinks=False)
        return found
