"""`deltamux push` of what is too large for one body: files in parts, gone on with where an earlier push broke off."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from adapters.errors import Unavailable
from serving.cli.client import Client, JsonObject

MAX_BODY_BYTES = 60 << 20
"""Files of more bytes than this in all go in parts; a server takes a body of 64 MiB."""
PART_BYTES = 16 << 20
"""Smaller than they may be: a part that breaks off is sent again, and the server's HTTP layer holds each in memory."""
_ATTEMPTS = 5
_FIRST_WAIT_S = 0.5

OnBytes = Callable[[int], object]


def is_large(files: Mapping[str, Path]) -> bool:
    """Whether `files` do not fit one body."""
    return sum(path.stat().st_size for path in files.values()) > MAX_BODY_BYTES


def send_large(
    client: Client,
    name: str,
    files: Mapping[str, Path],
    *,
    fields: Mapping[str, str],
    on_bytes: OnBytes,
    part_bytes: int = PART_BYTES,
) -> JsonObject:
    """Send `files` in parts and publish them; returns the version. Raises what the server says is wrong.

    Parts that an earlier push of the same file has sent are not sent again.
    """
    ids = [_send_file(client, label, path, on_bytes, part_bytes) for label, path in files.items()]
    body = {"file_ids": ids, **fields}
    if "parity" in fields:
        body["parity"] = json.loads(fields["parity"])
    version = client.call("PUT", "v1", "adapters", name, "versions", json=body)
    for file_id in ids:
        client.call("DELETE", "v1", "files", file_id)
    return version


def _send_file(client: Client, label: str, path: Path, on_bytes: OnBytes, part_bytes: int) -> str:
    """Send one file; its id."""
    size, digest = path.stat().st_size, _sha256(path)
    for known in client.call("GET", "v1", "files")["data"]:
        if (known["sha256"], known["filename"]) == (digest, label):  # only its publication had failed
            on_bytes(size)
            return str(known["id"])
    upload_id = _begin(client, label, size, digest)
    come = {part["id"] for part in client.call("GET", "v1", "uploads", upload_id)["parts"]}
    ids = []
    for data in _parts(path, part_bytes):
        part_id = f"part_{hashlib.sha256(data).hexdigest()}"
        if part_id not in come:
            _send_part(client, upload_id, data)
        ids.append(part_id)
        on_bytes(len(data))
    done = client.call(
        "POST", "v1", "uploads", upload_id, "complete", json={"part_ids": ids, "sha256": digest}
    )
    return str(done["file"]["id"])


def _begin(client: Client, label: str, size: int, digest: str) -> str:
    """The upload of this file that is open already, or a new one."""
    for known in client.call("GET", "v1", "uploads")["data"]:
        if (known["sha256"], known["filename"], known["bytes"]) == (digest, label, size):
            return str(known["id"])
    body = {
        "bytes": size,
        "filename": label,
        "mime_type": "application/octet-stream",
        "purpose": "user_data",
        "sha256": digest,
    }
    return str(client.call("POST", "v1", "uploads", json=body)["id"])


def _send_part(client: Client, upload_id: str, data: bytes) -> None:
    """Send a part, again where the connection breaks or the server is restarting: it has no second effect."""
    for attempt in range(_ATTEMPTS):
        try:
            client.call("POST", "v1", "uploads", upload_id, "parts", files={"data": ("part", data)})
        except Unavailable:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_FIRST_WAIT_S * 2**attempt)
        else:
            return


def _parts(path: Path, part_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(part_bytes):
            yield data


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
