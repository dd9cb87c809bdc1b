"""Two stored deltas compared: norms as a float64 formula says, by pieces as well as whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import diff
from adapters.canonical import to_canonical
from adapters.diff import StoredDelta, compare
from adapters.errors import StoreError
from adapters.normal_form import Affine, AttnPrefix, Delta, LowRank, Op, Site, VirtualTokens, WeightDelta
from adapters.store import LocalBlobStore


@pytest.fixture
def store(tmp_path: Path) -> LocalBlobStore:
    return LocalBlobStore(tmp_path)


@pytest.fixture(params=["whole", "in pieces"], autouse=True)
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in pieces":
        monkeypatch.setattr(diff, "WHOLE_BYTES", 0)
        monkeypatch.setattr(diff, "_PIECE_BYTES", 56)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(seed: int, rank: int = 3, **changes: Any) -> LowRank:
    factors = {"A": draw(seed, rank, 8), "B": draw(seed + 50, 6, rank), "scaling": 1.5}
    return LowRank(**{"read": Site("attn.x", 0), "write": Site("q.out", 0), **factors, **changes})


def weight(op: LowRank) -> torch.Tensor:
    return op.scaling * op.B.double() @ op.A.double()


def put(store: LocalBlobStore, *ops: Op, **changes: Any) -> StoredDelta:
    canonical = to_canonical(Delta(**{"method": "LORA", "ops": ops, "backbone_digest": "b" * 64, **changes}))
    store.put(canonical.digest, canonical.manifest, canonical.tensors)
    return StoredDelta(store, canonical.digest)


def only(found: dict[str, Any]) -> dict[str, Any]:
    (entry,) = found["ops"]
    return entry


@pytest.mark.parametrize("rank", [3, 5])
def test_low_ranks_are_compared_by_the_change_of_the_weight(store: LocalBlobStore, rank: int) -> None:
    one, two = lora(1), lora(2, rank, scaling=0.5)
    entry = only(compare(put(store, one), put(store, two)))
    assert (entry["site"], entry["sizes"]) == ("0.attn.x -> 0.q.out", [{"rank": 3}, {"rank": rank}])
    assert entry["norms"] == pytest.approx([float(weight(op).norm()) for op in (one, two)], rel=1e-12)
    assert entry["difference"] == pytest.approx(float((weight(one) - weight(two)).norm()), rel=1e-12)
    assert entry["settings"] == [{"field": "scaling", "values": [1.5, 0.5]}]


def test_other_factors_of_the_same_weight_are_no_difference(store: LocalBlobStore) -> None:
    one = lora(1)
    mix = draw(9, 3, 3).double() + 3 * torch.eye(3)
    two = replace(one, B=(one.B.double() @ mix).float(), A=(mix.inverse() @ one.A.double()).float())
    entry = only(compare(put(store, one), put(store, two)))
    assert 0 < entry["difference"] < 1e-5 * entry["norms"][0]


def test_the_same_content_is_exactly_equal(store: LocalBlobStore) -> None:
    found = compare(put(store, lora(1)), put(store, lora(1)))
    assert (found["fields"], found["distance"], only(found)["difference"]) == ([], 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_ops_are_compared_tensor_by_tensor(store: LocalBlobStore, dtype: torch.dtype) -> None:
    def prefix(seed: int) -> AttnPrefix:
        return AttnPrefix(layer=2, key=draw(seed, 5, 2, 4, dtype=dtype), value=draw(seed + 1, 5, 2, 4))

    one, two = prefix(1), prefix(7)
    entry = only(compare(put(store, one), put(store, two)))
    parts = [
        (a.double() - b.double()).square().sum() for a, b in ((one.key, two.key), (one.value, two.value))
    ]
    assert entry["difference"] == pytest.approx(float(sum(parts)) ** 0.5, rel=1e-12)
    assert (entry["site"], entry["sizes"]) == ("2.kv", [{"tokens": 5}] * 2)


def test_the_scaling_of_a_weight_delta_counts(store: LocalBlobStore) -> None:
    values = draw(1, 6, 8)
    one = WeightDelta(site=Site("q.out", 0), layout="dense", values=values, scaling=2.0)
    two = WeightDelta(site=Site("q.out", 0), layout="dense", values=2 * values)
    assert only(compare(put(store, one), put(store, two)))["difference"] == pytest.approx(0.0)


def test_what_can_not_be_subtracted_says_so(store: LocalBlobStore) -> None:
    short, long = (VirtualTokens(embeddings=draw(1, rows, 8)) for rows in (3, 4))
    found = compare(put(store, short), put(store, long))
    assert (only(found)["difference"], found["distance"]) == (None, None)
    assert only(found)["sizes"] == [{"tokens": 3}, {"tokens": 4}]
    bent = lora(1, activation="relu")
    assert only(compare(put(store, lora(1)), put(store, bent)))["difference"] is None


def test_an_op_that_only_one_has_stands_alone(store: LocalBlobStore) -> None:
    scale = Affine(site=Site("k.out", 1), scale=draw(3, 6))
    found = compare(put(store, lora(1), scale), put(store, lora(1)))
    added = found["ops"][1]
    assert added["norms"] == [pytest.approx(float(draw(3, 6).double().norm())), None]
    assert (added["difference"], added["sizes"][1], found["distance"]) == (None, None, None)
    assert compare(put(store, lora(1)), put(store, lora(1), scale))["ops"][1]["norms"][0] is None


def test_several_ops_at_one_place_are_paired_in_order(store: LocalBlobStore) -> None:
    found = compare(put(store, lora(1), lora(2)), put(store, lora(1), lora(3)))
    assert [entry["difference"] == 0 for entry in found["ops"]] == [True, False]
    assert found["distance"] == pytest.approx(float((weight(lora(2)) - weight(lora(3))).norm()))


def test_manifest_fields(store: LocalBlobStore) -> None:
    one = put(store, lora(1), labels={"0": "no"}, lineage={"from": "x"})
    two = put(store, lora(1), labels={"0": "yes"}, position_offset=4)
    assert compare(one, two)["fields"] == [
        {"field": "labels.0", "values": ["no", "yes"]},
        {"field": "lineage.from", "values": ["x", None]},
        {"field": "position_offset", "values": [0, 4]},
    ]


def test_a_missing_blob_and_a_damaged_one(store: LocalBlobStore) -> None:
    with pytest.raises(StoreError, match="not in the store"):
        StoredDelta(store, "a" * 64)
    store.put("c" * 64, b'{"ops": []}', b"\xff" * 16)
    with pytest.raises(StoreError, match="damaged"):
        StoredDelta(store, "c" * 64)
