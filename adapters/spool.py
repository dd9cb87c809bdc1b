"""Bytes on their way in: parts of files, and the files made of them, on a disk of the server until they are used.

    <root>/<upload id>/part-<64 hex digits>     a part, under the sha256 of its bytes
    <root>/<upload id>/file-<64 hex digits>     what the parts make, likewise
    <root>/<upload id>/.<random>                being written
    <root>/staging/<random>/                    private work in progress

Everything appears by one rename after it is synced; names come from ids and digests that the server has made.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import BinaryIO

from adapters.store import disk_errors

_COPY_BYTES = 1 << 20
_UPLOAD_ID = re.compile(r"upload_[0-9a-f]{32}")
_STAGING = "staging"


class Spool:
    """A directory of uploads in progress. Thread-safe; every method raises StoreError where the disk fails.

    `fsync` takes a file descriptor and is a seam for tests.
    """

    def __init__(self, root: Path, *, fsync: Callable[[int], None] = os.fsync) -> None:
        self._root = root.absolute()
        self._fsync_fd = fsync
        with disk_errors("open the spool"):
            (self._root / _STAGING).mkdir(parents=True, exist_ok=True)
            self._fsync(self._root)
            self._fsync(self._root.parent)

    def open_part(self, upload_id: str) -> PartWriter:
        """A part to be written, for its caller to close: gone then unless it was finished."""
        directory = self._root / _checked(upload_id)
        with disk_errors("store a part"):
            directory.mkdir(exist_ok=True)
            self._fsync(self._root)
            return PartWriter(directory / f".{uuid.uuid4().hex}", self._fsync_fd, self._fsync)

    def drop_part(self, upload_id: str, sha256: str) -> None:
        """Remove a part that the records refused."""
        with disk_errors("remove a part"):
            self._part(upload_id, sha256).unlink(missing_ok=True)

    def assemble(self, upload_id: str, parts: Sequence[str]) -> tuple[str, str]:
        """Make the file of `parts`, given by their sha256 in order; (sha256, md5) of it. It is durable, and findable
        by its sha256 alone, so that files of other orders of the same parts stand beside it."""
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        directory = self._root / _checked(upload_id)
        temporary = directory / f".{uuid.uuid4().hex}"
        with disk_errors("put an upload together"):
            try:
                with temporary.open("xb") as file:
                    for part in parts:
                        with self._part(upload_id, part).open("rb") as source:
                            while data := source.read(_COPY_BYTES):
                                sha256.update(data)
                                md5.update(data)
                                file.write(data)
                    file.flush()
                    self._fsync_fd(file.fileno())
                temporary.rename(directory / f"file-{sha256.hexdigest()}")
                self._fsync(directory)
            finally:
                temporary.unlink(missing_ok=True)
        return sha256.hexdigest(), md5.hexdigest()

    def drop_parts(self, upload_id: str) -> None:
        """Remove the parts of an upload that is completed."""
        with disk_errors("remove parts"):
            for part in (self._root / _checked(upload_id)).glob("part-*"):
                part.unlink(missing_ok=True)

    def file(self, upload_id: str, sha256: str) -> Path:
        """Where the file of a completed upload is."""
        return self._root / _checked(upload_id) / f"file-{sha256}"

    def remove(self, upload_id: str) -> None:
        """Remove everything of an upload."""
        with disk_errors("remove an upload"), suppress(FileNotFoundError):
            shutil.rmtree(self._root / _checked(upload_id))

    def sweep(self, known: Collection[str], older_than_s: float) -> int:
        """Remove what no record knows and nobody has changed for so long: what killed processes left. How many."""
        num_removed = 0
        with disk_errors("sweep the spool"):
            stray = [entry for entry in self._root.iterdir() if _UPLOAD_ID.fullmatch(entry.name)]
            stray = [entry for entry in stray if entry.name not in known]
            for entry in [*stray, *(self._root / _STAGING).iterdir()]:
                with suppress(FileNotFoundError):
                    if time.time() - entry.stat().st_mtime >= older_than_s:
                        shutil.rmtree(entry)
                        num_removed += 1
        return num_removed

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private directory, removed on exit whatever happens. A failing disk also leaves as StoreError."""
        with disk_errors("stage an upload"):
            scratch = Path(mkdtemp(dir=self._root / _STAGING))
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)  # what stays is swept

    def _part(self, upload_id: str, sha256: str) -> Path:
        return self._root / _checked(upload_id) / f"part-{sha256}"

    def _fsync(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            self._fsync_fd(fd)
        finally:
            os.close(fd)


class PartWriter:
    """Bytes of one part, hashed while they are written. Blocks. Raises StoreError where the disk fails."""

    def __init__(self, path: Path, fsync_fd: Callable[[int], None], fsync: Callable[[Path], None]) -> None:
        self._path = path
        self._file: BinaryIO = path.open("xb")
        self._fsync_fd = fsync_fd
        self._fsync = fsync
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        """Add bytes."""
        with disk_errors("store a part"):
            self._file.write(data)
        self._sha256.update(data)
        self.num_bytes += len(data)

    def finish(self) -> str:
        """Make the part durable; its sha256."""
        digest = self._sha256.hexdigest()
        with disk_errors("store a part"):
            self._file.flush()
            self._fsync_fd(self._file.fileno())
            self._file.close()
            self._path.rename(self._path.with_name(f"part-{digest}"))
            self._fsync(self._path.parent)
        return digest

    def close(self) -> None:
        """Remove what was not finished."""
        with suppress(
            OSError
        ):  # a full disk, met again where the buffer is written; what stays goes with the upload
            self._file.close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def _checked(upload_id: str) -> str:
    """`upload_id`, which is about to become part of a path."""
    assert _UPLOAD_ID.fullmatch(upload_id), "not an id of ours"
    return upload_id
