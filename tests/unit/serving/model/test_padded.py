"""The padded layout: when it is chosen, what may not reach a row, and what a backbone on it can't have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor
from transformers import AutoModelForCausalLM, FalconConfig

from adapters.errors import BackboneRefused
from adapters.normal_form import AttnPrefix, Delta, LowRank, Site, VirtualTokens
from adapters.validate import check
from serving.config import Engine as EngineSettings
from serving.core import Event, Request, SamplingParams, TokenEvent
from serving.engine.engine import Engine
from serving.engine.merging import HotMerge
from serving.engine.runner import Runner
from serving.metrics import EngineMetrics
from serving.model import padded
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.kv_cache import Entries, SlotAttention
from serving.model.merge import merge
from serving.model.packed import Forward
from serving.model.padded import Padded
from serving.model.placement import place
from tests.cases import tiny_backbone
from tests.contract.forced import Row, run
from tests.families import PADDED, Family

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}


def adopt(model: Any, dtype: str = "float32") -> Backbone:
    return adopt_backbone(model, name="tiny", device="cpu", dtype=dtype)


def unmasked(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: torch.ones_like(mask(*args))


def without_positions(_: Callable[..., bool]) -> Callable[..., bool]:
    """Rotary by columns, which differ from step to step."""
    return lambda _model, name: name != "position_ids"


def aligned_left(make: Callable[[SlotAttention], Entries]) -> Callable[[SlotAttention], Entries]:
    def broken(plan: SlotAttention) -> Entries:
        entries = make(plan)
        columns = torch.arange(plan.longest)[None].expand_as(entries.row_entries)
        return entries._replace(row_entries=columns)

    return broken


def one_entry_late(make: Callable[[SlotAttention], Entries]) -> Callable[[SlotAttention], Entries]:
    def broken(plan: SlotAttention) -> Entries:
        entries = make(plan)
        return entries._replace(token_entries=(entries.token_entries - 1).clamp(min=0))

    return broken


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "owner", "name", "breakage"),
    [
        ("bloom", padded, "_mask", unmasked),
        ("falcon", padded, "_mask", unmasked),
        ("falcon", padded, "takes", without_positions),
        ("bloom", SlotAttention, "_make_entries", aligned_left),
        ("bloom", SlotAttention, "_make_entries", one_entry_late),
    ],
    ids=["mask, alibi", "mask, rotary", "positions", "alignment", "cache"],
)
def test_broken_padded_path_is_refused_by_the_probe(
    family: Family,
    owner: Any,
    name: str,
    breakage: Callable[[Any], Any],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, breakage(getattr(owner, name)))
    with pytest.raises(BackboneRefused, match=r"padded: .* differs from the stock one by"):
        adopt(tiny_backbone(family), dtype)


def ragged() -> list[Row]:
    """Three rows of 12, 3 and 6 tokens, prefilled in chunks, then decoded; no token is 0."""
    lengths = ((12, 9), (3, 1), (6, 4))
    return [Row("", [1 + (5 * n + i) % 96 for i in range(n)], prefill, None, 5) for n, prefill in lengths]


def logits_of(runner: Runner) -> Tensor:
    rows = ragged()
    run(runner, rows)
    return torch.cat([part for row in rows for part in row.logits])


@pytest.mark.parametrize("family", ["bloom", "falcon", "falcon_mq"])
def test_nothing_but_its_own_entries_reaches_a_row(family: Family) -> None:
    backbone = adopt(tiny_backbone(family))
    clean = Runner(backbone, num_slots=4, max_len=16)
    expected = logits_of(clean)
    poisoned = Runner(backbone, num_slots=4, max_len=16)
    for pool in (*poisoned.cache.keys, *poisoned.cache.values):
        pool.fill_(torch.nan)
    assert torch.equal(logits_of(poisoned), expected)
    for pool in (*poisoned.cache.keys, *poisoned.cache.values):  # pads wrote nothing
        written = pool.isfinite().all(dim=-1).all(dim=1)
        assert written.sum(dim=1).tolist() == [12, 3, 6, 0]


def test_pads_that_are_nan_reach_no_row() -> None:
    model = tiny_backbone("falcon")
    backbone = adopt(model)
    expected = logits_of(Runner(backbone, num_slots=4, max_len=16))
    model.transformer.word_embeddings.weight.data[0] = torch.nan  # pads are token 0
    assert torch.equal(logits_of(Runner(backbone, num_slots=4, max_len=16)), expected)


def test_long_prompt_does_not_pad_the_decoding_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Padded(tiny_backbone("bloom"), frozenset())
    assert layout.groups([1, 256, 1, 1]) == [[0, 2, 3], [1]]
    assert layout.groups([7, 4, 5, 6]) == [[1, 2, 3, 0]]
    assert layout.groups([3]) == [[0]]
    counts = [1] * 31 + [2, 9, 256, 200]
    for group in layout.groups(counts):
        assert len(group) * max(counts[i] for i in group) <= 2 * sum(counts[i] for i in group)
    assert sorted(i for group in layout.groups(counts) for i in group) == list(range(len(counts)))

    backbone = adopt(tiny_backbone("bloom"))
    widths: list[tuple[int, int]] = []
    spread = padded.spread

    def noted(values: Tensor, places: Tensor, batch: int, width: int) -> Tensor:
        widths.append((batch, width))
        return spread(values, places, batch, width)

    monkeypatch.setattr(padded, "spread", noted)
    rows = [Row("", [1, 2, 3, 4], 1, None) for _ in range(4)] + [Row("", list(range(1, 21)), 20, None)]
    run(Runner(backbone, num_slots=5, max_len=32), rows)
    assert widths[:2] == [(4, 1), (1, 20)]


@pytest.mark.parametrize("family", sorted(PADDED))
def test_deltas_that_need_what_a_padded_backbone_hides_are_refused(family: Family) -> None:
    spec = adopt(tiny_backbone(family)).spec
    rows = torch.ones(5, spec.num_kv_heads, spec.head_dim)
    joint = [AttnPrefix(layer=layer, key=rows, value=rows) for layer in range(3)]
    separate = [replace(prefix, merge="separate", gate=torch.ones(1)) for prefix in joint]

    def problems(ops: list[AttnPrefix], offset: int) -> list[str]:
        return check(
            Delta(method="t", ops=tuple(ops), position_offset=offset, backbone_digest=spec.digest), spec
        )

    assert problems(joint, 5) == []
    assert len([text for text in problems(separate, 0) if "no queries" in text]) == 3
    counted = [] if family not in ("bloom", "mpt") else ["counts positions itself"]
    found = problems(joint, 0)
    assert len(found) == len(counted)
    assert all(why in text for text, why in zip(found, counted, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        {"multi_query": False},
        {"multi_query": False, "parallel_attn": False, "bias": True},
        {"multi_query": True, "parallel_attn": False},
    ],
    ids=["11B", "many heads", "RW without ALiBi", "RW with one key head"],
)
def test_other_falcon_decoders_are_served(options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(FalconConfig(**SMALL, **options, eos_token_id=2))
    backbone = adopt(model)
    assert backbone.layout.name == "padded"
    assert backbone.parity_error < 2e-6


def test_padded_engine_serves_alone_what_it_serves_together() -> None:
    backbone = adopt(tiny_backbone("bloom"))
    draw = torch.Generator().manual_seed(3)
    lora = tuple(
        LowRank(
            read=Site("attn.x", layer),
            write=Site("qkv.out", layer),
            A=0.5 * torch.randn(4, 32, generator=draw),
            B=torch.randn(96, 4, generator=draw),
        )
        for layer in range(3)
    )
    head = LowRank(  # it sees only the rows that are sampled
        read=Site("final"),
        write=Site("logits"),
        A=torch.randn(4, 32, generator=draw),
        B=torch.randn(97, 4, generator=draw),
    )
    prompt = VirtualTokens(embeddings=torch.randn(5, 32, generator=draw))
    digest = backbone.spec.digest
    deltas = {
        "lora": Delta(method="LORA", ops=lora, backbone_digest=digest),
        "head": Delta(method="LORA", ops=(head,), backbone_digest=digest),
        "prompt": Delta(method="PROMPT_TUNING", ops=(prompt,), position_offset=5, backbone_digest=digest),
    }
    calls = [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple((7 * i + j) % 97 for j in range(2 + 5 * i % 13)),
            sampling=SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True),
            adapter_digest=[None, "lora", "prompt", "head"][i % 4],
        )
        for i in range(12)
    ]

    def tokens(groups: list[list[Request]]) -> dict[str, list[int]]:
        events: list[tuple[str, Event]] = []
        engine = Engine(
            backbone,
            deltas.__getitem__,
            events.extend,
            metrics=EngineMetrics(CollectorRegistry()),
            settings=EngineSettings(max_num_seqs=4, max_num_batched_tokens=9),
        )
        ended = 0
        for group in groups:
            for request in group:
                engine.submit(request)
            ended += len(group)
            while sum(isinstance(e, TokenEvent) and e.finish_reason is not None for _, e in events) < ended:
                engine.step()
        found: dict[str, list[int]] = {request.request_id: [] for request in calls}
        for name, event in events:
            if isinstance(event, TokenEvent):
                assert event.error is None
                found[name] += event.token_ids
        return found

    together = tokens([calls])
    assert together == tokens([[request] for request in calls])
    assert all(len(ids) == 5 for ids in together.values())


def test_merged_weights_of_a_sole_delta_run_padded() -> None:
    backbone = adopt(tiny_backbone("bloom"))
    draw = torch.Generator().manual_seed(3)
    ops = tuple(
        LowRank(
            read=Site("ctx", layer),
            write=Site("o.out", layer),
            A=torch.randn(4, 32, generator=draw),
            B=torch.randn(32, 4, generator=draw),
        )
        for layer in range(3)
    )
    delta = place(Delta(method="LORA", ops=ops, backbone_digest=backbone.spec.digest), "d", backbone)
    weights = merge(delta, backbone)

    def logits(merged: Mapping[int, Forward]) -> Tensor:
        runner = Runner(backbone, num_slots=2, max_len=32)
        runner.merging = cast("HotMerge", SimpleNamespace(weights_for=lambda _: merged))
        rows = [Row("", [1, 2, 3, 4], 3, delta), Row("", [5, 6, 7, 8, 9, 10], 6, delta)]
        run(runner, rows)
        return torch.cat([piece for row in rows for piece in row.logits])

    plain, merged, bare = logits({}), logits(weights), logits({index: lambda x: x for index in weights})
    scale = float(plain.abs().max())
    assert float((plain - merged).abs().max()) <= 2e-4 * scale
    assert float((bare - merged).abs().max()) > 0.01 * scale
