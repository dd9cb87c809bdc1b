"""Rendezvous ranking: the same everywhere, even, moved little by a change of members, and bounded under load."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serving.deployments.ranking import rank, weight

KEYS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(3000)]
MEMBERS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True)


def idle(*members: str) -> dict[str, int]:
    return dict.fromkeys(members, 0)


def test_no_members() -> None:
    assert rank(KEYS[0], {}, max_gap=6) == []


def test_the_order_is_fixed_for_all_time() -> None:
    # another hash would send every delta to a new home on a rolling update
    assert rank("0" * 64, idle("a", "b", "c"), max_gap=6) == ["a", "b", "c"]
    assert weight("k", "m") == 0x77383B870394A786


@given(MEMBERS, st.integers(0, 2**32))
def test_it_depends_on_the_members_not_on_their_order(members: list[str], seed: int) -> None:
    shuffled = random.Random(seed).sample(members, len(members))
    assert rank("key", idle(*members), max_gap=6) == rank("key", idle(*shuffled), max_gap=6)
    assert sorted(rank("key", idle(*members), max_gap=6)) == sorted(members)


def test_homes_are_even() -> None:
    homes = Counter(rank(key, idle("a", "b", "c"), max_gap=6)[0] for key in KEYS)
    assert all(abs(count - len(KEYS) / 3) < 0.1 * len(KEYS) / 3 for count in homes.values()), homes


def test_a_lost_member_moves_only_its_own_keys() -> None:
    for key in KEYS[:300]:
        before = rank(key, idle("a", "b", "c"), max_gap=6)
        after = rank(key, idle("a", "c"), max_gap=6)
        assert after == [member for member in before if member != "b"]


def test_a_home_keeps_its_key_until_it_is_max_gap_ahead() -> None:
    home, second, third = rank("key", idle("a", "b", "c"), max_gap=6)
    assert rank("key", {home: 5, second: 0, third: 0}, max_gap=6) == [home, second, third]
    assert rank("key", {home: 6, second: 0, third: 0}, max_gap=6) == [second, third, home]
    assert rank("key", {home: 6, second: 7, third: 0}, max_gap=6) == [third, home, second]


def test_load_that_all_share_changes_nothing() -> None:
    busy = dict.fromkeys("abc", 1000)
    assert rank("key", busy, max_gap=6) == rank("key", idle(*"abc"), max_gap=6)


def test_a_burst_of_one_key_spreads_within_the_gap() -> None:
    loads = idle("a", "b", "c")
    for _ in range(60):
        loads[rank("key", loads, max_gap=6)[0]] += 1
    assert max(loads.values()) - min(loads.values()) <= 6, loads
