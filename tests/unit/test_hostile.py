"""The hostile suite in short: it holds, and its oracle sees what a reader could get wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adapters.formats import read_upload
from adapters.normal_form import Delta
from tests.hostile import __main__ as hostile
from tests.hostile.mutations import ANY, INVALID
from tests.hostile.seeds import Seed, seeds
from tests.unit.serving.http_support import SPEC

LORA = seeds()[0]


def test_nothing_crashes_and_nothing_invalid_is_accepted() -> None:
    tally = hostile.run(0, 20_000, seed=0)
    assert tally.refused.total() + tally.accepted.total() == 20_000
    assert all(tally.refused[name] > 500 for name in INVALID)
    assert all(tally.accepted[name] for name in ANY if name != "noise")


@pytest.mark.parametrize("seed", seeds(), ids=lambda seed: seed.name)
def test_what_is_spoilt_was_valid(seed: Seed) -> None:
    hostile.check_accepted(seed, seed.files, read_upload(seed.files, SPEC))


def spoilt(delta: Delta, **changes: Any) -> Delta:
    return replace(delta, ops=(replace(delta.ops[0], **changes), *delta.ops[1:]))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda delta: replace(delta, ops=delta.ops[1:]),
        lambda delta: spoilt(delta, scaling=delta.ops[0].scaling * 2),
        lambda delta: spoilt(delta, A=delta.ops[0].A * 1.01),
    ],
    ids=["an op lost", "another scale", "other values"],
)
def test_the_oracle_sees_a_wrong_delta(wrong: Any) -> None:
    delta = read_upload(LORA.files, SPEC)
    hostile.check_accepted(LORA, LORA.files, delta)
    with pytest.raises(AssertionError):
        hostile.check_accepted(LORA, LORA.files, wrong(delta))


@pytest.mark.parametrize(
    ("reads", "says"),
    [
        (lambda *_: read_upload(LORA.files, SPEC), "accepted"),
        (lambda *_: 1 // 0, "crashed with ZeroDivisionError"),
    ],
)
def test_the_suite_sees_a_reader_that_accepts_or_crashes(
    monkeypatch: pytest.MonkeyPatch, reads: Any, says: str
) -> None:
    monkeypatch.setattr(hostile, "read_upload", reads)
    with pytest.raises(hostile.Broken, match=f"case .* of seed 0: .*{says}"):
        hostile.run(0, 200, seed=0)
