"""Which replica a delta's requests go to: rendezvous hashing with bounded spill. Pure; no Ray.

Every router computes the same order from the replicas' ids alone, so a delta has one home without any state to
agree on, and a replica that comes or goes moves only the deltas whose home it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def weight(key: str, member: str) -> int:
    """The draw of `member` for `key`: the member with the highest one is the key's home."""
    # a digest's length is fixed, so the separator keeps (key, member) pairs apart
    return int.from_bytes(hashlib.blake2b(f"{key}\0{member}".encode(), digest_size=8).digest(), "big")


def rank(key: str, loads: Mapping[str, int], *, max_gap: int) -> list[str]:
    """The members of `loads`, best first: by weight, but those that are overloaded come last.

    `loads`: member -> requests it has. Overloaded: `max_gap` or more above the least loaded one. So a hot delta
    spills to its second choice, always the same one, and only for as long as its home is behind.
    """
    if not loads:
        return []
    limit = min(loads.values()) + max_gap
    return sorted(loads, key=lambda member: (loads[member] < limit, weight(key, member)), reverse=True)
