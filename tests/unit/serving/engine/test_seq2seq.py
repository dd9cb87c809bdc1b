"""Encoder-decoders in the engine: what transformers' `generate` gives row by row, in one running batch."""

from __future__ import annotations

import pytest

from tests.unit.serving.engine.engine_support import Bench
from tests.unit.serving.engine.seq2seq_support import CONFIGS, generated, prompts, tiny_model, tiny_seq2seq


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_of_ragged_prompts_equal_generate(name: str) -> None:
    model = tiny_model(name)
    bench = Bench(tiny_seq2seq(name), {}, max_num_seqs=4)
    asked = prompts(9)
    for index, prompt in enumerate(asked):
        bench.submit(str(index), prompt, max_tokens=3 + 2 * index, ignore_eos=False)
    bench.run()
    expected = [generated(model, prompt, 3 + 2 * index) for index, prompt in enumerate(asked)]
    assert [bench.tokens(str(index)) for index in range(len(asked))] == expected
    assert len({tuple(tokens) for tokens in expected}) > 4, "the prompts hardly change the output"
    assert any(len(set(tokens)) > 2 for tokens in expected), "the outputs hardly move"
