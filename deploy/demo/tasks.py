"""What all three deltas share, in either library: how a case becomes token ids, a training loop, and scoring."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from backbone import IGNORED, pad_rows, schedule
from generate import Case, heldout_cases, note, pick, review, ticket
from transformers import PreTrainedTokenizerBase

MODEL_NAME = "deltamux-demo"  # what the saved configs call the backbone, in place of a local path
HELDOUT_SEED, NUM_HELDOUT = 900, 80


@dataclass(frozen=True)
class Task:
    """One delta's task; `max_tokens` leaves room for the longest answer and its end-of-sequence token."""

    delta: str
    method: str
    make: Callable[[Random], Case]
    seed: int
    num_steps: int
    learning_rate: float
    max_tokens: int

    def heldout(self) -> list[Case]:
        return heldout_cases(self.make, HELDOUT_SEED + self.seed, NUM_HELDOUT)


SENTIMENT = Task("sentiment-lora", "lora", review, 1, 100, 2e-3, 4)
TICKETS = Task("tickets-prefix", "prefix-tuning", ticket, 2, 250, 3e-3, 4)
DATES = Task("dates-bottleneck", "bottleneck", note, 3, 150, 2e-3, 16)
TASKS = (SENTIMENT, TICKETS, DATES)


def encode(tokenizer: PreTrainedTokenizerBase, case: Case) -> tuple[list[int], list[int]]:
    """Token ids of prompt, answer and EOS, and labels that score only the last two."""
    prompt = tokenizer(case.prompt)["input_ids"]
    answer = tokenizer(" " + case.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def train_delta(
    model: Any, parameters: Iterable[torch.nn.Parameter], tokenizer: PreTrainedTokenizerBase, task: Task
) -> None:
    """Fit the given parameters to the task's answers, 32 fresh cases a step."""
    rng = Random(task.seed)
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0)
    scheduler = schedule(optimizer, task.num_steps, warmup=20)
    model.train()
    losses = []
    for step in range(task.num_steps):
        rows = [encode(tokenizer, pick(task.make, rng)) for _ in range(32)]
        ids = pad_rows([row for row, _ in rows], tokenizer.pad_token_id)
        mask = pad_rows([[1] * len(row) for row, _ in rows], 0)
        labels = pad_rows([row for _, row in rows], IGNORED)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"  {task.delta} step {step + 1}: loss {sum(losses[-50:]) / 50:.4f}", flush=True)
    model.eval()


def greedy(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_tokens: int, use_cache: bool
) -> tuple[str, float]:
    """The library's own greedy continuation of a prompt, and the least gap between its two best logits."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
    new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    best = torch.stack([step[0] for step in output.logits]).float().topk(2, dim=-1).values
    return tokenizer.decode(new_ids, skip_special_tokens=True), (best[:, 0] - best[:, 1]).min().item()


def evaluate(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, use_cache: bool = True
) -> dict[str, Any]:
    """Decode the task's held-out cases one at a time; exact match after stripping counts as correct."""
    model.eval()
    prompts, margins = [], []
    for case in task.heldout():
        text, margin = greedy(model, tokenizer, case.prompt, task.max_tokens, use_cache)
        prompts.append({"prompt": case.prompt, "expected": case.answer, "reference": text})
        margins.append(margin)
    correct = sum(entry["reference"].strip() == entry["expected"] for entry in prompts)
    return {
        "prompts": prompts,
        "offline_correct": correct,
        "offline_accuracy": correct / len(prompts),
        "least_margin": round(min(margins), 4),
    }
