"""Every benchmark in a form of seconds: that it runs, and the shape of what it writes. No speed is judged here."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest import starvation
from loadtest.__main__ import main
from loadtest.inprocess import InProcess

QUICK = ("--rounds", "1", "--threads", "1")
TINY = ("--size", "2m", "--rows", "4", "--steps", "2")


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def result_of(tmp_path: Path, *argv: str, quick: tuple[str, ...] = QUICK) -> dict[str, Any]:
    """What the command writes; its parts that are the same for all are checked here."""
    path = tmp_path / "result.json"
    main([*argv, *quick, "--json", str(path)])
    result: dict[str, Any] = json.loads(path.read_text())
    assert set(result) == {"title", "environment", "records"}
    assert result["environment"]["command"].startswith(f"python -m loadtest {argv[0]} ")
    assert result["environment"].keys() >= {"cpu", "cores", "torch", "transformers", "peft", "threads"}
    for record in result["records"]:
        for spread in record["values"].values():
            assert spread["low"] <= spread["median"] <= spread["high"]
            assert math.isfinite(spread["median"])
    return result


def values_of(result: dict[str, Any], index: int = 0) -> set[str]:
    return set(result["records"][index]["values"])


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("decode", {"ours ms", "generate ms", "speedup"}),
        pytest.param(
            "lora", {"bare ms", "deltas ms", "ratio", "added ms", "added / floor"}, marks=pytest.mark.slow
        ),
        ("mixed", {"bare ms", "deltas ms", "ratio", "added ms", "added / floor"}),
        pytest.param("loaded", {"none loaded ms", "loaded ms", "ratio"}, marks=pytest.mark.slow),
        ("cold", {"warm TTFT ms", "cold TTFT ms", "added ms", "decode step ms", "added / step"}),
    ],
)
def test_a_budget_prints_its_figures_and_a_verdict(tmp_path: Path, name: str, figures: set[str]) -> None:
    result = result_of(tmp_path, "budget", name, *TINY)
    assert values_of(result) == figures
    facts = result["records"][0]["facts"]
    assert facts["verdict"] in ("met", "missed")
    if name in ("lora", "mixed"):
        assert facts["floor ms"] > 0


def test_the_profile_s_parts_make_up_the_whole_step(tmp_path: Path) -> None:
    result = result_of(tmp_path, "budget", "overhead", *TINY)
    for label in ("bare", "4 LoRAs"):
        ms = {
            r["label"].removesuffix(f", {label}"): r["values"]["ms"]["median"]
            for r in result["records"]
            if r["label"].endswith(f", {label}")
        }
        inside = [v for k, v in ms.items() if not k.startswith(("hooks", "own", "whole"))]
        assert sum(inside) == pytest.approx(ms["whole step"])
        assert min(inside) > 0
        assert ms["own Python"] < ms["whole step"]
    assert ms["hooks: delta programs"] > 0


def test_kernels_cover_shapes_crossover_and_attention(tmp_path: Path) -> None:
    result = result_of(
        tmp_path, "kernels", "--width", "64", "--tokens", "8", "--cold-bytes", "100000", "--deltas", "1", "2",
        "--contexts", "8", "16",
    )  # fmt: skip
    labels = " | ".join(record["label"] for record in result["records"])
    for shape in (
        "identical",
        "distinct",
        "uniform",
        "zipf",
        "skewed",
        "empty",
        "attention, 8 rows, context 8-16",
    ):
        assert shape in labels
    crossovers = [r for r in result["records"] if r["label"].startswith("crossover")]
    assert [set(r["facts"]) for r in crossovers] == [{"torch is faster from"}] * 4


def test_engine_and_peft_run_every_point(tmp_path: Path) -> None:
    result = result_of(
        tmp_path, "engine", "--size", "2m", "--concurrency", "1", "4", "--deltas", "0", "3", "--output-tokens", "2",
    )  # fmt: skip
    assert [r["label"] for r in result["records"]] == [
        f"{rows} in flight, {deltas} deltas" for rows in (1, 4) for deltas in (0, 3)
    ]
    assert values_of(result, 0) == {"ours bare tok/s", "PEFT bare tok/s", "ours/PEFT bare"}
    assert values_of(result, 3) >= {"ours/PEFT", "deltas/bare ours", "deltas/bare PEFT"}


def test_residency_runs_more_deltas_than_there_is_room_for(tmp_path: Path) -> None:
    result = result_of(
        tmp_path, "residency", "--size", "2m", "--registered", "8", "--room", "3", "--requests", "12",
        "--output-tokens", "2", "--in-flight", "3",
    )  # fmt: skip
    values = result["records"][0]["values"]
    assert values.keys() >= {"throughput ratio", "TTFT p99 ratio", "latency p90/p50"}
    assert values["hit rate"]["median"] < 1
    assert result["records"][0]["facts"]["verdict"] in ("met", "missed")


def test_popularity_compares_every_alpha_with_one_delta(tmp_path: Path) -> None:
    result = result_of(
        tmp_path, "popularity", "--size", "2m", "--registered", "40", "--room", "3", "--seconds", "0.2",
        "--prompt-tokens", "12", "--output-tokens", "3", "--alphas", "0.1", "1", "--cvs", "4",
    )  # fmt: skip
    records = result["records"]
    assert [r["label"] for r in records] == ["cv 4, one delta", "cv 4, alpha 0.1", "cv 4, alpha 1"]
    assert values_of(result) == {"requests/s", "tok/s", "TTFT p50 ms", "TTFT p99 ms", "hit rate"}
    assert values_of(result, 1) == values_of(result, 2) == values_of(result) | {
        "tok/s / one", "p50 / one", "p99 / one",
    }  # fmt: skip
    assert records[2]["values"]["hit rate"]["median"] < 1


STARVATION = (
    "starvation", "--size", "2m", "--rows", "4", "--requests", "18", "--prompt-tokens", "4", "--output-tokens", "2",
)  # fmt: skip


@pytest.mark.parametrize(("limit", "verdict"), [(1e9, "met"), (0.0, "missed")])
def test_starvation_is_judged_under_the_default_policy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: float, verdict: str
) -> None:
    monkeypatch.setattr(starvation, "LIMIT", limit)
    most: list[int] = []
    step = InProcess.step

    def counted(bench: InProcess) -> bool:
        ran = step(bench)
        most.append(len(bench.engine.deltas.residency))
        return ran

    monkeypatch.setattr(InProcess, "step", counted)
    with nullcontext() if verdict == "met" else pytest.raises(SystemExit, match=r"^1$"):
        result_of(tmp_path, *STARVATION)
    fair, first_come = json.loads((tmp_path / "result.json").read_text())["records"]
    assert (fair["label"], first_come["label"]) == ("fair", "first_come")
    assert (fair["facts"]["verdict"], fair["facts"]["judged"]) == (verdict, "yes")
    assert first_come["facts"]["judged"] == "for comparison"
    assert min(r["values"]["loads"]["median"] for r in (fair, first_come)) >= 3
    assert max(most) == 3  # never more than there is room for


def test_starvation_refuses_deltas_that_all_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main([*STARVATION, "--rows", "4000"])
    assert "more than 3 deltas would fit" in capsys.readouterr().err


def test_abuse_compares_the_policies_with_the_others_alone(tmp_path: Path) -> None:
    result = result_of(
        tmp_path, "abuse", "--size", "2m", "--rows", "4", "--seconds", "0.2", "--turns", "40",
    )  # fmt: skip
    assert [record["label"] for record in result["records"]] == ["the seven alone", "fair", "first_come"]
    assert values_of(result, 0) == {"TTFT p50 ms", "TTFT p99 ms", "p99 / alone"}
    fair, first_come = result["records"][1:]
    assert fair["facts"]["gap within it"] == "yes"
    assert first_come["values"]["service gap"]["median"] > fair["values"]["service gap"]["median"]


def test_prefill_runs_alone_and_beside_decoding_rows(tmp_path: Path) -> None:
    result = result_of(
        tmp_path, "prefill", "--size", "2m", "--chunks", "2", "32", "--prompts", "2", "--prompt-tokens", "24",
        "--decoding", "2",
    )  # fmt: skip
    assert [record["label"] for record in result["records"]] == [
        "chunk 2, alone", "chunk 32, alone", "chunk 32, beside 2 decoding rows",
    ]  # fmt: skip
    assert values_of(result, 2) == {"bare tok/s", "step p50 ms", "longest step ms"}


def test_scale_registers_and_resolves(tmp_path: Path) -> None:
    result = result_of(
        tmp_path, "scale", "--size", "2m", "--registered", "1", "12", "--lookups", "10", "--rows", "2",
        "--output-tokens", "2",
    )  # fmt: skip
    assert [record["label"] for record in result["records"]] == ["1 registered", "12 registered"]
    assert values_of(result) == {"resolve p99 ms", "list p99 ms", "tok/s"}
