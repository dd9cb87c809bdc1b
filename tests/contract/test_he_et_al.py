"""The variants of He et al. (2022), all in one batch, against a float64 forward of the paper's formulas.

`tests/he_oracle.py` is that forward: prefix tuning is there the gated addition of equation 4, while the server has one
softmax. `pytest tests/contract/test_he_et_al.py -s` prints the errors. Limit: 2e-5 of max(1, largest output), the
fp32 rule for the same order of operations (`exactness.LIMITS["T1"]`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.backbone_spec import BackboneSpec
from adapters.canonical import from_canonical, to_canonical
from adapters.formats import read_upload
from serving.engine.runner import Runner
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.placement import place
from serving.model.programs import PlacedDelta
from tests.cases import tiny_backbone
from tests.contract.exactness import BARE, EFFECT, LIMITS, Method, rows_for, shuffled
from tests.contract.forced import Row, run
from tests.contract.he_hosts import Host, bart_host, roberta_host
from tests.contract.he_uploads import HeCase, canonical, he_cases
from tests.families import AnyFamily
from tests.he_oracle import NOTHING, Change, Variant, attention, bart, float64, roberta

Oracle = Callable[[Row, Variant], Tensor]


def roberta_oracle(model: PreTrainedModel) -> Oracle:
    """Final hidden states [T, d]."""
    weights, config = float64(model.state_dict()), model.config
    return lambda row, variant: roberta(
        weights,
        row.tokens,
        variant,
        num_heads=config.num_attention_heads,
        eps=config.layer_norm_eps,
        padding=config.pad_token_id,
    )


def bart_oracle(model: PreTrainedModel) -> Oracle:
    """Logits [T, V]."""
    weights, config = float64(model.state_dict()), model.config
    heads = (config.encoder_attention_heads, config.decoder_attention_heads)
    scale = config.d_model**0.5 if config.scale_embedding else 1.0
    return lambda row, variant: bart(weights, list(row.source), row.tokens, variant, heads=heads, scale=scale)


@dataclass(frozen=True)
class Setup:
    """One family: its oracle, and what its variants are uploaded for."""

    oracle: Callable[[PreTrainedModel], Oracle]
    host: Callable[[BackboneSpec], Host]


SETUPS: Mapping[AnyFamily, Setup] = {
    "roberta": Setup(roberta_oracle, roberta_host),
    "bart": Setup(bart_oracle, bart_host),
}


def placed(case: HeCase, backbone: Backbone) -> PlacedDelta:
    stored = to_canonical(read_upload(case.files, backbone.spec))
    return place(from_canonical(stored.manifest, stored.tensors), stored.digest, backbone)


def test_the_oracle_without_a_delta_is_roberta() -> None:
    model = tiny_backbone("roberta").double()
    oracle = roberta_oracle(model)
    for tokens in ([5, 3, 96, 0, 7, 7, 12], [4], list(range(2, 60))):
        with torch.no_grad():
            expected = model.base_model(torch.tensor([tokens])).last_hidden_state[0]
        assert float((oracle(Row("", tokens, 1, None), {}) - expected).abs().max()) < 1e-9


def test_the_oracle_without_a_delta_is_bart() -> None:
    model = tiny_backbone("bart").double()
    oracle = bart_oracle(model)
    for source, tokens in (
        ((5, 3, 96, 0, 2), [2, 7, 12]),
        ((4,), [2]),
        (tuple(range(3, 40)), [*range(50, 9, -2)]),
    ):
        with torch.no_grad():
            ids, given = torch.tensor([list(source)]), torch.tensor([tokens])
            expected = model(input_ids=ids, decoder_input_ids=given, use_cache=False).logits[0]
        assert float((oracle(Row("", tokens, 1, None, source=source), {}) - expected).abs().max()) < 1e-9


def test_a_prefix_as_a_gated_addition_is_one_softmax() -> None:
    """Equation 4 against the concatenation that it was derived from, with a share that is neither 0 nor 1."""
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    names = {name: name for name in "qkvo"}
    weights = {f"{name}.{end}": random(*shape) * 0.3 for name in names
               for end, shape in (("weight", (12, 12)), ("bias", (12,)))}  # fmt: skip
    x, key, value = random(5, 12), random(4, 3, 4), random(4, 3, 4)
    gated = attention(x, x, weights, names, Change(prefix=(key, value)), 3)
    q, k, v = (
        (x @ weights[f"{n}.weight"].T + weights[f"{n}.bias"]).unflatten(-1, (3, 4)).transpose(0, 1)
        for n in "qkv"
    )
    k, v = torch.cat([key.transpose(0, 1), k], dim=1), torch.cat([value.transpose(0, 1), v], dim=1)
    mixed = torch.softmax(q @ k.mT / 2, dim=-1)
    joint = (mixed @ v).transpose(0, 1).flatten(1) @ weights["o.weight"].T + weights["o.bias"]
    assert 0.1 < float(mixed[..., :4].sum(-1).mean()) < 0.9
    assert float((gated - joint).abs().max()) < 1e-12
    assert float((gated - attention(x, x, weights, names, NOTHING, 3)).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("family", "saved"),
    [("roberta", "by AdapterHub"), ("roberta", "canonical"), ("bart", "by AdapterHub")],
    ids=["roberta-hub", "roberta", "bart-hub"],
)
def test_all_variants_in_one_batch_equal_the_formulas(family: AnyFamily, saved: str) -> None:
    setup, model = SETUPS[family], tiny_backbone(family)
    oracle = setup.oracle(model)
    backbone = adopt_backbone(model, name="tiny", device="cpu", dtype="float32")
    host = setup.host(backbone.spec)
    cases = [
        case if saved == "by AdapterHub" else replace(case, files=canonical(host, case.variant))
        for case in he_cases(host)
    ]
    methods = [Method(BARE, "T1", lambda _dtype, _prompts: [], None)]
    methods += [
        Method(case.name, "T1", lambda _dtype, _prompts: [], placed(case, backbone)) for case in cases
    ]
    alone, together = rows_for(methods, family=family), rows_for(methods, family=family)
    runner = Runner(backbone, num_slots=len(shuffled(together)), max_len=64)
    run(runner, shuffled(together))
    for row in shuffled([rows[:2] for rows in alone]):
        run(runner, [row])
    print(f"\n{family}: largest error    alone    mixed    limit   effect")
    for index, variant in enumerate([{}, *(case.variant for case in cases)]):
        errors, limits, effect = {"alone": 0.0, "mixed": 0.0}, [], 0.0
        for one, other in zip(alone[index], together[index], strict=True):
            expected = oracle(one, variant)
            limits.append(LIMITS["T1"] * max(1.0, float(expected.abs().max())))
            effect = max(effect, float((expected - oracle(one, {})).abs().max()))
            for how, row in (("alone", one), ("mixed", other)):
                if not row.logits:  # alone, two of each run
                    continue
                found = torch.cat(row.logits).double()
                errors[how] = max(errors[how], float((found - expected).abs().max()))
        name, limit = methods[index].name, min(limits)
        print(f"{name:26}{errors['alone']:9.1e}{errors['mixed']:9.1e}{limit:9.1e}{effect:9.1e}")
        assert max(errors.values()) <= limit, name
        assert effect > EFFECT or not variant, f"{name} does nothing"
