"""The isolation soak on a real server whose replicas are killed, in its short form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.isolation import main

pytestmark = pytest.mark.cluster


def test_no_token_is_foreign_while_replicas_die(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    main(["--tokens", "50000", "--output-tokens", "320", "--in-flight", "64", "--json", str(result)])
    record = json.loads(result.read_text())["records"][0]
    facts = record["facts"]
    print(record)
    assert facts["tokens"] >= 50_000
    assert facts["foreign"] == facts["base"] == facts["bare and wrong"] == facts["problems"] == 0
    assert facts["replicas killed"] >= 1
    for seen in ("evictions", "ended: denied", "requests, granted", "alias moves", "uploads", "grants"):
        assert facts[seen] > 0, seen
