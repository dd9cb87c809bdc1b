"""Where the variants of He et al. go in RoBERTa and in BART: their blocks, as AdapterHub and the oracle name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters.backbone_spec import BackboneSpec
from adapters.normal_form import Stack
from tests.he_oracle import BART_PROJECTIONS


@dataclass(frozen=True)
class Block:
    """One attention or feed-forward block: the beginning of AdapterHub's keys there, paths of its projections."""

    name: str
    adapters: str
    projections: Mapping[str, str]
    layer: int
    stack: Stack = ""

    @property
    def attends(self) -> bool:
        return "q" in self.projections


@dataclass(frozen=True)
class Host:
    """A backbone as the variants see it. `prefixes`: AdapterHub's name of a stack's prefix -> its blocks, in order."""

    spec: BackboneSpec
    blocks: Sequence[Block]
    prefixes: Mapping[str, Sequence[Block]]
    body: str

    @property
    def attention(self) -> list[Block]:
        return [block for block in self.blocks if block.attends]

    @property
    def ffn(self) -> list[Block]:
        return [block for block in self.blocks if not block.attends]


def roberta_host(spec: BackboneSpec) -> Host:
    """RoBERTa's blocks."""
    blocks = []
    for layer in range(spec.num_layers):
        at = f"roberta.encoder.layer.{layer}"
        projections = {"q": f"{at}.attention.self.query", "k": f"{at}.attention.self.key",
                       "v": f"{at}.attention.self.value", "o": f"{at}.attention.output.dense"}  # fmt: skip
        blocks.append(Block(f"{layer}.attention", f"{at}.attention.output.adapters.", projections, layer))
        projections = {"w1": f"{at}.intermediate.dense", "w2": f"{at}.output.dense"}
        blocks.append(Block(f"{layer}.ffn", f"{at}.output.adapters.", projections, layer))
    attention = [block for block in blocks if block.attends]
    return Host(spec, blocks, {"self_prefix": attention}, "roberta")


def bart_host(spec: BackboneSpec) -> Host:
    """BART's blocks, those of the encoder first."""
    blocks: list[Block] = []

    def add(name: str, at: str, place: str, projections: Mapping[str, str], layer: int, stack: Stack) -> None:
        paths = {role: f"{at}.{end}" for role, end in projections.items()}
        blocks.append(Block(name, f"{at}.{place}.adapters.", paths, layer, stack))

    stacks: tuple[tuple[str, Stack, int], ...] = (
        ("encoder", "enc", spec.num_encoder_layers),
        ("decoder", "dec", spec.num_layers),
    )
    for side, stack, layers in stacks:
        for layer in range(layers):
            at, name = f"model.{side}.layers.{layer}", f"{stack}.{layer}"
            own, cross = (
                {role: f"{attention}.{end}" for role, end in BART_PROJECTIONS.items()}
                for attention in ("self_attn", "encoder_attn")
            )
            add(f"{name}.attention", at, "attention_adapters", own, layer, stack)
            if stack == "dec":
                add(f"{name}.cross", at, "cross_attention_adapters", cross, layer, "dec.cross")
            add(f"{name}.ffn", at, "output_adapters", {"w1": "fc1", "w2": "fc2"}, layer, stack)
    attending = [block for block in blocks if block.attends]
    prefixes = {
        f"{group}_prefix": [block for block in attending if block.stack == stack]
        for group, stack in (("encoder", "enc"), ("self", "dec"), ("cross", "dec.cross"))
    }
    return Host(spec, blocks, prefixes, "model")
