"""The probe on modules written here: what is affine is found in its smallest form, what is not is refused with why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serving.offline.compress import Change, smallest
from serving.offline.probe import AffineMap, NotAffineError, check_equal, recover

D_OUT, D_IN = 12, 20
DRAW = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


BASE = AffineMap(draw(D_OUT, D_IN), draw(D_OUT))
SPARSE = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
SPARSE[torch.arange(5), torch.arange(5) * 3] = draw(5)
WEIGHTS = {
    "low rank": draw(D_OUT, 2) @ draw(2, D_IN),
    "sparse": SPARSE,
    "dense": draw(D_OUT, D_IN),
    "scale": draw(D_OUT, 1) * BASE.weight,
    "none": torch.zeros(D_OUT, D_IN, dtype=torch.float64),
}


def module_of(weight: Tensor, shift: Tensor | float = 0.0) -> AffineMap:
    return AffineMap(BASE.weight + weight, BASE.bias + shift)


@pytest.mark.parametrize("moved", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("form", WEIGHTS)
def test_a_change_is_found_in_its_smallest_form(form: str, moved: bool) -> None:
    module = module_of(WEIGHTS[form], draw(D_OUT) if moved else 0.0)
    change = smallest(recover(module, D_IN), BASE)
    assert (
        change.form
        == {
            (False, form): form,
            (True, form): f"{form} + bias" if form != "none" else "bias",
        }[moved, form]
    )
    if form == "low rank":
        assert change.A is not None
        assert change.A.shape == (2, D_IN)
    if form == "sparse":
        assert change.values is not None
        assert len(change.values) == 5
    check_equal(module, lambda x: change.apply(BASE, x), D_IN, dtype=torch.float64)


def test_a_scale_of_the_inputs_is_found() -> None:
    change = smallest(recover(module_of(BASE.weight * draw(D_IN)), D_IN), BASE)
    assert set(change.tensors()) == {"in_scale"}


def test_noise_of_a_module_that_computes_in_fp32_adds_no_rank() -> None:
    weight = (BASE.weight + WEIGHTS["low rank"] * 1e-3).float()

    def module(x: Tensor) -> Tensor:
        return (x.float() @ weight.T).to(x.dtype) + BASE.bias.to(x.dtype)

    change = smallest(recover(module, D_IN), BASE)
    assert change.form == "low rank"
    assert change.A is not None
    assert len(change.A) == 2


def mixed(x: Tensor) -> Tensor:
    return BASE(x - x.mean(dim=(0, 1), keepdim=True))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (lambda x: torch.relu(BASE(x)), "not affine"),
        (lambda x: BASE(x) + 1e-4 * x[..., :D_OUT] ** 3, "not affine"),
        (lambda x: BASE(x) * x.norm(dim=-1, keepdim=True), "not affine"),
        (mixed, "other tokens"),
        (lambda x: BASE(x.cumsum(dim=1)), "other tokens"),
        (lambda x: BASE(x) + torch.randn(D_OUT, dtype=x.dtype), "random numbers"),
        (lambda x: BASE(x) / x.abs().amax().clamp(max=1.0).floor(), "not finite"),
    ],
    ids=[
        "relu",
        "slight cube",
        "input dependent",
        "mean over the batch",
        "cumulative",
        "stochastic",
        "infinite",
    ],
)
def test_what_is_not_affine_is_refused_with_the_reason(module: Callable[[Tensor], Tensor], why: str) -> None:
    with pytest.raises(NotAffineError, match=why):
        recover(module, D_IN)


def test_a_corrupted_change_is_noticed() -> None:
    module = module_of(WEIGHTS["low rank"])
    change = smallest(recover(module, D_IN), BASE)
    assert change.B is not None
    wrong = Change(A=change.A, B=change.B + 1e-3)
    with pytest.raises(NotAffineError):
        check_equal(module, lambda x: wrong.apply(BASE, x), D_IN, dtype=torch.float64)
