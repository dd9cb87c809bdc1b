"""What the database knows of stored bytes: who holds them, which nobody needs, which are gone.

A blob is *used* while a live version of any tenant has its digest, or an upload holds it. Collection is in two
phases. Marking notes since when a blob is unused; publishing, undeleting and holding it remove the mark. Sweeping
declares a blob that has been marked for the grace period to be gone, so that nothing can be published or undeleted
on it, and then removes its bytes. Bytes are only ever removed inside a writing transaction that sees them declared
gone and unused; only one such transaction runs at a time, in whatever process, so no upload can begin meanwhile.

A crash at any point leaves a blob used, or unused and found by whoever collects next: an upload holds the digest
before its first byte is stored, publishing declares it stored, and bytes of blobs declared gone are removed again.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, insert, select, update

from adapters.errors import StoreError
from adapters.migrations.database import Database
from adapters.migrations.schema import blobs, holds, versions
from adapters.names import check_digest

_LIVE = exists().where(versions.c.digest == blobs.c.digest, versions.c.deleted_at.is_(None))
_GONE = blobs.c.swept_at.is_not(None)


class BlobRecords:
    """The rows about blobs in a registry's database. Thread-safe; blocks. Every method raises RegistryUnavailable."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def hold(self, digest: str, seconds: float) -> str:
        """Keep what is stored under `digest` for so long; the hold's id, for `Registry.publish` or `discard`.

        Call it before the first byte is stored.
        """
        check_digest(digest)
        hold_id, now = uuid.uuid4().hex, self._clock()
        with self._database.write() as tx:
            row = blobs.c.digest == digest
            if tx.scalar(select(blobs.c.digest).where(row)) is None:
                tx.execute(insert(blobs).values(digest=digest, swept_at=now))
            else:
                tx.execute(update(blobs).where(row).values(marked_at=None))
            tx.execute(insert(holds).values(id=hold_id, digest=digest, expires_at=now + seconds))
        return hold_id

    def discard(self, digest: str, hold_id: str, remove: Callable[[str], None]) -> bool:
        """End the hold of an upload that failed, and `remove` the bytes if nobody else has or had a use for them.

        Returns whether they were removed; else they are left to collection.
        """
        with self._database.write() as tx:
            tx.execute(delete(holds).where(holds.c.id == hold_id))
            had = exists().where(versions.c.digest == blobs.c.digest)
            alone = and_(blobs.c.digest == digest, ~had, ~self._held())
            tx.execute(update(blobs).where(alone).values(swept_at=self._clock(), marked_at=None))
        return self.remove(digest, remove)

    def mark(self, stored: Iterable[str]) -> int:
        """Mark what is unused, also those of the digests in `stored` that no row knows of; returns how many."""
        now = self._clock()
        with self._database.write() as tx:
            tx.execute(delete(holds).where(holds.c.expires_at <= now))
            known = set(tx.scalars(select(blobs.c.digest)))
            if unknown := [{"digest": digest} for digest in dict.fromkeys(stored) if digest not in known]:
                tx.execute(insert(blobs), unknown)
            unused = and_(blobs.c.marked_at.is_(None), ~_GONE, ~_LIVE, ~self._held())
            marked = tx.execute(update(blobs).where(unused).values(marked_at=now))
        return marked.rowcount

    def due(self, grace_s: float) -> list[str]:
        """Digests to sweep: their mark is at least `grace_s` seconds old."""
        with self._database.read() as tx:
            return list(tx.scalars(select(blobs.c.digest).where(self._is_due(grace_s))))

    def gone(self) -> frozenset[str]:
        """Digests declared gone that no upload holds: what is stored of them may be removed."""
        with self._database.read() as tx:
            return frozenset(tx.scalars(select(blobs.c.digest).where(_GONE, ~self._held())))

    def sweep(self, digest: str, grace_s: float, remove: Callable[[str], None]) -> bool:
        """Declare a blob gone that is due and still unused, and `remove` its bytes; whether it was."""
        with self._database.write() as tx:
            still = and_(blobs.c.digest == digest, self._is_due(grace_s), ~_LIVE, ~self._held())
            values = {"swept_at": self._clock(), "marked_at": None}
            if not tx.execute(update(blobs).where(still).values(values)).rowcount:
                return False
        return self.remove(digest, remove)

    def remove(self, digest: str, remove: Callable[[str], None]) -> bool:
        """`remove` the bytes of a blob that is declared gone and that no upload holds; whether it was so."""
        with self._database.write() as tx:
            unused = select(blobs.c.digest).where(blobs.c.digest == digest, _GONE, ~_LIVE, ~self._held())
            if tx.scalar(unused) is None:
                return False
            remove(digest)  # in here: whoever wants to hold the digest waits for the end of this transaction
        return True

    def confirm(self, tx: Connection, digest: str, hold_id: str | None) -> None:
        """Note in a writing transaction that `digest` is stored and used, and end the hold under which it was stored.

        Raises StoreError where it is declared gone and the hold has ended.
        """
        row = blobs.c.digest == digest
        known = tx.execute(select(blobs.c.swept_at).where(row)).one_or_none()
        mine = and_(holds.c.id == hold_id, holds.c.digest == digest, holds.c.expires_at > self._clock())
        if known is None:
            tx.execute(insert(blobs).values(digest=digest))
        elif known.swept_at is not None and tx.scalar(select(holds.c.id).where(mine)) is None:
            raise _collected(digest)
        tx.execute(update(blobs).where(row).values(marked_at=None, swept_at=None))
        tx.execute(delete(holds).where(holds.c.id == hold_id))

    def _is_due(self, grace_s: float) -> ColumnElement[bool]:
        return and_(blobs.c.marked_at <= self._clock() - grace_s, ~_GONE)

    def _held(self) -> ColumnElement[bool]:
        return exists().where(holds.c.digest == blobs.c.digest, holds.c.expires_at > self._clock())


def _collected(digest: str) -> StoreError:
    return StoreError(
        f"The bytes of sha256:{digest} are collected: nothing has used them for a while.",
        remedy="Upload the delta again.",
    )
