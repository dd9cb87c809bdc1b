"""What the database knows of files that are sent in parts: which are open, what has come, which may go.

An upload is `pending` until it is completed, cancelled or expired. Removal is in two phases: ending it (`ended_at`),
after which nobody may add to it or use its file, and a while later, when no request can still be at work on it,
removing its bytes and then its rows.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, and_, delete, insert, select, update

from adapters.errors import Conflict, InvalidRequest, NotFound
from adapters.migrations.database import Database
from adapters.migrations.uploads import PartRecord, UploadRecord, upload_parts, uploads
from adapters.quotas import Quota, check_file


class UploadRecords:
    """The rows about uploads in a registry's database. Thread-safe; blocks. Every method raises RegistryUnavailable.

    An upload of another tenant is not found.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def create(
        self,
        tenant: str,
        *,
        filename: str,
        purpose: str,
        size_bytes: int,
        sha256: str | None,
        lifetime_s: float,
        quota: Quota,
    ) -> UploadRecord:
        """Begin an upload that is open for `lifetime_s` seconds. Raises QuotaExceeded."""
        with self._database.write() as tx:
            now = self._clock()
            self._expire(tx, now)
            check_file(tx, quota, tenant, size_bytes)
            made = UploadRecord(
                id=f"upload_{uuid.uuid4().hex}",
                tenant=tenant,
                filename=filename,
                purpose=purpose,
                size_bytes=size_bytes,
                sha256=sha256,
                status="pending",
                file_id=None,
                created_at=now,
                expires_at=now + lifetime_s,
                ended_at=None,
            )
            tx.execute(insert(uploads).values({name: getattr(made, name) for name in made.__slots__}))
        return made

    def get(self, tenant: str, upload_id: str) -> tuple[UploadRecord, tuple[PartRecord, ...]]:
        """An upload and its parts in the order of their coming. Raises NotFound."""
        with self._database.read() as tx:
            return self._require(tx, tenant, upload_id), _parts(tx, upload_id)

    def pending(self, tenant: str) -> tuple[UploadRecord, ...]:
        """The uploads that can be gone on with, oldest first."""
        query = select(uploads).where(
            uploads.c.tenant == tenant, uploads.c.status == "pending", uploads.c.expires_at > self._clock()
        )
        with self._database.read() as tx:
            rows = tx.execute(query.order_by(uploads.c.created_at, uploads.c.id)).all()
        return tuple(UploadRecord(*row) for row in rows)

    def require_pending(self, tenant: str, upload_id: str) -> UploadRecord:
        """An upload that parts can be added to. Raises NotFound, Conflict."""
        with self._database.read() as tx:
            return _pending(self._require(tx, tenant, upload_id))

    def add_part(
        self, tenant: str, upload_id: str, sha256: str, size_bytes: int, *, refused: Callable[[], object]
    ) -> PartRecord:
        """Note a part whose bytes are durable. One that is known already stays as it is.

        Raises NotFound; Conflict, and InvalidRequest where there is more than the upload was announced with, after
        `refused` is called, while nobody else can add the same part.
        """
        with self._database.write() as tx:
            upload = self._require(tx, tenant, upload_id)
            if upload.status != "pending":
                refused()
            _pending(upload)
            parts = _parts(tx, upload_id)
            if known := next((part for part in parts if part.sha256 == sha256), None):
                return known
            total = sum(part.size_bytes for part in parts) + size_bytes
            if total > upload.size_bytes:
                refused()
                raise InvalidRequest(
                    f"The parts have {total} bytes; the upload was announced with {upload.size_bytes}.",
                    param="data",
                )
            part = PartRecord(sha256, size_bytes, self._clock())
            row = {name: getattr(part, name) for name in part.__slots__}
            tx.execute(insert(upload_parts).values(upload_id=upload_id, **row))
        return part

    def complete(self, tenant: str, upload_id: str, sha256: str, lifetime_s: float) -> UploadRecord:
        """Make an upload whose bytes are durable a file, for `lifetime_s` seconds. Raises NotFound, Conflict."""
        with self._database.write() as tx:
            upload = self._require(tx, tenant, upload_id)
            if upload.status == "completed" and upload.sha256 == sha256:
                return upload
            _pending(upload)
            values = {
                "status": "completed",
                "sha256": sha256,
                "file_id": f"file-{uuid.uuid4().hex}",
                "expires_at": self._clock() + lifetime_s,
            }
            tx.execute(update(uploads).where(uploads.c.id == upload_id).values(values))
            return self._require(tx, tenant, upload_id)

    def cancel(self, tenant: str, upload_id: str) -> UploadRecord:
        """End a pending upload; one that is cancelled already stays so. Raises NotFound, Conflict."""
        with self._database.write() as tx:
            upload = self._require(tx, tenant, upload_id)
            if upload.status != "cancelled":
                _pending(upload)
                values = {"status": "cancelled", "ended_at": self._clock()}
                tx.execute(update(uploads).where(uploads.c.id == upload_id).values(values))
            return self._require(tx, tenant, upload_id)

    def file(self, tenant: str, file_id: str) -> UploadRecord:
        """The upload that has become this file, which can still be used. Raises NotFound."""
        with self._database.read() as tx:
            return self._file(tx, tenant, file_id)

    def files(self, tenant: str) -> tuple[UploadRecord, ...]:
        """Every file that can be used, oldest first."""
        usable = and_(uploads.c.status == "completed", uploads.c.ended_at.is_(None))
        query = select(uploads).where(
            uploads.c.tenant == tenant, usable, uploads.c.expires_at > self._clock()
        )
        with self._database.read() as tx:
            rows = tx.execute(query.order_by(uploads.c.created_at, uploads.c.id)).all()
        return tuple(UploadRecord(*row) for row in rows)

    def delete_file(self, tenant: str, file_id: str) -> None:
        """End the use of a file. Raises NotFound."""
        with self._database.write() as tx:
            self._file(tx, tenant, file_id)
            tx.execute(update(uploads).where(uploads.c.file_id == file_id).values(ended_at=self._clock()))

    def expire(self, linger_s: float) -> list[str]:
        """End what is too old; the uploads that ended at least `linger_s` seconds ago."""
        with self._database.write() as tx:
            now = self._clock()
            self._expire(tx, now)
            query = select(uploads.c.id).where(uploads.c.ended_at <= now - linger_s)
            return list(tx.scalars(query))

    def forget(self, upload_id: str) -> None:
        """Remove the rows of an ended upload whose bytes are gone."""
        with self._database.write() as tx:
            tx.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload_id))
            tx.execute(delete(uploads).where(uploads.c.id == upload_id, uploads.c.ended_at.is_not(None)))

    def known(self) -> frozenset[str]:
        """Every upload that there is a row of."""
        with self._database.read() as tx:
            return frozenset(tx.scalars(select(uploads.c.id)))

    def _expire(self, tx: Connection, now: float) -> None:
        old = and_(uploads.c.ended_at.is_(None), uploads.c.expires_at <= now)
        pending = uploads.c.status == "pending"
        tx.execute(update(uploads).where(old, pending).values(status="expired", ended_at=now))
        tx.execute(update(uploads).where(old, ~pending).values(ended_at=now))

    def _require(self, tx: Connection, tenant: str, upload_id: str) -> UploadRecord:
        query = select(uploads).where(uploads.c.id == upload_id, uploads.c.tenant == tenant)
        row = tx.execute(query).one_or_none()
        if row is None:
            raise NotFound("There is no such upload.", param="upload_id")
        return self._as_of_now(row)

    def _as_of_now(self, row: Any) -> UploadRecord:
        """The record; one that is too old is expired, whether or not a collection has come by yet."""
        found = UploadRecord(*row)
        if found.status == "pending" and found.expires_at <= self._clock():
            return UploadRecord(*[*row[:6], "expired", *row[7:]])
        return found

    def _file(self, tx: Connection, tenant: str, file_id: str) -> UploadRecord:
        usable = and_(uploads.c.ended_at.is_(None), uploads.c.expires_at > self._clock())
        query = select(uploads).where(uploads.c.file_id == file_id, uploads.c.tenant == tenant, usable)
        row = tx.execute(query).one_or_none()
        if row is None:
            raise NotFound(
                f"The file {file_id[:40]!a} does not exist, or has expired.",
                param="file_id",
                remedy="Send it again.",
            )
        return UploadRecord(*row)


def total_bytes(parts: Sequence[str], known: Sequence[PartRecord]) -> int:
    """Bytes of the file that `parts`, given by their sha256, make in this order; one may come several times.

    Raises InvalidRequest where one is not among the `known`.
    """
    sizes = {part.sha256: part.size_bytes for part in known}
    if strangers := [part for part in parts if part not in sizes]:
        raise InvalidRequest(
            f"part_ids: {len(strangers)} of {len(parts)} are not parts of this upload.", param="part_ids"
        )
    return sum(sizes[part] for part in parts)


def _parts(tx: Connection, upload_id: str) -> tuple[PartRecord, ...]:
    columns = (upload_parts.c.sha256, upload_parts.c.size_bytes, upload_parts.c.created_at)
    query = select(*columns).where(upload_parts.c.upload_id == upload_id)
    ordered = query.order_by(upload_parts.c.created_at, upload_parts.c.sha256)
    return tuple(PartRecord(*row) for row in tx.execute(ordered))


def _pending(upload: UploadRecord) -> UploadRecord:
    """`upload`, if it is open. Raises Conflict."""
    if upload.status != "pending":
        raise Conflict(
            f"The upload is {upload.status}; only a pending one takes parts and can be completed or cancelled.",
            param="upload_id",
            remedy="Begin another upload.",
        )
    return upload
