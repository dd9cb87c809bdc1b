"""He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning" (ICLR 2022), in float64.

Transformers whose norms follow the blocks (RoBERTa, BART), written from the papers' formulas, with what each variant
of table 1 adds: h <- h + s·f(x W_down) W_up in sequence or in parallel, LoRA, prefix tuning as the gated addition of
equation 4, and the multi-head parallel adapter. Nothing of `adapters/` or `serving/` is used, and no module of
transformers runs: only the weights are theirs.
Legend: T tokens, S tokens attended to, d hidden width, H heads, D head width, r rank, l prefix length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bottleneck:
    """s·(ReLU(x W_down + b_down) W_up + b_up), between norms where there are any, as the authors' code has them.

    Shapes as torch's linear layers: down [r, d], up [d, r].
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    scaling: float = 1.0
    norms: Weights = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        inner = (self.normed(x, "before") @ self.down.T + self.down_bias).clamp(min=0)
        return self.normed(self.scaling * (inner @ self.up.T + self.up_bias), "after")

    def normed(self, x: Tensor, name: str) -> Tensor:
        return layer_norm(x, self.norms, name, 1e-5) if f"{name}.weight" in self.norms else x


@dataclass(frozen=True)
class LoRA:
    """s·x A B, with A [r, d_in] and B [d_out, r] as LoRA's files hold them."""

    A: Tensor
    B: Tensor
    scaling: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.scaling * (x @ self.A.T @ self.B.T)


@dataclass(frozen=True)
class Change:
    """What a variant adds to one block, attention or feed-forward. Nothing by default.

    `lora` by projection: q, k, v, o, or w1, w2. `prefix`: P_k and P_v [l, H, D]. `heads`: P_k and P_v [l, H, D] of a
    multi-head parallel adapter. `sequential` reads the block's output, `parallel` its input, `inside` the norm of
    their sum (AdapterHub's Pfeiffer adapter, after which the norm runs again), `after` the block's normed output
    (Pfeiffer et al.: behind "add & layer norm").
    """

    lora: Mapping[str, LoRA] = field(default_factory=dict)
    prefix: tuple[Tensor, Tensor] | None = None
    heads: tuple[Tensor, Tensor] | None = None
    sequential: Bottleneck | None = None
    parallel: Bottleneck | None = None
    inside: Bottleneck | None = None
    after: Bottleneck | None = None


Variant = Mapping[str, Change]
"""Block, as `0.attention`, `0.ffn`, or `dec.0.cross` -> what is added there."""
NOTHING = Change()


def layer_norm(x: Tensor, weights: Weights, path: str, eps: float) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weights[f"{path}.weight"] + weights[f"{path}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(x: Tensor, weights: Weights, path: str, change: Change, name: str) -> Tensor:
    y = x @ weights[f"{path}.weight"].T + weights[f"{path}.bias"]
    return y + change.lora[name](x) if name in change.lora else y


def finish(x: Tensor, out: Tensor, weights: Weights, norm: str, eps: float, change: Change) -> Tensor:
    """The block's adapters, the residual stream x and the norm."""
    if change.sequential is not None:
        out = out + change.sequential(out)
    if change.parallel is not None:
        out = out + change.parallel(x)
    y = layer_norm(x + out, weights, norm, eps)
    if change.inside is not None:
        y = layer_norm(x + out + change.inside(y), weights, norm, eps)
    return y if change.after is None else y + change.after(y)


def attention(
    x: Tensor, source: Tensor, weights: Weights, paths: Mapping[str, str], change: Change, num_heads: int,
    *, causal: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of x [T, d] over source [S, d], before the residual stream.

    With a prefix each head is (1 - λ)·Attn(x, source) + λ·softmax(x W_q P_kᵀ) P_v, λ the prefix's share of the sum of
    exponentials (equation 4).
    """
    q, k, v = (
        linear(values, weights, paths[name], change, name).unflatten(-1, (num_heads, -1)).transpose(0, 1)
        for name, values in (("q", x), ("k", source), ("v", source))
    )
    width = q.shape[-1]
    scores = q @ k.mT / math.sqrt(width)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    heads = torch.softmax(scores, dim=-1) @ v
    if change.prefix is not None:
        p_k, p_v = (part.transpose(0, 1) for part in change.prefix)
        of_prefix = q @ p_k.mT / math.sqrt(width)
        mass, own = of_prefix.exp().sum(-1, keepdim=True), scores.exp().sum(-1, keepdim=True)
        share = mass / (mass + own)
        heads = (1 - share) * heads + share * (torch.softmax(of_prefix, dim=-1) @ p_v)
    if change.heads is not None:
        p_k, p_v = (part.transpose(0, 1) for part in change.heads)
        heads = heads + (q @ p_k.mT / math.sqrt(width)).clamp(min=0) @ p_v
    return linear(heads.transpose(0, 1).flatten(1), weights, paths["o"], change, "o")


def feed_forward(x: Tensor, weights: Weights, first: str, second: str, change: Change) -> Tensor:
    inner = gelu(linear(x, weights, first, change, "w1"))
    return linear(inner, weights, second, change, "w2")


def reparametrised(embedding: Tensor, first: tuple[Tensor, Tensor], last: tuple[Tensor, Tensor]) -> Tensor:
    """A prefix's MLP, tanh(P W_1 + b_1) W_2 + b_2 (Li and Liang section 4.3): [l, d] -> [l, 2·layers·H·D]."""
    inner = torch.tanh(embedding @ first[0].T + first[1])
    return inner @ last[0].T + last[1]


def float64(state: Weights) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


def roberta(weights: Weights, tokens: list[int], variant: Variant, *, num_heads: int, eps: float,
            padding: int) -> Tensor:  # fmt: skip
    """Final hidden states [T, d]. `weights`: float64, keys of a model whose body is `roberta`."""
    at = "roberta.embeddings"
    positions = torch.arange(padding + 1, padding + 1 + len(tokens))
    x = (
        weights[f"{at}.word_embeddings.weight"][tokens]
        + weights[f"{at}.position_embeddings.weight"][positions]
    )
    x = layer_norm(x + weights[f"{at}.token_type_embeddings.weight"][0], weights, f"{at}.LayerNorm", eps)
    for layer in range(count(weights, "roberta.encoder.layer")):
        at = f"roberta.encoder.layer.{layer}"
        change = variant.get(f"{layer}.attention", NOTHING)
        paths = {name: f"{at}.attention.self.{path}" for name, path in ROBERTA_PROJECTIONS.items()}
        paths["o"] = f"{at}.attention.output.dense"
        out = attention(x, x, weights, paths, change, num_heads)
        x = finish(x, out, weights, f"{at}.attention.output.LayerNorm", eps, change)
        change = variant.get(f"{layer}.ffn", NOTHING)
        out = feed_forward(x, weights, f"{at}.intermediate.dense", f"{at}.output.dense", change)
        x = finish(x, out, weights, f"{at}.output.LayerNorm", eps, change)
    return x


ROBERTA_PROJECTIONS = {"q": "query", "k": "key", "v": "value"}


def count(weights: Weights, path: str) -> int:
    """How many layers stand under `path`."""
    return 1 + max(int(key[len(path) + 1 :].split(".")[0]) for key in weights if key.startswith(f"{path}."))


BART_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
BART_EPS = 1e-5


def bart(weights: Weights, source: list[int], tokens: list[int], variant: Variant, *, heads: tuple[int, int],
         scale: float) -> Tensor:  # fmt: skip
    """Logits [T, V] of the decoder's tokens. `heads` of (encoder, decoder); `scale` of token embeddings.

    Positions count from 2 in both stacks, with and without prefixes.
    """

    def attends(x: Tensor, over: Tensor, at: str, name: str, num_heads: int, *, causal: bool) -> Tensor:
        change = variant.get(name, NOTHING)
        paths = {role: f"{at}.{end}" for role, end in BART_PROJECTIONS.items()}
        out = attention(x, over, weights, paths, change, num_heads, causal=causal)
        return finish(x, out, weights, f"{at}_layer_norm", BART_EPS, change)

    def stack(side: str, ids: list[int], memory: Tensor | None) -> Tensor:
        name, decodes, body = side[:3], memory is not None, f"model.{side}"
        x = scale * weights[f"{body}.embed_tokens.weight"][ids]
        x = x + weights[f"{body}.embed_positions.weight"][torch.arange(2, 2 + len(ids))]
        x = layer_norm(x, weights, f"{body}.layernorm_embedding", BART_EPS)
        for layer in range(count(weights, f"{body}.layers")):
            at, block = f"{body}.layers.{layer}", f"{name}.{layer}"
            x = attends(x, x, f"{at}.self_attn", f"{block}.attention", heads[decodes], causal=decodes)
            if memory is not None:
                x = attends(x, memory, f"{at}.encoder_attn", f"{block}.cross", heads[1], causal=False)
            change = variant.get(f"{block}.ffn", NOTHING)
            out = feed_forward(x, weights, f"{at}.fc1", f"{at}.fc2", change)
            x = finish(x, out, weights, f"{at}.final_layer_norm", BART_EPS, change)
        return x

    states = stack("decoder", tokens, stack("encoder", source, None))
    return states @ weights["lm_head.weight"].T + weights["final_logits_bias"][0]
