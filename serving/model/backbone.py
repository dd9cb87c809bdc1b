"""Loading a frozen backbone: weights, tokenizer, digest, spec; proved by the probe of `parity`."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Conv1D,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adapters.backbone_spec import BackboneSpec, ModuleShape
from adapters.errors import BackboneRefused
from adapters.site_maps import COMMON_NAMES, build_spec
from adapters.site_maps_encoders import ENCODER_MAPS
from adapters.site_maps_seq2seq import SEQ2SEQ_MAPS
from serving.kernels.ops import Kernels
from serving.kernels.select import Choice, select_kernels
from serving.model.context import ForwardContext
from serving.model.cross_cache import CrossCache
from serving.model.encoder import BareEncoder, RowStore, install_replay, load_encoder, masked_logits, pooled
from serving.model.encoder_parity import prove_encoder, stock_rows
from serving.model.kv_cache import KVShape, SlotKVCache
from serving.model.layout import Flattened, Layout, takes
from serving.model.packed import pack_linears
from serving.model.parity import choose_layout, stock_probe
from serving.model.seq2seq import EncoderDecoder, SourceRow
from serving.model.seq2seq_parity import prove_seq2seq, stock_pairs
from serving.model.sites import install_sites

VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation")


@dataclass(eq=False)
class Backbone:
    """A frozen model on its device, with every site hooked and keys and values redirected to the KV cache.

    `kernels` run the deltas and, flattened, the attention of single tokens. An encoder has no head where its
    checkpoint has none.
    """

    model: PreTrainedModel | BareEncoder
    spec: BackboneSpec
    tokenizer: PreTrainedTokenizerBase | None
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    kernels: Kernels
    layout: Layout
    parity_error: float

    @property
    def logit_modules(self) -> frozenset[int]:
        """Indices of the modules that see only wanted rows: those of language model heads and poolers."""
        return frozenset(
            i for i, m in enumerate(self.spec.modules) if m.writes[0].site.name in ("logits", "pooled")
        )

    def new_cache(self, num_slots: int, max_len: int) -> SlotKVCache | CrossCache | RowStore:
        """A KV cache that fits this backbone; what an encoder has instead."""
        spec = self.spec
        if spec.kind == "encoder":
            return RowStore(num_slots, max_len)
        kind = CrossCache if spec.kind == "encoder-decoder" else SlotKVCache
        return kind(
            KVShape(spec.num_layers, spec.num_kv_heads, spec.num_heads, spec.head_dim),
            num_slots=num_slots,
            max_len=max_len,
            dtype=self.dtype,
            device=self.device,
            decode=self.kernels.decode,
        )

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, context: ForwardContext, logits_rows: Tensor | None
    ) -> Tensor:
        """One pass of the unmodified model over a flattened batch.

        Shapes: tokens [T] ids or [T, d] embeddings, positions [T], logits_rows [R] -> logits [R, V] fp32.
        `logits_rows` None means that only the KV cache or `context.hidden` is wanted: returns an empty tensor.
        """
        if self.spec.first_position:
            positions = positions + self.spec.first_position
        logits = self.layout.forward(self.model, tokens, positions, context, logits_rows).float()
        if (count := len(context.attention.attended)) != self.spec.num_layers:
            raise BackboneRefused(
                f"{count} of {self.spec.num_layers} layers attended through the KV cache.",
                param="backbone",
            )
        return logits if logits_rows is not None else logits[:0]

    @torch.inference_mode()
    def encode(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: ForwardContext,
        cache: CrossCache,
        rows: Sequence[SourceRow],
    ) -> None:
        """One pass of an encoder-decoder's encoder; see `EncoderDecoder.encode`."""
        assert isinstance(self.layout, EncoderDecoder), "only encoder-decoders read before they generate"
        self.layout.encode(self.model, tokens, positions, context, cache, rows)

    @property
    def takes_token_types(self) -> bool:
        """True for an encoder that tells the two texts of a prompt apart by a type of its tokens."""
        types = getattr(self.model.config, "type_vocab_size", 0)
        return self.spec.kind == "encoder" and types > 1 and takes(self.model.base_model, "token_type_ids")

    @torch.inference_mode()
    def pool(self, states: Tensor, context: ForwardContext) -> Tensor:
        """What the encoder's own pooler makes of first tokens' final hidden states, [R, d] fp32 -> [R, d] fp32."""
        return pooled(self.model, states.to(self.dtype), context).float()

    @torch.inference_mode()
    def masked_logits(self, states: Tensor, context: ForwardContext) -> Tensor:
        """Logits of the encoder's own language model head for final hidden states, [R, d] fp32 -> [R, V] fp32."""
        return masked_logits(self.model, states.to(self.dtype), context).float()


def load_backbone(
    source: str,
    *,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernels: Choice = "auto",
) -> Backbone:
    """Load a transformers causal LM, encoder or encoder-decoder from a directory or hub id.

    `dtype` auto: bfloat16 on CUDA, float32 on CPU; `kernels`: see `select_kernels`. Raises BackboneRefused.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type in ENCODER_MAPS:
            model = load_encoder(source, config)
        elif config.model_type in SEQ2SEQ_MAPS:
            model = AutoModelForSeq2SeqLM.from_pretrained(source, dtype="auto", attn_implementation="eager")
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise BackboneRefused(
            f"The backbone can't be loaded: {str(error).splitlines()[0]}",
            param="backbone",
            remedy="Give a directory or hub id that transformers' auto classes and AutoTokenizer load.",
        ) from error
    if config.model_type not in ENCODER_MAPS and getattr(tokenizer, "backend_tokenizer", None) is None:
        raise BackboneRefused(
            f"{type(tokenizer).__name__} runs in Python and can't turn tokens into text as they come.",
            param="backbone",
            remedy="Convert it: the checkpoint needs a tokenizer.json and a tokenizer_class that reads it.",
        )
    label = name or Path(source).name
    names = tuple(dict.fromkeys((label, source, Path(source).name, config.name_or_path or label)))
    return adopt_backbone(
        model, name=label, names=names, tokenizer=tokenizer, device=device, dtype=dtype, kernels=kernels
    )


def adopt_backbone(
    model: PreTrainedModel | BareEncoder,
    *,
    name: str,
    names: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernels: Choice = "auto",
) -> Backbone:
    """Take over a loaded model: freeze, hash, cast, hook, and choose the layout that equals the stock forward.

    The model is changed in place and must not be used by others afterwards.
    """
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    served = (
        getattr(torch, dtype)
        if dtype != "auto"
        else (torch.bfloat16 if place.type == "cuda" else torch.float32)
    )
    if model.config.model_type in ENCODER_MAPS and model.base_model is model:
        model = BareEncoder(model)
    model.eval().requires_grad_(requires_grad=False)
    digest = backbone_digest(model)
    _own_config(model)
    config = model.config
    model.to(device=place, dtype=served)
    spec = build_spec(
        config.to_dict() | {name: getattr(config, name) for name in COMMON_NAMES if hasattr(config, name)},
        lambda path: _shape_of(model, path),
        name=name,
        digest=digest,
        names=tuple(names) or (name,),
    )
    prove = _prover(model, spec)
    if place.type == "cpu":
        pack_linears(model)
    install_sites(model, spec)
    backbone = Backbone(
        model,
        spec,
        tokenizer,
        _eos_ids(model),
        place,
        served,
        kernels=select_kernels(kernels, place, served),
        layout=Flattened(),
        parity_error=0.0,
    )
    prove(backbone)
    return backbone


def _prover(model: PreTrainedModel | BareEncoder, spec: BackboneSpec) -> Callable[[Backbone], None]:
    """What compares the hooked backbone with the stock forward, which runs here and now."""
    if spec.kind == "encoder":
        rows = stock_rows(model, spec)
        install_replay(model)
        return lambda backbone: prove_encoder(backbone, rows)
    if spec.kind == "encoder-decoder":
        pairs = stock_pairs(model, spec)
        return lambda backbone: prove_seq2seq(backbone, pairs)
    logits = stock_probe(model, spec)
    return lambda backbone: choose_layout(backbone, logits)


def _own_config(model: nn.Module) -> None:
    """Give the model a configuration of its own.

    transformers models built from one config object share it, and each writes its attention implementation there:
    another model would silently switch ours away from the KV cache.
    """
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def backbone_digest(model: PreTrainedModel | BareEncoder) -> str:
    """sha256 over the configuration that shapes the numbers and every tensor (name, dtype, shape, bytes), as loaded."""
    total = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE_CONFIG}
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _shape_of(model: PreTrainedModel | BareEncoder, path: str) -> ModuleShape | None:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    has_bias = getattr(module, "bias", None) is not None
    match module:
        case nn.Linear():
            return ModuleShape("linear", module.in_features, module.out_features, has_bias)
        case Conv1D():
            return ModuleShape("conv1d", module.nx, module.nf, has_bias)
        case nn.Embedding():
            return ModuleShape("embedding", module.num_embeddings, module.embedding_dim, has_bias=False)
        case nn.Identity():
            return None
        case _ if isinstance(weight := getattr(module, "weight", None), Tensor):
            return ModuleShape("norm", weight.shape[0], weight.shape[0], has_bias)
    width = model.config.hidden_size  # layers map the residual stream to itself
    return ModuleShape("layer", width, width, has_bias=False)


def _eos_ids(model: PreTrainedModel | BareEncoder) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    raw = generation.eos_token_id if generation else None
    raw = raw if raw is not None else getattr(model.config, "eos_token_id", None)
    return frozenset([raw] if isinstance(raw, int) else raw or [])
