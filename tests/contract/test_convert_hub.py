"""`deltamux convert` of what AdapterHub's library pickled: the same delta as of its safetensors file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from adapters.errors import InvalidDelta
from serving.cli import app
from serving.offline.convert import convert
from serving.offline.hub import without_copies
from tests.cases import GOLDEN
from tests.integration.world import byte_tokenizer

RUNNER = CliRunner(env={"COLUMNS": "250", "NO_COLOR": "1"})
PICKLED = [("llama", "mam"), ("gpt2", "prefix_tuning")]


@pytest.fixture(scope="module", params=PICKLED, ids="-".join)
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(adapter as the library pickles it, backbone with a tokenizer)."""
    family, name = request.param
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(GOLDEN / family / "backbone", root / "backbone")
    byte_tokenizer().save_pretrained(root / "backbone")
    shutil.copytree(GOLDEN / family / name, root / "adapter")
    (root / "adapter" / "adapter.safetensors").unlink()
    return root / "adapter", root / "backbone"


def test_pickled_is_the_delta_of_the_safetensors_file(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    directory, backbone = adapter
    conversion = convert(directory, str(backbone))
    spec_digest = conversion.delta.backbone_digest
    plain = tmp_path / "plain"
    shutil.copytree(directory, plain)
    golden = GOLDEN / ("llama" if directory_family(directory) == "llama" else "gpt2")
    name = json.loads((directory / "adapter_config.json").read_text())["name"]
    shutil.copyfile(golden / name / "adapter.safetensors", plain / "adapter.safetensors")
    again = convert(plain, str(backbone))
    assert (conversion.needed, again.needed, conversion.record) == (True, False, None)
    assert conversion.canonical.digest == again.canonical.digest
    assert spec_digest == again.delta.backbone_digest
    conversion.write(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", "tensors.safetensors"}


def directory_family(directory: Path) -> str:
    return str(json.loads((directory / "adapter_config.json").read_text())["model_type"])


def test_the_command_says_that_nothing_was_compared(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    directory, backbone = adapter
    done = RUNNER.invoke(app, ["convert", str(directory), str(tmp_path / "out"), "--backbone", str(backbone)])
    assert done.exit_code == 0, done.output
    assert "not compared" in done.output
    assert "--parity" not in done.output


def test_a_prefix_is_kept_once() -> None:
    """The library has it under every layer, in one memory, which safetensors refuses."""
    stored = torch.load(GOLDEN / "gpt2" / "prefix_tuning" / "pytorch_adapter.bin", weights_only=True)
    kept = without_copies(stored)
    assert len(stored) == 20
    assert all(key.startswith("transformer.prefix_tuning.prefix_tunings.") for key in kept)
    assert len(kept) == 5


def test_a_pickled_copy_of_the_backbones_head_is_left_out(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    directory, backbone = adapter
    with_head = tmp_path / "with_head"
    shutil.copytree(directory, with_head)
    weights = load_file(backbone / "model.safetensors")
    head = weights.get("lm_head.weight", weights.get("transformer.wte.weight"))
    torch.save({"lm_head.weight": head}, with_head / "pytorch_model_head.bin")
    conversion = convert(with_head, str(backbone))
    assert conversion.canonical.digest == convert(directory, str(backbone)).canonical.digest
    assert "pytorch_model_head.bin" in conversion.notes[0]
    torch.save({"lm_head.weight": head + 1}, with_head / "pytorch_model_head.bin")
    with pytest.raises(
        InvalidDelta, match=r"lm_head\.weight: a prediction head that is not the backbone's own"
    ):
        convert(with_head, str(backbone))


def test_more_than_tensors_is_refused(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    directory, backbone = adapter
    bad = tmp_path / "bad"
    shutil.copytree(directory, bad)
    torch.save({"x": Path("y")}, bad / "pytorch_adapter.bin")
    with pytest.raises(InvalidDelta, match="more than tensors"):
        convert(bad, str(backbone))
