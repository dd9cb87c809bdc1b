"""What kind of method a delta is, derived from its ops and never from what its uploader calls it.

The fields are those of Sabry and Belz, "PEFT-Ref: A Modular Reference Architecture and Typology for
Parameter-Efficient Finetuning Techniques"; the families those of Xu et al., "Parameter-Efficient Fine-Tuning Methods
for Pretrained Language Models: A Critical Review and Assessment". Both speak of methods; how an op of the normal form
falls under their terms is decided here:

- `family`: `additive` (new modules, tokens or factors), `partial` (parameters of the base replaced, or a sparse part of
  them moved), `reparameterised` (a change of a weight in another form), `hybrid` (several of these), `unified` (one
  kind of module, pruned)
- `intra_connectivity`: inside a module each input meets each output (`dense`), some of them (`sparse`), or there is no
  matrix (`none`)
- `inter_connectivity`: what a module gives to the backbone: `fixed: dense`, `fixed: sparse` (unit by unit, or in
  blocks), `dynamic` (attention decides)
- `parameters_adapted`: `addition`, `reparameterisation`, `replacement`
- `parameter_sharing`: `shared` where one stored matrix serves several layers or modules, else `none`
- `input_type`: what a module reads: `hidden` states, `tokens`, or nothing but its own `parameters`
- `insertion_form`: `sequential`, `parallel`, or `in place` of what was there
- `integration_form`: `direct addition`, `scaled addition`, `gated addition`, `rescaling`, `transformation`,
  `concatenation`, `replacement`
- `workspace`: `embedding`, `attention`, `ffn`, `norm`, `residual`, `head`

They are not part of the manifest, whose bytes are the delta's identity: a better derivation must not change a digest.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from adapters.canonical import Canonical, StagedCanonical
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
    kv_site,
)
from adapters.tensor_files import pieces

Family = Literal["additive", "partial", "reparameterised", "hybrid", "unified"]

PRUNED = 0.05
"""Share of exact zeros in a bottleneck's matrices from which on they count as pruned."""


class _Traits(NamedTuple):
    """What one op is, in the terms of the table above. `family` None: says nothing beside other ops (task heads)."""

    family: Family | None
    intra: str
    inter: str
    adapted: str
    reads: str
    form: str
    integration: str
    workspace: str


def describe(
    delta: Delta, canonical: Canonical | StagedCanonical, *, between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Typology and size of `delta`, whose stored form is `canonical`.

    Beside the fields above: `num_insertions` (sites at which something is inserted), `num_layers` (layers that have
    one), `num_parameters` (elements of all stored tensors) and `num_bytes` (of both files). `between` is called when
    the tensors of an op have been read.
    """
    manifest = json.loads(canonical.manifest)
    mapped = {op.site for op in delta.ops if isinstance(op, LinearMap)}
    traits = []
    for op in delta.ops:
        traits.append(_traits(op, mapped))
        between()
    sites = {_place(op) for op in delta.ops}

    def values(field: str) -> list[str]:
        return sorted({getattr(found, field) for found in traits})

    return {
        "family": _family(delta.ops, traits),
        "intra_connectivity": values("intra"),
        "inter_connectivity": values("inter"),
        "parameters_adapted": values("adapted"),
        "parameter_sharing": "shared" if _shares(manifest["ops"]) else "none",
        "input_type": values("reads"),
        "insertion_form": values("form"),
        "num_insertions": len(sites),
        "num_layers": len({(site.stack == "enc", site.layer) for site in sites if site.layer >= 0}),
        "integration_form": values("integration"),
        "workspace": values("workspace"),
        "num_parameters": manifest["typology"]["num_parameters"],
        "num_bytes": canonical.size_bytes,
    }


def _family(ops: Sequence[Op], traits: Sequence[_Traits]) -> Family:
    found = {item.family for item in traits} - {None}
    if not found:
        return "partial"  # only heads and rows: parameters of the base, replaced
    if len(found) > 1:
        return "hybrid"
    pruned = [
        isinstance(op, LowRank) and item.intra == "sparse" for op, item in zip(ops, traits, strict=True)
    ]
    if found == {"additive"} and all(pruned):
        return "unified"
    if len({type(op) for op, item in zip(ops, traits, strict=True) if item.family == "additive"}) > 1:
        return "hybrid"  # as MAM: a prefix and adapters
    (family,) = found
    assert family is not None
    return family


def _traits(op: Op, mapped: set[Site]) -> _Traits:
    """`mapped`: the sites with a LinearMap, of whose reparameterisation a scale there is a part."""
    match op:
        case LowRank():
            return _low_rank(op)
        case Affine():
            return _affine(op, reparameterises=op.weight_normalized or op.site in mapped)
        case LinearMap():
            whole = op.reflections is not None or (op.blocks is not None and op.blocks.shape[1] == 1)
            intra, inter = ("dense", "fixed: dense") if whole else ("sparse", "fixed: sparse")
            return _Traits(
                "reparameterised",
                intra,
                inter,
                "reparameterisation",
                "hidden",
                "sequential",
                "transformation",
                _workspace(op.site),
            )
        case WeightDelta():
            sparse = op.layout == "sparse"
            intra, inter = ("sparse", "fixed: sparse") if op.layout != "dense" else ("dense", "fixed: dense")
            return _Traits(
                "partial" if sparse else "reparameterised",
                intra,
                inter if sparse else "fixed: dense",
                "reparameterisation",
                "hidden",
                "parallel",
                _added(op.scaling),
                _workspace(op.site),
            )
        case AttnPrefix():
            reads, joins = "parameters", "gated addition"  # He et al. equation 4: one softmax is a gate
            return _Traits("additive", "none", "dynamic", "addition", reads, "parallel", joins, "attention")
        case VirtualTokens():
            return _Traits(
                "additive", "none", "dynamic", "addition", "tokens", "parallel", "concatenation", "embedding"
            )
        case Rows() | Head():
            reads = "tokens" if op.site.local == "embed" else "hidden"
            intra, inter = ("none", "fixed: sparse") if reads == "tokens" else ("dense", "fixed: dense")
            return _Traits(
                None, intra, inter, "replacement", reads, "in place", "replacement", _workspace(op.site)
            )


def _low_rank(op: LowRank) -> _Traits:
    linear = op.activation == "identity" and not op.sequential  # a change of the weight that writes there
    return _Traits(
        "reparameterised" if linear else "additive",
        "sparse" if _pruned(op) else "dense",
        "fixed: dense",
        "reparameterisation" if linear else "addition",
        "hidden",
        "sequential" if op.sequential else "parallel",
        _added(op.scaling),
        _workspace(op.write),
    )


def _affine(op: Affine, *, reparameterises: bool) -> _Traits:
    workspace = "norm" if op.weight is not None else _workspace(op.site)
    if op.weight is not None or op.bias is not None:
        return _Traits(
            "partial",
            "none",
            "fixed: sparse",
            "replacement",
            "parameters",
            "in place",
            "replacement",
            workspace,
        )
    scales = op.scale is not None
    family: Family = "reparameterised" if reparameterises else "additive" if scales else "partial"
    return _Traits(
        family,
        "none",
        "fixed: sparse",
        "reparameterisation" if reparameterises else "addition",
        "parameters",
        "sequential",
        "rescaling" if scales else "direct addition",
        workspace,
    )


def _added(scaling: float) -> str:
    return "direct addition" if scaling == 1.0 else "scaled addition"


def _pruned(op: LowRank) -> bool:
    zeros = sum(int((piece == 0).sum()) for factor in (op.A, op.B) for piece in pieces(factor))
    return zeros > PRUNED * (op.A.numel() + op.B.numel())


def _place(op: Op) -> Site:
    match op:
        case LowRank():
            return op.write
        case AttnPrefix():
            return kv_site(op.stack, op.layer)
        case VirtualTokens():
            return Site("embed")
        case _:
            return op.site


_WORKSPACES = {
    "embedding": ("embed", "embed.post"),
    "attention": ("attn.x", "q.out", "k.out", "v.out", "qkv.out", "kv", "ctx", "o.out", "attn.post"),
    "ffn": ("ffn.x", "gate.out", "up.out", "ffn.a", "down.out", "ffn.post"),
    "residual": ("attn.r", "ffn.r", "layer.out"),
    "head": ("final.pre", "final", "logits"),
}
_WORKSPACE_OF = {name: space for space, names in _WORKSPACES.items() for name in names}


def _workspace(site: Site) -> str:
    """The workspace of a site; encoder-decoders have some of them two or three times."""
    return _WORKSPACE_OF.get(site.local, site.local)


def _shares(ops: Sequence[dict[str, Any]]) -> bool:
    """Whether a stored matrix serves more than one place that reads something else.

    The q, k and v of one fused projection read the same and count as one place.
    """
    readers: dict[str, set[str]] = defaultdict(set)
    for op in ops:
        place = str(op.get("read", op.get("site", f"{op.get('stack', '')}{op.get('layer', '')}")))
        for field in ("A", "B", "values", "left", "blocks", "key", "value"):
            if isinstance(name := op.get(field), str):
                readers[name].add(place)
    return any(len(places) > 1 for places in readers.values())
