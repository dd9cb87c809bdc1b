"""The contract in plain torch, a loop over segments: the oracle of the tests and the CPU executor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.activations import FUNCTIONS
from serving.kernels.ops import (
    AffineSegment,
    CirculantWeights,
    DenseWeights,
    KronWeights,
    LinearMapSegment,
    LowRankSegment,
    LowRankWeights,
    PromptSegment,
    RowsSegment,
    SparseWeights,
    Surroundings,
    WeightDeltaSegment,
    WeightDeltaWeights,
)


def _weight_delta(x: Tensor, w: WeightDeltaWeights) -> Tensor:
    """x @ ΔW.T, [tokens, columns]."""
    tokens = x.shape[0]
    match w:
        case DenseWeights():
            return torch.mm(x, w.matrix.t())
        case SparseWeights():
            product: Tensor = torch.sparse.mm(w.matrix, x.t())
            return product.t()
        case KronWeights():
            (_, c), (_, d) = w.left.shape, w.right.shape
            return torch.matmul(w.left, x.reshape(tokens, c, d) @ w.right.t()).flatten(1)
        case CirculantWeights():
            spectrum = torch.fft.rfft(x.reshape(tokens, -1, w.size))
            turned = torch.einsum("tnf,mnf->tmf", spectrum, w.spectrum)
            rows: Tensor = torch.fft.irfft(turned, n=w.size)
            return rows.flatten(1)


def _surrounded(x: Tensor, w: LowRankWeights, around: Surroundings) -> Tensor:
    """What a LowRank with norms or a gate adds, [tokens, columns]."""
    normed = x if around.in_norm is None else F.layer_norm(x, x.shape[-1:], *around.in_norm, around.eps)
    hidden = FUNCTIONS[w.activation](F.linear(normed, w.A, w.a_bias))
    added = w.scaling * F.linear(hidden, w.B.t(), w.b_bias)
    if around.gate is not None:
        weight, bias = around.gate
        added = added * torch.sigmoid(x @ weight + bias).mean()
    if around.out_norm is not None:
        added = F.layer_norm(added, added.shape[-1:], *around.out_norm, around.eps)
    return added


class ReferenceKernels:
    """`DeltaKernels` in plain torch, on any device and in any float dtype."""

    def add_low_rank(self, y_TO: Tensor, x_TI: Tensor, segments: Sequence[LowRankSegment]) -> None:
        for start, stop, w in segments:
            x = x_TI[start:stop]
            if w.around is not None:
                y_TO[start:stop, w.start : w.stop] += _surrounded(x, w, w.around)
                continue
            hidden = torch.mm(x, w.A.t()) if w.a_bias is None else torch.addmm(w.a_bias, x, w.A.t())
            if w.activation != "identity":
                hidden = FUNCTIONS[w.activation](hidden)
            y = y_TO[start:stop, w.start : w.stop]
            y.addmm_(hidden, w.B, alpha=w.scaling)
            if w.b_bias is not None:
                y.add_(w.b_bias, alpha=w.scaling)

    def apply_affine(self, y_TO: Tensor, segments: Sequence[AffineSegment]) -> None:
        for start, stop, w in segments:
            y = y_TO[start:stop, w.start : w.stop]
            if w.scale is not None:
                y.mul_(w.scale)
            if w.shift is not None:
                y.add_(w.shift)

    def add_weight_delta(self, y_TO: Tensor, x_TI: Tensor, segments: Sequence[WeightDeltaSegment]) -> None:
        for start, stop, w in segments:
            y_TO[start:stop, w.start : w.stop] += _weight_delta(x_TI[start:stop], w)

    def apply_linear_map(self, y_TO: Tensor, segments: Sequence[LinearMapSegment]) -> None:
        for start, stop, w in segments:
            y = y_TO[start:stop, w.start : w.stop]
            for stage, blocks in enumerate(w.blocks):
                count, size, _ = blocks.shape
                order = slice(None) if w.order is None else w.order[stage]
                runs = y[:, order].reshape(-1, count, size).transpose(0, 1)
                y[:, order] = torch.bmm(runs, blocks).transpose(0, 1).flatten(1)

    def replace_embeddings(self, y_TO: Tensor, ids_T: Tensor, segments: Sequence[RowsSegment]) -> None:
        for start, stop, w in segments:
            tokens = ids_T[start:stop]
            found = torch.searchsorted(w.ids, tokens).clamp_(max=len(w.ids) - 1)
            hit = (w.ids[found] == tokens)[:, None]
            y_TO[start:stop] = torch.where(hit, w.rows[found], y_TO[start:stop])

    def replace_logits(self, y_TO: Tensor, x_TI: Tensor, segments: Sequence[RowsSegment]) -> None:
        for start, stop, w in segments:
            y_TO[start:stop, w.ids] = F.linear(x_TI[start:stop], w.rows, w.bias)

    def add_prompt_attention(
        self, y_TO: Tensor, query_HTD: Tensor, scaling: float, segments: Sequence[PromptSegment]
    ) -> None:
        for start, stop, w in segments:
            groups = query_HTD.shape[0] // w.key.shape[0]
            key, value = (x.repeat_interleave(groups, dim=0) for x in (w.key, w.value))
            scores = torch.bmm(query_HTD[:, start:stop].to(torch.float32), key.mT) * scaling
            weights = scores.softmax(dim=-1) if w.activation is None else FUNCTIONS[w.activation](scores)
            y_TO[start:stop] += torch.bmm(weights, value).transpose(0, 1).flatten(1)
