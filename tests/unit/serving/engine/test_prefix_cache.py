"""Hash chains and their index: what is the same beginning, and what must never be."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.positions import UNCUT, Cut, FirstTokens
from serving.engine.prefix_cache import BLOCK_TOKENS, HashChain, PrefixIndex, PrefixKeys

TOKENS = list(range(4 * BLOCK_TOKENS))


def root(keys: PrefixKeys, **changes: Any) -> bytes:
    request: dict[str, Any] = {
        "tenant": "acme",
        "adapter_digest": "d" * 64,
        "prefix_len": 5,
        "position_offset": 5,
        "cuts": UNCUT,
    }
    return keys.root(**request | changes)


def chain(keys: PrefixKeys, tokens: list[int], **changes: Any) -> list[bytes]:
    return HashChain(root(keys, **changes)).blocks(tokens, len(tokens) // BLOCK_TOKENS)


def test_equal_beginnings_have_equal_hashes_and_a_change_reaches_all_that_follows() -> None:
    keys = PrefixKeys("backbone")
    changed = [*TOKENS]
    changed[BLOCK_TOKENS + 3] += 1
    same, other = chain(keys, TOKENS), chain(keys, changed)
    assert same == chain(keys, [*TOKENS, 1, 2])
    assert same[0] == other[0]
    assert not set(same[1:]) & set(other[1:])


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "acme2"},
        {"tenant": ""},
        {"adapter_digest": "e" * 64},
        {"adapter_digest": None},
        {"adapter_digest": "none"},
        {"prefix_len": 6},
        {"position_offset": 0},
        {"cuts": (Cut(0, FirstTokens(3)), Cut(3, None))},
        {"cuts": (Cut(0, FirstTokens(4)),)},
    ],
    ids=str,
)
def test_whatever_shapes_keys_and_values_or_belongs_to_another_tenant_is_another_chain(
    changes: dict[str, Any],
) -> None:
    keys = PrefixKeys("backbone")
    assert not set(chain(keys, TOKENS)) & set(chain(keys, TOKENS, **changes))


def test_backbones_and_engines_have_chains_of_their_own() -> None:
    first, second = PrefixKeys("backbone"), PrefixKeys("backbone")
    assert root(first) != root(second)  # the salt is a secret of each engine
    second._secret = first._secret
    assert root(first) == root(second)
    third = PrefixKeys("another backbone")
    third._secret = first._secret
    assert root(first) != root(third)


def test_sharing_across_tenants_is_opt_in() -> None:
    assert PrefixKeys("backbone")._shared is False
    shared = PrefixKeys("backbone", "shared")
    assert root(shared) == root(shared, tenant="other")
    assert root(shared) != root(shared, adapter_digest=None)
    assert not PrefixKeys("backbone", "off").enabled


def test_a_chain_grows_without_hashing_again() -> None:
    growing, tokens = HashChain(b"root"), TOKENS[: 2 * BLOCK_TOKENS]
    first = growing.blocks(tokens, 2)
    tokens += TOKENS[2 * BLOCK_TOKENS :]
    assert growing.blocks(tokens, 4)[:2] == first
    assert growing.blocks(tokens, 4) == HashChain(b"root").blocks(TOKENS, 4)
    assert growing.blocks(tokens, 1) == first[:1]


def test_the_longest_beginning_is_found_and_gone_when_its_slots_are() -> None:
    hashes = HashChain(b"root").blocks(TOKENS, 4)
    index = PrefixIndex()
    index.publish(0, hashes[:2])
    index.publish(1, hashes[:3])
    assert index.match(hashes) == (3, [1])
    assert index.match(hashes[:2]) == (2, [0, 1])
    index.truncate(1, 1)
    assert index.match(hashes) == (2, [0])
    index.truncate(0, 0)
    assert index.match(hashes) == (1, [1])
    index.truncate(1, 0)
    assert index.match(hashes) == (0, [])
    assert (index._holders, index._held) == ({}, {})


def test_expected_blocks_are_known_until_they_are_there_or_given_up() -> None:
    hashes = HashChain(b"root").blocks(TOKENS, 4)
    index = PrefixIndex()
    index.expect(0, hashes)
    assert index.expected(hashes) == 4
    assert index.match(hashes) == (0, [])
    index.publish(0, hashes[:3])
    assert index.expected(hashes) == 0
    index.expect(1, hashes)
    index.truncate(1, 0)
    assert index.expected(hashes) == 0
    assert (index._expected, index._expecting) == ({}, {})
