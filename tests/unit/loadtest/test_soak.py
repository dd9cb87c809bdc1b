"""The soak: every token signed, everything free at the end; and that it sees a wrong token, a lost lease, a trend."""

from __future__ import annotations

import pytest

from loadtest import soak
from loadtest.soak import memory_slope
from serving.memory.residency import Residency


@pytest.fixture(autouse=True)
def _eventful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "UNLOADED", 0.2)


def short() -> soak.Tally:
    return soak.soak("2m", seconds=0, num_deltas=12, room=4, in_flight=8, seed=1, least=60)


def test_churn_gives_no_wrong_token_and_leaks_nothing() -> None:
    tally = short()
    assert tally.problems == []
    assert tally.wrong_tokens == 0
    assert tally.tokens > 100
    assert min(tally.cancelled, tally.unloaded) > 0


def test_a_delta_that_signs_for_another_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = soak.signed_delta
    monkeypatch.setattr(soak, "signed_delta", lambda backbone, head, i: right(backbone, head, i + (i == 3)))
    assert short().wrong_tokens > 0


def test_a_lost_lease_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Residency.end_lease
    lost = iter([True])
    monkeypatch.setattr(
        Residency, "end_lease", lambda self, digest: None if next(lost, False) else right(self, digest)
    )
    problems = " ".join(short().problems)
    assert "leases: 1 left" in problems
    assert "bytes of deltas on the device" in problems


def test_the_slope_is_that_of_the_second_half() -> None:
    samples = [(t, 100 * t) for t in range(5)] + [(t, 400 + 3.0 * t) for t in range(5, 10)]
    assert memory_slope(samples) == pytest.approx(3.0)
    assert memory_slope(samples[:1]) == 0
