"""A tiny random backbone, deltas that PEFT saved, and what transformers and PEFT generate with them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BACKBONE = "tiny"
CONTEXT = 1024
NUM_TOKENS = 16
PROMPTS = ("hello", "one frozen backbone", "many deltas,", "one batch", "0123456789" * 4, "?")
DELTAS: dict[str, PeftConfig] = {
    "lora-a": LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "lora-b": LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules=["o_proj", "gate_proj"]),
    "prefix": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
}


@dataclass(frozen=True)
class World:
    """Files on disk, and what the reference libraries generate greedily: (delta or BACKBONE, prompt) -> tokens."""

    root: Path
    reference: dict[tuple[str, str], list[int]]

    @property
    def backbone(self) -> Path:
        return self.root / BACKBONE

    def delta(self, name: str) -> Path:
        return self.root / "deltas" / name


def make_world(root: Path) -> World:
    """Write a backbone and the deltas below `root`, and ask the reference libraries what they generate."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(root / BACKBONE)
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    redraw(base, 0.2)
    base.save_pretrained(root / BACKBONE)
    reference = {(BACKBONE, prompt): greedy(base, tokenizer, prompt) for prompt in PROMPTS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about hub configs and caches
        for seed, (name, config) in enumerate(DELTAS.items()):
            torch.manual_seed(seed + 1)
            model = get_peft_model(LlamaForCausalLM.from_pretrained(root / BACKBONE), config)
            redraw(model, 0.3, only=("lora_", "prompt_encoder"))
            model.save_pretrained(root / "deltas" / name)
            fresh = LlamaForCausalLM.from_pretrained(root / BACKBONE, attn_implementation="eager")
            loaded = PeftModel.from_pretrained(fresh, root / "deltas" / name).eval()
            reference |= {(name, prompt): greedy(loaded, tokenizer, prompt) for prompt in PROMPTS}
    return World(root, reference)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: nothing to train, and every id prints."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    return made


def redraw(model: torch.nn.Module, sigma: float, only: tuple[str, ...] = ("",)) -> None:
    """New random weights, large enough that greedy choices are not near ties and deltas have an effect."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and any(part in name for part in only):
            parameter.data = sigma * torch.randn(parameter.shape)


@torch.inference_mode()
def greedy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Whole forwards without a cache, past any end of sequence: nothing to go wrong."""
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(NUM_TOKENS):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -NUM_TOKENS:].tolist()
