"""Loading a frozen backbone: weights, tokenizer, digest, spec and the load-time parity probe."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Conv1D,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adapters.backbone_spec import BackboneSpec, ModuleShape
from adapters.errors import BackboneRefused
from adapters.site_maps import build_spec
from serving.model.attention import ATTENTION_NAME
from serving.model.context import ForwardContext, forward_context
from serving.model.kv_cache import RowSpan, SlotKVCache
from serving.model.sites import install_sites

PROBE_LENGTHS = (5, 1, 11, 3)
"""Ragged rows of the parity probe."""

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted |flattened - stock| logit, relative to max(1, max|stock logit|)."""

VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation")


@dataclass(eq=False)
class Backbone:
    """A frozen model on its device, with every site hooked and attention redirected to the KV cache."""

    model: PreTrainedModel
    spec: BackboneSpec
    tokenizer: PreTrainedTokenizerBase | None
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    parity_error: float

    @property
    def logit_modules(self) -> frozenset[int]:
        """Indices of the modules that see only the rows whose logits are wanted."""
        return frozenset(i for i, m in enumerate(self.spec.modules) if m.writes[0].site.name == "logits")

    def new_cache(self, num_slots: int, max_len: int) -> SlotKVCache:
        """A KV cache that fits this backbone."""
        spec = self.spec
        return SlotKVCache(
            num_layers=spec.num_layers,
            num_slots=num_slots,
            num_kv_heads=spec.num_kv_heads,
            num_heads=spec.num_heads,
            head_dim=spec.head_dim,
            max_len=max_len,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, context: ForwardContext, logits_rows: Tensor | None
    ) -> Tensor:
        """One pass of the unmodified model over a flattened batch.

        Shapes: tokens [T] ids or [T, d] embeddings, positions [T], logits_rows [R] -> logits [R, V] fp32.
        `logits_rows` None means that only the KV cache is wanted: returns an empty tensor.
        """
        inputs = {"input_ids" if tokens.dim() == 1 else "inputs_embeds": tokens[None]}
        keep = torch.zeros(1, dtype=torch.long, device=self.device) if logits_rows is None else logits_rows
        with forward_context(context):
            out = self.model(**inputs, position_ids=positions[None], use_cache=False, logits_to_keep=keep)
        if context.attention.num_attended != self.spec.num_layers:
            raise BackboneRefused(
                f"{context.attention.num_attended} of {self.spec.num_layers} layers attended through the KV cache.",
                param="backbone",
            )
        logits: Tensor = out.logits[0].float()
        return logits if logits_rows is not None else logits[:0]


def load_backbone(
    source: str, *, name: str | None = None, device: str = "auto", dtype: str = "auto"
) -> Backbone:
    """Load a transformers causal LM from a directory or hub id.

    `dtype` auto: bfloat16 on CUDA, float32 on CPU. Raises BackboneRefused with the reason.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise BackboneRefused(
            f"The backbone can't be loaded: {str(error).splitlines()[0]}",
            param="backbone",
            remedy="Give a directory or hub id that AutoModelForCausalLM and AutoTokenizer load.",
        ) from error
    label = name or Path(source).name
    names = tuple(dict.fromkeys((label, source, Path(source).name, config.name_or_path or label)))
    return adopt_backbone(model, name=label, names=names, tokenizer=tokenizer, device=device, dtype=dtype)


def adopt_backbone(
    model: PreTrainedModel,
    *,
    name: str,
    names: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Backbone:
    """Take over a loaded model: freeze, hash, cast, hook, and prove that the flattened path equals the stock one.

    The model is changed in place and must not be used by others afterwards.
    """
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    served = (
        getattr(torch, dtype)
        if dtype != "auto"
        else (torch.bfloat16 if place.type == "cuda" else torch.float32)
    )
    model.eval().requires_grad_(requires_grad=False)
    digest = backbone_digest(model)
    _own_config(model)
    config = model.config
    model.to(device=place, dtype=served)
    spec = build_spec(
        {
            **config.to_dict(),
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "max_position_embeddings": config.max_position_embeddings,
        },
        lambda path: _shape_of(model.get_submodule(path)),
        name=name,
        digest=digest,
        names=tuple(names) or (name,),
    )
    stock = _stock_probe(model, spec)
    model.set_attn_implementation(ATTENTION_NAME)
    install_sites(model, spec)
    backbone = Backbone(model, spec, tokenizer, _eos_ids(model), place, served, parity_error=0.0)
    backbone.parity_error = _parity_error(backbone, stock)
    return backbone


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a configuration of its own.

    transformers models built from one config object share it, and each writes its attention implementation there:
    another model would silently switch ours away from the KV cache.
    """
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def backbone_digest(model: PreTrainedModel) -> str:
    """sha256 over the configuration that shapes the numbers and every tensor (name, dtype, shape, bytes), as loaded."""
    total = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE_CONFIG}
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _shape_of(module: nn.Module) -> ModuleShape:
    has_bias = getattr(module, "bias", None) is not None
    match module:
        case nn.Linear():
            return ModuleShape("linear", module.in_features, module.out_features, has_bias)
        case Conv1D():
            return ModuleShape("conv1d", module.nx, module.nf, has_bias)
        case nn.Embedding():
            return ModuleShape("embedding", module.num_embeddings, module.embedding_dim, has_bias=False)
        case _ if isinstance(weight := getattr(module, "weight", None), Tensor):
            return ModuleShape("norm", weight.shape[0], weight.shape[0], has_bias)
    width = next(p for n, p in module.named_parameters() if "norm" in n or n.startswith("ln_")).shape[0]
    return ModuleShape("layer", width, width, has_bias=False)


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    raw = model.generation_config.eos_token_id if model.generation_config else None
    raw = raw if raw is not None else model.config.eos_token_id
    return frozenset([raw] if isinstance(raw, int) else raw or [])


def _probe_tokens(spec: BackboneSpec) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, spec.vocab_size, (length,), generator=draw) for length in PROBE_LENGTHS]


@torch.inference_mode()
def _stock_probe(model: PreTrainedModel, spec: BackboneSpec) -> list[Tensor]:
    """Logits of every position of the probe rows, one stock forward a row."""
    return [
        model(input_ids=row[None].to(model.device), use_cache=False).logits[0].float()
        for row in _probe_tokens(spec)
    ]


def _parity_error(backbone: Backbone, stock: Sequence[Tensor]) -> float:
    """Largest relative logit difference, flattened against stock, prefilled in two chunks. Raises BackboneRefused."""
    rows = [row.to(backbone.device) for row in _probe_tokens(backbone.spec)]
    cache = backbone.new_cache(len(rows), max(PROBE_LENGTHS))
    halves: list[list[Tensor]] = [[] for _ in rows]
    for first in (True, False):
        spans, tokens, positions, start = [], [], [], 0
        for slot, row in enumerate(rows):
            cut = (len(row) + 1) // 2
            low, high = (0, cut) if first else (cut, len(row))
            if low == high:
                continue
            spans.append(RowSpan(start, start + high - low, slot, low))
            tokens.append(row[low:high])
            positions.append(torch.arange(low, high, device=backbone.device))
            start += high - low
        context = ForwardContext([None] * len(backbone.spec.modules), cache.plan(spans))
        every = torch.arange(start, device=backbone.device)
        logits = backbone.forward(torch.cat(tokens), torch.cat(positions), context, every)
        for span in spans:
            halves[span.slot].append(logits[span.start : span.stop])
    ours = torch.cat([torch.cat(parts) for parts in halves])
    reference = torch.cat(list(stock))
    error = float((ours - reference).abs().max() / reference.abs().max().clamp(min=1.0))
    limit = TOLERANCE[backbone.dtype]
    if not error <= limit:
        raise BackboneRefused(
            f"The flattened forward of {backbone.spec.model_type!r} differs from the stock one by {error:.2e} of the "
            f"logit scale, limit {limit:.0e}.",
            param="backbone",
            remedy="This architecture or option is not served exactly yet.",
        )
    return error
