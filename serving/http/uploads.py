"""From an upload's body to a published version: nothing is visible before all of it is durable and proven."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapters.backbone_spec import BackboneSpec
from adapters.canonical import Canonical, StagedCanonical, stage_canonical, to_canonical
from adapters.errors import (
    Conflict,
    DeltamuxError,
    ErrorInfo,
    Forbidden,
    InvalidRequest,
    PayloadTooLarge,
    Unavailable,
    from_info,
)
from adapters.formats import read_upload
from adapters.formats.bounded import check_bounds
from adapters.formats.canonical_pair import MAX_MANIFEST_BYTES
from adapters.names import check_name
from adapters.normal_form import Delta
from adapters.registry import VersionRecord
from adapters.tensor_files import MappedFile, let_go_of
from adapters.typology import describe
from serving.config import linger_s
from serving.core import AdmissionProof
from serving.http.errors import reply_to
from serving.http.multipart import MAX_LABEL_CHARS, MAX_LABELS, Parts, receive_parts
from serving.http.services import Services
from serving.http.threads import in_thread
from serving.tenancy.principal import Principal

log = logging.getLogger("deltamux.http")


class Uploads:
    """Takes uploads, a bounded number at a time. Use from one event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._hold_s = linger_s(services.settings)

    async def accept(
        self,
        request: Request,
        caller: Principal,
        name: str,
        answer: Callable[[VersionRecord], Response],
    ) -> Response:
        """Publish the delta in the body of `request` as the caller's next version of `name`; `answer` to it.

        Raises Forbidden, InvalidRequest, InvalidDelta, NotFound, Conflict, Overloaded, QuotaExceeded, Unavailable, or
        HTTPException for the body, after which nothing of it is left.
        """
        try:
            slot = self._services.slots.take()
            try:
                parts = await self._receive(request, caller, name)
            except BaseException:
                slot.free()
                raise
        except Exception as error:
            self._count(error)
            raise

        begun = False

        async def publish() -> Response:
            nonlocal begun
            begun = True
            with slot:
                try:
                    record = await self._publish(caller, name, parts)
                except Exception as error:
                    self._count(error)
                    raise
                self._count(None)
            return answer(record)

        # It runs to its end, whatever becomes of the request: cancelling the wait for a thread does not stop the
        # thread, and bytes must not be deleted under a row that is just being committed.
        try:
            return await self._services.idempotency.once(request, caller, parts.content(), publish)
        finally:
            if not begun:
                slot.free()

    async def _receive(self, request: Request, caller: Principal, name: str) -> Parts:
        services, limits = self._services, self._services.settings.limits
        check_name(name)
        if not caller.reaches(caller.tenant, name):
            raise Forbidden(f"This API key may not publish {name!r}.", param="name")
        if name == (await services.backbone()).name:
            raise Conflict(
                f"name: {name!r} is the backbone's own name.", param="name", remedy="Choose another."
            )
        await in_thread(services.registry.check_room, caller.tenant, name, services.quota(caller))
        try:
            async with asyncio.timeout(limits.request_timeout_s):
                return await receive_parts(request, limits.max_upload_bytes)
        except TimeoutError:
            raise Unavailable("The upload's body took too long to arrive.", remedy="Send it again.") from None

    def _count(self, error: BaseException | None) -> None:
        match error:
            case None:
                outcome = "ready"
            case HTTPException():
                outcome = f"http_{error.status_code}"
            case ClientDisconnect():
                outcome = "client_gone"
            case _:
                outcome = reply_to(error).code
        self._services.metrics.uploads.labels(outcome=outcome).inc()

    async def _publish(self, caller: Principal, name: str, parts: Parts) -> VersionRecord:
        services = self._services
        info = await services.backbone()
        if not parts.file_ids:
            read = await in_thread(_read, parts, info.spec_json)
            return await self._store(caller, name, parts, read)
        async with contextmanager_in_threadpool(services.files.spool.staging()) as staging:
            files = await in_thread(self._sent_files, caller, parts)
            read = await in_thread(_read_files, parts, files, info.spec_json, staging)
            return await self._store(caller, name, parts, read)

    def _sent_files(self, caller: Principal, parts: Parts) -> Mapping[str, Path]:
        """The files that the upload names by id. Raises NotFound, and InvalidRequest for two of one name."""
        found: dict[str, Path] = {}
        for file_id in parts.file_ids:
            name, path = self._services.files.open_file(caller.tenant, file_id)
            if name in found or name in parts.files:
                raise InvalidRequest(
                    f"The file {name!a} came twice.", param="file_ids", remedy="Send it once."
                )
            found[name] = path
        return found

    async def _store(self, caller: Principal, name: str, parts: Parts, read: _Read) -> VersionRecord:
        services = self._services
        delta, canonical, facts = read
        digest = canonical.digest
        signed = await in_thread(services.tenancy.signers.check, caller.tenant, digest, parts.signature)
        async with services.digest_lock(digest):
            # before the first byte: no collector, in whatever process, removes what is held
            hold = await in_thread(services.registry.blobs.hold, digest, self._hold_s)
            try:
                await in_thread(services.store.put, digest, canonical.manifest, canonical.tensors)
                proof = asdict(await self._admit(digest)) | facts | signed
                return await self._record(caller, name, delta, canonical, proof, parts, hold)
            except Exception:
                await self._discard(digest, hold)
                raise

    async def _admit(self, digest: str) -> AdmissionProof:
        proof = await self._services.backend.admit(digest)
        if isinstance(proof, ErrorInfo):
            raise from_info(proof)
        return proof

    async def _record(
        self,
        caller: Principal,
        name: str,
        delta: Delta,
        canonical: Canonical | StagedCanonical,
        proof: Mapping[str, Any],
        parts: Parts,
        hold: str,
    ) -> VersionRecord:
        """Version and alias in one transaction."""
        services = self._services
        return await in_thread(
            services.registry.publish,
            caller.tenant,
            name,
            canonical.digest,
            method=delta.method,
            backbone_digest=delta.backbone_digest,
            task=delta.task,
            size_bytes=canonical.size_bytes,
            labels=parts.labels,
            proof=proof,
            alias=parts.alias,
            hold=hold,
            quota=services.quota(caller),
            actor=caller.actor,
        )

    async def _discard(self, digest: str, hold: str) -> None:
        """Free the device memory and the bytes of a failed upload, unless a version or an upload has the same content.

        What can't be removed now is left to collection.
        """
        services = self._services
        try:
            if await in_thread(services.registry.blobs.discard, digest, hold, services.store.delete):
                await services.backend.release(digest)
        except DeltamuxError as error:
            log.warning("a failed upload left sha256:%s behind: %s", digest, type(error).__name__)


class _Read(NamedTuple):
    """A delta, its canonical form, and what the proof says of it beside what the backend measures."""

    delta: Delta
    canonical: Canonical | StagedCanonical
    facts: dict[str, Any]


def _read(parts: Parts, spec_json: str) -> _Read:
    delta = _checked(parts, parts.files, spec_json)
    canonical = to_canonical(delta)
    return _Read(delta, canonical, _facts(parts, delta, canonical))


def _read_files(parts: Parts, sent: Mapping[str, Path], spec_json: str, staging: Path) -> _Read:
    """The delta of files on disk, its canonical form in a file in `staging`. Memory does not grow with them."""
    files: dict[str, bytes | MappedFile] = dict(parts.files)
    for name, path in sent.items():
        files[name] = MappedFile(path) if name.endswith(".safetensors") else _small(name, path)

    def between() -> None:
        let_go_of(files)

    delta = _checked(parts, files, spec_json)
    canonical = stage_canonical(delta, staging / "tensors.safetensors", between=between)
    return _Read(delta, canonical, _facts(parts, delta, canonical, between=between))


def _small(name: str, path: Path) -> bytes:
    """The bytes of a file that is no tensors'."""
    size = path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise PayloadTooLarge(
            f"{name!a}: {size} bytes, at most {MAX_MANIFEST_BYTES} are read.", param="file_ids"
        )
    return path.read_bytes()


def _checked(parts: Parts, files: Mapping[str, bytes | MappedFile], spec_json: str) -> Delta:
    check_bounds(files)
    spec = BackboneSpec.from_json(spec_json)
    return _descending(read_upload(files, spec, backbone_digest=parts.backbone_digest), parts.lineage)


def _facts(
    parts: Parts,
    delta: Delta,
    canonical: Canonical | StagedCanonical,
    *,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Raises InvalidRequest where the record of parity that came along is of something else."""
    facts: dict[str, Any] = {}
    if parts.parity is not None:
        parts.parity.require_proof_of(canonical.digest, delta.backbone_digest)
        facts["parity"] = parts.parity.model_dump()
    if delta.head is not None and delta.head.cloze is not None:
        facts["head"] = delta.head.cloze.shown(delta.head.labels)
    typology = describe(delta, canonical, between=between)
    return {"typology": typology, "lineage": shown_lineage(delta.lineage)} | facts


def _descending(delta: Delta, lineage: Mapping[str, str]) -> Delta:
    """`delta` with what its uploader says of its origin. Raises InvalidRequest where the files say otherwise."""
    if clash := sorted(key for key in lineage if delta.lineage.get(key, lineage[key]) != lineage[key]):
        raise InvalidRequest(
            f"lineage: {clash[0]!a} is {delta.lineage[clash[0]][:40]!a} already, by the files.",
            param="lineage",
            remedy="Use another key.",
        )
    return replace(delta, lineage={**lineage, **delta.lineage})


def shown_lineage(lineage: Mapping[str, str]) -> dict[str, str]:
    """What a proof says of a delta's origin: as much as an upload's field may hold. The manifest has all of it."""
    short = {key: text for key, text in lineage.items() if max(len(key), len(text)) <= MAX_LABEL_CHARS}
    return dict(sorted(short.items())[:MAX_LABELS])
