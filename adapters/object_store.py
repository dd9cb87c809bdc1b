"""A BlobStore in an object store (S3 and what speaks its API, Google Cloud Storage, Azure), through obstore.

    <prefix>/sha256/<64 hex digits>/tensors.safetensors    written first
    <prefix>/sha256/<64 hex digits>/manifest.json          written last and removed first: with it the blob exists
    <prefix>/sha256/<64 hex digits>/tensors.staged         in parts, of a large file on its way to the first

Every object is created on the condition that it is not there, and read back before it is relied on. Parts can't be put
together under a condition everywhere, so a large file is staged and then copied, inside the object store. None is in
memory as a whole. Credentials and endpoints come from the environment, as obstore's stores read it (AWS_*, GOOGLE_*,
AZURE_*).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore import exceptions
from obstore.store import from_url

from adapters.errors import StoreError
from adapters.names import check_digest
from adapters.store import FILES, Blob, FileName, missing

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_MANIFEST, _TENSORS = FILES
_STAGED = "tensors.staged"
_FOLDER = "sha256"
_BLOB_PATH = re.compile(rf"(?:^|/){_FOLDER}/([0-9a-f]{{64}})/[^/]+$")
_S3 = ("s3", "s3a")
_SCHEMES = (*_S3, "gs", "az", "azure", "abfs", "abfss", "adl")
_PART_BYTES = 8 << 20  # what is longer is sent in parts of so many, two at a time
_PIECE_BYTES = 1 << 20  # is compared at a time
_ATTEMPTS = 3  # for an object that another writer is creating, or that is deleted, between two of our calls

_CLIENT: ClientConfig = {
    "connect_timeout": timedelta(seconds=5),
    "timeout": timedelta(seconds=120),
    "allow_http": True,  # only an endpoint that the operator has given so is reached by it
}
# 5xx answers, also "slow down", and broken connections are tried again for so long
_RETRY: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(seconds=30)}

# a deletion happens while other writers of the registry wait for their turn: it gives up early
_BRIEF_CLIENT: ClientConfig = {**_CLIENT, "timeout": timedelta(seconds=3)}
_BRIEF_RETRY: RetryConfig = {"max_retries": 1, "retry_timeout": timedelta(seconds=2)}

_REASONS: dict[type[Exception], tuple[str, str]] = {
    FileNotFoundError: ("there is no such bucket", "Create it, or correct the store's URL."),
    exceptions.NotFoundError: ("there is no such bucket", "Create it, or correct the store's URL."),
    exceptions.PermissionDeniedError: (
        "access is denied",
        "Allow the server's credentials to get, put, delete and list below the store's prefix.",
    ),
    PermissionError: (
        "access is denied",
        "Allow the server's credentials to get, put, delete and list below the store's prefix.",
    ),
    exceptions.UnauthenticatedError: (
        "it does not accept the credentials",
        "Check the credentials in the server's environment.",
    ),
    exceptions.PreconditionError: ("another writer was in the way", "Try again."),
    exceptions.AlreadyExistsError: ("another writer was in the way", "Try again."),
    exceptions.NotSupportedError: (
        "it does not support conditional requests",
        "Choose an object store that does; uploads are only safe with them.",
    ),
}
_OTHER = ("it did not answer, or answered with an error", "Try again; if it stays, check the object store.")


class ObjectBlobStore:
    """A BlobStore at `url`: `s3://bucket/prefix`, `gs://bucket/prefix` or `az://account/container/prefix`."""

    def __init__(
        self, url: str, *, client_options: ClientConfig = _CLIENT, retry_config: RetryConfig = _RETRY
    ) -> None:
        """Open the store and look into it. Raises StoreError where that fails."""
        scheme = url.partition("://")[0]
        if scheme not in _SCHEMES:
            raise StoreError(
                f"The store's URL begins with {scheme[:20]!a}; expected one of {', '.join(_SCHEMES)}.",
                param="store",
                remedy="Give a directory, or a URL like s3://bucket/prefix.",
            )
        with _object_errors("be opened"):
            # S3 has no conditional copy but the completion of a multipart one; the others have
            options: dict[str, Any] = {"copy_if_not_exists": "multipart"} if scheme in _S3 else {}
            self._store = from_url(url, client_options=client_options, retry_config=retry_config, **options)
            self._brief = from_url(url, client_options=_BRIEF_CLIENT, retry_config=_BRIEF_RETRY)
            next(iter(obstore.list(self._store, f"{_FOLDER}/", chunk_size=1)), None)

    def put(self, digest: str, manifest: bytes, tensors: Path | bytes) -> None:
        """See BlobStore."""
        folder = _folder_of(digest)
        with _object_errors("store a blob"):
            self._create(f"{folder}/{_TENSORS}", tensors, staged=f"{folder}/{_STAGED}")
            self._create(f"{folder}/{_MANIFEST}", manifest, staged=f"{folder}/{_STAGED}")

    def read(self, digest: str) -> Blob:
        """See BlobStore."""
        folder = _folder_of(digest)
        with _object_errors("read a blob"):
            manifest = self._get(f"{folder}/{_MANIFEST}")
            if manifest is None:
                raise missing(digest)
            tensors = self._get(f"{folder}/{_TENSORS}")
        if tensors is None:
            raise StoreError(
                f"The blob sha256:{digest} is damaged: it has a manifest and no tensors.",
                remedy="Let the operator delete it, then upload the delta again.",
            )
        return Blob(manifest, tensors)

    def sizes(self, digest: str) -> Mapping[FileName, int]:
        """See BlobStore."""
        folder = _folder_of(digest)
        with _object_errors("look for a blob"):
            try:
                return {name: int(obstore.head(self._store, f"{folder}/{name}")["size"]) for name in FILES}
            except (FileNotFoundError, exceptions.NotFoundError):
                raise missing(digest) from None

    def read_range(self, digest: str, name: FileName, start: int, stop: int) -> bytes:
        """See BlobStore."""
        path = f"{_folder_of(digest)}/{name}"
        with _object_errors("read a blob"):
            try:
                return (
                    bytes(obstore.get_range(self._store, path, start=start, end=stop))
                    if stop > start
                    else b""
                )
            except (FileNotFoundError, exceptions.NotFoundError):
                raise missing(digest) from None

    def exists(self, digest: str) -> bool:
        """See BlobStore."""
        path = f"{_folder_of(digest)}/{_MANIFEST}"
        with _object_errors("look for a blob"):
            return self._is_there(path)

    def delete(self, digest: str) -> None:
        """See BlobStore."""
        folder = _folder_of(digest)
        with _object_errors("delete a blob"):
            for name in (_MANIFEST, _TENSORS, _STAGED):
                with suppress(FileNotFoundError, exceptions.NotFoundError):
                    obstore.delete(self._brief, f"{folder}/{name}")

    def iter_digests(self) -> Iterator[str]:
        """See BlobStore."""
        seen = ""
        with _object_errors("list the blobs"):
            for page in obstore.list(self._store, f"{_FOLDER}/"):
                for item in page:
                    found = _BLOB_PATH.search(item["path"])
                    if (
                        found and found[1] != seen
                    ):  # in the order of their paths: a blob's objects side by side
                        seen = found[1]
                        yield seen

    def _create(self, path: str, data: Path | bytes, *, staged: str) -> None:
        """Leave `data` at `path`, or raise: nothing that is there already is ever overwritten."""
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        for _ in range(_ATTEMPTS):
            with suppress(exceptions.AlreadyExistsError, exceptions.PreconditionError):
                if size > _PART_BYTES:
                    self._create_in_parts(path, data, staged)
                else:
                    obstore.put(self._store, path, data, mode="create", use_multipart=False)
            if self._has(path, data, size):
                return
        raise exceptions.PreconditionError(f"not there after {_ATTEMPTS} attempts")

    def _create_in_parts(self, path: str, data: Path | bytes, staged: str) -> None:
        """Other writers of `path` use the same `staged` for the same bytes, and remove it when they are done."""
        if self._is_there(path):
            return
        obstore.put(self._store, staged, data, use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=2)
        try:
            with suppress(FileNotFoundError, exceptions.NotFoundError):
                obstore.copy(self._store, staged, path, overwrite=False)
        finally:
            with suppress(FileNotFoundError, exceptions.NotFoundError):
                obstore.delete(self._store, staged)

    def _has(self, path: str, data: Path | bytes, size: int) -> bool:
        """Whether `data` is at `path`, read piece by piece. Raises StoreError where something else is."""
        try:
            found = obstore.get(self._store, path)
        except (FileNotFoundError, exceptions.NotFoundError):
            return False
        same = found.meta["size"] == size
        with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as expected:
            for piece in found.stream(min_chunk_size=_PIECE_BYTES) if same else ():
                if expected.read(len(piece)) != bytes(piece):
                    same = False
                    break
            same = same and not expected.read(1)
        if not same:
            raise StoreError(
                f"The object store holds {found.meta['size']} other bytes than the {size} of this digest.",
                remedy="Let the operator delete the blob, then upload the delta again.",
            )
        return True

    def _is_there(self, path: str) -> bool:
        try:
            obstore.head(self._store, path)
        except (FileNotFoundError, exceptions.NotFoundError):
            return False
        return True

    def _get(self, path: str) -> bytes | None:
        try:
            return bytes(obstore.get(self._store, path).bytes())
        except (FileNotFoundError, exceptions.NotFoundError):
            return None


def _folder_of(digest: str) -> str:
    return f"{_FOLDER}/{check_digest(digest)}"


@contextmanager
def _object_errors(doing: str) -> Iterator[None]:
    """Turn obstore's errors into StoreError, whose message names no bucket, endpoint or account."""
    try:
        yield
    except (exceptions.BaseError, OSError, ValueError) as error:
        reason, remedy = next((_REASONS[kind] for kind in _REASONS if isinstance(error, kind)), _OTHER)
        raise StoreError(f"The object store can't {doing}: {reason}.", remedy=remedy) from error
