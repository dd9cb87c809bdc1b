"""Every PEFT method on every family: one row per method, one row per family, the cases between them made by code.

`tests/cases.py` has the options of each method on a few families; here each method has one typical config, put on
whatever modules the family has. A new method is a row in `METHODS`, a new family a row in `TARGETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    AdamssConfig,
    AdaptionPromptConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    CartridgeConfig,
    CPTConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PeftConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    TaskType,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)

from tests.cases import Case, Tolerance
from tests.families import ENCODERS, SEQ2SEQ, AnyFamily


@dataclass(frozen=True)
class Targets:
    """The modules of one family, as PEFT matches them: by the end of their path.

    `feedforward` is the linear whose input IA3 scales; a mixture of experts has none that is a module. `prompt`: what
    PEFT's prompt methods do not find in the family's config.
    """

    attention: tuple[str, ...]
    feedforward: tuple[str, ...]
    norms: tuple[str, ...]
    prompt: Mapping[str, int] = field(default_factory=dict)

    @property
    def linears(self) -> list[str]:
        """What methods on linear modules are put on: all that are named."""
        return [*self.attention, *self.feedforward]


_TWO_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GATED = Targets(("q_proj", "v_proj"), ("down_proj",), _TWO_NORMS)  # square, narrower, wider input
_EXPERTS = Targets(("q_proj", "v_proj"), (), _TWO_NORMS)
_SANDWICHED = Targets(("q_proj", "v_proj"), ("down_proj",), _FOUR_NORMS)

# in the encoder, the decoder and the attention from one to the other
_BART_NORMS = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
_BART = Targets(("q_proj", "v_proj"), ("fc2",), _BART_NORMS)
_T5 = Targets(("k", "v"), ("wo",), ("layer_norm", "final_layer_norm"))  # those of PEFT's IA3
_BERT = Targets(("query", "value"), ("output.dense",), ("attention.output.LayerNorm", "embeddings.LayerNorm"))

_DEBERTA = Targets(  # the query's projects relative embeddings too, where they are shared
    ("query_proj", "value_proj"),
    ("output.dense",),
    ("attention.output.LayerNorm", "encoder.LayerNorm", "embeddings.LayerNorm"),
)

TARGETS: Mapping[AnyFamily, Targets] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "distilbert": Targets(
        ("q_lin", "v_lin"),
        ("lin2",),
        ("sa_layer_norm", "output_layer_norm"),
        {"token_dim": 32, "num_layers": 3, "num_attention_heads": 4},
    ),
    "modernbert": Targets(("Wqkv",), ("mlp.Wo",), ("mlp_norm", "final_norm")),
    "albert": Targets(
        ("query", "value"),
        ("ffn_output",),
        ("attention.LayerNorm", "full_layer_layer_norm", "embeddings.LayerNorm"),
        {"token_dim": 16},
    ),
    "deberta_v3": _DEBERTA,
    "deberta_v2": _DEBERTA,
    "deberta_xlarge": replace(_DEBERTA, prompt={"token_dim": 16}),
    "bart": _BART,
    "mbart": Targets(_BART.attention, _BART.feedforward, _BART_NORMS, {"num_layers": 4}),
    "marian": _BART,
    "pegasus": _BART,
    "t5": _T5,
    "mt5": _T5,
    "llama": _GATED,
    "gpt2": Targets(("c_attn",), ("mlp.c_proj",), ("ln_1", "ln_2", "ln_f")),  # fused, and Conv1D
    "qwen2": _GATED,
    "mistral": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "starcoder2": Targets(("q_proj", "v_proj"), ("c_proj",), _TWO_NORMS),
    "phi3": Targets(("qkv_proj",), ("down_proj",), _TWO_NORMS),  # fused
    "opt": Targets(("q_proj", "v_proj"), ("fc2",), ("self_attn_layer_norm", "final_layer_norm")),
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_neox": Targets(  # q, k and v alternate head by head
        ("query_key_value",),
        ("dense_4h_to_h",),
        ("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
    ),
    "gemma2": _SANDWICHED,
    "gemma3_text": _SANDWICHED,
    "bloom": Targets(  # as in gpt_neox
        ("query_key_value",), ("dense_4h_to_h",), ("input_layernorm", "post_attention_layernorm", "ln_f")
    ),
    "falcon": Targets(("query_key_value",), ("dense_4h_to_h",), ("ln_attn", "ln_mlp", "ln_f")),
    "falcon_mq": Targets(("query_key_value",), ("dense_4h_to_h",), ("input_layernorm", "ln_f")),
    "gptj": Targets(("q_proj", "v_proj"), ("fc_out",), ("ln_1", "ln_f")),
    "gpt_neo": Targets(("q_proj", "v_proj"), ("c_proj",), ("ln_1", "ln_2", "ln_f")),
    "codegen": Targets(("qkv_proj",), ("fc_out",), ("ln_1", "ln_f")),  # parts of q, v and k alternate
    "mpt": Targets(("Wqkv",), ("down_proj",), ("norm_1", "norm_2", "norm_f"), {"num_attention_heads": 4}),
}


@dataclass(frozen=True)
class MethodRow:
    """One method: its config for a family's targets; the other fields are those of `Case`."""

    name: str
    config: Callable[[Targets], PeftConfig]
    tolerance: Tolerance = "T1"
    sigma: float = 0.4
    forward: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def case(self, family: AnyFamily) -> Case:
        """This method on `family`; on an encoder it learns to make better states."""

        def config() -> PeftConfig:
            made = self.config(TARGETS[family])
            if family in ENCODERS:
                made.task_type = TaskType.FEATURE_EXTRACTION
            if family in SEQ2SEQ:
                made.task_type = TaskType.SEQ_2_SEQ_LM
            return made

        return Case(
            self.name,
            family,
            config,
            self.tolerance,
            forward=self.forward,
            sigma=self.sigma,
        )


def _linear(config: type[PeftConfig], **values: Any) -> Callable[[Targets], PeftConfig]:
    return lambda targets: config(task_type=TaskType.CAUSAL_LM, target_modules=targets.linears, **values)


def _whole(config: type[PeftConfig], **values: Any) -> Callable[[Targets], PeftConfig]:
    """Of a method that names no modules."""
    return lambda _: config(task_type=TaskType.CAUSAL_LM, **values)


def _prompt(config: type[PeftConfig], **values: Any) -> Callable[[Targets], PeftConfig]:
    """Of a method of virtual tokens."""
    return lambda targets: config(task_type=TaskType.CAUSAL_LM, **targets.prompt, **values)


def _ia3(targets: Targets) -> PeftConfig:
    return IA3Config(
        task_type=TaskType.CAUSAL_LM,
        target_modules=targets.linears,
        feedforward_modules=list(targets.feedforward),
    )


def _ln_tuning(targets: Targets) -> PeftConfig:
    return LNTuningConfig(task_type=TaskType.CAUSAL_LM, target_modules=list(targets.norms))


_FIRST_TASK = {"task_ids": torch.tensor([0])}
_CPT = {
    "cpt_token_ids": [3, 4, 5, 6],
    "cpt_tokens_type_mask": [1, 2, 3, 4],
    "cpt_mask": [1, 1, 1, 1],
    "opt_projection_epsilon": 8.0,
    "opt_projection_format_epsilon": 9.0,
}

# Methods without a reader (`adapters/formats/peft_refused.py`): `deltamux convert` probes them, or says why not.
_WITHOUT_READER: Mapping[str, Callable[[Targets], PeftConfig]] = {
    "adamss": _linear(AdamssConfig, r=4, num_subspaces=2),
    "deft": _linear(DeftConfig),
    "fourierft": _linear(FourierFTConfig, n_frequency=50),
    "frod": _linear(FrodConfig),
    "glora": _linear(GloraConfig),
    "hira": _linear(HiraConfig, r=4),
    "lily": _linear(LilyConfig, r=4),
    "osf": _linear(OSFConfig),
    "peanut": _linear(PeanutConfig, r=4),
    "psoft": _linear(PsoftConfig, r=4),
    "supertuning": _linear(SupertuningConfig, r=2),
    "tinylora": _linear(TinyLoraConfig),
    "waveft": _linear(WaveFTConfig, n_frequency=50),
}

_SIGMAS: Mapping[str, float] = {"supertuning": 0.2}

METHODS: tuple[MethodRow, ...] = (
    # larger weights make one position of phi3, BART or mT5 so steep that PEFT's fp32 is far from its own fp64
    MethodRow("lora", _linear(LoraConfig, r=4, lora_alpha=6), sigma=0.25),
    MethodRow("dora", _linear(LoraConfig, r=4, lora_alpha=6, use_dora=True), "T2"),
    MethodRow("adalora", _linear(AdaLoraConfig, init_r=4, lora_alpha=6, total_step=9)),
    MethodRow("lora_saved_head", _linear(LoraConfig, r=4, modules_to_save=["lm_head"]), sigma=0.25),
    MethodRow("alora", _linear(LoraConfig, r=4, alora_invocation_tokens=[91, 7]), sigma=0.25),
    MethodRow("adaption_prompt", _whole(AdaptionPromptConfig, adapter_len=5, adapter_layers=2), sigma=1.5),
    MethodRow("beft", _linear(BeftConfig)),
    MethodRow("boft", _linear(BOFTConfig, boft_block_size=8)),
    MethodRow("c3a", _linear(C3AConfig, block_size=8), sigma=4.0),
    MethodRow("cartridge", _prompt(CartridgeConfig, num_virtual_tokens=5, num_frozen_tokens=2)),
    MethodRow("cpt", _prompt(CPTConfig, **_CPT)),
    MethodRow("delora", _linear(DeloraConfig, r=3, delora_lambda=2), "T2"),
    MethodRow("gralora", _linear(GraloraConfig, r=4, alpha=3), "T2"),
    MethodRow("hra", _linear(HRAConfig, r=5)),
    MethodRow("ia3", _ia3),
    MethodRow("ln_tuning", _ln_tuning),
    MethodRow("loha", _linear(LoHaConfig, r=3, alpha=5), "T2"),
    MethodRow("lokr", _linear(LoKrConfig, r=2, alpha=3)),
    MethodRow("miss", _linear(MissConfig, r=6), "T2"),
    MethodRow(
        "multitask_prompt_tuning",
        _prompt(MultitaskPromptTuningConfig, num_virtual_tokens=4, num_tasks=1, num_ranks=2),
        forward=_FIRST_TASK,
    ),
    MethodRow("oft", _linear(OFTConfig, oft_block_size=8), sigma=0.1),
    MethodRow("p_tuning", _prompt(PromptEncoderConfig, num_virtual_tokens=4, encoder_hidden_size=16)),
    MethodRow("poly", _linear(PolyConfig, r=4, n_skills=3, n_splits=2), "T2", forward=_FIRST_TASK),
    MethodRow("prefix_tuning", _prompt(PrefixTuningConfig, num_virtual_tokens=5)),
    MethodRow("prompt_tuning", _prompt(PromptTuningConfig, num_virtual_tokens=6)),
    MethodRow("pvera", _linear(PveraConfig, r=5), "T2"),
    MethodRow("randlora", _linear(RandLoraConfig, r=5, randlora_alpha=1), "T2"),
    MethodRow("road", _linear(RoadConfig, variant="road_2", group_size=8)),
    MethodRow("shira", _linear(ShiraConfig, r=3)),
    MethodRow("trainable_tokens", _whole(TrainableTokensConfig, token_indices=list(range(40, 0, -2)))),
    MethodRow("unilora", _linear(UniLoraConfig, r=3, theta_d_length=60, save_indices=True), "T2", sigma=1.0),
    MethodRow("vblora", _linear(VBLoRAConfig, r=3, num_vectors=12, vector_length=8, topk=3), "T2"),
    MethodRow("vera", _linear(VeraConfig, r=6), "T2"),
    *(
        MethodRow(name, config, "T2", sigma=_SIGMAS.get(name, 0.4))
        for name, config in _WITHOUT_READER.items()
    ),
)
