"""From a multipart body to a published version: nothing is visible before all of it is durable and proven."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapters.backbone_spec import BackboneSpec
from adapters.canonical import Canonical, to_canonical
from adapters.errors import (
    Conflict,
    DeltamuxError,
    ErrorInfo,
    Forbidden,
    InvalidRequest,
    Overloaded,
    Unavailable,
    from_info,
)
from adapters.formats import read_upload
from adapters.formats.bounded import check_bounds
from adapters.names import check_name
from adapters.normal_form import Delta
from adapters.registry import VersionRecord
from adapters.typology import describe
from serving.core import AdmissionProof
from serving.http.errors import reply_to
from serving.http.multipart import MAX_LABEL_CHARS, MAX_LABELS, Parts, receive_parts
from serving.http.services import Services
from serving.http.threads import in_thread
from serving.tenancy.principal import Principal

log = logging.getLogger("deltamux.http")

HOLD_REQUESTS = 3
"""An upload holds its bytes for so many longest requests; one that is killed leaves them to collection then."""


class Uploads:
    """Takes uploads, a bounded number at a time. Use from one event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        # storing and admitting come behind receiving, and each may take as long as a request
        self._hold_s = HOLD_REQUESTS * services.settings.limits.request_timeout_s
        self._num_receiving = 0
        self._publishing: set[asyncio.Task[VersionRecord]] = set()

    async def accept(self, request: Request, caller: Principal, name: str) -> VersionRecord:
        """Publish the delta in the body of `request` as the caller's next version of `name`.

        Raises Forbidden, InvalidRequest, InvalidDelta, Conflict, Overloaded, Unavailable, or HTTPException for the
        body, after which nothing of it is left.
        """
        try:
            parts = await self._receive(request, caller, name)
        except Exception as error:
            self._count(error)
            raise
        # A task of its own, which the end of the request leaves alone: cancelling the wait for a thread does not
        # stop the thread, and bytes must not be deleted under a row that is just being committed.
        task = asyncio.create_task(self._publish(caller, name, parts))
        self._publishing.add(task)
        task.add_done_callback(self._published)
        self._show_open()
        return await asyncio.shield(task)

    async def _receive(self, request: Request, caller: Principal, name: str) -> Parts:
        limits = self._services.settings.limits
        check_name(name)
        if not caller.reaches(caller.tenant, name):
            raise Forbidden(f"This API key may not publish {name!r}.", param="name")
        if name == (await self._services.backbone()).name:
            raise Conflict(
                f"name: {name!r} is the backbone's own name.", param="name", remedy="Choose another."
            )
        if self._num_receiving + len(self._publishing) >= limits.max_open_uploads:
            # at once, not after a wait: a body that waits is memory held for a caller who may be slow
            raise Overloaded(
                f"{limits.max_open_uploads} uploads are in progress already.", remedy="Try again shortly."
            )
        self._num_receiving += 1
        self._show_open()
        try:
            async with asyncio.timeout(limits.request_timeout_s):
                return await receive_parts(request, limits.max_upload_bytes)
        except TimeoutError:
            raise Unavailable("The upload's body took too long to arrive.", remedy="Send it again.") from None
        finally:
            self._num_receiving -= 1
            self._show_open()

    def _published(self, task: asyncio.Task[VersionRecord]) -> None:
        self._publishing.discard(task)
        self._show_open()
        if not task.cancelled():
            self._count(task.exception())

    def _show_open(self) -> None:
        self._services.metrics.uploads_open.set(self._num_receiving + len(self._publishing))

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
        delta, canonical, facts = await in_thread(_read, parts, info.spec_json)
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
        canonical: Canonical,
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


def _read(parts: Parts, spec_json: str) -> tuple[Delta, Canonical, dict[str, Any]]:
    """The delta, its canonical form, and what the proof says of it beside what the backend measures."""
    check_bounds(parts.files)
    spec = BackboneSpec.from_json(spec_json)
    delta = _descending(read_upload(parts.files, spec, backbone_digest=parts.backbone_digest), parts.lineage)
    canonical = to_canonical(delta)
    facts: dict[str, Any] = {"typology": describe(delta, canonical), "lineage": shown_lineage(delta.lineage)}
    if parts.parity is not None:
        parts.parity.require_proof_of(canonical.digest, delta.backbone_digest)
        facts["parity"] = parts.parity.model_dump()
    return delta, canonical, facts


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
