"""AdapterHub ReFT (LoReFT, NoReFT, DiReFT) -> LowRank at the end of a layer, on the first and last prompt tokens.

Format: `adapters` 1.3.0. Keys `<layer>.reft_layer.refts.{n}.units.{i}.` (0 acts on the first p tokens, 1 on the last q;
tied weights: 0 on both) and `learned_source.weight` [r, d] · `.bias` [r] · `projection.weight` [r, d]; where it is
orthogonal, in its place torch's parametrisation, `projection.parametrizations.weight.original` [r, d] and
`….weight.0.base` [d, d].

    x + (f(W x + b) - R x) R        DiReFT: x + f(W x + b) R

The file does not say which of the two it is: `subtract_projection` is lost when the library saves, so a config whose
projection is not orthogonal has to name it. A token that is both one of the first and one of the last is one of the
last. While it decodes with a cache, the library edits every new token as if it were a prompt; what is served is what
its forward gives without one. Source: `ReftUnit`, `ReftModule` there; Wu et al. "ReFT" section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.formats.adapterhub_config import ACTIVATIONS, REFT
from adapters.formats.adapterhub_stored import Part, Stored
from adapters.formats.schema import check_config
from adapters.normal_form import LowRank, Op, Site
from adapters.positions import FirstTokens, LastTokens

ORIGINAL, BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"


def acts_last(op: Op) -> bool:
    """True for ReFT's ops: the library edits a layer's output after all else that acts there."""
    return isinstance(op, LowRank) and isinstance(op.positions, FirstTokens | LastTokens)


def read_reft(raw: Mapping[str, Any], path: str, stored: Stored) -> Part | None:
    """The ops of a ReFT adapter; what does not fit is noted."""
    config = check_config(raw, REFT, stored.problems, prefix=path)
    optional = ("subtract_projection", "non_linearity")
    if any(value is None for key, value in config.items() if key not in optional):
        return None
    if stored.spec.kind == "encoder-decoder":
        stored.problems.add(
            f"adapter_config.json: {path}architecture: on an encoder-decoder, which of its two rows first and last "
            "tokens count is not defined.",
            param="architecture",
        )
        return None
    if reason := _why_refused(config, stored.spec.hidden_size):
        key, text = reason
        stored.problems.add(f"adapter_config.json: {path}{key}: {text}", param=key)
        return None
    method = "loreft" if config["orthogonality"] else "noreft" if config["subtract_projection"] else "direft"
    return method, tuple(_lower(config, stored))


def _why_refused(config: Mapping[str, Any], hidden: int) -> tuple[str, str] | None:
    if not config["orthogonality"] and config["subtract_projection"] is None:
        return "subtract_projection", (
            "the library does not save whether this is NoReFT (true) or DiReFT (false), and its own load takes it for "
            "NoReFT. Add the key."
        )
    if config["subtract_projection"] is not False and config["non_linearity"] is not None:
        return (
            "non_linearity",
            "expected null: beside a subtracted projection two branches read the same value.",
        )
    if config["prefix_positions"] + config["suffix_positions"] == 0:
        return "prefix_positions", "neither first nor last tokens are edited, so it would change nothing."
    if config["r"] >= hidden:
        return "r", f"expected less than the backbone's width, {hidden}."
    return None


def _lower(config: Mapping[str, Any], stored: Stored) -> Iterator[Op]:
    spec, r = stored.spec, config["r"]
    first = FirstTokens(config["prefix_positions"]) if config["prefix_positions"] else None
    last = LastTokens(config["suffix_positions"]) if config["suffix_positions"] else None
    units = [(first, last)] if config["tied_weights"] else [(first,), (last,)]
    shapes: dict[str, tuple[int, ...]] = {
        "learned_source.weight": (r, spec.hidden_size),
        "learned_source.bias": (r,),
    }
    if config["orthogonality"]:
        shapes |= {ORIGINAL: (r, spec.hidden_size), BASE: (spec.hidden_size, spec.hidden_size)}
    else:
        shapes["projection.weight"] = (r, spec.hidden_size)
    for layer in range(spec.num_layers):
        if config["layers"] != "all" and layer not in config["layers"]:
            continue
        site = Site("layer.out", layer)
        for index, places in enumerate(units):
            stem = stored.at(spec.writer[site][0].path, "reft_layer.refts") + f"units.{index}."
            found = stored.take(stem, shapes)
            if found is None:
                continue
            projection = (
                found["projection.weight"] if BASE not in found else _orthogonal(found[ORIGINAL], found[BASE])
            )
            A = found["learned_source.weight"].float()
            if config["subtract_projection"] is not False:
                A = A - projection.float()
            B = projection.float().t().contiguous()
            for positions in places:
                if positions is not None:
                    yield LowRank(
                        read=site,
                        write=site,
                        A=A,
                        B=B,
                        a_bias=found["learned_source.bias"],
                        activation=ACTIVATIONS[(config["non_linearity"] or "linear").lower()],
                        positions=positions,
                    )


def _orthogonal(original: Tensor, base: Tensor) -> Tensor:
    """The projection [r, d] of orthonormal rows: d > r, so a product of Householder reflections, turned by `base`.

    Source: torch `nn.utils.parametrizations._Orthogonal.forward`.
    """
    tall = original.double().t()
    reflections = tall.tril(diagonal=-1)
    turned = torch.linalg.householder_product(reflections, 2 / (1 + reflections.square().sum(dim=0)))
    projection: Tensor = base.double() @ (turned * tall.diagonal().int())
    return projection.t().float()
