"""Files sent in parts: bytes in a spool, rows in the registry, and the order of the two.

Bytes are durable before their row is written, and a row is gone only after its bytes: a crash leaves an upload that
can be gone on with, or bytes that the next collection removes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from adapters.errors import Conflict, InvalidRequest, StoreError
from adapters.migrations.uploads import PartRecord, UploadRecord
from adapters.spool import PartWriter, Spool
from adapters.upload_records import UploadRecords, total_bytes


class FileUploads:
    """Uploads of one registry over one spool. Thread-safe; blocks.

    `linger_s`: how long the bytes of an ended upload stay, longer than any request can be at work on them.
    """

    def __init__(self, records: UploadRecords, spool: Spool, *, lifetime_s: float, linger_s: float) -> None:
        self.records = records
        self.spool = spool
        self.lifetime_s = lifetime_s
        self._linger_s = linger_s

    def add_part(self, tenant: str, upload_id: str, writer: PartWriter, *, sha256: str | None) -> PartRecord:
        """Make what `writer` has got a part of a pending upload; sent again it is the same part.

        `sha256`: what its sender says of it, None if nothing. Raises NotFound, Conflict, InvalidRequest.
        """
        got = writer.finish()
        if sha256 not in (None, got):
            self._drop_stranger(tenant, upload_id, got)
            raise InvalidRequest(
                f"sha256: the part that came is {got}, another than was sent.",
                param="sha256",
                remedy="Send it again.",
            )
        return self.records.add_part(
            tenant, upload_id, got, writer.num_bytes, refused=lambda: self.spool.drop_part(upload_id, got)
        )

    def _drop_stranger(self, tenant: str, upload_id: str, sha256: str) -> None:
        known = {part.sha256 for part in self.records.get(tenant, upload_id)[1]}
        if sha256 not in known:
            self.spool.drop_part(upload_id, sha256)

    def complete(
        self, tenant: str, upload_id: str, parts: Sequence[str], *, md5: str | None, sha256: str | None
    ) -> UploadRecord:
        """Put the parts, given by their sha256, together in this order; the upload, which now has a file.

        Raises NotFound; Conflict where the upload has ended; InvalidRequest where the parts are not those of the
        upload, or size, md5 or sha256 are not those announced. Completing again what is completed changes nothing.
        """
        upload, known = self.records.get(tenant, upload_id)
        total = total_bytes(parts, known)
        if total != upload.size_bytes:
            raise InvalidRequest(
                f"The parts have {total} bytes; the upload was announced with {upload.size_bytes}.",
                param="part_ids",
                remedy="Send the parts that are missing, each under 64 MiB, and name them in order.",
            )
        if upload.status == "completed":
            if upload.ended_at is None and sha256 in (None, upload.sha256):
                return upload
            raise Conflict("The upload is completed, and its file is another or gone.", param="upload_id")
        self.records.require_pending(tenant, upload_id)
        made, made_md5 = self.spool.assemble(upload_id, parts)
        wanted = {"md5": (md5, made_md5), "sha256": (sha256, made)}
        if upload.sha256 is not None:
            wanted["sha256, as announced"] = (upload.sha256, made)
        for name, (expected, got) in wanted.items():
            if expected not in (None, got):
                raise InvalidRequest(
                    f"{name}: the file that the parts make has {got}, expected {expected}.",
                    param=name.partition(",")[0],
                    remedy="Check the order of the parts.",
                )
        done = self.records.complete(tenant, upload_id, made, self.lifetime_s)
        with suppress(StoreError):  # they go with the upload then
            self.spool.drop_parts(upload_id)
        return done

    def open_file(self, tenant: str, file_id: str) -> tuple[str, Path]:
        """(file name, where it is) of a file, which stays there for `linger_s` whatever happens. Raises NotFound."""
        upload = self.records.file(tenant, file_id)
        assert upload.sha256 is not None, upload.id
        return upload.filename, self.spool.file(upload.id, upload.sha256)

    def sweep(self) -> int:
        """End what has expired, and remove the bytes of what ended long enough ago; how many uploads went.

        Raises RegistryUnavailable or StoreError, after which the next run goes on.
        """
        ended = self.records.expire(self._linger_s)
        for upload_id in ended:
            self.spool.remove(upload_id)
            self.records.forget(upload_id)
        return len(ended) + self.spool.sweep(self.records.known(), self._linger_s)
