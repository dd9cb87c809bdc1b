"""What an API key is: `dmx_<id>_<256 random bits>_<crc>`, all hex.

The server keeps the id and HMAC-SHA256(secret, key). A fast hash is enough against guessing, since the key is random
and not chosen by people; the secret, which is not in the database, makes a stolen table useless for forging one. The
checksum tells a mistyped key from a wrong one without asking the database.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import zlib
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import Unavailable

SECRET_BYTES = 32
_KEY = re.compile(r"(dmx_([0-9a-f]{16})_[0-9a-f]{64})_([0-9a-f]{8})")


@dataclass(frozen=True, slots=True, repr=False)
class NewKey:
    """A key that was just made. `text` is shown to its owner once and stored nowhere."""

    id: str
    text: str


def make_key() -> NewKey:
    """A key that nobody has."""
    key_id = secrets.token_hex(8)
    body = f"dmx_{key_id}_{secrets.token_hex(32)}"
    return NewKey(key_id, f"{body}_{_checksum(body)}")


def id_of(text: str) -> str | None:
    """The id in a key's text, None where the text is no key."""
    found = _KEY.fullmatch(text)
    return found[2] if found and _checksum(found[1]) == found[3] else None


def hash_of(text: str, secret: bytes) -> str:
    """What the database keeps of a key."""
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def read_secret(file: Path) -> bytes:
    """The server's secret in `file`, which is made, readable by its owner only, where it is missing.

    Raises Unavailable where it can't be read or made, or is too short.
    """
    try:
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            return _checked(file.read_bytes(), file)
        except FileNotFoundError:
            _make(file)
        return _checked(file.read_bytes(), file)
    except OSError as error:
        raise Unavailable(
            f"The file of the server's secret can't be used: {error.strerror}.",
            param="auth.secret_file",
            remedy="Give a path that the server's user can read and write.",
        ) from error


def _make(file: Path) -> None:
    """Write a new secret beside `file` and give it that name, unless another process was faster."""
    draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(secrets.token_hex(SECRET_BYTES).encode())
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(draft, file)
        except FileExistsError:
            return
    finally:
        draft.unlink()
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _checked(secret: bytes, file: Path) -> bytes:
    secret = secret.strip()
    if len(secret) < SECRET_BYTES:
        raise Unavailable(
            f"The server's secret in {file.name} has {len(secret)} bytes; expected at least {SECRET_BYTES}.",
            param="auth.secret_file",
            remedy="Put it back from a backup. A new one makes every key invalid.",
        )
    return secret


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
