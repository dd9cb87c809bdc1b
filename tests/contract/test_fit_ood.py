"""`deltamux adapters fit-ood`: its statistics are those of PEFT's features, and they tell foreign inputs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

from adapters.canonical import to_canonical
from adapters.formats import read_directory
from adapters.tasks import Task
from serving.cli import app
from serving.offline.parity import load
from tests.cases import tiny_backbone
from tests.contract.task_models import HeadCase
from tests.unit.serving.engine.engine_support import Bench
from tests.unit.serving.pooling_support import Adapter, tokenizer

LABELS = ["early", "middle", "late"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("backbone") / "tiny"
    tiny_backbone("llama").save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    made = Adapter(tmp_path_factory.mktemp("adapters"), HeadCase("llama", "lora", "SEQ_CLS", 3), "mood")
    (made.directory / "head.json").write_text(json.dumps({"labels": LABELS}))
    return made


def words(draw: random.Random, letters: str) -> str:
    return " ".join("".join(draw.choices(letters, k=4)) for _ in range(4))


def data(path: Path, count: int = 60) -> list[tuple[str, int]]:
    """Texts whose letters say their class."""
    draw = random.Random(2)
    items = [(words(draw, "abcd" if label == 0 else "klmn" if label == 1 else "wxyz"), label)
             for label in range(3) for _ in range(count)]  # fmt: skip
    draw.shuffle(items)
    lines = [
        {"text": text, "label": LABELS[label] if i % 2 else label} for i, (text, label) in enumerate(items)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return items


def cli(*args: object) -> Result:
    runner = CliRunner(env={"COLUMNS": "250", "NO_COLOR": "1"})
    return runner.invoke(app, ["adapters", "fit-ood", *map(str, args)])


def test_statistics_are_those_of_pefts_features_and_tell_foreign_inputs(
    backbone: Path, adapter: Adapter, tmp_path: Path
) -> None:
    items = data(tmp_path / "data.jsonl")
    result = cli(adapter.directory, "--backbone", backbone, "--data", tmp_path / "data.jsonl")
    assert result.exit_code == 0, result.output
    found = load_file(adapter.directory / "ood.safetensors")
    everything = adapter.features(*(text for text, _ in items)).double()
    labels = torch.tensor([label for _, label in items])
    means = torch.stack([everything[labels == label].mean(0) for label in range(3)])
    assert torch.allclose(found["class_means"].double(), means, rtol=0, atol=1e-4)
    away = everything - means[labels]
    covariance = away.T @ away / len(items)
    covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    assert torch.allclose(
        found["precision"].double() @ covariance, torch.eye(32, dtype=torch.float64), atol=1e-2
    )

    served = load(str(backbone))
    delta = read_directory(adapter.directory, served.spec)
    digest = to_canonical(delta).digest
    bench = Bench(served, {digest: delta})
    draw = random.Random(9)
    foreign = [words(draw, "e") for _ in range(40)]
    for index, text in enumerate([text for text, _ in items[:40]] + foreign):
        bench.pool(str(index), tokenizer()(text)["input_ids"], Task.SEQUENCE_CLASSIFICATION, digest)
    bench.run()
    scores = torch.tensor([bench.pooled(str(index)).ood["mahalanobis"] for index in range(80)])
    by_hand = _mahalanobis(everything[:40], found)
    assert torch.allclose(scores[:40].double(), by_hand, rtol=1e-3)
    auroc = (scores[40:, None] > scores[None, :40]).double().mean()
    assert float(auroc) > 0.99


def _mahalanobis(features: Tensor, found: dict[str, Tensor]) -> Tensor:
    away = features[:, None] - found["class_means"].double()[None]
    distances: Tensor = ((away @ found["precision"].double()) * away).sum(-1)
    return distances.min(dim=1).values


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (['{"text": "a", "label": "early"}'], "no text is labelled 'middle', 'late'"),
        (['{"text": "a", "label": "never"}'], "line 1"),
        (['{"text": "a", "label": 3}'], "from 0 to 2"),
        (['{"text": "", "label": 0}'], "line 1"),
        (['{"text": "a", "label": 0}', "[]"], "line 2"),
        (["{"], "line 1"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    lines: list[str], named: str, backbone: Path, adapter: Adapter, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    result = cli(adapter.directory, "--backbone", backbone, "--data", tmp_path / "data.jsonl")
    assert result.exit_code == 1
    assert named in result.output


def test_what_is_no_classifier_is_refused(backbone: Path, tmp_path: Path) -> None:
    other = Adapter(tmp_path, HeadCase("llama", "lora", "FEATURE_EXTRACTION"), "vectors")
    data(tmp_path / "data.jsonl", 1)
    result = cli(other.directory, "--backbone", backbone, "--data", tmp_path / "data.jsonl")
    assert result.exit_code == 1
    assert "for embedding" in result.output
