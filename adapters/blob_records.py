"""What the database knows of stored bytes: who holds them, which nobody needs, which are gone.

A blob is *used* while a live version of any tenant has its digest, or an upload holds it. Collection is in two
phases. Marking notes since when a blob is unused; publishing, undeleting and holding it remove the mark. Sweeping
deletes the bytes of a blob whose mark is older than the grace period, inside the transaction that has just seen it
unused. Only one transaction writes at a time, in whatever process, so a blob can't become used meanwhile.

A crash at any point leaves a blob used, or unused and collected by whoever comes next: an upload holds the digest
before its first byte is stored, and deleting bytes that are gone already is no error.
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


class BlobRecords:
    """The rows about blobs in a registry's database. Thread-safe; blocks. Every method raises RegistryUnavailable."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def hold(self, digest: str, seconds: float) -> str:
        """Keep `digest` from being swept for so long; the hold's id, for `Registry.publish` or `discard`.

        Call it before the first byte is stored.
        """
        check_digest(digest)
        hold_id = uuid.uuid4().hex
        with self._database.write() as tx:
            use(tx, digest, stored=True)
            expires_at = self._clock() + seconds
            tx.execute(insert(holds).values(id=hold_id, digest=digest, expires_at=expires_at))
        return hold_id

    def discard(self, digest: str, hold_id: str, remove: Callable[[str], None]) -> bool:
        """End the hold of an upload that failed, and `remove` the bytes if nobody else has or had a use for them.

        Returns whether they were removed; else they are left to collection. What `remove` raises undoes all.
        """
        with self._database.write() as tx:
            tx.execute(delete(holds).where(holds.c.id == hold_id))
            had = exists().where(versions.c.digest == blobs.c.digest)
            alone = select(blobs.c.digest).where(blobs.c.digest == digest, ~had, ~self._held())
            if tx.execute(alone).one_or_none() is None:
                return False
            self._sweep(tx, digest, remove)
        return True

    def mark(self, stored: Iterable[str]) -> int:
        """Mark what is unused, also those of the digests in `stored` that no row knows of; returns how many."""
        found = list(stored)
        now = self._clock()
        with self._database.write() as tx:
            tx.execute(delete(holds).where(holds.c.expires_at <= now))
            known = dict(tx.execute(select(blobs.c.digest, blobs.c.swept_at)).all())
            if unknown := [{"digest": digest} for digest in dict.fromkeys(found) if digest not in known]:
                tx.execute(insert(blobs), unknown)
            for digest in found:
                if known.get(digest) is not None:  # a power cut has brought it back
                    tx.execute(
                        update(blobs).where(blobs.c.digest == digest).values(swept_at=None, marked_at=None)
                    )
            unused = and_(blobs.c.marked_at.is_(None), blobs.c.swept_at.is_(None), ~_LIVE, ~self._held())
            marked = tx.execute(update(blobs).where(unused).values(marked_at=now))
        return marked.rowcount

    def marked(self, grace_s: float) -> list[str]:
        """Digests whose mark is at least `grace_s` seconds old."""
        with self._database.read() as tx:
            return list(tx.scalars(select(blobs.c.digest).where(self._sweepable(grace_s))))

    def sweep(self, digest: str, grace_s: float, remove: Callable[[str], None]) -> bool:
        """`remove` the bytes of a blob that is still unused; whether it was. What `remove` raises undoes all."""
        with self._database.write() as tx:
            still = select(blobs.c.digest).where(
                blobs.c.digest == digest, self._sweepable(grace_s), ~_LIVE, ~self._held()
            )
            if tx.execute(still).one_or_none() is None:
                return False
            self._sweep(tx, digest, remove)
        return True

    def _sweepable(self, grace_s: float) -> ColumnElement[bool]:
        return and_(blobs.c.marked_at <= self._clock() - grace_s, blobs.c.swept_at.is_(None))

    def _held(self) -> ColumnElement[bool]:
        return exists().where(holds.c.digest == blobs.c.digest, holds.c.expires_at > self._clock())

    def _sweep(self, tx: Connection, digest: str, remove: Callable[[str], None]) -> None:
        remove(digest)
        tx.execute(update(blobs).where(blobs.c.digest == digest).values(swept_at=self._clock()))


def use(tx: Connection, digest: str, *, stored: bool) -> None:
    """Note that `digest` is used from now on. `stored`: its bytes are there, or will be before anyone needs them.

    Raises StoreError where they are swept and not `stored` again.
    """
    row = blobs.c.digest == digest
    known = tx.execute(select(blobs.c.swept_at).where(row)).one_or_none()
    if known is None:
        tx.execute(insert(blobs).values(digest=digest))
        return
    if known.swept_at is not None and not stored:
        raise StoreError(
            f"The bytes of sha256:{digest} are collected: nothing has used them for a while.",
            remedy="Upload the delta again.",
        )
    tx.execute(update(blobs).where(row).values(marked_at=None, swept_at=None))


def end_hold(tx: Connection, hold_id: str) -> None:
    """Remove a hold, where it is still there."""
    tx.execute(delete(holds).where(holds.c.id == hold_id))
