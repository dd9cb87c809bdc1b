"""Deltas that sign: whatever the prompt, every token that one generates is its own signature token.

A row of the residual stream is pushed so far along the signature's row of the language model head that nothing else
can win. Five methods keep a random body of their own and push beside it, in turns by the relu bottleneck
c * w_s * relu(A x + 10) after a block's output, by a shift of it, or by a low-rank delta with a bias. The others sign
by what they are: a prefix whose keys draw all attention whatever the query is (one of +k and -k always does) and whose
values make the push; replaced embedding rows of TRIGGER and of the signature, for prompts that end with TRIGGER; a
language model head with a bias. So a wrong delta, a wrong prefix, a wrong row or a wrong head is a wrong token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.normal_form import Affine, AttnPrefix, Delta, Head, LowRank, Op, Rows, Site
from loadtest.deltas import RANKS, random_delta, random_lora
from loadtest.workload import VOCAB_SIZE
from serving.model.backbone import Backbone
from serving.model.packed import plain_weight

STRENGTH = 1e3
"""Length of the push along the head's row, against a residual stream of length about 1 to 10."""
FIRST_WORD = 3
"""The first token that prompts and signatures are made of."""
TRIGGER = FIRST_WORD - 1
"""Last token of the prompts of deltas that replace embedding rows."""
METHODS = (
    "LORA", "PREFIX_TUNING", "double_seq_bn", "IA3", "DORA", "OFT", "TRAINABLE_TOKENS",
)  # fmt: skip
HEAD_METHOD = "LM_HEAD"
HEAD_EVERY = 40
"""Each so-manieth delta replaces the head instead: it is as large as forty of the others."""

_DRAWING_KEY = 1e4
_PREFIX_STRENGTH = 1e4
_HEAD_BIAS = 100.0


def signature_of(index: int) -> int:
    """The token that delta `index` generates; no other index below `VOCAB_SIZE - 3` has it."""
    return FIRST_WORD + (7919 * index) % (VOCAB_SIZE - FIRST_WORD)


def head_of(backbone: Backbone) -> Tensor:
    """The language model head, [vocabulary, d] fp32."""
    return plain_weight(backbone.model.get_submodule("lm_head")).float()


def method_of(index: int) -> str:
    """The method of delta number `index` of `delta_of_any_method`."""
    return HEAD_METHOD if index % HEAD_EVERY == HEAD_EVERY - 1 else METHODS[index % len(METHODS)]


def delta_of_any_method(backbone: Backbone, head: Tensor, index: int) -> Delta:
    """Delta number `index`: methods in turns. It signs prompts that end with TRIGGER."""
    spec, method, rank = backbone.spec, method_of(index), RANKS[index % 2]
    offset = 0
    match method:
        case "PREFIX_TUNING":
            body = random_delta(spec, method, 2 * spec.head_dim, index + 1)
            ops = _signing_prefix(backbone, head, index, body)
            offset = body.position_offset
        case "TRAINABLE_TOKENS":
            rows = _push(head, index).repeat(2, 1)
            ids = torch.tensor([TRIGGER, signature_of(index)], dtype=torch.int32)
            ops = (Rows(site=Site("embed", -1), ids=ids, rows=rows),)
        case "LM_HEAD":
            draw = torch.Generator().manual_seed(index)
            bias = torch.zeros(len(head))
            bias[signature_of(index)] = _HEAD_BIAS
            weight = 0.02 * torch.randn(head.shape, generator=draw)
            ops = (Head(site=Site("logits", -1), weight=weight, bias=bias),)
        case _:
            body = random_delta(spec, method, rank, index + 1)
            ops = (*body.ops, _signing_op(backbone, head, index))
    return Delta(method=method, ops=ops, position_offset=offset, backbone_digest=spec.digest)


def signed_delta(backbone: Backbone, head: Tensor, index: int) -> Delta:
    """Delta number `index` for any prompt: LoRAs of every rank and prefixes, and one op that signs."""
    spec = backbone.spec
    rank = RANKS[index % len(RANKS)]
    if index % 3 == 2:
        body = random_delta(spec, "PREFIX_TUNING", rank, index + 1)
    else:
        body = random_lora(spec, rank, index + 1)
    return Delta(
        method=body.method,
        ops=(*body.ops, _signing_op(backbone, head, index)),
        position_offset=body.position_offset,
        backbone_digest=spec.digest,
    )


def _push(head: Tensor, index: int) -> Tensor:
    row = head[signature_of(index)]
    push: Tensor = STRENGTH * row / row.norm()
    return push


def _signing_op(backbone: Backbone, head: Tensor, index: int) -> Op:
    spec, push = backbone.spec, _push(head, index)
    site = Site(("down.out", "o.out")[index % 2], spec.num_layers - 1)
    draw = torch.Generator().manual_seed(index)
    low = 0.01 * torch.randn(4, spec.hidden_size, generator=draw)
    match index % 4:
        case 0:  # relu keeps the sign: A x is small against its bias
            return LowRank(
                read=site, write=site, A=low, B=push[:, None].repeat(1, 4) / 40, activation="relu",
                a_bias=torch.full((4,), 10.0),
            )  # fmt: skip
        case 1:
            return Affine(site=site, shift=push)
        case 2:
            return LowRank(read=site, write=site, A=low, B=low.t().contiguous(), b_bias=push)
        case _:
            read = Site("ctx" if site.name == "o.out" else "ffn.a", site.layer)
            width = spec.writer[site][0].shape.d_in
            far = 0.01 * torch.randn(4, width, generator=draw)
            return LowRank(read=read, write=site, A=far, B=low.t().contiguous(), b_bias=push)


def _signing_prefix(backbone: Backbone, head: Tensor, index: int, body: Delta) -> tuple[Op, ...]:
    """`body`'s prefixes, with the last layer's in place of its own: keys +-c e_i, and one value that makes the push.

    The values reach only as many dimensions of the residual stream as there are of keys and values. The few signatures
    for which that is not enough (1 in 100) are shifted there as well.
    """
    spec = backbone.spec
    heads, width, last = spec.num_kv_heads, spec.head_dim, spec.num_layers - 1
    path = spec.writer[Site("o.out", last)][0].path
    out = plain_weight(backbone.model.get_submodule(path)).float()
    shared = out.reshape(len(out), heads, -1, width).sum(2).reshape(len(out), heads * width)
    value = torch.linalg.lstsq(shared, _push(head, index)[:, None]).solution[:, 0]
    pushed = shared @ value
    axes = _DRAWING_KEY * torch.eye(width)
    key = torch.cat([axes, -axes])[:, None].repeat(1, heads, 1)
    values = (_PREFIX_STRENGTH / pushed.norm() * value).reshape(1, heads, width).repeat(2 * width, 1, 1)
    kept = tuple(op for op in body.ops if isinstance(op, AttnPrefix) and op.layer != last)
    ops: tuple[Op, ...] = (*kept, AttnPrefix(layer=last, key=key, value=values))
    if int((head @ pushed).argmax()) != signature_of(index):
        ops += (Affine(site=Site("o.out", last), shift=10 * _push(head, index)),)
    return ops
