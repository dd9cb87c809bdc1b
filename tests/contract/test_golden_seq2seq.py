"""AdapterHub's own logits on encoder-decoders: every golden adapter alone, and all of them in one batch."""

from __future__ import annotations

import pytest
import torch

from serving.engine.runner import Runner
from serving.model.backbone import adopt_backbone
from serving.model.programs import PlacedDelta
from tests.cases import GOLDEN_NAME, SEQ2SEQ_GOLDEN_CASES
from tests.contract.exactness import EFFECT, LIMITS, served
from tests.contract.forced import Row, run
from tests.families import Seq2Seq


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_goldens_on_encoder_decoders(family: Seq2Seq) -> None:
    cases = [case for case in SEQ2SEQ_GOLDEN_CASES if case.family == family]
    backbone = adopt_backbone(cases[0].backbone(), name=GOLDEN_NAME, device="cpu", dtype="float32")
    wanted = []
    for case in cases:
        delta = served(case.directory, backbone)
        for stored in case.golden():
            tokens, source = stored["input_ids"].tolist(), tuple(stored["source_ids"].tolist())

            def row(
                delta: PlacedDelta | None, tokens: list[int] = tokens, source: tuple[int, ...] = source
            ) -> Row:
                return Row("", tokens, 1, delta, source=source)  # decoded, as after the decoder's first token

            wanted.append((case, stored["logits"], row(delta), row(delta), row(None)))
    runner = Runner(backbone, num_slots=2 * len(wanted), max_len=32)
    run(runner, [row for _, _, _, together, bare in wanted for row in (together, bare)][::-1])
    for case, expected, alone, together, bare in wanted:
        run(runner, [alone])
        limit = LIMITS[case.tolerance] * max(1.0, float(expected.abs().max()))
        for found in (alone, together):
            assert float((torch.cat(found.logits) - expected).abs().max()) <= limit, case.name
        assert float((torch.cat(bare.logits) - expected).abs().max()) > EFFECT, case.name
