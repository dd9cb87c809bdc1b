"""Deltas of encoder-decoders, mixed with bare rows in one batch, against PEFT and against attention written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from adapters.normal_form import AttnPrefix, Delta, LowRank, Op, VirtualTokens
from serving.engine.runner import Runner
from serving.model.backbone import Backbone
from serving.model.placed_size import max_device_bytes
from serving.model.placement import place
from tests.contract.forced import Row, errors, run
from tests.unit.serving.engine.engine_support import Bench
from tests.unit.serving.engine.seq2seq_support import generated, prompts, tiny_model, tiny_seq2seq

LINEARS = {
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "t5_gated": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}
TOLERANCE = 2e-4


def lora(name: str, backbone: Backbone, seed: int) -> tuple[PreTrainedModel, Delta]:
    """PEFT's model with a random LoRA at all linear layers of both stacks, and that LoRA as a delta."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=LINEARS[name], task_type="SEQ_2_SEQ_LM")
    model: Any = get_peft_model(tiny_model(name), config).eval()
    draw = torch.Generator().manual_seed(seed)
    ops: list[Op] = []
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        A, B = (part["default"].weight for part in (module.lora_A, module.lora_B))
        for weight in (A, B):
            weight.data = 0.3 * torch.randn(weight.shape, generator=draw)
        spec = backbone.spec.by_path[path.removeprefix("base_model.model.")]
        assert spec.read is not None
        ops.append(
            LowRank(read=spec.read, write=spec.writes[0].site, A=A.data, B=B.data, scaling=module.scaling["default"])
        )  # fmt: skip
    assert len(ops) == len({op.write for op in ops if isinstance(op, LowRank)}) > 30
    return model, Delta(method="LORA", ops=tuple(ops), backbone_digest=backbone.spec.digest)


@torch.inference_mode()
def forced(model: Any, source: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """transformers' logits of every token of a decoder's row, in one pass."""
    ids, given = torch.tensor([list(source)]), torch.tensor([list(tokens)])
    logits: Tensor = model(input_ids=ids, decoder_input_ids=given, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("name", LINEARS)
def test_two_loras_and_bare_rows_in_one_batch_equal_peft(name: str) -> None:
    backbone = tiny_seq2seq(name)
    made = {f"d{seed}": lora(name, backbone, seed) for seed in (1, 2)}
    placed = {digest: place(delta, digest, backbone) for digest, (_, delta) in made.items()}
    asked, rows, references = prompts(6), [], []
    for index, source in enumerate(asked):
        digest = [None, "d1", "d2"][index % 3]
        model = tiny_model(name) if digest is None else made[digest][0]
        tokens = [backbone.model.config.decoder_start_token_id, *prompts(9)[8 - index][:9]]
        rows.append(
            Row(
                str(index),
                tokens,
                1 + index,
                None if digest is None else placed[digest],
                source=tuple(source),
            )
        )
        references.append(forced(model, source, tokens))
    run(Runner(backbone, num_slots=6, max_len=32), rows)
    bare = tiny_model(name)
    for row, reference, source in zip(rows, references, asked, strict=True):
        assert max(errors(row, reference)) < TOLERANCE * float(reference.abs().max()), row.name
        if row.delta is not None:
            assert float((forced(bare, source, row.tokens) - reference).abs().max()) > 0.1, "it does nothing"


@pytest.mark.parametrize("name", LINEARS)
def test_greedy_tokens_under_deltas_equal_peft_generate(name: str) -> None:
    backbone = tiny_seq2seq(name)
    made = {f"d{seed}": lora(name, backbone, seed) for seed in (1, 2)}
    bench = Bench(backbone, {digest: delta for digest, (_, delta) in made.items()}, max_num_seqs=5)
    source = prompts(3)[2]
    calls = [
        (str(i), source if i < 3 else prompt, [None, "d1", "d2"][i % 3])
        for i, prompt in enumerate(prompts(8))
    ]
    for call, prompt, digest in calls:
        bench.submit(call, prompt, digest, max_tokens=8, ignore_eos=False)
    bench.run()
    bare = tiny_model(name)
    for call, prompt, digest in calls:
        model = bare if digest is None else made[digest][0]
        assert bench.tokens(call) == generated(model, prompt, 8), (call, digest)
    assert len({tuple(bench.tokens(str(i))) for i in range(3)}) > 1, "the deltas hardly change the output"
    bench.assert_nothing_held(*made)


def test_the_admission_probe_measures_both_stacks() -> None:
    backbone = tiny_seq2seq("bart")
    _, delta = lora("bart", backbone, 1)
    for stack in ("enc", "dec", "dec.cross"):
        ops = tuple(op for op in delta.ops if isinstance(op, LowRank) and op.write.stack == stack)
        part = Delta(method="LORA", ops=ops, backbone_digest=backbone.spec.digest)
        bench = Bench(backbone, {})
        proof = bench.engine.admit(part, stack)
        bench.run(proof.done)
        assert proof.result().effect > 0.01, stack


def prefixes(backbone: Backbone, stacks: Sequence[Any], length: int) -> Delta:
    draw, spec = torch.Generator().manual_seed(5), backbone.spec
    ops = tuple(
        AttnPrefix(
            layer=layer,
            key=torch.randn(length, spec.num_kv_heads, spec.head_dim, generator=draw),
            value=torch.randn(length, spec.num_kv_heads, spec.head_dim, generator=draw),
            stack=stack,
        )
        for stack in stacks
        for layer in range(spec.layers_of(stack))
    )
    return Delta(method="PREFIX_TUNING", ops=ops, backbone_digest=spec.digest)


def written_out(model: PreTrainedModel, delta: Delta) -> PreTrainedModel:
    """`model` with every attention's keys and values behind those of the delta, which all queries see."""
    found = {(op.stack, op.layer): op for op in delta.ops if isinstance(op, AttnPrefix)}
    owner: dict[int, AttnPrefix] = {}
    for path, module in model.named_modules():
        if path.endswith(("self_attn", "encoder_attn")):
            stack: Any = "dec.cross" if path.endswith("encoder_attn") else path.split(".")[1][:3]
            if (stack, module.layer_idx) in found or stack == "enc":
                layer = int(path.split(".")[3])
                if (stack, layer) in found:
                    owner[id(module)] = found[stack, layer]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        scores_mask = torch.zeros(query.shape[2], key.shape[2])
        if module.is_causal:
            scores_mask.fill_(-torch.inf).triu_(1)
        if (op := owner.get(id(module))) is not None:
            key, value = (
                torch.cat([x.transpose(0, 1)[None], y], dim=2) for x, y in ((op.key, key), (op.value, value))
            )
            scores_mask = torch.cat([torch.zeros(query.shape[2], len(op.key)), scores_mask], dim=1)
        weights = torch.softmax(query @ key.transpose(2, 3) * scaling + scores_mask, dim=-1)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("written_out", attend)
    model.set_attn_implementation("written_out")
    assert len(owner) == len(found)
    return model


@pytest.mark.parametrize("stacks", [("enc",), ("dec",), ("dec.cross",), ("enc", "dec", "dec.cross")])
def test_prefixes_of_each_attention_equal_it_written_out(stacks: tuple[str, ...]) -> None:
    backbone = tiny_seq2seq("bart")
    delta = prefixes(backbone, stacks, 4)
    placed = place(delta, "p", backbone)
    assert placed.device_bytes <= max_device_bytes(delta, backbone)
    rows = [
        Row(str(i), [2, *prompt[:7]], 1 + i, placed if i % 2 else None, source=tuple(prompt))
        for i, prompt in enumerate(prompts(5)[1:])
    ]
    run(Runner(backbone, num_slots=4, max_len=40), rows)
    bare, model = tiny_model("bart"), written_out(tiny_model("bart"), delta)
    for row in rows:
        reference = forced(model if row.delta else bare, row.source, row.tokens)
        assert max(errors(row, reference)) < TOLERANCE * float(reference.abs().max())
    changed = forced(model, rows[1].source, rows[1].tokens) - forced(bare, rows[1].source, rows[1].tokens)
    assert float(changed.abs().max()) > 0.1, "they do nothing"


@pytest.mark.parametrize("offset", [0, 4])
def test_a_prefix_moves_t5_by_its_places_and_its_tokens_by_their_positions(offset: int) -> None:
    backbone = tiny_seq2seq("t5")
    delta = replace(prefixes(backbone, ("dec",) if offset else ("enc", "dec"), 4), position_offset=offset)
    placed = place(delta, "p", backbone)
    rows = [
        Row(str(i), [0, *prompt[:7]], 1 + i, placed if i % 2 else None, source=tuple(prompt))
        for i, prompt in enumerate(prompts(5)[1:])
    ]
    run(Runner(backbone, num_slots=4, max_len=40), rows)
    bare, model = tiny_model("t5"), written_out_t5(tiny_model("t5"), delta)
    for row in rows:
        reference = forced(model if row.delta else bare, row.source, row.tokens)
        assert max(errors(row, reference)) < TOLERANCE * float(reference.abs().max())


def written_out_t5(model: PreTrainedModel, delta: Delta) -> PreTrainedModel:
    """`model` with the delta's keys and values first, their places counted, and tokens from its offset on."""
    found = {(op.stack, op.layer): op for op in delta.ops if isinstance(op, AttnPrefix)}

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        **given: Any,
    ) -> tuple[Tensor, None]:
        op = found.get(module.prefix_of) if hasattr(module, "prefix_of") else None
        bias = given["position_bias"]
        causal = torch.zeros(query.shape[2], key.shape[2])
        if op is not None:
            count, length = query.shape[2], len(op.key)
            key, value = (
                torch.cat([x.transpose(0, 1)[None], y], dim=2) for x, y in ((op.key, key), (op.value, value))
            )
            places, start = torch.arange(length + count), delta.position_offset if op.stack == "dec" else 0
            buckets = module._relative_position_bucket(
                places[None] - (torch.arange(count) + start)[:, None], op.stack == "enc", 8, 20
            )
            bias = module.table(buckets).permute(2, 0, 1)
            causal = torch.zeros(count, length + count)
        if getattr(module, "prefix_of", ("",))[0] == "dec":
            causal = torch.full_like(causal, -torch.inf).triu(causal.shape[1] - causal.shape[0] + 1)
        weights = torch.softmax(query @ key.transpose(2, 3) + bias + causal, dim=-1)
        return (weights @ value).transpose(1, 2), None

    for stack, layers in (("enc", model.get_encoder().block), ("dec", model.get_decoder().block)):
        for index, block in enumerate(layers):
            block.layer[0].SelfAttention.prefix_of = (stack, index)
            block.layer[0].SelfAttention.table = layers[0].layer[0].SelfAttention.relative_attention_bias
    AttentionInterface.register("written_out_t5", attend)
    model.set_attn_implementation("written_out_t5")
    return model


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_virtual_tokens_are_read_before_the_prompt(name: str) -> None:
    backbone, model = tiny_seq2seq(name), tiny_model(name)
    virtual = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    delta = Delta(
        method="PROMPT_TUNING",
        ops=(VirtualTokens(embeddings=virtual),),
        backbone_digest=backbone.spec.digest,
    )
    bench = Bench(backbone, {"v": delta})
    asked = prompts(4)
    for index, prompt in enumerate(asked):
        bench.submit(f"v{index}", prompt, "v", ignore_eos=False)
        bench.submit(f"b{index}", prompt, ignore_eos=False)
    bench.run()
    for index, prompt in enumerate(asked):
        with torch.inference_mode():
            read = torch.cat([virtual, model.get_encoder().get_input_embeddings()(torch.tensor(prompt))])
            out = model.generate(  # type: ignore[operator]
                inputs_embeds=read[None],
                attention_mask=torch.ones(1, len(read), dtype=torch.long),
                max_new_tokens=6,
                do_sample=False,
            )
        assert bench.tokens(f"v{index}") == out[0, 1:].tolist()
        assert bench.tokens(f"b{index}") == generated(model, prompt, 6)
    assert any(bench.tokens(f"v{i}") != bench.tokens(f"b{i}") for i in range(4)), "they do nothing"
