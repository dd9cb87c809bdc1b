"""What `loadtest upload` counts, and that it runs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.http import Reply
from loadtest.upload import Batch, figures, settled_gaps_ms


def test_gaps_count_from_the_last_stream_s_first_piece_on() -> None:
    early = Reply(0.1, [0.1, 0.5, 0.2, 0.3], 5)  # pieces at 0.1, 0.2, 0.7, 0.9, 1.2
    late = Reply(0.7, [0.25], 2)
    assert settled_gaps_ms([early, late]) == pytest.approx([200, 300, 250])


def test_ratios_are_those_within_a_round() -> None:
    alone = [Batch([10.0] * 99 + [20.0] * 2, 100, []), Batch([10.0] * 101, 100, [])]
    beside = [Batch([10.0] * 99 + [30.0] * 2, 90, [0.1]), Batch([20.0] * 101, 80, [0.2])]
    found = figures(alone, beside)
    assert (found["p50 ratio"].low, found["p50 ratio"].high) == (1.0, 2.0)
    assert (found["p99 ratio"].low, found["p99 ratio"].high) == (1.5, 2.0)
    assert found["largest gap ms, uploads"].high == 30.0


@pytest.mark.slow
@pytest.mark.cluster
def test_uploads_beside_streams_of_a_real_server(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ["--size", "2m", "--rounds", "1", "--threads", "1", "--streams", "4", "--deltas", "2"]
    with suppress(SystemExit):  # no speed is judged here
        main(["upload", *options, "--output-tokens", "64", "--json", str(path)])
    (record,) = json.loads(path.read_text())["records"]
    assert record["facts"]["uploads"] > 0
    assert record["values"]["p99 ratio"]["median"] > 0
