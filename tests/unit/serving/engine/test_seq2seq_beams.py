"""Beam search on encoder-decoders: what `generate` finds for each prompt alone, with the backbone's own rules.

Prompts have more than one token: with nothing else to attend to, a tiny BART repeats itself, and where the one other
token stands makes no difference to a hypothesis' worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor

from adapters.formats import read_directory
from adapters.normal_form import Delta
from serving.core import BeamParams
from serving.engine.prefix_cache import BLOCK_TOKENS
from serving.model.backbone import Backbone
from serving.model.weight_block import whole_pages
from tests.cases import quiet, randomise
from tests.unit.serving.engine.engine_support import Bench
from tests.unit.serving.engine.seq2seq_support import CONFIGS, prompts, tiny_model, tiny_seq2seq
from tests.unit.serving.engine.test_seq2seq_deltas import lora

MAX_TOKENS = 10
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"length_penalty": 2.0, "early_stopping": True},
    {"length_penalty": -0.5, "early_stopping": "never"},
)


PLAIN: dict[str, Any] = {"length_penalty": 1.0, "early_stopping": False}


def prefix(name: str, backbone: Backbone, seed: int, directory: Path) -> tuple[PeftModel, Delta]:
    """PEFT's model with random prefixes, and what the server reads of them."""
    sizes = {
        "num_layers": backbone.spec.num_layers,
        "token_dim": backbone.spec.num_heads * backbone.spec.head_dim,
    }
    config = PrefixTuningConfig(num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM", **sizes)
    with quiet():
        model = get_peft_model(tiny_model(name), config).eval()
        randomise(model, seed, 1.0)
        model.save_pretrained(str(directory))
    return model, read_directory(directory, backbone.spec)


@torch.inference_mode()
def searched(model: Any, prompt: Sequence[int], **options: Any) -> list[list[int]]:
    """The four hypotheses of transformers, without the decoder's first token and the padding."""
    out = model.generate(
        input_ids=torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        num_beams=4,
        num_return_sequences=4,
        **options,
    )
    eos = model.generation_config.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in out[:, 1:].tolist()]


def ask(bench: Bench, name: str, prompt: Sequence[int], digest: str | None = None, **beams: Any) -> None:
    params = BeamParams(width=4, num_returned=4, **beams)
    bench.submit(name, prompt, digest, beams=params, max_tokens=MAX_TOKENS, ignore_eos=False)


def found(bench: Bench, name: str) -> list[list[int]]:
    end = bench.terminal(name)
    assert end.hypotheses, end.error
    return [list(hypothesis.token_ids) for hypothesis in end.hypotheses]


@pytest.mark.parametrize("name", CONFIGS)
def test_hypotheses_of_ragged_prompts_equal_generate(name: str) -> None:
    model, bench = tiny_model(name), Bench(tiny_seq2seq(name), {})
    calls = {
        f"{at} {settings}": (prompt, settings)
        for at, prompt in enumerate(prompts(5)[1:])
        for settings in SETTINGS
    }
    for call, (prompt, settings) in calls.items():
        ask(bench, call, prompt, **settings)
    bench.run()
    answers = {call: found(bench, call) for call in calls}
    for call, (prompt, settings) in calls.items():
        options = {"length_penalty": 1.0, "early_stopping": False} | settings
        assert answers[call] == searched(model, prompt, **options), call
    assert len({tuple(answer[0]) for answer in answers.values()}) > 1, "the prompts hardly change the output"
    bench.assert_nothing_held()


@pytest.mark.parametrize("name", ["bart", "t5_gated"])
def test_searches_under_mixed_deltas_equal_peft_and_go_on_after_preemption(name: str) -> None:
    backbone = tiny_seq2seq(name)
    made = {f"d{seed}": lora(name, backbone, seed) for seed in (1, 2)}
    models = {None: tiny_model(name)} | {digest: model for digest, (model, _) in made.items()}
    deltas = {digest: delta for digest, (_, delta) in made.items()}
    calls = [(str(at), prompt, [None, "d1", "d2"][at % 3]) for at, prompt in enumerate(prompts(7)[1:])]
    calm = Bench(backbone, deltas)
    block = BLOCK_TOKENS * calm.engine.runner.cache.entry_bytes
    placed = sum(whole_pages(delta.size_bytes) for delta in deltas.values())
    tight = Bench(backbone, deltas, memory_bytes=14 * block + placed)
    for bench in (calm, tight):
        for call, prompt, digest in calls:
            ask(bench, call, prompt, digest)
            bench.submit(f"greedy {call}", prompt, digest, max_tokens=MAX_TOKENS)
        bench.run()
        bench.assert_nothing_held(*made)
        for call, prompt, digest in calls:
            expected = searched(models[digest], prompt, length_penalty=1.0, early_stopping=False)
            assert found(bench, call) == expected, (call, digest)
    assert tight.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("name", ["bart", "t5_gated"])
def test_32_searches_with_loras_and_prefixes_in_one_batch_equal_peft(name: str, tmp_path: Path) -> None:
    backbone = tiny_seq2seq(name)
    made = {f"lora {seed}": lora(name, backbone, seed) for seed in (1, 2)}
    made |= {f"prefix {seed}": prefix(name, backbone, seed, tmp_path / str(seed)) for seed in (3, 4)}
    models = {None: tiny_model(name)} | {digest: model for digest, (model, _) in made.items()}
    digests = [None, *made]
    calls = [(str(at), prompt, digests[at % 5]) for at, prompt in enumerate(prompts(40)) if len(prompt) > 1][
        :32
    ]
    bench = Bench(backbone, {digest: delta for digest, (_, delta) in made.items()}, max_num_seqs=128)
    for call, prompt, digest in calls:
        ask(bench, call, prompt, digest)
    bench.run()
    wanted = {call: searched(models[digest], prompt, **PLAIN) for call, prompt, digest in calls}
    assert {call: found(bench, call) for call in wanted} == wanted
    bare = {call: searched(models[None], prompt, **PLAIN) for call, prompt, _ in calls}
    assert all(bare[call] != wanted[call] for call, _, digest in calls if digest is not None)


def test_the_encoder_reads_the_prompt_of_a_search_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    encode = Backbone.encode

    def counted(self: Backbone, tokens: Tensor, *args: Any) -> None:
        read.append(len(tokens))
        encode(self, tokens, *args)

    backbone = tiny_seq2seq("bart")
    monkeypatch.setattr(Backbone, "encode", counted)
    bench = Bench(backbone, {})
    ask(bench, "a", prompts(4)[3])
    bench.run()
    assert read == [len(prompts(4)[3])]
