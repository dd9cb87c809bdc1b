"""Random deltas of several methods in normal form: benchmarks measure the engine, not the readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.normal_form import Affine, AttnPrefix, Delta, LinearMap, LowRank, Op, Site
from serving.model.backbone import Backbone
from serving.model.placement import place

RANKS = (8, 16, 32, 64)
ATTENTION = frozenset({"q.out", "k.out", "v.out", "o.out"})
IA3_INPUT = "down.out"


class _Maker:
    """Draws the ops of one delta. Small values, so that logits stay finite; no tensor is zero."""

    def __init__(self, spec: BackboneSpec, seed: int) -> None:
        self.spec = spec
        self.draw = torch.Generator().manual_seed(seed)

    def rand(self, *shape: int, scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=self.draw)

    def linears(self, names: frozenset[str] | None = None) -> list[ModuleSpec]:
        """The linear modules of the layers that write one of `names`, or all of them."""
        return [
            m
            for m in self.spec.modules
            if m.shape.kind == "linear"
            and m.writes[0].site.layer >= 0
            and (names is None or m.writes[0].site.name in names)
        ]

    def low_rank(self, module: ModuleSpec, rank: int) -> LowRank:
        d_in, d_out = module.shape.d_in, module.shape.d_out
        assert module.read is not None
        return LowRank(
            read=module.read,
            write=module.writes[0].site,
            A=self.rand(rank, d_in, scale=d_in**-0.5),
            B=self.rand(d_out, rank, scale=0.1 * rank**-0.5),
        )


def _lora(maker: _Maker, rank: int) -> list[Op]:
    return [maker.low_rank(module, rank) for module in maker.linears()]


def _dora(maker: _Maker, rank: int) -> list[Op]:
    ops: list[Op] = []
    for module in maker.linears():
        magnitude = 0.5 + maker.rand(module.shape.d_out, scale=0.05)
        site = module.writes[0].site
        ops += [
            maker.low_rank(module, rank),
            Affine(site=site, scale=magnitude, covers_bias=False, weight_normalized=True),
        ]
    return ops


def _oft(maker: _Maker, rank: int) -> list[Op]:
    """Blocks of the size that is the rank elsewhere, near the identity."""
    ops: list[Op] = []
    for module in maker.linears():
        runs = module.shape.d_in // rank
        blocks = torch.eye(rank) + maker.rand(1, runs, rank, rank, scale=0.05 * rank**-0.5)
        ops.append(LinearMap(site=module.writes[0].site, blocks=blocks))
    return ops


def _ia3(maker: _Maker, rank: int) -> list[Op]:  # noqa: ARG001  no rank there
    ops: list[Op] = []
    for module in maker.linears():
        site = module.writes[0].site
        if site.name == IA3_INPUT:
            ops.append(Affine(site=site, side="input", scale=1 + maker.rand(module.shape.d_in, scale=0.1)))
        else:
            ops.append(Affine(site=site, scale=1 + maker.rand(module.shape.d_out, scale=0.1)))
    return ops


def _bottleneck(maker: _Maker, rank: int) -> list[Op]:
    """Houlsby's two adapters a layer, with biases."""
    width = maker.spec.hidden_size
    return [
        LowRank(
            read=(site := Site(name, layer)),
            write=site,
            A=maker.rand(rank, width, scale=width**-0.5),
            B=maker.rand(width, rank, scale=0.1 * rank**-0.5),
            activation="relu",
            a_bias=maker.rand(rank, scale=0.1),
            b_bias=maker.rand(width, scale=0.01),
        )
        for layer in range(maker.spec.num_layers)
        for name in ("o.out", "down.out")
    ]


def _prefix(maker: _Maker, rank: int) -> list[Op]:
    """As many virtual tokens as the rank is elsewhere."""
    shape = (rank, maker.spec.num_kv_heads, maker.spec.head_dim)
    return [
        AttnPrefix(layer=layer, key=maker.rand(*shape, scale=0.5), value=maker.rand(*shape, scale=0.1))
        for layer in range(maker.spec.num_layers)
    ]


METHODS: Mapping[str, Callable[[_Maker, int], Sequence[Op]]] = {
    "LORA": _lora, "PREFIX_TUNING": _prefix, "double_seq_bn": _bottleneck, "IA3": _ia3, "DORA": _dora, "OFT": _oft,
}  # fmt: skip


def random_delta(spec: BackboneSpec, method: str, rank: int, seed: int) -> Delta:
    """A delta of `METHODS` on all linears; `rank` stands for the prefix's length and OFT's block size too."""
    ops = tuple(METHODS[method](_Maker(spec, seed), rank))
    offset = rank if method == "PREFIX_TUNING" else 0
    return Delta(method=method, ops=ops, position_offset=offset, backbone_digest=spec.digest)


def random_lora(
    spec: BackboneSpec,
    rank: int,
    seed: int,
    names: frozenset[str] | None = ATTENTION,
    layers: int | None = None,
) -> Delta:
    """A LoRA on the linears that write `names`, or on all, of the first `layers` layers or of all."""
    maker = _Maker(spec, seed)
    ops = tuple(
        maker.low_rank(m, rank)
        for m in maker.linears(names)
        if layers is None or m.writes[0].site.layer < layers
    )
    return Delta(method="LORA", ops=ops, backbone_digest=spec.digest)


def mixed_deltas(spec: BackboneSpec, count: int) -> dict[str, Delta]:
    """`count` deltas by digest: methods in equal shares, ranks in turn."""
    names = list(METHODS)
    return {
        f"mixed-{i}": random_delta(
            spec, names[i % len(names)], RANKS[(i // len(names) + i) % len(RANKS)], i + 1
        )
        for i in range(count)
    }


def placed_bytes(delta: Delta, backbone: Backbone) -> int:
    """Bytes that the delta takes on the device, all of which a decode step reads."""
    return place(delta, "size", backbone).device_bytes
