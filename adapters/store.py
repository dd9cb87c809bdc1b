"""Content-addressed blobs: one canonical pair (manifest, tensors) per digest, durable before `put` returns.

`open_store` gives a local directory or, by URL, an object store (`object_store`).

Layout of a local store, where a blob is a directory that appears by one rename:

    <root>/sha256/<first two hex digits>/<64 hex digits>/{manifest.json, tensors.safetensors, sizes.json}
    <root>/staging/<random>/          private work in progress, on the same file system

Nothing but a checked digest ever becomes part of a path. Blobs never change, so readers need no lock.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from adapters.errors import StoreError
from adapters.names import check_digest

FileName = Literal["manifest.json", "tensors.safetensors"]
FILES: tuple[FileName, FileName] = ("manifest.json", "tensors.safetensors")
"""The files of a blob."""

_MANIFEST, _TENSORS = FILES
_SIZES = "sizes.json"
_HEX = "[0-9a-f]"
_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
_REMEDY = "Free space on the store's volume or repair it, then try again."


@dataclass(frozen=True, slots=True)
class Blob:
    """The two files of a blob, as bytes."""

    manifest: bytes
    tensors: bytes


class BlobStore(Protocol):
    """What the rest of the server needs from a blob store. Safe to use from many threads and processes.

    A digest is 64 lower-case hex digits; anything else raises InvalidReference before the store is touched.
    Every other failure raises StoreError.
    """

    def put(self, digest: str, manifest: bytes, tensors: Path | bytes) -> None:
        """Store the pair under `digest`, durably once this returns. Storing the same pair again is free.

        The digest is trusted: the caller has computed it from these bytes. Raises StoreError also where other
        bytes are stored under it.
        """

    def read(self, digest: str) -> Blob:
        """A stored blob. Raises StoreError where it is missing or not whole.

        Whether the bytes are those of the digest is for the caller to check, who parses them anyway.
        """

    def sizes(self, digest: str) -> Mapping[FileName, int]:
        """Bytes of the files of a stored blob, the manifest first. Raises StoreError where it is missing."""

    def read_range(self, digest: str, name: FileName, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of one of its files, for what is too large to be held whole. Raises as `read`."""

    def exists(self, digest: str) -> bool:
        """Whether `digest` is stored."""

    def delete(self, digest: str) -> None:
        """Remove the blob; it disappears at once and whole. An absent blob is no error."""

    def iter_digests(self) -> Iterator[str]:
        """Every digest of which anything is stored, in no promised order."""


def missing(digest: str) -> StoreError:
    """What is raised for a blob that a store does not have."""
    return StoreError(f"The blob sha256:{digest} is not in the store.", remedy="Upload the delta again.")


def open_store(location: str) -> BlobStore:
    """The store at `location`: a directory, or the URL of an object store. Raises StoreError."""
    if "://" not in location:
        return LocalBlobStore(Path(location))
    from adapters.object_store import ObjectBlobStore  # noqa: PLC0415  (a server on a directory needs no client)

    return ObjectBlobStore(location)


class LocalBlobStore:
    """A BlobStore in a local directory. `fsync` takes a file descriptor and is a seam for tests."""

    def __init__(self, root: Path, *, fsync: Callable[[int], None] = os.fsync) -> None:
        self._fsync_fd = fsync
        self._blobs = root.absolute() / "sha256"
        self._staging = root.absolute() / "staging"
        with _disk_errors("open the store"):
            self._make_dirs(self._blobs)
            self._make_dirs(self._staging)

    def put(self, digest: str, manifest: bytes, tensors: Path | bytes) -> None:
        """See BlobStore. A failure after the rename leaves a whole blob without a version: garbage.

        A `tensors` file in a staging directory of this store is taken over without a copy and must not be written
        to afterwards.
        """
        target = self._dir_of(digest)
        with _disk_errors("store a blob"), self._scratch() as scratch:
            num_tensor_bytes = len(tensors) if isinstance(tensors, bytes) else tensors.stat().st_size
            sizes = {_MANIFEST: len(manifest), _TENSORS: num_tensor_bytes}
            if not target.exists():
                blob = scratch / "blob"
                blob.mkdir()
                self._write(blob / _MANIFEST, manifest)
                self._write(blob / _TENSORS, tensors)
                self._write(blob / _SIZES, json.dumps(sizes).encode())
                self._fsync(blob)
                target.parent.mkdir(exist_ok=True)
                _rename_unless_present(blob, target)
            if (stored := _checked_sizes(target)) != sizes:
                raise StoreError(
                    f"The blob sha256:{digest} is stored with sizes {stored}; got {sizes} for this digest."
                )
            # Also where the blob was there before: whoever renamed it may not have come this far yet.
            self._fsync(target.parent)
            self._fsync(self._blobs)

    def read(self, digest: str) -> Blob:
        """See BlobStore."""
        target = self._dir_of(digest)
        with _disk_errors("read a blob"):
            if not target.exists():
                raise missing(digest)
            _checked_sizes(target)
            return Blob((target / _MANIFEST).read_bytes(), (target / _TENSORS).read_bytes())

    def sizes(self, digest: str) -> Mapping[FileName, int]:
        """See BlobStore."""
        target = self._dir_of(digest)
        with _disk_errors("look for a blob"):
            if not target.exists():
                raise missing(digest)
            got = _checked_sizes(target)
        return {name: got[name] for name in FILES}

    def read_range(self, digest: str, name: FileName, start: int, stop: int) -> bytes:
        """See BlobStore."""
        with _disk_errors("read a blob"), (self._dir_of(digest) / name).open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise StoreError(f"The blob sha256:{digest} is damaged: {name} is shorter than recorded.")
        return data

    def exists(self, digest: str) -> bool:
        """See BlobStore."""
        with _disk_errors("look for a blob"):
            return self._dir_of(digest).exists()

    def delete(self, digest: str) -> None:
        """See BlobStore. Not fsynced: a blob that a power cut brings back is garbage, collected once more."""
        target = self._dir_of(digest)
        with _disk_errors("delete a blob"), self._scratch() as scratch, suppress(FileNotFoundError):
            target.rename(scratch / "blob")

    def iter_digests(self) -> Iterator[str]:
        """See BlobStore."""
        with _disk_errors("list the blobs"):
            for blob in self._blobs.glob(f"{_HEX * 2}/{_HEX * 64}"):
                yield blob.name

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private directory for an upload, removed on exit whatever happens.

        A full or failing disk met by the body also leaves as StoreError.
        """
        with _disk_errors("stage an upload", _DISK_ERRNOS), self._scratch() as scratch:
            yield scratch

    def sweep_staging(self, older_than_s: float) -> int:
        """Remove staging directories without a change for `older_than_s` seconds; returns how many.

        These are what killed processes left. Choose it longer than any pause of an upload in progress.
        """
        num_removed = 0
        with _disk_errors("sweep the staging area"):
            for entry in self._staging.iterdir():
                if time.time() - _last_change(entry) >= older_than_s:
                    shutil.rmtree(entry, ignore_errors=True)
                    num_removed += 1
        return num_removed

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        scratch = Path(tempfile.mkdtemp(dir=self._staging))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # what stays is swept at the next start

    def _dir_of(self, digest: str) -> Path:
        return self._blobs / check_digest(digest)[:2] / digest

    def _write(self, path: Path, content: Path | bytes) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.is_relative_to(self._staging):
            os.link(content, path)
        else:  # someone else's file: a link would let them change the blob
            shutil.copyfile(content, path)
        self._fsync(path)

    def _make_dirs(self, path: Path) -> None:
        """mkdir -p, durable: a new directory exists only once its parent is synced."""
        if not path.parent.exists():
            self._make_dirs(path.parent)
        path.mkdir(exist_ok=True)
        self._fsync(path.parent)

    def _fsync(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            self._fsync_fd(fd)
        finally:
            os.close(fd)


def _checked_sizes(blob: Path) -> dict[str, int]:
    """File name -> bytes of a stored blob. Raises StoreError where they are not those recorded."""
    recorded: object = None
    got: dict[str, int] = {}
    with suppress(FileNotFoundError, ValueError):
        recorded = json.loads((blob / _SIZES).read_bytes())
        got = {name: (blob / name).stat().st_size for name in (_MANIFEST, _TENSORS)}
    if not got or got != recorded:
        raise StoreError(
            f"The blob sha256:{blob.name} is damaged: its files have sizes {got}, expected {recorded}.",
            remedy="Let the operator delete it, then upload the delta again.",
        )
    return got


def _rename_unless_present(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:  # another writer of the same content was first
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _last_change(directory: Path) -> float:
    """Unix time of the latest change below `directory`; a long write changes only the file's own time."""
    latest = 0.0
    for folder, _, files in os.walk(directory):
        for name in (".", *files):
            with suppress(FileNotFoundError):  # its owner has just finished
                latest = max(latest, os.lstat(os.path.join(folder, name)).st_mtime)
    return latest


@contextmanager
def _disk_errors(doing: str, errnos: frozenset[int] | None = None) -> Iterator[None]:
    """Turn OSError (only those in `errnos`, where given) into StoreError, whose message names no path."""
    try:
        yield
    except OSError as error:
        if errnos is not None and error.errno not in errnos:
            raise
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise StoreError(f"The store can't {doing}: {reason}.", remedy=_REMEDY) from error
