"""Collection of blobs that nobody needs: any number of processes may run it at any time, and be killed in it."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.file_uploads import FileUploads
from adapters.registry import Registry
from adapters.store import BlobStore


@dataclass(frozen=True, slots=True)
class Collected:
    """What one run did: blobs found unused, unused ones and ended uploads whose bytes it has removed."""

    marked: int
    swept: int
    uploads: int = 0


class Collector:
    """Removes the bytes of deltas that were deleted, or uploaded in vain, at least `grace_s` seconds ago.

    Until then a deletion can be undone, and requests that resolved the name before it still load the delta. Files
    sent in parts that have expired, or were cancelled or deleted, go after a time of their own.
    """

    def __init__(
        self, registry: Registry, store: BlobStore, *, grace_s: float, files: FileUploads | None = None
    ) -> None:
        self._registry = registry
        self._store = store
        self._files = files
        self._grace_s = grace_s

    def collect(self) -> Collected:
        """Mark, then sweep. Raises RegistryUnavailable or StoreError, after which the next run goes on."""
        records = self._registry.blobs
        stored = list(self._store.iter_digests())
        # what a crash left: uploads that never got as far as a version, and sweeps that were broken off
        gone = records.gone()
        leftovers = [digest for digest in stored if digest in gone]
        swept = sum(records.remove(digest, self._store.delete) for digest in leftovers)
        marked = records.mark(stored)
        due = records.due(self._grace_s)
        swept += sum(records.sweep(digest, self._grace_s, self._store.delete) for digest in due)
        return Collected(marked, swept, self._files.sweep() if self._files else 0)
