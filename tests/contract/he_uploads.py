"""The variants of He et al. as uploads, with what each of them adds to the blocks of `tests/he_oracle.py`.

AdapterHub's files where its library has the method, keys and configs as it saves them; the canonical pair for the
multi-head parallel adapter, which no library has, and of every variant a second time. All tensors are random.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from adapters.canonical import to_canonical
from adapters.normal_form import AttnPrefix, Delta, LowRank, Op, Site, attention_site
from tests.cases import GOLDEN
from tests.contract.he_hosts import Block, Host
from tests.he_oracle import NOTHING, Bottleneck, Change, LoRA, Variant, reparametrised

Files = Mapping[str, bytes]
NAME = "he"
SIGMA = 0.3
PREFIX_SIGMA = 0.5


@dataclass(frozen=True)
class HeCase:
    """One variant: what is uploaded, and what the oracle adds."""

    name: str
    files: Files
    variant: Variant


class Draw:
    """Random tensors, kept under the keys of a file."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, key: str, *shape: int, sigma: float = SIGMA) -> Tensor:
        """A new tensor, stored in fp32 under `key`, returned in float64."""
        self.tensors[key] = sigma * torch.randn(shape, generator=self.generator)
        return self.tensors[key].double()

    def bottleneck(
        self, stem: str, hidden: int, width: int, scaling: float, norms: Sequence[str] = ()
    ) -> Bottleneck:
        """An adapter; a norm before the down projection moves that one place on in the library's sequence."""
        down = f"{stem}{NAME}.adapter_down.{int('before' in norms)}"
        return Bottleneck(
            down=self(f"{down}.weight", width, hidden),
            down_bias=self(f"{down}.bias", width),
            up=self(f"{stem}{NAME}.adapter_up.weight", hidden, width),
            up_bias=self(f"{stem}{NAME}.adapter_up.bias", hidden),
            scaling=scaling,
            norms={
                f"{name}.{end}": self(f"{stem}{NAME}.adapter_norm_{name}.{end}", hidden, sigma=1.0)
                for name in norms
                for end in ("weight", "bias")
            },
        )

    def prefix(self, host: Host, length: int, inner: int) -> dict[str, Change]:
        """The prefixes of all stacks, by block, through their MLP."""
        hidden, heads, width = host.spec.hidden_size, host.spec.num_kv_heads, host.spec.head_dim
        found = {}
        for stack, blocks in host.prefixes.items():
            stem, size = f"{host.body}.prefix_tuning.prefix_tunings.{NAME}.{stack}.", 2 * len(blocks) * hidden
            flat = reparametrised(
                self(f"{stem}wte.weight", length, hidden, sigma=PREFIX_SIGMA),
                (self(f"{stem}control_trans.0.weight", inner, hidden), self(f"{stem}control_trans.0.bias", inner)),
                (
                    self(f"{stem}control_trans.2.weight", size, inner, sigma=PREFIX_SIGMA),
                    self(f"{stem}control_trans.2.bias", size),
                ),
            )  # fmt: skip
            by_layer = flat.reshape(length, len(blocks), 2, heads, width)
            for index, block in enumerate(blocks):
                found[block.name] = Change(prefix=(by_layer[:, index, 0], by_layer[:, index, 1]))
        return found


def _preset(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / "roberta" / name / "adapter_config.json").read_text())
    return config


def _hub(host: Host, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Files:
    """An AdapterHub upload."""
    top = _preset("par_bn") | {
        "config": config,
        "name": NAME,
        "model_name": host.spec.name,
        "hidden_size": host.spec.hidden_size,
        "model_type": host.spec.model_type,
        "model_class": None,
    }
    return {"adapter_config.json": json.dumps(top).encode(), "adapter.safetensors": save(dict(tensors))}


def _bottleneck_config(host: Host, preset: str, width: int, **changes: Any) -> dict[str, Any]:
    return {
        **_preset(preset)["config"],
        "non_linearity": "relu",
        "reduction_factor": host.spec.hidden_size / width,
        **changes,
    }


def _bottlenecks(
    host: Host,
    seed: int,
    role: str,
    blocks: Sequence[Block],
    width: int,
    scaling: float,
    norms: Sequence[str] = (),
) -> tuple[Draw, dict[str, Change]]:
    """An adapter at each of `blocks`, in the `role` of that field of `Change`."""
    draw, hidden = Draw(seed), host.spec.hidden_size
    return draw, {
        block.name: Change(**{role: draw.bottleneck(block.adapters, hidden, width, scaling, norms)})
        for block in blocks
    }


ATTENTION_ONLY = {"mh_adapter": True, "output_adapter": False, "cross_adapter": True}
FFN_ONLY = {"mh_adapter": False, "output_adapter": True}
BOTH = {"mh_adapter": True, "output_adapter": True, "cross_adapter": True}
HOULSBY = {"original_ln_before": False, "original_ln_after": True, "residual_before_ln": True}
NORMED = {"ln_before": True, "ln_after": True}
BEHIND_NORM = {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False}


def he_cases(host: Host) -> Iterator[HeCase]:
    """Every variant on `host`."""
    rows = (
        # name, what it is in `Change`, where, preset, config, width, s
        ("sequential, Houlsby", "sequential", host.blocks, "double_seq_bn", BOTH | HOULSBY, 6, 1.0),
        ("sequential, FFN", "sequential", host.ffn, "double_seq_bn", FFN_ONLY | HOULSBY, 8, 1.0),
        ("Pfeiffer", "after", host.ffn, "adapter_plus", FFN_ONLY | BEHIND_NORM, 8, 1.0),
        ("Pfeiffer, AdapterHub's", "inside", host.ffn, "seq_bn", FFN_ONLY, 4, 1.0),
        ("parallel, FFN", "parallel", host.ffn, "par_bn", FFN_ONLY, 8, 1.0),
        ("parallel, attention", "parallel", host.attention, "par_bn", ATTENTION_ONLY, 8, 1.0),
        ("scaled parallel, FFN", "parallel", host.ffn, "par_bn", FFN_ONLY, 16, 4.0),
        ("the same between norms", "parallel", host.ffn, "par_bn", FFN_ONLY | NORMED, 16, 4.0),
    )
    for seed, (name, role, blocks, preset, config, width, scaling) in enumerate(rows):
        norms = ("before", "after") if "ln_before" in config else ()
        draw, variant = _bottlenecks(host, seed, role, blocks, width, scaling, norms)
        changes = {**config, "scaling": scaling}
        yield HeCase(
            name, _hub(host, _bottleneck_config(host, preset, width, **changes), draw.tensors), variant
        )
    yield _lora(host, "LoRA, q and v", ("q", "v"))
    yield _lora(host, "LoRA, FFN", ("w1", "w2"))
    draw = Draw(20)
    prefix = draw.prefix(host, length=7, inner=12)
    config = _preset("mam")["config"]["configs"][0] | {"prefix_length": 7, "bottleneck_size": 12}
    yield HeCase("prefix tuning", _hub(host, config, draw.tensors), prefix)
    yield _mam(host)
    heads = _multi_head(host)
    yield HeCase("multi-head parallel", canonical(host, heads), heads)
    both = {name: replace(prefix[name], heads=change.heads) for name, change in heads.items()}
    yield HeCase("multi-head and prefix", canonical(host, both), both)


def _mam(host: Host) -> HeCase:
    """Mix-and-match: prefixes of length 30 and scaled parallel adapters (section 4.6)."""
    draw, variant = _bottlenecks(host, 21, "parallel", host.ffn, 16, 4.0)
    variant |= draw.prefix(host, length=30, inner=12)
    union = _preset("mam")["config"]
    union["configs"][0] |= {"prefix_length": 30, "bottleneck_size": 12}
    union["configs"][1] = _bottleneck_config(host, "par_bn", 16, **FFN_ONLY, scaling=4.0)
    return HeCase("MAM", _hub(host, union, draw.tensors), variant)


def _lora(host: Host, name: str, projections: Sequence[str]) -> HeCase:
    draw, variant, rank, alpha = Draw(30), {}, 4, 6
    paths = {module.path: module.shape for module in host.spec.modules}
    for block in host.blocks:
        found = {}
        for projection in projections:
            if projection in block.projections:
                path = block.projections[projection]
                found[projection] = LoRA(
                    A=draw(f"{path}.loras.{NAME}.lora_A", rank, paths[path].d_in),
                    B=draw(f"{path}.loras.{NAME}.lora_B", paths[path].d_out, rank),
                    scaling=alpha / rank,
                )
        variant[block.name] = Change(lora=found)
    config = _preset("lora_everywhere")["config"] | {
        "r": rank,
        "alpha": alpha,
        "attn_matrices": ["q", "v"],
        "selfattn_lora": "q" in projections,
        "intermediate_lora": "w1" in projections,
        "output_lora": "w2" in projections,
    }
    return HeCase(name, _hub(host, config, draw.tensors), variant)


def _multi_head(host: Host) -> dict[str, Change]:
    draw, variant = Draw(40), {}
    heads, width = host.spec.num_kv_heads, host.spec.head_dim
    for block in host.attention:
        key, value = (draw(f"{block.name}.{part}", 9, heads, width, sigma=1.0) for part in ("key", "value"))
        variant[block.name] = Change(heads=(key, value))
    return variant


def canonical(host: Host, variant: Variant) -> Files:
    """`variant` as a canonical pair."""
    ops = tuple(op for block in host.blocks for op in _ops(host, block, variant.get(block.name, NOTHING)))
    pair = to_canonical(Delta(method="he_et_al", ops=ops, backbone_digest=host.spec.digest))
    return {"manifest.json": pair.manifest, "tensors.safetensors": pair.tensors}


def _ops(host: Host, block: Block, change: Change) -> Iterator[Op]:
    """What `change` is in the normal form."""

    def site(name: str) -> Site:
        return attention_site(block.stack, name, block.layer)

    place = ("" if block.stack == "dec.cross" else "attn.") if block.attends else "ffn."
    out = site("o.out" if block.attends else "down.out")
    stream, total, normed = (site(f"{place}{name}") for name in ("r", "sum", "post"))
    roles = ((change.sequential, out, out), (change.parallel, stream, out), (change.inside, normed, total),
             (change.after, normed, normed))  # fmt: skip
    for added, read, write in roles:
        if added is not None:
            yield LowRank(
                read=read, write=write, A=added.down.float(), B=added.up.float(), a_bias=added.down_bias.float(),
                b_bias=added.up_bias.float(), scaling=added.scaling, activation="relu", **_norms(added.norms),
            )  # fmt: skip
    for name, lora in change.lora.items():
        module = host.spec.by_path[block.projections[name]]
        assert module.read is not None
        yield LowRank(
            read=module.read, write=module.writes[0].site, A=lora.A.float(), B=lora.B.float(), scaling=lora.scaling
        )  # fmt: skip
    at: dict[str, Any] = {"layer": block.layer, "stack": block.stack}
    if change.prefix is not None:
        yield AttnPrefix(key=change.prefix[0].float(), value=change.prefix[1].float(), **at)
    if change.heads is not None:
        key, value = (part.float() for part in change.heads)
        yield AttnPrefix(key=key, value=value, merge="separate", activation="relu", gate=torch.ones(1), **at)


def _norms(norms: Mapping[str, Tensor]) -> dict[str, Any]:
    names = {"before": "in_norm", "after": "out_norm"}
    found: dict[str, Any] = {
        f"{names[key.split('.')[0]]}_{key.split('.')[1]}": t.float() for key, t in norms.items()
    }
    return found | ({"norm_eps": 1e-5} if norms else {})
