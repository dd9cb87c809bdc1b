"""The canonical pair: equal deltas give equal bytes, everything comes back, and a bad pair is refused as an upload."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from adapters.canonical import Canonical, digest_of, from_canonical, to_canonical, typology
from adapters.errors import InvalidDelta
from adapters.formats import read_directory, read_upload
from adapters.normal_form import (
    Affine,
    AttnPrefix,
    Delta,
    Head,
    LinearMap,
    LowRank,
    Op,
    Rows,
    Site,
    VirtualTokens,
    WeightDelta,
)
from adapters.positions import FromInvocation
from tests.cases import (
    DIGEST,
    GOLDEN_CASES,
    GOLDEN_NAME,
    PEFT_CASES,
    Case,
    GoldenCase,
    case_id,
    spec_of,
    tiny_backbone,
)

SPEC = spec_of(tiny_backbone("llama"))


@lru_cache
def sample() -> Delta:
    """One op of every kind that fits the tiny Llama together, with every optional field used somewhere."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shared = random(4, 32)
    ops: tuple[Op, ...] = (
        LowRank(read=Site("attn.x", 0), write=Site("q.out", 0), A=shared, B=random(32, 4), scaling=1.5),
        LowRank(read=Site("attn.x", 0), write=Site("k.out", 0), A=shared, B=random(16, 4).bfloat16()),
        LowRank(
            read=Site("layer.out", 1),
            write=Site("layer.out", 1),
            A=random(3, 32),
            B=random(32, 3),
            a_bias=random(3),
            b_bias=random(32),
            activation="gelu_new",
            positions=FromInvocation((5, 0)),
        ),
        LowRank(
            read=Site("ffn.r", 1),
            write=Site("down.out", 1),
            A=random(3, 32),
            B=random(32, 3),
            in_norm_weight=random(32),
            in_norm_bias=random(32),
            out_norm_weight=random(32),
            out_norm_bias=random(32),
            norm_eps=1e-5,
        ),
        AttnPrefix(
            layer=1,
            key=random(4, 2, 8),
            value=random(4, 2, 8),
            merge="separate",
            gate=random(1),
            activation="relu",
        ),
        Affine(site=Site("down.out", 2), side="input", scale=random(64)),
        Affine(site=Site("q.out", 0), scale=random(32), covers_bias=False, weight_normalized=True),
        Affine(site=Site("o.out", 0), shift=random(32).half()),
        Affine(site=Site("final"), weight=random(32)),
        LinearMap(
            site=Site("q.out", 0),
            side="output",
            blocks=random(1, 4, 8, 8),
            order=torch.arange(32).int()[None],
        ),
        LinearMap(site=Site("k.out", 0), reflections=torch.eye(32)[:2]),
        WeightDelta(
            site=Site("v.out", 0),
            layout="sparse",
            values=random(3),
            indices=torch.tensor([[0, 1, 2], [5, 4, 3]], dtype=torch.int32),
            scaling=2.0,
        ),
        WeightDelta(site=Site("v.out", 1), layout="kron", values=random(4, 8), left=random(4, 4)),
        Rows(site=Site("embed"), ids=torch.tensor([3, 1], dtype=torch.int32), rows=random(2, 32)),
        Head(site=Site("logits"), weight=random(97, 32), bias=random(97)),
        *(AttnPrefix(layer=layer, key=random(5, 2, 8), value=random(5, 2, 8)) for layer in range(3)),
    )
    return Delta(
        method="test",
        ops=ops,
        position_offset=5,
        backbone_digest=DIGEST,
        labels={"team": "β"},
        lineage={"format": "hand"},
    )


def equal(one: Delta, other: Delta) -> bool:
    """Field by field, tensors by dtype and bits."""
    for left, right in zip(one.ops, other.ops, strict=True):
        if type(left) is not type(right):
            return False
        for item in fields(left):
            a, b = getattr(left, item.name), getattr(right, item.name)
            same = (
                a.dtype == b.dtype and a.equal(b) if isinstance(a, Tensor) else a == b and type(a) is type(b)
            )
            if not same:
                return False
    return replace(one, ops=()) == replace(other, ops=())


def test_everything_comes_back() -> None:
    pair = to_canonical(sample())
    again = from_canonical(pair.manifest, pair.tensors)
    assert equal(again, sample())
    assert to_canonical(again) == pair
    assert pair.size_bytes == len(pair.manifest) + len(pair.tensors)
    first, second = again.ops[:2]
    assert isinstance(first, LowRank)
    assert isinstance(second, LowRank)
    assert first.A is second.A
    assert again.num_parameters == sample().num_parameters


@pytest.mark.parametrize("case", PEFT_CASES, ids=case_id)
def test_each_peft_case_round_trips_as_an_upload(case: Case, tmp_path: Path) -> None:
    case.save(tmp_path)
    spec = spec_of(tiny_backbone(case.family))
    round_trip(read_directory(tmp_path, spec), spec)


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=case_id)
def test_each_golden_case_round_trips_as_an_upload(case: GoldenCase) -> None:
    spec = spec_of(case.backbone(), GOLDEN_NAME)
    round_trip(read_directory(case.directory, spec), spec)


def round_trip(delta: Delta, spec: Any) -> None:
    pair = to_canonical(delta)
    again = read_upload({"manifest.json": pair.manifest, "tensors.safetensors": pair.tensors}, spec)
    assert equal(again, delta)
    assert to_canonical(again).digest == pair.digest


def test_equal_deltas_from_other_memory_give_equal_bytes() -> None:
    # strided views of larger buffers, so that the memory's layout can't leak into the bytes
    moved = {id(value): torch.stack([value, value + 1], dim=-1)[..., 0] for _, _, value in sample().tensors()}
    ops = [
        replace(
            op, **{i.name: moved[id(v)] for i in fields(op) if isinstance(v := getattr(op, i.name), Tensor)}
        )
        for op in sample().ops
    ]
    assert to_canonical(replace(sample(), ops=tuple(ops))) == to_canonical(sample())


def test_sharing_in_memory_does_not_reach_the_bytes() -> None:
    """Two equal tensors are stored once, so reading gives one shared object: the digest must not notice."""
    ops = [
        LowRank(
            read=Site("attn.x", 0), write=Site(f"{name}.out", 0), A=torch.ones(4, 32), B=torch.ones(width, 4)
        )
        for name, width in (("q", 32), ("k", 16))
    ]
    pair = to_canonical(replace(sample(), ops=tuple(ops)))
    assert to_canonical(from_canonical(pair.manifest, pair.tensors)).digest == pair.digest


def test_equal_tensors_are_stored_once() -> None:
    pair = to_canonical(sample())
    assert len(load(pair.tensors)) == len({id(tensor) for _, _, tensor in sample().tensors()})
    ones = VirtualTokens(embeddings=torch.ones(2, 32)), VirtualTokens(embeddings=torch.ones(2, 32))
    assert len(load(to_canonical(replace(sample(), ops=ones)).tensors)) == 1


def test_equal_bytes_of_other_shape_or_dtype_are_other_tensors() -> None:
    one = VirtualTokens(embeddings=torch.zeros(2, 32))
    for other in (torch.zeros(32, 2), torch.zeros(2, 32).half(), torch.zeros(4, 32).half()):
        pair = to_canonical(replace(sample(), ops=(one, VirtualTokens(embeddings=other))))
        assert len(load(pair.tensors)) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda delta: replace(delta, method="other"),
        lambda delta: replace(delta, position_offset=0),
        lambda delta: replace(delta, backbone_digest="6" * 64),
        lambda delta: replace(delta, labels={}),
        lambda delta: replace(delta, lineage={}),
        lambda delta: replace(delta, ops=delta.ops[1:]),
        lambda delta: replace(delta, ops=(replace(delta.ops[0], scaling=1.25), *delta.ops[1:])),
        lambda delta: replace(delta, ops=(replace(delta.ops[0], B=delta.ops[0].B + 1e-6), *delta.ops[1:])),
        lambda delta: replace(delta, ops=(replace(delta.ops[0], B=delta.ops[0].B.double()), *delta.ops[1:])),
    ],
)
def test_the_digest_covers_every_field(change: Callable[[Delta], Delta]) -> None:
    pair, other = to_canonical(sample()), to_canonical(change(sample()))
    assert pair.digest != other.digest
    assert len(pair.digest) == 64
    assert digest_of(pair.manifest, pair.tensors) == pair.digest


def test_the_digest_knows_where_one_file_ends() -> None:
    assert digest_of(b"ab", b"c") != digest_of(b"a", b"bc")
    assert digest_of(b"", b"manifest") != digest_of(b"manifest", b"")


def test_typology_follows_from_the_ops() -> None:
    assert typology(sample()) == {
        "insertion_form": [
            "addition",
            "parallel",
            "prefix",
            "replacement",
            "scaling",
            "sequential",
            "transformation",
        ],
        "workspace": [
            "down.out",
            "embed",
            "final",
            "k.out",
            "layer.out",
            "logits",
            "o.out",
            "q.out",
            "v.out",
        ],
        "op_kinds": ["affine", "attn_prefix", "head", "linear_map", "low_rank", "rows", "weight_delta"],
    }
    stored = json.loads(to_canonical(sample()).manifest)["typology"]
    assert stored == typology(sample()) | {"num_parameters": sample().num_parameters}


# ---- bad pairs, through the upload's checks -----------------------------------------------------------------------


def refusal(pair: Canonical | tuple[bytes, bytes], **claims: str) -> InvalidDelta:
    manifest, tensors = (pair.manifest, pair.tensors) if isinstance(pair, Canonical) else pair
    with pytest.raises(InvalidDelta) as caught:
        read_upload({"manifest.json": manifest, "tensors.safetensors": tensors}, SPEC, **claims)
    return caught.value


def edited(edit: Callable[[dict[str, Any]], object]) -> tuple[bytes, bytes]:
    pair = to_canonical(sample())
    raw = json.loads(pair.manifest)
    edit(raw)
    return json.dumps(raw).encode(), pair.tensors


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda raw: raw.update(format="deltamux/9"), "deltamux/1"),
        (lambda raw: raw.pop("format"), "format"),
        (lambda raw: raw.pop("lineage"), "lineage: got nothing"),
        (lambda raw: raw.update(position_offset="5"), "position_offset: got a string"),
        (lambda raw: raw.update(position_offset=5.5), "position_offset: got a number"),
        (lambda raw: raw.update(method=None), "method: got null"),
        (lambda raw: raw.update(ops={}), "ops: got an object"),
        (lambda raw: raw.update(extra=1), "'extra'"),
        (lambda raw: raw.update(labels={"a": 1}), "strings"),
        (lambda raw: raw.update(ops=[]), "not used by any op"),
        (lambda raw: raw["ops"].append(7), "manifest"),
        (lambda raw: raw["ops"][0].update(kind="layer_plan"), "'layer_plan'"),
        (lambda raw: raw["ops"][0].update(kind="lora"), "lora"),
        (lambda raw: raw["ops"][0].update(gain=2), "gain"),
        (lambda raw: raw["ops"][0].pop("A"), "A"),
        (lambda raw: raw["ops"][0].update(A="0" * 32), "0" * 32),
        (lambda raw: raw["ops"][0].update(A=[1]), "TypeError"),
        (lambda raw: raw["ops"][0].update(write=3), "AttributeError"),
        (lambda raw: raw["ops"][0].update(write="0.zzz"), "unknown site"),
        (lambda raw: raw["ops"][0].update(write="7.q.out"), "layer 7 is out of range"),
        (lambda raw: raw["ops"][0].update(scaling="1"), "scaling"),
        (lambda raw: raw["ops"][0].update(scaling=True), "scaling"),
        (lambda raw: raw["ops"][0].update(activation="prelu"), "activation"),
        (lambda raw: raw["ops"][0].update(activation=["relu"]), "activation"),
        (lambda raw: raw["ops"][4].update(covers_bias=0), "covers_bias"),
        (lambda raw: raw["ops"][3].update(side="both"), "side"),
        (lambda raw: raw["ops"][3].update(side=[]), "side"),
        (lambda raw: raw["ops"][8].update(layer="2"), "layer"),
        (lambda raw: raw["ops"][8].update(layer=[2]), "layer"),
        (lambda raw: raw["ops"][2].update(positions={"from_invocation": [97]}), "ids from 0 to 96"),
        (lambda raw: raw["ops"][2].update(positions={"from_invocation": [True]}), "ids from 0 to 96"),
        (lambda raw: raw["ops"][2].update(positions={"from_invocation": []}), "0 invocation tokens"),
        (lambda raw: raw["ops"][2].update(positions={"from_invocation": 5}), "a from_invocation list"),
        (lambda raw: raw["ops"][2].update(positions={"from_invocation": [[5]]}), "a from_invocation list"),
        (lambda raw: raw["ops"][2].update(positions={"last_tokens": 0}), "expected 1 to 256 tokens"),
        (lambda raw: raw["ops"][2].update(positions={"first_tokens": 257}), "expected 1 to 256 tokens"),
        (lambda raw: raw["ops"][2].update(positions={"first_tokens": True}), "a number of first_tokens"),
        (lambda raw: raw["ops"][2].update(positions={"first": [5]}), "a from_invocation list"),
        (lambda raw: raw["ops"][2].update(positions={}), "manifest"),
        (lambda raw: raw["ops"][2].update(positions=[5]), "manifest"),
        (lambda raw: raw.update(task="token-cls"), "task"),
        (lambda raw: raw.update(method="a\u202eb"), "method"),
        (lambda raw: raw.update(backbone_digest="0" * 64), "backbone_digest"),
        (lambda raw: raw.update(position_offset=4), "position_offset: 4"),
    ],
)
def test_bad_manifests_are_refused_by_name(edit: Callable[[dict[str, Any]], object], named: str) -> None:
    assert named in str(refusal(edited(edit)))


def test_hostile_text_from_a_manifest_is_escaped_and_cut() -> None:
    for edit in (
        lambda raw: raw["ops"][0].update(A="\u202e\x1b[31m"),
        lambda raw: raw["ops"][0].update({"\n" * 9: 1}),
        lambda raw: raw["ops"][0].update(A="x" * 100_000),
        lambda raw: raw["ops"][0].update(write="\r\n" * 99),
    ):
        text = str(refusal(edited(edit)))
        assert len(text) < 5000
        assert text.isascii()
        assert text.isprintable()


def test_bad_files_are_refused() -> None:
    pair = to_canonical(sample())
    assert "truncated" in str(refusal((pair.manifest, pair.tensors[:40])))
    assert "appears twice" in str(refusal((b'{"format": 1, "format": 1}', pair.tensors)))
    spoiled = load(pair.tensors)
    name = next(key for key, tensor in spoiled.items() if tensor.is_floating_point())
    spoiled[name].view(-1)[0] = math.nan
    assert f"'{name}' has 1 non-finite value" in str(refusal((pair.manifest, save(spoiled))))


def test_unused_tensors_are_named() -> None:
    pair = to_canonical(sample())
    stored = load(pair.tensors) | {"ghost": torch.ones(1)}
    assert "ghost" in str(refusal((pair.manifest, save(stored))))


def test_a_pair_without_a_backbone_is_bound_to_this_one() -> None:
    manifest, tensors = edited(lambda raw: raw.update(backbone_digest=""))
    files = {"manifest.json": manifest, "tensors.safetensors": tensors}
    delta = read_upload(files, SPEC)
    assert (delta.backbone_digest, delta.lineage) == (DIGEST, {"format": "hand", "base": "unstated"})
    assert read_upload(files, SPEC, backbone_digest=DIGEST).lineage == {"format": "hand"}
    assert refusal((manifest, tensors), backbone_digest="0" * 64).param == "backbone_digest"


def test_an_explicit_digest_must_agree_too() -> None:
    assert refusal(to_canonical(sample()), backbone_digest="0" * 64).param == "backbone_digest"


def test_tensors_that_overlap_in_one_storage_are_stored_apart() -> None:
    """RandLoRA slices one base for modules of different width; safetensors refuses overlapping tensors."""
    base = torch.arange(24.0)
    sites = (Site("up.out", 0), Site("up.out", 1))
    slices = (base.view(6, 4), base[:16].view(4, 4))
    ops = tuple(WeightDelta(site=s, layout="dense", values=v) for s, v in zip(sites, slices, strict=True))
    stored = to_canonical(Delta(method="RANDLORA", ops=ops, backbone_digest=DIGEST))
    back = from_canonical(stored.manifest, stored.tensors)
    assert [op.values.tolist() for op in back.ops if isinstance(op, WeightDelta)] == [
        v.tolist() for v in slices
    ]
