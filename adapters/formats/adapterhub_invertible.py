"""AdapterHub's invertible adapters (`inv_adapter: nice`) -> two sequential LowRanks on halves of the embedding.

Format: `adapters` 1.3.0. Keys `invertible_adapters.{n}.{F,G}.{0,2}.{weight,bias}`. With e = [a, b] cut in the middle:

    a' = a + F(b);  b' = b + G(a');  e' = [a', b']      F(x) = W2 f(W0 x + b0) + b2, likewise G

at the embeddings that enter the first layer, of an encoder-decoder the encoder's. The inverse, b = b' - G(a') and then
a = a' - F(b), runs before the
language model head only in the library's own model classes (`…AdapterModel`); what encoders answer needs none. Source:
`NICECouplingBlock` there; Dinh et al. "NICE" section 3; Pfeiffer et al. "MAD-X" section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.formats.adapterhub_config import ACTIVATIONS, INVERTIBLE
from adapters.formats.adapterhub_stored import Stored
from adapters.formats.schema import check_config
from adapters.normal_form import LowRank, Op, Site

NO_POSITIONS = frozenset({"llama", "mistral", "gptj", "t5", "mt5"})
"""Architectures that add nothing to a token's embedding."""

UNDOES = "AdapterModel"
"""End of the names of the library's own model classes."""


def read_invertible(raw: Mapping[str, Any], path: str, stored: Stored) -> Iterator[Op]:
    """The coupling's two steps, and their inverse where the model undoes them; what does not fit is noted."""
    keys = {key: raw[key] for key in INVERTIBLE if key in raw}
    factor = check_config(keys, INVERTIBLE, stored.problems, prefix=path)["inv_adapter_reduction_factor"]
    if factor is None:
        return
    entrance = _embedding(stored.spec)
    if entrance is None:
        stored.problems.add(
            f"adapter_config.json: {path}inv_adapter: no module of {stored.spec.model_type} puts out what it "
            "would read.",
            param="inv_adapter",
        )
        return
    if stored.spec.kind == "encoder-decoder" and stored.model_class.endswith(UNDOES):
        stored.problems.add(
            f"adapter_config.json: model_class: the heads of {stored.model_class} undo the encoder's invertible "
            "adapter behind the decoder, which is not served.",
            param="model_class",
        )
        return
    side = "encoder." if stored.spec.kind == "encoder-decoder" else ""
    hidden, stem = stored.spec.hidden_size, stored.shared(f"{side}invertible_adapters")
    half = hidden // 2
    halves = {"F": (slice(half, hidden), slice(0, half)), "G": (slice(0, half), slice(half, hidden))}
    steps = []
    for name, (read, write) in halves.items():
        widths = read.stop - read.start, write.stop - write.start
        inner = int(widths[0] // factor)
        found = stored.take(
            stem,
            {
                f"{name}.0.weight": (inner, widths[0]),
                f"{name}.0.bias": (inner,),
                f"{name}.2.weight": (widths[1], inner),
                f"{name}.2.bias": (widths[1],),
            },
        )
        if found is None:
            return
        w0, b0, w2, b2 = found.values()
        A, B, bias = w0.new_zeros(inner, hidden), w2.new_zeros(hidden, inner), b2.new_zeros(hidden)
        A[:, read], B[write], bias[write] = w0, w2, b2
        steps.append((A, B, b0, bias))
    activation = ACTIVATIONS[raw["non_linearity"].lower()]

    def step(site: Site, factors: tuple[Tensor, Tensor, Tensor, Tensor], sign: float) -> LowRank:
        A, B, a_bias, b_bias = factors
        return LowRank(
            read=site, write=site, A=A, B=B, a_bias=a_bias, b_bias=b_bias, scaling=sign, activation=activation
        )

    yield from (step(entrance, factors, 1.0) for factors in steps)
    if stored.model_class.endswith(UNDOES) and stored.spec.kind == "decoder":
        yield from (step(Site("final"), factors, -1.0) for factors in reversed(steps))


def _embedding(spec: BackboneSpec) -> Site | None:
    """What enters the first layer; None where no module puts that out."""
    stack = "enc." if spec.kind == "encoder-decoder" else ""
    if Site(f"{stack}embed.post") in spec.writer:
        return Site(f"{stack}embed.post")
    return Site(f"{stack}embed") if spec.model_type in NO_POSITIONS else None
