"""Task heads and masked language model heads on a bf16 backbone, against PEFT in fp32 on the same rounded weights.

The rule is that of `tests/contract/exactness.py`: the root mean square of our errors is at most 1.5 times that of
PEFT's own in bf16, the largest at most three times PEFT's largest.
"""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from adapters.formats import read_directory
from adapters.tasks import Task
from serving.core import PoolingParams, Request
from serving.model.backbone import Backbone, adopt_backbone
from tests.cases import quiet, randomise, tiny_backbone
from tests.contract import task_models
from tests.contract.exactness import RMS_RATIO, rms_of
from tests.contract.task_models import HeadCase, body_of, task_model
from tests.families import ENCODERS, Encoder
from tests.unit.serving.engine.engine_support import Bench

MOST = 3.0
CASES = (
    HeadCase("llama", "lora", "SEQ_CLS"),
    HeadCase("gpt2", "prefix_tuning", "TOKEN_CLS", 5),
    HeadCase("bert", "lora", "SEQ_CLS"),
    HeadCase("roberta", "ia3", "SEQ_CLS"),
    HeadCase("roberta", "lora", "QUESTION_ANS", 2),
    HeadCase("distilbert", "ln_tuning", "TOKEN_CLS", 5),
    HeadCase("electra", "lora", "FEATURE_EXTRACTION"),
)


def prompts(count: int = 24) -> list[list[int]]:
    draw = random.Random(8)
    return [[draw.randrange(2, 97) for _ in range(draw.randint(3, 12))] for _ in range(count)]


def rounded(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    return model.to(torch.bfloat16).to(dtype)


def check(got: list[Tensor], references: list[Tensor], own: list[Tensor]) -> None:
    mine, theirs = (
        [(a.double() - r.double()).flatten() for a, r in zip(found, references, strict=True)]
        for found in (got, own)
    )
    assert rms_of(mine) <= RMS_RATIO * rms_of(theirs), f"{rms_of(mine) / rms_of(theirs):.2f}"
    largest = [max(float(e.abs().max()) for e in errors) for errors in (mine, theirs)]
    assert largest[0] <= MOST * largest[1]
    assert rms_of(theirs) > 0


def bf16(model: torch.nn.Module) -> Backbone:
    return adopt_backbone(rounded(model, torch.bfloat16), name="tiny", device="cpu", dtype="bfloat16")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_heads_are_as_exact_in_bf16_as_peft(case: HeadCase, tmp_path: Path) -> None:
    case.save(tmp_path)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        with patch.object(task_models, "task_model", lambda *args, d=dtype: rounded(task_model(*args), d)):
            found[dtype] = [part.float() for part in case.reference(tmp_path, prompts())]
    backbone = bf16(body_of(case.family) if case.family in ENCODERS else tiny_backbone(case.family))
    bench = Bench(backbone, {"d": read_directory(tmp_path, backbone.spec)})
    for index, prompt in enumerate(prompts()):
        bench.pool(str(index), prompt, case.task, "d")
    bench.run()
    answers = [bench.pooled(str(index)) for index in range(len(prompts()))]
    got = [torch.tensor(one.numbers()).view(one.shape) for one in answers]
    check(got, found[torch.float32], found[torch.bfloat16])


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_words_at_masks_are_as_exact_in_bf16_as_peft(family: Encoder, tmp_path: Path) -> None:
    targets = ["query", "value", "transform.dense"] if family == "bert" else ["Wqkv", "head.dense"]
    with quiet():
        adapted = get_peft_model(tiny_backbone(family), LoraConfig(r=4, target_modules=targets))
        randomise(adapted, 1, 0.3)
        adapted.save_pretrained(str(tmp_path))
    found: dict[torch.dtype, list[Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        with quiet(), torch.no_grad():
            model = PeftModel.from_pretrained(rounded(tiny_backbone(family), dtype), str(tmp_path)).eval()  # type: ignore[arg-type]
            logits = [model(input_ids=torch.tensor([p])).logits[0, 1].float() for p in prompts()]
        found[dtype] = [row.log_softmax(dim=-1) for row in logits]
    backbone = bf16(tiny_backbone(family))
    bench = Bench(backbone, {"d": read_directory(tmp_path, backbone.spec)})
    for index, prompt in enumerate(prompts()):
        request = Request(
            request_id=str(index),
            prompt_token_ids=tuple(prompt),
            adapter_digest="d",
            pooling=PoolingParams(task=Task.FILL_MASK),
            masks=(1,),
            words=tuple((token,) for token in range(97)),
        )
        bench.engine.submit(request)
    bench.run()
    got = [torch.tensor(bench.pooled(str(index)).numbers()) for index in range(len(prompts()))]
    check(got, found[torch.float32], found[torch.bfloat16])
