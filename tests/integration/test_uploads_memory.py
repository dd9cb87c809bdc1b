"""A large upload through a real server, at full size: `python -m tests.uploads_memory`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.uploads_memory import MB, measure

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_600_megabytes_take_less_than_150_of_memory(tmp_path: Path) -> None:
    report = measure(600, 64 << 20, tmp_path)
    assert report.file_bytes > 590 * MB
    assert report.total_growth < 150 * MB
