"""AdapterHub's own final hidden states on encoders: every golden adapter alone, and all of them in one batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapters.tasks import Task
from serving.core import PoolingParams, Request, SamplingParams
from serving.engine.runner import Runner
from serving.engine.sequence import ScheduledRow, Sequence
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.programs import PlacedDelta
from tests.cases import ENCODER_GOLDEN_CASES, GOLDEN_NAME
from tests.contract.exactness import EFFECT, LIMITS, served
from tests.families import Encoder


def row(slot: int, tokens: list[int], delta: PlacedDelta | None) -> ScheduledRow:
    request = Request(
        request_id=str(slot),
        prompt_token_ids=tuple(tokens),
        sampling=SamplingParams(),
        pooling=PoolingParams(task=Task.EMBEDDING),
        adapter_digest=None if delta is None else delta.digest,
    )
    sequence = Sequence(request, list(tokens), state=None)
    sequence.admit(slot, delta)
    sequence.pooled_tokens = range(len(tokens))
    return ScheduledRow(sequence, len(tokens))


def hidden(backbone: Backbone, rows: list[ScheduledRow]) -> dict[str, Tensor]:
    """[T, d] of each row, by request."""
    runner = Runner(backbone, num_slots=len(rows), max_len=32)
    return {output.row.seq.request.request_id: output.hidden for output in runner.run(rows)}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_goldens_on_encoders(family: Encoder) -> None:
    cases = [case for case in ENCODER_GOLDEN_CASES if case.family == family]
    backbone = adopt_backbone(cases[0].backbone(), name=GOLDEN_NAME, device="cpu", dtype="float32")
    wanted, rows = [], []
    for case in cases:
        delta = served(case.directory, backbone)
        for stored in case.golden():
            tokens = stored["input_ids"].tolist()
            wanted.append((case, stored["logits"]))
            rows += [row(2 * len(wanted) - 2, tokens, delta), row(2 * len(wanted) - 1, tokens, None)]
    together = hidden(backbone, rows[::-1])
    for index, (case, expected) in enumerate(wanted):
        limit = LIMITS[case.tolerance] * max(1.0, float(expected.abs().max()))
        own, bare = str(2 * index), str(2 * index + 1)
        (alone,) = hidden(backbone, [rows[2 * index]]).values()
        for found in (alone, together[own]):
            assert float((found - expected).abs().max()) <= limit, case.name
        assert float((together[own] - together[bare]).abs().max()) > EFFECT, case.name


def test_a_pfeiffer_adapter_runs_the_norm_again_in_half_precision() -> None:
    (case,) = (c for c in ENCODER_GOLDEN_CASES if (c.family, c.name) == ("bert", "seq_bn"))
    backbone = adopt_backbone(case.backbone(), name=GOLDEN_NAME, device="cpu", dtype="bfloat16")
    delta = served(case.directory, backbone)
    for stored in case.golden():
        (found,) = hidden(backbone, [row(0, stored["input_ids"].tolist(), delta)]).values()
        error = (found.float() - stored["logits"]).abs().max() / stored["logits"].abs().max()
        assert torch.isfinite(found).all()
        assert float(error) < 0.05
