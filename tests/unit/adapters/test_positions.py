"""Where a request is cut: which tokens of it each part of a delta acts on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.positions import UNCUT, FirstTokens, FromInvocation, LastTokens, Positions, cuts

FIRST, LAST, INVOKED = FirstTokens(2), LastTokens(3), FromInvocation((9,))
REST = None


@pytest.mark.parametrize(
    ("positions", "prompt_length", "expected"),
    [
        ((), 5, [REST] * 7),
        ((FIRST,), 5, [FIRST] * 2 + [REST] * 5),
        ((FIRST,), 1, [FIRST] * 2 + [REST] * 5),  # generated tokens too
        ((LAST,), 5, [REST] * 2 + [LAST] * 3 + [REST] * 2),
        ((FIRST, LAST), 7, [FIRST] * 2 + [REST] * 2 + [LAST] * 3),
        ((FIRST, LAST), 4, [FIRST] + [LAST] * 3 + [REST] * 3),  # a token that is both is one of the last
        ((FIRST, LAST), 1, [LAST, FIRST] + [REST] * 5),
        ((INVOKED,), 5, [REST] * 7),
    ],
)
def test_each_token_is_under_one_of_the_positions(
    positions: tuple[Positions, ...], prompt_length: int, expected: list[Positions | None]
) -> None:
    found = cuts(positions, tuple(range(prompt_length)))
    assert found[0].start == 0
    assert [[cut.positions for cut in found if cut.start <= token][-1] for token in range(7)] == expected


def test_an_invocation_cuts_where_it_stands_last() -> None:
    assert cuts((INVOKED,), (9, 1, 9, 2))[:2] == ((0, None), (2, INVOKED))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20))
def test_prompts_of_different_length_are_never_cut_alike(one: int, other: int, first: int, last: int) -> None:
    """The prefix cache tells them apart by their cuts."""
    found = [cuts((FirstTokens(first), LastTokens(last)), (0,) * length) for length in (one, other)]
    assert (found[0] == found[1]) == (one == other)


def test_without_positions_nothing_is_cut() -> None:
    assert cuts(frozenset(), (1, 2, 3)) is UNCUT
