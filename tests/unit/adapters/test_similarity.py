"""Likeness of prompts: 1 for itself, symmetric, and as the papers' formulas say."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.canonical import to_canonical
from adapters.diff import StoredDelta
from adapters.normal_form import AttnPrefix, Delta, LowRank, Op, Site, VirtualTokens
from adapters.similarity import Prompt, mean_cosine, overlap, read_prompt, token_cosine
from adapters.store import LocalBlobStore


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def prefix(seed: int, length: int = 4, layers: int = 2) -> list[Op]:
    return [
        AttnPrefix(layer=n, key=draw(seed + n, length, 2, 4), value=draw(seed + n + 90, length, 2, 4))
        for n in range(layers)
    ]


def stored(tmp_path: Path, *ops: Op) -> Prompt | None:
    store = LocalBlobStore(tmp_path)
    canonical = to_canonical(Delta(method="X", ops=ops, backbone_digest="b" * 64))
    store.put(canonical.digest, canonical.manifest, canonical.tensors)
    return read_prompt(StoredDelta(store, canonical.digest))


def some(tmp_path: Path) -> list[Prompt]:
    found = [stored(tmp_path, VirtualTokens(embeddings=draw(seed, 5, 16))) for seed in range(4)]
    return [prompt for prompt in found if prompt is not None]


def test_self_is_one_and_order_does_not_matter(tmp_path: Path) -> None:
    prompts = [*some(tmp_path), stored(tmp_path, *prefix(3))]
    for prompt in prompts:
        assert prompt is not None
        assert (mean_cosine(prompt, prompt), token_cosine(prompt, prompt)) == (1.0, 1.0)
    for one, two in itertools.permutations(some(tmp_path), 2):
        assert mean_cosine(one, two) == mean_cosine(two, one) < 1
        assert token_cosine(one, two) == token_cosine(two, one) != mean_cosine(one, two)


def test_cosines_are_those_of_numpy(tmp_path: Path) -> None:
    one, two = some(tmp_path)[:2]
    a, b = one.tokens.numpy(), two.tokens.numpy()

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))

    assert mean_cosine(one, two) == pytest.approx(cosine(a.mean(axis=0), b.mean(axis=0)), abs=1e-12)
    pairs = [cosine(x, y) for x, y in zip(a, b, strict=True)]
    assert token_cosine(one, two) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_a_prefix_is_its_keys_and_values_of_all_layers(tmp_path: Path) -> None:
    ops = prefix(1)
    prompt = stored(tmp_path, *reversed(ops))
    assert prompt is not None
    expected = torch.cat([part.flatten(1) for op in ops for part in (op.key, op.value)], dim=1)  # type: ignore[union-attr]
    assert torch.equal(prompt.tokens, expected.double())


def test_prompts_of_other_lengths_have_no_token_cosine_and_other_forms_are_told_apart(tmp_path: Path) -> None:
    short, long = stored(tmp_path, *prefix(1)), stored(tmp_path, *prefix(2, length=6))
    assert short is not None
    assert long is not None
    assert short.form == long.form
    assert token_cosine(short, long) is None
    assert -1 <= mean_cosine(short, long) < 1
    assert short.form != some(tmp_path)[0].form


def test_what_is_no_prompt(tmp_path: Path) -> None:
    site = Site("v.out", 0)
    lora = LowRank(read=Site("attn.x", 0), write=site, A=draw(1, 2, 8), B=draw(2, 8, 2))
    assert stored(tmp_path, lora) is None
    assert stored(tmp_path, *prefix(1)[:1], *prefix(5, length=9)[1:]) is None
    mixed = stored(tmp_path, lora, *prefix(1))  # beside other ops, the prompt counts
    assert mixed is not None


def test_overlap_of_activations() -> None:
    assert overlap(b"\xf0", b"\xf0") == 1.0
    assert overlap(b"\xf0\x01", b"\x30\x03") == overlap(b"\x30\x03", b"\xf0\x01") == 3 / 6
    assert overlap(b"\xf0", b"\x0f") == 0.0
    assert overlap(b"\x00", b"\x00") == 1.0
    assert (overlap(b"", b""), overlap(b"\x01", b"\x01\x01")) == (None, None)


def test_a_prompt_of_zeros_is_like_nothing_but_itself() -> None:
    zeros, ones = (Prompt((), fill(2, 3).double()) for fill in (torch.zeros, torch.ones))
    assert (mean_cosine(zeros, zeros), mean_cosine(zeros, ones)) == (1.0, 0.0)
