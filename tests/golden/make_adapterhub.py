"""Write the AdapterHub golden fixtures: tiny backbones, adapters and the library's own logits.

AdapterHub's library imports as `adapters`, the name of our own package, so it lives in its own environment:

    python3 -m venv ~/ahvenv
    ~/ahvenv/bin/pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6
    ~/ahvenv/bin/python tests/golden/make_adapterhub.py     # 20 s, rewrites tests/golden/adapterhub

Everything is seeded: a second run writes the same bytes. `README.md` beside this file says what is in them.

Cases the library cannot produce, hence absent here:
- `residual_before_ln="post_add"`: UnboundLocalError on a pre-LN decoder (it is read only beside a LayerNorm);
- `inv_adapter="glow"`: its own forward fails on [batch, tokens, hidden] input;
- `shared_W_phm` with `factorized_phm_W=False`, or with a `reduction_factor` map: fails while adding;
- an integer `scaling`: ValueError, only float, "learned" and "channel" exist;
- `stochastic_depth > 0`: asks for torchvision; inert outside training.
- DoRA and VeRA in GPT-2's attention: sizes that do not fit, while adding or running;
- prompt tuning on decoders: the library has none.
`use_gating` is on decoders in one case (`unipelt`), to be refused: its gate is a mean over the whole sequence, so a
causal model's logits would depend on later tokens and no incremental decoder can agree with it.
"""

import json
import logging
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from adapters.configuration.adapter_config import (
    AdapterPlusConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DvoRAConfig,
)
from adapters.loading import AdapterLoader
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
)

import adapters
from adapters import (
    AdapterConfig,
    ConfigUnion,
    DiReftConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LlamaAdapterModel,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
    VeraConfig,
)

ROOT = Path(__file__).parent / "adapterhub"
HIDDEN, VOCAB, LAYERS = 24, 37, 3
SEQUENCES = ([3, 36, 7, 0], [19, 8, 8])
SIGMA = 0.4
BACKBONE_NAME = "deltamux-golden"  # stands in for the local path the library would write as `model_name`

Tensors = dict[str, torch.Tensor]

LLAMA = LlamaConfig(
    hidden_size=HIDDEN,
    intermediate_size=40,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
GPT2 = GPT2Config(
    n_embd=HIDDEN,
    n_inner=40,
    n_layer=LAYERS,
    n_head=4,
    vocab_size=VOCAB,
    n_positions=32,
    bos_token_id=0,
    eos_token_id=0,
)

_ENCODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 34,
    "type_vocab_size": 1,
}
ENCODERS = {"bert": BertConfig(**_ENCODER), "roberta": RobertaConfig(**_ENCODER, pad_token_id=1)}

SEQ2SEQ: dict[str, PretrainedConfig] = {
    "bart": BartConfig(
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=32,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
    ),
    "t5": T5Config(
        d_model=HIDDEN,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    ),
}
SOURCES = ([5, 11, 36, 7, 2], [19, 8])  # what the encoder reads where the decoder is given SEQUENCES


@dataclass(frozen=True)
class Case:
    """One adapter; `families` are the backbones it is made for.

    `added`: what its saved config must say besides, since the library honours it but does not write it.
    """

    config: AdapterConfig
    families: tuple[str, ...] = ("llama", "gpt2")
    added: Mapping[str, object] = field(default_factory=dict)


SUBTRACTED, NOT_SUBTRACTED = {"subtract_projection": True}, {"subtract_projection": False}
PICKLED = {("llama", "mam"), ("gpt2", "prefix_tuning")}  # saved by the library's default way too


# Hidden 24 makes every bottleneck width differ from the head and FFN widths, so a swapped axis cannot pass.
CASES: dict[str, Case] = {
    "seq_bn": Case(SeqBnConfig(reduction_factor=4)),
    "seq_bn_mh": Case(SeqBnConfig(reduction_factor=4, mh_adapter=True, output_adapter=False)),
    "seq_bn_gelu": Case(SeqBnConfig(reduction_factor=8, non_linearity="gelu"), ("llama",)),
    "seq_bn_gelu_new": Case(SeqBnConfig(reduction_factor=8, non_linearity="gelu_new"), ("gpt2",)),
    "seq_bn_tanh": Case(SeqBnConfig(reduction_factor=8, non_linearity="tanh"), ("gpt2",)),
    "seq_bn_leakyrelu": Case(SeqBnConfig(reduction_factor=8, non_linearity="leakyrelu"), ("llama",)),
    "seq_bn_leave_out": Case(SeqBnConfig(reduction_factor=4, leave_out=[0])),
    "seq_bn_rf_map": Case(SeqBnConfig(reduction_factor={"1": 2, "default": 5})),
    "seq_bn_wider": Case(SeqBnConfig(reduction_factor=0.5, leave_out=[0, 2]), ("llama",)),
    "seq_bn_one_unit": Case(SeqBnConfig(reduction_factor=100), ("gpt2",)),
    "seq_bn_ln_before": Case(SeqBnConfig(reduction_factor=8, ln_before=True)),
    "seq_bn_ln_after": Case(SeqBnConfig(reduction_factor=8, ln_after=True)),
    "seq_bn_ln_after_residual": Case(
        SeqBnConfig(reduction_factor=8, ln_after=True, adapter_residual_before_ln=True), ("llama",)
    ),
    "seq_bn_residual_after_add": Case(SeqBnConfig(reduction_factor=8, residual_before_ln=False)),
    "seq_bn_drops_stream": Case(
        SeqBnConfig(reduction_factor=8, original_ln_before=False, original_ln_after=False), ("llama",)
    ),
    "seq_bn_inv": Case(SeqBnInvConfig(reduction_factor=8)),
    "double_seq_bn": Case(DoubleSeqBnConfig(reduction_factor=4)),
    "par_bn": Case(ParBnConfig(reduction_factor=4)),
    "par_bn_learned": Case(ParBnConfig(reduction_factor=4, scaling="learned")),
    "par_bn_channel": Case(ParBnConfig(reduction_factor=8, scaling="channel"), ("llama",)),
    "par_bn_mh": Case(ParBnConfig(reduction_factor=8, mh_adapter=True, non_linearity="swish"), ("llama",)),
    "par_bn_ln": Case(ParBnConfig(reduction_factor=8, ln_before=True, ln_after=True), ("gpt2",)),
    "par_bn_drops_stream": Case(ParBnConfig(reduction_factor=8, original_ln_after=False), ("llama",)),
    "adapter_plus": Case(AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0)),
    "compacter": Case(CompacterConfig(reduction_factor=2), ("gpt2",)),
    "compacterpp": Case(CompacterPlusPlusConfig(reduction_factor=2), ("llama",)),
    "compacterpp_local_rule": Case(
        CompacterPlusPlusConfig(
            reduction_factor=2, shared_phm_rule=False, factorized_phm_rule=True, phm_rank=2, phm_bias=False
        ),
        ("llama",),
    ),
    "compacterpp_dense_w": Case(
        CompacterPlusPlusConfig(reduction_factor=2, factorized_phm_W=False), ("llama",)
    ),
    "compacterpp_shared_w": Case(CompacterPlusPlusConfig(reduction_factor=2, shared_W_phm=True), ("llama",)),
    "lora": Case(LoRAConfig(r=4, alpha=6)),
    "lora_everywhere": Case(
        LoRAConfig(r=3, alpha=5, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True)
    ),
    "lora_key": Case(LoRAConfig(r=2, alpha=3, attn_matrices=["k"], leave_out=[1])),
    "dora": Case(DoRAConfig(r=4, alpha=6, intermediate_lora=True, output_lora=True), ("llama",)),
    "ia3": Case(IA3Config()),
    "ia3_everywhere": Case(IA3Config(alpha=2, attn_matrices=["q", "v"], output_lora=True)),
    "vera": Case(VeraConfig(r=5, alpha=3, attn_matrices=["q"]), ("llama",)),
    "vera_ffn": Case(VeraConfig(r=5, selfattn_lora=False, intermediate_lora=True), ("gpt2",)),
    "dvora": Case(DvoRAConfig(r=5, alpha=3, attn_matrices=["v"]), ("llama",)),
    "prefix_tuning": Case(PrefixTuningConfig(prefix_length=5, bottleneck_size=12)),
    "prefix_tuning_flat": Case(PrefixTuningConfig(prefix_length=4, flat=True)),
    "mam": Case(
        MAMConfig(PrefixTuningConfig(prefix_length=3, bottleneck_size=8), ParBnConfig(reduction_factor=4))
    ),
    "union": Case(ConfigUnion(LoRAConfig(r=2), SeqBnConfig(reduction_factor=8))),
    "unipelt": Case(
        UniPELTConfig(
            PrefixTuningConfig(prefix_length=3, bottleneck_size=8),
            SeqBnConfig(reduction_factor=8),
            LoRAConfig(r=2),
        ),
        ("gpt2",),
    ),
    "loreft": Case(LoReftConfig(r=3, prefix_positions=2, suffix_positions=1)),
    "noreft": Case(
        NoReftConfig(r=2, prefix_positions=1, suffix_positions=2, layers=[0, 2]), added=SUBTRACTED
    ),
    "direft_tied": Case(
        DiReftConfig(r=2, prefix_positions=2, suffix_positions=2, tied_weights=True, non_linearity="relu"),
        added=NOT_SUBTRACTED,
    ),
}

# What encoders have too: their norms follow the blocks, so the placements of bottlenecks mean something else.
ENCODER_CASES: dict[str, AdapterConfig] = {
    "seq_bn": SeqBnConfig(reduction_factor=4),
    "seq_bn_mh": SeqBnConfig(reduction_factor=4, mh_adapter=True),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": ParBnConfig(reduction_factor=4, mh_adapter=True),
    "adapter_plus": AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
    "seq_bn_inv": SeqBnInvConfig(reduction_factor=8),
    "lora_everywhere": CASES["lora_everywhere"].config,
    "dora": CASES["dora"].config,
    "ia3_everywhere": CASES["ia3_everywhere"].config,
    "mam": CASES["mam"].config,
    "loreft": CASES["loreft"].config,
    "seq_bn_ln": SeqBnConfig(reduction_factor=8, ln_before=True, ln_after=True),
    "double_seq_bn_ln_before": DoubleSeqBnConfig(reduction_factor=8, ln_before=True),
    "par_bn_ln_gated": ParBnConfig(reduction_factor=8, ln_before=True, ln_after=True, use_gating=True),
    "double_seq_bn_gated": DoubleSeqBnConfig(reduction_factor=8, use_gating=True),
    "lora_gated": LoRAConfig(r=3, alpha=5, intermediate_lora=True, output_lora=True, use_gating=True),
    "unipelt": UniPELTConfig(
        PrefixTuningConfig(prefix_length=3, bottleneck_size=8, use_gating=True, shared_gating=False),
        SeqBnConfig(reduction_factor=8, use_gating=True),
        LoRAConfig(r=2, use_gating=True),
    ),
    "unipelt_shared": UniPELTConfig(prefix_tuning=PrefixTuningConfig(prefix_length=3, flat=True)),
}

# On encoder-decoders: three attentions, and layers counted through both stacks (2 is the decoder's first).
SEQ2SEQ_CASES: dict[str, AdapterConfig] = {
    "seq_bn": SeqBnConfig(reduction_factor=4, cross_adapter=True),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True),
    "par_bn": ParBnConfig(reduction_factor=4, mh_adapter=True, cross_adapter=True),
    "seq_bn_rf_map": SeqBnConfig(reduction_factor={"2": 2, "default": 5}, leave_out=[1]),
    "adapter_plus": AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
    "seq_bn_inv": SeqBnInvConfig(reduction_factor=8),
    "compacter": CompacterConfig(reduction_factor=2),  # of T5 the library saves no shared rule
    "compacter_local_rule": CompacterConfig(reduction_factor=2, shared_phm_rule=False),
    "lora_everywhere": CASES["lora_everywhere"].config,
    "ia3_everywhere": CASES["ia3_everywhere"].config,
    "lora_key": LoRAConfig(r=2, alpha=3, attn_matrices=["k"], leave_out=[0, 3]),
    "prefix_tuning": CASES["prefix_tuning"].config,
    "prefix_tuning_flat": PrefixTuningConfig(prefix_length=4, flat=True, encoder_prefix=False),
    "mam": CASES["mam"].config,
}


def randomise(model: PreTrainedModel, seed_text: str, wanted: Callable[[str], bool], sigma: float) -> int:
    """Redraw every parameter whose name is wanted, norm weights around one; return how many there were."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed_text.encode()))
    names = [(name, parameter) for name, parameter in model.named_parameters() if wanted(name)]
    for name, parameter in names:
        is_norm_weight = name.endswith("weight") and parameter.dim() == 1
        parameter.data = torch.randn(parameter.shape, generator=generator) * sigma + is_norm_weight
    return len(names)


def logits(model: PreTrainedModel) -> Tensors:
    """Logits of each sequence alone, in fp32 and then fp64, under the names the golden file uses.

    Of an encoder its final hidden states.
    """
    decoder = model.config.model_type not in ENCODERS
    read = model.config.is_encoder_decoder
    tensors: Tensors = {}
    for dtype, suffix in ((torch.float32, ""), (torch.float64, "_float64")):
        model.to(dtype)
        for index, ids in enumerate(SEQUENCES):
            with torch.no_grad():
                arguments = {"use_cache": False} if decoder else {"output_hidden_states": True}
                given = torch.tensor([ids])
                if read:
                    arguments, given = (
                        {**arguments, "decoder_input_ids": given},
                        torch.tensor([SOURCES[index]]),
                    )
                found = model(input_ids=given, return_dict=True, **arguments)
                output = found.logits[0] if decoder else found.hidden_states[-1][0]
            assert output.dtype == dtype
            tensors[f"logits{suffix}.{index}"] = output.contiguous()
    model.to(torch.float32)
    return tensors


def write_golden(directory: Path, tensors: Tensors) -> None:
    inputs = {f"input_ids.{index}": torch.tensor(ids) for index, ids in enumerate(SEQUENCES)}
    if directory.parent.name in SEQ2SEQ:
        inputs |= {f"source_ids.{index}": torch.tensor(ids) for index, ids in enumerate(SOURCES)}
    save_file(inputs | tensors, directory / "golden.safetensors")


def make_backbone(family: str, config: PretrainedConfig) -> Tensors:
    """Save a randomised backbone and its bare logits; return those logits."""
    directory = ROOT / family / "backbone"
    model = model_class(family).from_config(config, attn_implementation="eager").eval()
    randomise(model, f"{family}/backbone", lambda _: True, sigma=0.3)
    model.save_pretrained(directory)
    base = logits(model)
    write_golden(directory, base)
    return base


def save_adapter(model: PreTrainedModel, name: str, directory: Path) -> None:
    """Save as the library does; what it refuses, as a converter must."""
    tensors, config = AdapterLoader(model).save_to_state_dict(name)
    if len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors):
        model.save_adapter(str(directory), name, with_head=hasattr(model, "heads"), use_safetensors=True)
        return
    # `ln_before` registers its norm twice, prefix tuning its pool under every layer; safetensors rejects shared
    # memory: the clones keep all keys, as the library's pickled file has them
    directory.mkdir(parents=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, directory / "adapter.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def unset_reflections(model: PreTrainedModel, name: str) -> None:
    """Make the diagonals of orthogonal parametrisations signs again, as torch keeps them and reads them."""
    for key, parameter in model.named_parameters():
        if f".{name}." in key and key.endswith("parametrizations.weight.original"):
            diagonal = parameter.data.diagonal()
            diagonal.copy_(diagonal.sign())


def make_case(
    family: str,
    name: str,
    model: PreTrainedModel,
    config: AdapterConfig,
    base: Tensors,
    added: Mapping[str, object],
) -> None:
    """Add, randomise, save and run one adapter on a model that already carries the library's hooks."""
    directory = ROOT / family / name
    model.config.name_or_path = BACKBONE_NAME
    torch.manual_seed(
        zlib.crc32(f"{family}/{name}/start".encode())
    )  # orthogonal parametrisations keep their start
    model.add_adapter(name, config=config)
    model.set_active_adapters(name)
    model.eval()
    assert (
        randomise(model, f"{family}/{name}", lambda key: f".{name}." in key and "heads." not in key, SIGMA)
        > 0
    )
    unset_reflections(model, name)
    save_adapter(model, name, directory)
    if (family, name) in PICKLED:
        model.save_adapter(str(directory), name, with_head=False, use_safetensors=False)
    if added:
        file = directory / "adapter_config.json"
        saved = json.loads(file.read_text())
        saved["config"] |= added
        file.write_text(json.dumps(saved, indent=2, sort_keys=True))
    golden = logits(model)
    for index in range(len(SEQUENCES)):
        change = (golden[f"logits.{index}"] - base[f"logits.{index}"]).abs().max().item()
        drift = (golden[f"logits.{index}"] - golden[f"logits_float64.{index}"]).abs().max().item()
        assert change > 0.1, f"{family}/{name}: the adapter changes the logits by {change} only"
        assert drift < 1e-4, f"{family}/{name}: fp32 and fp64 differ by {drift}"
    write_golden(directory, golden)


def model_class(family: str) -> type:
    if family in SEQ2SEQ:
        return AutoModelForSeq2SeqLM
    return AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM


def load_backbone(family: str) -> PreTrainedModel:
    model = model_class(family).from_pretrained(ROOT / family / "backbone", attn_implementation="eager")
    adapters.init(model)
    return model


def load_flex_head_backbone(head: str) -> PreTrainedModel:
    """The Llama backbone under the library's own model class, whose LM head undoes invertible adapters."""
    plain = AutoModelForCausalLM.from_pretrained(ROOT / "llama" / "backbone")
    model = LlamaAdapterModel.from_pretrained(ROOT / "llama" / "backbone", attn_implementation="eager")
    model.add_causal_lm_head(head, activation_function=None, layers=1)
    model.heads[head].get_output_embeddings().weight.data = plain.lm_head.weight.data.clone()
    return model


def main() -> None:
    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns inside its own set_active_adapters
    shutil.rmtree(ROOT, ignore_errors=True)
    base = {"llama": make_backbone("llama", LLAMA), "gpt2": make_backbone("gpt2", GPT2)}
    for name, case in CASES.items():
        for family in case.families:
            make_case(family, name, load_backbone(family), case.config, base[family], case.added)
    for family, config in ENCODERS.items():
        hidden = make_backbone(family, config)
        for name, adapter in ENCODER_CASES.items():
            make_case(family, name, load_backbone(family), adapter, hidden, {})
    for family, config in SEQ2SEQ.items():
        bare = make_backbone(family, config)
        for name, adapter in SEQ2SEQ_CASES.items():
            make_case(family, name, load_backbone(family), adapter, bare, {})
    name = "seq_bn_inv_flex_head"
    make_case(
        "llama", name, load_flex_head_backbone(name), SeqBnInvConfig(reduction_factor=8), base["llama"], {}
    )
    size_bytes = sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file())
    print(f"{len(list(ROOT.glob('*/*')))} directories, {size_bytes / 1024:.0f} KiB under {ROOT.name}/")


if __name__ == "__main__":
    main()
