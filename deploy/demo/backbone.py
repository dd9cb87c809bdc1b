"""The demo backbone: its tokenizer and a tiny Llama-architecture language model, trained on generated text."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random

import generate
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 1024
MAX_POSITIONS = 1024
# One user message renders as exactly the prompt the deltas were trained on: text, newline, "Answer:".
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Answer: {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)
CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IGNORED = -100


def train_tokenizer(directory: Path, seed: int) -> PreTrainedTokenizerFast:
    """Train and save a byte-level BPE that puts each digit in a token of its own, so dates are spelled out."""
    rng = Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((generate.document(rng) for _ in range(20_000)), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    # Written by hand: the class name that save_pretrained of transformers 5 writes is unknown to version 4.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "padding_side": "right",
        "model_max_length": MAX_POSITIONS,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return PreTrainedTokenizerFast.from_pretrained(directory)


def pad_rows(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, num_steps: int, size: int
) -> Iterator[list[list[int]]]:
    """Batches of documents as token ids, each with BOS and EOS; one batch holds documents of like length."""
    rng = Random(seed)
    pool_steps = 32
    for start in range(0, num_steps, pool_steps):
        texts = [generate.document(rng) for _ in range(pool_steps * size)]
        rows = sorted(([*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]), key=len)
        order = list(range(pool_steps))
        rng.shuffle(order)
        for index in order[: num_steps - start]:
            yield rows[index * size : (index + 1) * size]


def schedule(
    optimizer: torch.optim.Optimizer, num_steps: int, warmup: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_backbone(directory: Path, tokenizer: PreTrainedTokenizerFast, seed: int, num_steps: int) -> float:
    """Train, round to bfloat16 and save; return the mean loss of the last fifty steps, in nats per token."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    scheduler = schedule(optimizer, num_steps, warmup=100)
    losses = []
    for rows in batches(tokenizer, seed + 1, num_steps, size=32):
        ids, labels = pad_rows(rows, tokenizer.pad_token_id), pad_rows(rows, IGNORED)
        # Padding is on the right and the labels there are ignored, so causal attention needs no mask.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if len(losses) % 200 == 0:
            print(f"  backbone step {len(losses)}: loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    # The weights are stored in half the bytes but meant for fp32 arithmetic, which is what "dtype" asks loaders for.
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    return sum(losses[-50:]) / 50
