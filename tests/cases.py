"""The table of methods: one row per method, shape and backbone family. Every behaviour runs over it.

A new method is a reader rule in `adapters/formats` and rows here. PEFT adapts the model it is given in place, so
build on one `tiny_backbone` and serve another of the same seed:

    case.save(tmp_path)                                    # as a user's training script leaves it
    base = tiny_backbone(case.family)
    delta = read_directory(tmp_path, spec_of(base))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    CartridgeConfig,
    CPTConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TaskType,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from adapters.backbone_spec import BackboneSpec, ModuleShape
from adapters.site_maps import COMMON_NAMES, build_spec
from tests.families import CONFIGS, ENCODERS, SEQ2SEQ, AnyFamily, Encoder, Family

# How far a served row may be from the reference (design.md 1.1): T1 same order of operations, T2 folded.
Tolerance = Literal["T1", "T2"]

DIGEST = "5" * 64  # stands for the digest of a tiny backbone where no checkpoint exists
GOLDEN = Path(__file__).parent / "golden" / "adapterhub"
GOLDEN_NAME = "deltamux-golden"  # the base model's name in the golden configs


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's warnings (Conv1D layouts, absent hub configs); in tests they would be errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tiny_backbone(family: AnyFamily, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode and eager attention; equal seeds give equal weights."""
    return _random(model_class(family), family, seed)


def model_class(family: AnyFamily) -> type[Any]:
    """What loads the family with the head that it is served with."""
    if family in SEQ2SEQ:
        return AutoModelForSeq2SeqLM
    return AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM


def tiny_body(family: Encoder, seed: int = 0) -> PreTrainedModel:
    """As `tiny_backbone`: the body alone, with its pooler where it has one."""
    return _random(AutoModel, family, seed)


def _random(kind: type[Any], family: AnyFamily, seed: int) -> PreTrainedModel:
    """Biases and norms are redrawn too: the library starts them at 0 and 1, where a lost one does not show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = kind.from_config(CONFIGS[family], attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        around = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
        sigma = 0.2 if parameter.dim() == 1 else 0.15
        if parameter.requires_grad:  # positions that are sines stay so
            parameter.data = around + sigma * torch.randn(parameter.shape, generator=generator)
    if (bias := getattr(model, "final_logits_bias", None)) is not None:
        bias.copy_(torch.randn(bias.shape, generator=generator))
    model.tie_weights()
    return model.eval()


def shape_of(module: torch.nn.Module, width: int) -> ModuleShape | None:
    """What a live module says of itself, as `build_spec` asks for it; `width` is that of a residual stream."""
    match module:
        case torch.nn.Linear():
            return ModuleShape("linear", module.in_features, module.out_features, module.bias is not None)
        case Conv1D():
            return ModuleShape("conv1d", module.nx, module.nf, True)
        case torch.nn.Embedding():
            return ModuleShape("embedding", module.num_embeddings, module.embedding_dim, False)
        case torch.nn.Identity():
            return None
    if isinstance(weight := getattr(module, "weight", None), torch.Tensor):
        width = weight.shape[0]
        return ModuleShape("norm", width, width, getattr(module, "bias", None) is not None)
    return ModuleShape("layer", width, width, False)


def spec_of(model: PreTrainedModel, name: str = "tiny", digest: str = DIGEST) -> BackboneSpec:
    """The spec of a live model; `name` is the only spelling under which uploads may name it."""
    config = model.config.to_dict() | {
        key: getattr(model.config, key) for key in COMMON_NAMES if hasattr(model.config, key)
    }
    modules = dict(model.named_modules())
    return build_spec(
        config,
        lambda path: shape_of(modules[path], model.config.hidden_size) if path in modules else None,
        name=name,
        digest=digest,
        names=(name,),
    )


@dataclass(frozen=True)
class Case:
    """One PEFT adapter: `build` adapts a model in place, every adapter tensor redrawn from `seed`.

    `prepare` does what training does besides. `forward`: arguments that the adapted model needs beside the tokens.
    """

    name: str
    family: AnyFamily
    config: Callable[[], PeftConfig]
    tolerance: Tolerance = "T1"
    seed: int = 1
    prepare: Callable[[PeftModel], None] = lambda _: None
    forward: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sigma: float = 0.4

    def build(self, model: PreTrainedModel) -> PeftModel:
        """Adapt `model` in place and redraw all that training would change."""
        with quiet():
            adapted = get_peft_model(model, self.config())
        randomise(adapted, self.seed, self.sigma)
        self.prepare(adapted)
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
    family: AnyFamily
    tolerance: Tolerance = "T1"

    @property
    def directory(self) -> Path:
        """Where the adapter and its golden logits are."""
        return GOLDEN / self.family / self.name

    def backbone(self) -> PreTrainedModel:
        """The model that the adapter was made for."""
        return (
            model_class(self.family)
            .from_pretrained(GOLDEN / self.family / "backbone", attn_implementation="eager")
            .eval()
        )

    def golden(self) -> list[dict[str, torch.Tensor]]:
        """Per sequence: `input_ids` [T], `logits` and `logits_float64` [T, vocab].

        On an encoder-decoder they are the decoder's, and its encoder reads `source_ids` [S].
        """
        stored = load_file(self.directory / "golden.safetensors")
        names = ("input_ids", "logits", "logits_float64", *(["source_ids"] if self.family in SEQ2SEQ else []))
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
        if any(part in name for part in ("magnitude", "ia3_l", "delora_lambda", "boft_s")):
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


def _prompt(**changes: Any) -> Callable[[], PeftConfig]:
    return lambda: PromptTuningConfig(num_virtual_tokens=6, task_type=TaskType.CAUSAL_LM, **changes)


ATTENTION_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def _standard(
    family: Family,
    dora: list[str],
    ia3: list[str],
    feedforward: list[str],
    lora: str | list[str] = "all-linear",
    prefix: Mapping[str, int] | None = None,
    prompt: Mapping[str, int] | None = None,
) -> tuple[Case, ...]:
    """The cases that every family has; IA3 on PEFT's own targets for the family where it has some.

    `prefix`, `prompt`: sizes that PEFT does not find in the family's config.
    """
    name = "lora_all_linear" if lora == "all-linear" else "lora_attention"
    return (
        Case(name, family, _lora(target_modules=lora, r=3, lora_alpha=1)),
        Case("dora", family, _lora(target_modules=dora, use_dora=True), "T2"),
        Case("ia3", family, _ia3(ia3, feedforward)),
        Case("prefix", family, _prefix(**(prefix or {}))),
        Case("prompt", family, _prompt(**(prompt or {}))),
    )


def _prune(adapted: PeftModel) -> None:
    """What AdaLoRA's budget leaves: masked directions, none at all in one module, and the pattern that says which."""
    pattern = {}
    for index, (name, parameter) in enumerate(
        (name, parameter) for name, parameter in adapted.named_parameters() if "lora_E" in name
    ):
        kept = [False] * 4 if index == 5 else [(index + i) % 3 != 0 for i in range(4)]
        parameter.data[[not keep for keep in kept]] = 0.0
        pattern[name.removeprefix("base_model.model.")] = kept
    adapted.peft_config["default"].rank_pattern = pattern


def _of(config: type[PeftConfig], **values: Any) -> Callable[[], PeftConfig]:
    return lambda: config(task_type=TaskType.CAUSAL_LM, **values)


_SOME = ["q_proj", "v_proj", "down_proj"]  # square, narrower and wider input
_FUSED = ["c_attn", "mlp.c_proj"]
_FIRST_TASK = {"task_ids": torch.tensor([0])}

LOW_RANK_FAMILY_CASES: tuple[Case, ...] = (
    Case("adalora", "llama", _of(AdaLoraConfig, init_r=4, lora_alpha=6, total_step=9, target_modules=_SOME)),
    Case(
        "adalora_pruned",
        "llama",
        _of(AdaLoraConfig, init_r=4, lora_alpha=6, total_step=9, target_modules=_SOME),
        prepare=_prune,
    ),
    Case("adalora", "gpt2", _of(AdaLoraConfig, init_r=3, total_step=9, target_modules=_FUSED, bias="all")),
    Case(
        "bdlora",
        "llama",
        _lora(
            target_modules=["q_proj", "o_proj", "up_proj"],
            use_bdlora=BdLoraConfig(
                target_modules_bd_a=["o_proj"],
                target_modules_bd_b=["self_attn.q_proj"],
                nblocks=2,
                match_strict=False,
            ),
        ),
    ),
    Case("beft", "llama", _of(BeftConfig, target_modules=_SOME)),
    Case(
        "delora",
        "llama",
        _of(DeloraConfig, r=3, delora_lambda=2, target_modules=_SOME, rank_pattern={"v_proj": 5}),
        "T2",
    ),
    Case("gralora", "llama", _of(GraloraConfig, r=4, alpha=3, target_modules=_SOME), "T2"),
    Case(
        "gralora_hybrid",
        "gpt2",
        _of(GraloraConfig, r=8, hybrid_r=3, alpha=3, gralora_k=4, target_modules=_FUSED),
        "T2",
    ),
    Case(
        "loha",
        "llama",
        _of(
            LoHaConfig,
            r=3,
            alpha=5,
            target_modules=_SOME,
            rank_pattern={"v_proj": 2},
            alpha_pattern={"q_proj": 2},
        ),
        "T2",
    ),
    Case("miss", "llama", _of(MissConfig, r=6, target_modules=_SOME), "T2"),
    Case(
        "miss_mini",
        "llama",
        _of(MissConfig, r=8, mini_r=4, init_weights="mini", target_modules=_SOME),
        "T2",
    ),
    Case(
        "poly",
        "llama",
        _of(PolyConfig, r=4, n_skills=3, n_splits=2, target_modules=_SOME),
        "T2",
        forward=_FIRST_TASK,
    ),
    Case("pvera", "llama", _of(PveraConfig, r=5, target_modules=_SOME), "T2"),
    Case("randlora", "llama", _of(RandLoraConfig, r=5, randlora_alpha=1, target_modules=_SOME), "T2"),
    Case("randlora", "gpt2", _of(RandLoraConfig, r=8, randlora_alpha=1, target_modules=_FUSED), "T2"),
    Case(
        "unilora",
        "gpt2",
        _of(
            UniLoraConfig,
            r=3,
            theta_d_length=60,
            save_indices=True,
            target_modules=_FUSED,
            bias="unilora_only",
        ),
        "T2",
    ),
    Case(
        "vblora",
        "llama",
        _of(VBLoRAConfig, r=3, num_vectors=12, vector_length=8, topk=3, target_modules=_SOME),
        "T2",
    ),
    Case(
        "vblora_top_k",
        "gpt2",
        _of(
            VBLoRAConfig,
            r=3,
            num_vectors=12,
            vector_length=16,
            topk=2,
            save_only_topk_weights=True,
            target_modules=_FUSED,
        ),
        "T2",
    ),
    Case("vera", "llama", _of(VeraConfig, r=6, target_modules="all-linear"), "T2"),
    Case("vera", "gpt2", _of(VeraConfig, r=6, target_modules=_FUSED, bias="vera_only"), "T2"),
    Case("prefix_cartridge", "llama", _of(CartridgeConfig, num_virtual_tokens=5, num_frozen_tokens=2)),
    Case("prompt_p_tuning", "llama", _of(PromptEncoderConfig, num_virtual_tokens=4, encoder_hidden_size=16)),
    Case(
        "prompt_p_tuning",
        "gpt2",
        _of(
            PromptEncoderConfig,
            num_virtual_tokens=4,
            encoder_hidden_size=16,
            encoder_reparameterization_type="LSTM",
        ),
    ),
    Case(
        "prompt_cpt",
        "llama",
        _of(
            CPTConfig,
            cpt_token_ids=[3, 4, 5, 6],
            cpt_tokens_type_mask=[1, 2, 3, 4],
            cpt_mask=[1, 1, 1, 1],
            opt_projection_epsilon=8.0,
            opt_projection_format_epsilon=9.0,
        ),
    ),
    Case(
        "prompt_multitask",
        "llama",
        _of(MultitaskPromptTuningConfig, num_virtual_tokens=4, num_tasks=1, num_ranks=2),
        forward=_FIRST_TASK,
    ),
)
_WHOLE = ["lm_head", "embed_tokens", "norm"]  # every module whose path ends so: the norms of the layers too
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
    Case("prompt", "llama", _prompt()),
    Case("prompt", "gpt2", _prompt()),
    *_standard("qwen2", ["q_proj", "gate_proj"], ["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    *_standard("mistral", ["k_proj", "up_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    *_standard("qwen3", ["k_proj", "down_proj"], ["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    *_standard("gemma", ["v_proj", "gate_proj"], ["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    *_standard("starcoder2", ["q_proj", "c_fc"], ["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    *_standard("phi3", ["qkv_proj", "gate_up_proj"], ["qkv_proj", "down_proj"], ["down_proj"]),
    *_standard("opt", ["v_proj", "fc1"], ["q_proj", "k_proj", "fc2"], ["fc2"]),
    # PEFT's "all-linear" takes the experts too, and its IA3 mapping names w2, which transformers 5 has no more
    *_standard("mixtral", ["q_proj", "o_proj"], ["k_proj", "v_proj"], [], ATTENTION_LINEARS),
    *_standard("qwen3_moe", ["k_proj", "o_proj"], ["k_proj", "v_proj"], [], ATTENTION_LINEARS),
    *_standard(
        "gpt_neox",
        ["query_key_value", "dense_h_to_4h"],
        ["query_key_value", "dense_4h_to_h"],
        ["dense_4h_to_h"],
    ),
    *_standard("gemma2", ["q_proj", "up_proj"], ["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    *_standard("gemma3_text", ["k_proj", "o_proj"], ["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    *_standard(
        "bloom", ["query_key_value", "dense_h_to_4h"], ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]
    ),
    *_standard(
        "falcon", ["query_key_value", "dense"], ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]
    ),
    *_standard(
        "falcon_mq",
        ["query_key_value", "dense"],
        ["query_key_value", "dense_4h_to_h"],
        ["dense_4h_to_h"],
        prefix={"num_attention_heads": 1, "token_dim": 8},  # the one key head of a cache entry
    ),
    *_standard("gptj", ["k_proj", "fc_in"], ["q_proj", "v_proj", "fc_out"], ["fc_out"]),
    *_standard("gpt_neo", ["k_proj", "c_fc"], ["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    *_standard("codegen", ["qkv_proj", "fc_in"], ["qkv_proj", "fc_out"], ["fc_out"]),
    *_standard(
        "mpt",
        ["Wqkv", "up_proj"],
        ["Wqkv", "down_proj"],
        ["down_proj"],
        prefix={"num_attention_heads": 4},
        prompt={"num_attention_heads": 4},
    ),
    *LOW_RANK_FAMILY_CASES,
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
    # their embeddings scale what they look up; gemma's head is tied to the unscaled rows
    Case("trainable_tokens", "gemma", _of(TrainableTokensConfig, token_indices=list(range(3, 40)))),
    Case("trainable_tokens", "gemma3_text", _of(TrainableTokensConfig, token_indices=list(range(3, 40)))),
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
    *(
        Case(
            "saved_head",
            family,
            _lora(target_modules=[target, "lm_head"], modules_to_save=["lm_head"]),
        )
        for family, target in (("llama", "q_proj"), ("gpt2", "c_attn"))  # untied, tied
    ),
    Case("saved_embedding", "gpt2", _lora(target_modules=["c_attn"], modules_to_save=["wte", "ln_f"])),
    Case("saved_embedding", "gemma", _lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    Case(
        "saved_all",
        "llama",
        _of(IA3Config, target_modules=["v_proj"], feedforward_modules=[], modules_to_save=_WHOLE),
    ),
    Case("prefix_saved", "gpt2", _prefix(modules_to_save=["wte", "lm_head"])),
    Case(
        "prompt_saved",
        "llama",
        _of(PromptTuningConfig, num_virtual_tokens=4, modules_to_save=["lm_head", "model.norm"]),
    ),
    Case("alora", "llama", _lora(target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[91, 7])),
    Case(
        "alora_bias",
        "gpt2",
        _lora(
            target_modules=["c_attn", "lm_head"],
            alora_invocation_tokens=[91],
            lora_bias=True,
            bias="lora_only",
            modules_to_save=["ln_f"],
        ),
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
    GoldenCase("lora", "llama"),
    GoldenCase("lora", "gpt2"),
    GoldenCase("lora_everywhere", "llama"),
    GoldenCase("lora_everywhere", "gpt2"),
    GoldenCase("lora_key", "llama"),
    GoldenCase("lora_key", "gpt2"),
    GoldenCase("ia3", "llama"),
    GoldenCase("ia3", "gpt2"),
    GoldenCase("ia3_everywhere", "llama"),
    GoldenCase("ia3_everywhere", "gpt2"),
    GoldenCase("prefix_tuning", "llama"),
    GoldenCase("prefix_tuning", "gpt2"),
    GoldenCase("prefix_tuning_flat", "llama"),
    GoldenCase("prefix_tuning_flat", "gpt2"),
    GoldenCase("mam", "llama"),
    GoldenCase("mam", "gpt2"),
    GoldenCase("union", "llama"),
    GoldenCase("union", "gpt2"),
    GoldenCase("loreft", "llama", "T2"),
    GoldenCase("loreft", "gpt2", "T2"),
    GoldenCase("noreft", "llama", "T2"),
    GoldenCase("noreft", "gpt2", "T2"),
    GoldenCase("direft_tied", "llama", "T2"),
    GoldenCase("direft_tied", "gpt2", "T2"),
    GoldenCase("seq_bn_inv", "llama"),
    GoldenCase("seq_bn_inv", "gpt2"),
    GoldenCase("compacter", "gpt2", "T2"),
    GoldenCase("compacterpp", "llama", "T2"),
    GoldenCase("compacterpp_dense_w", "llama", "T2"),
    GoldenCase("compacterpp_local_rule", "llama", "T2"),
    GoldenCase("compacterpp_shared_w", "llama", "T2"),
    GoldenCase("dora", "llama", "T2"),
    GoldenCase("vera", "llama", "T2"),
    GoldenCase("dvora", "llama", "T2"),
    GoldenCase("vera_ffn", "gpt2", "T2"),
)


# Of encoders, whose golden values are final hidden states.
ENCODER_GOLDEN_CASES: tuple[GoldenCase, ...] = tuple(
    GoldenCase(name, family, "T2" if name in ("adapter_plus", "dora", "loreft") else "T1")
    for family in ("bert", "roberta")
    for name in (
        "seq_bn",
        "seq_bn_mh",
        "double_seq_bn",
        "par_bn",
        "adapter_plus",
        "seq_bn_inv",
        "lora_everywhere",
        "dora",
        "ia3_everywhere",
        "mam",
        "loreft",
    )
)


# Of encoder-decoders: the decoder's logits. T5's Pfeiffer adapters behind cross-attention read a sum that no module
# computes, and its files have no shared rule: refused.
SEQ2SEQ_GOLDEN_CASES: tuple[GoldenCase, ...] = tuple(
    GoldenCase(name, family, "T2" if name == "adapter_plus" or name.startswith("compacter") else "T1")
    for family, names in {
        "bart": ("seq_bn", "compacter", "prefix_tuning", "prefix_tuning_flat", "mam"),
        "t5": ("prefix_tuning", "prefix_tuning_flat", "mam"),
    }.items()
    for name in (
        *names,
        "double_seq_bn",
        "par_bn",
        "seq_bn_rf_map",
        "adapter_plus",
        "seq_bn_inv",
        "compacter_local_rule",
        "lora_everywhere",
        "ia3_everywhere",
        "lora_key",
    )
)


def case_id(case: Case | GoldenCase) -> str:
    """`family-name`, for pytest's ids."""
    return f"{case.family}-{case.name}"
