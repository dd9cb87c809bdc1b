"""Ten adapters of five PEFT methods with task heads on one encoder, as a training script would leave them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    PreTrainedModel,
)

from adapters.tasks import Task

SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
             "vocab_size": 512, "max_position_embeddings": 192},
    "22m": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
            "vocab_size": 30522, "max_position_embeddings": 512},
}  # fmt: skip
"""`22m` is the size of MiniLM-L6."""

_CLASSES: Mapping[str, tuple[Task, Any]] = {
    "SEQ_CLS": (Task.SEQUENCE_CLASSIFICATION, AutoModelForSequenceClassification),
    "TOKEN_CLS": (Task.TOKEN_CLASSIFICATION, AutoModelForTokenClassification),
    "FEATURE_EXTRACTION": (Task.EMBEDDING, AutoModel),
}


@dataclass(frozen=True)
class TaskAdapter:
    """One adapter: its method, PEFT's task type, and how many labels its head has."""

    method: str
    task_type: str
    num_labels: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.task_type.lower()}-{self.num_labels}".replace("_", "-")

    @property
    def task(self) -> Task:
        return _CLASSES[self.task_type][0]

    def config(self) -> PeftConfig:
        match self.method:
            case "lora":
                return LoraConfig(task_type=self.task_type, r=16, target_modules=["query", "value", "dense"])
            case "ia3":
                return IA3Config(
                    task_type=self.task_type,
                    target_modules=["key", "value", "output.dense"],
                    feedforward_modules=["output.dense"],
                )
            case "prefix":
                return PrefixTuningConfig(task_type=self.task_type, num_virtual_tokens=8)
            case "prompt":
                return PromptTuningConfig(task_type=self.task_type, num_virtual_tokens=8)
            case _:
                return LNTuningConfig(task_type=self.task_type, target_modules=["LayerNorm"])


ADAPTERS: Sequence[TaskAdapter] = (
    TaskAdapter("lora", "SEQ_CLS", 2),
    TaskAdapter("lora", "SEQ_CLS", 50),
    TaskAdapter("ia3", "SEQ_CLS", 3),
    TaskAdapter("ia3", "FEATURE_EXTRACTION", 0),
    TaskAdapter("prefix", "SEQ_CLS", 7),
    TaskAdapter("prefix", "TOKEN_CLS", 9),
    TaskAdapter("prompt", "SEQ_CLS", 3),
    TaskAdapter("prompt", "FEATURE_EXTRACTION", 0),
    TaskAdapter("layernorm", "TOKEN_CLS", 5),
    TaskAdapter("layernorm", "SEQ_CLS", 2),
)


def body(source: str) -> PreTrainedModel:
    """The encoder at a directory, or a random one of `SIZES`."""
    if source not in SIZES:
        model: PreTrainedModel = AutoModel.from_pretrained(source, attn_implementation="sdpa")
        return model.eval()
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES[source])).eval()


def task_model(source: PreTrainedModel, adapter: TaskAdapter) -> PreTrainedModel:
    """The model of the adapter's task; its body shares the tensors of `source`."""
    config = copy.deepcopy(source.config)
    config.num_labels = max(1, adapter.num_labels)
    torch.manual_seed(1)
    model: PreTrainedModel = _CLASSES[adapter.task_type][1].from_config(config)
    shared = {name: tensor for name, tensor in source.state_dict().items() if _has(model, name)}
    model.base_model.load_state_dict(shared, assign=True)
    return model.eval()


def _has(model: PreTrainedModel, name: str) -> bool:
    return name in model.base_model.state_dict()


def save(source: PreTrainedModel, adapter: TaskAdapter, directory: Path) -> None:
    """Train nothing: every tensor of adapter and head is drawn at random, and saved as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(task_model(source, adapter), adapter.config())
        draw = torch.Generator().manual_seed(sum(map(ord, adapter.name)))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = 0.2 * torch.randn(parameter.shape, generator=draw)
                around_start = "ia3" in name or "ln_tuning" in name
                parameter.data = parameter.data * (1 + noise) if around_start else noise
        adapted.save_pretrained(str(directory))


def load(source: PreTrainedModel, adapter: TaskAdapter, directory: Path) -> PeftModel:
    """PEFT's model of a saved adapter, its body shared with `source`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(task_model(source, adapter), str(directory)).eval()


@torch.inference_mode()
def answer(model: PeftModel, adapter: TaskAdapter, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """PEFT's answers to prompts in one right-padded batch: scores [C] or [T, C], or the normalised mean [d]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
    out = model(input_ids=ids, attention_mask=mask)
    if adapter.task is Task.SEQUENCE_CLASSIFICATION:
        return list(out.logits)
    states = out.last_hidden_state if adapter.task is Task.EMBEDDING else out.logits
    states = states[:, -longest:]  # virtual tokens stand in front
    rows = [row[: len(prompt)] for row, prompt in zip(states, prompts, strict=True)]
    if adapter.task is Task.TOKEN_CLASSIFICATION:
        return rows
    return [torch.nn.functional.normalize(row.mean(dim=0), dim=0) for row in rows]
