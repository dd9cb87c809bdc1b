"""Signatures of uploads: Ed25519 (RFC 8032) over a delta's canonical digest, and so over every byte of it.

What is signed is the text `deltamux/1 signature of sha256:<64 hex digits>`; a signature is written in base64. Private
keys are PEM files (PKCS 8) that stay with whoever signs, public keys PEM files (SubjectPublicKeyInfo) or 64 hex digits.
"""

from __future__ import annotations

import binascii
import hashlib
from base64 import b64decode, b64encode

from cryptography.exceptions import InvalidSignature as _Wrong
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from adapters.errors import InvalidRequest

SIGNATURE_CHARS = 88
"""Length of a signature in base64."""


def generate() -> tuple[bytes, bytes]:
    """A new key as PEM: (private, public)."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return private, public


def sign(private_pem: bytes, digest: str) -> str:
    """The signature of a bare hex digest. Raises InvalidRequest for what is no private key."""
    try:
        key = serialization.load_pem_private_key(private_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidRequest(
            "The signing key can't be read; expected an unencrypted Ed25519 private key in PEM.",
            param="sign",
            remedy="Make one with `deltamux signers generate`.",
        )
    return b64encode(key.sign(_message(digest))).decode()


def read_public_key(text: str) -> str:
    """A public key, given as PEM or hex, as 64 hex digits. Raises InvalidRequest."""
    try:
        if "-----BEGIN" in text:
            key = serialization.load_pem_public_key(text.encode())
        else:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(text.strip()))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidRequest(
            "public_key: expected an Ed25519 public key, in PEM or as 64 hex digits.",
            param="public_key",
            remedy="`deltamux signers generate` writes one.",
        )
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def signer_id(public_key: str) -> str:
    """The id by which a public key (64 hex digits) goes: the beginning of its sha256."""
    return hashlib.sha256(bytes.fromhex(public_key)).hexdigest()[:16]


def is_signed_by(public_key: str, digest: str, signature: str) -> bool:
    """Whether `signature` is that of a bare hex digest by `public_key` (64 hex digits)."""
    try:
        raw = b64decode(signature, validate=True)
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(raw, _message(digest))
    except (_Wrong, binascii.Error, ValueError):
        return False
    return True


def _message(digest: str) -> bytes:
    return f"deltamux/1 signature of sha256:{digest}".encode()
