"""Typology and family of deltas as the libraries save them: a golden table, and sizes as they are."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from adapters.canonical import Canonical, from_canonical, to_canonical
from adapters.formats import read_directory
from adapters.normal_form import AttnPrefix, Delta, LowRank, Site, VirtualTokens
from adapters.typology import describe
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.placement import place
from tests.cases import GOLDEN_NAME, GoldenCase, spec_of, tiny_backbone
from tests.method_table import METHODS

ROWS = {row.name: row for row in METHODS}

LISTED = (
    "family", "intra_connectivity", "inter_connectivity", "parameters_adapted", "parameter_sharing", "input_type",
    "insertion_form", "num_insertions", "integration_form", "workspace",
)  # fmt: skip
GOLDEN_TABLE = {
    "lora": (
        "reparameterised", "dense", "fixed: dense", "reparameterisation", "none", "hidden", "parallel", 9,
        "scaled addition", "attention ffn",
    ),
    "dora": (
        "reparameterised", "dense none", "fixed: dense fixed: sparse", "reparameterisation", "none",
        "hidden parameters", "parallel sequential", 9, "rescaling scaled addition", "attention ffn",
    ),
    "vera": (
        "reparameterised", "dense", "fixed: dense", "reparameterisation", "shared", "hidden", "parallel", 9,
        "direct addition", "attention ffn",
    ),
    "oft": (
        "reparameterised", "sparse", "fixed: sparse", "reparameterisation", "none", "hidden", "sequential", 9,
        "transformation", "attention ffn",
    ),
    "boft": (
        "reparameterised", "none sparse", "fixed: sparse", "reparameterisation", "none", "hidden parameters",
        "sequential", 9, "rescaling transformation", "attention ffn",
    ),
    "lora_saved_head": (
        "reparameterised", "dense", "fixed: dense", "reparameterisation replacement", "none", "hidden",
        "in place parallel", 10, "replacement scaled addition", "attention ffn head",
    ),
    "ia3": (
        "additive", "none", "fixed: sparse", "addition", "none", "parameters", "sequential", 9, "rescaling",
        "attention ffn",
    ),
    "prefix_tuning": (
        "additive", "none", "dynamic", "addition", "none", "parameters", "parallel", 3, "gated addition", "attention",
    ),
    "prompt_tuning": (
        "additive", "none", "dynamic", "addition", "none", "tokens", "parallel", 1, "concatenation", "embedding",
    ),
    "ln_tuning": (
        "partial", "none", "fixed: sparse", "replacement", "none", "parameters", "in place", 7, "replacement", "norm",
    ),
    "shira": (
        "partial", "sparse", "fixed: sparse", "reparameterisation", "none", "hidden", "parallel", 9,
        "direct addition", "attention ffn",
    ),
    "trainable_tokens": (
        "partial", "none", "fixed: sparse", "replacement", "none", "tokens", "in place", 1, "replacement",
        "embedding",
    ),
}  # fmt: skip


@cache
def stored(method: str) -> tuple[Delta, Canonical]:
    spec = spec_of(tiny_backbone("llama"), "tiny-base")
    with tempfile.TemporaryDirectory() as directory:
        ROWS[method].case("llama").save(Path(directory))
        delta = read_directory(directory, spec)
    return delta, to_canonical(delta)


def flat(value: Any) -> Any:
    return " ".join(value) if isinstance(value, list) else value


@pytest.mark.parametrize("method", GOLDEN_TABLE)
def test_golden_table(method: str) -> None:
    found = describe(*stored(method))
    assert tuple(flat(found[name]) for name in LISTED) == GOLDEN_TABLE[method]


@pytest.mark.parametrize("method", GOLDEN_TABLE)
def test_sizes_are_those_of_the_stored_files(method: str) -> None:
    delta, canonical = stored(method)
    found = describe(delta, canonical)
    assert found["num_parameters"] == sum(tensor.numel() for tensor in load(canonical.tensors).values())
    assert found["num_bytes"] == len(canonical.manifest) + len(canonical.tensors)


@cache
def backbone() -> Backbone:
    return adopt_backbone(tiny_backbone("llama"), name="tiny", device="cpu", dtype="float32")


@pytest.mark.parametrize("method", GOLDEN_TABLE)
def test_device_bytes_are_within_two_percent_of_the_memory_that_placement_holds(method: str) -> None:
    _, canonical = stored(method)
    spec = backbone().spec
    before = _memory()
    # a delta of its own, gone afterwards: on a CPU keys and values may be the same memory as on the host
    delta = from_canonical(canonical.manifest, canonical.tensors)
    placed = place(replace(delta, backbone_digest=spec.digest), canonical.digest, backbone())
    del delta
    held = sum(storage.nbytes() for pointer, storage in _memory().items() if pointer not in before)
    assert placed.device_bytes == pytest.approx(held, rel=0.02)


def _memory() -> dict[int, torch.UntypedStorage]:
    """The memory of every tensor that Python holds on to now, by address. Packed base weights are opaque."""
    found: dict[int, torch.UntypedStorage] = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor):  # isinstance would ask lazy modules for their class
            continue
        is_sparse = item.layout == torch.sparse_coo
        parts = [item._indices(), item._values()] if is_sparse else [item] * (item.layout == torch.strided)
        found |= {(storage := part.untyped_storage()).data_ptr(): storage for part in parts}
    return found


def bottleneck(seed: int = 0, **changes: Any) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    site = Site("down.out", seed)
    A, B = torch.randn(4, 8, generator=draw), torch.randn(8, 4, generator=draw)
    return LowRank(**{"read": site, "write": site, "A": A, "B": B, "activation": "relu", **changes})


def prefix() -> AttnPrefix:
    return AttnPrefix(layer=0, key=torch.ones(2, 1, 4), value=torch.ones(2, 1, 4))


@pytest.mark.parametrize(
    ("ops", "family"),
    [
        ((bottleneck(0), bottleneck(1)), "additive"),
        ((bottleneck(0, A=torch.eye(4, 8)),), "unified"),  # pruned, as SparseAdapter leaves it
        ((bottleneck(0), prefix()), "hybrid"),  # as MAM
        ((bottleneck(0, read=Site("ffn.x", 0), activation="identity"), prefix()), "hybrid"),
        ((bottleneck(0, activation="identity"),), "additive"),
        ((VirtualTokens(embeddings=torch.ones(2, 8)),), "additive"),
    ],
)
def test_families_of_combinations(ops: tuple[Any, ...], family: str) -> None:
    delta = Delta(method="CALLED_LORA", ops=ops)
    assert describe(delta, to_canonical(delta))["family"] == family


def test_the_name_that_the_uploader_gives_decides_nothing() -> None:
    delta, canonical = stored("prefix_tuning")
    assert describe(replace(delta, method="LORA"), canonical) == describe(delta, canonical)


def test_a_bottleneck_of_adapterhub() -> None:
    case = GoldenCase("seq_bn", "llama")
    delta = read_directory(case.directory, spec_of(case.backbone(), GOLDEN_NAME))
    found = describe(delta, to_canonical(delta))
    assert tuple(flat(found[name]) for name in LISTED) == (
        "additive", "dense", "fixed: dense", "addition", "none", "hidden", "sequential", 3, "direct addition",
        "residual",
    )  # fmt: skip
