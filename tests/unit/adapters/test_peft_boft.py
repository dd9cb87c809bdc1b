"""BOFT with several butterfly stages: PEFT makes them only beside a CUDA extension, replaced here by plain torch."""

from __future__ import annotations

from pathlib import Path

import peft.tuners.boft.layer as boft
import pytest
import torch
from peft import BOFTConfig, get_peft_model
from torch import Tensor

from adapters.formats import read_directory
from adapters.normal_form import LinearMap
from serving.kernels.ops import LinearMapSegment
from serving.kernels.reference import ReferenceKernels
from serving.model.place_matrices import place_blocks
from tests.cases import quiet, randomise, spec_of, tiny_backbone


class PlainBlockDiag:
    """What PEFT's FastBlockDiag computes: [N, D, H, H] -> [N, D·H, D·H]."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*stage) for stage in blocks])


@pytest.mark.parametrize(("size", "factor"), [(4, 1), (4, 2), (2, 3), (8, 3), (4, 4)])
def test_butterfly_stages_equal_pefts_rotation(
    size: int, factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft, "FastBlockDiag", PlainBlockDiag)
    config = BOFTConfig(
        target_modules=["q_proj"], boft_block_size=size, boft_n_butterfly_factor=factor, task_type="CAUSAL_LM"
    )
    with quiet():
        adapted = get_peft_model(tiny_backbone("llama"), config)
        randomise(adapted, seed=3)
        adapted.save_pretrained(str(tmp_path))
        layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
        rotation, _ = layer.get_delta_weight("default")
    delta = read_directory(tmp_path, spec_of(tiny_backbone("llama")))
    op = next(op for op in delta.ops if isinstance(op, LinearMap) and op.site.layer == 1)
    assert op.blocks is not None
    assert op.blocks.shape[0] == factor
    x = torch.randn(6, 32)
    expected = x @ rotation.detach()
    placed = place_blocks(op, 0, 32, lambda tensor, dtype=torch.float32: tensor.to(dtype))
    ReferenceKernels().apply_linear_map(x, [LinearMapSegment(0, 6, placed)])
    assert torch.allclose(x, expected, atol=1e-5)
