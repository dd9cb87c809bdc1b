"""PEFT adapters with task heads on tiny backbones, and what transformers and PEFT make of a prompt through them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from adapters.tasks import Task
from tests.cases import quiet, randomise, tiny_backbone, tiny_body
from tests.families import CONFIGS, ENCODERS, Encoder, Family
from tests.method_table import TARGETS

CLASSES: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
TASK_OF = {
    "SEQ_CLS": Task.SEQUENCE_CLASSIFICATION,
    "TOKEN_CLS": Task.TOKEN_CLASSIFICATION,
    "QUESTION_ANS": Task.QUESTION_ANSWERING,
    "FEATURE_EXTRACTION": Task.EMBEDDING,
}


OWN_HEADS = frozenset({"modernbert"})
"""Families whose task models start from a layer of the language model's head."""


TRAINS_HEAD = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})


def body_of(family: Family | Encoder) -> PreTrainedModel:
    """The body that all tasks of a family share."""
    if family in OWN_HEADS:
        return tiny_backbone(family).base_model
    return tiny_body(family) if family in ENCODERS else tiny_backbone(family).base_model


def task_model(family: Family | Encoder, task_type: str, num_labels: int) -> PreTrainedModel:
    """The model of a task, whose body is that of `body_of`: some encoders' tasks do without its pooler."""
    config = copy.deepcopy(CONFIGS[family])
    config.num_labels = num_labels
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: PreTrainedModel = CLASSES[task_type].from_config(config, attn_implementation="eager")
    found = model.base_model.load_state_dict(body_of(family).state_dict(), strict=False)
    assert not found.missing_keys
    assert all(key.startswith("pooler.") for key in found.unexpected_keys)
    if family in OWN_HEADS and task_type in TRAINS_HEAD:
        model.head.load_state_dict(tiny_backbone(family).head.state_dict())
    return model.eval()


@dataclass(frozen=True)
class HeadCase:
    """One adapter of one task; `saved`: modules to save beside those that PEFT saves by itself."""

    family: Family | Encoder
    method: str
    task_type: str
    num_labels: int = 3
    saved: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join((self.family, self.method, self.task_type, str(self.num_labels), *self.saved))

    @property
    def task(self) -> Task:
        return TASK_OF[self.task_type]

    def config(self) -> PeftConfig:
        made = self._config()
        made.modules_to_save = [*self.saved] or None
        return made

    def _config(self) -> PeftConfig:
        targets = TARGETS[self.family]
        match self.method:
            case "lora":
                return LoraConfig(task_type=self.task_type, r=4, lora_alpha=6, target_modules=targets.linears)
            case "ia3":
                return IA3Config(
                    task_type=self.task_type,
                    target_modules=targets.linears,
                    feedforward_modules=list(targets.feedforward),
                )
            case "ln_tuning":
                return LNTuningConfig(task_type=self.task_type, target_modules=list(targets.norms))
            case "prefix_tuning":
                return PrefixTuningConfig(task_type=self.task_type, num_virtual_tokens=5, **targets.prompt)
            case _:
                return PromptTuningConfig(task_type=self.task_type, num_virtual_tokens=4, **targets.prompt)

    def save(self, directory: Path) -> None:
        """As a training script leaves it, every tensor of adapter and head redrawn."""
        with quiet():
            adapted = get_peft_model(task_model(self.family, self.task_type, self.num_labels), self.config())
            randomise(adapted, sum(map(ord, self.name)), 0.4)
            adapted.save_pretrained(str(directory))

    @torch.no_grad()
    def reference(self, directory: Path, prompts: Sequence[list[int]]) -> list[Tensor]:
        """PEFT's answer per prompt, batch 1: logits [C] or [T, C], spans [T, 2], or the normalised mean [d]."""
        with quiet():
            base = task_model(self.family, self.task_type, self.num_labels)
            model = PeftModel.from_pretrained(base, str(directory)).eval()
            found = []
            for prompt in prompts:
                out = model(input_ids=torch.tensor([prompt]))
                match self.task_type:
                    case "SEQ_CLS":
                        found.append(out.logits[0])
                    case "TOKEN_CLS":
                        found.append(out.logits[0, -len(prompt) :])
                    case "QUESTION_ANS":
                        spans = torch.stack([out.start_logits[0], out.end_logits[0]], dim=-1)
                        found.append(spans[-len(prompt) :])
                    case _:
                        mean = out.last_hidden_state[0, -len(prompt) :].mean(dim=0)
                        found.append(torch.nn.functional.normalize(mean, dim=0))
        return found


@lru_cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """Prompts of several lengths; one ends in pads (token 0), one is a single token. None has RoBERTa's pad, 1."""
    draw = torch.Generator().manual_seed(7)
    rows = [torch.randint(2, 97, (length,), generator=draw).tolist() for length in (9, 1, 17, 4)]
    return (*map(tuple, rows), (5, 8, 0, 0))
