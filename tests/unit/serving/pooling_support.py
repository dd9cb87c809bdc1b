"""A gateway over a real engine of a tiny Llama, and PEFT adapters with task heads to upload to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from adapters.store import LocalBlobStore
from serving.config import Engine as EngineSettings
from serving.engine.backend import LocalBackend
from serving.model.backbone import Backbone, adopt_backbone
from tests.cases import quiet, tiny_backbone
from tests.contract.task_models import HeadCase, task_model
from tests.unit.serving.http_support import FakeBackend, Gateway, gateway

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words of pieces of one letter, between [CLS] and [SEP]."""
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), ".", ","]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@lru_cache
def backbone() -> Backbone:
    """A tiny Llama."""
    return adopt_backbone(
        tiny_backbone("llama"), name="tiny", tokenizer=tokenizer(), device="cpu", dtype="float32"
    )


@asynccontextmanager
async def pooling_gateway(tmp_path: Path, **limits: Any) -> AsyncIterator[Gateway]:
    """The gateway; its backend is an engine of this process."""
    backend = LocalBackend(backbone(), LocalBlobStore(tmp_path / "blobs"), EngineSettings(max_num_seqs=8))
    backend.start()
    try:
        async with gateway(tmp_path, cast(FakeBackend, backend), **limits) as made:
            yield made
    finally:
        await asyncio.to_thread(backend.stop)


class Adapter:
    """One case on disk, uploaded under a name."""

    def __init__(
        self, directory: Path, case: HeadCase, name: str, head: dict[str, Any] | None = None
    ) -> None:
        self.directory = directory / name
        self.case, self.name, self.head = case, name, head
        case.save(self.directory)
        config = self.directory / "adapter_config.json"
        said = json.loads(config.read_text())
        said["base_model_name_or_path"] = "tiny"
        config.write_text(json.dumps(said))

    def files(self, **more: bytes) -> list[tuple[str, tuple[str, bytes]]]:
        names = ("adapter_config.json", "adapter_model.safetensors")
        found = {name: (self.directory / name).read_bytes() for name in names} | more
        if self.head is not None:
            found["head.json"] = json.dumps(self.head).encode()
        return [("file", item) for item in found.items()]

    async def push(self, world: Gateway) -> None:
        answer = await world.http.put(f"/v1/adapters/{self.name}/versions", files=self.files())
        assert answer.status_code == 201, answer.text

    def reference(self, *texts: str | tuple[str, str]) -> list[Tensor]:
        """PEFT's answers."""
        pairs = [(text, None) if isinstance(text, str) else text for text in texts]
        ids = [tokenizer()(*pair)["input_ids"] for pair in pairs]
        return self.case.reference(self.directory, ids)

    @torch.no_grad()
    def features(self, *texts: str) -> Tensor:
        """The last hidden state [n, d] of each text's last token, which the head reads."""
        with quiet():
            base = task_model(self.case.family, self.case.task_type, self.case.num_labels)
            body = PeftModel.from_pretrained(base, str(self.directory)).eval().base_model.model.model
            ids = [torch.tensor([tokenizer()(text)["input_ids"]]) for text in texts]
            return torch.stack([body(input_ids=row).last_hidden_state[0, -1] for row in ids])
