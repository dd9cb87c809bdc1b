"""How AdapterHub counts layers: one after the other, an encoder's before the decoder's that looks at it.

Source: `iter_layers` of the library's models, whose numbers `leave_out` and maps of `reduction_factor` speak of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from adapters.backbone_spec import BackboneSpec
from adapters.normal_form import Site


class Layer(NamedTuple):
    """One layer. `counted`: its number in the library, `number`: its place in the stack whose site names begin so."""

    counted: int
    stack: str
    number: int

    def site(self, name: str) -> Site:
        """The layer's site of that name within its stack."""
        return Site(f"{self.stack}{name}", self.number)


def layers(spec: BackboneSpec) -> Iterator[Layer]:
    """All layers of a backbone, as the library counts them."""
    stacks = [("enc.", spec.num_encoder_layers), ("dec.", spec.num_layers)]
    index = 0
    for stack, count in stacks if spec.kind == "encoder-decoder" else [("", spec.num_layers)]:
        for number in range(count):
            yield Layer(index, stack, number)
            index += 1


def index_of(site: Site, spec: BackboneSpec) -> int:
    """The library's number of the layer in which `site` is."""
    return site.layer + (spec.num_encoder_layers if site.stack in ("dec", "dec.cross") else 0)
