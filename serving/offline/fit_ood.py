"""Class statistics of a classifier, fitted through its delta: what its head reads for labelled texts.

Format written: `adapters.formats.head_file`. Source: Lee et al. "A Simple Unified Framework for Detecting
Out-of-Distribution Samples and Adversarial Attacks" section 2.1: class means and one covariance that all share.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.canonical import to_canonical
from adapters.errors import InvalidRequest
from adapters.formats import read_directory
from adapters.normal_form import Delta
from adapters.tasks import Task
from serving.core import GenerateCall, PoolingParams, Request
from serving.engine.cloze import ClozePlan
from serving.engine.pooling import PoolState, at_masks
from serving.engine.runner import Runner
from serving.engine.sequence import ScheduledRow, max_total_len
from serving.engine.sequence import Sequence as Row
from serving.engine.tokenise import tokenise
from serving.model.backbone import Backbone
from serving.model.placement import place
from serving.model.programs import PlacedDelta
from serving.offline.parity import load

BATCH_ROWS = 8
RIDGE = 1e-6
"""Added to the covariance's diagonal, in parts of its mean: with few texts it has directions without spread."""

Report = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Labelled:
    """One line of the data: a text, or two that the tokenizer joins, and the index of its label."""

    text: str
    pair: str | None
    label: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was fitted. `counts`: texts per label. Shapes: class_means [C, d], precision [d, d]."""

    class_means: Tensor
    precision: Tensor
    counts: dict[str, int]

    def write(self, out: Path) -> None:
        """Write ood.safetensors. Raises InvalidRequest."""
        try:
            save_file({"class_means": self.class_means, "precision": self.precision}, out)
        except OSError as error:
            raise InvalidRequest(f"{out} can't be written: {error.strerror}.", param="out") from None


def fit(directory: Path, backbone_path: str, data: Path, *, report: Report = lambda _: None) -> Statistics:
    """Run the labelled texts of `data` through the delta in `directory` and fit the statistics of its classes.

    Raises InvalidDelta, BackboneRefused, and InvalidRequest for a delta that is no classifier or data that don't fit.
    """
    report("loading the backbone")
    backbone = load(backbone_path)
    delta = read_directory(directory, backbone.spec)
    if delta.task != Task.SEQUENCE_CLASSIFICATION or delta.head is None:
        raise InvalidRequest(
            f"{directory}: the delta is for {delta.task}; only {Task.SEQUENCE_CLASSIFICATION.value} has classes.",
            param="DIR",
        )
    items = list(read_data(data, delta.head.labels))
    report(f"running {len(items)} texts")
    vectors = torch.stack(list(features(delta, backbone, items)))
    labels = torch.tensor([item.label for item in items])
    counts = Counter(delta.head.labels[item.label] for item in items)
    return Statistics(*fit_classes(vectors, labels, len(delta.head.labels)), counts=dict(counts))


def read_data(path: Path, labels: Sequence[str]) -> Iterator[Labelled]:
    """The lines of a JSONL file of `text`, `label` (a name or an index) and, where there is one, `text_pair`.

    Raises InvalidRequest naming the first line that is wrong, and labels without any text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} can't be read: {error}", param="data") from None
    seen: set[int] = set()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            item = _labelled(line, number, labels)
            seen.add(item.label)
            yield item
    if missing := [name for index, name in enumerate(labels) if index not in seen]:
        raise InvalidRequest(
            f"{path}: no text is labelled {', '.join(map(ascii, missing[:10]))}.",
            param="data",
            remedy="Every class needs at least one text, better fifty.",
        )


def _labelled(line: str, number: int, labels: Sequence[str]) -> Labelled:
    try:
        raw = json.loads(line)
    except ValueError:
        raw = None
    if isinstance(raw, dict):
        text, pair, label = raw.get("text"), raw.get("text_pair"), raw.get("label")
        index = label if type(label) is int else _index(labels, label)
        fits = isinstance(pair, str | None) and 0 <= index < len(labels)
        if isinstance(text, str) and text and fits:
            return Labelled(text, pair, index)
    raise InvalidRequest(
        f"line {number}: expected an object with text (a string), label (one of the head's names, or an index from 0"
        f" to {len(labels) - 1}) and at most text_pair (a string).",
        param="data",
    )


def _index(labels: Sequence[str], label: object) -> int:
    return next((index for index, name in enumerate(labels) if name == label), -1)


@torch.inference_mode()
def features(delta: Delta, backbone: Backbone, items: Sequence[Labelled]) -> Iterator[Tensor]:
    """What the head of `delta` reads for each item, [d] fp32 each. Raises ContextLengthExceeded."""
    placed = place(delta, to_canonical(delta).digest, backbone)
    assert placed.head is not None
    if placed.head.spec.cloze is None:
        rows = [_row(str(index), item, placed, backbone) for index, item in enumerate(items)]
        yield from _vectors(rows, placed, backbone)
        return
    plan = ClozePlan(placed.head, backbone.tokenizer)
    of_items = [_cloze_rows(str(index), item, plan, placed, backbone) for index, item in enumerate(items)]
    vectors = _vectors([row for rows in of_items for row in rows], placed, backbone)
    for rows in of_items:
        yield plan.features([next(vectors) for _ in rows])


def _vectors(rows: Sequence[Row], placed: PlacedDelta, backbone: Backbone) -> Iterator[Tensor]:
    """What the head reads of each row, of a cloze the mean over its masks."""
    longest = max(row.num_prompt for row in rows)
    runner = Runner(backbone, num_slots=BATCH_ROWS, max_len=placed.prefix_len + longest)
    assert placed.head is not None
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        found = {}
        for slot, row in enumerate(batch):
            row.admit(slot, placed)
        for (row, _), _, hidden in runner.run([ScheduledRow(row, row.num_prompt) for row in batch]):
            if row.request.masks:
                found[row] = at_masks(row, hidden)
            else:
                found[row] = PoolState().take(row, placed.head, hidden)[0]
        yield from (found[row] for row in batch)


def _row(name: str, item: Labelled, placed: PlacedDelta, backbone: Backbone) -> Row:
    pooling, room = _asked(item, placed, backbone)
    call = GenerateCall(request_id=name, prompt=item.text, pooling=pooling)
    ids = tokenise(call, backbone.tokenizer, vocab_size=backbone.spec.vocab_size, room=room).ids
    return _admitted(Request(request_id=name, prompt_token_ids=ids, pooling=pooling), placed, backbone, room)


def _cloze_rows(
    name: str, item: Labelled, plan: ClozePlan, placed: PlacedDelta, backbone: Backbone
) -> list[Row]:
    pooling, room = _asked(item, placed, backbone)
    requests = [
        Request(
            request_id=f"{name}/{index}",
            prompt_token_ids=found.tokens.ids,
            pooling=pooling,
            masks=found.masks,
            words=found.words,
        )
        for index, found in enumerate(plan.rows(item.text, pooling, room))
    ]
    return [_admitted(request, placed, backbone, room) for request in requests]


def _asked(item: Labelled, placed: PlacedDelta, backbone: Backbone) -> tuple[PoolingParams, int]:
    """What is asked of a text, and how many tokens it may have."""
    pooling = PoolingParams(task=Task.SEQUENCE_CLASSIFICATION, text_pair=item.pair)
    return pooling, backbone.spec.max_positions - placed.prefix_len


def _admitted(request: Request, placed: PlacedDelta, backbone: Backbone, room: int) -> Row:
    ids = request.prompt_token_ids
    max_total_len(len(ids), 0, room)
    request = replace(request, adapter_digest=placed.digest)
    row = Row(request, list(ids), state=None)
    row.pool_for(placed, getattr(backbone.model.config, "pad_token_id", None))
    return row


def fit_classes(vectors: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Means per class and the inverse of the covariance that they share, in float64 inside.

    Shapes: vectors [N, d], labels [N] -> class_means [C, d], precision [d, d], both fp32.
    """
    x = vectors.double()
    means = torch.stack([x[labels == label].mean(dim=0) for label in range(num_labels)])
    away = x - means[labels]
    covariance = away.T @ away / len(x)
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    precision = torch.linalg.inv(covariance + ridge * torch.eye(x.shape[1], dtype=x.dtype))
    return means.float(), precision.float().contiguous()
