"""The table of methods: one row per method, shape and backbone family. Every behaviour runs over it.

A new method is a reader rule in `adapters/formats` and rows here. PEFT adapts the model it is given in place, so
build on one `tiny_backbone` and serve another of the same seed:

    case.save(tmp_path)                                    # as a user's training script leaves it
    base = tiny_backbone(case.family)
    delta = read_directory(tmp_path, spec_of(base))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    AdaptionPromptConfig,
    BOFTConfig,
    C3AConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    RoadConfig,
    ShiraConfig,
    TaskType,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.backbone_spec import BackboneSpec, ModuleShape
from adapters.site_maps import build_spec

Family = Literal["llama", "gpt2"]

# How far a served row may be from the reference (design.md 1.1): T1 same order of operations, T2 folded.
Tolerance = Literal["T1", "T2"]

DIGEST = "5" * 64  # stands for the digest of a tiny backbone where no checkpoint exists
GOLDEN = Path(__file__).parent / "golden" / "adapterhub"
GOLDEN_NAME = "deltamux-golden"  # the base model's name in the golden configs

CONFIGS: dict[Family, LlamaConfig | GPT2Config] = {
    "llama": LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's warnings (Conv1D layouts, absent hub configs); in tests they would be errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tiny_backbone(family: Family, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode and eager attention; equal seeds give equal weights.

    Biases and norms are redrawn too: the library starts them at 0 and 1, where a lost one does not show.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        around = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
        sigma = 0.2 if parameter.dim() == 1 else 0.15
        parameter.data = around + sigma * torch.randn(parameter.shape, generator=generator)
    model.tie_weights()
    return model.eval()


def shape_of(module: torch.nn.Module) -> ModuleShape:
    """What a live module says of itself, as `build_spec` asks for it."""
    match module:
        case torch.nn.Linear():
            return ModuleShape("linear", module.in_features, module.out_features, module.bias is not None)
        case Conv1D():
            return ModuleShape("conv1d", module.nx, module.nf, True)
        case torch.nn.Embedding():
            return ModuleShape("embedding", module.num_embeddings, module.embedding_dim, False)
    if isinstance(weight := getattr(module, "weight", None), torch.Tensor):
        width = weight.shape[0]
        return ModuleShape("norm", width, width, getattr(module, "bias", None) is not None)
    first_norm = next(
        child for child in module.children() if isinstance(getattr(child, "weight", None), torch.Tensor)
    )
    width = first_norm.weight.shape[0]
    return ModuleShape("layer", width, width, False)


def spec_of(model: PreTrainedModel, name: str = "tiny", digest: str = DIGEST) -> BackboneSpec:
    """The spec of a live model; `name` is the only spelling under which uploads may name it."""
    config = {
        key: getattr(model.config, key)
        for key in (
            "model_type",
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_size",
            "vocab_size",
            "max_position_embeddings",
            "tie_word_embeddings",
        )
    }
    config["num_key_value_heads"] = getattr(model.config, "num_key_value_heads", None)
    return build_spec(
        config, lambda path: shape_of(model.get_submodule(path)), name=name, digest=digest, names=(name,)
    )


@dataclass(frozen=True)
class Case:
    """One PEFT adapter: `build` adapts a model in place, every adapter tensor redrawn from `seed`."""

    name: str
    family: Family
    config: Callable[[], PeftConfig]
    tolerance: Tolerance = "T1"
    seed: int = 1
    sigma: float = 0.4

    def build(self, model: PreTrainedModel) -> PeftModel:
        """Adapt `model` in place and redraw all that training would change."""
        with quiet():
            adapted = get_peft_model(model, self.config())
        randomise(adapted, self.seed, self.sigma)
        return adapted.eval()

    def save(self, directory: Path, model: PreTrainedModel | None = None) -> PeftModel:
        """Write what PEFT's `save_pretrained` writes; returns the adapted model. `model` is adapted in place."""
        adapted = self.build(tiny_backbone(self.family) if model is None else model)
        with quiet():
            # else PEFT copies the base LM head beside a LoRA on it
            adapted.save_pretrained(str(directory), save_embedding_layers=False)
        return adapted


@dataclass(frozen=True)
class GoldenCase:
    """One AdapterHub adapter with the library's own logits (golden/README.md)."""

    name: str
    family: Family
    tolerance: Tolerance = "T1"

    @property
    def directory(self) -> Path:
        """Where the adapter and its golden logits are."""
        return GOLDEN / self.family / self.name

    def backbone(self) -> PreTrainedModel:
        """The model that the adapter was made for."""
        return AutoModelForCausalLM.from_pretrained(
            GOLDEN / self.family / "backbone", attn_implementation="eager"
        ).eval()

    def golden(self) -> list[dict[str, torch.Tensor]]:
        """Per sequence: `input_ids` [T], `logits` and `logits_float64` [T, vocab]."""
        stored = load_file(self.directory / "golden.safetensors")
        names = ("input_ids", "logits", "logits_float64")
        return [{name: stored[f"{name}.{index}"] for name in names} for index in range(2)]


def randomise(adapted: PeftModel, seed: int, sigma: float = 0.4) -> None:
    """Redraw everything trainable: multiplicative vectors around their start, the rest around 0 or its start.

    Default starts make most deltas no-ops, which every test would pass.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator) * sigma
        if any(part in name for part in ("magnitude", "ia3_l", "boft_s")):
            parameter.data = parameter.data * (1 + noise)
        elif name.endswith("bias") or "road_alpha" in name or "ln_tuning_layers" in name:
            parameter.data = parameter.data + noise
        else:
            parameter.data = noise


def _lora(**changes: Any) -> Callable[[], PeftConfig]:
    values: dict[str, Any] = {"r": 4, "lora_alpha": 6, "task_type": TaskType.CAUSAL_LM, **changes}
    return lambda: LoraConfig(**values)


def _ia3(targets: list[str], feedforward: list[str]) -> Callable[[], PeftConfig]:
    return lambda: IA3Config(
        target_modules=targets, feedforward_modules=feedforward, task_type=TaskType.CAUSAL_LM
    )


def _prefix(**changes: Any) -> Callable[[], PeftConfig]:
    return lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type=TaskType.CAUSAL_LM, **changes)


def _prompt() -> PeftConfig:
    return PromptTuningConfig(num_virtual_tokens=6, task_type=TaskType.CAUSAL_LM)


def _of(config: type[PeftConfig], **values: Any) -> Callable[[], PeftConfig]:
    return lambda: config(task_type=TaskType.CAUSAL_LM, **values)


ROTATED = ["q_proj", "v_proj", "down_proj"]  # widths 32, 16 and 64 to 32

PEFT_CASES: tuple[Case, ...] = (
    Case("lora_qv", "llama", _lora(target_modules=["q_proj", "v_proj"])),
    Case("lora_all_linear", "llama", _lora(target_modules="all-linear", r=3, lora_alpha=1)),
    Case("lora_all_linear", "gpt2", _lora(target_modules="all-linear", r=3, lora_alpha=1)),
    Case(
        "lora_patterns_rslora",
        "llama",
        _lora(
            target_modules=["q_proj", "down_proj"],
            use_rslora=True,
            rank_pattern={"down_proj": 7, "^model.layers.1.self_attn.q_proj": 2},
            alpha_pattern={"layers.0.mlp.down_proj": 9, "q_proj": 3},
        ),
    ),
    Case("lora_some_layers", "llama", _lora(target_modules=["o_proj"], layers_to_transform=[0, 2])),
    Case("lora_fused", "gpt2", _lora(target_modules=["c_attn"], lora_alpha=2)),
    Case("lora_regex", "llama", _lora(target_modules=r".*self_attn\.(q|o)_proj")),
    Case("lora_head", "llama", _lora(target_modules=["lm_head", "up_proj"])),
    Case("lora_bias_all", "gpt2", _lora(target_modules=["c_attn"], bias="all")),
    Case(
        "lora_bias_only",
        "gpt2",
        _lora(target_modules=["c_attn", "mlp.c_proj"], bias="lora_only", lora_bias=True),
    ),
    Case("dora", "llama", _lora(target_modules=["q_proj", "gate_proj", "down_proj"], use_dora=True), "T2"),
    Case("dora", "gpt2", _lora(target_modules=["c_attn", "c_proj"], use_dora=True), "T2"),
    Case("dora_bias_all", "gpt2", _lora(target_modules=["c_attn"], use_dora=True, bias="all"), "T2"),
    Case("ia3", "llama", _ia3(["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    Case("ia3", "gpt2", _ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"])),
    Case("ia3_fused_input", "gpt2", _ia3(["c_attn"], ["c_attn"])),
    Case("prefix", "llama", _prefix()),
    Case("prefix", "gpt2", _prefix()),
    Case("prefix_projection", "llama", _prefix(prefix_projection=True, encoder_hidden_size=24)),
    Case("prompt", "llama", _prompt),
    Case("prompt", "gpt2", _prompt),
    Case("oft", "llama", _of(OFTConfig, target_modules=ROTATED, oft_block_size=8), sigma=0.1),
    Case(
        "oft_terms",
        "llama",
        _of(OFTConfig, target_modules=["o_proj"], r=4, oft_block_size=0, num_cayley_neumann_terms=3),
        sigma=0.1,
    ),
    Case(
        "oft_cayley_shared",
        "llama",
        _of(
            OFTConfig,
            target_modules="all-linear",
            oft_block_size=4,
            block_share=True,
            use_cayley_neumann=False,
        ),
    ),
    Case("boft", "llama", _of(BOFTConfig, target_modules=ROTATED, boft_block_size=8)),
    Case(
        "boft_num", "llama", _of(BOFTConfig, target_modules=["up_proj"], boft_block_size=0, boft_block_num=2)
    ),
    *(
        Case(variant, "llama", _of(RoadConfig, target_modules=ROTATED, variant=variant, group_size=8))
        for variant in ("road_1", "road_2", "road_4")
    ),
    Case("hra", "llama", _of(HRAConfig, target_modules=ROTATED, r=5)),
    Case("hra_gs", "llama", _of(HRAConfig, target_modules=["k_proj"], r=4, apply_GS=True)),
    Case("shira", "llama", _of(ShiraConfig, target_modules=ROTATED, r=3)),
    Case("lokr", "llama", _of(LoKrConfig, target_modules=ROTATED, r=2, alpha=3)),
    Case(
        "lokr_both",
        "llama",
        _of(
            LoKrConfig,
            target_modules=["q_proj", "gate_proj"],
            r=1,
            alpha=2,
            decompose_both=True,
            decompose_factor=4,
            rank_pattern={"gate_proj": 40},
            alpha_pattern={"gate_proj": 7},
        ),
    ),
    Case("c3a", "llama", _of(C3AConfig, target_modules=ROTATED, block_size=8), sigma=4.0),
    Case(
        "c3a_pattern",
        "llama",
        _of(
            C3AConfig, target_modules=["gate_proj"], block_size=16, block_size_pattern={"1.mlp.gate_proj": 32}
        ),
        sigma=4.0,
    ),
    Case("ln_tuning", "llama", _of(LNTuningConfig)),
    Case("ln_tuning", "gpt2", _of(LNTuningConfig, target_modules=["ln_1", "ln_f"])),
    Case("trainable_tokens", "llama", _of(TrainableTokensConfig, token_indices=list(range(40, 0, -2)))),
    Case("trainable_tokens", "gpt2", _of(TrainableTokensConfig, token_indices=[*range(3, 40), 96])),
    Case(
        "trainable_tokens_lora",
        "llama",
        _lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 1, *range(60, 80)]}),
    ),
    Case(
        "trainable_tokens_lora",
        "gpt2",
        _lora(target_modules=["c_attn"], trainable_token_indices=list(range(2, 30)), lora_alpha=2),
    ),
    Case("adaption_prompt", "llama", _of(AdaptionPromptConfig, adapter_len=5, adapter_layers=2), sigma=1.5),
)

# The golden adapters that lower exactly; `tests/unit/adapters/test_formats_adapterhub.py` has the refused rest.
GOLDEN_CASES: tuple[GoldenCase, ...] = (
    GoldenCase("seq_bn", "llama"),
    GoldenCase("seq_bn", "gpt2"),
    GoldenCase("seq_bn_gelu", "llama"),
    GoldenCase("seq_bn_gelu_new", "gpt2"),
    GoldenCase("seq_bn_tanh", "gpt2"),
    GoldenCase("seq_bn_leakyrelu", "llama"),
    GoldenCase("seq_bn_leave_out", "llama"),
    GoldenCase("seq_bn_leave_out", "gpt2"),
    GoldenCase("seq_bn_rf_map", "llama"),
    GoldenCase("seq_bn_rf_map", "gpt2"),
    GoldenCase("seq_bn_wider", "llama"),
    GoldenCase("seq_bn_one_unit", "gpt2"),
    GoldenCase("double_seq_bn", "llama"),
    GoldenCase("double_seq_bn", "gpt2"),
    GoldenCase("par_bn", "llama"),
    GoldenCase("par_bn", "gpt2"),
    GoldenCase("par_bn_learned", "llama"),
    GoldenCase("par_bn_learned", "gpt2"),
    GoldenCase("par_bn_channel", "llama", "T2"),
    GoldenCase("par_bn_mh", "llama"),
    GoldenCase("adapter_plus", "llama", "T2"),
    GoldenCase("adapter_plus", "gpt2", "T2"),
)


def case_id(case: Case | GoldenCase) -> str:
    """`family-name`, for pytest's ids."""
    return f"{case.family}-{case.name}"
