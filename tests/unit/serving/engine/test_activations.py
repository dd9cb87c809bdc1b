"""Activated neurons of a delta are those of the stock model, whatever else the engine holds."""

from __future__ import annotations

import numpy as np
import torch

from adapters.normal_form import VirtualTokens
from serving.engine.effect import probe_tokens
from tests.cases import tiny_backbone
from tests.unit.serving.engine.engine_support import Bench, low_rank, prompt_tuning, tiny
from tests.unit.serving.engine.test_engine import result_of


def stock(prompt: torch.Tensor, tokens: torch.Tensor) -> bytes:
    """The same bits from transformers' own forward."""
    model = tiny_backbone("llama")
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    embedded = torch.cat([prompt, model.get_input_embeddings()(tokens)])
    with torch.no_grad():
        model(inputs_embeds=embedded[None], use_cache=False)
    bits = torch.cat([x[len(prompt) :].mean(dim=0) > 0 for x in seen])
    return np.packbits(bits.numpy()).tobytes()


def test_a_prompts_activations_are_those_of_the_stock_model() -> None:
    backbone = tiny()
    bench = Bench(backbone, {})
    deltas = [prompt_tuning(backbone, seed) for seed in (1, 2)]
    got = [result_of(bench.engine.find_activations(delta, str(n)), bench) for n, delta in enumerate(deltas)]
    for delta, bits in zip(deltas, got, strict=True):
        (op,) = delta.ops
        assert isinstance(op, VirtualTokens)
        assert bits == stock(op.embeddings, probe_tokens(backbone.spec.vocab_size))
    assert got[0] != got[1]
    assert result_of(bench.engine.find_activations(deltas[0], "0"), bench) == got[0]  # resident now
    bench.assert_nothing_held("0", "1")


def test_looking_leaves_no_hook_and_no_lease_behind_and_requests_run_on() -> None:
    backbone = tiny()
    deltas = {"d": low_rank(backbone, 1)}
    alone = Bench(backbone, deltas)
    alone.submit("a", [1, 2, 3], "d")
    alone.run()
    bench = Bench(backbone, deltas)
    bench.submit("a", [1, 2, 3], "d")
    found = bench.engine.find_activations(deltas["d"], "d")
    bench.run()
    assert found.result() != bytes(len(found.result()))
    assert bench.tokens("a") == alone.tokens("a")
    assert not any(module._forward_pre_hooks for module in backbone.model.modules())
    bench.assert_nothing_held("d")
