"""Signatures over digests: RFC 8032's own vectors, and everything that must not pass."""

from __future__ import annotations

from base64 import b64decode, b64encode

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adapters.errors import InvalidRequest
from adapters.signing import generate, is_signed_by, read_public_key, sign, signer_id

A, B = "a" * 64, "b" * 64
# RFC 8032 section 7.1, test 1
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def pem(key: Ed25519PrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def test_the_signature_is_ed25519_over_the_stated_text() -> None:
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    signature = sign(pem(key), A)
    assert b64decode(signature) == key.sign(f"deltamux/1 signature of sha256:{A}".encode())
    assert is_signed_by(PUBLIC, A, signature)


def test_nothing_else_passes() -> None:
    private, public = generate()
    key = read_public_key(public.decode())
    signature = sign(private, A)
    assert is_signed_by(key, A, signature)
    assert not is_signed_by(key, B, signature)
    assert not is_signed_by(PUBLIC, A, signature)
    raw = bytearray(b64decode(signature))
    raw[5] ^= 1
    for wrong in (b64encode(raw).decode(), signature[:-4], "", "no base64", signature + "\n", "é"):
        assert not is_signed_by(key, A, wrong)
    assert not is_signed_by("", A, signature)


def test_public_keys_are_read_from_pem_and_hex_and_have_an_id() -> None:
    _, public = generate()
    key = read_public_key(public.decode())
    assert read_public_key(f"{key}\n") == key
    assert len(signer_id(key)) == 16
    assert signer_id(key) != signer_id(PUBLIC)


def test_other_keys_are_refused() -> None:
    private, public = generate()
    other = generate_private_key(SECP256R1())
    other_public = other.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for text in (private.decode(), other_public.decode(), "", "00", "zz" * 32, "-----BEGIN PUBLIC KEY-----"):
        with pytest.raises(InvalidRequest):
            read_public_key(text)
    encrypted = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    for data in (public, b"", encrypted):
        with pytest.raises(InvalidRequest):
            sign(data, A)
