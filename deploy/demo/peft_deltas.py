"""The two deltas trained by PEFT on the frozen backbone: a LoRA and a prefix."""

import json
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from tasks import MODEL_NAME, Task, evaluate, train_delta
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LORA = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
# The projection is only for training, which fails without it on so small a model; PEFT saves what it evaluates to.
PREFIX = PrefixTuningConfig(
    task_type=TaskType.CAUSAL_LM, num_virtual_tokens=16, prefix_projection=True, encoder_hidden_size=256
)


def load_backbone(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def save(model: PeftModel, directory: Path) -> None:
    """Save without model card, local path or set order: the same training writes the same bytes."""
    model.peft_config["default"].base_model_name_or_path = MODEL_NAME
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train_and_score(
    backbone: Path, tokenizer: PreTrainedTokenizerFast, task: Task, config: PeftConfig, directory: Path
) -> dict[str, Any]:
    """Train one delta, save it, and score what PEFT loads back from disk."""
    torch.manual_seed(task.seed)
    model = get_peft_model(load_backbone(backbone), config)
    train_delta(model, [p for p in model.parameters() if p.requires_grad], tokenizer, task)
    save(model, directory)
    loaded = PeftModel.from_pretrained(load_backbone(backbone), directory)
    return {"library": f"peft {peft.__version__}", **evaluate(loaded, tokenizer, task)}
