"""The soak: every token signed, everything free at the end; and that it sees a wrong token, a lost lease, a trend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loadtest import soak
from loadtest.soak import FLAT_MB_A_MINUTE, JUDGED_FROM_S, memory_problems, memory_slope
from serving.memory.residency import Residency


@pytest.fixture(autouse=True)
def _eventful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(soak, "UNLOADED", 0.2)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


def test_growing_memory_is_seen_in_a_run_that_is_long_enough() -> None:
    def samples(mb_a_minute: float) -> list[tuple[float, float]]:
        return [(t, 7e8 + mb_a_minute * 1e6 * t / 60) for t in range(200)]

    grew = memory_problems(samples(1.1 * FLAT_MB_A_MINUTE), JUDGED_FROM_S)
    assert "0.55 MB a minute" in grew[0]
    assert memory_problems(samples(0.9 * FLAT_MB_A_MINUTE), JUDGED_FROM_S) == []
    assert memory_problems(samples(9.0), JUDGED_FROM_S / 2) == []


def test_minutes_are_seconds_and_the_limit_is_told(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    soak.main(
        ["--minutes", "0.005", "--deltas", "6", "--in-flight", "4", "--threads", "1", "--json", str(path)]
    )
    result = json.loads(path.read_text())
    assert result["title"].startswith("soak of 0.3 s, 6 deltas")
    assert result["records"][0]["facts"].items() >= {
        "wrong tokens": 0, "problems": 0, "limit": "not judged", "verdict": "met",
    }.items()  # fmt: skip
