"""Compacter's projections: sums of Kronecker products, expanded to the matrices that they are.

y = x H + b with H [in, out] = Σ_k rule_k ⊗ W_k, k = 0 … m - 1, m = `phm_dim`. W [m, in/m, out/m] is stored whole or as
`W_left` [m, in/m, q] and `W_right` [m, q, out/m] (q = `phm_rank`), in the projection or, shared by all layers, in
`shared_parameters.{n}` as `W_down_left` and so on. The rules [m, m, m], `phm_rule` or `phm_rule_left` [m, m, 1] and
`phm_rule_right` [m, 1, m], are in `shared_parameters.{n}` once for all projections, or in each.
Source: `PHMLayer` of `adapters` 1.3.0; Mahabadi et al. "Compacter" section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adapters.formats.adapterhub_config import PHM
from adapters.formats.adapterhub_stored import Stored
from adapters.formats.schema import check_config

PHM_KEYS = tuple(PHM)
Side = Literal["down", "up"]


@dataclass
class Phm:
    """How the projections of one adapter are stored. `rule`, `weights`: what they share, once it was read."""

    config: Mapping[str, Any]
    stem: str
    rule: Tensor | None = None
    weights: dict[Side, Tensor] | None = None

    @classmethod
    def read(cls, raw: Mapping[str, Any], path: str, stored: Stored) -> Phm | None:
        """The layout that the config names; None where that was refused."""
        keys = {key: raw[key] for key in PHM if key in raw}
        config = check_config(keys, PHM, stored.problems, prefix=path)
        if any(value is None for value in config.values()):
            return None
        if config["shared_W_phm"] and (
            not config["factorized_phm_W"] or isinstance(raw.get("reduction_factor"), Mapping)
        ):
            stored.problems.add(
                f"adapter_config.json: {path}shared_W_phm: the library has it only with factorized_phm_W and one "
                "reduction_factor.",
                param="shared_W_phm",
            )
            return None
        return cls(config, stored.shared("shared_parameters"))

    def take(
        self, stem: str, side: Side, d_in: int, d_out: int, stored: Stored
    ) -> tuple[Tensor, Tensor | None] | None:
        """The matrix [d_out, d_in] and the bias of the projection at `stem`; None where its tensors do not fit."""
        m = self.config["phm_dim"]
        if d_in % m or d_out % m:
            stored.problems.add(
                f"adapter_config.json: config.phm_dim: {m} does not divide the widths {d_in} and {d_out}.",
                param="phm_dim",
            )
            return None
        bias = stored.take(stem, {"b": (d_out,)} if self.config["phm_bias"] else {})
        weights = self._weights(stem, side, d_in // m, d_out // m, stored)
        rule = self._rule(stem, stored)
        if bias is None or weights is None or rule is None:
            return None
        expanded = sum(torch.kron(rule[k], weights[k]) for k in range(m))
        assert isinstance(expanded, Tensor)
        return expanded.t().contiguous().float(), bias.get("b")

    def _weights(self, stem: str, side: Side, rows: int, columns: int, stored: Stored) -> Tensor | None:
        m, q = self.config["phm_dim"], self.config["phm_rank"]
        if not self.config["factorized_phm_W"]:
            found = stored.take(stem, {"W": (m, rows, columns)})
            return None if found is None else found["W"].double()
        shared = self.config["shared_W_phm"]
        if self.weights is not None and side in self.weights:
            return self.weights[side]
        infix = f"W_{side}_" if shared else "W_"
        found = stored.take(
            self.stem if shared else stem, {f"{infix}left": (m, rows, q), f"{infix}right": (m, q, columns)}
        )
        if found is None:
            return None
        product = found[f"{infix}left"].double() @ found[f"{infix}right"].double()
        if shared:
            self.weights = {**(self.weights or {}), side: product}
        return product

    def _rule(self, stem: str, stored: Stored) -> Tensor | None:
        m = self.config["phm_dim"]
        if self.rule is not None:
            return self.rule
        shared = self.config["shared_phm_rule"]
        shapes: dict[str, tuple[int, ...]] = {"phm_rule": (m, m, m)}
        if self.config["factorized_phm_rule"]:
            shapes = {"phm_rule_left": (m, m, 1), "phm_rule_right": (m, 1, m)}
        found = stored.take(self.stem if shared else stem, shapes)
        if found is None:
            return None
        rule, *rest = (found[name].double() for name in shapes)
        rule = rule @ rest[0] if rest else rule
        if shared:
            self.rule = rule
        return rule
