"""AdapterHub bottleneck adapters (adapter_config.json + adapter.safetensors) -> LowRank ops.

Format: `adapters` 1.x; tests/golden/README.md writes down its keys and formulas as read in that library's source.
With R the residual stream before a sub-block, D the sub-block's output and f the bottleneck with its biases, every
adapter that is served here gives R + D + s·f(·), and f reads

    D      sequential, original_ln_before=false (Houlsby)   read = write = o.out or down.out
    D + R  sequential, original_ln_before=true (Pfeiffer)   read = write = layer.out, only after the feed-forward block
    R      parallel (He et al.)                             read attn.r, write o.out; read ffn.r, write down.out

Source: Houlsby et al. section 2; Pfeiffer et al. "AdapterFusion"; He et al. table 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.formats.adapterhub_config import ACTIVATIONS, BOTTLENECK, LAYOUT_KEYS, TOP_LEVEL
from adapters.formats.base_claim import check_base
from adapters.formats.files import Upload
from adapters.formats.problems import Problems, name_or_kind, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Delta, LowRank, Op, Site


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer may carry an adapter: the config key that switches it on, its tensors' prefix, its sites."""

    switch: str
    prefix: str
    block: str  # D
    residual: str  # R
    total: str | None  # D + R, where a module computes it


PLACES = (
    Place("mh_adapter", "attention_adapters", block="o.out", residual="attn.r", total=None),
    Place("output_adapter", "output_adapters", block="down.out", residual="ffn.r", total="layer.out"),
)

FIELDS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")


def read_adapterhub(
    upload: Upload, spec: BackboneSpec, backbone_digest: str | None, problems: Problems
) -> Delta | None:
    """The delta of an AdapterHub adapter, or None where its method is not served; problems are noted."""
    raw = upload.config
    top = check_config(raw, TOP_LEVEL, problems)
    claimed = raw.get("model_name")
    lineage = check_base(
        claimed if isinstance(claimed, str) else None,
        None,
        spec,
        backbone_digest,
        problems,
        param="model_name",
    )
    for key, size in (("model_type", spec.model_type), ("hidden_size", spec.hidden_size)):
        if top[key] not in (None, size):
            problems.add(
                f"adapter_config.json: {key}: the backbone's is {size}; another model was trained.", param=key
            )
    nested = raw.get("config")
    if not isinstance(nested, dict):  # TOP_LEVEL refused it
        return None
    if (architecture := nested.get("architecture")) is not None:
        problems.add(
            f"adapter_config.json: config.architecture: {name_or_kind(architecture)} is not served from this format; "
            "bottleneck adapters are. Train LoRA, prefix and prompt tuning with PEFT.",
            param="architecture",
        )
        return None
    config = check_config(nested, BOTTLENECK, problems, prefix="config.")
    if any(nested.get(key) for key in LAYOUT_KEYS):
        return None
    ops = tuple(_lower(config, top["name"], upload.tensors, spec, problems))
    return Delta(
        method=_method(config),
        ops=ops,
        backbone_digest=spec.digest,
        lineage={"format": "adapterhub", **lineage},
    )


def _method(config: Mapping[str, Any]) -> str:
    """AdapterHub's own word for this kind of bottleneck."""
    if config["is_parallel"]:
        return "par_bn"
    return "double_seq_bn" if config["mh_adapter"] and config["output_adapter"] else "seq_bn"


def _lower(
    config: Mapping[str, Any],
    name: str | None,
    tensors: Mapping[str, Tensor],
    spec: BackboneSpec,
    problems: Problems,
) -> Iterator[Op]:
    if name is None or any(
        value is None for value in config.values()
    ):  # refused: no keys could be told from others
        return
    places = [(place, _sites(place, config, spec, problems)) for place in PLACES if config[place.switch]]
    if not places:
        problems.add(
            "adapter_config.json: config: neither mh_adapter nor output_adapter is on: it changes nothing."
        )
    used: set[str] = set()
    for layer in range(spec.num_layers):
        if layer in config["leave_out"]:
            continue
        for place, sites in places:
            path = spec.writer[Site("layer.out", layer)][0].path
            key = _prefix(path, f"{place.prefix}.adapters.{name}.", tensors)
            fields = (*FIELDS, "scaling") if isinstance(config["scaling"], str) else FIELDS
            used |= {key + field for field in fields}
            missing = [key + field for field in fields if key + field not in tensors]
            for absent in missing:
                problems.add(f"A site without a tensor: the file has no {quoted(absent)}.")
            if not missing and sites is not None:
                read, write = (Site(site, layer) for site in sites)
                found = {field: tensors[key + field] for field in fields}
                yield from _low_rank(read, write, key, found, config, spec, problems)
    for key in tensors:
        if key not in used:
            problems.add(
                f"A tensor without a site: {quoted(key)}: the config names no such adapter on this backbone."
            )


def _sites(
    place: Place, config: Mapping[str, Any], spec: BackboneSpec, problems: Problems
) -> tuple[str, str] | None:
    """(read, write) of an adapter at `place`; None, with the reason noted, where no pair of sites is exact.

    The residual stream must come out exactly once: `original_ln_*` are, without a norm of their own, additions of R.
    """
    parallel, before = config["is_parallel"], config["original_ln_before"]
    stream_count = int(config["original_ln_after"])
    if not parallel:
        stream_count += int(before and not config["residual_before_ln"])
    if stream_count != 1:
        problems.add(
            f"adapter_config.json: config.original_ln_after: at {place.prefix} the residual stream would be added "
            f"{stream_count} times with these values of original_ln_before, original_ln_after and residual_before_ln; "
            "served is once.",
            param="original_ln_after",
        )
        return None
    if Site("ffn.post", 0) in spec.writer and (parallel or not before):
        problems.add(
            f"adapter_config.json: config: {spec.model_type} norms the output of each block, and whether the adapter "
            f"at {place.prefix} acts before or after that norm is not defined; served is seq_bn (original_ln_before).",
            param="adapter",
        )
        return None
    if parallel:
        return place.residual, place.block
    if not before:
        return place.block, place.block
    if place.total is None:
        problems.add(
            f"adapter_config.json: config.mh_adapter: with original_ln_before the adapter at {place.prefix} reads the "
            "sum of attention output and residual stream, which no module of the backbone computes.",
            param="mh_adapter",
        )
        return None
    return place.total, place.total


def _prefix(layer_path: str, rest: str, tensors: Mapping[str, Tensor]) -> str:
    """Start of an adapter's keys. Saved from a bare model without a head, they lack the path's first part."""
    bare = f"{layer_path.partition('.')[2]}.{rest}"
    return bare if any(key.startswith(bare) for key in tensors) else f"{layer_path}.{rest}"


def _low_rank(
    read: Site,
    write: Site,
    key: str,
    found: Mapping[str, Tensor],
    config: Mapping[str, Any],
    spec: BackboneSpec,
    problems: Problems,
) -> Iterator[Op]:
    hidden = spec.hidden_size
    rank = _width(config["reduction_factor"], write.layer, hidden)
    if rank is None:
        problems.add(
            f"adapter_config.json: config.reduction_factor: the map has neither layer {write.layer} nor 'default'.",
            param="reduction_factor",
        )
        return
    expected: dict[str, tuple[int, ...]] = dict(
        zip(FIELDS, ((rank, hidden), (rank,), (hidden, rank), (hidden,)), strict=True)
    )
    expected["scaling"] = (1,) if config["scaling"] == "learned" else (hidden,)
    fits = True
    for field, tensor in found.items():
        if tuple(tensor.shape) != expected[field]:
            problems.add(
                f"{quoted(key + field)}: got shape {list(tensor.shape)}, expected {list(expected[field])}."
            )
            fits = False
    if not fits:
        return
    A, a_bias, B, b_bias = (found[field] for field in FIELDS)
    scaling = config["scaling"]
    if scaling == "learned":
        scaling = found["scaling"].item()
    elif scaling == "channel":
        factor = found["scaling"].float()
        B, b_bias, scaling = factor[:, None] * B.float(), factor * b_bias.float(), 1.0
    yield LowRank(
        read=read,
        write=write,
        A=A,
        B=B,
        a_bias=a_bias,
        b_bias=b_bias,
        scaling=float(scaling),
        activation=ACTIVATIONS[config["non_linearity"].lower()],
    )


def _width(reduction_factor: float | Mapping[str, float], layer: int, hidden: int) -> int | None:
    """The bottleneck's width as the library computes it; None where a map does not cover the layer."""
    if isinstance(reduction_factor, Mapping):
        factor = reduction_factor.get(str(layer), reduction_factor.get("default"))
        return None if factor is None else max(1, int(hidden // factor))
    return max(1, int(hidden // reduction_factor))
