"""The command of the fidelity matrix, on one family and two methods, so that it can't rot."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests import fidelity
from tests.cases import Case
from tests.families import ENCODERS, FAMILIES, SEQ2SEQ
from tests.method_table import METHODS, TARGETS


def test_report_counts_measured_and_impossible_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cells.json"
    status = fidelity.main(
        ["--report", "--json", str(file), "--family", "gpt2", "--method", "ia3", "miss", "--dtype", "fp32"]
    )
    printed = capsys.readouterr().out
    cells = json.loads(file.read_text())
    assert status == 0
    assert Counter((cell["method"], cell["status"]) for cell in cells) == {
        ("bare backbone", "inside"): 9,
        ("ia3", "inside"): 9,
        ("miss", "impossible"): 9,  # PEFT has no MiSS layer for Conv1D
    }
    assert "impossible: PEFT: " in printed
    last = "cells: 27; measured 18; inside tolerance 18; outside 0; impossible with reason 9; failed 0"
    assert printed.splitlines()[-1] == last


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_matrix_is_inside(capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([]) == 0
    assert "outside 0;" in capsys.readouterr().out


def test_cell_outside_its_tolerance_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = fidelity.Cell("llama", "fp32", "lora", "alone", "prefill", "outside", 1.5)
    monkeypatch.setattr(fidelity, "measure_all", lambda tasks, jobs: [[outside]])
    assert fidelity.main([]) == 1
    assert "outside: llama fp32 lora alone prefill: 1.500" in capsys.readouterr().out


def test_delta_that_changes_nothing_is_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = next(row for row in METHODS if row.name == "lora").case("llama")
    idle = Case("idle", "llama", lora.config, sigma=0.0)
    monkeypatch.setattr(fidelity, "candidates", lambda family, wanted: [idle])
    cells = [cell for cell in fidelity.measure("llama", "fp32", (), tmp_path) if cell.method == "idle"]
    assert {cell.status for cell in cells} == {"failed"}


def test_table_has_every_family_and_no_name_twice() -> None:
    assert set(TARGETS) == {*FAMILIES, *ENCODERS, *SEQ2SEQ}
    assert max(Counter(row.name for row in METHODS).values()) == 1
