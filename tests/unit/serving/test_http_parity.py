"""The parity record of an upload: kept in the proof where it fits what is uploaded, refused otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InvalidRequest
from adapters.parity import MAX_PROBES, MAX_RECORD_BYTES, TOLERANCE, ParityRecord, read_record
from tests.unit.serving.http_support import SPEC, digest, gateway

PROBE = {
    "source": "random",
    "prompt_tokens": 6,
    "new_tokens": 8,
    "error": 3e-7,
    "scale": 12.5,
    "greedy_equal": True,
}


def record(**changes: Any) -> dict[str, Any]:
    """A record of `lora(0)` on the gateway's backbone."""
    return {
        "format": "deltamux-parity/1",
        "library": "peft",
        "library_version": "0.21.2",
        "torch": "2.13.0+cpu",
        "dtype": "float32",
        "delta_digest": digest(),
        "backbone_digest": SPEC.digest,
        "probes": [PROBE],
        **changes,
    }


async def test_a_record_is_kept_in_the_proof(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.push("delta", parity=json.dumps(record()))
        assert reply.status_code == 201
        assert reply.json()["proof"]["parity"] == record()
        stored = (await g.http.get("/v1/adapters/delta/versions/1")).json()
        assert stored["proof"]["parity"] == record()
        without = await g.push("other", seed=1)
        assert "parity" not in without.json()["proof"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"delta_digest": "0" * 64}, "delta_digest"),
        ({"backbone_digest": "0" * 64}, "backbone_digest"),
        ({"probes": [PROBE, {**PROBE, "error": 2 * TOLERANCE}]}, "error 4.0e-04"),
        ({"probes": [{**PROBE, "greedy_equal": False}]}, "greedy text different"),
        ({"probes": []}, "probes"),
        ({"probes": [PROBE] * (MAX_PROBES + 1)}, "probes"),
        ({"probes": [{**PROBE, "error": -1.0}]}, "probes.0.error"),
        ({"probes": [{**PROBE, "error": "small"}]}, "probes.0.error"),
        ({"format": "deltamux-parity/2"}, "format"),
        ({"dtype": "int4"}, "dtype"),
        ({"library": "a b\n"}, "library"),
        ({"torch": "x" * 65}, "torch"),
        ({"extra": 1}, "extra"),
        ({"delta_digest": None}, "delta_digest"),
    ],
)
async def test_a_record_that_does_not_fit_is_refused_and_leaves_nothing(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.push("delta", parity=json.dumps(record(**changes)))
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["param"] == "parity"
        assert says in error["message"]
        assert (await g.http.get("/v1/adapters/delta")).status_code == 404
        assert set(g.store.iter_digests()) == set()


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"probes": [NaN]}', "x" * (MAX_RECORD_BYTES + 1)])
async def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        assert (await g.push("delta", parity=text)).status_code == 400
        assert (await g.http.get("/v1/adapters/delta")).status_code == 404


def test_the_largest_record_fits_into_its_field() -> None:
    wide = {**PROBE, "prompt_tokens": 1 << 20, "new_tokens": 1 << 20, "error": 1.2345678901234567e-05}
    text = json.dumps(record(probes=[wide] * MAX_PROBES))
    assert len(read_record(text).probes) == MAX_PROBES
    assert len(text) < MAX_RECORD_BYTES


def test_records_survive_their_own_json() -> None:
    made = ParityRecord.model_validate(record())
    assert read_record(made.model_dump_json()) == made
    with pytest.raises(InvalidRequest, match="at most"):
        read_record("x" * (MAX_RECORD_BYTES + 1))
