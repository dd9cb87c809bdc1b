"""Large files in parts, in the shape of OpenAI's Uploads and Files.

An upload is announced with its size, gets its parts in any order, and is completed with the list of them; then it is a
file, which `PUT /v1/adapters/{name}/versions` takes by its id. A part's id is the sha256 of its bytes: whoever sends
it again, after a broken connection or a restart of either side, gets the same id, and `GET /v1/uploads/{id}` tells
what has come.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from adapters.errors import PayloadTooLarge, Unavailable
from adapters.migrations.uploads import PartRecord, UploadRecord
from serving.http.access import Upload
from serving.http.errors import JsonObject
from serving.http.parts import receive_part
from serving.http.schemas import CompleteBody, FileUploadBody
from serving.http.services import Services
from serving.http.threads import in_thread

PART_PREFIX = "part_"
_PART_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {
                        "data": {"type": "string", "format": "binary"},
                        "sha256": {"type": "string"},
                    },
                }
            }
        },
    }
}


def files_router(services: Services) -> APIRouter:
    """`/v1/uploads` and `/v1/files`, and below."""
    files, records, limits = services.files, services.files.records, services.settings.limits
    router = APIRouter(route_class=services.mutation_class, tags=["files"])
    streaming = APIRouter(route_class=services.route_class, tags=["files"])

    @router.post("/v1/uploads")
    async def create(body: FileUploadBody, caller: Upload) -> JsonObject:
        """Announce a file that comes in parts."""
        if body.bytes > limits.max_file_bytes:
            raise PayloadTooLarge(
                f"bytes: got {body.bytes}, the limit is {limits.max_file_bytes}.", param="bytes"
            )
        made = await in_thread(
            records.create,
            caller.tenant,
            filename=body.filename,
            purpose=body.purpose,
            size_bytes=body.bytes,
            sha256=body.sha256,
            lifetime_s=limits.file_lifetime_s,
            quota=services.quota(caller),
        )
        return upload_object(made)

    @router.get("/v1/uploads")
    async def list_uploads(caller: Upload) -> JsonObject:
        """The caller's pending uploads, which can be gone on with."""
        found = await in_thread(records.pending, caller.tenant)
        return {"object": "list", "data": [upload_object(upload) for upload in found]}

    @router.get("/v1/uploads/{upload_id}")
    async def get_upload(upload_id: str, caller: Upload) -> JsonObject:
        """An upload and the parts that have come."""
        upload, parts = await in_thread(records.get, caller.tenant, upload_id)
        return {**upload_object(upload), "parts": [part_object(upload_id, part) for part in parts]}

    @streaming.post("/v1/uploads/{upload_id}/parts", openapi_extra=_PART_BODY)
    async def add_part(upload_id: str, request: Request, caller: Upload) -> JsonObject:
        """Add a part. The same bytes again are the same part, so a repetition has no second effect."""
        with services.slots.take():
            upload = await in_thread(records.require_pending, caller.tenant, upload_id)
            writer = await in_thread(files.spool.open_part, upload_id)
            try:
                async with asyncio.timeout(limits.request_timeout_s):
                    fields = await receive_part(
                        request, writer, min(limits.max_upload_bytes, upload.size_bytes)
                    )
                part = await in_thread(
                    files.add_part, caller.tenant, upload_id, writer, sha256=fields.get("sha256")
                )
            except TimeoutError:
                raise Unavailable("The part took too long to arrive.", remedy="Send it again.") from None
            finally:
                await in_thread(writer.close)
        return part_object(upload_id, part)

    @router.post("/v1/uploads/{upload_id}/complete")
    async def complete(upload_id: str, body: CompleteBody, caller: Upload) -> JsonObject:
        """Make the parts, in this order, one file."""
        with services.slots.take():
            done = await in_thread(
                files.complete,
                caller.tenant,
                upload_id,
                [part_id.removeprefix(PART_PREFIX) for part_id in body.part_ids],
                md5=body.md5.lower() if body.md5 else None,
                sha256=body.sha256,
            )
        return upload_object(done)

    @router.post("/v1/uploads/{upload_id}/cancel")
    async def cancel(upload_id: str, caller: Upload) -> JsonObject:
        """End an upload; its parts are removed a while after."""
        return upload_object(await in_thread(records.cancel, caller.tenant, upload_id))

    @router.get("/v1/files")
    async def list_files(caller: Upload) -> JsonObject:
        """The caller's files that can be used."""
        found = await in_thread(records.files, caller.tenant)
        return {"object": "list", "data": [file_object(upload) for upload in found], "has_more": False}

    @router.get("/v1/files/{file_id}")
    async def get_file(file_id: str, caller: Upload) -> JsonObject:
        """One file."""
        return file_object(await in_thread(records.file, caller.tenant, file_id))

    @router.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str, caller: Upload) -> JsonObject:
        """End the use of a file; deltas made of it stay."""
        await in_thread(records.delete_file, caller.tenant, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    router.include_router(streaming)
    return router


def upload_object(upload: UploadRecord) -> JsonObject:
    """An upload as callers see it."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.size_bytes,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "created_at": int(upload.created_at),
        "expires_at": int(upload.expires_at),
        "sha256": upload.sha256,
        "file": file_object(upload) if upload.file_id else None,
    }


def file_object(upload: UploadRecord) -> JsonObject:
    """The file that an upload has become, as callers see it."""
    return {
        "id": upload.file_id,
        "object": "file",
        "bytes": upload.size_bytes,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": "processed",
        "created_at": int(upload.created_at),
        "expires_at": int(upload.expires_at),
        "sha256": upload.sha256,
    }


def part_object(upload_id: str, part: PartRecord) -> JsonObject:
    """A part as callers see it."""
    return {
        "id": f"{PART_PREFIX}{part.sha256}",
        "object": "upload.part",
        "upload_id": upload_id,
        "created_at": int(part.created_at),
        "bytes": part.size_bytes,
    }
