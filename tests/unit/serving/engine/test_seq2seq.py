"""Encoder-decoders in the engine: what transformers' `generate` gives row by row, in one running batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.errors import BackboneRefused, ContextLengthExceeded, InvalidRequest
from adapters.tasks import Task
from serving.core import PromptEvent
from serving.engine.prefix_cache import BLOCK_TOKENS
from serving.model.backbone import Backbone
from serving.model.cross_cache import CrossCache
from serving.model.distance_bias import DistanceBias
from tests.unit.serving.engine.engine_support import Bench
from tests.unit.serving.engine.seq2seq_support import CONFIGS, generated, prompts, tiny_model, tiny_seq2seq


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_of_ragged_prompts_equal_generate(name: str) -> None:
    model = tiny_model(name)
    bench = Bench(tiny_seq2seq(name), {}, max_num_seqs=4)
    asked = prompts(9)
    for index, prompt in enumerate(asked):
        bench.submit(str(index), prompt, max_tokens=8 + index, ignore_eos=False)
    bench.run()
    expected = [generated(model, prompt, 8 + index) for index, prompt in enumerate(asked)]
    assert [bench.tokens(str(index)) for index in range(len(asked))] == expected
    assert len({tuple(tokens) for tokens in expected}) > 4, "the prompts hardly change the output"
    assert any(len(set(tokens)) > 2 for tokens in expected), "the outputs hardly move"


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_preempted_requests_are_read_and_computed_again(name: str) -> None:
    backbone = tiny_seq2seq(name)
    asked = [prompt[:20] for prompt in prompts(6)]
    calm = Bench(backbone, {})
    room = 6 * BLOCK_TOKENS * calm.engine.runner.cache.entry_bytes
    tight = Bench(backbone, {}, memory_bytes=room, max_num_seqs=4)
    for bench in (calm, tight):
        for index, prompt in enumerate(asked):
            bench.submit(str(index), prompt, max_tokens=40)
        bench.run()
    assert tight.engine.scheduler.num_preemptions > 0
    assert calm.engine.scheduler.num_preemptions == 0
    names = [str(index) for index in range(len(asked))]
    assert [tight.tokens(n) for n in names] == [calm.tokens(n) for n in names]
    tight.assert_nothing_held()


def test_one_prompt_of_one_tenant_is_read_once_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_seq2seq("bart")
    read: list[int] = []
    encode = Backbone.encode

    def counted(self: Backbone, tokens: Tensor, *args: Any) -> None:
        read.append(len(tokens))
        encode(self, tokens, *args)

    monkeypatch.setattr(Backbone, "encode", counted)
    bench = Bench(backbone, {})
    one, other = prompts(6)[4:6]
    for index in range(3):
        bench.submit(f"one{index}", one, temperature=1.0, seed=index)
    bench.submit("other", other)
    bench.submit("stranger", one, tenant="another")
    bench.run()
    assert read == [2 * len(one) + len(other)]
    alone = Bench(backbone, {})
    for index in range(3):
        alone.submit(f"one{index}", one, temperature=1.0, seed=index)
        alone.run()
        assert alone.tokens(f"one{index}") == bench.tokens(f"one{index}")


def test_a_fork_copies_what_the_encoder_made_only_where_it_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiny_seq2seq("bart").new_cache(3, 16)
    assert isinstance(cache, CrossCache)
    copies: list[tuple[int, int, int]] = []
    copy = cache.cross.copy
    monkeypatch.setattr(cache.cross, "copy", lambda *where: (copies.append(where), copy(*where)))
    cache.begin_source([0, 1], 5, None)
    for layer in range(3):
        cache.write_source([0, 1], layer, torch.randn(5, 4, 8), torch.randn(5, 4, 8))
    cache.copy(0, 1, 2)
    assert copies == []
    cache.copy(0, 2, 2)
    cache.copy(2, 1, 2)
    assert copies == [(0, 2, 5)]
    assert torch.equal(cache.cross.keys[2][2], cache.cross.keys[2][0])
    cache.clear(2)
    assert not cache.cross.keys[2][2].any()
    cache.copy(0, 2, 2)
    assert copies == [(0, 2, 5)] * 2


def test_prompts_count_as_read_and_do_not_limit_the_answer() -> None:
    bench = Bench(tiny_seq2seq("bart"), {})
    with pytest.raises(ContextLengthExceeded, match="129 tokens; 128 fit the encoder"):
        bench.submit("long", [5] * 129)
    with pytest.raises(ContextLengthExceeded, match="max_tokens is 128; 127 fit the decoder"):
        bench.submit("many", [5], max_tokens=128)
    bench.submit("both", [5] * 128, max_tokens=127)
    bench.run()
    assert len(bench.tokens("both")) == 127
    first = bench.events[0][1]
    assert isinstance(first, PromptEvent)
    assert first.prompt_token_ids == (5,) * 128
    assert bench.engine.metrics.prompt_tokens._value.get() == 128


def test_what_is_not_a_prompt_for_an_answer_is_refused() -> None:
    bench = Bench(tiny_seq2seq("t5"), {})
    with pytest.raises(InvalidRequest, match="no log-probabilities"):
        bench.submit("echo", [5], prompt_logprobs=0)
    for task in (Task.EMBEDDING, Task.FILL_MASK):
        with pytest.raises(InvalidRequest):
            bench.pool("pool", [5], task)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bart", {"encoder_no_repeat_ngram_size": 3}, "encoder_no_repeat_ngram_size is 3"),
        ("t5", {"decoder_start_token_id": None}, "decoder_start_token_id"),
    ],
)
def test_rules_that_are_not_executed_are_refused(name: str, changes: dict[str, Any], said: str) -> None:
    model = tiny_model(name)
    for key, value in changes.items():
        setattr(model.generation_config, key, value)
    with pytest.raises(BackboneRefused, match=said):
        Bench(tiny_seq2seq(name, model), {})


def test_a_wrong_forward_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        DistanceBias, "between", lambda self, tokens, places: torch.zeros(4, len(tokens), places.shape[-1])
    )
    with pytest.raises(BackboneRefused, match="differs from the stock one"):
        tiny_seq2seq("t5")
