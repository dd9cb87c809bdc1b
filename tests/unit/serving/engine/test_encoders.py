"""Encoders in the engine: whole rows, what is refused, and backbones as checkpoints have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForPreTraining,
    PreTrainedTokenizerFast,
)

from adapters.errors import BackboneRefused, InvalidRequest
from adapters.formats import read_directory
from adapters.normal_form import AttnPrefix, Delta, LowRank, Site, VirtualTokens
from adapters.tasks import Task
from serving.core import Pooled
from serving.engine.runner import RowOutput
from serving.engine.sequence import ScheduledRow
from serving.model import encoder, padded_rows
from serving.model.backbone import Backbone, adopt_backbone, load_backbone
from serving.model.context import ForwardContext
from serving.model.encoder import BareEncoder, masked_logits
from serving.model.padded import spread
from tests.cases import quiet, randomise, tiny_backbone, tiny_body
from tests.families import ENCODERS, Encoder
from tests.unit.serving.engine.engine_support import Bench

PROMPTS = [[5, 9, 2, 40], [7], list(range(3, 60)), [11, 12, 13]]


def served(family: Encoder) -> Backbone:
    return adopt_backbone(tiny_body(family), name="tiny", device="cpu", dtype="float32")


def with_tokenizer(model: Any, directory: Path) -> str:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    model.save_pretrained(directory)
    return str(directory)


def low_rank(backbone: Backbone, seed: int) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    ops = tuple(
        LowRank(
            read=Site("attn.r", layer),
            write=Site("q.out", layer),
            A=torch.randn(3, 32, generator=draw),
            B=torch.randn(32, 3, generator=draw),
        )
        for layer in range(3)
    )
    return Delta(method="LORA", ops=ops, backbone_digest=backbone.spec.digest, task="embedding")


def vector(pooled: Pooled) -> Tensor:
    return torch.tensor(pooled.numbers())


def test_rows_are_never_cut_and_a_step_ends_with_the_row_that_exceeds_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = served("bert")
    deltas = {"a": low_rank(backbone, 1), "b": low_rank(backbone, 2)}
    wide, narrow = Bench(backbone, deltas), Bench(backbone, deltas, max_num_batched_tokens=5)
    for bench in (wide, narrow):
        for index, prompt in enumerate(PROMPTS):
            for digest in (None, "a", "b"):
                bench.pool(f"{index}{digest}", prompt, Task.EMBEDDING, digest)
    sizes: list[list[int]] = []
    run = narrow.engine.runner.run

    def counted(rows: Sequence[ScheduledRow]) -> list[RowOutput]:
        sizes.append([row.num_tokens for row in rows])
        return run(rows)

    monkeypatch.setattr(narrow.engine.runner, "run", counted)
    narrow.run()
    wide.run()
    assert sorted(size for step in sizes for size in step) == sorted(3 * [len(p) for p in PROMPTS])
    assert all(sum(step[:-1]) < 5 for step in sizes)
    for name in {name for name, _ in wide.events}:
        torch.testing.assert_close(vector(wide.pooled(name)), vector(narrow.pooled(name)), atol=2e-6, rtol=0)
    assert not torch.allclose(vector(wide.pooled("0a")), vector(wide.pooled("0b")), atol=1e-2)
    wide.assert_nothing_held("a", "b")


def test_nothing_of_a_prefix_is_held_after_the_step() -> None:
    backbone = served("bert")
    draw = torch.Generator().manual_seed(2)
    ops = tuple(
        AttnPrefix(
            layer=n, key=torch.randn(3, 4, 8, generator=draw), value=torch.randn(3, 4, 8, generator=draw)
        )
        for n in range(3)
    )
    prefix = Delta(
        method="PREFIX_TUNING",
        ops=ops,
        position_offset=3,
        backbone_digest=backbone.spec.digest,
        task="embedding",
    )
    bench = Bench(backbone, {"p": prefix})
    for name in ("a", "b"):  # once more through the same slot
        bench.pool(name, PROMPTS[0], Task.EMBEDDING, "p")
        bench.run()
    assert vector(bench.pooled("a")).tolist() == vector(bench.pooled("b")).tolist()
    assert isinstance(bench.engine.runner.cache, encoder.RowStore)
    assert not bench.engine.runner.cache._prefixes


def test_an_encoder_does_not_generate() -> None:
    bench = Bench(served("bert"), {})
    with pytest.raises(InvalidRequest, match="is an encoder and does not generate"):
        bench.submit("a", [1, 2, 3])


def test_the_padding_token_is_refused_where_it_has_no_position() -> None:
    with pytest.raises(InvalidRequest, match="padding token, 1,"):
        Bench(served("roberta"), {}).pool("a", [5, 1, 7], Task.EMBEDDING)
    bench = Bench(served("bert"), {})
    bench.pool("a", [5, 0, 7], Task.EMBEDDING)
    bench.run()
    assert bench.pooled("a")


def test_virtual_tokens_count_against_the_positions() -> None:
    backbone = served("bert")
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    prompt = Delta(
        method="PROMPT_TUNING",
        ops=(VirtualTokens(embeddings=rows),),
        position_offset=100,
        backbone_digest=backbone.spec.digest,
        task="embedding",
    )
    bench = Bench(backbone, {"p": prompt})
    bench.pool("fits", list(range(2, 30)), Task.EMBEDDING, "p")
    bench.pool("does not", list(range(2, 31)), Task.EMBEDDING, "p")
    bench.run()
    assert bench.pooled("fits")
    error = bench.terminal("does not").error
    assert error is not None
    assert error.kind == "ContextLengthExceeded"


@pytest.mark.parametrize("family", ENCODERS)
def test_a_checkpoint_with_a_masked_language_model_head_has_logits(family: Encoder, tmp_path: Path) -> None:
    stock = tiny_backbone(family)
    backbone = load_backbone(with_tokenizer(stock, tmp_path), device="cpu", dtype="float32")
    assert backbone.layout.name == ("padded rows" if family.startswith("deberta") else "whole rows")
    # DeBERTa-v3's own head multiplies by the embedding: no module there puts out logits
    assert (Site("logits") in backbone.spec.writer) == (family != "deberta_v3")
    row = torch.tensor([4, 8, 15, 16, 23, 42])
    with torch.no_grad():
        expected = stock(row[None]).logits[0]
        states = stock.base_model(row[None]).last_hidden_state[0]
    aside = ForwardContext([None] * len(backbone.spec.modules), backbone.new_cache(1, 1).plan([]))
    with torch.inference_mode():
        got = masked_logits(backbone.model, states, aside)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_a_checkpoint_keeps_both_its_head_and_its_pooler(tmp_path: Path) -> None:
    whole = BertForPreTraining(BertConfig(**tiny_body("bert").config.to_diff_dict())).eval()
    backbone = load_backbone(with_tokenizer(whole, tmp_path), device="cpu", dtype="float32")
    assert {Site("logits"), Site("pooled")} <= backbone.spec.writer.keys()


def test_a_body_alone_has_neither_head_nor_a_pooler_that_was_not_trained(tmp_path: Path) -> None:
    body = AutoModelForMaskedLM.from_config(tiny_body("bert").config).bert  # without a pooler
    backbone = load_backbone(with_tokenizer(body, tmp_path), device="cpu", dtype="float32")
    assert isinstance(backbone.model, BareEncoder)
    assert not {Site("logits"), Site("pooled")} & backbone.spec.writer.keys()
    again = load_backbone(str(tmp_path), device="cpu", dtype="float32")
    assert again.spec.digest == backbone.spec.digest  # nothing random was hashed


def test_an_adapter_of_the_body_alone_is_read_like_one_of_a_model_with_a_head(tmp_path: Path) -> None:
    backbone = served("roberta")
    config = LoraConfig(r=2, target_modules=["query", "dense"])
    with quiet():
        adapted = get_peft_model(tiny_body("roberta"), config)
        randomise(adapted, 1)
        adapted.save_pretrained(str(tmp_path))
    delta = read_directory(tmp_path, backbone.spec)
    assert len(delta.ops) == 3 * 4 + 1  # the pooler too
    assert delta.task == Task.EMBEDDING.value
    with_body = dict.fromkeys(load_file(tmp_path / "adapter_model.safetensors"))
    assert not any("roberta" in key for key in with_body)


def test_broken_attention_is_left_to_the_model_and_a_broken_mask_then_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoder, "_near", lambda *_: None)
    assert served("modernbert").layout.name == "padded rows"
    monkeypatch.setattr(padded_rows, "spread", lambda x, at, *shape: spread(x, at, *shape).clamp(min=1))
    with pytest.raises(BackboneRefused, match=r"whole rows: .*stock one .*padded rows: .*stock one"):
        served("modernbert")
