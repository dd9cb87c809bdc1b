"""Validation: a good delta passes, and each thing that may be wrong is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.normal_form import (
    Affine,
    AttnPrefix,
    Delta,
    Head,
    LinearMap,
    LowRank,
    Op,
    Rows,
    Site,
    VirtualTokens,
    WeightDelta,
)
from adapters.positions import FirstTokens, FromInvocation, LastTokens
from adapters.validate import check
from tests.cases import DIGEST, spec_of, tiny_backbone

LLAMA = spec_of(tiny_backbone("llama"))  # hidden 32, FFN 64, 3 layers, 4 heads, 2 KV heads of 8, no biases
GPT2 = spec_of(tiny_backbone("gpt2"))  # hidden 32, FFN 128, fused q k v, biases

NEOX = spec_of(tiny_backbone("gpt_neox"))  # q, k and v are one site
BERT = spec_of(tiny_backbone("bert"))
PADDED = replace(LLAMA, sees_queries=False, free_positions=False)  # as bloom is served


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def low_rank(read: str = "attn.x", write: str = "q.out", layer: int = 0, **changes: Any) -> LowRank:
    values: dict[str, Any] = {"A": ones(4, 32), "B": ones(32, 4), **changes}
    return LowRank(read=Site(read, layer), write=Site(write, layer), **values)


def prefixes(length: int = 5, **changes: Any) -> list[AttnPrefix]:
    values = {"key": ones(length, 2, 8), "value": ones(length, 2, 8), **changes}
    return [AttnPrefix(layer=layer, **values) for layer in range(3)]


def delta(*ops: Op, **changes: Any) -> Delta:
    return Delta(method="test", ops=ops, **{"backbone_digest": DIGEST, **changes})


def blocks(site: str = "q.out", **changes: Any) -> LinearMap:
    values: dict[str, Any] = {"blocks": ones(2, 4, 8, 8), **changes}
    return LinearMap(site=Site(site, 0), **values)


def plus(layout: str, values: Tensor, site: str = "v.out", **changes: Any) -> WeightDelta:
    return WeightDelta(site=Site(site, 0), layout=layout, values=values, **changes)  # type: ignore[arg-type]


def places(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def new_rows(*ids: int, **changes: Any) -> Rows:
    values: dict[str, Any] = {"site": Site("embed"), "rows": ones(len(ids), 32), **changes}
    return Rows(ids=torch.tensor(ids, dtype=torch.int32), **values)


def head(weight: Tensor, **changes: Any) -> Head:
    return Head(weight=weight, **{"site": Site("logits"), **changes})


def prompted(layer: int = 1, **changes: Any) -> AttnPrefix:
    values: dict[str, Any] = {"key": ones(4, 32), "value": ones(4, 32), "gate": ones(1), **changes}
    return AttnPrefix(layer=layer, merge=values.pop("merge", "separate"), **{"projected": False, **values})


SHUFFLED = torch.stack([torch.arange(32), torch.arange(32).flip(0)]).int()

GOOD: dict[str, tuple[Delta, Any]] = {
    "parallel": (delta(low_rank()), LLAMA),
    "two of one site": (delta(low_rank(), low_rank(A=ones(9, 32), B=ones(32, 9))), LLAMA),
    "rank above the width": (delta(low_rank(A=ones(100, 32), B=ones(32, 100))), LLAMA),
    "sequential": (delta(low_rank("layer.out", "layer.out", a_bias=ones(4), b_bias=ones(32))), LLAMA),
    "stream to attention": (delta(low_rank("attn.r", "o.out")), LLAMA),
    "stream to feed-forward": (delta(low_rank("ffn.r", "down.out")), LLAMA),
    "attention input to feed-forward": (delta(low_rank("attn.x", "down.out")), LLAMA),
    "head": (
        delta(LowRank(read=Site("final"), write=Site("logits"), A=ones(4, 32), B=ones(97, 4))),
        LLAMA,
    ),
    "fused slice": (delta(low_rank(write="v.out")), GPT2),
    "half precision": (delta(low_rank(A=ones(4, 32).half(), B=ones(32, 4).bfloat16())), LLAMA),
    "input scale": (delta(Affine(site=Site("down.out", 1), side="input", scale=ones(64))), LLAMA),
    "dora": (
        delta(
            low_rank(),
            Affine(site=Site("q.out", 0), scale=ones(32), weight_normalized=True, covers_bias=False),
        ),
        LLAMA,
    ),
    "both sides of a site": (
        delta(
            Affine(site=Site("down.out", 1), side="input", scale=ones(64)),
            Affine(site=Site("down.out", 1), scale=ones(32)),
        ),
        LLAMA,
    ),
    "norm bias": (delta(Affine(site=Site("ffn.x", 1), bias=ones(32))), GPT2),
    "scale and bias of a site": (
        delta(Affine(site=Site("o.out", 1), scale=ones(32)), Affine(site=Site("o.out", 1), bias=ones(32))),
        GPT2,
    ),
    "prefix at its own positions": (delta(*prefixes(), position_offset=5), LLAMA),
    "prefix at position 0": (delta(*prefixes(), position_offset=0), LLAMA),
    "longest prefix": (delta(*prefixes(255)), LLAMA),
    "prompt": (delta(VirtualTokens(embeddings=ones(3, 32)), position_offset=3), LLAMA),
    "rotation": (delta(blocks()), LLAMA),
    "shuffled rotation": (delta(blocks(order=SHUFFLED)), LLAMA),
    "shared block": (delta(blocks(blocks=ones(1, 1, 2, 2))), GPT2),
    "rotations on both sides": (delta(blocks(), blocks(side="output")), LLAMA),
    "rotation of a slice": (delta(blocks("v.out", side="output")), GPT2),
    "reflections": (delta(blocks(blocks=None, reflections=torch.eye(32)[:3])), LLAMA),
    "dense": (delta(plus("dense", ones(16, 32)), plus("dense", ones(16, 32))), LLAMA),
    "sparse": (delta(plus("sparse", ones(3), indices=places([0, 15, 15], [31, 0, 0]))), LLAMA),
    "kron": (delta(plus("kron", ones(4, 16), left=ones(4, 2))), LLAMA),
    "circulant": (delta(plus("circulant", ones(4, 8, 4), scaling=0.5)), LLAMA),
    "rows": (
        delta(
            Rows(site=Site("embed"), ids=places([5, 96])[0], rows=ones(2, 32)),
            Rows(site=Site("logits"), ids=places([5, 96])[0], rows=ones(2, 32)),
        ),
        GPT2,
    ),
    "replaced head": (delta(head(ones(97, 32))), GPT2),
    "adapted head with a bias": (
        delta(
            head(ones(97, 32), bias=ones(97)),
            LowRank(read=Site("final"), write=Site("logits"), A=ones(2, 32), B=ones(97, 2)),
        ),
        LLAMA,
    ),
    "prompts of their own": (delta(prompted(1), prompted(2)), LLAMA),
    "projected prompt": (delta(prompted(key=ones(4, 2, 8), value=ones(4, 2, 8), projected=True)), LLAMA),
    "norm weight": (delta(Affine(site=Site("final"), weight=ones(32))), LLAMA),
    "prompt and LoRA": (delta(low_rank(), VirtualTokens(embeddings=ones(3, 32)), position_offset=3), LLAMA),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_deltas_pass(name: str) -> None:
    assert check(*GOOD[name]) == []


# (what is wrong, the delta, the backbone, what the message must say)
BAD: list[tuple[Delta, Any, tuple[str, ...]]] = [
    (delta(), LLAMA, ("no ops",)),
    (delta(low_rank(), backbone_digest="0" * 64), LLAMA, ("backbone_digest", DIGEST)),
    (delta(low_rank(), backbone_digest=""), LLAMA, ("backbone_digest",)),
    (delta(low_rank(), task="seq-cls"), LLAMA, ("task", "causal-lm")),
    (replace(delta(low_rank()), method=""), LLAMA, ("method",)),
    (replace(delta(low_rank()), method="x\n"), LLAMA, ("method",)),
    (delta(low_rank(write="z.out")), LLAMA, ("op 0", "low_rank", "0.z.out", "unknown site")),
    (delta(low_rank(write="a\x1bb")), LLAMA, ("0.a\\x1bb", "unknown site")),
    (delta(low_rank(write="gate.out", B=ones(128, 4))), GPT2, ("0.gate.out", "unknown site")),
    (delta(low_rank(), low_rank(layer=3)), LLAMA, ("op 1", "layer 3 is out of range", "3 layers")),
    (
        delta(LowRank(read=Site("attn.x", 0), write=Site("q.out"), A=ones(4, 32), B=ones(32, 4))),
        LLAMA,
        ("q.out", "unknown site"),
    ),
    (delta(low_rank("attn.r", "attn.x")), LLAMA, ("input_layernorm", "kind norm")),
    (
        delta(LowRank(read=Site("attn.r", 0), write=Site("embed"), A=ones(4, 32), B=ones(32, 4))),
        LLAMA,
        ("kind embedding",),
    ),
    (delta(low_rank(A=ones(4, 31))), LLAMA, ("A: shape [4, 31], expected [4, 32]",)),
    (delta(low_rank(A=ones(4, 31))), LLAMA, ("0.q.out",)),
    (delta(low_rank(B=ones(16, 4))), LLAMA, ("B: shape [16, 4], expected [32, 4]",)),
    (delta(low_rank(B=ones(32, 5))), LLAMA, ("B: shape [32, 5], expected [32, 4]",)),
    (delta(low_rank(write="k.out")), LLAMA, ("B: shape [32, 4], expected [16, 4]",)),
    (delta(low_rank(A=ones(32))), LLAMA, ("A: shape [32], expected [32, 32]",)),
    (delta(low_rank(A=ones(0, 32), B=ones(32, 0))), LLAMA, ("A: rank 0",)),
    (delta(low_rank(A=ones(4097, 32), B=ones(32, 4097))), LLAMA, ("A: rank 4097", "4096")),
    (delta(low_rank(A=ones(4, 32).double())), LLAMA, ("A: dtype torch.float64",)),
    (delta(low_rank(B=ones(32, 4).int())), LLAMA, ("B: dtype torch.int32",)),
    (delta(low_rank(a_bias=ones(5))), LLAMA, ("a_bias: shape [5], expected [4]",)),
    (delta(low_rank(b_bias=ones(1, 32))), LLAMA, ("b_bias: shape [1, 32], expected [32]",)),
    (delta(low_rank(A=ones(4, 32) * math.nan)), LLAMA, ("op 0", "0.q.out", "A: 128 non-finite values")),
    (delta(low_rank(b_bias=torch.tensor([math.inf] + [1.0] * 31))), LLAMA, ("b_bias: 1 non-finite value.",)),
    (delta(low_rank(A="not a tensor")), LLAMA, ("A: expected a tensor",)),
    (delta(low_rank(scaling=math.inf)), LLAMA, ("scaling",)),
    (delta(low_rank(scaling="2")), LLAMA, ("scaling",)),
    (delta(low_rank(scaling=math.nan)), LLAMA, ("scaling",)),
    (delta(low_rank(scaling=10**400)), LLAMA, ("scaling",)),
    (delta(low_rank(activation="swish")), LLAMA, ("activation", "silu")),
    (delta(low_rank("ffn.r", "o.out")), LLAMA, ("read: 0.ffn.r", "not upstream")),
    (delta(low_rank("layer.out", "q.out")), LLAMA, ("read: 0.layer.out", "not a site that a module")),
    (delta(low_rank("k.out", "q.out")), LLAMA, ("read: 0.k.out",)),
    (
        delta(LowRank(read=Site("attn.r", 0), write=Site("o.out", 1), A=ones(4, 32), B=ones(32, 4))),
        LLAMA,
        ("same layer",),
    ),
    (
        delta(LowRank(read=Site("final"), write=Site("o.out", 1), A=ones(4, 32), B=ones(32, 4))),
        LLAMA,
        ("not upstream",),
    ),
    (delta(Affine(site=Site("q.out", 0))), LLAMA, ("neither scale nor shift nor bias",)),
    (delta(Affine(site=Site("q.out", 0), bias=ones(32))), LLAMA, ("no bias to replace",)),
    (delta(Affine(site=Site("o.out", 0), side="input", bias=ones(32))), GPT2, ("no bias to replace",)),
    (delta(Affine(site=Site("q.out", 0), scale=ones(64))), LLAMA, ("scale: shape [64], expected [32]",)),
    (delta(Affine(site=Site("q.out", 0), scale=ones(32, 1))), LLAMA, ("scale: shape [32, 1]",)),
    (
        delta(Affine(site=Site("down.out", 0), side="input", scale=ones(32))),
        LLAMA,
        ("scale: shape [32], expected [64]",),
    ),
    (delta(Affine(site=Site("attn.x", 0), side="input", scale=ones(32))), LLAMA, ("kind norm",)),
    (delta(Affine(site=Site("embed"), scale=ones(32))), LLAMA, ("kind embedding",)),
    (
        delta(Affine(site=Site("q.out", 0), shift=ones(32), weight_normalized=True)),
        LLAMA,
        ("weight_normalized",),
    ),
    (
        delta(Affine(site=Site("attn.x", 0), scale=ones(32), weight_normalized=True)),
        LLAMA,
        ("no weight matrix",),
    ),
    (delta(Affine(site=Site("q.out", 0), scale=ones(32), side="left")), LLAMA, ("side",)),  # type: ignore[arg-type]
    (delta(Affine(site=Site("q.out", 0), scale=ones(32), covers_bias=1)), LLAMA, ("covers_bias",)),  # type: ignore[arg-type]
    (
        delta(Affine(site=Site("q.out", 0), scale=ones(32)), Affine(site=Site("q.out", 0), scale=ones(32))),
        LLAMA,
        ("2 Affine ops with a scale at 0.q.out, output side",),
    ),
    (
        delta(Affine(site=Site("o.out", 0), bias=ones(32)), Affine(site=Site("o.out", 0), bias=ones(32))),
        GPT2,
        ("2 Affine ops with a bias at 0.o.out",),
    ),
    (
        delta(
            Affine(site=Site("q.out", 0), side="input", scale=ones(32)),
            Affine(site=Site("k.out", 0), side="input", scale=ones(32)),
        ),
        GPT2,
        ("2 Affine ops with a scale at transformer.h.0.attn.c_attn, input side",),
    ),
    (delta(*prefixes()[:2]), LLAMA, ("missing in layers 2",)),
    (delta(*prefixes(), prefixes()[1]), LLAMA, ("2 AttnPrefix ops in layer 1",)),
    (
        delta(*prefixes(), AttnPrefix(layer=3, key=ones(5, 2, 8), value=ones(5, 2, 8))),
        LLAMA,
        ("layer: expected", "0 to 2"),
    ),
    (
        delta(*prefixes()[:2], AttnPrefix(layer=2, key=ones(4, 2, 8), value=ones(4, 2, 8))),
        LLAMA,
        ("differ in number: 4, 5",),
    ),
    (delta(*prefixes(key=ones(5, 4, 8))), LLAMA, ("key: shape [5, 4, 8], expected [5, 2, 8]",)),
    (delta(*prefixes(value=ones(4, 2, 8))), LLAMA, ("value: shape [4, 2, 8], expected [5, 2, 8]",)),
    (delta(*prefixes(value=ones(5, 2, 8) * math.nan)), LLAMA, ("attn_prefix at layer 0", "80 non-finite")),
    (delta(*prefixes(0)), LLAMA, ("0 virtual tokens",)),
    (delta(*prefixes(256)), LLAMA, ("256 virtual tokens, expected 1 to 255",)),
    (delta(*prefixes(), position_offset=4), LLAMA, ("position_offset: 4, expected 0 or 5",)),
    (
        delta(*prefixes(), VirtualTokens(embeddings=ones(5, 32)), position_offset=5),
        LLAMA,
        ("both AttnPrefix and VirtualTokens",),
    ),
    (
        delta(
            VirtualTokens(embeddings=ones(3, 32)), VirtualTokens(embeddings=ones(3, 32)), position_offset=3
        ),
        LLAMA,
        ("2 VirtualTokens ops",),
    ),
    (
        delta(VirtualTokens(embeddings=ones(3, 32)), position_offset=0),
        LLAMA,
        ("position_offset: 0, expected 3",),
    ),
    (delta(VirtualTokens(embeddings=ones(3, 31)), position_offset=3), LLAMA, ("embeddings: shape [3, 31]",)),
    (delta(VirtualTokens(embeddings=torch.ones(())), position_offset=0), LLAMA, ("embeddings: shape []",)),
    (delta(low_rank(), position_offset=1), LLAMA, ("position_offset: 1, expected 0",)),
    (delta(blocks(blocks=None)), LLAMA, ("either blocks or reflections",)),
    (delta(blocks(reflections=torch.eye(32)[:1])), LLAMA, ("either blocks or reflections",)),
    (delta(blocks(blocks=ones(1, 4, 8, 7))), LLAMA, ("blocks: shape [1, 4, 8, 7]",)),
    (delta(blocks(blocks=ones(1, 3, 8, 8))), LLAMA, ("3 of size 8 do not cut 32 columns",)),
    (delta(blocks(blocks=ones(1, 6, 5, 5))), LLAMA, ("6 of size 5 do not cut 32 columns",)),
    (delta(blocks(blocks=ones(33, 1, 2, 2))), LLAMA, ("33 stages",)),
    (delta(blocks(blocks="x")), LLAMA, ("blocks: expected a tensor",)),
    (delta(blocks(order=SHUFFLED[:1])), LLAMA, ("order: shape [1, 32], expected [2, 32]",)),
    (delta(blocks(order=SHUFFLED * 0)), LLAMA, ("order: each row must name every column once",)),
    (delta(blocks(order=SHUFFLED.float())), LLAMA, ("order: expected an int32 tensor",)),
    (delta(blocks(order=SHUFFLED, blocks=None)), LLAMA, ("order: only blocks",)),
    (delta(blocks(side="left")), LLAMA, ("side",)),
    (delta(blocks(), blocks()), LLAMA, ("2 LinearMap ops at model.layers.0.self_attn.q_proj, input side",)),
    (delta(blocks(), blocks("k.out")), GPT2, ("2 LinearMap ops at transformer.h.0.attn.c_attn, input side",)),
    (delta(blocks("attn.x")), LLAMA, ("kind norm",)),
    (delta(blocks(blocks=None, reflections=ones(2, 32))), LLAMA, ("rows of norm 1",)),
    (delta(blocks(blocks=None, reflections=torch.eye(32)[:, :31])), LLAMA, ("reflections: shape",)),
    (delta(blocks(blocks=None, reflections=ones(0, 32))), LLAMA, ("reflections: 0 rows",)),
    (delta(blocks(blocks=None, reflections=torch.eye(32), side="output")), LLAMA, ("only on the input",)),
    (delta(plus("dense", ones(32, 16))), LLAMA, ("values: shape [32, 16], expected [16, 32]",)),
    (delta(plus("dense", ones(16, 32), "attn.x")), LLAMA, ("kind norm",)),
    (delta(plus("dense", ones(16, 32), scaling=math.nan)), LLAMA, ("scaling",)),
    (delta(plus("band", ones(16, 32))), LLAMA, ("layout", "circulant")),
    (delta(plus("dense", ones(16, 32), left=ones(1, 1))), LLAMA, ("left: belongs to the layout kron",)),
    (delta(plus("sparse", ones(1))), LLAMA, ("indices: belongs to the layout sparse",)),
    (delta(plus("sparse", ones(1), indices=places([16], [0]))), LLAMA, ("indices: expected 0 to 15",)),
    (delta(plus("sparse", ones(1), indices=places([0], [32]))), LLAMA, ("indices: expected 0 to 31",)),
    (delta(plus("sparse", ones(1), indices=places([-1], [0]))), LLAMA, ("indices: expected 0 to 15",)),
    (delta(plus("sparse", ones(1), indices=ones(2, 1))), LLAMA, ("indices: expected an int32 tensor",)),
    (delta(plus("sparse", ones(2), indices=places([0], [0]))), LLAMA, ("indices: shape [2, 1]",)),
    (delta(plus("kron", ones(4, 16), left=ones(4, 4))), LLAMA, ("do not make [16, 32]",)),
    (delta(plus("kron", ones(4), left=ones(4, 4))), LLAMA, ("values: shape [4]",)),
    (delta(plus("circulant", ones(4, 8, 5))), LLAMA, ("blocks of 5 do not cut 16 by 32",)),
    (delta(plus("circulant", ones(4, 4, 4))), LLAMA, ("values: shape [4, 4, 4], expected [4, 8, 4]",)),
    (delta(prompted(key=ones(4, 31))), LLAMA, ("key: shape [4, 31], expected [4, 32]",)),
    (delta(prompted(value=ones(3, 32))), LLAMA, ("value: shape [3, 32], expected [4, 32]",)),
    (delta(prompted(key=ones(0, 32), value=ones(0, 32))), LLAMA, ("key: expected at least one row",)),
    (delta(prompted()), NEOX, ("projected: no module of the backbone has keys alone",)),
    (delta(prompted()), PADDED, ("merge: llama computes attention in code of its own",)),
    (delta(*prefixes()), PADDED, ("position_offset: 0, expected 5; llama counts positions itself",)),
    (delta(prompted(gate=None)), LLAMA, ("gate: belongs to a separate softmax",)),
    (delta(prompted(gate=ones(2))), LLAMA, ("gate: shape [2], expected [1]",)),
    (delta(prompted(merge="added")), LLAMA, ("merge",)),
    (delta(low_rank(in_norm_weight=ones(32), norm_eps=1e-5)), LLAMA, ("in_norm_weight: it comes with",)),
    (
        delta(low_rank(in_norm_weight=ones(31), in_norm_bias=ones(32), norm_eps=1e-5)),
        LLAMA,
        ("in_norm_weight: shape [31], expected [32]",),
    ),
    (
        delta(low_rank(out_norm_weight=ones(32), out_norm_bias=ones(32))),
        LLAMA,
        ("norm_eps: belongs to the norms",),
    ),
    (delta(low_rank(norm_eps=1e-5)), LLAMA, ("norm_eps: belongs to the norms",)),
    (
        delta(low_rank(out_norm_weight=ones(32), out_norm_bias=ones(32), norm_eps=float("nan"))),
        LLAMA,
        ("norm_eps: expected a number between 0 and 1",),
    ),
    (
        delta(low_rank(gate_weight=ones(32), gate_bias=ones(1))),
        LLAMA,
        ("gate_weight: the gate is a mean over the whole row",),
    ),
    (
        delta(low_rank(gate_weight=ones(32), gate_bias=ones(1), positions=FirstTokens(1))),
        BERT,
        ("gates, which are means over whole rows, and ops that act on some tokens only",),
    ),
    (
        delta(low_rank(gate_weight=ones(32), gate_bias=ones(1)), VirtualTokens(embeddings=ones(2, 32))),
        BERT,
        ("it has gates and VirtualTokens",),
    ),
    (
        delta(low_rank("embed.post", "embed.post", -1, gate_weight=ones(32), gate_bias=ones(1))),
        BERT,
        ("gate_weight: served inside layers",),
    ),
    (delta(low_rank(gate_bias=ones(1))), LLAMA, ("gate_weight: expected a tensor",)),
    (
        delta(*prefixes(gate_weight=ones(2, 32), gate_bias=ones(2))),
        LLAMA,
        ("gate_weight: the gate is a mean over the whole row",),
    ),
    (delta(prompted(gate_weight=ones(1, 32), gate_bias=ones(1))), LLAMA, ("belongs to a joint prefix",)),
    (delta(prompted(activation="softmax")), LLAMA, ("activation: expected one of identity, relu",)),
    (
        delta(*prefixes(activation="relu")),
        LLAMA,
        ("activation: expected one of", "where prompts are separate"),
    ),
    (delta(prompted(merge="joint", gate=None)), LLAMA, ("projected: a joint prefix",)),
    (delta(prompted(projected=1)), LLAMA, ("projected: expected true or false",)),
    (delta(prompted(), prompted()), LLAMA, ("2 AttnPrefix ops in layer 1",)),
    (delta(prompted(layer=3)), LLAMA, ("layer: expected", "0 to 2")),
    (delta(new_rows(97)), LLAMA, ("ids: expected 0 to 96",)),
    (delta(new_rows(-1)), LLAMA, ("ids: expected 0 to 96",)),
    (delta(new_rows(5, 5)), LLAMA, ("ids: each token can be replaced once",)),
    (delta(new_rows()), LLAMA, ("rows: expected at least one",)),
    (delta(new_rows(5, rows=ones(1, 31))), LLAMA, ("rows: shape [1, 31], expected [1, 32]",)),
    (delta(new_rows(5, rows=ones(2, 32))), LLAMA, ("ids: shape [1], expected [2]",)),
    (delta(new_rows(5, site=Site("final"))), LLAMA, ("only at embed and logits",)),
    (delta(new_rows(5), new_rows(6)), LLAMA, ("2 Rows ops at embed",)),
    (
        delta(low_rank(positions=FromInvocation((5,))), low_rank(positions=FromInvocation((6,)))),
        LLAMA,
        ("different invocation tokens",),
    ),
    (
        delta(low_rank(positions=FromInvocation((5,))), low_rank(positions=LastTokens(2))),
        LLAMA,
        ("from an invocation on and on first or last tokens",),
    ),
    (
        delta(low_rank(positions=FirstTokens(1)), low_rank(positions=FirstTokens(2))),
        LLAMA,
        ("2 numbers of tokens in FirstTokens",),
    ),
    (delta(low_rank(positions=LastTokens(0))), LLAMA, ("positions: expected 1 to 256 tokens",)),
    (
        delta(Affine(site=low_rank().write, scale=ones(32), norm_scaling=1.0)),
        LLAMA,
        ("norm_scaling: belongs to weight_normalized",),
    ),
    (
        delta(Affine(site=low_rank().write, scale=ones(32), weight_normalized=True, norm_scaling=math.inf)),
        LLAMA,
        ("scaling: expected a number",),
    ),
    (
        delta(
            low_rank(positions=FromInvocation((5,))),
            Affine(site=low_rank().write, scale=ones(32), weight_normalized=True),
        ),
        LLAMA,
        ("would change inside the prompt",),
    ),
    (delta(head(ones(96, 32))), LLAMA, ("weight: shape [96, 32], expected [97, 32]",)),
    (delta(head(ones(97, 32), bias=ones(32))), LLAMA, ("bias: shape [32], expected [97]",)),
    (delta(head(ones(97, 32), site=Site("final"))), LLAMA, ("executed only at logits",)),
    (delta(head(ones(97, 32)), head(ones(97, 32))), LLAMA, ("2 Head ops at logits",)),
    (delta(head(ones(97, 32)), new_rows(5, site=Site("logits"))), LLAMA, ("both a Head and Rows at logits",)),
    (
        delta(head(ones(97, 32)), Affine(site=Site("logits"), scale=ones(97))),
        LLAMA,
        ("both a Head and Affine at logits",),
    ),
    (delta(Affine(site=Site("q.out", 0), weight=ones(32))), LLAMA, ("only the weight of a norm",)),
    (delta(Affine(site=Site("final"), weight=ones(31))), LLAMA, ("weight: shape [31], expected [32]",)),
    (
        delta(Affine(site=Site("final"), weight=ones(32)), Affine(site=Site("final"), weight=ones(32))),
        LLAMA,
        ("2 Affine ops with a weight at final",),
    ),
]


@pytest.mark.parametrize(("bad", "spec", "fragments"), BAD, ids=[" ".join(row[2])[:60] for row in BAD])
def test_bad_deltas_are_named(bad: Delta, spec: Any, fragments: tuple[str, ...]) -> None:
    problems = check(bad, spec)
    text = " | ".join(problems)
    for fragment in fragments:
        assert fragment in text
    assert text.isprintable()


def test_every_problem_is_listed() -> None:
    bad = delta(
        low_rank(A=ones(4, 31)),
        low_rank(layer=9),
        Affine(site=Site("q.out", 1)),
        position_offset=2,
        backbone_digest="0" * 64,
    )
    problems = check(bad, LLAMA)
    for start in ("delta: backbone_digest", "op 0", "op 1", "op 2", "delta: position_offset"):
        assert any(problem.startswith(start) for problem in problems), start


@pytest.mark.parametrize("poison", [None, 3, "text", [], {}, 1.5])
@pytest.mark.parametrize(
    "make",
    [
        lambda value: low_rank(A=value, B=value, a_bias=value or None, scaling=value, activation=value),
        lambda value: Affine(site=Site("q.out", 0), scale=value, side=value, covers_bias=value),
        lambda value: low_rank(
            in_norm_weight=value, in_norm_bias=ones(32), norm_eps=value, gate_weight=value, gate_bias=ones(1)
        ),
        lambda value: AttnPrefix(layer=value, key=value, value=value),
        lambda value: AttnPrefix(
            layer=0, key=value, value=value, activation=value, gate_weight=value, gate_bias=value
        ),
        lambda value: VirtualTokens(embeddings=value),
    ],
)
def test_fields_of_any_type_are_problems_not_crashes(make: Callable[[Any], Op], poison: object) -> None:
    assert check(delta(make(poison)), LLAMA)
