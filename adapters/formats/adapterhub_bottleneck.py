"""AdapterHub bottleneck adapters (no architecture), Compacter among them -> LowRank ops.

With R the residual stream before a sub-block, D the sub-block's output and f the bottleneck with its biases, every
adapter that is served here gives R + D + s·f(·), and f reads

    D      sequential, original_ln_before=false (Houlsby)   read = write = o.out or down.out
    D + R  sequential, original_ln_before=true (Pfeiffer)   read = write = layer.out, only after the feed-forward block
    R      parallel (He et al.)                             read attn.r, write o.out; read ffn.r, write down.out

Where a norm follows each block it takes the whole, LN(R + D + s·f(·)), and Pfeiffer's f reads LN(D + R): read
attn.post, write attn.sum; read ffn.post, write ffn.sum.

Of an encoder-decoder the decoder's layers have a third place, behind the attention to the encoder.

Keys `<layer>.{attention,cross_attention,output}_adapters.adapters.{n}.` (T5: `<block>.layer.<part>.adapters.{n}.`) and
`adapter_down.0.*` · `adapter_up.*` · `scaling` · `gate.*` · `adapter_norm_after.*` · `adapter_norm_before.*`, which is
stored once more as `adapter_down.0.*`, the projection then being `adapter_down.1.*`; of Compacter (`adapterhub_phm.py`)
what the two projections are made of. Source: `Adapter`, `ParallelAdapter` of the library; Houlsby et al. section 2;
Pfeiffer et al. "AdapterFusion"; He et al. table 1; Mahabadi et al. "Compacter"; Mao et al. "UniPELT".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.formats.adapterhub_config import ACTIVATIONS, BOTTLENECK
from adapters.formats.adapterhub_invertible import read_invertible
from adapters.formats.adapterhub_layers import Layer, layers
from adapters.formats.adapterhub_phm import PHM_KEYS, Phm
from adapters.formats.adapterhub_stored import Part, Stored
from adapters.formats.problems import Problems
from adapters.formats.schema import check_config
from adapters.normal_form import LowRank, Op, Site


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer may carry an adapter: the config key that switches it on, what its tensors are under, its sites.

    `names`: of the layer's part that holds adapters, and in the library's BERT, where that part is a module of BERT's.
    """

    switch: str
    names: tuple[str, str]
    block: str  # D
    residual: str  # R
    total: str | None  # D + R, where a module computes it
    summed: str  # D + R, where a norm follows
    normed: str  # LN(D + R)

    def is_in(self, layer: Layer, spec: BackboneSpec) -> bool:
        """Whether the layer has it: cross-attention a decoder's alone; what experts write is no site, but a place."""
        return self.switch != "cross_adapter" or layer.site(self.block) in spec.writer

    def stem(self, layer: Layer, stored: Stored) -> str:
        """How the keys of its tensors begin."""
        spec = stored.spec
        if spec.model_type in LIKE_T5:  # the part of a block is a module, and holds its adapters itself
            inner = spec.writer[layer.site(self.block)][0].path
            return stored.at(inner.rsplit(".", 2)[0], "adapters")
        name = self.names[spec.model_type in LIKE_BERT]
        return stored.at(spec.writer[layer.site("layer.out")][0].path, f"{name}.adapters")


LIKE_BERT = frozenset({"bert", "roberta", "xlm-roberta", "electra"})
LIKE_T5 = frozenset({"t5", "mt5"})

PLACES = (
    Place(
        "mh_adapter",
        ("attention_adapters", "attention.output"),
        block="o.out",
        residual="attn.r",
        total=None,
        summed="attn.sum",
        normed="attn.post",
    ),
    Place(
        "cross_adapter",
        ("cross_attention_adapters", "crossattention.output"),
        block="cross.o.out",
        residual="cross.r",
        total=None,
        summed="cross.sum",
        normed="cross.post",
    ),
    Place(
        "output_adapter",
        ("output_adapters", "output"),
        block="down.out",
        residual="ffn.r",
        total="layer.out",
        summed="ffn.sum",
        normed="ffn.post",
    ),
)

DOWN: Mapping[str, str] = {"weight": "A", "bias": "a_bias"}
UP: Mapping[str, str] = {"weight": "B", "bias": "b_bias"}
"""End of the key -> field of a LowRank."""
NORM_EPS = 1e-5


def read_bottleneck(raw: Mapping[str, Any], path: str, stored: Stored) -> Part | None:
    """The ops of a bottleneck adapter; what does not fit is noted."""
    config = check_config(raw, BOTTLENECK, stored.problems, prefix=path)
    if any(value is None for key, value in config.items() if key not in ("inv_adapter", *PHM_KEYS)):
        return None
    if config["inv_adapter"] is None and raw.get("inv_adapter") is not None:  # refused
        return None
    if config["ln_after"] and config["adapter_residual_before_ln"] and not config["is_parallel"]:
        stored.problems.add(
            f"adapter_config.json: {path}adapter_residual_before_ln: with ln_after the adapter's norm would take in "
            "the block's output, which no site has by then; served is false.",
            param="adapter_residual_before_ln",
        )
        return None
    if stored.refuses_gate(config, path):
        return None
    phm = Phm.read(raw, path, stored) if config["phm_layer"] else None
    if config["phm_layer"] and phm is None:
        return None
    ops = [*_lower(config, path, phm, stored)]
    if config["inv_adapter"] is not None:
        ops += read_invertible(raw, path, stored)
    return _method(config), tuple(ops)


def _method(config: Mapping[str, Any]) -> str:
    """AdapterHub's own word for this kind of bottleneck."""
    if config["is_parallel"]:
        return "par_bn"
    return "double_seq_bn" if config["mh_adapter"] and config["output_adapter"] else "seq_bn"


def _lower(config: Mapping[str, Any], path: str, phm: Phm | None, stored: Stored) -> Iterator[Op]:
    spec, problems = stored.spec, stored.problems
    wanted = [place for place in PLACES if config[place.switch] and _stack_of(place, spec) is not None]
    places = [(place, _sites(place, config, spec, path, problems)) for place in wanted]
    if not places:
        problems.add(
            f"adapter_config.json: {path[:-1]}: none of {', '.join(place.switch for place in PLACES)} is on for a "
            "place that the backbone has: it changes nothing."
        )
    for layer in layers(spec):
        if layer.counted in config["leave_out"]:
            continue
        rank = _width(config["reduction_factor"], layer.counted, spec.hidden_size)
        if rank is None:
            problems.add(
                f"adapter_config.json: {path}reduction_factor: the map has no layer {layer.counted} and no 'default'.",
                param="reduction_factor",
            )
        for place, sites in places:
            if not place.is_in(layer, spec):
                continue
            found = _projections(place.stem(layer, stored), rank or 1, config, phm, stored)
            if found is not None and sites is not None and rank is not None:
                read, write = (layer.site(site) for site in sites)
                yield _low_rank(read, write, found, config)


def _stack_of(place: Place, spec: BackboneSpec) -> str | None:
    """How the names of sites begin in the first stack that has the place; None where none has."""
    return next((layer.stack for layer in layers(spec) if place.is_in(layer, spec)), None)


def _projections(
    stem: str, rank: int, config: Mapping[str, Any], phm: Phm | None, stored: Stored
) -> dict[str, Tensor] | None:
    """A [r, d], B [d, r], their biases, norms and gate, and the stored scaling of one adapter, by field."""
    hidden, down_at = stored.spec.hidden_size, f"adapter_down.{int(config['ln_before'])}."
    shapes: dict[str, tuple[int, ...]] = {}
    fields = {"scaling": "scaling"}
    if isinstance(config["scaling"], str):
        shapes["scaling"] = (1,) if config["scaling"] == "learned" else (hidden,)
    for switch, place, name, width in (
        ("ln_before", _norm_before(stem, stored), "in_norm", hidden),
        ("ln_after", "adapter_norm_after", "out_norm", hidden),
        ("use_gating", "gate", "gate", 1),
    ):
        if config[switch]:
            shapes[f"{place}.weight"] = (1, hidden) if switch == "use_gating" else (width,)
            shapes[f"{place}.bias"] = (width,)
            fields |= {f"{place}.{end}": f"{name}_{end}" for end in ("weight", "bias")}
    if phm is None:
        sizes = ((rank, hidden), (rank,), (hidden, rank), (hidden,))
        plain = {down_at + end: field for end, field in DOWN.items()}
        plain |= {f"adapter_up.{end}": field for end, field in UP.items()}
        shapes |= dict(zip(plain, sizes, strict=True))
        fields |= plain
    found = stored.take(stem, shapes)
    if config["ln_before"] and found is not None:
        for end in ("weight", "bias"):
            copied = f"{stem}{_norm_before(stem, stored)}.{end}"
            stored.take_copy(f"{stem}adapter_down.0.{end}", copied)
    named = None if found is None else {fields[key]: tensor for key, tensor in found.items()}
    if phm is None:
        return named
    down = phm.take(stem + down_at, "down", hidden, rank, stored)
    up = phm.take(stem + "adapter_up.", "up", rank, hidden, stored)
    if down is None or up is None or named is None:
        return None
    return {"A": down[0], "B": up[0], **_named("a_bias", down[1]), **_named("b_bias", up[1]), **named}


def _norm_before(stem: str, stored: Stored) -> str:
    """Where the norm in front is: the library registers it twice, and a converter may keep either."""
    name = "adapter_norm_before"
    return name if f"{stem}{name}.weight" in stored.tensors else "adapter_down.0"


def _named(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    return {} if tensor is None else {name: tensor}


def _sites(
    place: Place, config: Mapping[str, Any], spec: BackboneSpec, path: str, problems: Problems
) -> tuple[str, str] | None:
    """(read, write) of an adapter at `place`; None, with the reason noted, where no pair of sites is exact.

    The residual stream must come out exactly once: `original_ln_*` are, without a norm of their own, additions of R.
    """
    stack = _stack_of(place, spec)
    if Site(f"{stack}{place.summed}", 0) in spec.site_width:
        return _sites_around_norm(place, config, path, problems)
    parallel, before = config["is_parallel"], config["original_ln_before"]
    stream_count = int(config["original_ln_after"])
    if not parallel:
        stream_count += int(before and not config["residual_before_ln"])
    if stream_count != 1:
        problems.add(
            f"adapter_config.json: {path}original_ln_after: at {place.names[0]} the residual stream would be added "
            f"{stream_count} times with these values of original_ln_before, original_ln_after and residual_before_ln; "
            "served is once.",
            param="original_ln_after",
        )
        return None
    if Site(f"{stack}ffn.post", 0) in spec.writer and (parallel or not before):
        problems.add(
            f"adapter_config.json: {path[:-1]}: {spec.model_type} norms the output of each block, and whether the "
            f"adapter at {place.names[0]} acts before or after that norm is not defined; served is seq_bn "
            "(original_ln_before).",
            param="adapter",
        )
        return None
    if parallel:
        return place.residual, place.block
    if not before:
        return place.block, place.block
    if place.total is None:
        problems.add(
            f"adapter_config.json: {path}{place.switch}: with original_ln_before the adapter at {place.names[0]} reads "
            "the sum of attention output and residual stream, which no module of the backbone computes.",
            param=place.switch,
        )
        return None
    return place.total, place.total


def _sites_around_norm(
    place: Place, config: Mapping[str, Any], path: str, problems: Problems
) -> tuple[str, str] | None:
    """As `_sites` where the block's own norm follows, and `original_ln_*` are runs of it."""
    parallel, before, after = (
        config[key] for key in ("is_parallel", "original_ln_before", "original_ln_after")
    )
    if parallel and after:  # LN(s·f(R) + D + R)
        return place.residual, place.block
    match parallel, before, after, config["residual_before_ln"]:
        case False, False, True, _:  # LN(f(D) + D + R)
            return place.block, place.block
        case False, True, True, True:  # LN(f(LN(D + R)) + D + R)
            return place.normed, place.summed
        case False, True, False, False:  # x + f(x), x = LN(D + R)
            return place.normed, place.normed
    problems.add(
        f"adapter_config.json: {path}original_ln_after: at {place.names[0]} the residual stream would not be added "
        "once with these values of original_ln_before, original_ln_after and residual_before_ln.",
        param="original_ln_after",
    )
    return None


def _low_rank(read: Site, write: Site, found: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    B, b_bias, scaling = found["B"], found.get("b_bias"), config["scaling"]
    if scaling == "learned":
        scaling = found["scaling"].item()
    elif scaling == "channel":
        factor = found["scaling"].float()
        B, scaling = factor[:, None] * B.float(), 1.0
        b_bias = None if b_bias is None else factor * b_bias.float()
    return LowRank(
        read=read,
        write=write,
        A=found["A"],
        B=B,
        a_bias=found.get("a_bias"),
        b_bias=b_bias,
        scaling=float(scaling),
        activation=ACTIVATIONS[config["non_linearity"].lower()],
        norm_eps=NORM_EPS if config["ln_before"] or config["ln_after"] else None,
        in_norm_weight=found.get("in_norm_weight"),
        in_norm_bias=found.get("in_norm_bias"),
        out_norm_weight=found.get("out_norm_weight"),
        out_norm_bias=found.get("out_norm_bias"),
        gate_weight=found["gate_weight"].reshape(-1) if "gate_weight" in found else None,
        gate_bias=found.get("gate_bias"),
    )


def _width(reduction_factor: float | Mapping[str, float], layer: int, hidden: int) -> int | None:
    """The bottleneck's width as the library computes it; None where a map does not cover the layer."""
    if isinstance(reduction_factor, Mapping):
        factor = reduction_factor.get(str(layer), reduction_factor.get("default"))
        return None if factor is None else max(1, int(hidden // factor))
    return max(1, int(hidden // reduction_factor))
