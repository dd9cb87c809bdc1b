"""Which KV slot already holds the beginning of a prompt. No torch: an index from hash chains to slots.

A chain has one hash for every full block of tokens; each covers the one before, so equal hashes mean equal beginnings.
The first one covers whatever else shapes keys and values: the backbone, the delta, its virtual tokens, the tokens on
which its parts act, and a salt that the server makes of the tenant, so that neither content nor timing crosses tenants.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Sequence
from typing import Literal

from adapters.positions import Cut

BLOCK_TOKENS = 16
"""Tokens of one block: the granularity of matching, and of the KV cache's accounting."""

Sharing = Literal["off", "tenant", "shared"]


def _hash(tag: bytes, *fields: bytes) -> bytes:
    """blake2b over a tag and fields, each with its length in front: no two field lists give the same input."""
    digest = hashlib.blake2b(digest_size=32)
    for field in (tag, *fields):
        digest.update(struct.pack("<Q", len(field)))
        digest.update(field)
    return digest.digest()


class PrefixKeys:
    """Makes the roots of chains. The secret is random and lives as long as the engine; callers never see it."""

    def __init__(self, backbone_digest: str, sharing: Sharing = "tenant") -> None:
        self.enabled = sharing != "off"
        self._backbone = backbone_digest.encode()
        self._shared = sharing == "shared"
        self._secret = secrets.token_bytes(32)

    def root(
        self,
        *,
        tenant: str,
        adapter_digest: str | None,
        prefix_len: int,
        position_offset: int,
        cuts: tuple[Cut, ...],
    ) -> bytes:
        """What the chain of a request begins with."""
        salt = hmac.digest(self._secret, b"" if self._shared else b"tenant:" + tenant.encode(), "sha256")
        return _hash(
            b"deltamux-kv-root",
            self._backbone,
            salt,
            b"none" if adapter_digest is None else b"delta:" + adapter_digest.encode(),
            struct.pack("<QQ", prefix_len, position_offset),
            repr(cuts).encode(),
        )


class HashChain:
    """The hashes of one sequence's full blocks, made as they are asked for.

    `num_fixed`: how many tokens there can be hashes of, None for all; those that follow may change.
    """

    __slots__ = ("_hashes", "_max_blocks", "_root")

    def __init__(self, root: bytes, num_fixed: int | None = None) -> None:
        self._root = root
        self._max_blocks = None if num_fixed is None else num_fixed // BLOCK_TOKENS
        self._hashes: list[bytes] = []

    def blocks(self, tokens: Sequence[int], count: int) -> list[bytes]:
        """The hashes of the first `count` blocks of `tokens`, which only ever grow, or of as many as there can be."""
        if self._max_blocks is not None:
            count = min(count, self._max_blocks)
        for index in range(len(self._hashes), count):
            parent = self._hashes[-1] if self._hashes else self._root
            block = tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            packed = struct.pack(f"<{BLOCK_TOKENS}q", *block)
            self._hashes.append(_hash(b"deltamux-kv-block", parent, packed))
        return self._hashes[:count]


class PrefixIndex:
    """Blocks held by slots, and blocks that a running request is about to compute."""

    def __init__(self) -> None:
        self._holders: dict[bytes, dict[int, None]] = {}
        self._held: dict[int, list[bytes]] = {}
        self._expected: dict[bytes, int] = {}
        self._expecting: dict[int, list[bytes]] = {}

    def num_blocks(self, slot: int) -> int:
        """Blocks known of `slot`."""
        return len(self._held.get(slot, ()))

    def publish(self, slot: int, hashes: Sequence[bytes]) -> None:
        """`slot` holds these blocks, from its first on; what was known of it is a beginning of them.

        It is about to compute nothing any more: a request publishes when its whole prompt is computed.
        """
        held = self._held.setdefault(slot, [])
        for block in hashes[len(held) :]:
            held.append(block)
            self._holders.setdefault(block, {})[slot] = None
        self.expect_nothing(slot)

    def truncate(self, slot: int, count: int) -> None:
        """`slot` keeps its first `count` blocks only; what it was about to compute is off."""
        held = self._held.get(slot, [])
        for block in held[count:]:
            holders = self._holders[block]
            del holders[slot]
            if not holders:
                del self._holders[block]
        if count and held:
            del held[count:]
        else:
            self._held.pop(slot, None)
        self.expect_nothing(slot)

    def match(self, hashes: Sequence[bytes]) -> tuple[int, list[int]]:
        """Length in blocks of the longest beginning that some slot holds, and the slots that hold it."""
        found: list[int] = []
        length = 0
        for block in hashes:
            holders = self._holders.get(block)
            if not holders:
                break
            length, found = length + 1, list(holders)
        return length, found

    def expect(self, slot: int, hashes: Sequence[bytes]) -> None:
        """The request in `slot` is about to compute these blocks."""
        self._expecting[slot] = list(hashes)
        for block in hashes:
            self._expected.setdefault(block, slot)

    def expected(self, hashes: Sequence[bytes]) -> int:
        """How many of `hashes`, from the first on, somebody is about to compute."""
        count = 0
        for block in hashes:
            if block not in self._expected:
                break
            count += 1
        return count

    def expect_nothing(self, slot: int) -> None:
        """What the request in `slot` was about to compute is there, or will not come."""
        for block in self._expecting.pop(slot, ()):
            if self._expected.get(block) == slot:
                del self._expected[block]
