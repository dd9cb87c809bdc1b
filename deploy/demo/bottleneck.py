"""The delta trained by AdapterHub: a Houlsby bottleneck adapter; run by train.py in an environment of its own.

AdapterHub's library imports as `adapters`, like our package, and needs transformers 4.57, hence the environment.
Its Llama never fills the KV cache, so generation runs without one.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from tasks import DATES, MODEL_NAME, evaluate, train_delta
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import adapters

NAME = "dates"


def load_backbone(directory: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    model.config.name_or_path = (
        MODEL_NAME  # save_adapter writes it down; a local path would tell nobody anything
    )
    adapters.init(model)
    return model


def main(backbone: Path, directory: Path, scores: Path, num_threads: int) -> None:
    """Train, save, load back and score; the scores go to a file for the calling process."""
    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns inside its own set_active_adapters
    torch.set_num_threads(num_threads)
    torch.manual_seed(DATES.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(backbone)
    model = load_backbone(backbone)
    model.add_adapter(NAME, config=adapters.DoubleSeqBnConfig(reduction_factor=4))
    model.train_adapter(NAME)
    train_delta(model, [p for p in model.parameters() if p.requires_grad], tokenizer, DATES)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_adapter(str(directory), NAME, with_head=False, use_safetensors=True)
    loaded = load_backbone(backbone)
    loaded.load_adapter(str(directory), set_active=True, use_safetensors=True)
    result = {
        "library": f"adapters {adapters.__version__}",
        **evaluate(loaded, tokenizer, DATES, use_cache=False),
    }
    scores.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
