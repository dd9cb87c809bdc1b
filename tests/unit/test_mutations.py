"""Changed uploads, a sample of what `python -m tests.mutations` runs; and that the command sees what is wrong."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load, save

from adapters.errors import InvalidDelta
from adapters.formats import read_upload
from adapters.normal_form import Delta
from tests import mutations
from tests.mutations import CASES, CONFIG, FEW, KINDS, Source, main, run, source


def test_every_mutant_is_refused_by_name_or_changes_nothing() -> None:
    report = run(range(500), 0, FEW)
    assert report.violations == []
    for kind in KINDS:  # each kind came, and was refused at times
        assert report.counts[kind.__name__.replace("_", " "), "refused"] > 3, kind


def test_sources_are_all_cases_and_each_is_served() -> None:
    assert set(FEW) <= CASES.keys()
    for name in FEW:
        assert source(name).meaning.ops


def gullible(files: dict[str, bytes], spec: object) -> Delta:
    """A reader that takes anything for the adapter that it knows."""
    return source("llama-lora_all_linear").meaning


def vague(files: dict[str, bytes], spec: object) -> Delta:
    raise InvalidDelta(["Something is wrong."])


def broken(files: dict[str, bytes], spec: object) -> Delta:
    raise KeyError("lora_A")


@pytest.mark.parametrize(
    ("reader", "said"),
    [(gullible, "as if nothing were wrong"), (vague, "refused without naming it"), (broken, "KeyError")],
)
def test_a_reader_that_is_wrong_fails_the_command(
    reader: object, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source("llama-lora_all_linear")
    monkeypatch.setattr(mutations, "CASES", {"llama-lora_all_linear": CASES["llama-lora_all_linear"]})
    monkeypatch.setattr(mutations, "read_upload", reader)
    assert main(["--cases", "20"]) == 1
    printed = capsys.readouterr().out
    assert said in printed
    assert "case 0, llama-lora_all_linear" in printed or "case 1, llama-lora_all_linear" in printed


def test_the_command_prints_counts_per_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutations, "CASES", {name: CASES[name] for name in FEW[:2]})
    assert main(["--cases", "30", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]] == [k.__name__.replace("_", " ") for k in KINDS]
    assert lines[-1].startswith("30 mutants of 2 adapters in ")
    assert sum(int(cell) for line in lines[1:-1] for cell in line[20:].split()) == 30


# ---- what a long run found ----------------------------------------------------------------------------------------


def edited(origin: Source, config: dict[str, object], tensors: dict[str, object]) -> dict[str, bytes]:
    raw, stored = origin.files
    for end, change in tensors.items():
        (key,) = [key for key in stored if key.endswith(end)]
        stored[key] = change(stored[key]).contiguous()  # type: ignore[operator]
    return {CONFIG: json.dumps(raw | config).encode(), origin.tensors_file: save(stored)}


@pytest.mark.parametrize(
    ("name", "config", "tensors", "named"),
    [
        (
            "llama-c3a_pattern",
            {},
            {"layers.0.mlp.gate_proj.c3a_kernel": lambda t: t.view(2, 1, 64)},
            "[4, 2, 16]",
        ),
        ("llama-c3a", {"block_size": 4}, {}, "expected [8, 8, 4]"),
        (
            "llama-boft",
            {},
            {"1.self_attn.v_proj.boft_R": lambda t: t.repeat(2, 1, 1, 1)},
            "expected [1, 4, 8, 8]",
        ),
        ("llama-boft", {"boft_block_size": 4}, {}, "expected [1, 8, 4, 4]"),
        ("llama-boft", {"boft_block_num": 4}, {}, "boft_block_size: got 8 beside boft_block_num = 4"),
        (
            "llama-oft_cayley_shared",
            {},
            {"2.self_attn.v_proj.oft_R.weight": lambda t: t[:, :0]},
            "expected [1, 6]",
        ),
        ("llama-oft", {"oft_block_size": 4}, {}, "expected [8, 6]"),
        ("llama-oft", {"r": 2}, {}, "oft_block_size: got 8 beside r = 2"),
        ("llama-lokr_both", {"decompose_factor": 2}, {}, "lokr_w1"),
        ("llama-lokr", {"decompose_both": True}, {}, "has no lokr_w1_a"),
    ],
)
def test_sizes_are_those_of_the_config(
    name: str, config: dict[str, object], tensors: dict[str, object], named: str
) -> None:
    origin = source(name)
    with pytest.raises(InvalidDelta) as caught:
        read_upload(edited(origin, config, tensors), origin.spec)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["llama-trainable_tokens", "gemma-trainable_tokens"])
def test_an_absent_embedding_is_named(name: str) -> None:
    origin = source(name)
    rest = {key: tensor for key, tensor in load(origin.tensors).items() if "embed_tokens" not in key}
    with pytest.raises(InvalidDelta, match=r"'model\.embed_tokens' has no trainable_tokens_delta"):
        read_upload({CONFIG: origin.config, origin.tensors_file: save(rest)}, origin.spec)
